"""Pictures show exactly which patches stay."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from trimtab.errors import SettingError
from trimtab.report import draw_kept, picture_entry
from trimtab.report.pictures import EDGE

WHITE = (255, 255, 255)


def patch_color(picture: Image.Image, grid: tuple[int, int], index: int) -> tuple[int, ...]:
    """Return the colour in the middle of a patch."""
    row, column = divmod(index, grid[1])
    width, height = picture.size
    return picture.getpixel((int((column + 0.5) * width / grid[1]), int((row + 0.5) * height / grid[0])))


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (50, 70), (600, 300)])
def test_kept_patches_stay_and_dropped_ones_darken(size):
    grid = (4, 6)
    kept = torch.tensor([0, 7, 23])
    image = Image.new("RGB", size, WHITE)
    picture = draw_kept(image, kept, grid)
    for index in range(24):
        color = patch_color(picture, grid, index)
        assert color == WHITE if index in (0, 7, 23) else max(color) < 120
    assert min(picture.size) >= 256
    assert picture.width / picture.height == pytest.approx(size[0] / size[1])
    assert image.getcolors() == [(size[0] * size[1], WHITE)]


def test_all_kept_without_veil_differs_only_by_frames():
    image = Image.effect_noise((256, 256), 80).convert("RGB")
    picture = draw_kept(image, range(4), (2, 2))
    drawn = [i for i, (a, b) in enumerate(zip(image.tobytes(), picture.tobytes(), strict=True)) if a != b]
    assert drawn
    assert {picture.getpixel((i // 3 % 256, i // 768)) for i in drawn} == {EDGE}


def test_nothing_kept_and_other_modes():
    picture = draw_kept(Image.new("L", (16, 16), 255), [], (2, 2), veil=1)
    assert len(picture.getcolors()) == 1
    assert draw_kept(Image.new("CMYK", (1, 16)), [0], (1, 1)).mode == "RGB"


@pytest.mark.parametrize(
    ("kept", "grid", "veil", "words"),
    [
        ([4], (2, 2), 0.5, r"must be in 0\.\.3 \(grid 2 x 2\): 4 came"),
        ([-1], (2, 2), 0.5, "-1 came"),
        ([0], (0, 2), 0.5, "grid must be two numbers"),
        ([0], (2, 2), 1.5, r"veil must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(kept, grid, veil, words):
    with pytest.raises(SettingError, match=words):
        draw_kept(Image.new("RGB", (8, 8)), kept, grid, veil=veil)


def test_an_entry_holds_the_picture():
    picture = Image.effect_noise((20, 10), 50).convert("RGB")
    entry = picture_entry(picture, "words")
    read = Image.open(io.BytesIO(base64.b64decode(entry["png_base64"])))
    assert (read.tobytes(), entry["caption"]) == (picture.tobytes(), "words")
