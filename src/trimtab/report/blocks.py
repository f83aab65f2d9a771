"""What a page is made of: sections of figures and tables, each with the commands that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.report.rows import Record
from trimtab.report.runs import Run
from trimtab.report.sources import commands_of


@dataclass(frozen=True)
class Table:
    """A table of words.

    Attributes:
        caption: What it shows; a page has no two of one caption.
        columns: Headings.
        rows: Cells; the first of a row names it. A cell is words, or words with smaller ones below.
        main: Places of rows that stand out.
        note: Sentence below.
        commands: What made its records.
        colors: CSS variable of the dot before a row, or empty.
        marked: Places (row, column) of cells that depart from the others.
        words: Whether cells are words rather than figures, and so stand at the left and wrap.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str | tuple[str, str]]]
    main: frozenset[int] = frozenset()
    note: str = ""
    commands: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()
    marked: frozenset[tuple[int, int]] = frozenset()
    words: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading, its note, its numbers and its commands.

    Attributes:
        heading: What it shows.
        drawing: SVG, with a legend before it.
        note: How to read it.
        table: Its numbers.
        commands: What made its records.
    """

    heading: str
    drawing: str
    note: str = ""
    table: Table | None = None
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: Its heading.
        tables: Tables, above the figures.
        figures: Figures.
        folded: Tables that are folded away, below the figures.
        text: Sentences below the heading.
    """

    heading: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    folded: Sequence[Table] = ()
    text: Sequence[str] = field(default_factory=tuple)


def commands_of_runs(runs: Sequence[Run], *, judged: bool = False) -> tuple[str, ...]:
    """Return the commands of the trainings, and of the evaluations where a figure shows these."""
    records: list[Record] = [record for run in runs for record in (run.records if judged else run.records[:1])]
    return tuple(commands_of(records))
