"""What a cache will hold, image by image, from the files' headers and the model's configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from trimtab.anatomy import Host
from trimtab.anatomy.tower_cache import packed_rows, packed_tiles, tower_shape
from trimtab.data import open_image, to_messages
from trimtab.data.images import image_path
from trimtab.dualspeed.cache import DTYPES
from trimtab.dualspeed.cache_shard import size_on_disk
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import DataError
from trimtab.pruners import kept_counts

ORIENTATION = 0x0112
"""EXIF tag that says how an image is turned."""


@dataclass(frozen=True)
class CacheSize:
    """How large a cache will be at most; images of equal content are stored once.

    Attributes:
        images: Images, each file once.
        tiles: Tiles that the tower sees of them.
        tokens: Visual tokens that are stored.
        tokens_per_image: The same, mean per image.
        bytes_per_image: Mean.
        bytes: On the disk.
    """

    images: int
    tiles: int
    tokens: int
    tokens_per_image: float
    bytes_per_image: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Pictures:
    """The images of a data set.

    Attributes:
        places: Rows that hold an image that no row before holds.
        sizes: Rows and columns of pixels of each image, each file once; zeros where nothing depends on them.
    """

    places: list[int]
    sizes: list[tuple[int, int]]


def find_pictures(rows: Any, measured: bool) -> Pictures:
    """Find each image once, without decoding any.

    Args:
        rows: What `trimtab.run.load.load_rows_of` returned.
        measured: Whether sizes are wanted; then the header of each file is read.

    Raises:
        DataError: No row holds an image, or the header of one cannot be read.
    """
    seen: set[str] = set()
    places: list[int] = []
    sizes: list[tuple[int, int]] = []
    for place, part, sources in _sources(rows):
        fresh = 0
        for source in sources:
            path = image_path(source, part.image_folder)
            if path is not None and str(path) in seen:
                continue
            if path is not None:
                seen.add(str(path))
            sizes.append(_size(source, part.image_folder) if measured else (0, 0))
            fresh += 1
        if fresh:
            places.append(place)
    if not sizes:
        raise DataError("No row holds an image, so there is nothing to cache. Are the images given?")
    return Pictures(places, sizes)


def estimate(host: Host, settings: DualSpeedConfig, facts: dict[str, Any], sizes: list[tuple[int, int]]) -> CacheSize:
    """Say how large a cache of some images will be.

    Args:
        host: The model, opened, also one without weights.
        settings: Those of DualSpeed.
        facts: What the cache is of, as `trimtab.dualspeed.cache_facts.cache_facts` says it.
        sizes: Rows and columns of pixels of each image.
    """
    shape, dtype = tower_shape(host), DTYPES[facts["dtype"]]
    parts = {"states": torch.empty(0, shape.layers, shape.channels, dtype=dtype)}
    alike: dict[tuple[int, int], int] = {}
    for size in sizes:
        alike[size] = alike.get(size, 0) + 1
    tiles = sum(count * packed_tiles(host, size) for size, count in alike.items())
    if facts["kind"] == "features":
        tokens, entries = (tiles + 1) * shape.tokens, tiles + 1  # and a blank one, see `trimtab.run.cache`
        if "cls_attention" in facts["observed"]:
            parts["cls_attention"] = torch.empty(0, dtype=torch.float32)
        if "keys" in facts["observed"]:
            parts["keys"] = torch.empty(0, shape.key, dtype=dtype)
        rows = dict.fromkeys(parts, tokens)
        tokens -= shape.tokens
    else:
        kept = {size: _kept(host, settings, size) for size in alike}
        tokens, entries = sum(count * kept[size][0] for size, count in alike.items()), len(sizes)
        states = sum(count * kept[size][1] for size, count in alike.items())
        parts |= {"index": torch.empty(0, dtype=torch.int32), "rows": torch.empty(0, dtype=torch.int32)}
        rows = {"states": states, "rows": states, "index": tokens}
        if facts["kind"] == "indices":
            parts = {"index": parts["index"]}
    total = size_on_disk(entries, rows, parts, facts)
    return CacheSize(len(sizes), tiles, tokens, tokens / len(sizes), total / len(sizes), total)


def _kept(host: Host, settings: DualSpeedConfig, size: tuple[int, int]) -> tuple[int, int]:
    """How many tokens of an image stay, and how many of those have a state."""
    places = packed_rows(host, [size] if host.family.tiles == "packed" else None, [packed_tiles(host, size)])[0]
    total, real = len(places), int((places >= 0).sum())
    keep = min(kept_counts({total}, settings.keep_ratio, settings.keep_rule, any_size=False)[total], real)
    if keep + settings.isolator_tokens > total:
        return total, real
    return keep, keep


def _sources(rows: Any) -> Iterator[tuple[int, Any, list[Any]]]:
    first = 0
    for part in getattr(rows, "datasets", [rows]):
        for number, place in enumerate(part.places):
            row = to_messages(part.source.raw(place), where=part.source.where(place))
            yield first + number, part, row["images"]
        first += len(part)


def _size(source: Any, folder: Any) -> tuple[int, int]:
    """Rows and columns of pixels of an image as it stands upright."""
    path = image_path(source, folder)
    if path is None:
        columns, rows = open_image(source, folder=folder).size
        return rows, columns
    try:
        with Image.open(path) as image:
            columns, rows = image.size
            turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}). Replace it or leave the row out.") from error
    return (columns, rows) if turned else (rows, columns)
