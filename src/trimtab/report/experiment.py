"""The page of an experiment: arms over seeds and settings, per data set."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.report import rows
from trimtab.report.charts import ARM_COLORS, Bar, Line, bar_chart, line_chart
from trimtab.report.overlays import overlays_of
from trimtab.report.page import write_page
from trimtab.report.rows import Record

_SWEPT = ("keep_ratio", "slow_ratio")
_HELD = ("keep_ratio", "slow_ratio", "isolator_tokens", "kl_weight", "pruner", "schedule", "positions")


@dataclass(frozen=True)
class Group:
    """Records that differ in nothing but the seed.

    Attributes:
        arm: Name of the arm.
        label: Words for the arm and what sets it apart.
        records: One per seed.
    """

    arm: str
    label: str
    records: tuple[Record, ...]


def render_experiment(
    records: Sequence[Record] | str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    title: str = "DualSpeed: arms, seeds, settings",
    paragraphs: Sequence[str] = (),
    untimed: Collection[str] = (),
) -> Path:
    """Write the page of an experiment: one HTML file with everything inside, without scripts or outside sources.

    Records of one arm that differ only in the seed are one row, with mean and standard deviation over seeds. Ratios
    (time, accuracy kept) are taken against the full arm of the same data set and seed, then averaged. Curves over
    the keep ratio and the slow ratio appear where DualSpeed ran with several values of one and the other settings at
    their commonest values. An arm may carry ``results["curve"]``, a list of ``{"seconds", "accuracy"}``, to be
    drawn over time.

    Args:
        records: Records, or the directory that holds them.
        out_path: The HTML file.
        title: Main line and name of the page.
        paragraphs: What is to be said about the experiment, in plain text; the first stands out.
        untimed: Arms whose times say nothing, for example because the machine was busy; they are left out.

    Returns:
        The path of the page.

    Raises:
        DataError: No record, or an arm without what the page needs.
        OutputError: The page cannot be written.
    """
    found = rows.load(records)
    tables = [_table(found, dataset, arms, untimed) for dataset, arms in rows.arms_of(found).items()]
    overlays, left_out = overlays_of(found)
    return write_page(
        "experiment.html", out_path, found, page_title=title, paragraphs=list(paragraphs), tables=tables,
        overlays=overlays, left_out=left_out, settings=rows.settings_table(found), machine=rows.machine_table(found),
    )  # fmt: skip


def group_arms(arms: Sequence[Record]) -> list[Group]:
    """Return the records of one data set by arm and by the settings that tell records of an arm apart."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for arm in dict.fromkeys(str(record["results"]["arm"]) for record in arms):
        peers = [peer for peer in arms if peer["results"]["arm"] == arm]
        for record in sorted(peers, key=lambda peer: rows.variant_of(peer, peers)):
            groups.setdefault((arm, rows.variant_of(record, peers)), []).append(record)
    return [
        Group(arm, f"{rows.label_of(arm)}{', ' if variant else ''}{variant}", tuple(members))
        for (arm, variant), members in groups.items()
    ]


def ratios(group: Sequence[Record], arms: Sequence[Record], value: str) -> list[float]:
    """Return the ratios of a number to that of the full arm with the same seed; seeds without one are left out.

    Args:
        group: Records whose number stands above the line.
        arms: All records of the data set.
        value: ``"accuracy"`` or ``"seconds"``.
    """
    read = {"accuracy": rows.accuracy, "seconds": _seconds}[value]
    full = {arm["seed"]: read(arm) for arm in arms if arm["results"]["arm"] == "full"}
    return [read(record) / full[record["seed"]] for record in group if full.get(record["seed"])]


def retention_curve(arms: Sequence[Record], name: str) -> list[tuple[float, float, float]]:
    """Return value of a setting, mean retention and standard deviation over seeds, for DualSpeed's records.

    Args:
        arms: All records of one data set.
        name: The setting, ``"keep_ratio"`` or ``"slow_ratio"``; the other settings are held at their commonest value.
    """
    swept = [arm for arm in arms if str(arm["results"]["arm"]).startswith("dualspeed")]
    swept = [arm for arm in swept if isinstance(rows.setting(arm, name), (int, float))]
    for held in _HELD:
        if held != name and swept:
            common = statistics.mode(repr(rows.setting(arm, held)) for arm in swept)
            swept = [arm for arm in swept if repr(rows.setting(arm, held)) == common]
    points = []
    for value in sorted({float(rows.setting(arm, name)) for arm in swept}):
        kept = ratios([arm for arm in swept if float(rows.setting(arm, name)) == value], arms, "accuracy")
        if kept:
            points.append((value, *rows.mean_and_spread(kept)))
    return points


def _table(records: Sequence[Record], dataset: str, arms: Sequence[Record], untimed: Collection[str]) -> dict[str, Any]:
    groups = group_arms(arms)
    names = list(dict.fromkeys(group.arm for group in groups))
    floor = rows.baselines(records, dataset)
    told = ", ".join(f"{words} {rows.percent(value)}" for words, value in floor.items())
    return {
        "heading": f"Results on {dataset}",
        "rows": [_row(group, arms, names, group.arm not in untimed) for group in groups],
        "note": "Mean ± standard deviation over seeds; ratios are taken seed by seed against full tokens."
        + (f" Without looking at the image: {told}." if told else ""),
        "accuracy": _accuracy_chart(groups, names, floor, dataset),
        "equal_time": _time_chart([group for group in groups if group.arm not in untimed], names, dataset),
        "curves": [curve for name in _SWEPT if (curve := _curve(arms, name, dataset))],
    }


def _row(group: Group, arms: Sequence[Record], names: Sequence[str], timed: bool) -> dict[str, Any]:
    pruned = [value for record in group.records if (value := rows.pruned_accuracy(record)) is not None]
    is_full = group.arm == "full"
    return {
        "label": group.label,
        "main": group.label == rows.ARM_LABELS["dualspeed"],
        "variable": rows.variable_of(group.arm, names),
        "seeds": len(group.records),
        "accuracy": _percent([rows.accuracy(record) for record in group.records]),
        "pruned": _percent(pruned),
        "time": rows.duration(statistics.fmean(map(_seconds, group.records))) if timed else "–",
        "ratio": "–" if is_full or not timed else _number(ratios(group.records, arms, "seconds")),
        "kept": "–" if is_full else _percent(ratios(group.records, arms, "accuracy")),
        "steps": ", ".join(dict.fromkeys(f"{record['results']['steps']:,}" for record in group.records)),
    }


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, spread = rows.mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}\N{NO-BREAK SPACE}%" if len(values) > 1 else rows.percent(mean)


def _number(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, spread = rows.mean_and_spread(values)
    return f"{mean:.2f} ± {spread:.2f}" if len(values) > 1 else f"{mean:.2f}"


def _accuracy_chart(groups: Sequence[Group], names: Sequence[str], floor: Mapping[str, float], dataset: str) -> str:
    bars = []
    for group in groups:
        mean, spread = rows.mean_and_spread([rows.accuracy(record) for record in group.records])
        bars.append(Bar(group.label, mean, mean - spread, mean + spread, rows.color_of(group.arm, names)))
    return bar_chart(bars, f"Accuracy on {dataset}", marks=floor, percent=True)


def _time_chart(groups: Sequence[Group], names: Sequence[str], dataset: str) -> str:
    """Return accuracy over training time: a point per group, or a line where records carry a curve."""
    if not groups:
        return ""
    used = Counter(rows.color_of(name, names) for name in names)
    shared = {color for color, count in used.items() if count > 1}
    lines = []
    for group in groups:
        points = _mean_curve(group.records)
        seconds, accuracies = zip(*points, strict=True)
        color = rows.color_of(group.arm, names)
        kept = [100 * accuracy for accuracy in accuracies]
        label = rows.label_of(group.arm) if color not in shared else "other arms"
        lines.append(Line(label, seconds, kept, color=color, points=True))
    lines.sort(key=lambda line: line.color not in shared)  # the named ones on top of the others
    title = f"Accuracy against time on {dataset}"
    return line_chart(lines, title, x_label="training time (s)", y_label="accuracy on full images (%)")


def _mean_curve(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Return mean seconds and accuracy over seeds, point by point; the end of training is the last point."""
    curves = [
        [(float(p["seconds"]), float(p["accuracy"])) for p in record["results"].get("curve") or []]
        for record in records
    ]
    ends = [(_seconds(record), rows.accuracy(record)) for record in records]
    curves = [
        curve if curve and curve[-1][0] >= end[0] else [*curve, end] for curve, end in zip(curves, ends, strict=True)
    ]
    return [
        (statistics.fmean(seconds for seconds, _ in point), statistics.fmean(accuracy for _, accuracy in point))
        for point in zip(*curves, strict=False)
    ]


def _curve(arms: Sequence[Record], name: str, dataset: str) -> dict[str, str] | None:
    points = retention_curve(arms, name)
    if len(points) < 2:
        return None
    values, means, spreads = (tuple(axis) for axis in zip(*points, strict=True))
    words = name.replace("_", " ")
    line = Line("DualSpeed", values, [100 * m for m in means], [100 * s for s in spreads], ARM_COLORS["dualspeed"])
    drawing = line_chart(
        [line], f"Accuracy kept by {words} on {dataset}", x_label=words, y_label="accuracy kept (%)",
        log_x=min(values) > 0, marks={"full tokens": 100.0},
    )  # fmt: skip
    return {"heading": f"Accuracy kept against {words}", "drawing": drawing}


def _seconds(record: Record) -> float:
    return float(record["results"]["seconds_train"])
