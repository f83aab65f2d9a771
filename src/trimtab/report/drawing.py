"""From a matplotlib figure to SVG that belongs to a page: its colours, its fonts, ids of its own, words for readers."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

INK, SOFT, GRID, CARD = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {
    INK: "--ink", SOFT: "--soft", GRID: "--line", "#0a0a01": "--full", "#0a0a02": "--pruned", "#0a0a03": "--dual",
    "#0a0a04": "--fast", "#0a0a05": "--other1", "#0a0a06": "--other2", "#0a0a07": "--other3", "#0a0a08": "--other4",
    "#0a0a09": "--rest", CARD: "--card",
}  # fmt: skip
"""CSS variables by the stand-in colours that matplotlib draws with."""

WIDTH = 4.4
"""Inches. On a page of 360 pixels a drawing then stands at about its own size, and its letters at 10 pixels."""

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)


def clean(text: str) -> str:
    """Return a text without characters that no page may hold, or that turn the text around them."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def short(label: str, most: int = 46) -> str:
    """Return a label that fits above a bar; tables have the whole."""
    words = " ".join(clean(label).split())
    return words if len(words) <= most else words[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


@dataclass
class Drawing:
    """A figure under way.

    Attributes:
        figure: Matplotlib's figure.
        axes: Its only axes.
        labels: Labels by what stands in for them until the SVG is made. Matplotlib never sees them: it would read
            formulas in them, and warn of letters that its own font lacks and the reader's browser has.
    """

    figure: Any
    axes: Any
    labels: dict[str, str] = field(default_factory=dict)

    def stand_in(self, label: str) -> str:
        """Return plain letters of about the width of a label, unlike those of any other."""
        words = short(label)
        name = f"L{len(self.labels)}".ljust(len(words), "e")
        self.labels[name] = words
        return name


@contextmanager
def drawing_of(height: float) -> Iterator[Drawing]:
    """Make a drawing of a height in inches without any display; matplotlib's settings are ours for that time only."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "trimtab", "font.size": 10, "font.family": "sans-serif",
        "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": GRID, "xtick.color": SOFT, "ytick.color": SOFT,
        "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        yield Drawing(figure, axes)


def to_svg(drawing: Drawing, title: str, finding: str = "") -> str:
    """Return a drawing as SVG for a page.

    Args:
        drawing: What `drawing_of` made.
        title: Name of the drawing.
        finding: What it shows, for those who cannot see it.
    """
    stream = io.StringIO()
    drawing.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    for name, label in drawing.labels.items():
        text = text.replace(f">{name}</text>", f">{escape(label)}</text>")
    return _for_page(text[text.index("<svg") :], clean(title), clean(finding))


def _for_page(svg: str, title: str, finding: str) -> str:
    """Make a drawing fit for a page: its colours, its width, its fonts, names of its own, words for readers."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", svg)
    svg = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    prefix = f"c{hashlib.blake2b(f'{title}{svg}'.encode(), digest_size=5).hexdigest()}"
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    named = f'role="img" aria-labelledby="{prefix}-t{f" {prefix}-d" * bool(finding)}"'
    head = f'<svg {spaces} {named} {view[0] if view else ""}><title id="{prefix}-t">{escape(title)}</title>'
    told = f'<desc id="{prefix}-d">{escape(finding)}</desc>' if finding else ""
    return head + told + svg[svg.index(">") + 1 :]
