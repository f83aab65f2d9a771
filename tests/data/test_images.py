"""Opening images: colours and rotation come out right, and broken files are named."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from trimtab.data.images import image_path, open_image
from trimtab.errors import DataError

RED = (255, 0, 0)


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixel(source, place=(0, 0), **options):
    return open_image(source, **options).getpixel(place)


def test_every_kind_of_source_opens(tmp_path):
    image = Image.new("RGB", (3, 2), RED)
    data = _encoded(image)
    (tmp_path / "a b.png").write_bytes(data)
    sources = [
        tmp_path / "a b.png",
        str(tmp_path / "a b.png"),
        (tmp_path / "a b.png").as_uri(),
        data,
        bytearray(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a b.png")},
        "data:image/png;base64," + base64.b64encode(data).decode(),
        image,
        np.asarray(image),
    ]
    for source in sources:
        opened = open_image(source)
        assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (3, 2), RED)
    assert _pixel("a b.png", folder=tmp_path) == RED
    assert _pixel(np.full((2, 2, 1), 7, np.uint8)) == (7, 7, 7)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (16, 8), "blue")
    image.paste(Image.new("RGB", (8, 8), RED), (0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(_encoded(image, exif=exif))
    assert opened.size == (8, 16)
    assert opened.getpixel((4, 0)) == RED
    assert opened.getpixel((4, 15)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("image", "kind", "wanted"),
    [
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", RED),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF", RED),
        (Image.new("LA", (2, 2), (10, 255)), "PNG", (10, 10, 10)),
        (Image.new("LA", (2, 2), (10, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG", (255, 127, 127)),
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 32896, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 65535, np.int32)), "TIFF", (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF", (128, 128, 128)),
        (Image.new("RGB", (1, 300), RED), "PNG", RED),
        (Image.new("L", (1, 1), 5), "PNG", (5, 5, 5)),
    ],
)
def test_modes_become_rgb(image, kind, wanted):
    opened = open_image(_encoded(image, kind))
    assert opened.size == image.size
    assert np.abs(np.subtract(opened.getpixel((0, 0)), wanted)).max() <= 3


def test_sixteen_bit_grey_is_scaled_exactly():
    assert _pixel(_encoded(Image.fromarray(np.full((2, 2), 200 * 257, np.uint16)))) == (200, 200, 200)


def test_transparent_palette_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putdata([0, 1])
    opened = open_image(_encoded(image, transparency=0))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert _pixel(data) == RED


def test_opened_image_does_not_depend_on_its_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(_encoded(Image.new("RGB", (3, 2), RED)))
    opened = open_image(path)
    path.unlink()
    assert opened.getpixel((2, 1)) == RED


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"certainly not an image", "is not an image that Pillow can read"),
        (_encoded(Image.effect_noise((64, 64), 50))[:-900], "is truncated or damaged"),
        (_encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-400], "is truncated or damaged"),
    ],
)
def test_broken_files_are_named(tmp_path, data, message):
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        open_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.png", r"absent\.png is missing\. Check the path, or give image_folder"),
        (".", "cannot be read"),
        ("data:image/png,plain", "must have the form data:image/png;base64"),
        ("data:image/png;base64,@@@", "does not hold valid base64"),
        (3.5, "An image came as float; accepted are a path"),
        ({"bytes": None, "path": None}, "An image came as dict"),
        (np.zeros((2, 2), np.float32), r"uint8 of shape.*float32 of shape \[2, 2\]"),
        (np.zeros((0, 2), np.uint8), r"uint8 of shape \[0, 2\]"),
    ],
)
def test_wrong_sources_are_named(source, message):
    with pytest.raises(DataError, match=message):
        open_image(source)


@pytest.mark.parametrize("side", [11, 100])
def test_decompression_bomb_names_size_limit_and_remedy(monkeypatch, tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(_encoded(Image.new("L", (side, 10))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = rf"bomb\.png is too large .*{side * 10} pixels.*limit.*100.*raise PIL.Image.MAX_IMAGE_PIXELS"
    with pytest.raises(DataError, match=message):
        open_image(path)


def test_max_pixels_is_a_limit_of_ones_own():
    assert open_image(Image.new("L", (10, 10)), max_pixels=100).size == (10, 10)
    with pytest.raises(DataError, match="11x10 = 110 pixels, the limit is 100"):
        open_image(Image.new("L", (11, 10)), max_pixels=100)


def test_image_path_tells_files_from_images():
    assert str(image_path("a.png", "pictures")) == "pictures/a.png"
    assert str(image_path("/a.png", "pictures")) == "/a.png"
    assert image_path({"bytes": b"x", "path": "a.png"}) is None
    assert image_path("data:image/png;base64,xx") is None
    assert image_path(b"x") is None
