"""Charts as inline SVG that follow the page's colours, light and dark.

Matplotlib draws with stand-in colours; each is then replaced by a CSS variable, and every size by the view box, so
that the page decides about colours and width. Text stays text. A drawing is narrow, with labels above their bars, so
that its letters are still readable on a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from trimtab.report.drawing import CARD, GRID, INK, SOFT, VARIABLES, Drawing, clean, drawing_of, to_svg
from trimtab.report.series import Array

ARM_COLORS = {"full": "#0a0a01", "pruned": "#0a0a02", "dualspeed": "#0a0a03"}
MODE_COLORS = {"fast": "#0a0a04", "slow": "#0a0a03", "full": "#0a0a01"}
OTHER_COLORS = ("#0a0a05", "#0a0a06", "#0a0a07", "#0a0a08")
REST_COLOR = "#0a0a09"
DASHES = ("solid", "dashed", "dotted")
RUN_COLORS = ("#0a0a03", "#0a0a02", "#0a0a06", "#0a0a05", "#0a0a07", "#0a0a01", "#0a0a08")
"""Colours of lines that stand for runs, in this order; then again with other dashes."""

_PLATE: dict[str, Any] = {"facecolor": CARD, "edgecolor": "none", "pad": 0.4}
"""What stands behind letters, so that no line runs through them."""

_PATTERNS: dict[str, Any] = {"solid": "-", "dashed": (0, (5, 2.5)), "dotted": (0, (1.2, 1.6))}


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: What it stands for; empty for a bar of the same group as the one before.
        value: Its length.
        low: Lower end of its interval, or None.
        high: Upper end of its interval, or None.
        color: One of the stand-in colours above.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: str = OTHER_COLORS[0]


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        label: What it stands for.
        x: Places.
        y: Values.
        spread: Half the height of the error bars, or empty.
        color: One of the stand-in colours above.
        points: Whether to mark the points.
        low: Lower edge of a band around the line, or empty.
        high: Upper edge of the band.
        dash: One of `DASHES`.
    """

    label: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    spread: Sequence[float] = ()
    color: str = OTHER_COLORS[0]
    points: bool = False
    low: Sequence[float] | Array = ()
    high: Sequence[float] | Array = ()
    dash: str = "solid"


@dataclass(frozen=True)
class Box:
    """How values are spread.

    Attributes:
        label: What they stand for.
        low: 5 % are below.
        first: A quarter is below.
        middle: The median.
        third: A quarter is above.
        high: 5 % are above.
        color: One of the stand-in colours above.
    """

    label: str
    low: float
    first: float
    middle: float
    third: float
    high: float
    color: str = OTHER_COLORS[0]


def arm_color(arm: str, others: Sequence[str] = ()) -> str:
    """Return the colour of an arm: its own, or one by its place among the others, or one for all where these are many.

    Where colours would repeat, they would say that two arms belong together which do not.
    """
    if arm in ARM_COLORS:
        return ARM_COLORS[arm]
    if len(others) > len(OTHER_COLORS):
        return OTHER_COLORS[0]
    place = list(others).index(arm) if arm in others else 0
    return OTHER_COLORS[place % len(OTHER_COLORS)]


def css_variable(color: str) -> str:
    """Return the name of the CSS variable that a stand-in colour becomes."""
    return VARIABLES[color]


def bar_chart(
    bars: Sequence[Bar], title: str, *, marks: Mapping[str, float] | None = None, percent: bool = False, unit: str = "",
    finding: str = "",
) -> str:  # fmt: skip
    """Return horizontal bars with intervals, values, and vertical lines for what they must beat."""
    places, depth = _places([bar.label for bar in bars])
    head = 1.05 * len(marks or {})
    with drawing_of(0.5 + 0.235 * (depth + head)) as drawing:
        axes = drawing.axes
        for place, bar in zip(places, bars, strict=True):
            axes.barh(place, bar.value, color=bar.color, height=0.8)
            low, high = (bar.value if end is None else end for end in (bar.low, bar.high))
            if high > low:
                axes.plot([low, high], [place, place], color=INK, linewidth=1.3, solid_capstyle="butt")
            told = f"{100 * bar.value:.1f}\N{NO-BREAK SPACE}%" if percent else f"{bar.value:.4g}{unit}"
            _tell(axes, told, max(bar.value, high), place)
            _label(drawing, bar.label, place)
        most = max([bar.value for bar in bars] + [bar.high or 0 for bar in bars] + list((marks or {}).values()))
        _bar_axes(axes, 1.22 * most or 1, -1.4 - head, depth - 0.4)
        _draw_marks(drawing, marks or {}, -1.3, 1.22 * most or 1)
        if percent:
            axes.xaxis.set_major_formatter(
                lambda value, _: f"{100 * value:.0f}\N{NO-BREAK SPACE}%" if value <= 1 else ""
            )
        return to_svg(drawing, title, finding)


def box_chart(boxes: Sequence[Box], title: str, *, unit: str = "", finding: str = "") -> str:
    """Return a line from 5 % to 95 %, a box from quarter to quarter and the median for each of some sets of values."""
    places, depth = _places([box.label for box in boxes])
    with drawing_of(0.5 + 0.235 * depth) as drawing:
        axes = drawing.axes
        for place, box in zip(places, boxes, strict=True):
            axes.plot([box.low, box.high], [place, place], color=box.color, linewidth=2, solid_capstyle="butt")
            axes.barh(place, box.third - box.first, left=box.first, color=box.color, height=0.7)
            axes.plot([box.middle, box.middle], [place - 0.45, place + 0.45], color=INK, linewidth=2)
            _tell(axes, f"{box.middle:.4g}{unit}", box.high, place)
            _label(drawing, box.label, place)
        _bar_axes(axes, 1.22 * max(box.high for box in boxes) or 1, -1.4, depth - 0.4)
        return to_svg(drawing, title, finding)


def stack_chart(
    rows: Mapping[str, Mapping[str, float]], colors: Mapping[str, str], title: str, *, unit: str = "", finding: str = ""
) -> str:
    """Return a legend and one bar per row, made of parts one behind the other, with their sum at the end.

    Args:
        rows: Lengths by part by row.
        colors: Colours by part, in the order in which parts stand.
        title: Name of the drawing.
        unit: What stands behind the sums.
        finding: What the drawing shows, in words.
    """
    places, depth = _places(list(rows))
    used = [part for part in colors if any(part in parts for parts in rows.values())]
    with drawing_of(0.5 + 0.235 * depth) as drawing:
        axes = drawing.axes
        for place, (label, parts) in zip(places, rows.items(), strict=True):
            left = 0.0
            for part in used:
                axes.barh(place, parts.get(part, 0.0), left=left, color=colors[part], height=0.8)
                left += parts.get(part, 0.0)
            _tell(axes, f"{left:.4g}{unit}", left, place)
            _label(drawing, label, place)
        _bar_axes(axes, 1.22 * max(sum(parts.values()) for parts in rows.values()) or 1, -1.4, depth - 0.4)
        legend = _legend({part: _dot(colors[part]) for part in used})
        return legend + to_svg(drawing, title, finding)


def line_chart(
    lines: Sequence[Line], title: str, *, x_label: str, y_label: str, log_x: bool = False,
    marks: Mapping[str, float] | None = None, top: float | None = None, finding: str = "",
) -> str:  # fmt: skip
    """Return a legend and lines, with bands, and dashed lines at the height of what they are compared with.

    Args:
        lines: The lines.
        title: Name of the drawing.
        x_label: Words below the axis.
        y_label: Words beside the axis.
        log_x: Whether places are spread by their logarithm.
        marks: Heights to compare with, by words.
        top: Upper end of the drawing; a triangle stands where a band or line goes beyond. None for no end.
        finding: What the drawing shows, in words.
    """
    with drawing_of(2.75) as drawing:
        axes = drawing.axes
        for line in lines:
            style = {"color": line.color, "linewidth": 1.7, "linestyle": _PATTERNS[line.dash]}
            if len(line.low):
                axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.16, linewidth=0)
            if len(line.spread):
                axes.errorbar(line.x, line.y, yerr=line.spread, marker="o", markersize=4, capsize=0, **style)
            else:
                alone = line.points or len(line.x) == 1
                axes.plot(line.x, line.y, marker="o" if alone else None, markersize=4, **style)
            _draw_beyond(axes, line, top)
        for value in (marks or {}).values():
            axes.axhline(value, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        if log_x:
            _plain_log(axes, sorted({float(x) for line in lines for x in line.x}))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.locator_params(axis="x", nbins=6) if not log_x else None
        axes.grid(color=GRID, linewidth=0.8)
        if not log_x and min(min(line.x) for line in lines) >= 0:
            axes.set_xlim(left=0)
        if top is not None:
            axes.set_ylim(top=top)
        entries = {line.label: _stroke(line) for line in lines}
        entries.update(dict.fromkeys(marks or {}, '<i class="dash"></i>'))
        return _legend(entries) + to_svg(drawing, title, finding)


def _places(labels: Sequence[str]) -> tuple[list[float], float]:
    """Return the height of each bar, labels above them, and where the last one ends."""
    places: list[float] = []
    depth = -1.0
    for label in labels:
        depth += 2.1 if label else 1.0
        places.append(depth - 1.0)
    return places, depth


def _bar_axes(axes: Any, right: float, top: float, bottom: float) -> None:
    axes.set_xlim(0, right)
    axes.set_ylim(bottom, top)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def _label(drawing: Drawing, label: str, place: float) -> None:
    if not label:
        return
    drawing.axes.annotate(
        drawing.stand_in(label), (0, place - 0.45), xytext=(0, 1.5), textcoords="offset points", color=INK, va="bottom",
        annotation_clip=False, bbox=_PLATE,
    ).set_in_layout(False)  # fmt: skip


def _tell(axes: Any, told: str, x: float, place: float) -> None:
    axes.annotate(
        told, (x, place), xytext=(5, 0), textcoords="offset points", va="center", color=INK, fontweight="bold"
    )


def _draw_marks(drawing: Drawing, marks: Mapping[str, float], top: float, right: float) -> None:
    for number, (label, value) in enumerate(sorted(marks.items(), key=lambda item: -item[1])):
        drawing.axes.axvline(value, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        at_left = value > 0.6 * right
        drawing.axes.annotate(
            drawing.stand_in(label), (value, top - 1.05 * number), xytext=(-4 if at_left else 4, 0),
            textcoords="offset points", color=SOFT, ha="right" if at_left else "left", va="bottom",
            annotation_clip=False, bbox=_PLATE,
        )  # fmt: skip


def _draw_beyond(axes: Any, line: Line, top: float | None) -> None:
    """Mark at the upper end where a line or its band goes beyond it."""
    ends = line.high if len(line.high) else line.y
    beyond = [x for x, y in zip(line.x, ends, strict=True) if top is not None and y > top]
    if beyond:
        axes.plot(beyond, [top] * len(beyond), ls="none", marker="^", markersize=5, color=line.color, clip_on=False)


def _plain_log(axes: Any, places: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def _legend(entries: Mapping[str, str]) -> str:
    """Return a legend in HTML, which wraps on narrow screens; equal labels appear once."""
    spans = "".join(f"<span>{mark}{escape(clean(label))}</span>" for label, mark in entries.items())
    return f'<div class="legend">{spans}</div>'


def _dot(color: str) -> str:
    return f'<i class="dot" style="background: var({VARIABLES[color]})"></i>'


def _stroke(line: Line) -> str:
    if line.dash == "solid":
        return _dot(line.color)
    return f'<i class="stroke" style="border-top: 3px {line.dash} var({VARIABLES[line.color]})"></i>'
