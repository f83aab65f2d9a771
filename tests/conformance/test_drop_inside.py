"""Every model family: tokens leave between its layers as the definition says, or it is refused with a reason."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.conformance.drop_families import DROP_OPEN, DROP_REFUSED
from tests.conformance.families import SUITE
from tests.methods.vtw.models import QUIET, deeper
from tests.tiny import Batch, TinyFamily

from trimtab.anatomy.decoder import open_decoder
from trimtab.anatomy.drop_inside import DropPositions, InsideDrop, Stage, drop_inside
from trimtab.errors import NotSupportedError, UnsupportedModelError

ROWS = (1, 0, 2)
ALONE_DIFFERS = {name: family.row_dependence for name, family in SUITE.items() if family.row_dependence}


@functools.cache
def opened(name: str) -> tuple[TinyFamily, Any]:
    """Return a family with as many layers as it needs for text-only ones, and its model."""
    family = SUITE[name]
    model = family.build_model()
    if open_decoder(model).first_layer >= open_decoder(model).depth:
        family = deeper(name)
        model = family.build_model()
    return family, model


def withdraw_all(model: Any, layer: int, positions: DropPositions = "keep") -> InsideDrop:
    return drop_inside(model, [Stage(layer, lambda rows: ~rows.visual)], owner="test", positions=positions)


def batch_of(family: TinyFamily, model: Any) -> Batch:
    return family.make_batch(model, ROWS, padding_side="left")


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits


@pytest.mark.parametrize("name", sorted(DROP_REFUSED))
def test_a_family_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises((NotSupportedError, UnsupportedModelError), match=DROP_REFUSED[name]):
        open_decoder(SUITE[name].build_model())


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("name", DROP_OPEN)
def test_a_row_of_a_batch_is_what_it_is_alone(name: str, positions: DropPositions) -> None:
    family, model = opened(name)
    if name in ALONE_DIFFERS:
        pytest.skip(ALONE_DIFFERS[name])
    batch = batch_of(family, model)
    stock = logits_of(model, batch)
    layer = max(1, open_decoder(model).first_layer)
    with withdraw_all(model, layer, positions) as handle:
        found = logits_of(model, batch)
        for row in range(len(ROWS)):
            real = batch["attention_mask"][row].bool()
            alone = logits_of(model, family.take_row(batch, ROWS, row))
            torch.testing.assert_close(found[row][real], alone[0], atol=2e-5, rtol=0)
        assert handle.counts[0] > handle.counts[1]
    assert (found - stock)[0].abs().max() > 1e-3
    text = batch["attention_mask"][1].bool()
    torch.testing.assert_close(found[1, text], stock[1, text], atol=2e-5, rtol=0)  # without image nothing is lost
    assert torch.equal(logits_of(model, batch), stock)


@pytest.mark.parametrize("name", DROP_OPEN)
def test_the_cache_gives_what_the_whole_sequence_gives(name: str) -> None:
    family, model = opened(name)
    batch = family.take_row(batch_of(family, model), ROWS, 2)
    del batch["labels"]
    settings = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "suppress_tokens": list(QUIET)}
    try:
        model.generate(**batch, **settings, use_cache=False)
    except (ValueError, IndexError, RuntimeError) as error:
        pytest.skip(f"the stock model itself cannot generate without a cache: {error}")
    with withdraw_all(model, max(1, open_decoder(model).first_layer)):
        cached = model.generate(**batch, **settings)
        whole = model.generate(**batch, **settings, use_cache=False)
    assert torch.equal(cached, whole)


def test_masks_that_are_not_causal_are_cut_as_they_are() -> None:
    """PaliGemma lets a prompt see itself in both directions; cutting its mask keeps that for the text that stays."""
    from transformers import GemmaConfig, PaliGemmaForConditionalGeneration

    family = SUITE["paligemma"]
    config = family.build().config
    text = config.get_text_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config.text_config = GemmaConfig(**{name: text[name] for name in names}, num_hidden_layers=3, pad_token_id=0)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    batch = batch_of(family, model)
    del batch["labels"]
    if "token_type_ids" in batch:
        batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    with withdraw_all(model, 1):
        before = logits_of(model, batch)
        last = batch["input_ids"].clone()
        last[2, -1] = last[2, -1] % 40 + 4
        after = logits_of(model, {**batch, "input_ids": last})
    assert (before - after)[2, :-1].abs().amax() > 1e-4
    assert torch.equal(before[:2], after[:2])
