"""The fenced blocks of the README and of the pages under docs, in order, with what stands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.documents.reading import ROOT, short

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("bash", "python", "yaml", "toml", "diff", "json", "text")
INDENTED = re.compile(r"( {4}|\t)\s*[^\s\-*\d]")
FENCE = re.compile(r"^ *(`{3,}|~{3,}|:{3,})\s*(.*?)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path of the page in the repository.
        number: Which block of the page, from 1.
        line: Line of its fence, from 1.
        language: What stands behind the fence.
        text: The content.
        section: Number of headings up to level 3 in front of it.
    """

    page: str
    number: int
    line: int
    language: str
    text: str
    section: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language or 'no language'})"

    @property
    def file_name(self) -> str | None:
        """The file that the block is, as a comment in its first line says."""
        named = re.match(r"# ([\w./-]+\.(?:py|yaml|toml))$", self.text.partition("\n")[0])
        return named.group(1) if named else None


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of a page in order."""
    return parse(path.read_text(encoding="utf-8"), short(path))


def parse(page: str, name: str) -> list[Block]:
    """Return the blocks of the text of a page; a fence that is not closed, or code without one, is an error."""
    found: list[Block] = []
    opened: tuple[str, int, str, list[str]] | None = None
    section, before = 0, ""
    for line, text in enumerate(page.splitlines(), start=1):
        fence = FENCE.match(text)
        if opened is None:
            if fence:
                opened = (fence.group(1), line, fence.group(2), [])
            section += bool(re.match(r"#{1,3} ", text))
            assert before.strip() or not re.match(r"( {4}|\t)\s*[^\s\-*\d]", text), (
                f"{name}:{line}: code without a fence"
            )
        elif fence and not fence.group(2) and fence.group(1).startswith(opened[0]):
            found.append(Block(name, len(found) + 1, opened[1], opened[2], "\n".join([*opened[3], ""]), section))
            opened = None
        else:
            opened[3].append(text)
        before = text
    assert opened is None, f"{name}:{opened and opened[1]}: the fence is not closed"
    return found


def command_lines(text: str) -> list[list[str]]:
    """Return the commands of a bash block as words, comments left out."""
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def bare(words: list[str]) -> list[str]:
    """Return a command without settings of the environment in front and without the folder of make's environment."""
    first = next(place for place, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return [words[first].removeprefix(".venv/bin/"), *words[first + 1 :]]
