"""What commands print: tables for people, records for programs, progress for the patient."""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import IO, TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.run.progress import plain_output, show_work

if TYPE_CHECKING:
    from rich.table import Table


def first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def print_json(content: Any) -> None:
    """Print a value as indented JSON on stdout; NaN and infinity, which JSON does not know, as null."""
    print(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(
    title: str, columns: Sequence[str] | None, rows: Iterable[Sequence[object]], stream: IO[str] | None = None
) -> None:
    """Print a table: framed and as wide as the terminal, or where there is none, as plain text in aligned columns.

    Args:
        title: Line above the table.
        columns: Headings; None for none.
        rows: Cells, as many in each row.
        stream: Where to; None for stdout.
    """
    out = stream or sys.stdout
    cells = [[cell_text(cell) for cell in row] for row in rows]
    if plain_output(out):
        lines = _aligned([list(columns), *cells] if columns else cells)
        print("\n".join([title, *lines]), file=out, flush=True)
        return
    from rich.console import Console

    console = Console(file=out)
    with console.capture() as captured:
        console.print(framed_table(title, columns, cells))
    print(captured.get(), end="", file=out, flush=True)  # by way of `out`, which a bar at the foot may watch


def framed_table(title: str, columns: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> Table:
    """Return a table for a terminal; what it holds is text, never markup. Without headings it is names and values."""
    from rich.box import HEAVY_HEAD, HORIZONTALS
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        show_header=bool(columns),
        box=HEAVY_HEAD if columns else HORIZONTALS,
    )
    for column in columns or [""] * max(map(len, rows), default=0):
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, cells of a column below one another; nothing is cut, however long the line becomes."""
    flat = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*flat, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in flat
    ]


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


def print_settings(title: str, values: Mapping[str, object], stream: IO[str] | None = None) -> None:
    """Print names and values as a table of two columns, on stdout or another stream."""
    print_table(title, None, values.items(), stream)


@contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Keep stdout for one JSON document: what else is printed meanwhile goes to stderr, also by code in C.

    Args:
        wanted: Whether ``--json`` was given; nothing happens otherwise.
    """
    if not wanted:
        yield
        return
    with error_document(wanted), _descriptor_to_stderr(), redirect_stdout(sys.stderr):
        yield


@contextmanager
def error_document(wanted: bool) -> Iterator[None]:
    """Let an error of the user leave a document, too: ``{"error": {"kind": ..., "message": ...}}``.

    The error goes on its way to stderr and the exit code. Of several processes the first alone prints.

    Args:
        wanted: Whether ``--json`` was given; nothing happens otherwise.
    """
    try:
        yield
    except TrimtabError as error:
        if wanted and first_process():
            print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
        raise


@contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """Let the stdout of the process, below Python's, lead to stderr."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c() -> None:
    """Write out what code in C has printed, before stdout is for the document again."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress with pace and expected end on stderr: a bar on a terminal, a line now and then elsewhere.

    Args:
        label: What is being done.

    Yields:
        A function of the parts done and the parts in all.
    """
    with show_work(keep=False) as work:
        work.note(label, ())
        yield lambda done, total: work(label, done, total)
