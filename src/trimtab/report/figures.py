"""Figures of trainings: accuracy, loss by mode, times of steps, visual tokens before and after pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.report import rows
from trimtab.report.blocks import Figure, Table, commands_of_runs
from trimtab.report.charts import (
    DASHES,
    MODE_COLORS,
    REST_COLOR,
    RUN_COLORS,
    Bar,
    Box,
    Line,
    bar_chart,
    box_chart,
    line_chart,
    stack_chart,
)
from trimtab.report.runs import Run
from trimtab.report.series import Series, envelope, number_of, upper_end

MOST_LINES = 12
"""So many lines at most share a drawing; the tables have all runs."""

MOST_BANDS = 4
"""So many lines at most have bands; more would hide each other."""

_PARTS = {"full": "steps on full tokens", "fast": "fast steps", "slow": "slow steps", "mixed": "steps of both modes"}
_WAIT = "waiting for data"
_REST = "the rest: start, saving, evaluation"
_PART_COLORS = {
    "steps on full tokens": MODE_COLORS["full"], "fast steps": MODE_COLORS["fast"], "slow steps": MODE_COLORS["slow"],
    "steps of both modes": RUN_COLORS[3], _WAIT: RUN_COLORS[4], _REST: REST_COLOR,
}  # fmt: skip
_BAND = "Lines are medians of stretches of the log, bands reach from the lowest to the highest entry of each stretch."
_NO_BAND = (
    "Lines are medians of stretches of the log; the lowest and the highest entry of each line are among the numbers."
)


def chosen(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose modes are drawn one by one: the first of each main arm, else the first three."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.arm, run)
    return [first[name] for name in rows.ARM_ORDER if name in first] or list(runs[:3])


def accuracy_figure(runs: Sequence[Run], floor: Mapping[str, float], dataset: str) -> Figure | None:
    """Return bars of the accuracy on full images, with what a model that does not see would reach."""
    judged = [run for run in runs if run.accuracy is not None]
    if not judged:
        return None
    names = [run.arm for run in judged]
    bars, cells = [], []
    for run in judged[: 2 * MOST_LINES]:
        low, high = run.interval or (None, None)
        bars.append(Bar(run.name, run.accuracy or 0.0, low, high, rows.color_of(run.arm, names)))
    for run in judged:
        ends = f"{100 * run.interval[0]:.1f} to {100 * run.interval[1]:.1f}" if run.interval else "–"
        cells.append((run.name, rows.percent(run.accuracy), ends, rows.percent(run.pruned_accuracy)))
    best = max(judged, key=lambda run: run.accuracy or 0.0)
    finding = f"The highest of {len(judged)} is {best.name} with {rows.percent(best.accuracy)}."
    columns = ("Run", "Full images", "95\N{NO-BREAK SPACE}% interval", "Pruned images")
    return Figure(
        "Accuracy on full images",
        bar_chart(bars, f"Accuracy on {dataset}", marks=floor, percent=True, finding=finding),
        "Lines on the bars: 95\N{NO-BREAK SPACE}% intervals over questions. Dashed: reached without looking.",
        Table(f"Numbers: accuracy on {dataset}", columns, cells),
        commands_of_runs(judged, judged=True),
    )


def family_figure(runs: Sequence[Run], dataset: str) -> Figure | None:
    """Return bars per kind of question and run, or None where there is a single kind."""
    judged = [run for run in chosen(runs) if run.judged]
    families = list(dict.fromkeys(name for run in judged for name in (run.judged or {}).get("families") or {}))
    if len(families) < 2:
        return None
    names = [run.arm for run in judged]
    bars, cells = [], []
    for family in families:
        told, first = [family], True
        for run in judged:
            share = ((run.judged or {}).get("families") or {}).get(family) or {}
            value = number_of(share.get("accuracy"))
            told.append(rows.percent(value))
            if value is not None:
                low, high = share.get("interval") or (None, None)
                bars.append(Bar(family if first else "", value, low, high, rows.color_of(run.arm, names)))
                first = False
        cells.append(tuple(told))
    order = f"In each kind, from above: {', '.join(run.name for run in judged)}."
    spoken = ", ".join(f"{row[0]} {row[-1]}" for row in cells)
    return Figure(
        "Accuracy by kind of question",
        bar_chart(bars, f"Kinds of questions of {dataset}", percent=True, finding=f"{judged[-1].name}: {spoken}."),
        order,
        Table(f"Numbers: kinds of questions of {dataset}", ("Kind", *(run.name for run in judged)), cells),
        commands_of_runs(judged, judged=True),
    )


def loss_figures(runs: Sequence[Run], dataset: str) -> list[Figure]:
    """Return the loss by mode, of all runs over each other where there are more, the KL term, and held-out loss."""
    shown = chosen(runs)
    by_mode = [(_words(run, mode), _color(run, mode), run, one) for run in shown for mode, one in run.log.loss.items()]
    found = [_lines(by_mode, "Loss over steps, by mode", f"Loss by mode on {dataset}", "cross-entropy", _MODES_NOTE)]
    if len(runs) > len(shown):
        every = [(run.name, "", run, merged) for run in runs if (merged := _merged(run)) is not None]
        found.append(_lines(every, "Loss of all runs", f"Loss of all runs on {dataset}", "cross-entropy", ""))
    terms = [(run.name, "", run, run.log.kl) for run in runs if run.log.kl is not None and len(run.log.kl) > 1]
    found.append(_lines(terms, "KL term of slow steps", f"KL term on {dataset}", "KL (nats)", ""))
    held = [(run.name, "", run, run.log.held_out) for run in runs if run.log.held_out is not None]
    found.append(_lines(held, "Loss on held-out data", f"Held-out loss on {dataset}", "loss", ""))
    return [figure for figure in found if figure is not None]


def step_figures(runs: Sequence[Run], dataset: str) -> list[Figure]:
    """Return how times of steps are spread by mode, and where the time of each training went."""
    timed = [
        (_words(run, mode), _color(run, mode), run, one)
        for run in chosen(runs)
        for mode, one in run.log.seconds.items()
        if mode in _PARTS or mode == "data"
    ]
    figures = []
    if timed:
        boxes, cells = [], []
        for words, color, _, one in timed:
            ms = 1000 * one.values
            ends = [float(end) for end in np.percentile(ms, [5, 25, 50, 75, 95])]
            low, first, middle, third, high = ends
            boxes.append(Box(words, low, first, middle, third, high, color))
            told = (*ends, float(ms.max()))
            cells.append((words, f"{len(one):,}", *(f"{value:.4g}" for value in told)))
        finding = "; ".join(f"{box.label}: median {box.middle:.4g} ms" for box in boxes)
        columns = ("Steps", "Values", "5\N{NO-BREAK SPACE}% below", "25\N{NO-BREAK SPACE}%", "Median",
                   "75\N{NO-BREAK SPACE}%", "95\N{NO-BREAK SPACE}%", "Longest")  # fmt: skip
        figures.append(Figure(
            "Time per training step, by mode", box_chart(boxes, f"Step time on {dataset}", unit=" ms", finding=finding),
            "Milliseconds per step. Upright mark: median; box: middle half; line: from 5 to 95\N{NO-BREAK SPACE}% of "
            f"the values. {_values_note([run for _, _, run, _ in timed])}",
            Table(f"Numbers: milliseconds per step on {dataset}", columns, cells),
            commands_of_runs([run for _, _, run, _ in timed]),
        ))  # fmt: skip
    spent = {run.name: parts for run in runs if (parts := time_parts(run))}
    if spent:
        figures.append(_spent_figure(spent, [run for run in runs if run.name in spent], dataset))
    return figures


def time_parts(run: Run) -> dict[str, float]:
    """Return the seconds of a training by what they went into, or nothing where not every step was timed."""
    if not run.log.per_step or not run.seconds:
        return {}
    parts = {_PARTS[mode]: float(one.values.sum()) for mode, one in run.log.seconds.items() if mode in _PARTS}
    timed = sum(len(one) for mode, one in run.log.seconds.items() if mode in _PARTS)
    if not parts or (run.steps and timed < run.steps):
        return {}
    if "data" in run.log.seconds:
        parts[_WAIT] = float(run.log.seconds["data"].values.sum())
    rest = run.seconds - sum(parts.values())
    return {**parts, _REST: rest} if rest > 0.005 * run.seconds else parts


def token_figure(runs: Sequence[Run], dataset: str) -> Figure | None:
    """Return the visual tokens of a step before and after pruning, by mode."""
    bars, cells, used = [], [], []
    for run in [run for run in chosen(runs) if run.log.before]:
        for mode, before in run.log.before.items():
            after = run.log.after.get(mode)
            if after is None:
                continue
            words = _words(run, mode)
            whole, kept = float(before.values.mean()), float(after.values.mean())
            bars.append(Bar(f"{words}: before", whole, color=MODE_COLORS["full"]))
            bars.append(Bar(f"{words}: after", kept, color=_color(run, mode)))
            share = rows.percent(kept / whole) if whole else "–"
            cells.append((words, f"{whole:,.0f}", f"{kept:,.0f}", share, f"{len(before):,}"))
            used.append(run)
    if not bars:
        return None
    finding = "; ".join(f"{words}: {before} before, {after} after" for words, before, after, _, _ in cells)
    return Figure(
        "Visual tokens per step, before and after pruning",
        bar_chart(bars, f"Visual tokens on {dataset}", finding=finding),
        "Mean over steps, all images of a step together.",
        Table(f"Numbers: visual tokens per step on {dataset}",
              ("Steps", "Before", "After", "Kept", "Log entries"), cells),
        commands_of_runs(used),
    )  # fmt: skip


_MODES_NOTE = "Fast steps see pruned images, slow and full steps whole ones."


def _lines(
    given: Sequence[tuple[str, str, Run, Series]], heading: str, title: str, y_label: str, note: str
) -> Figure | None:
    """Return a drawing of series as medians in bands; runs without a colour of their own get one by their place."""
    if not given:
        return None
    drawn = given[:MOST_LINES]
    top = upper_end([one for _, _, _, one in drawn])
    banded = len(drawn) <= MOST_BANDS
    lines, cells = [], []
    for place, (words, color, _, one) in enumerate(drawn):
        cover = envelope(one)
        own = color or RUN_COLORS[place % len(RUN_COLORS)]
        dash = DASHES[place // len(RUN_COLORS) % len(DASHES)] if not color else "solid"
        low, high = (cover.low, cover.high) if banded and len(one) > len(cover.steps) else ((), ())
        lines.append(Line(words, cover.steps, cover.middle, color=own, dash=dash, low=low, high=high))
    for words, _, run, one in given:
        least, most = int(one.values.argmin()), int(one.values.argmax())
        cells.append((
            words, f"{len(one):,}", f"{one.values[0]:.4g}", f"{one.end:.4g}",
            (f"{one.values[least]:.4g}", f"step {one.steps[least]:,.0f}"),
            (f"{one.values[most]:.4g}", f"step {one.steps[most]:,.0f}"), f"{run.log.gaps:,}",
        ))  # fmt: skip
    notes = [note]
    if any(len(one) > len(line.x) for line, (_, _, _, one) in zip(lines, drawn, strict=True)):
        notes.append(_BAND if banded else _NO_BAND)
    if top is not None:
        beyond = [one.values[one.values > top] for _, _, _, one in drawn]
        many, highest = sum(len(values) for values in beyond), max(float(v.max()) for v in beyond if len(v))
        how = "triangles" if banded else "not drawn"
        notes.append(f"Above the upper edge ({how}): {many:,}, the highest at {highest:.4g}.")
    if len(given) > len(drawn):
        notes.append(f"The first {len(drawn)} of {len(given)} are drawn; the table has all.")
    finding = "; ".join(f"{words} ends at {one.end:.3g}" for words, _, _, one in drawn)
    columns = ("Line", "Entries", "First", "End (median of the last tenth)", "Lowest", "Highest", "Not a number")
    return Figure(
        heading,
        line_chart(lines, title, x_label="step", y_label=y_label, top=top, finding=f"At the end: {finding}."),
        " ".join(filter(None, notes)),
        Table(f"Numbers: {title[0].lower()}{title[1:]}", columns, cells),
        commands_of_runs([run for _, _, run, _ in given]),
    )


def _spent_figure(spent: Mapping[str, Mapping[str, float]], runs: Sequence[Run], dataset: str) -> Figure:
    parts = [part for part in _PART_COLORS if any(part in of_run for of_run in spent.values())]
    cells = [
        (name, *(f"{of_run[part]:.4g}" if part in of_run else "–" for part in parts), f"{sum(of_run.values()):.4g}")
        for name, of_run in spent.items()
    ]
    drawn = dict(list(spent.items())[:MOST_LINES])
    finding = "; ".join(f"{name}: {rows.duration(sum(of_run.values()))}" for name, of_run in drawn.items())
    return Figure(
        "Where the time of training went",
        stack_chart(drawn, _PART_COLORS, f"Time of training on {dataset}", unit=" s", finding=finding),
        "Seconds. A step's time holds the wait for its data, except where that stands by itself.",
        Table(
            f"Numbers: seconds of training on {dataset}",
            ("Run", *(part.capitalize() for part in parts), "In all"),
            cells,
        ),
        commands_of_runs(runs),
    )


def _merged(run: Run) -> Series | None:
    """Return the loss of all steps of a run, whatever their mode."""
    every = list(run.log.loss.values())
    if not every:
        return None
    steps = np.concatenate([one.steps for one in every])
    values = np.concatenate([one.values for one in every])
    order = np.argsort(steps, kind="stable")
    return Series(steps[order], values[order])


def _words(run: Run, mode: str) -> str:
    if mode == "data":
        return f"{run.name}, wait for data"
    plain = mode == "full" or (run.arm == "pruned" and mode == "fast")
    told = "all steps" if mode == "mixed" else mode
    return run.name if plain and len(run.log.loss) < 2 else f"{run.name}, {told}"


def _values_note(runs: Sequence[Run]) -> str:
    """Return of what the times are, in words: of single steps, or of means between two entries of a log."""
    means = list(dict.fromkeys(run.name for run in runs if not run.log.per_step))
    if not means:
        return "A value is one step."
    whose = "" if len(means) == len({run.name for run in runs}) else f" of {', '.join(means)}"
    return f"A value{whose} is the mean over the steps between two entries of the log."


def _color(run: Run, mode: str) -> str:
    if mode == "data":
        return RUN_COLORS[4]
    if run.arm.startswith("dualspeed"):
        return MODE_COLORS.get(mode, RUN_COLORS[3])
    return rows.color_of(run.arm, [run.arm])
