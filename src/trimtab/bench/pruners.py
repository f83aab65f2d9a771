"""Batched pruners against loops over images: paired runs, ratios, and whether the picks agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from trimtab.errors import setting_error
from trimtab.ops.graphed import PATIENCE
from trimtab.pruners import Pruner, PrunerInput, Selection, build_pruner, kept_count, pruner_names


def bench_pruners(
    names: Sequence[str] | None = None,
    images: int = 16,
    tokens: int = 576,
    width: int = 1024,
    keep_ratio: float = 0.1,
    repeats: int = 5,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time every pruner on a batch and image by image.

    Each repeat times the batched call and the loop one after the other, in turns as to which goes first, so that a
    busy machine slows both; the ratio is the median of the paired ratios. One untimed round precedes.

    Args:
        names: Pruners to time; None means all.
        images: Images in the batch, at least 1.
        tokens: Tokens per image; a square number gets a square grid.
        width: Width of the features.
        keep_ratio: Share of the tokens kept.
        repeats: Timed rounds, at least 1.
        seed: Seed of the random tokens.
        device: Where to run, for example ``"cuda"``.
        progress: Called with pruners done and pruners in all.

    Returns:
        A dict that JSON can hold: the settings, and under ``"pruners"`` for each name ``batched_s``, ``loop_s``
        (medians, seconds), ``ratio`` (loop over batched), ``same_picks``, and on CUDA ``peak_extra_mib`` of the
        batched call. DivPrune also has ``plain_loop_s``, ``plain_loop_ratio``, ``plain_loop_same_picks`` against
        a loop that handles one image at a time and reads each pick back, and on CUDA ``graphed_s``,
        ``graphed_ratio`` (plain over graphed) and ``graphed_same_picks`` for its picks as one CUDA graph.

    Raises:
        SettingError: An unknown name, or a number outside its range.
    """
    for setting, value in (("images", images), ("width", width), ("repeats", repeats)):
        if value < 1:
            raise setting_error("bench_pruners", setting, "at least 1", value)
    num_keep = kept_count(tokens, keep_ratio)
    inputs = random_inputs(images, tokens, width, seed, torch.device(device))
    chosen, rows = list(names or pruner_names()), {}
    for name in chosen:
        rows[name] = _bench_one(name, inputs, num_keep, repeats)
        if progress is not None:
            progress(len(rows), len(set(chosen)))
    return {
        "images": images,
        "tokens": tokens,
        "width": width,
        "kept": num_keep,
        "keep_ratio": keep_ratio,
        "repeats": repeats,
        "seed": seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "pruners": rows,
    }


def random_inputs(images: int, tokens: int, width: int, seed: int, device: torch.device) -> PrunerInput:
    """Draw inputs that hold everything a pruner may need.

    Args:
        images: Number of images.
        tokens: Tokens per image.
        width: Width of features, states and words; keys are 64 wide.
        seed: Seed of the draw.
        device: Where the tensors shall be.

    Returns:
        The inputs.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    side = round(tokens**0.5)
    return PrunerInput(
        features=draw(images, tokens, width),
        grid=(side, side) if side * side == tokens else (1, tokens),
        cls_attention=draw(images, tokens).softmax(dim=1),
        hidden=draw(images, tokens, width),
        keys=draw(images, tokens, 64),
        text=draw(images, 16, width),
        draw=(seed, 0, 0),
    )


def plain_divprune_loop(features: torch.Tensor, num_keep: int) -> list[list[int]]:
    """DivPrune the plain way: one image at a time, picks in a list, each read back before the next.

    Args:
        features: Tokens of every image, (image, token, width).
        num_keep: How many to keep per image.

    Returns:
        Kept indices of every image, ascending.
    """
    chosen = []
    for tokens in features.float():
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        distance = 1 - unit @ unit.T
        picks: list[int] = []
        while len(picks) < num_keep:
            if picks:
                score = distance[picks].min(dim=0).values
                score[picks] = float("-inf")
            else:
                # The smallest distance of each token is the one to itself.
                score = distance.topk(min(2, len(distance)), dim=0, largest=False).values[-1]
            picks.append(int(score.argmax().item()))
        chosen.append(sorted(picks))
    return chosen


def _bench_one(name: str, inputs: PrunerInput, num_keep: int, repeats: int) -> dict[str, Any]:
    pruner = build_pruner(name)
    singles = [_single(inputs, image) for image in range(inputs.features.shape[0])]
    device = inputs.features.device
    batched, looped = _in_turns(
        lambda: pruner.select(inputs, num_keep), lambda: _loop(pruner, singles, num_keep), repeats, device
    )
    whole = pruner.select(inputs, num_keep)
    row = _compare("loop", batched, looped)
    row = {"batched_s": statistics.median(batched), **row}
    row["same_picks"] = torch.equal(whole.index, torch.cat([s.index for s in _loop(pruner, singles, num_keep)]))
    if device.type == "cuda":
        row["peak_extra_mib"] = _peak_mib(lambda: pruner.select(inputs, num_keep))
    if name == "divprune":
        batched, plain = _in_turns(
            lambda: pruner.select(inputs, num_keep),
            lambda: plain_divprune_loop(inputs.features, num_keep),
            repeats,
            device,
        )
        row.update(_compare("plain_loop", batched, plain))
        row["plain_loop_same_picks"] = whole.index.tolist() == plain_divprune_loop(inputs.features, num_keep)
        if device.type == "cuda":
            row.update(_bench_graphed(pruner, inputs, num_keep, repeats))
    return row


def _bench_graphed(pruner: Pruner, inputs: PrunerInput, num_keep: int, repeats: int) -> dict[str, Any]:
    """Time DivPrune with its picks launched as one CUDA graph against the same without."""
    graphed = build_pruner("divprune", {"graphed": True})
    for _ in range(PATIENCE + 1):  # the last of these calls captures
        found = graphed.select(inputs, num_keep)
    one, plain = _in_turns(
        lambda: graphed.select(inputs, num_keep),
        lambda: pruner.select(inputs, num_keep),
        repeats,
        inputs.features.device,
    )
    return {
        "graphed_s": statistics.median(one),
        "graphed_ratio": statistics.median(slow / fast for fast, slow in zip(one, plain, strict=True)),
        "graphed_same_picks": torch.equal(found.index, pruner.select(inputs, num_keep).index),
    }


def _compare(loop: str, batched: list[float], looped: list[float]) -> dict[str, Any]:
    ratio = statistics.median(slow / fast for fast, slow in zip(batched, looped, strict=True))
    return {f"{loop}_s": statistics.median(looped), "ratio" if loop == "loop" else f"{loop}_ratio": ratio}


def _loop(pruner: Pruner, singles: list[PrunerInput], num_keep: int) -> list[Selection]:
    return [pruner.select(single, num_keep) for single in singles]


def _single(inputs: PrunerInput, image: int) -> PrunerInput:
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs) if f.name not in ("grid", "draw")}
    seed, step, first = inputs.draw
    cut = {name: value[image : image + 1] for name, value in tensors.items() if value is not None}
    return replace(inputs, **cut, draw=(seed, step, first + image))


def _in_turns(
    one: Callable[[], object], other: Callable[[], object], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    _seconds(one, device), _seconds(other, device)
    first: list[float] = []
    second: list[float] = []
    for repeat in range(repeats):
        for call, times in ((one, first), (other, second))[:: 1 if repeat % 2 == 0 else -1]:
            times.append(_seconds(call, device))
    return first, second


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_mib(call: Callable[[], object]) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
