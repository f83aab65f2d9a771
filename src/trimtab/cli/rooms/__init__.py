"""Verbs of the methods: ``trimtab NAME VERB``, a group of commands for each room that is there.

A file here is named as the room whose verbs it holds. It is looked at where the folder ``methods/NAME`` is there, and
reaches the room by `room` when a verb runs, so that deleting the folder takes the verbs away and breaks nothing, and
``trimtab --help`` loads no method.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import typer

PACKAGE = Path(__file__).parents[2]


def add_to(app: typer.Typer) -> None:
    """Enter a group for each room that has verbs."""
    for name in sorted(module.name for module in iter_modules(__path__)):
        if (PACKAGE / "methods" / name / "__init__.py").is_file():
            verbs = import_module(f"{__name__}.{name}")
            group = typer.Typer(no_args_is_help=True, help=verbs.HELP)
            verbs.add_to(group)
            app.add_typer(group, name=name)


def room(name: str) -> Any:
    """Return a method by the name of its folder."""
    return import_module(f"trimtab.methods.{name}")
