"""Memory of a step, and the largest micro-batch or pack that fits, for `bench training`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from trimtab.bench.floor import Way
from trimtab.bench.measure import peak_memory
from trimtab.run.bench_arms import TrainingBed
from trimtab.run.bench_rows import make_updates
from trimtab.shapes import Tensor

SIZES = (4, 8)
"""Rows from which the memory of more rows is extended on a CPU."""
MIXED_SIZES = (10, 20)
"""The same for packs of both modes, of which a tenth is slow."""
MOST = 4096
"""Rows at which looking for more ends."""


@dataclass(frozen=True)
class StepMemory:
    """Memory of an arm.

    Attributes:
        rows: Rows of the batches that training has, at most.
        tokens: Real tokens of the one with most.
        peak_mib: Growth at the peak of its forward and backward pass, gradients included.
        held_mib: Weights and moments of the optimizer, which are there all the time.
        largest: Rows of mean length that fit into the memory together.
        method: How peak and largest were found.
    """

    rows: int
    tokens: int
    peak_mib: float
    held_mib: float
    largest: int
    method: str


def measure_memory(bed: TrainingBed, way: Way, memory_gib: float) -> StepMemory:
    """Measure the memory of an arm's steps.

    Args:
        bed: Model and samples.
        way: The arm.
        memory_gib: What the rows that fit are counted for; on CUDA not more than the device has.
    """
    batches = bed.batches(way, 0)
    tokens = [sum(bed.floor.lengths(way.view, batch.counts)) for batch in batches]
    fullest = max(range(len(batches)), key=tokens.__getitem__)
    peak = _peak(bed, lambda: bed.losses(way, 0, [batches[fullest]]))
    held = _held_mib(bed)
    if bed.device.type == "cuda":
        largest, method = _by_trying(bed, way, memory_gib), "tried out on the device"
    else:
        largest, method = _by_two_sizes(bed, way, memory_gib, held), "extended from two sizes"
    return StepMemory(
        rows=max(len(batch.rows) for batch in batches), tokens=tokens[fullest], peak_mib=peak, held_mib=held,
        largest=largest, method=method,
    )  # fmt: skip


def _peak(bed: TrainingBed, losses: Callable[[], Iterable[Tensor]]) -> float:
    def step() -> None:
        for loss in losses():
            loss.backward()

    bed.drop_gradients()
    try:
        return float(peak_memory(step, bed.device)["mib"])
    finally:
        bed.drop_gradients()


def _peak_of_rows(bed: TrainingBed, way: Way, rows: int) -> float:
    """Return the peak in MiB of one batch of rows of mean length."""
    shape = replace(bed.shape, samples=rows, micro_batch=rows, text_cv=1e-6)
    ratio = bed.config.slow_ratio
    update = make_updates(shape, 1, slow_ratio=ratio, seed=0, device=bed.device, dtype=bed.model.dtype)[0]
    batch = bed.collate(way, shape, update, range(rows))
    other = bed.changed(shape=shape, updates=[update])
    return _peak(bed, lambda: other.losses(way, 0, [batch]))


def _by_two_sizes(bed: TrainingBed, way: Way, memory_gib: float, held_mib: float) -> int:
    few, more = MIXED_SIZES if way.view == "mixed" else SIZES
    low, high = _peak_of_rows(bed, way, few), _peak_of_rows(bed, way, more)
    per_row = max((high - low) / (more - few), 1e-6)
    return max(0, int((memory_gib * 1024 - held_mib - (low - few * per_row)) / per_row))


def _by_trying(bed: TrainingBed, way: Way, memory_gib: float) -> int:
    total = torch.cuda.get_device_properties(bed.device).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib / total), bed.device)
    try:
        return largest_that_fits(lambda rows: _fits(bed, way, rows))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bed.device)


def largest_that_fits(fits: Callable[[int], bool], most: int = MOST) -> int:
    """Return the largest number up to `most` that fits, 0 for none: by doubling, then by halving what is between.

    Args:
        fits: Whether a number fits; with it every smaller one does.
        most: Where to stop.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > max(1, good // 16):  # one in sixteen is near enough
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _fits(bed: TrainingBed, way: Way, rows: int) -> bool:
    try:
        _peak_of_rows(bed, way, rows)
    except torch.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    bed.drop_gradients()
    gc.collect()  # the copies of the model hang in circles with their hooks
    torch.cuda.empty_cache()
    return fitted


def _held_mib(bed: TrainingBed) -> float:
    copies = ((3 if one.requires_grad else 1) * one.numel() * one.element_size() for one in bed.model.parameters())
    return float(sum(copies)) / 2**20
