"""Views of one image: their pixels, the tokens of their cells, and which of several guesses is the image itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image

from trimtab.anatomy.encode import EncodedImages
from trimtab.anatomy.families import Host
from trimtab.shapes import Float, Tensor

SMALL = 32
"""Pictures are compared at this width and height."""
ALIKE = 0.8
"""Correlation from which on a picture is taken for the image that went in; a wrong order of patches is far below."""
FLAT = 0.01
"""Spread of brightness below which an image shows nothing by which an order could be told."""

Box = tuple[int, int, int, int]
Grid = tuple[int, int]


class NoRasterError(Exception):
    """It is not known where the tokens lie; never leaves `trimtab.anatomy.seen`."""


@dataclass(frozen=True)
class Cells:
    """One rectangle of visual tokens.

    Attributes:
        box: Left, top, right and bottom in pixels of the picture.
        grid: Rows and columns.
        tokens: The token of each cell in raster order, counted through all blocks of the image.
    """

    box: Box
    grid: Grid
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """One view of the image: the whole, a tile, or tiles put together.

    Attributes:
        pixels: [channel, height, width], from 0 (black) to 1 (white).
        cells: Its tokens; none where they stand in no raster.
    """

    pixels: Float[Tensor, "channel height width"]
    cells: tuple[Cells, ...] = ()

    @property
    def box(self) -> Box:
        """All of it."""
        return (0, 0, self.pixels.shape[2], self.pixels.shape[1])


@dataclass(frozen=True)
class Source:
    """What there is to see an image by.

    Attributes:
        host: The model.
        entries: Visual entries of the batch, on the CPU.
        encoded: Features of the image.
        image_processor: What normalised the pixels, or None.
        image: The image that went in, or None.
    """

    host: Host
    entries: Mapping[str, Any]
    encoded: EncodedImages
    image_processor: Any = None
    image: Image.Image | None = None
    small: Float[Tensor, "channel height width"] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Make the small copy of the image."""
        if self.image is not None:
            object.__setattr__(self, "small", _small_copy(self.image))

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """First token and number of tokens of each tile, counted through all blocks."""
        found, start = [], 0
        for block, sizes in zip(self.encoded.blocks, self.encoded.tiles, strict=True):
            first = start
            for size in sizes:
                found.append((first, size))
                first += size
            start += block.shape[0]
        return found

    def natural(self, pixels: Float[Tensor, "*view channel height width"]) -> Tensor:
        """Take back rescaling and normalisation; without a processor the values are spread over black to white."""
        processor = self.image_processor
        if processor is None:
            low, high = pixels.min(), pixels.max()
            return (pixels - low) / (high - low).clamp_min(1e-6)
        if getattr(processor, "do_normalize", None):
            pixels = pixels * _per_channel(processor.image_std) + _per_channel(processor.image_mean)
        if not getattr(processor, "do_rescale", True):
            pixels = pixels * (getattr(processor, "rescale_factor", None) or 1 / 255)
        return pixels.clamp(0, 1)

    def likeness(self, pixels: Float[Tensor, "channel height width"]) -> float | None:
        """Correlation of a picture with the image that went in, or None where that cannot tell."""
        if self.small is None or float(self.small.std()) < FLAT:
            return None
        shown = torch.nn.functional.adaptive_avg_pool2d(pixels, SMALL)
        one, other = shown - shown.mean(), self.small - self.small.mean()
        return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-9))


def square_raster(tokens: int, height: int, width: int) -> Grid | None:
    """Rows and columns of square cells that fill a view, or None where so many tokens cannot."""
    rows = isqrt(max(0, round(tokens * height / width)))
    if rows == 0 or tokens % rows or rows * width != (tokens // rows) * height:
        return None
    return rows, tokens // rows


def put_together(tiles: Iterable[Float[Tensor, "channel height width"]], rows: int, columns: int) -> Tensor:
    """Lay tiles out in raster order, [channel, rows * height, columns * width]."""
    whole = torch.stack(list(tiles))
    laid: Tensor = whole.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return laid


def to_picture(pixels: Float[Tensor, "channel height width"]) -> Image.Image:
    """Make a picture of natural pixels."""
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values.contiguous().numpy())


def _per_channel(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def _small_copy(image: Image.Image) -> Tensor:
    small = image.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255
