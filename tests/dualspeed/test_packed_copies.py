"""The attention of packing belongs to one model: copies give back their own, and nobody may change it unnoticed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.dualspeed.common import ROWS, attached, portrait, same_model
from tests.dualspeed.packing_tools import SETTINGS, Taken, implementations, same_loss, same_step
from tests.tiny import FAMILIES, Batch, TinyFamily, gradients, weights

import trimtab
from trimtab.anatomy.packed_attention import NAME
from trimtab.errors import SettingError


@pytest.fixture(params=["llava", "idefics3", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def step_of(handle: Any, model: Any, batch: Batch, mode: str = "fast") -> Taken:
    """Take one step of a model that has DualSpeed already."""
    with handle.force_mode(mode):
        loss = model(**batch).loss
        loss.backward()
    taken = Taken(loss.detach(), gradients(model), {})
    model.zero_grad(set_to_none=True)
    return taken


def attention_of(model: Any) -> str:
    return str(model.config.get_text_config()._attn_implementation)


# copies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_detaching_a_copy_leaves_the_original_packed(family: TinyFamily, mode: str) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    with attached(model, packing=True, **SETTINGS) as handle:
        before = step_of(handle, model, batch, mode)
        twin = copy.deepcopy(model)
        trimtab.detach(twin)
        assert (attention_of(model), attention_of(twin)) == (NAME, "sdpa")
        after = step_of(handle, model, batch, mode)
    assert torch.equal(after.loss, before.loss)
    same_step(after, before)


def test_a_copy_that_was_detached_is_the_model_before(family: TinyFamily) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    expected = model(**batch, use_cache=False).loss
    before, attention = (portrait(model), weights(model)), implementations(model)
    with attached(model, packing=True, **SETTINGS):
        twin = copy.deepcopy(model)
        trimtab.detach(twin)
    same_model(twin, before)
    assert implementations(twin) == attention
    assert torch.equal(twin(**batch, use_cache=False).loss, expected)


def test_detaching_the_original_leaves_a_copy_packed(family: TinyFamily) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    handle = trimtab.attach(model, trimtab.DualSpeedConfig(packing=True, slow_ratio=1.0, **SETTINGS))
    before = step_of(handle, model, batch, "slow")
    twin = copy.deepcopy(model)
    handle.detach()
    assert (attention_of(model), attention_of(twin)) == ("sdpa", NAME)
    loss = twin(**batch).loss  # slow like every step of this schedule
    same_loss(loss.detach(), before.loss)
    trimtab.detach(twin)
    assert attention_of(twin) == "sdpa"


# another attention --------------------------------------------------------------------------------------------------


def test_another_attention_is_refused_at_the_next_step(family: TinyFamily) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    with attached(model, packing=True, **SETTINGS) as handle:
        before = step_of(handle, model, batch)
        model.set_attn_implementation("sdpa")
        with pytest.raises(SettingError, match=r"(?s)attn_implementation was set to 'sdpa'.*detach and attach again"):
            step_of(handle, model, batch)
        assert handle.micro_step == 1, "a refused step counts for nothing"
    with attached(model, packing=True, **SETTINGS) as handle:
        same_step(step_of(handle, model, batch), before)


def test_another_attention_is_no_matter_without_packing_or_in_evaluation(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    with torch.no_grad():
        expected = model(**batch).loss
    with attached(model, packing=True, **SETTINGS):
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            same_loss(model(**batch).loss, expected)
    with attached(model.train(), **SETTINGS) as handle:
        before = step_of(handle, model, batch)
        model.set_attn_implementation("sdpa")
        same_step(step_of(handle, model, batch), before)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_an_attention_that_finds_rows_by_positions_goes_on(mode: str) -> None:
    family = FAMILIES["llava"]
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    with attached(model, packing=True, **SETTINGS) as handle:
        before = step_of(handle, model, batch, mode)
        model.set_attn_implementation("eager")
        same_step(step_of(handle, model, batch, mode), before)


@pytest.mark.parametrize("name", ["gemma3", "molmo2"])
def test_an_attention_under_which_rows_of_the_family_meet_is_refused(name: str) -> None:
    """transformers lets rows of these families see each other where it finds them by their positions."""
    family = SUITE[name]
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    with attached(model, packing=True, **SETTINGS) as handle:
        step_of(handle, model, batch)
        model.set_attn_implementation("eager")
        with pytest.raises(SettingError, match="attn_implementation was set to 'eager' after packing had begun"):
            step_of(handle, model, batch)
