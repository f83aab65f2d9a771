"""The documentation site, built once for all test processes, and what its pages hold and lead to."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
STRICT = ("--fail-on-warning", "--keep-going", "--nitpicky", "--fresh-env", "--quiet")
"""How `make docs` builds; a test compares."""


def built_site(base: Path) -> Path:
    """Return the folder of the built site; the first process builds it, the others wait.

    Args:
        base: pytest's base folder of temporary files.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "told").exists():
            places = ["-c", "docs", "-d", str(folder / "doctrees"), ".", str(folder / "html")]
            command = [sys.executable, "-m", "sphinx", *STRICT, *places]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            (folder / "told").write_text("" if done.returncode == 0 else done.stderr or "failed without a word")
    told = (folder / "told").read_text()
    assert not told, told
    return folder / "html"


@dataclass
class Page:
    """What matters of a page.

    Attributes:
        ids: Anchors.
        links: Targets of links.
        loaded: What the browser fetches by itself: scripts, styles, pictures.
    """

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.page.ids.add(given["id"])
        if "src" in given:
            self.page.loaded.append(given["src"])
        if "href" in given:
            (self.page.links if tag == "a" else self.page.loaded).append(given["href"])


def read_pages(folder: Path) -> dict[str, Page]:
    """Return place in the site -> page, for all pages."""
    found = {}
    for path in sorted(folder.rglob("*.html")):
        reader = _Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        found[path.relative_to(folder).as_posix()] = reader.page
    return found


def is_outside(target: str) -> bool:
    """Whether a target is on another site."""
    return bool(urlsplit(target).scheme or urlsplit(target).netloc)


def broken_targets(folder: Path, pages: dict[str, Page]) -> list[str]:
    """Return every link, anchor and file of the site itself that is not there."""
    wrong = []
    for name, page in pages.items():
        for target in filter(lambda one: not is_outside(one), [*page.links, *page.loaded]):
            place, _, anchor = target.partition("#")
            path = (folder / name).parent / unquote(urlsplit(place).path) if place else folder / name
            inside = os.path.relpath(path, folder).replace(os.sep, "/")
            lost = anchor and inside in pages and unquote(anchor) not in pages[inside].ids
            if lost or not path.is_file():
                wrong.append(f"{name}: {target}")
    return wrong
