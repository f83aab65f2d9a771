"""The page of one run: three arms, what they cost, what they can, what was pruned."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.evaluate.compare import compare_accuracy
from trimtab.files import write_text_atomic
from trimtab.report import rows
from trimtab.report.charts import MODE_COLORS, Bar, Line, bar_chart, line_chart
from trimtab.report.rows import Record


def render_report(
    records: Sequence[Record] | str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    title: str = "trimtab: training on pruned visual tokens",
) -> Path:
    """Write the page of a run: one HTML file with everything inside, without scripts or outside sources.

    Args:
        records: Records, or the directory that holds them. Kind "arm" makes the tables and charts, "dataset" the
            lines that a model without eyes would reach, "pictures" the gallery.
        out_path: The HTML file.
        title: Small heading above the main line, and the name of the page.

    Returns:
        The path of the page.

    Raises:
        DataError: No record, or an arm without what the page needs.
        OutputError: The page cannot be written.
    """
    found = rows.load(records)
    tables = [_table(found, name, arms) for name, arms in rows.arms_of(found).items()]
    headline, lead, tiles = _summary(found)
    return write_page(
        "page.html", out_path, found, page_title=title, headline=headline, lead=lead, tiles=tiles, tables=tables
    )


def write_page(template: str, out_path: str | os.PathLike[str], records: Sequence[Record], **content: Any) -> Path:
    """Fill a template of this folder with what every page shows, and write it whole or not at all."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trimtab.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    text = environment.get_template(template).render(
        style=style,
        footer=_footer(records),
        pictures=rows.pictures_of(records),
        settings=rows.settings_table(records),
        machine=rows.machine_table(records),
        **content,
    )
    write_text_atomic(out_path, text)
    return Path(out_path)


def _footer(records: Sequence[Record]) -> str:
    commits = {f"{c['hash'][:12]}{' with local changes' * c['dirty']}": None for r in records if (c := r["commit"])}
    told = [f"{len(records)} records", *(f"commit {words}" for words in commits)]
    made = records[0]["versions"].get("trimtab", "")
    return f"{', '.join(told)}, started {records[0]['started'][:10]}. Written by trimtab {made}".rstrip() + "."


def _summary(records: Sequence[Record]) -> tuple[str, str, list[dict[str, str]]]:
    """Return main line, sentence below and tiles, from the first data set that has both arms."""
    for name, arms in rows.arms_of(records).items():
        by_name = {str(arm["results"]["arm"]): arm for arm in arms}
        if "full" in by_name and "dualspeed" in by_name:
            return _verdict(by_name, rows.baselines(records, name), name)
    return "Records of this run", "", []


def _verdict(arms: Mapping[str, Record], floor: Mapping[str, float], dataset: str) -> tuple[str, str, list[Any]]:
    full, dual = arms["full"], arms["dualspeed"]
    ratio = _time(dual) / _time(full)
    kept = rows.accuracy(dual) / rows.accuracy(full) if rows.accuracy(full) else None
    headline = f"DualSpeed took {ratio:.2f} of the training time" + (
        f" and kept {rows.percent(kept)} of the accuracy on full images." if kept is not None else "."
    )
    counts = sorted({arm["results"]["samples"] for arm in arms.values()})
    samples = f"the same {counts[0]:,} samples" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} samples"
    lead = (
        f"The same model was trained {len(arms)} times on {dataset}, on {samples} each time. "
        "All arms answer the same questions with every visual token in place."
    )
    tiles = [
        {"value": f"{1 / ratio:.2f} ×", "words": "faster training than on full tokens, measured in this run"},
        {
            "value": rows.percent(rows.accuracy(dual)),
            "words": f"DualSpeed; full tokens: {rows.percent(rows.accuracy(full))}",
        },
    ]
    if "pruned" in arms:
        lost = rows.accuracy(dual) - rows.accuracy(arms["pruned"])
        words = f"points above training on pruned tokens only ({rows.percent(rows.accuracy(arms['pruned']))})"
        tiles.append({"value": f"{100 * lost:+.1f}", "words": words})
    if "language only" in floor:
        tiles.append(
            {
                "value": rows.percent(floor["language only"]),
                "words": "is reached from the question alone, without the image",
            }
        )
    return headline, lead, tiles


def _table(records: Sequence[Record], dataset: str, arms: Sequence[Record]) -> dict[str, Any]:
    names = [str(arm["results"]["arm"]) for arm in arms]
    full = next((arm for arm in arms if arm["results"]["arm"] == "full"), None)
    floor = rows.baselines(records, dataset)
    dual = next((arm for arm in arms if arm["results"]["arm"] == "dualspeed"), None)
    return {
        "heading": f"Results on {dataset}",
        "rows": [_row(arm, full, names) for arm in arms],
        "note": _note(floor),
        "accuracy": _accuracy_chart(arms, names, floor, dataset),
        "steps": _step_chart(arms, dataset),
        "loss": _loss_chart(arms, dataset),
        "families": _family_chart(arms, names, dataset),
        "wrong": list(dual["results"]["accuracy_full"].get("wrong", []))[:12] if dual else [],
    }


def _row(arm: Record, full: Record | None, names: Sequence[str]) -> dict[str, Any]:
    results = arm["results"]
    name = str(results["arm"])
    low, high = results["accuracy_full"]["interval"]
    kept, interval = _kept(arm, full)
    return {
        "arm": name,
        "label": rows.label_of(name),
        "variable": rows.variable_of(name, names),
        "accuracy": rows.percent(rows.accuracy(arm)),
        "interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "pruned": rows.percent(rows.pruned_accuracy(arm)),
        "time": rows.duration(_time(arm)),
        "ratio": f"{_time(arm) / _time(full):.2f}" if full is not None else "–",
        "kept": kept,
        "kept_interval": interval,
        "samples": f"{results['samples']:,}",
    }


def _kept(arm: Record, full: Record | None) -> tuple[str, str]:
    """Return the share of the full arm's accuracy and its paired interval, in words."""
    if full is None or arm is full:
        return "–", ""
    ours, theirs = arm["results"]["accuracy_full"], full["results"]["accuracy_full"]
    if ours.get("marks") and len(ours["marks"]) == len(theirs.get("marks", "")):
        compared = compare_accuracy(ours, theirs)
        ends = compared["ratio_interval"]
        return rows.percent(compared["ratio"]), f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else ""
    return (rows.percent(rows.accuracy(arm) / rows.accuracy(full)) if rows.accuracy(full) else "–"), ""


def _note(floor: Mapping[str, float]) -> str:
    text = "Small figures: 95 % intervals over questions (kept: paired bootstrap). Time: whole training, no evaluation."
    if floor:
        told = ", ".join(f"{words} {rows.percent(value)}" for words, value in floor.items())
        text += f" Without looking at the image: {told}."
    return text


def _accuracy_chart(arms: Sequence[Record], names: Sequence[str], floor: Mapping[str, float], dataset: str) -> str:
    bars = []
    for arm in arms:
        name = str(arm["results"]["arm"])
        low, high = arm["results"]["accuracy_full"]["interval"]
        bars.append(Bar(rows.label_of(name), rows.accuracy(arm), low, high, rows.color_of(name, names)))
    return bar_chart(bars, f"Accuracy on {dataset}", marks=floor, percent=True)


def _family_chart(arms: Sequence[Record], names: Sequence[str], dataset: str) -> str:
    """Return bars per family and arm, or nothing where there is a single family."""
    families = list(arms[0]["results"]["accuracy_full"].get("families", {}))
    if len(families) < 2:
        return ""
    bars = []
    for family in families:
        for number, arm in enumerate(arms):
            share = arm["results"]["accuracy_full"].get("families", {}).get(family)
            if share:
                low, high = share["interval"]
                color = rows.color_of(str(arm["results"]["arm"]), names)
                bars.append(Bar(family if number == 0 else "", share["accuracy"], low, high, color))
    return bar_chart(bars, f"Families of {dataset}", percent=True)


def _by_mode(arm: Record, value: str) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of the log by mode; entries without a number are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in arm["results"].get("log", []):
        number = entry.get(value)
        if number is not None:
            found.setdefault(str(entry.get("mode", "full")), []).append((int(entry["step"]), float(number)))
    return found


def _mode_line(arm: str, mode: str) -> tuple[str, str]:
    """Return words and colour of a mode of an arm."""
    if arm == "dualspeed":
        return f"DualSpeed, {mode}", MODE_COLORS.get(mode, MODE_COLORS["full"])
    return rows.label_of(arm), rows.color_of(arm, [arm])


def _step_chart(arms: Sequence[Record], dataset: str) -> str:
    bars = []
    for arm in _main(arms):
        for mode, entries in _by_mode(arm, "seconds").items():
            words, color = _mode_line(str(arm["results"]["arm"]), mode)
            bars.append(Bar(words, 1000 * statistics.median(seconds for _, seconds in entries), color=color))
    return bar_chart(bars, f"Step time on {dataset}", unit=" ms") if bars else ""


def _loss_chart(arms: Sequence[Record], dataset: str) -> str:
    lines = []
    for arm in _main(arms):
        for mode, entries in (_by_mode(arm, "ce") or _by_mode(arm, "loss")).items():
            words, color = _mode_line(str(arm["results"]["arm"]), mode)
            steps, losses = zip(*sorted(entries), strict=True)
            lines.append(Line(words, steps, _running_median(losses), color=color))
    return line_chart(lines, f"Loss on {dataset}", x_label="step", y_label="cross-entropy") if lines else ""


def _main(arms: Sequence[Record]) -> list[Record]:
    """Return the first record of each of the three arms that charts of one run compare."""
    first: dict[str, Record] = {}
    for arm in arms:
        first.setdefault(str(arm["results"]["arm"]), arm)
    return [first[name] for name in rows.ARM_ORDER if name in first]


def _running_median(values: Sequence[float]) -> list[float]:
    reach = max(1, len(values) // 40)
    return [statistics.median(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))]


def _time(arm: Record) -> float:
    return float(arm["results"]["seconds_train"])
