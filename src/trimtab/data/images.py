"""Open an image from any source as RGB, upright, or say clearly why not."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trimtab.errors import DataError

ACCEPTED = "a path, a data: URL, bytes, {'bytes', 'path'}, a PIL image or a uint8 array"


def open_image(
    source: Any, *, folder: str | os.PathLike[str] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Open one image as RGB.

    The EXIF rotation is applied; transparent places become white; 16 bit grey is scaled to 8 bit; of an animation
    the first frame is taken.

    Args:
        source: A path, a ``data:`` or ``file:`` URL, encoded bytes, a ``{"bytes", "path"}`` mapping (the form of
            datasets), a PIL image, or a uint8 array [height, width] or [height, width, 1, 3 or 4].
        folder: Where relative paths start; the working directory if None.
        max_pixels: Largest number of pixels; ``PIL.Image.MAX_IMAGE_PIXELS`` if None.

    Returns:
        An image of mode RGB, at least 1x1, that no longer depends on the file.

    Raises:
        DataError: The file is missing, empty, truncated, no image or too large, or the source is of another kind.
            The message names the path.
    """
    if isinstance(source, Image.Image):
        return _finish(source, "the given image", max_pixels)
    if isinstance(source, np.ndarray):
        return _finish(_from_array(source), "the given array", max_pixels)
    stream, name = _stream(source, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(stream)
    except Image.DecompressionBombError as cause:
        detail = f"{cause} PIL.Image.MAX_IMAGE_PIXELS, the limit, is {Image.MAX_IMAGE_PIXELS}"
        raise DataError(_too_large(name, detail)) from cause
    except UnidentifiedImageError as cause:
        raise DataError(
            f"{name} is not an image that Pillow can read (another kind of file, or cut off early). "
            "Replace it or leave the row out."
        ) from cause
    except (OSError, SyntaxError, ValueError, EOFError) as cause:
        raise DataError(f"{name} cannot be read as an image ({cause}). Replace it or leave the row out.") from cause
    with opened:
        return _finish(opened, name, max_pixels)


def image_path(source: Any, folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the file that a source names, or None where the source carries its image itself.

    Args:
        source: Anything that `open_image` takes.
        folder: Where relative paths start.

    Returns:
        The path, joined with `folder` where it is relative.
    """
    if isinstance(source, Mapping) and source.get("bytes") is None:
        source = source.get("path")
    if not isinstance(source, (str, os.PathLike)) or str(source).startswith("data:"):
        return None
    text = os.fspath(source)
    if text.startswith("file:"):
        text = unquote(urlparse(text).path)
    return Path(text) if folder is None else Path(folder) / text


def _stream(source: Any, folder: str | os.PathLike[str] | None) -> tuple[io.BytesIO, str]:
    """The encoded bytes of a source and its name for messages."""
    path = image_path(source, folder)
    if path is not None:
        data, name = _file_bytes(path), str(path)
    elif isinstance(source, str):
        data, name = _data_url(source), "the image of a data: URL"
    elif isinstance(source, Mapping) and isinstance(source.get("bytes"), bytes):
        data, name = source["bytes"], str(source.get("path") or "an image given as bytes")
    elif isinstance(source, (bytes, bytearray)):
        data, name = bytes(source), "an image given as bytes"
    else:
        raise DataError(f"An image came as {type(source).__name__}; accepted are {ACCEPTED}.")
    if not data:
        raise DataError(f"{name} is empty (0 bytes). Replace it or leave the row out.")
    return io.BytesIO(data), name


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as cause:
        raise DataError(f"{path} is missing. Check the path, or give image_folder for relative ones.") from cause
    except (OSError, ValueError) as cause:
        raise DataError(f"{path} cannot be read ({cause}).") from cause


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"The data: URL {url[:40]!r}... must have the form data:image/png;base64,<data>.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise DataError(f"The data: URL {url[:40]!r}... does not hold valid base64 ({cause}).") from cause


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    planes = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    fits = planes.ndim == 2 or (planes.ndim == 3 and planes.shape[2] in (3, 4))
    if planes.dtype != np.uint8 or not fits or 0 in planes.shape:
        raise DataError(
            f"An image array must be uint8 of shape [height, width] or [height, width, 1, 3 or 4], but "
            f"{array.dtype} of shape {list(array.shape)} came."
        )
    return Image.fromarray(planes)


def _finish(image: Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    width, height = image.size
    if limit is not None and width * height > limit:
        raise DataError(_too_large(name, f"{width}x{height} = {width * height} pixels, the limit is {limit}"))
    if not width or not height:
        raise DataError(f"{name} has a side of 0 pixels ({width}x{height}). Replace it or leave the row out.")
    try:
        image.load()
        return _to_rgb(_upright(image))
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as cause:
        raise DataError(f"{name} is truncated or damaged ({cause}). Replace the file or leave the row out.") from cause


def _too_large(name: str, detail: str) -> str:
    return (
        f"{name} is too large ({detail}). If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS (and max_pixels, "
        "where you give it), or scale the image down."
    )


def _upright(image: Image.Image) -> Image.Image:
    orientation_tag = 0x0112
    try:
        turned = image.getexif().get(orientation_tag, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except (SyntaxError, ValueError, TypeError, KeyError, OSError):
        return image  # unreadable EXIF data say nothing about rotation; the pixels are sound


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    transparent = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if not transparent:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, layer).convert("RGB")


def _to_8_bit(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scale integers by 257 (16 to 8 bit); floats up to 1 by 255; other floats are taken as 0..255."""
    numbers = np.nan_to_num(values.astype(np.float64))
    if values.dtype.kind in "iu":
        scaled = numbers / 257
    else:
        scaled = numbers * 255 if numbers.size and numbers.max() <= 1 else numbers
    result: np.ndarray[Any, Any] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return result
