"""One whole run and many ends: each branch is what the model computes when its tokens leave at that layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.dualspeed.common import portrait
from tests.methods.vtw.models import (
    DEPTH,
    NAMES,
    batch_of,
    close,
    far,
    fresh,
    logits_of,
    model_of,
    read_prompt,
    reference_states,
    visual_of,
    words,
)
from tests.tiny import llama_settings
from torch import Tensor

from trimtab import DataError, UnsupportedModelError, WrongOrderError
from trimtab.anatomy.branches import Trace, trace_layers
from trimtab.anatomy.decoder import open_decoder
from trimtab.anatomy.drop_inside import drop_inside
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.errors import NotSupportedError

ROWS = (1, 2, 1)
"""Images per row: rows of different length, of which different numbers of places leave."""


def traced(model: Any, batch: dict[str, Any], sinks: int = 0, marks: bool = False, **more: Any) -> Trace:
    return trace_layers(model, batch, vtw_stages(0, sinks, marks)[0].choose, **more)


def naive(model: Any, batch: dict[str, Any], layer: int, *stage: Any, **more: Any) -> Tensor:
    """Run the model anew with tokens leaving at `layer`: states behind the final norm, [row, seq, width]."""
    with drop_inside(model, vtw_stages(layer, *stage), owner="test", **more) as drop, torch.no_grad():
        states: Tensor = drop.decoder.base(**batch, use_cache=False).last_hidden_state
    return states


def spread(trace: Trace, states: Tensor) -> Tensor:
    """Give each place of the whole run the state of its kept place."""
    return states.gather(1, trace.kept_places[..., None].expand(-1, -1, states.shape[2]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_every_branch_is_the_naive_run_bit_by_bit(name: str, side: str) -> None:
    model, batch = model_of(name), batch_of(name, ROWS, side)
    trace = traced(model, batch)
    assert torch.equal(trace.visual, visual_of(batch))
    assert torch.equal(trace.real, batch["attention_mask"].bool())
    assert torch.equal(trace.stays, trace.real & ~trace.visual)
    whole = naive(model, batch, DEPTH)
    assert torch.equal(trace.last, whole)
    for layer in range(DEPTH):
        expected = naive(model, batch, layer)
        found = spread(trace, trace.finish(layer))
        assert torch.equal(found[trace.real], expected[trace.real]), layer
        far(found[trace.stays], whole[trace.stays])


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_naive_model_bit_by_bit(name: str) -> None:
    model, batch = model_of(name), batch_of(name, ROWS, "left")
    trace = traced(model, batch)
    for layer in range(DEPTH + 1):
        with drop_inside(model, vtw_stages(layer), owner="test"), torch.no_grad():
            expected = model(**batch, logits_to_keep=1).logits[:, -1]
        last = trace.last if layer == DEPTH else spread(trace, trace.finish(layer))
        assert torch.equal(trace.scores(last[:, -1]), expected), layer


@pytest.mark.parametrize("name", NAMES)
def test_branches_equal_the_loop_over_the_layers(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (2,))
    trace = traced(model, batch)
    for layer in range(DEPTH + 1):
        with torch.no_grad():
            expected, stays = reference_states(model, read_prompt(model, batch), layer)
        found = trace.finish(layer)
        if layer == DEPTH:  # there everything stays, of which `finish` gives what would have
            expected = expected[:, trace.stays[0]]
        else:
            assert stays.tolist() == trace.stays[0].nonzero()[:, 0].tolist()
        close(found, expected)


@pytest.mark.parametrize(
    ("name", "stage", "positions"),
    [
        ("llava", (5,), "keep"),
        ("llava", (0,), "reset"),
        ("qwen2_5_vl", (3,), "reset"),
        ("llava_next", (0, True), "keep"),
        ("llava_next", (2, True), "reset"),
        ("internvl", (1000,), "keep"),
    ],
)
def test_tokens_that_stay_and_positions_that_start_anew(name: str, stage: tuple[Any, ...], positions: Any) -> None:
    model, batch = model_of(name), batch_of(name, ROWS)
    trace = traced(model, batch, *stage, positions=positions)
    assert (trace.stays & trace.visual).any() == (stage != (0,))
    for layer in range(1, DEPTH):
        expected = naive(model, batch, layer, *stage, positions=positions)
        assert torch.equal(spread(trace, trace.finish(layer))[trace.real], expected[trace.real])


def test_visual_features_that_the_model_adds_later_set_the_first_layer() -> None:
    model, batch = model_of("qwen3_vl"), batch_of("qwen3_vl", ROWS)
    trace = traced(model, batch)
    assert sorted(trace.states) == [2, 3]
    for layer in (2, 3):
        expected = naive(model, batch, layer)
        assert torch.equal(spread(trace, trace.finish(layer))[trace.real], expected[trace.real])
    for layer in (1, DEPTH + 1):
        with pytest.raises(ValueError, match=rf"layer must be in 2\.\.4, but {layer} came"):
            trace.finish(layer)
        with pytest.raises(ValueError, match=rf"layer must be in 2\.\.4, but {layer} came"):
            trace.finish_all([2, layer], stacked=True)


@contextmanager
def seen(layers: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and places of each call of a layer."""
    found: list[tuple[int, int]] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[:2])) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("images", [ROWS, (1,)])
@pytest.mark.parametrize("name", NAMES)
def test_stacked_branches_are_the_same_up_to_rounding(name: str, images: tuple[int, ...], positions: Any) -> None:
    model, batch = model_of(name), batch_of(name, images)
    trace = traced(model, batch, positions=positions)
    for layers in (list(range(DEPTH + 1)), [3, 1], [2], [DEPTH]):
        alone = trace.finish_all(layers)
        stacked = trace.finish_all(layers, stacked=True)
        assert sorted(alone) == sorted(stacked) == sorted(layers)
        for layer in layers:
            real = trace.plan.real
            close(stacked[layer][real], alone[layer][real])


def test_stacked_branches_run_each_layer_once() -> None:
    model, batch = model_of("llava"), batch_of("llava", ROWS)
    trace = traced(model, batch)
    width = int(trace.stays.sum(1).max())
    layers = model.get_decoder().layers
    with seen(layers) as calls:
        trace.finish_all([1, 3], stacked=True)
    assert calls == [(3, width), (3, width), (6, width)]
    with seen(layers) as calls:
        trace.finish_all([1, 3])
    assert calls == [(3, width)] * 4


@functools.cache
def llama(kind: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = llama_settings(model_type=kind, num_hidden_layers=3, initializer_range=0.3, **changes)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()


def text_batch() -> tuple[dict[str, Any], Tensor]:
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 2:7] = mask[1, 1:9] = True
    return {"input_ids": words(12, rows=2), "attention_mask": torch.ones(2, 12, dtype=torch.long)}, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_language_model_with_a_mask(attention: str) -> None:
    model = llama(attn_implementation=attention)
    batch, mask = text_batch()
    trace = traced(model, batch, visual_mask=mask)
    for layer in range(3):
        expected = naive(model, batch, layer, visual_mask=mask)
        assert torch.equal(spread(trace, trace.finish(layer)), expected)
    for layer, states in trace.finish_all(range(4), stacked=True).items():
        close(states[trace.plan.real], trace.finish(layer)[trace.plan.real])


def called() -> Any:
    """Return a model that has run before: transformers puts hooks of its own on a model at its first call."""
    model = fresh()
    logits_of(model, batch_of("llava", ROWS))
    return model


def test_labels_are_passed_over_and_nothing_stays_on_the_model() -> None:
    model, batch = called(), batch_of("llava", ROWS)
    before = portrait(model)
    trace = traced(model, {**batch, "labels": torch.full((1, 1), 7)})
    assert torch.equal(trace.finish(1), traced(model, batch).finish(1))
    assert not trace.last.requires_grad
    assert not trace.finish(1).requires_grad
    assert portrait(model) == before


def test_a_batch_without_images() -> None:
    model, batch = model_of("llava"), batch_of("llava", (0, 0))
    with pytest.raises(DataError, match=r"trace_layers: the batch has no visual tokens.*Give batches with images"):
        traced(model, batch)


def test_a_cache_and_tokens_that_leave_already() -> None:
    from transformers import DynamicCache

    model, batch = called(), batch_of("llava", ROWS)
    before = portrait(model)
    with pytest.raises(NotSupportedError, match=r"search runs whole prompts, but past_key_values came\. Leave"):
        traced(model, {**batch, "past_key_values": DynamicCache()}, owner="search")
    words = r"search cannot be attached.*\(withdraw\).*detach\(\)"
    with drop_inside(model, vtw_stages(2), owner="withdraw"), pytest.raises(WrongOrderError, match=words):
        traced(model, batch, owner="search")
    assert portrait(model) == before


def test_a_model_that_adds_features_up_to_its_last_layer() -> None:
    model, batch = model_of("qwen3_vl", 2), batch_of("qwen3_vl", ROWS)
    with pytest.raises(UnsupportedModelError, match=r"Qwen3VLFor.* up to its last layer.*2 layers.*from layer 2 on"):
        traced(model, batch)


def test_states_that_change_between_layers_cannot_be_run_alone() -> None:
    model, batch = called(), batch_of("llava", ROWS)
    layer = model.get_decoder().layers[2]
    layer.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    before = portrait(model)
    words = r"LlamaModel changes the states between layers 1 and 2.*Measure withdraw\(model, layer\)"
    with pytest.raises(UnsupportedModelError, match=words):
        traced(model, batch)
    assert portrait(model) == before


def test_a_final_norm_that_is_not_the_last_word() -> None:
    model, batch = fresh(), batch_of("llava", ROWS)

    def changed(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.get_decoder().register_forward_hook(changed)
    words = r"the final norm of LlamaModel was not found.*embed_tokens, norm, rotary_emb"
    with pytest.raises(UnsupportedModelError, match=words):
        traced(model, batch)


def test_a_norm_that_depends_on_more_than_the_states_is_not_taken() -> None:
    model, batch = fresh(), batch_of("llava", ROWS)
    calls = []

    def counting(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output + len(calls)

    model.get_decoder().norm.register_forward_hook(counting)
    with pytest.raises(UnsupportedModelError, match="final norm of LlamaModel was not found"):
        traced(model, batch)


def test_no_final_norm_at_all() -> None:
    model, batch = fresh(), batch_of("llava", ROWS)
    model.get_decoder().norm = torch.nn.Identity()
    trace = traced(model, batch)
    assert torch.equal(spread(trace, trace.finish(2))[trace.real], naive(model, batch, 2)[trace.real])


def test_a_head_that_does_not_give_the_models_scores() -> None:
    model = llama("granite", logits_scaling=8.0)
    batch, mask = text_batch()
    with pytest.raises(UnsupportedModelError, match=r"the head of GraniteForCausalLM does not give the scores"):
        traced(model, batch, visual_mask=mask)


def test_places_before_the_first_that_stays() -> None:
    model = llama()
    batch, mask = text_batch()
    mask[0, :3] = True
    trace = traced(model, batch, visual_mask=mask)
    # Row 0: places 0 to 6 are visual, so they have the first kept one; row 1 keeps 0, 9, 10 and 11 of its own.
    assert trace.kept_places.tolist() == [[0] * 7 + [0, 1, 2, 3, 4], [0] * 9 + [1, 2, 3]]
    assert open_decoder(model).first_layer == 0
