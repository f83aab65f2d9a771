"""Look through a whole data set and list everything that is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trimtab.data.images import open_image
from trimtab.data.messages import detect_layout, to_messages
from trimtab.data.readers import Rows
from trimtab.data.sources import Source, open_source
from trimtab.errors import DataError, setting_error

EXTREME_ASPECT = 20.0
"""Longer over shorter side above which an image is reported: processors squeeze or crop it beyond use."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row.

    Attributes:
        row: Number of the row; see ``ValidationReport.counting``.
        kind: ``"json"``, ``"layout"`` (columns, roles, answers, counts), ``"image"`` or ``"aspect"``.
        message: The sentence for the user.
    """

    row: int
    kind: str
    message: str


@dataclass
class ValidationReport:
    """What `validate_rows` found.

    Attributes:
        name: The data set.
        counting: What a row number counts: ``"line"`` (from 1, .jsonl) or ``"index"`` (from 0).
        rows: Rows looked at, broken lines included.
        layouts: Rows per layout.
        images: Images that could be opened.
        width, height: ``min``, ``median`` and ``max`` in pixels; empty without images.
        words: ``min``, ``median`` and ``max`` number of words per row; empty without good rows.
        duplicates: Rows that equal an earlier row.
        problems: Everything wrong, in the order of the rows. Problems of kind ``"aspect"`` are remarks.
    """

    name: str
    counting: str
    rows: int = 0
    layouts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    width: dict[str, float] = field(default_factory=dict)
    height: dict[str, float] = field(default_factory=dict)
    words: dict[str, float] = field(default_factory=dict)
    duplicates: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def first_bad_row(self) -> int | None:
        """Number of the first row that cannot be used, or None."""
        return min((problem.row for problem in self.problems if problem.kind != "aspect"), default=None)

    @property
    def sound(self) -> bool:
        """Whether every row can be used."""
        return self.first_bad_row is None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {**asdict(self), "first_bad_row": self.first_bad_row, "sound": self.sound}


def validate_rows(
    path_or_rows: str | os.PathLike[str] | Rows | Sequence[Any],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Check every row and open every image once, without stopping at the first problem.

    Args:
        path_or_rows: Anything `load_rows` reads, `Rows`, or a sequence of raw rows.
        image_folder: Where relative image paths start; the directory of the data file if None.
        limit: Look at the first rows only, at least 1.
        progress: Called with (rows done, rows in all) after each row.

    Returns:
        The report.

    Raises:
        SettingError: `limit` below 1.
        DataError: The source as a whole cannot be read.
    """
    if limit is not None and limit < 1:
        raise setting_error("validate_rows", "limit", "at least 1 or None", limit)
    source, places, folder = _opened(path_or_rows, image_folder)
    total = len(places) if limit is None else min(limit, len(places))
    look = _Look(source, folder)
    for done, place in enumerate(places[:total], start=1):
        look.at(place)
        if progress is not None:
            progress(done, total)
    broken = source.broken
    if total < len(places):  # behind the last row looked at, lines are left out like rows
        broken = [row for row in broken if row[0] < source.number(places[total - 1])]
    return look.report(total, broken)


def _opened(given: Any, image_folder: Any) -> tuple[Source, Sequence[int], Path | None]:
    folder = None if image_folder is None else Path(image_folder)
    if isinstance(given, Rows):
        return given.source, given.places, folder or given.image_folder
    source = open_source(given) if isinstance(given, (str, os.PathLike)) else Source(given, "The data")
    return source, range(len(source)), folder or source.folder


class _Look:
    """Gathers what one walk over the rows sees."""

    def __init__(self, source: Source, folder: Path | None):
        self.source, self.folder = source, folder
        self.problems: list[Problem] = []
        self.layouts: Counter[str] = Counter()
        self.sizes: list[tuple[int, int]] = []
        self.words: list[int] = []
        self.seen: Counter[bytes] = Counter()

    def at(self, place: int) -> None:
        number, where, raw = self.source.number(place), self.source.where(place), self.source.raw(place)
        try:
            self.layouts[detect_layout(raw, where).value] += 1
            row = to_messages(raw, where=where)
        except DataError as cause:
            self.problems.append(Problem(number, "layout", str(cause)))
            return
        texts = [part.get("text", "") for turn in row["messages"] for part in turn["content"]]
        self.words.append(sum(len(text.split()) for text in texts))
        digest = hashlib.sha256(json.dumps(row["messages"], sort_keys=True).encode())
        for image in row["images"]:
            digest.update(_key(image))
            self._image(image, number, where)
        self.seen[digest.digest()] += 1

    def _image(self, source: Any, number: int, where: str) -> None:
        try:
            size = open_image(source, folder=self.folder).size
        except DataError as cause:
            self.problems.append(Problem(number, "image", f"{where}: {cause}"))
            return
        self.sizes.append(size)
        aspect = max(size) / min(size)
        if aspect > EXTREME_ASPECT:
            text = f"{where}: an image of {size[0]}x{size[1]} pixels is {aspect:.0f} times longer than wide."
            self.problems.append(Problem(number, "aspect", text))

    def report(self, total: int, broken: list[tuple[int, str]]) -> ValidationReport:
        lines = [Problem(number, "json", f"{self.source.name}, line {number} is {why}.") for number, why in broken]
        return ValidationReport(
            name=self.source.name,
            counting=self.source.counting,
            rows=total + len(broken),
            layouts=dict(self.layouts),
            images=len(self.sizes),
            width=_spread([size[0] for size in self.sizes]),
            height=_spread([size[1] for size in self.sizes]),
            words=_spread(self.words),
            duplicates=sum(count - 1 for count in self.seen.values()),
            problems=sorted([*lines, *self.problems], key=lambda problem: problem.row),
        )


def _key(image: Any) -> bytes:
    """Bytes that tell images apart without decoding them."""
    if isinstance(image, dict):
        return bytes(image.get("bytes") or b"") or str(image.get("path")).encode()
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if hasattr(image, "tobytes"):
        return f"{getattr(image, 'size', '')}".encode() + bytes(image.tobytes())
    return str(image).encode()


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
