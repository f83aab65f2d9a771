"""Kept tokens and heat maps as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image

from trimtab.dualspeed.look import Seen, SeenPart
from trimtab.report.pictures import VEIL, draw_kept

COLOURS = "cividis"
"""Colour map: even in lightness, and the same to those who do not tell red from green."""

SHORTEST, LONGEST = 336, 768
"""Sides of pictures in pixels: smaller ones are enlarged without smoothing, larger ones scaled down."""


def kept_picture(seen: Seen) -> Image.Image:
    """Draw what the tower sees, with kept cells framed and the rest under a veil."""
    canvas, factor = _canvas(seen.picture)
    for part in seen.parts:
        box = _scaled(part, factor)
        canvas.paste(draw_kept(canvas.crop(box), part.kept, part.grid, side=1), box[:2])
    return canvas


def heat_picture(seen: Seen, values: Sequence[Sequence[float]], low: float, high: float) -> Image.Image:
    """Draw one number per cell as a colour.

    Args:
        seen: What a pruner kept; gives the places.
        values: Numbers of each part, raster order.
        low: Number that has the darkest colour.
        high: Number that has the brightest one.

    Returns:
        A picture as large as that of `kept_picture`; places without tokens have the colour of the veil.
    """
    base, factor = _canvas(seen.picture)
    canvas = Image.new("RGB", base.size, VEIL)
    for part, numbers in zip(seen.parts, values, strict=True):
        box = _scaled(part, factor)
        cells = Image.fromarray(colours(np.reshape(numbers, part.grid), low, high))
        canvas.paste(cells.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST), box[:2])
    return canvas


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:  # type: ignore[type-arg]
    """Return the colours of numbers as uint8 of shape [..., 3]; equal limits give the darkest colour."""
    shares = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    painted: np.ndarray = matplotlib.colormaps[COLOURS](shares, bytes=True)[..., :3]  # type: ignore[type-arg]
    return painted


def scale_picture() -> Image.Image:
    """Draw the colours from low to high, for a legend."""
    return Image.fromarray(colours(np.linspace(0, 1, 256)[None], 0, 1)).resize((256, 8), Image.Resampling.NEAREST)


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    """Return a picture as an address that holds it."""
    stream = io.BytesIO()
    picture.save(stream, format=kind, quality=90) if kind == "JPEG" else picture.save(stream, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _canvas(picture: Image.Image) -> tuple[Image.Image, float]:
    """Return a copy within `SHORTEST` and `LONGEST`, and the factor of its size."""
    if max(picture.size) > LONGEST:
        factor = LONGEST / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), factor
    whole = max(1, min(-(-SHORTEST // min(picture.size)), LONGEST // max(picture.size)))
    size = (picture.width * whole, picture.height * whole)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST), float(whole)


def _scaled(part: SeenPart, factor: float) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(edge * factor) for edge in part.box)
    return left, top, max(right, left + 1), max(bottom, top + 1)
