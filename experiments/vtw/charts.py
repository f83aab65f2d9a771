"""Curves over the layers as SVG files that stand on their own, in light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from trimtab.report.charts import Line, css_variable, line_chart

WIDTH, MARGIN, HEAD, KEY = 440, 14, 26, 20
FONT = "system-ui, sans-serif"
STYLE = f"""
svg {{ --card: #ffffff; --ink: #16202c; --soft: #55606e; --line: #e1e5ea; --font: {FONT};
      --full: #758293; --pruned: #c2620b; --dual: #0b63bd; --other1: #6d4fc2; --other2: #1b8a5a; --other3: #b03a6f; }}
@media (prefers-color-scheme: dark) {{
  svg {{ --card: #18202a; --ink: #e9eef4; --soft: #a5b1c0; --line: #2b3643;
        --full: #8e9cad; --pruned: #f0a04b; --dual: #56a8ff; --other1: #a78bfa; --other2: #4cc38a; --other3: #f07ab0; }}
}}
.title {{ font: 600 15px {FONT}; fill: var(--ink); }}
.key {{ font: 13px {FONT}; fill: var(--ink); }}
"""
DASHES = {"solid": "", "dashed": "6 3", "dotted": "2 3"}


def curves(
    lines: Sequence[Line], title: str, *, x_label: str, y_label: str, marks: Mapping[str, float] | None = None,
    finding: str = "",
) -> str:  # fmt: skip
    """Return a title, a key and the house's line chart as one SVG.

    Args:
        lines: The lines.
        title: Line above the chart.
        x_label: Words below the x axis.
        y_label: Words beside the y axis.
        marks: Heights to compare with, by words.
        finding: What the chart shows, in words.
    """
    made = line_chart(lines, title, x_label=x_label, y_label=y_label, marks=marks, finding=finding)
    chart = made[made.index("<svg") :]
    box = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', chart)
    assert box is not None
    width = WIDTH - 2 * MARGIN
    height = width * float(box[2]) / float(box[1])
    keys = [(line.label, f"var({css_variable(line.color)})", DASHES[line.dash]) for line in lines]
    keys += [(label, "var(--soft)", "4 3") for label in marks or {}]
    top = MARGIN + HEAD + KEY * len(keys)
    whole = top + height + MARGIN
    drawn = [
        f'<path d="M{MARGIN} {y - 4}h26" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
        f'<text class="key" x="{MARGIN + 34}" y="{y}">{escape(label)}</text>'
        for y, (label, color, dash) in enumerate_down(keys, MARGIN + HEAD + 12)
    ]
    place = f'x="{MARGIN}" y="{top}" width="{width}" height="{height:.1f}" '
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole:.0f}" role="img"',
            f'     width="{WIDTH}" height="{whole:.0f}">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(finding)}</desc>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{whole:.0f}" rx="8" fill="var(--card)"/>',
            f'<text class="title" x="{MARGIN}" y="{MARGIN + 10}">{escape(title)}</text>',
            *drawn,
            chart.replace("<svg ", f"<svg {place}", 1),
            "</svg>\n",
        ]
    )


def enumerate_down(keys: Sequence[tuple[str, str, str]], first: int) -> list[tuple[int, tuple[str, str, str]]]:
    """Return each key with the height of its line."""
    return [(first + KEY * number, key) for number, key in enumerate(keys)]
