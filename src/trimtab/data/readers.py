"""Read users' data: every known file and layout becomes rows of messages and RGB images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from trimtab.data.images import image_path, open_image
from trimtab.data.messages import detect_layout, to_messages
from trimtab.data.sources import Source, open_source
from trimtab.errors import DataError, setting_error

ON_BAD = ("error", "skip")


class Rows(Sequence[dict[str, Any]]):
    """Rows ready for a collator; images are opened when a row is asked for, and not kept.

    Indexing gives ``{"messages", "images", "row"}``: messages as from `to_messages`, images as a list of PIL images
    of mode RGB, and the number by which messages name the row. A slice gives another `Rows`.

    Attributes:
        layouts: How many rows came in each layout, by its name.
        skipped: (row number, reason) of every row left out.
        counting: What a row number counts: ``"line"`` (from 1, .jsonl) or ``"index"`` (from 0).
        image_folder: Where relative image paths start.
    """

    def __init__(self, source: Source, places: Sequence[int], layouts: Counter[str], image_folder: Path | None):
        self.source = source
        self.places = places
        self.layouts = dict(layouts)
        self.skipped: list[tuple[int, str]] = []
        self.counting = source.counting
        self.image_folder = image_folder

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):
            part = Rows(self.source, self.places[index], Counter(), self.image_folder)
            part.layouts = dict(Counter(detect_layout(self.source.outline(place)).value for place in part.places))
            return part
        place = self.places[index]
        row = to_messages(self.source.raw(place), where=self.source.where(place))
        images = [self._opened(image, place) for image in row["images"]]
        return {"messages": row["messages"], "images": images, "row": self.source.number(place)}

    def _opened(self, image: Any, place: int) -> Any:
        try:
            return open_image(image, folder=self.image_folder)
        except DataError as cause:
            raise DataError(f"{self.source.where(place)}: {cause}") from cause


def load_rows(
    path: str | os.PathLike[str],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    split: str | None = None,
    on_bad: str = "error",
) -> Rows:
    """Read a data set of any known layout.

    The text of every row is checked here, and that every image file exists. With ``on_bad="skip"`` every image is
    also opened once, so that no bad row can turn up later; the pixels are not kept.

    Args:
        path: A .json (list), .jsonl or .parquet file, a directory saved by datasets, or the name of a data set of
            the hub.
        image_folder: Where relative image paths start; the directory of the data file if None.
        split: Which split of a directory or hub data set; ``"train"`` where there are several and none is named.
        on_bad: ``"error"`` stops at the first bad row; ``"skip"`` leaves bad rows out and lists them in
            ``Rows.skipped``.

    Returns:
        The rows.

    Raises:
        SettingError: `on_bad` is neither.
        DataError: The source cannot be read, a row is bad, or no good row is left.
    """
    if on_bad not in ON_BAD:
        raise setting_error("load_rows", "on_bad", f"one of {', '.join(ON_BAD)}", on_bad)
    source = open_source(path, split=split)
    folder = source.folder if image_folder is None else Path(image_folder)
    if source.broken and on_bad == "error":
        number, reason = source.broken[0]
        raise DataError(f"{source.name}, line {number} is {reason}. Correct it, or skip bad rows with on_bad='skip'.")
    skipped, places, layouts = list(source.broken), [], Counter[str]()
    for place in range(len(source)):
        try:
            layout = _check(source, place, folder, decode=on_bad == "skip")
        except DataError as cause:
            if on_bad == "error":
                raise
            skipped.append((source.number(place), str(cause)))
            continue
        places.append(place)
        layouts[layout] += 1
    if not places:
        first = f" The first: {min(skipped)[1]}" if skipped else ""
        raise DataError(f"{source.name} has no usable row; {len(skipped)} were skipped.{first}")
    rows = Rows(source, places, layouts, folder)
    rows.skipped = sorted(skipped)
    return rows


def _check(source: Source, place: int, folder: Path | None, decode: bool) -> str:
    """Raise for a bad row, else name its layout."""
    where = source.where(place)
    outline = source.raw(place) if decode else source.outline(place)
    layout = detect_layout(outline, where)
    for image in to_messages(outline, where=where)["images"]:
        path = image_path(image, folder)
        if path is not None and not path.is_file():
            raise DataError(f"{where}: {path} is missing. Check the path, or give image_folder for relative ones.")
        if decode:
            try:
                open_image(image, folder=folder)
            except DataError as cause:
                raise DataError(f"{where}: {cause}") from cause
    return layout.value
