"""What the theme and Sphinx leave undone for people who read without eyes or mouse.

Boxes that scroll can be reached by keyboard and say what they are, the two side bars have names, and the lines of a
long signature are no list without terms.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

TABLE = re.compile('<div class="table-wrapper')
CODE = '<div class="highlight"><pre>'
SIGNATURE = re.compile(r'<dl>\s*((?:<dd><em class="sig-param">.*?</dd>\s*)+)</dl>', re.DOTALL)
BARS = {
    '<aside class="sidebar-drawer"': '<aside aria-label="Site" class="sidebar-drawer"',
    '<aside class="toc-drawer': '<aside aria-label="On this page" class="toc-drawer',
}


def reachable(body: str) -> str:
    """Return a page's body whose tables and code can be scrolled without a mouse."""
    number = itertools.count(1)
    body = TABLE.sub(
        lambda _: f'<div tabindex="0" role="region" aria-label="Table {next(number)}" class="table-wrapper', body
    )
    body = body.replace(CODE, CODE.replace("<pre", '<pre tabindex="0"'))
    return SIGNATURE.sub(_lines, body)


def _lines(found: re.Match[str]) -> str:
    lines = found[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
    return f'<span class="sig-lines">{lines}</span>'


def _open_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    if "body" in context:
        context["body"] = reachable(context["body"])


def _name_bars(app: Sphinx, error: Exception | None) -> None:
    """Give the side bars of the theme names; its template has no place for them."""
    if error is not None or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for bar, named in BARS.items():
            text = text.replace(bar, named)
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Enter the extension; it looks at a page after the theme did."""
    app.connect("html-page-context", _open_page, priority=900)
    app.connect("build-finished", _name_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
