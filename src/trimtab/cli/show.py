"""What commands print: tables for people, records for programs, progress for the patient."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any


def first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def print_json(content: Any) -> None:
    """Print a value as indented JSON on stdout."""
    print(json.dumps(content, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout.

    Args:
        title: Line above the table.
        columns: Headings.
        rows: Cells, as many as there are columns.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell_text(cell)) for cell in row))
    Console().print(table)


def cell_text(value: object) -> str:
    """Return a value as it stands in a table: four significant digits, a dash for nothing, lists in one line."""
    if value is None or value in ({}, [], ()):
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def print_settings(title: str, values: Mapping[str, object]) -> None:
    """Print names and values as a table of two columns."""
    print_table(title, ("what", "value"), values.items())


@contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Keep stdout for the record alone: what else is printed goes to stderr."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr, where that is a terminal.

    Args:
        label: What is being done.

    Yields:
        A function of the parts done and the parts in all.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
