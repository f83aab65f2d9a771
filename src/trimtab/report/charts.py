"""Charts as inline SVG that follow the page's colours, light and dark.

Matplotlib draws with stand-in colours; each is then replaced by a CSS variable, and every size by the view box, so
that the page decides about colours and width. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

INK, SOFT, GRID = "#010101", "#020202", "#030303"
ARM_COLORS = {"full": "#0a0a01", "pruned": "#0a0a02", "dualspeed": "#0a0a03"}
MODE_COLORS = {"fast": "#0a0a04", "slow": "#0a0a03", "full": "#0a0a01"}
OTHER_COLORS = ("#0a0a05", "#0a0a06", "#0a0a07", "#0a0a08")
_VARIABLES = {
    INK: "--ink", SOFT: "--soft", GRID: "--line", "#0a0a01": "--full", "#0a0a02": "--pruned", "#0a0a03": "--dual",
    "#0a0a04": "--fast", "#0a0a05": "--other1", "#0a0a06": "--other2", "#0a0a07": "--other3", "#0a0a08": "--other4",
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: What it stands for.
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
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()
    color: str = OTHER_COLORS[0]
    points: bool = False


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
    return _VARIABLES[color]


def bar_chart(
    bars: Sequence[Bar], title: str, *, marks: Mapping[str, float] | None = None, percent: bool = False, unit: str = ""
) -> str:
    """Return horizontal bars with intervals, values, and vertical lines for what they must beat."""
    with _figure(height=1.0 + 0.42 * len(bars) + (0.3 if marks else 0)) as (figure, axes):
        for place, bar in enumerate(bars):
            axes.barh(place, bar.value, color=bar.color, height=0.62)
            low, high = (bar.value if end is None else end for end in (bar.low, bar.high))
            if high > low:
                axes.plot([low, high], [place, place], color=INK, linewidth=1.3, solid_capstyle="butt")
            told = f"{100 * bar.value:.1f}\N{NO-BREAK SPACE}%" if percent else f"{bar.value:.3g}{unit}"
            axes.annotate(
                told, (max(bar.value, high), place),
                xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontweight="bold",
            )  # fmt: skip
        most = max([bar.value for bar in bars] + [bar.high or 0 for bar in bars] + list((marks or {}).values()))
        axes.set_xlim(0, 1.17 * most or 1)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        _draw_marks(axes, marks or {}, len(bars))
        if percent:
            axes.xaxis.set_major_formatter(
                lambda value, _: f"{100 * value:.0f}\N{NO-BREAK SPACE}%" if value <= 1 else ""
            )
        return _svg(figure, title)


def line_chart(
    lines: Sequence[Line], title: str, *, x_label: str, y_label: str, log_x: bool = False,
    marks: Mapping[str, float] | None = None,
) -> str:  # fmt: skip
    """Return a legend and lines, with dashed lines at the height of what they are compared with."""
    with _figure(height=3.1) as (figure, axes):
        for line in lines:
            style = {"color": line.color, "linewidth": 1.8}
            if line.spread:
                axes.errorbar(line.x, line.y, yerr=line.spread, marker="o", markersize=4, capsize=0, **style)
            else:
                axes.plot(line.x, line.y, marker="o" if line.points else None, markersize=4, **style)
        for value in (marks or {}).values():
            axes.axhline(value, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        if log_x:
            _plain_log(axes, sorted({float(x) for line in lines for x in line.x}))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=GRID, linewidth=0.8)
        if not log_x and min(x for line in lines for x in line.x) >= 0:
            axes.set_xlim(left=0)
        return _legend(lines, marks or {}) + _svg(figure, title)


def _legend(lines: Sequence[Line], marks: Mapping[str, float]) -> str:
    """Return a legend in HTML, which wraps on narrow screens; equal labels appear once."""
    entries = {line.label: f'<i class="dot" style="background: var({_VARIABLES[line.color]})"></i>' for line in lines}
    entries.update(dict.fromkeys(marks, '<i class="dash"></i>'))
    spans = "".join(f"<span>{mark}{escape(label)}</span>" for label, mark in entries.items())
    return f'<div class="legend">{spans}</div>'


def _plain_log(axes: Any, places: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def _draw_marks(axes: Any, marks: Mapping[str, float], bars: int) -> None:
    for number, (label, value) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
        axes.axvline(value, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        right = number == len(marks) - 1
        axes.annotate(
            label, (value, -0.5), xytext=(4 if right else -4, 3), textcoords="offset points", color=SOFT, fontsize=9,
            ha="left" if right else "right", va="bottom", annotation_clip=False,
        )  # fmt: skip


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Any]]:
    """Make a figure of 5.6 inches without touching matplotlib's global state or any display."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "trimtab", "font.size": 10.5, "font.family": "sans-serif",
        "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": GRID, "xtick.color": SOFT, "ytick.color": SOFT,
        "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        yield figure, axes


def _svg(figure: Any, title: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return _for_page(text[text.index("<svg") :], title)


def _for_page(svg: str, title: str) -> str:
    """Make a drawing fit for a page: its colours, its width, its fonts, names of its own, a title for readers."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", svg)
    prefix = re.sub(r"\W+", "-", title.lower()).strip("-")
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {spaces} role="img" {view[0] if view else ""}><title>{escape(title)}</title>'
    return head + svg[svg.index(">") + 1 :]
