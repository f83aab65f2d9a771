"""Every command of the command line by its words; the verbs of a method are commands of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from trimtab.cli.app import app


def commands() -> dict[str, Any]:
    """Return words such as ``train`` and ``vtw search`` -> command."""
    return dict(_leaves(typer.main.get_command(app)))


def _leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command
