"""Batches as collators make them: positions of their own, packed rows, entries that are missing or strange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import full_positions, keep_some, logits_of, model_of
from tests.dualspeed.common import attached
from tests.tiny import PAD, VOCAB, WIDTH, Batch
from torch import nn

import trimtab
from trimtab import DualSpeedConfig
from trimtab.anatomy import assemble, encode_images, full_inputs, open_host, read_rows, supplied_needs
from trimtab.errors import SettingError


def made(name: str, rows: tuple[int, ...] = (1,), **changes: Any) -> tuple[Any, Batch, Any]:
    """Return a model, a batch without labels and its features."""
    model = model_of(SUITE[name])
    batch = SUITE[name].make_batch(model, rows, **changes)
    del batch["labels"]
    with torch.no_grad():
        return model, batch, encode_images(model, batch)


def pruned_logits(model: Any, batch: Batch, encoded: Any, positions: Any) -> torch.Tensor:
    """Return logits of a pruned batch, without a cache, as in training."""
    inputs = assemble(model, batch, encoded, keep_some(encoded.blocks), positions=positions)
    return logits_of(model, {**inputs, "use_cache": False})


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("positions", ["original", "renumber"])
def test_own_positions_without_a_mask_are_those_with_one(name: str, positions: Any) -> None:
    # Without a mask transformers takes gaps in the positions of text for the borders of packed sequences.
    model, batch, encoded = made(name)
    given = full_positions(SUITE[name], model, batch)
    forms = [given]
    if given.dim() == 3:
        places = torch.arange(given.shape[2]).expand(1, 1, -1)
        forms.append(torch.cat((places, given)))  # as generate() gives them, with an axis for the text
    expected = pruned_logits(model, batch, encoded, positions)
    del batch["attention_mask"]
    for form in forms:
        assert torch.equal(pruned_logits(model, {**batch, "position_ids": form}, encoded, positions), expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "hunyuan_vl"])
@pytest.mark.parametrize("masked", [True, False])
def test_positions_that_begin_anew_are_refused(name: str, masked: bool) -> None:
    model, batch, encoded = made(name, (2, 1), text_lengths=[3, 6])
    if name == "qwen2_vl":
        stock = model.model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], None, batch["attention_mask"]
        )[0]
    else:
        stock = full_positions(SUITE[name], model, batch)
    whole = {**batch, "position_ids": stock}
    read_rows(model, whole, encoded)
    packed = stock.clone()
    last = int(batch["attention_mask"][1].sum()) - 4
    packed[..., 1, last : last + 4] = torch.arange(4)
    if not masked:
        shorter = int(batch["attention_mask"].sum(1).min())
        assert shorter < batch["input_ids"].shape[1], "otherwise both rows are whole"
        del whole["attention_mask"]
        whole["input_ids"] = whole["input_ids"].masked_fill(whole["input_ids"] == PAD, 5)
    with pytest.raises(SettingError, match=r"begin anew or jump inside row 1.*packing=False"):
        read_rows(model, {**whole, "position_ids": packed}, encoded)


def test_gaps_are_borders_only_where_there_is_no_mask() -> None:
    model, batch, encoded = made("llava")
    given = torch.arange(batch["input_ids"].shape[1])[None].clone()
    given[:, -3:] += 5
    batch["position_ids"] = given
    read_rows(model, batch, encoded)
    del batch["attention_mask"]
    with pytest.raises(SettingError, match=r"begin anew or jump inside row 0"):
        read_rows(model, batch, encoded)


@pytest.mark.parametrize("mode", ["fast", "slow"])
@pytest.mark.parametrize("images", [(1,), (0,)])
def test_padding_free_batches_are_refused_in_training(mode: Any, images: tuple[int, ...]) -> None:
    model = SUITE["llava"].build_model().train()
    batch = SUITE["llava"].make_batch(model, images)
    batch["cu_seq_lens_q"] = torch.tensor([0, 5, batch["input_ids"].shape[1]])
    with (
        attached(model) as handle,
        handle.force_mode(mode),
        pytest.raises(SettingError, match=r"cu_seq_lens_q.*padding_free=False"),
    ):
        model(**batch)


def test_a_negative_padding_id_pads_with_a_word() -> None:
    model = SUITE["llava"].build_model()
    batch = SUITE["llava"].make_batch(model, (1, 0, 2))
    with torch.no_grad():
        encoded = encode_images(model, batch)
    kept = keep_some(encoded.blocks)
    expected = assemble(model, batch, encoded, kept)
    model.config.text_config.pad_token_id = -1
    inputs = assemble(model, batch, encoded, kept)
    assert not inputs["attention_mask"].all()
    assert inputs["input_ids"].min() >= 0
    real = inputs["attention_mask"].bool()
    assert torch.equal(logits_of(model, inputs)[real], logits_of(model, expected)[real])


def test_a_mask_that_is_no_tensor_is_named() -> None:
    model, batch, encoded = made("llava")
    with pytest.raises(SettingError, match=r"attention_mask must be a tensor.*but a dict came"):
        read_rows(model, {**batch, "attention_mask": {"full_attention": None}}, encoded)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_missing_token_types_are_filled_in_for_the_full_view_too(name: str) -> None:
    family = SUITE[name]
    model = model_of(family)
    batch = family.make_batch(model, (1, 0, 1), videos_per_row=(0, 1, 1))
    with torch.no_grad():
        encoded = encode_images(model, batch)
    expected = logits_of(model, batch)
    types = batch.pop("mm_token_type_ids")
    inputs = full_inputs(model, batch, encoded)
    assert torch.equal(inputs["mm_token_type_ids"], types)
    assert torch.equal(logits_of(model, inputs), expected)


def test_the_old_name_of_video_llavas_images_is_named() -> None:
    model = SUITE["video_llava"].build_model().train()
    batch = SUITE["video_llava"].make_batch(model, (1,))
    batch["pixel_values_images"] = batch.pop("pixel_values")
    with attached(model), pytest.raises(SettingError, match=r"pixel_values_images is an old name.*pixel_values\."):
        model(**batch)


@pytest.mark.parametrize(("name", "value"), [("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")])
def test_another_choice_of_vision_layers_than_the_models_is_refused(name: str, value: Any) -> None:
    model = SUITE["llava"].build_model().train()
    batch = SUITE["llava"].make_batch(model, (1,))
    with attached(model) as handle, handle.force_mode("slow"):
        expected = model(**batch).loss
        assert torch.equal(model(**batch, **{name: getattr(model.config, name)}).loss, expected)
        with pytest.raises(SettingError, match=rf"{name}={value!r} came.*model\.config\.{name}"):
            model(**batch, **{name: value})


def test_several_vision_layers_supply_states_but_no_attention() -> None:
    model = SUITE["llava"].build_model()
    model.config.vision_feature_layer = [-2, -1]
    assert supplied_needs(model) == {"text", "hidden"}
    with pytest.raises(SettingError, match=r"cls_topk.*cls_attention"):
        trimtab.attach(model, DualSpeedConfig(pruner="cls_topk"))


def test_the_width_is_known_where_the_embeddings_hold_no_plain_weight() -> None:
    model = SUITE["llava"].build_model()
    embeddings = model.get_input_embeddings()
    embeddings.weight = nn.Parameter(
        torch.zeros(VOCAB * WIDTH // 2, 1, dtype=torch.uint8), requires_grad=False
    )  # 4 bits
    assert open_host(model).width == WIDTH
    del embeddings.embedding_dim
    embeddings.weight = nn.Parameter(torch.zeros(0))  # as ZeRO-3 leaves it
    embeddings.weight.ds_shape = torch.Size([VOCAB, WIDTH])
    assert open_host(model).width == WIDTH


@pytest.mark.parametrize(("kept", "apart"), [(2, [6, 2]), (22, [24, 24])])
def test_the_prefix_stands_in_the_first_tile_and_moves_tokens_on_where_that_is_full(
    kept: int, apart: list[int]
) -> None:
    """Frames of 24 tokens with a fence between them; the first gives the four rows of the prefix two places only."""
    family = SUITE["cosmos3_edge"]
    model = model_of(family)
    batch = family.make_batch(model, (0,), videos_per_row=(1,), seed=1)
    with torch.no_grad():
        encoded = encode_images(model, batch)
    tiles = encoded.tiles[0]
    index = torch.cat([torch.arange(kept) + sum(tiles[:number]) for number in range(len(tiles))])
    ids = assemble(model, batch, encoded, [index], prefix=torch.zeros(4, WIDTH))["input_ids"][0]
    holds = nn.functional.pad((ids == family.video_token).long(), (1, 1)).diff()
    runs = ((holds == -1).nonzero() - (holds == 1).nonzero()).flatten().tolist()
    assert runs == apart
