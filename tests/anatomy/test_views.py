"""Images handed over as crops, the whole and a separator, and shapes of images that some encoders are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE

from trimtab.anatomy import EncodedImages, encode_images


def _encoded(name: str, rows: tuple[int, ...] = (1, 0, 2)) -> tuple[Any, EncodedImages]:
    family = SUITE[name]
    model = family.build_model()
    with torch.no_grad():
        return model, encode_images(model, family.make_batch(model, rows))


@pytest.mark.parametrize(("name", "crop", "whole", "behind"), [("step3p7", 4, 9, 0), ("deepseek_ocr2", 144, 144, 1)])
def test_every_crop_and_the_whole_are_tiles(name: str, crop: int, whole: int, behind: int) -> None:
    _, encoded = _encoded(name)
    assert encoded.tiles == [[crop] * crops + [whole] for crops in (2, 0, 3)]
    assert [len(block) - sum(tiles) for block, tiles in zip(encoded.blocks, encoded.tiles, strict=True)] == [behind] * 3
    assert encoded.filler == [None] * 3
    assert encoded.grid is None


def test_one_crop_beside_a_separator_has_its_own_size() -> None:
    family = SUITE["deepseek_ocr2"]
    model = family.build_model()
    visual = {
        "pixel_values": torch.randn(1, 3, 64, 64),
        "pixel_values_local": torch.randn(1, 3, 48, 48),
        "num_local_patches": torch.tensor([1]),
    }
    assert encode_images(model, visual).tiles == [[144, 144]]


def test_without_crops_the_whole_is_the_only_tile() -> None:
    model = SUITE["step3p7"].build_model()
    assert encode_images(model, {"pixel_values": torch.randn(2, 3, 48, 48)}).tiles == [[9], [9]]


def test_line_ends_and_the_separator_carry_no_picture() -> None:
    model, encoded = _encoded("unlimited_ocr")
    newline, separator = model.model.image_newline, model.model.view_separator
    assert encoded.filler[1] is not None
    assert encoded.filler[1][1] == 3
    for block, tiles, filler in zip(encoded.blocks, encoded.tiles, encoded.filler, strict=True):
        assert tiles == [len(block) - 1]
        assert torch.equal(block[-1], separator)
        assert filler is not None
        mask, count = filler
        assert torch.equal(mask, (block == newline).all(1))
        assert count == int(mask.sum())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("minicpmv4_6", (4, 5)),
        ("minicpm_ocr", (8, 10)),
        ("nemotron_h_omni", (4, 6)),
        ("chameleon", (6, 6)),
        ("fuyu", None),
    ],
)
def test_the_grid_is_what_the_encoder_was_told(name: str, shape: tuple[int, int] | None) -> None:
    assert _encoded(name, (1,))[1].grid == shape


def test_slices_of_two_shapes_have_no_common_grid() -> None:
    assert _encoded("minicpmv4_6", (2,))[1].grid is None
