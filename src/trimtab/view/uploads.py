"""Which files count as images, decided by decoding them, and where they are kept."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from trimtab.data.images import open_image
from trimtab.errors import DataError

ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif"}
"""Formats that are taken, by Pillow's names, and the file ending that each is kept under."""

MAX_BYTES = 20 * 2**20
"""Largest file."""

MAX_PIXELS = 50_000_000
"""Largest number of pixels; a small file can claim many more than memory holds."""

MAX_SHAPE = 50
"""How many times as long as the other a side may be: models enlarge the short side, and the long one with it."""


def keep_image(data: bytes, name: str, folder: Path) -> Path:
    """Check that a file is an image, and keep it in a folder.

    The format is what Pillow decodes, whatever the name says, among those of `ENDINGS` only: no other decoder is
    tried. The whole image is decoded, so that one that is cut off is refused here.

    Args:
        data: Content of the file.
        name: Its name, for messages only.
        folder: Where it is kept, under a name that its content gives.

    Returns:
        The file.

    Raises:
        DataError: It is too large, too long, of another format, broken, or has too many pixels.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"{name} is larger than {MAX_BYTES // 2**20} MiB. Make it smaller.")
    path = folder / hashlib.sha256(data).hexdigest()[:32] / f"image{ENDINGS[_checked_format(data, name)]}"
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(data)
    return path


def open_kept(path: Path) -> Image.Image:
    """Open what `keep_image` kept, as RGB and upright.

    Raises:
        DataError: It is gone, or no longer what it was.
    """
    try:
        with Image.open(path, formats=list(ENDINGS)) as opened:
            return open_image(opened)
    except OSError as cause:
        raise DataError("The image is gone or broken. Choose it again.") from cause


def _checked_format(data: bytes, name: str) -> str:
    try:
        with warnings.catch_warnings():
            # Our own, lower limit follows at once.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=list(ENDINGS))
    except Image.DecompressionBombError as cause:
        raise DataError(_too_many(name)) from cause
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as cause:
        raise DataError(
            f"{name} is no image that the view takes: PNG, JPEG, WebP, BMP or GIF, by content. Convert it first."
        ) from cause
    with opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise DataError(_too_many(name))
        if max(opened.size) > MAX_SHAPE * min(opened.size):
            raise DataError(
                f"{name} has sides of {opened.width:,} and {opened.height:,} pixels, but one may be at most "
                f"{MAX_SHAPE} times as long as the other. Crop it."
            )
        kind = str(opened.format)
        try:
            open_image(opened)
        except DataError as cause:
            raise DataError(f"{name} cannot be shown: {cause}") from cause
    # Phones write JPEG files with a second picture inside, which Pillow names MPO.
    return kind if kind in ENDINGS else "JPEG"


def _too_many(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS:,} pixels. Make it smaller."
