"""How the features of single families are laid out: tiles, frames, newlines and layers, against the stock packing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.families.llava import FRAMES
from tests.conformance.families.molmo import llama4
from tests.conformance.family_tools import TIGHT, keep_some, logits_of, masked_logits, survivors
from torch import Tensor

from trimtab import DualSpeedConfig, attach
from trimtab.anatomy import assemble, encode_images, open_host, supplied_needs
from trimtab.errors import SettingError

NO_IMAGES = (0, 0, 0)
VIDEOS = (0, 1, 1)


def model_and_batch(name: str, images: tuple[int, ...] = (1, 0, 2), **more: Any) -> tuple[Any, dict[str, Any]]:
    model = SUITE[name].build_model()
    return model, SUITE[name].make_batch(model, images, **more)


def newline_rows(model: Any, blocks: list[Tensor]) -> list[Tensor]:
    """Which rows of packed features are the newline parameter itself."""
    newline = model.model.image_newline
    return [(block == newline).all(1) for block in blocks]


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", "granite4_vision"])
def test_newline_rows_are_known_as_filler(name: str) -> None:
    model, batch = model_and_batch(name)
    encoded = encode_images(model, batch)
    assert encoded.grid is None
    for rows, filler in zip(newline_rows(model, encoded.blocks), encoded.filler, strict=True):
        assert filler is not None
        assert torch.equal(rows, filler[0])
        assert int(rows.sum()) == filler[1]
    counts = [filler[1] for filler in encoded.filler if filler is not None]
    assert min(counts) > 0
    # OneVision leaves whole the images of a row that has several: one row of the newline ends each of them.
    assert (counts[1:] == [1, 1]) == (name == "llava_onevision")


def test_the_newline_that_ends_a_video_belongs_to_no_frame() -> None:
    model, batch = model_and_batch("llava_onevision", NO_IMAGES, videos_per_row=VIDEOS)
    encoded = encode_images(model, batch)
    for block, frames in zip(encoded.blocks, encoded.tiles, strict=True):
        assert frames == [4] * FRAMES
        assert torch.equal(newline_rows(model, [block])[0], torch.arange(len(block)) == sum(frames))


@pytest.mark.parametrize(
    ("name", "frame", "grid"), [("video_llava", 17, None), ("perception_lm", 16, (4, 4)), ("llava_next_video", 4, None)]
)
def test_a_video_is_one_block_and_its_frames_are_tiles(name: str, frame: int, grid: tuple[int, int] | None) -> None:
    model, batch = model_and_batch(name, NO_IMAGES, videos_per_row=VIDEOS)
    encoded = encode_images(model, batch)
    assert encoded.counts == {"video": sum(VIDEOS)}
    assert encoded.tiles == [[frame] * FRAMES] * sum(VIDEOS)
    assert encoded.grid == grid
    with torch.no_grad():
        encode = model.model.get_image_features if name == "perception_lm" else model.model.get_video_features
        stock = encode(batch["pixel_values_videos"], return_dict=True).pooler_output
    # Alike within float32: SDPA may take another kernel where gradients are kept.
    torch.testing.assert_close(torch.cat(encoded.blocks), stock.flatten(0, -2), atol=1e-5, rtol=0)


def test_both_views_of_a_molmo_image_are_tiles() -> None:
    model, batch = model_and_batch("molmo2")
    encoded = encode_images(model, batch)
    assert encoded.tiles == [[4, 8], [4, 4], [4, 12]]
    assert encoded.grid is None
    batch["image_grids"] = torch.tensor([[2, 6, 0, 0], [2, 4, 0, 0], [4, 4, 0, 0]])
    assert encode_images(model, batch).tiles == [[12], [8], [16]]


@pytest.mark.parametrize(("name", "grid"), [("aria", None), ("internvl", (3, 3))])
def test_learned_queries_have_no_grid(name: str, grid: tuple[int, int] | None) -> None:
    model, batch = model_and_batch(name)
    encoded = encode_images(model, batch)
    assert {len(block) for block in encoded.blocks} == {9}
    assert encoded.grid == grid


def test_the_isolator_enters_granite_at_its_first_visual_layer_only() -> None:
    model, batch = model_and_batch("granite4_vision")
    encoded = encode_images(model, batch)
    kept = [torch.tensor([1, 3, 4])] * 3
    prefix = torch.randn(2, open_host(model).width)
    pairs = assemble(model, batch, encoded, kept, prefix=prefix)["mm_encoder_outputs"]["image"].deepstack_features
    stock = dict(encoded.outputs["image"].deepstack_features)
    assert [layer for layer, _ in pairs] == [1, 0, 2], "the order of the configuration, which does not begin with 0"
    for layer, blocks in pairs:
        front = prefix if layer == 0 else torch.zeros_like(prefix)
        for block, whole, index in zip(blocks, stock[layer], kept, strict=True):
            assert torch.equal(block, torch.cat((front, whole[index])))
    for block, whole in zip(encoded.blocks, stock[0], strict=True):
        assert torch.equal(block, whole), "the pruner sees the features of that layer"


def test_llama4_is_pruned_before_its_projector() -> None:
    model, batch = model_and_batch("llama4")
    host = open_host(model)
    assert host.width == model.multi_modal_projector.linear_1.in_features != model.config.text_config.hidden_size
    assert {block.shape[1] for block in encode_images(model, batch).blocks} == {host.width}
    assert supplied_needs(model) == frozenset(), "words have another width than features, so they do not compare"
    assert host.body is model.language_model.model
    handle = attach(model, DualSpeedConfig(isolator_tokens=2))
    assert handle.isolator is not None
    assert handle.isolator.rows.shape == (2, host.width)
    handle.detach()


@pytest.mark.parametrize(("chunk", "masking"), [(512, True), (16, False)])
def test_llama4_counts_places_in_its_chunks(chunk: int, masking: bool) -> None:
    family = replace(SUITE["llama4"], build=partial(llama4, attention_chunk_size=chunk))
    model = family.build_model()
    batch = family.make_batch(model, (1, 2))
    encoded = encode_images(model, batch)
    kept = keep_some(encoded.blocks)
    inputs = assemble(model, batch, encoded, kept, positions="original")
    mask = survivors(model, batch, kept, encoded.blocks)
    found = logits_of(model, inputs)[inputs["attention_mask"].bool()]
    gap = (found - masked_logits(family, model, batch, mask)[mask]).abs().max()
    assert (gap < TIGHT) == masking


def test_ovis2_keeps_its_indicators() -> None:
    model, batch = model_and_batch("ovis2")
    encoded = encode_images(model, batch)
    inputs = assemble(model, batch, encoded, [torch.arange(2)] * len(encoded.blocks))
    for token in model.config.visual_indicator_token_ids:
        assert (inputs["input_ids"] == token).sum() == (batch["input_ids"] == token).sum()
    handed = inputs["mm_encoder_outputs"]["image"].visual_indicator_features
    assert torch.equal(handed, encoded.outputs["image"].visual_indicator_features)


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_states_before_the_projector_line_up_with_the_features(name: str) -> None:
    model = SUITE[name].build_model()
    model.config.vision_aspect_ratio = "anyres_max_9"  # no interpolation, which does not commute with the projector
    # Runs of the placeholders need not fit here: only the images are encoded.
    batch = SUITE[name].make_batch(model, (1, 0, 2))
    needs = frozenset({"hidden", "cls_attention", "keys"})
    assert needs < supplied_needs(model)
    encoded = encode_images(model, batch, needs)
    assert encoded.hidden is not None
    assert encoded.cls_attention is not None
    assert encoded.keys is not None
    for number, block in enumerate(encoded.blocks):
        filler = encoded.filler[number]
        assert filler is not None
        picture = ~filler[0]
        with torch.no_grad():
            found = model.model.multi_modal_projector(encoded.hidden[number][picture])
        torch.testing.assert_close(found, block[picture].detach(), atol=1e-5, rtol=0)  # other shapes, other sums
        for values in (encoded.hidden, encoded.cls_attention, encoded.keys):
            assert len(values[number]) == len(block)
            assert (values[number][~picture] == 0).all()


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_the_tower_is_not_observed_for_videos(name: str) -> None:
    model, batch = model_and_batch(name, NO_IMAGES, videos_per_row=VIDEOS)
    with pytest.raises(SettingError, match="holds videos, for which hidden cannot be supplied"):
        encode_images(model, batch, frozenset({"hidden"}))
