"""How encoder outputs become blocks, tiles and grids, family by family."""

from __future__ import annotations

import pytest
import torch
from tests.conformance.families import SUITE
from tests.tiny import IMAGE

from trimtab.anatomy import assemble, encode_images, full_inputs, read_rows
from trimtab.errors import TokenMismatchError


@pytest.mark.parametrize(
    ("name", "tiles", "grid"),
    [
        ("idefics2", [[9], [9, 9]], None),  # tokens of a resampler have no grid
        ("idefics3", [[9, 9, 9], [9, 9, 9, 9, 9]], (3, 3)),
        ("granite_docling", [[9, 9, 9], [9, 9, 9, 9, 9]], (3, 3)),
        ("gemma4", [[6], [8], [12]], None),
        ("inkling_mm_model", [[24], [12], [25]], None),
    ],
)
def test_every_image_has_its_tiles(name: str, tiles: list[list[int]], grid: tuple[int, int] | None) -> None:
    family = SUITE[name]
    model = family.build_model()
    encoded = encode_images(model, family.make_batch(model, (1, 2)))
    assert encoded.tiles == tiles
    assert encoded.grid == grid


@pytest.mark.parametrize("name", ["qwen2_vl", "muse_glimmer", "kimi_k25", "inkling2"])
def test_the_grid_counts_tokens_whatever_the_family_calls_its_merging(name: str) -> None:
    family = SUITE[name]
    model = family.build_model()
    assert encode_images(model, family.make_batch(model, [1])).grid == (4, 6)


def test_equally_many_tokens_of_images_of_any_shape_are_no_square() -> None:
    family = SUITE["lfm2_vl"]
    model = family.build_model()
    values = {"pixel_values": torch.randn(1, 64, 48), "pixel_attention_mask": torch.ones(1, 64).int()}
    encoded = encode_images(model, {**values, "spatial_shapes": torch.tensor([[4, 16]])})
    assert encoded.tiles == [[16]]  # two lines of eight, not four of four
    assert encoded.grid is None


def test_images_that_only_the_text_tells_apart() -> None:
    family = SUITE["inkling_mm_model"]
    model = family.build_model()
    batch = family.make_batch(model, (2, 0, 1))
    encoded = encode_images(model, batch)
    assert read_rows(model, batch, encoded).block_rows == [0, 0, 2]
    assert torch.equal(torch.cat(encoded.blocks), encoded.outputs["image"].pooler_output[:, 0])
    cut = {**batch, "pixel_values": batch["pixel_values"][:-1]}
    with pytest.raises(TokenMismatchError, match="visual tokens"):
        read_rows(model, cut, encode_images(model, cut))


def test_fine_tiles_of_granite_docling_have_four_times_as_many_tokens() -> None:
    family = SUITE["granite_docling"]
    model = family.build_model()
    batch = family.make_batch(model, [1])
    places = (batch["input_ids"] == IMAGE).long() * 3 + 1  # every placeholder four times
    fine = {
        **{name: batch[name].repeat_interleave(places[0], dim=1) for name in ("input_ids", "attention_mask")},
        "pixel_values": batch["pixel_values"],
        "pixel_attention_mask": batch["pixel_attention_mask"],
        "tile_fine_mask": torch.ones(1, dtype=torch.bool),
    }
    encoded = encode_images(model, fine)
    assert encoded.tiles == [[36, 36, 36]]
    every = [torch.arange(3 * 36)]
    with torch.no_grad():
        expected = model(**fine).logits
        assert torch.equal(model(**full_inputs(model, fine, encoded)).logits, expected)
        assert torch.equal(model(**assemble(model, fine, encoded, every)).logits, expected)


@pytest.mark.parametrize(
    ("name", "any_size"),
    [
        ("qwen2_vl", True), ("gemma4", True), ("lfm2_vl", True), ("minicpmv4_6", True),  # their shapes come with them
        ("fuyu", True), ("inkling_mm_model", True),  # patches in a line
        ("llava", False), ("llava_next", False), ("idefics3", False), ("gemma3", False), ("llama4", False),
    ],
)  # fmt: skip
def test_images_have_the_size_of_their_pictures_or_all_one(name: str, any_size: bool) -> None:
    family = SUITE[name]
    model = family.build_model()
    with torch.no_grad():
        assert encode_images(model, family.make_batch(model, [1])).any_size == any_size
