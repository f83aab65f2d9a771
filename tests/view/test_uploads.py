"""What counts as an image."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from trimtab.errors import DataError
from trimtab.view import uploads
from trimtab.view.uploads import ENDINGS, keep_image, open_kept


def encoded(kind: str, **more: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), "teal").save(stream, format=kind, **more)
    return stream.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG that says it is huge."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("kind", "ending"), ENDINGS.items())
def test_each_format_is_kept_as_it_is(kind: str, ending: str, tmp_path: Path) -> None:
    path = keep_image(encoded(kind), "a.txt", tmp_path)
    assert path.suffix == ending
    assert path.read_bytes() == encoded(kind)
    assert open_kept(path).size == (8, 6)
    assert keep_image(encoded(kind), "again.svg", tmp_path) == path


def test_of_an_animation_the_first_frame_is_shown(tmp_path: Path) -> None:
    data = encoded("GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")])
    assert open_kept(keep_image(data, "a.gif", tmp_path)).getpixel((0, 0)) == (0, 128, 128)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "PDF"])
def test_other_formats_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png is no image that the view takes: PNG, JPEG, WebP, BMP or GIF"):
        keep_image(encoded(kind), "a.png", tmp_path)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", bytes(100)])
def test_what_is_no_image_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        keep_image(data, "a.png", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, format="PNG")
    with pytest.raises(DataError, match=r"a\.png cannot be shown: .*truncated"):
        keep_image(stream.getvalue()[:-1500], "a.png", tmp_path)


@pytest.mark.parametrize("side", [7_100, 12_000, 60_000], ids=["above ours", "Pillow warns", "Pillow refuses"])
def test_decompression_bombs_are_refused_by_what_they_claim(side: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than 50,000,000 pixels"):
        keep_image(claiming(side, side), "a.png", tmp_path)


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (100, 2)])
def test_a_long_image_is_taken(size: tuple[int, int], tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, format="PNG")
    assert open_kept(keep_image(stream.getvalue(), "a.png", tmp_path)).size == size


@pytest.mark.parametrize("size", [(1, 51), (3000, 1)])
def test_an_image_that_models_would_enlarge_beyond_memory_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"sides of {size[0]:,} and {size[1]:,} pixels, .* at most 50 times as long"):
        keep_image(claiming(*size), "a.png", tmp_path)


def test_a_file_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", len(encoded("PNG")))
    keep_image(encoded("PNG"), "a.png", tmp_path)
    with pytest.raises(DataError, match="larger than"):
        keep_image(encoded("PNG") + b" ", "a.png", tmp_path)
