"""Raw rows of a file, a saved data set or a hub name, with the number by which an error names each."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, near_miss

SUFFIXES = (".json", ".jsonl", ".parquet")
IMAGE_COLUMNS = ("images", "image")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Source:
    """Raw rows in memory.

    Attributes:
        name: What an error calls the source.
        folder: Where relative image paths start, or None for the working directory.
        counting: ``"line"`` (from 1, for .jsonl) or ``"index"`` (from 0).
        broken: (number, reason) of lines that are not JSON objects.
    """

    counting = "index"

    def __init__(self, rows: Sequence[Any], name: str, folder: Path | None = None):
        self._rows: Any = rows
        self.name = name
        self.folder = folder
        self.broken: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, place: int) -> Any:
        """Return one row as it is stored, images not decoded.

        Args:
            place: Place among the rows, from 0.
        """
        return self._rows[place]

    def outline(self, place: int) -> Any:
        """Return one row for checks of its layout; images may be replaced by stand-ins.

        Args:
            place: Place among the rows, from 0.
        """
        return self.raw(place)

    def number(self, place: int) -> int:
        """Return the number by which messages name a row.

        Args:
            place: Place among the rows, from 0.
        """
        return place

    def where(self, place: int) -> str:
        """Name one row for an error message.

        Args:
            place: Place among the rows, from 0.
        """
        return f"{self.name}, {'line' if self.counting == 'line' else 'row'} {self.number(place)}"


class LineSource(Source):
    """Rows of a .jsonl file, numbered by line from 1; empty lines are passed over."""

    counting = "line"

    def __init__(self, path: Path):
        super().__init__([], str(path), path.parent)
        rows, self._numbers = [], []
        for number, line in enumerate(_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as cause:
                self.broken.append((number, f"not JSON ({cause.msg} at character {cause.colno})"))
                continue
            rows.append(row)
            self._numbers.append(number)
        self._rows = rows

    def number(self, place: int) -> int:
        """Return the line of a row, from 1.

        Args:
            place: Place among the rows, from 0.
        """
        return int(self._numbers[place])


class ArrowSource(Source):
    """Rows of a datasets.Dataset, memory-mapped; image columns stay encoded."""

    def __init__(self, dataset: Any, name: str, folder: Path | None):
        super().__init__(dataset.with_format("arrow"), name, folder)
        pictures = [column for column in IMAGE_COLUMNS if column in dataset.column_names]
        self._texts = self._rows.remove_columns(pictures) if pictures else self._rows
        self._pictures = {column: self._rows.select_columns([column]) for column in pictures}

    def raw(self, place: int) -> Any:
        """Return one row, images as ``{"bytes", "path"}`` or paths.

        Args:
            place: Place among the rows, from 0.
        """
        return self._rows[place].to_pylist()[0]

    def outline(self, place: int) -> Any:
        """Return one row with every image replaced by an empty stand-in, so that no image bytes are read.

        Args:
            place: Place among the rows, from 0.
        """
        row = self._texts[place].to_pylist()[0] if self._texts.column_names else {}
        for column, table in self._pictures.items():
            value = table[place][column][0]
            if not value.is_valid:
                row[column] = None
            else:
                row[column] = [b""] * len(value) if hasattr(value, "values") and _is_list(value) else b""
        return row


def _is_list(value: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_list(value.type) or kinds.is_large_list(value.type) or kinds.is_fixed_size_list(value.type))


def open_source(path: str | os.PathLike[str], *, split: str | None = None) -> Source:
    """Open a data file, a directory saved by datasets, or a data set of the hub.

    Args:
        path: A .json, .jsonl or .parquet file, a directory written by ``save_to_disk``, or a hub name.
        split: Which split of a directory or hub data set; needed where there are several.

    Returns:
        The raw rows; lines of a .jsonl file that are not JSON are listed under ``broken``.

    Raises:
        DataError: Missing, empty, truncated or wrongly encoded file, unknown kind of file, unknown split, or a hub
            that cannot be reached.
    """
    place = Path(path)
    if place.is_dir():
        return _saved(place, split)
    if place.is_file():
        return _file(place)
    if place.suffix.lower() in SUFFIXES or not _HUB_NAME.fullmatch(str(path)):
        raise DataError(f"{place} is missing. Give a {', '.join(SUFFIXES)} file, a saved directory or a hub name.")
    return _hub(str(path), split)


def _file(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {suffix!r}; files of {', '.join(SUFFIXES)} are read.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Write it again.")
    if suffix == ".parquet":
        return ArrowSource(_parquet(path), str(path), path.parent)
    source = LineSource(path) if suffix == ".jsonl" else Source(_json_list(path), str(path), path.parent)
    if not len(source) and not source.broken:
        raise DataError(f"{path} holds no rows.")
    return source


def _parquet(path: Path) -> Any:
    import datasets
    import pyarrow

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path, memory_map=True))
    except (pyarrow.ArrowInvalid, OSError) as cause:
        raise DataError(f"{path} cannot be read as parquet ({cause}). Write or copy the file again.") from cause


def _json_list(path: Path) -> list[Any]:
    text = _text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as cause:
        cut = cause.pos >= len(text.rstrip()) - 1 or "Unterminated" in cause.msg
        remedy = "The file seems truncated: copy or write it again" if cut else "Correct that place"
        raise DataError(
            f"{path} is not valid JSON: {cause.msg} at line {cause.lineno}, character {cause.colno}. {remedy}"
            f"{'; a file with one object per line must end in .jsonl.' if cause.msg == 'Extra data' else '.'}"
        ) from cause
    if not isinstance(rows, list):
        keys = f" with the keys {sorted(rows)[:8]}" if isinstance(rows, dict) else ""
        raise DataError(f"{path} holds a {type(rows).__name__}{keys}; a list of rows is needed.")
    return rows


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[cause.start]:02x} at line {line} (byte {cause.start}). "
            "Save the file with UTF-8 encoding."
        ) from cause


def _saved(path: Path, split: str | None) -> Source:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{path} is a directory, but not one that datasets' save_to_disk wrote (it has neither state.json nor "
            f"dataset_dict.json). Give a {', '.join(SUFFIXES)} file inside it."
        )
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as cause:  # datasets raises many kinds for a half-written directory
        raise DataError(f"{path} cannot be opened as a saved data set ({cause}). Save it again.") from cause
    return ArrowSource(_one_split(found, split, str(path)), str(path), None)


def _one_split(found: Any, split: str | None, name: str) -> Any:
    if not isinstance(found, Mapping):
        return found
    wanted = next(iter(found)) if split is None and len(found) == 1 else split or "train"
    if wanted not in found:
        raise DataError(f"{name} has no split {wanted!r}. {near_miss(wanted, found)}")
    return found[wanted]


def _hub(name: str, split: str | None) -> Source:
    import datasets

    try:
        found = datasets.load_dataset(name, split=split or "train")
    except Exception as cause:  # network, licence and script errors come in many kinds
        raise DataError(
            f"{name!r} is no file or directory here, and as a data set of the hub it cannot be loaded "
            f"({type(cause).__name__}: {cause}). Check the spelling and split={split or 'train'!r}; without a "
            "network, save the data set where there is one (save_to_disk) and give that directory."
        ) from cause
    return ArrowSource(found, name, None)
