"""What `bench training` says of its timings: the lines of its table, each beside the FLOP model's prediction."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.run.bench_arms import WAYS, TrainingBed

FULL = "public_packed_kept"
"""The arm whose rate of operations sets the floor of the others: full rows, packed, nothing recomputed."""


@dataclass(frozen=True)
class Row:
    """A line of the table: an arm, or the mean of a fast and a slow one at the slow ratio.

    Attributes:
        name: Its key.
        title: What it is, in words.
        fast: The arm, or the fast one of two.
        slow: The slow one, or "".
    """

    name: str
    title: str
    fast: str
    slow: str = ""


ROWS = (
    Row("public", "public recipe: padded, checkpointed, scores of all places", "public"),
    Row("public_packed", "the same, packed", "public_packed"),
    Row("public_packed_kept", "the same, packed, nothing recomputed", "public_packed_kept"),
    Row("released", "DualSpeed as released", "released_fast", "released_slow"),
    Row("batched", "+ batched pruner, picks and labels not read by the host", "batched_fast", "batched_slow"),
    Row("once", "+ images encoded once", "batched_fast", "once_slow"),
    Row("head", "+ scores where labels are", "head_fast", "head_slow"),
    Row("padded", "trimtab, padded", "padded_fast", "padded_slow"),
    Row("packed", "+ packing", "packed_fast", "packed_slow"),
    Row("kept", "+ nothing recomputed", "fast", "slow"),
    Row("ours", "+ a mode for every sample: trimtab", "mixed"),
    Row("fast", "fast steps of trimtab alone", "fast"),
    Row("slow", "slow steps of trimtab alone", "slow"),
)


def summarise(bed: TrainingBed, timing: Mapping[str, Any], slow_ratio: float) -> dict[str, Any]:
    """Return the rows of the table, and the ratios that matter.

    Args:
        bed: For the predictions.
        timing: From `time_steps`.
        slow_ratio: Weight of the slow arm of a row with two.

    Returns:
        ``rows``: ``name``, ``title``, ``seconds_per_sample``, ``times_public`` and ``times_packed`` (median and
        quartiles over rounds, how many times faster than the public recipe, and than that with packing), what the FLOP
        model predicts for both, and ``over_floor`` (its time over that of its operations at the rate of `FULL`).
        ``summary``: the ratios of the last row.
    """
    taken = {row.name: _rounds(row, timing, slow_ratio) for row in ROWS if _arms_of(row) <= set(timing["steps"])}
    work = {row.name: _work(bed, row, slow_ratio) for row in ROWS if row.name in taken}
    rows = []
    for row in ROWS:
        if row.name not in taken:
            continue
        line: dict[str, Any] = {"name": row.name, "title": row.title}
        line["seconds_per_sample"] = statistics.median(taken[row.name]) / bed.shape.samples
        for base, key in (("public", "public"), ("public_packed", "packed"), ("public_packed_kept", "packed_kept")):
            if base in taken:
                line[f"times_{key}"] = quartiles([b / s for b, s in zip(taken[base], taken[row.name], strict=True)])
                line[f"predicted_{key}"] = work[base] / work[row.name]
        if FULL in taken:
            share = work[row.name] / work[FULL]
            line["over_floor"] = quartiles([s / f / share for f, s in zip(taken[FULL], taken[row.name], strict=True)])
        rows.append(line)
    return {"rows": rows, "summary": _summary(taken, rows)}


def _summary(taken: Mapping[str, list[float]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for base in ("public", "public_packed", "public_packed_kept", "released"):
        if base in taken and "ours" in taken:
            found[f"ours_over_{base}"] = quartiles([b / o for b, o in zip(taken[base], taken["ours"], strict=True)])
    fast = next((row for row in rows if row["name"] == "fast"), {})
    return {**found, "fast_over_floor": fast.get("over_floor")}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles (``low``, ``high``)."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "low": low, "high": high}


def padding_of(bed: TrainingBed) -> dict[str, float]:
    """Return places that are computed over real ones, in padded batches of full and of pruned rows."""
    found = {}
    for view in ("full", "fast"):
        way = replace(WAYS["public"], view=view)
        real = padded = 0
        for number in range(len(bed.updates)):
            for batch in bed.batches(way, number):
                lengths = bed.floor.lengths(view, batch.counts)
                real, padded = real + sum(lengths), padded + max(lengths) * len(lengths)
        found[view] = padded / real
    return found


def _arms_of(row: Row) -> set[str]:
    return {name for name in (row.fast, row.slow) if name}


def _rounds(row: Row, timing: Mapping[str, Any], slow_ratio: float) -> list[float]:
    fast = timing["steps"][row.fast]["seconds"]
    if not row.slow:
        return list(fast)
    slow = timing["steps"][row.slow]["seconds"]
    return [(1 - slow_ratio) * f + slow_ratio * s for f, s in zip(fast, slow, strict=True)]


def _work(bed: TrainingBed, row: Row, slow_ratio: float) -> float:
    fast = bed.work(WAYS[row.fast]).total
    return (1 - slow_ratio) * fast + slow_ratio * bed.work(WAYS[row.slow]).total if row.slow else fast
