"""Where records come from: directories with names of their own, and the commands that made the records."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from trimtab.errors import DataError
from trimtab.records import portable_path, read_records
from trimtab.report import rows
from trimtab.report.rows import Record

Given = Sequence[Record] | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""What a page is made from: records, a directory of them, or several directories."""


@dataclass(frozen=True)
class Source:
    """Records that were found together.

    Attributes:
        name: Name of the directory, unlike that of any other; empty where the records came without one.
        path: Its path as far as others may know it, for commands; empty likewise.
        records: The records.
    """

    name: str
    path: str
    records: tuple[Record, ...]


def load_sources(given: Given) -> list[Source]:
    """Return checked records by directory, in the order given; a directory that is given twice counts once.

    Raises:
        DataError: A directory holds no record or a broken one, or an arm lacks what pages need.
    """
    if isinstance(given, (str, os.PathLike)):
        given = [given]
    paths = [Path(item) for item in given if isinstance(item, (str, os.PathLike))]
    if not paths:
        return [Source("", "", tuple(rows.load(given)))]  # type: ignore[arg-type]  # records, or nothing at all
    if len(paths) != len(given):
        raise DataError("A report takes either records or directories, but both came. Give one or the other.")
    found: dict[Path, Path] = {}
    for path in paths:
        place = Path(os.path.abspath(path))
        found.setdefault(Path(os.path.realpath(_named(place))), place)
    places = list(found.values())
    names = unique_names([_named(place) for place in places])
    return [
        Source(name, portable_path(str(place)), tuple(rows.load(read_records(place))))
        for name, place in zip(names, places, strict=True)
    ]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many of its last parts as tell it from the others."""
    names = []
    for path in paths:
        for many in range(1, len(path.parts) + 1):
            name = PurePath(*path.parts[-many:]).as_posix()
            if not any(other != path and PurePath(*other.parts[-many:]) == PurePath(name) for other in paths):
                break
        names.append(name)
    return names


def report_command(sources: Sequence[Source]) -> str:
    """Return the command that makes the page from these directories; empty where the records came without one."""
    paths = [source.path for source in sources if source.path]
    return shlex.join(["trimtab", "report", *paths]) if paths else ""


def commands_of(records: Iterable[Record]) -> list[str]:
    """Return the commands that made the records, each once; records that do not say are passed over."""
    told = [record.get("command") for record in records]
    return list(dict.fromkeys(shlex.join(words) for words in told if words))


def _named(path: Path) -> Path:
    """Return what a directory is named for: a folder ``records`` for the one that it lies in."""
    return path.parent if path.name == "records" and path.parent.name else path
