"""What is observed inside the vision tower equals what the tower itself computes, token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, IMAGE, Batch, llama_settings
from torch import Tensor

from trimtab.anatomy import encode_images, open_host, supplied_needs
from trimtab.errors import SettingError

ALL = frozenset({"hidden", "cls_attention", "keys"})
CLOSE = {"atol": 1e-6, "rtol": 1e-5}
"""Attention weights are of order 1/20; both sides are float32 sums of a dozen products."""


def siglip_llava() -> Any:
    """A LLaVA whose tower has no class token, as those built on SigLIP."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    tower = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4
    )
    config = LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**llama_settings()), image_token_index=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def run_tower(model: Any, pixels: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Full attention map [tile, head, place, place], keys [tile, place, channel] and output states of one block."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    keys: list[Tensor] = []
    layer = [m for m in tower.modules() if type(m).__name__.endswith("EncoderLayer")][block]
    layer.self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[-1]))
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    depth = len(out.attentions)
    return out.attentions[block], keys[0], out.hidden_states[block % depth + 1]


def by_head(keys: Tensor, heads: int = 2) -> Tensor:
    """Mean over heads, [tile, place, channel of a head]."""
    return torch.stack(keys.chunk(heads, dim=-1)).mean(0)


@pytest.mark.parametrize(("layer", "block"), [(-2, -2), (-1, -1), (1, 0), (2, 1)])
def test_the_observed_row_is_the_class_row_of_the_full_map(layer: int, block: int) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    model.config.vision_feature_layer = layer
    batch = family.make_batch(model, (1, 2))
    found = encode_images(model, batch, ALL)
    attention, keys, states = run_tower(model, batch["pixel_values"], block)
    expected = attention.mean(1)[:, 0, 1:]
    assert found.cls_attention is not None
    torch.testing.assert_close(torch.stack(found.cls_attention), expected, **CLOSE)
    torch.testing.assert_close(torch.stack(found.keys), by_head(keys)[:, 1:], **CLOSE)
    torch.testing.assert_close(torch.stack(found.hidden), states[:, 1:], **CLOSE)
    another = attention.mean(1)[:, 1, 1:]
    assert (expected - another).abs().max() > 1e-4, "rows differ, so that taking another one would show"


def test_observing_changes_no_feature_and_leaves_no_hook() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    batch = family.make_batch(model, (1, 2))
    plain, watched = encode_images(model, batch), encode_images(model, batch, ALL)
    for ours, theirs in zip(watched.blocks, plain.blocks, strict=True):
        assert torch.equal(ours, theirs)
    assert (plain.hidden, plain.cls_attention, plain.keys) == (None, None, None)
    # transformers adds hooks of its own on the first pass; a second watched pass must add none.
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    encode_images(model, batch, ALL)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_only_what_was_asked_for_is_there() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    found = encode_images(model, family.make_batch(model, (1,)), frozenset({"keys"}))
    assert found.keys is not None
    assert found.hidden is None
    assert found.cls_attention is None


def test_a_tower_without_class_token_gives_the_mean_over_queries() -> None:
    model = siglip_llava()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    found = encode_images(model, {"pixel_values": pixels}, ALL)
    attention, keys, states = run_tower(model, pixels, -2)
    torch.testing.assert_close(torch.stack(found.cls_attention), attention.mean(1).mean(1), **CLOSE)
    torch.testing.assert_close(torch.stack(found.keys), by_head(keys), **CLOSE)
    torch.testing.assert_close(torch.stack(found.hidden), states, **CLOSE)
    assert [len(block) for block in found.blocks] == [36, 36]


def packed(model: Any, batch: Batch, values: Tensor) -> list[Tensor]:
    """Lay out values per patch as LLaVA-NeXT does its features, written out by hand; NaN at newlines."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, select_best_resolution

    pins, first, blocks = model.config.image_grid_pinpoints, 0, []
    for size in batch["image_sizes"].tolist():
        tiles = image_size_to_num_patches(size, pins, 16)
        mine, first = values[first : first + tiles], first + tiles
        rows, columns = (side // 16 for side in select_best_resolution(size, pins))
        raster = mine[1:].view(rows, columns, 4, 4, -1).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
        height, width = raster.shape[:2]
        if size[1] / size[0] > width / height:  # as wide as the canvas: rows of padding above and below
            pad = (height - int(round(size[0] * width / size[1], 7))) // 2
            raster = raster[pad : height - pad]
        else:
            pad = (width - int(round(size[1] * height / size[0], 7))) // 2
            raster = raster[:, pad : width - pad]
        newline = raster.new_full((raster.shape[0], 1, raster.shape[2]), float("nan"))
        blocks.append(torch.cat([mine[0], torch.cat([raster, newline], dim=1).flatten(0, 1)]))
    return blocks


def test_observations_follow_the_packed_layout() -> None:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    family = FAMILIES["llava_next"]
    model = family.build_model()
    batch = family.make_batch(model, (1, 2))
    found = encode_images(model, batch, ALL)
    counts = [image_size_to_num_patches(s, model.config.image_grid_pinpoints, 16) for s in batch["image_sizes"]]
    pixels = torch.cat([image[:count] for image, count in zip(batch["pixel_values"], counts, strict=True)])
    attention, keys, states = run_tower(model, pixels, -2)
    wanted = {
        "cls_attention": attention.mean(1)[:, 0, 1:, None],
        "keys": by_head(keys)[:, 1:],
        "hidden": states[:, 1:],
    }
    for name, values in wanted.items():
        for number, expected in enumerate(packed(model, batch, values)):
            ours = getattr(found, name)[number]
            assert len(ours) == len(found.blocks[number])
            newline = expected[:, 0].isnan()
            filler, count = found.filler[number]
            assert torch.equal(filler, newline)
            assert count == int(newline.sum())
            assert count > 0
            torch.testing.assert_close(ours[~newline].view(int((~newline).sum()), -1), expected[~newline], **CLOSE)
    with torch.no_grad():
        projected = packed(model, batch, model.model.multi_modal_projector(wanted["hidden"]))
    for block, expected in zip(found.blocks, projected, strict=True):
        real = ~expected[:, 0].isnan()
        torch.testing.assert_close(block[real], expected[real], atol=1e-5, rtol=1e-5)


def test_attention_is_read_in_float32_under_autocast() -> None:
    """In bfloat16 the weights of many tokens would be the same number, and the order among them lost."""
    family = FAMILIES["llava"]
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encode_images(model, batch, frozenset({"cls_attention"}))
    weights = found.cls_attention[0]
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, weights.bfloat16().float())
    assert len(weights.unique()) == len(weights)


@pytest.mark.parametrize("layer", [0, [-2, -1], 7, -7])
def test_features_of_no_single_block_are_refused(layer: Any) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    model.config.vision_feature_layer = layer
    with pytest.raises(SettingError, match=r"vision_feature_layer=.*divprune"):
        encode_images(model, batch, frozenset({"cls_attention"}))


def test_towers_that_cannot_be_observed_supply_text_only() -> None:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

    tower = PixtralVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4
    )
    config = LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**llama_settings()), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    assert supplied_needs(LlavaForConditionalGeneration(config)) == {"text"}
    assert supplied_needs(FAMILIES["qwen2_5_vl"].build_model()) == {"text"}
    assert supplied_needs(FAMILIES["llava"].build_model()) == {"text", *ALL}


def test_the_grid_of_images_of_free_shape_is_their_own() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.build_model()
    host = open_host(model)
    grid = torch.tensor([[1, 4, 16]])  # 2 x 8 tokens: as many as 4 x 4
    pixels = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    one = {"pixel_values": pixels, "image_grid_thw": grid}
    assert encode_images(host, one).grid == (2, 8)
    two = {"pixel_values": pixels.repeat(2, 1), "image_grid_thw": torch.tensor([[1, 4, 16], [1, 8, 8]])}
    assert encode_images(host, two).grid is None
