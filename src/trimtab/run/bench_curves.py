"""Cost against keep ratio, text length, tiles and ranks, for `bench training`: measured beside the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trimtab.bench.rank_cost import TokenSeconds, simulate_ranks
from trimtab.bench.timing import time_steps
from trimtab.errors import SettingError, near_miss
from trimtab.run.bench_arms import WAYS, TrainingBed
from trimtab.run.bench_rows import make_updates

CURVES = ("keep", "text", "tiles", "ranks")
KEEP_RATIOS = (0.02, 0.05, 0.1, 0.25, 0.5)
TEXT_SHARES = (0.2, 1.0, 1.5, 2.5)
"""Text means as shares of that of the size; for LLaVA-1.5 these are 40, 200, 300 and 500 words."""
TILES = (1, 2, 5)
RANKS = (1, 2, 4, 8, 16, 32, 64)
FULL, OURS = "public_packed_kept", "mixed"
"""What a point compares: plain training given packing, and DualSpeed."""


def check_curves(names: tuple[str, ...]) -> None:
    """Raise where a curve is asked for that does not exist.

    Raises:
        SettingError: The name is none of `CURVES`.
    """
    for name in names:
        if name not in CURVES:
            raise SettingError(f"There is no curve {name!r} of `bench training`. {near_miss(name, CURVES)}")


def measure_curves(
    bed: TrainingBed, names: tuple[str, ...], timing: Mapping[str, Any], repeats: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the points of curves.

    Args:
        bed: Model and samples.
        names: Which, of `CURVES`.
        timing: From `time_steps` on the arms, for the cost of a token on simulated ranks.
        repeats: Timed rounds per point.
        seed: Of lengths and samples.

    Returns:
        Per curve a list of points: ``value``, ``speedup`` (packed full training over ours, median of the rounds),
        ``low`` and ``high`` (quartiles), ``predicted``; of ranks instead the seconds per sample and rank of each way to
        choose modes.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        if name == "ranks":
            found[name] = rank_points(bed, timing, seed)
        else:
            found[name] = [_point(value, make, repeats) for value, make in _beds(bed, name, seed)]
    return found


def _beds(bed: TrainingBed, name: str, seed: int) -> list[tuple[float, Callable[[], TrainingBed]]]:
    if name == "keep":
        possible = [ratio for ratio in KEEP_RATIOS if ratio * bed.shape.tile_tokens >= 1]
        return [(ratio, lambda ratio=ratio: bed.changed(keep_ratio=ratio)) for ratio in possible]  # type: ignore[misc]
    if name == "text":
        means = [share * bed.shape.text_mean for share in TEXT_SHARES]
        return [(mean, lambda mean=mean: _reshaped(bed, seed, text_mean=mean)) for mean in means]  # type: ignore[misc]
    return [(tiles, lambda tiles=tiles: _reshaped(bed, seed, tiles=tiles)) for tiles in TILES]  # type: ignore[misc]


def _reshaped(bed: TrainingBed, seed: int, **changes: Any) -> TrainingBed:
    shape, tiles = bed.shape, changes.get("tiles", bed.shape.tiles)
    more = (tiles - shape.tiles) * shape.tile_tokens
    longest = max(shape.max_length + more, shape.max_length)
    changed = replace(shape, **changes, max_length=longest, pack_tokens=max(shape.pack_tokens, longest))
    updates = make_updates(
        changed, len(bed.updates), slow_ratio=bed.config.slow_ratio, seed=seed, device=bed.device, dtype=bed.model.dtype
    )
    return bed.changed(shape=changed, updates=updates)


def _point(value: float, make: Callable[[], TrainingBed], repeats: int) -> dict[str, Any]:
    bed = make()
    full, ours = WAYS[FULL], WAYS[OURS]
    timing = time_steps({FULL: bed.runner(full), OURS: bed.runner(ours)}, repeats=repeats, warmup=1)
    ratio = timing["ratios"][OURS]
    predicted = bed.work(full).total / bed.work(ours).total
    return {
        "value": value, "speedup": ratio["median"], "low": ratio["low"], "high": ratio["high"], "predicted": predicted,
        "seconds_per_sample": timing["steps"][OURS]["median"] / bed.shape.samples,
    }  # fmt: skip


def rank_points(bed: TrainingBed, timing: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Return the seconds per sample and rank for several numbers of ranks, simulated with the measured arms."""
    steps = timing["steps"]
    tokens = {
        name: sum(
            sum(bed.floor.lengths(WAYS[name].view, batch.counts))
            for number in range(len(bed.updates))
            for batch in bed.batches(WAYS[name], number)
        )
        / len(bed.updates)
        for name in (FULL, "fast", "slow")
    }
    per_token = {name: steps[name]["median"] / tokens[name] for name in tokens}
    seconds = TokenSeconds(per_token[FULL], per_token["fast"], per_token["slow"])
    return [
        {
            "value": ranks,
            **simulate_ranks(
                bed.shape, bed.floor, seconds, ranks, slow_ratio=bed.config.slow_ratio, steps=max(50, 2000 // ranks),
                seed=seed,
            ),
        }
        for ranks in RANKS
    ]  # fmt: skip
