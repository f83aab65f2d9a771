"""`trimtab bench training`: the public recipe, DualSpeed as released and trimtab's, on the same samples in one run.

Every arm takes the same random samples through one model with random weights; what is compared is seconds per sample,
round by round. The prediction of the FLOP model stands beside each measurement.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

import torch

from trimtab.bench.floor import PARTS
from trimtab.bench.shapes import LEAST_TEXT, TrainingShape, find_shape
from trimtab.bench.timing import time_steps
from trimtab.dualspeed import DualSpeedConfig
from trimtab.errors import SettingError, near_miss, setting_error
from trimtab.records import make_record
from trimtab.run.bench_arms import WAYS, TrainingBed
from trimtab.run.bench_curves import check_curves, measure_curves
from trimtab.run.bench_memory import measure_memory
from trimtab.run.bench_model import build_llava
from trimtab.run.bench_parts import split_seconds
from trimtab.run.bench_rows import make_updates
from trimtab.run.bench_summary import FULL, padding_of, summarise

KIND = "bench_training"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORTED = ("public", "public_packed", FULL, "released_fast", "released_slow", "fast", "slow", "mixed")
"""Arms whose time is split and whose memory is measured."""
RECOMPUTED = ("packed_fast", "packed_slow")
"""Arms of which only the memory is measured."""


def bench_training(
    size: str = "toy",
    device: str | None = None,
    dtype: str | None = None,
    attention: str = "sdpa",
    text_mean: float | None = None,
    text_cv: float | None = None,
    tiles: int | None = None,
    layers: int | None = None,
    micro_batch: int | None = None,
    samples: int | None = None,
    pack_tokens: int | None = None,
    keep_ratio: float = 0.1,
    slow_ratio: float = 0.1,
    repeats: int = 5,
    arms: list[str] | None = None,
    curves: list[str] | None = None,
    memory: bool = True,
    memory_gib: float | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure training steps of a LLaVA with random weights on random rows.

    Args:
        size: One of `SHAPES`: ``toy``, ``llava-1.5-7b``, ``llava-next-7b``, ``small``.
        device: Where it runs; by default a GPU where there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default bfloat16 on a GPU, else float32.
        attention: ``attn_implementation`` of transformers.
        text_mean: Mean text tokens per sample; that of the size by default, like the following ones.
        text_cv: Standard deviation of the text lengths over their mean.
        tiles: Tiles per sample.
        layers: Decoder blocks, to cut a large model to what fits; time per block scales.
        micro_batch: Rows of a padded batch.
        samples: Samples of one update.
        pack_tokens: Most tokens of a pack.
        keep_ratio: Share of visual tokens that fast steps keep.
        slow_ratio: Share of slow steps and samples.
        repeats: Timed rounds.
        arms: Names of `WAYS` to measure; all by default.
        curves: Of ``keep``, ``text``, ``tiles``, ``ranks``; none by default.
        memory: Whether to measure memory too, which takes as long as some rounds.
        memory_gib: Memory that the largest batch is found for; by default that of the device, or 2 on a CPU.
        threads: CPU threads while measuring.
        seed: Of weights and samples.
        progress: Called with rounds done and rounds in all.

    Returns:
        The record, kind "bench_training": ``rows`` (see `ROWS`), ``arms``, ``summary``, ``memory``, ``curves``,
        ``padding``, ``out_of_memory`` and ``timing`` in full.

    Raises:
        SettingError: A setting does not fit.
    """
    started = datetime.now(timezone.utc)
    place = _device(device)
    changes = {
        "text_mean": text_mean, "text_cv": text_cv, "tiles": tiles, "layers": layers, "micro_batch": micro_batch,
        "samples": samples, "pack_tokens": pack_tokens,
    }  # fmt: skip
    shape = _shape(size, {name: value for name, value in changes.items() if value is not None})
    named = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    names, wanted = _arms(arms), tuple(curves or ())
    check_curves(wanted)
    _check(named, repeats, threads, memory_gib)
    if "ranks" in wanted and not {FULL, "fast", "slow"} <= set(names):
        raise setting_error("bench training", "arms", f"with {FULL}, fast and slow for the curve 'ranks'", names)
    config = DualSpeedConfig(keep_ratio=keep_ratio, slow_ratio=slow_ratio, seed=seed)
    _free_memory(place)  # a model of a call before may still hang in its own hooks
    with _threads(threads):
        model = build_llava(shape, device=place, dtype=DTYPES[named], attention=attention, seed=seed)
        updates = make_updates(shape, repeats, slow_ratio=slow_ratio, seed=seed, device=place, dtype=DTYPES[named])
        bed = TrainingBed(model, shape, updates, config)
        fitting = [name for name in names if place.type == "cpu" or _fits(bed, name)]
        if not fitting:
            raise SettingError("No arm fits the memory of the device. Lower --layers, --micro_batch or --pack_tokens.")
        timing = time_steps(
            {name: bed.runner(WAYS[name]) for name in fitting}, repeats=repeats, warmup=1, progress=progress
        )
        budget = memory_gib or _memory_of(place)
        results = {
            **summarise(bed, timing, slow_ratio),
            "arms": [_arm(bed, name, timing) for name in fitting],
            "memory": [
                {"arm": name, "budget_gib": budget, **asdict(measure_memory(bed, WAYS[name], budget))}
                for name in (*REPORTED, *RECOMPUTED)
                if memory and name in fitting
            ],
            "curves": measure_curves(bed, _possible(wanted, names, fitting), timing, max(1, repeats // 2), seed),
            "padding": padding_of(bed),
            "slow_share": sum(sum(update.slow) for update in updates) / (len(updates) * shape.samples),
            "out_of_memory": [name for name in names if name not in fitting],
            "timing": timing,
        }
        settings = {
            "size": size, "shape": asdict(shape), "device": place.type, "dtype": named, "attention": attention,
            "keep_ratio": keep_ratio, "slow_ratio": slow_ratio, "repeats": repeats, "arms": names,
            "curves": list(wanted), "memory_gib": budget, "threads": threads,
        }  # fmt: skip
        seconds = (datetime.now(timezone.utc) - started).total_seconds()
        return make_record(KIND, settings, results, seed=seed, started=started, seconds=seconds)


def _arm(bed: TrainingBed, name: str, timing: Mapping[str, Any]) -> dict[str, Any]:
    way, numbers = WAYS[name], range(min(2, len(bed.updates)))
    work, seconds = bed.work(way), timing["steps"][name]["median"]
    found: dict[str, Any] = {
        "name": name, "view": way.view, "style": way.style, "packing": way.packing, "recompute": way.recompute,
        "remedies": sorted(way.remedies), "seconds_per_sample": seconds / bed.shape.samples,
        "gflop_per_sample": work.total / len(bed.updates) / bed.shape.samples / 1e9,
        "gflop_per_second": work.total / len(bed.updates) / seconds / 1e9,
        "predicted_shares": {part: getattr(work, part) / work.total for part in PARTS},
    }  # fmt: skip
    if name in REPORTED:
        parts = split_seconds(bed, way, numbers)
        whole = sum(parts.values())
        found["shares"] = {part: value / whole for part, value in parts.items()}
        found["split_over_timed"] = whole / len(numbers) / seconds
    return found


def _shape(size: str, changes: Mapping[str, Any]) -> TrainingShape:
    shape = find_shape(size)
    if changes.get("micro_batch", 0) > 0 and "samples" not in changes:
        changes = {**changes, "samples": changes["micro_batch"] * max(1, shape.samples // changes["micro_batch"])}
    tiles = changes.get("tiles", shape.tiles)
    longest = shape.max_length + max(0, tiles - shape.tiles) * shape.tile_tokens
    packs = changes.get("pack_tokens", max(shape.pack_tokens, longest))
    least = max(1, tiles) * shape.tile_tokens + LEAST_TEXT
    if packs < least:
        raise setting_error("bench training", "pack_tokens", f"at least {least}, for one row of all tokens", packs)
    return replace(shape, **{**changes, "max_length": min(longest, packs), "pack_tokens": packs})


def _arms(names: Sequence[str] | None) -> list[str]:
    for name in names or ():
        if name not in WAYS:
            raise SettingError(f"There is no arm {name!r} of `bench training`. {near_miss(name, WAYS)}")
    return [name for name in WAYS if names is None or name in names]


def _check(dtype: str, repeats: int, threads: int, memory_gib: float | None) -> None:
    if dtype not in DTYPES:
        raise setting_error("bench training", "dtype", f"one of {', '.join(DTYPES)}", dtype)
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value < 1:
            raise setting_error("bench training", name, "at least 1", value)
    if memory_gib is not None and not memory_gib > 0:
        raise setting_error("bench training", "memory_gib", "above 0", memory_gib)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        told = str(error).splitlines()[0]
        raise setting_error("bench training", "device", f"one that torch can use ({told})", name) from error
    if place.type not in ("cpu", "cuda"):
        raise setting_error("bench training", "device", "cpu or cuda", name)
    return place


def _possible(wanted: Sequence[str], names: Sequence[str], fitting: Sequence[str]) -> tuple[str, ...]:
    """Return the curves whose arms did not run out of memory."""
    lost = set(names) - set(fitting)
    return tuple(name for name in wanted if not lost & ({FULL, "fast", "slow"} if name == "ranks" else {FULL, "mixed"}))


def _fits(bed: TrainingBed, name: str) -> bool:
    """Whether the updates of an arm fit into the memory of a GPU: the one with the largest batch is tried."""
    way = WAYS[name]

    def places(number: int) -> int:
        lengths = [bed.floor.lengths(way.view, batch.counts) for batch in bed.batches(way, number)]
        return max(sum(one) if way.packing else max(one) * len(one) for one in lengths)

    try:
        bed.update(way, max(range(len(bed.updates)), key=places))
    except torch.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    bed.drop_gradients()
    _free_memory(bed.device)
    return fitted


def _free_memory(device: torch.device) -> None:
    """Give back what nobody needs: models hang in circles with their hooks, and only the collector frees those."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _memory_of(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory / 2**30) if device.type == "cuda" else 2.0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
