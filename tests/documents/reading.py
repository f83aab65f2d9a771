"""Reading the project's own documents: fenced blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")])


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """Return the content of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the commands of all bash blocks as words, environment settings in front left out."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line.replace(".venv/bin/", ""), comments=True) for line in lines]
    return [words[sum(re.match(r"[A-Z_]+=", word) is not None for word in words) :] for words in split if words]


def inline_commands(text: str) -> list[list[str]]:
    """Return the commands that stand in backticks within sentences."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    wanted = ("trimtab ", "python -m trimtab ", "accelerate launch -m trimtab ", "make ")
    return [shlex.split(code) for code in quoted if code.startswith(wanted)]


def links(text: str) -> list[str]:
    """Return the targets of links and pictures that lie in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    return [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
