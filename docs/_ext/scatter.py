"""A chart of few named points with their spread, as SVG that can be read on a phone, in light and dark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 34, 42
GAP = 15
"""Pixels between the lines of two labels."""

Place = Callable[[float, float], tuple[float, float]]
"""From shares and percentages to places in the drawing."""

STYLE = """
svg { --paper: #ffffff; --ink: #1c2733; --soft: #5b6875; --line: #dfe4ea;
      --full: #66727f; --full_equal_time: #66727f; --pruned: #b35a00; --dualspeed: #0b63c5; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #131416; --ink: #e8ecf1; --soft: #a7b1bd; --line: #333a42;
        --full: #a3aeb9; --full_equal_time: #a3aeb9; --pruned: #f0a050; --dualspeed: #6db3ff; }
}
text { font: 13px system-ui, sans-serif; fill: var(--soft); }
.title { font-size: 15px; font-weight: 600; fill: var(--ink); }
.name { fill: var(--ink); }
.grid { stroke: var(--line); }
.lead { stroke: var(--soft); stroke-width: 0.8; }
"""


@dataclass(frozen=True)
class Point:
    """One way to train, over its seeds.

    Attributes:
        label: Words beside the point.
        color: Name of its colour in `STYLE`.
        x: One value per seed.
        y: One value per seed.
    """

    label: str
    color: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    @property
    def middle(self) -> tuple[float, float]:
        """Mean of both."""
        return statistics.fmean(self.x), statistics.fmean(self.y)

    @property
    def spread(self) -> tuple[float, float]:
        """Standard deviation of both; 0 for one seed."""
        across, up = (statistics.stdev(values) if len(values) > 1 else 0.0 for values in (self.x, self.y))
        return across, up


def scatter(points: Sequence[Point], title: str, x_label: str, y_label: str) -> str:
    """Return the chart: x from 0 to a little over 1, y over the points and their spread.

    Args:
        points: What to show.
        title: Line above the chart.
        x_label: Words below the x axis.
        y_label: Words above the y axis.
    """
    ends = [point.middle[1] + sign * point.spread[1] for point in points for sign in (-1, 1)]
    step = 5 if max(ends) - min(ends) > 8 else 2
    low, high = step * floor(min(ends) / step), step * ceil(max(ends) / step)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / 1.12 * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - 24 - BOTTOM)

    parts = [*_axes(low, high, step, place), *_labels(points, place)]
    parts += [part for point in points for part in _point(point, place)]
    told = "; ".join(f"{p.label}: {p.middle[1]:.1f} at {p.middle[0]:.2f} of the time" for p in points)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"',
            f'     width="{WIDTH}" height="{HEIGHT}">',
            f"<title>{escape(title)}: {escape(y_label)}, against {escape(x_label)}</title>",
            f"<desc>{escape(told)}</desc>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="var(--paper)"/>',
            f'<text class="title" x="12" y="22">{escape(title)}</text>',
            f'<text x="{WIDTH - RIGHT}" y="22" text-anchor="end">{escape(y_label)}</text>',
            f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def _axes(low: int, high: int, step: int, place: Place) -> list[str]:
    lines = []
    for value in range(low, high + 1, step):
        (left, y), (right, _) = place(0, value), place(1.12, value)
        lines.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        lines.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(share, low)
        lines.append(f'<text x="{x:.1f}" y="{y + 17:.1f}" text-anchor="middle">{share:g}</text>')
    return lines


def _point(point: Point, place: Place) -> list[str]:
    (x, y), (dx, dy) = point.middle, point.spread
    (left, top), (right, bottom) = place(x - dx, y + dy), place(x + dx, y - dy)
    at_x, at_y = place(x, y)
    color = f"var(--{point.color})"
    filled = "var(--paper)" if point.color == "full_equal_time" else color
    mark = f'fill="{filled}" stroke="{color}" stroke-width="2"'
    cross = f"M{left:.1f} {at_y:.1f}H{right:.1f}M{at_x:.1f} {top:.1f}V{bottom:.1f}"
    return [
        f'<path d="{cross}" stroke="{color}" stroke-width="1.5"/>',
        f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.5" {mark}/>',
    ]


def _labels(points: Sequence[Point], place: Place) -> list[str]:
    """Return the names: right of points on the left, left of the others, moved apart where they would meet."""
    parts, taken = [], []
    for low, high, after in ((0.0, 0.45, True), (0.45, 0.8, False), (0.8, 9.9, False)):
        side = sorted((p for p in points if low <= p.middle[0] < high), key=lambda p: -p.middle[1])
        ends = [place(p.middle[0] + (1 if after else -1) * p.spread[0], 0)[0] for p in side]
        edge = max(ends, default=0) + 9 if after else min(ends, default=0) - 9
        for point in side:
            x, y = place(*point.middle)
            line = y + 4
            while any(abs(line - other) < GAP for other in taken):
                line += 1
            taken.append(line)
            anchor, step = ("start", 4) if after else ("end", -4)
            parts.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{edge:.1f} {line - 4:.1f}"/>')
            words = f'x="{edge + step:.1f}" y="{line:.1f}" text-anchor="{anchor}">{escape(point.label)}'
            parts.append(f'<text class="name" {words}</text>')
    return parts
