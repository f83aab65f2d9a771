"""Pictures of what was pruned."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

from PIL import Image, ImageDraw

from trimtab.errors import SettingError, setting_error

VEIL = (24, 28, 36)
"""Colour of the veil over dropped patches."""

EDGE = (255, 176, 0)
"""Colour of the frame around kept patches."""


def draw_kept(
    image: Image.Image, kept_indices: Iterable[int], grid: tuple[int, int], *, veil: float = 0.72, side: int = 256
) -> Image.Image:
    """Draw which visual tokens of an image stay: dropped patches are shaded, kept ones framed.

    Args:
        image: The picture as the vision tower sees it, that is after cropping; the grid spans all of it.
        kept_indices: Indices of kept tokens in raster order; a tensor of them will do.
        grid: Rows and columns of tokens.
        veil: How much of the shade covers a dropped patch, in [0, 1].
        side: The shorter side of the result in pixels at least; smaller pictures are enlarged without smoothing.

    Returns:
        A new RGB picture; the given one stays as it is.

    Raises:
        SettingError: An index outside the grid, an empty grid, or a veil outside its range.
    """
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise setting_error("draw_kept", "grid", "two numbers, at least 1", grid)
    if not 0 <= veil <= 1:
        raise setting_error("draw_kept", "veil", "in [0, 1]", veil)
    kept = {int(index) for index in kept_indices}
    outside = sorted(index for index in kept if not 0 <= index < rows * columns)
    if outside:
        raise SettingError(
            f"Kept indices must be in 0..{rows * columns - 1} (grid {rows} x {columns}): {outside[0]} came."
        )
    canvas = _enlarged(image.convert("RGB"), side)
    shaded = Image.blend(canvas, Image.new("RGB", canvas.size, VEIL), veil)
    boxes = [_box(canvas.size, index, rows, columns) for index in sorted(kept)]
    for box in boxes:
        shaded.paste(canvas.crop(box), box)
    pencil = ImageDraw.Draw(shaded)
    for left, top, right, bottom in boxes:
        if right - left > 4 and bottom - top > 4:
            pencil.rectangle((left, top, right - 1, bottom - 1), outline=EDGE)
    return shaded


def picture_entry(picture: Image.Image, caption: str) -> dict[str, str]:
    """Return a picture in the form that records of kind "pictures" keep: ``{"png_base64", "caption"}``."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return {"png_base64": base64.b64encode(stream.getvalue()).decode(), "caption": caption}


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    factor = -(-side // min(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _box(size: tuple[int, int], index: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of a patch in pixels; patches tile the picture without gaps."""
    row, column = divmod(index, columns)
    width, height = size
    edges: list[Any] = [column * width / columns, row * height / rows]
    edges += [(column + 1) * width / columns, (row + 1) * height / rows]
    left, top, right, bottom = (round(edge) for edge in edges)
    return left, top, right, bottom
