"""The formulas of what is saved, against counters and real caches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from tests.methods.vtw.models import NAMES, batch_of, fresh, model_of, visual_of, words
from tests.tiny import llama_settings

from trimtab import SettingError, UnsupportedModelError
from trimtab.anatomy.drop_inside import drop_inside
from trimtab.anatomy.drop_stages import fastv_stages, pyramid_stages, vtw_stages
from trimtab.bench.measure import count_flops
from trimtab.methods.vtw.cost import (
    TextShape,
    kv_bytes,
    kv_entries,
    kv_saving,
    layer_flops,
    prefill_flops,
    prefill_saving,
    read_text_shape,
    search_evaluations,
    withdrawal,
)

SEVEN_B = TextShape(layers=32, width=4096, heads=32, kv_heads=32, head_width=128, mlp_width=11008, gated=True)
DEPTH, PLACES = 4, 21
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama wide heads": {"head_dim": 16, "num_key_value_heads": 1},
    "llama ungrouped": {"num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "phi": {"model_type": "phi", "num_key_value_heads": 4},
}


@functools.cache
def language_model(form: str, attention: str = "sdpa") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = llama_settings(num_hidden_layers=DEPTH, **FORMS[form])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), attn_implementation=attention).eval()


def visual_mask(visual: int, rows: int = 1) -> torch.Tensor:
    mask = torch.zeros(rows, PLACES, dtype=torch.bool)
    mask[:, 3 : 3 + visual] = True
    return mask


def layer_counts(model: Any, visual: int, stages: Any) -> tuple[list[int], Any]:
    """Counted operations of each layer in one prefill of one row, and the cache."""
    calls: list[tuple[Any, Any, Any]] = []
    with drop_inside(model, stages, owner="test", visual_mask=visual_mask(visual)):
        hooks = [
            layer.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
            for layer in model.model.layers
        ]
        with torch.no_grad():
            cache = model(words(PLACES), use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
    counts = []
    for layer, args, given in calls:
        given = {**given, "past_key_values": None, "use_cache": False}
        with torch.no_grad():
            counts.append(count_flops(lambda layer=layer, args=args, given=given: layer(*args, **given)))
    return counts, cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "phi"])
def test_arithmetic_and_cache_of_a_withdrawal_are_those_counted(form: str, attention: str) -> None:
    model = language_model(form, attention)
    shape = read_text_shape(model)
    for layer in range(DEPTH + 1):
        counts, cache = layer_counts(model, 12, vtw_stages(layer))
        drops = withdrawal(layer, PLACES, 12)
        expected = [layer_flops(PLACES if number < layer else PLACES - 12, shape) for number in range(DEPTH)]
        assert counts == expected
        assert prefill_flops(shape, PLACES, drops) == sum(counts)
        whole = [layer_flops(PLACES, shape)] * DEPTH
        assert prefill_saving(shape, PLACES, drops) == pytest.approx(1 - sum(counts) / sum(whole), abs=1e-12)
        held = sum(one.keys.nbytes + one.values.nbytes for one in cache.layers)
        assert kv_bytes(shape, PLACES, drops, number_bytes=4) == held
        assert kv_entries(DEPTH, PLACES, drops) == sum(one.keys.shape[2] for one in cache.layers)
        assert kv_saving(DEPTH, PLACES, drops) == pytest.approx((DEPTH - layer) * 12 / (DEPTH * PLACES), abs=1e-12)


@pytest.mark.parametrize("form", ["llama", "qwen2"])
def test_several_stages_are_those_counted(form: str) -> None:
    model = language_model(form)
    shape = read_text_shape(model)
    stages = pyramid_stages(DEPTH, (1, 2, 3), (0.5, 0.25, 0.125))
    counts, cache = layer_counts(model, 16, stages)
    drops = ((1, PLACES - 8), (2, PLACES - 12), (3, PLACES - 14))
    assert prefill_flops(shape, PLACES, drops) == sum(counts)
    assert kv_bytes(shape, PLACES, drops, number_bytes=4) == sum(
        one.keys.nbytes + one.values.nbytes for one in cache.layers
    )
    counts, _ = layer_counts(model, 16, fastv_stages(2, 0.5))
    assert prefill_flops(shape, PLACES, ((2, PLACES - 8),)) == sum(counts)


def test_an_mlp_without_a_gate_is_read_as_such() -> None:
    model = language_model("phi")
    shape = read_text_shape(model)
    assert not shape.gated
    counts, _ = layer_counts(model, 12, vtw_stages(DEPTH))
    assert counts == [layer_flops(PLACES, shape)] * DEPTH


def test_the_formula_of_the_literature_is_half_of_it() -> None:
    """4 s D^2 + 2 s^2 D + 2 s D M multiply-adds, or 3 s D M with a gate."""
    D, M, s = 4096, 11008, 671
    assert layer_flops(s, SEVEN_B) == 2 * (4 * s * D**2 + 2 * s**2 * D + 3 * s * D * M)
    plain = dataclasses.replace(SEVEN_B, gated=False)
    assert layer_flops(s, plain) == 2 * (4 * s * D**2 + 2 * s**2 * D + 2 * s * D * M)


@pytest.mark.parametrize(
    ("layer", "text", "plain", "gated"),
    [(16, 60, 43.1, 43.1), (15, 60, 45.8, 45.8), (16, 40, 44.4, 44.4), (16, 100, 40.8, 40.7)],
)
def test_published_shapes_save_what_is_told_of_them(layer: int, text: int, plain: float, gated: float) -> None:
    """LLaVA-1.5-7B; the figures that are told take its MLP for one of two matrices."""
    places = 35 + 576 + text
    for shape, percent in ((dataclasses.replace(SEVEN_B, gated=False), plain), (SEVEN_B, gated)):
        assert 100 * prefill_saving(shape, places, withdrawal(layer, places, 576)) == pytest.approx(percent, abs=0.05)


def test_a_search_over_the_published_shapes() -> None:
    share = 75 / 651
    ours, naive = search_evaluations(32, range(5, 32), share)
    assert (round(ours), round(naive)) == (76, 562)
    ours, naive = search_evaluations(40, range(5, 40), share)
    assert (round(ours), round(naive)) == (113, 883)
    assert search_evaluations(32, range(5, 33), share) == search_evaluations(32, range(5, 32), share)
    assert search_evaluations(8, [], 1.0) == (8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_vision_language_models(name: str) -> None:
    model = model_of(name)
    text = model.config.get_text_config()
    shape = read_text_shape(model)
    assert (shape.layers, shape.width, shape.mlp_width) == (text.num_hidden_layers, text.hidden_size, 48)
    assert (shape.heads, shape.kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert shape.head_width == text.hidden_size // text.num_attention_heads
    assert shape.gated
    attention = [getattr(model.get_decoder().layers[0].self_attn, f"{one}_proj").weight.numel() for one in "qkvo"]
    assert shape.layer_weights == sum(attention) + 3 * text.hidden_size * 48


def test_the_whole_of_a_vision_language_model_with_a_withdrawal() -> None:
    model, batch = model_of("llava"), batch_of("llava", (2,))
    shape = read_text_shape(model)
    places, visual = batch["input_ids"].shape[1], int(visual_of(batch).sum())

    def run() -> None:
        with torch.no_grad():
            model.model(**batch)

    whole = count_flops(run)
    for layer in (1, 3):
        with drop_inside(model, vtw_stages(layer), owner="test"):
            saved = whole - count_flops(run)
        drops = withdrawal(layer, places, visual)
        assert saved == prefill_flops(shape, places) - prefill_flops(shape, places, drops)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
def test_adapters_and_packed_weights_are_read_by_what_they_stand_for() -> None:
    peft = pytest.importorskip("peft")
    expected = read_text_shape(model_of("llava"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    assert read_text_shape(peft.get_peft_model(fresh("llava"), config)) == expected
    model = fresh("llava")
    for layer in model.get_decoder().layers:
        weight = layer.self_attn.q_proj.weight
        weight.data = weight.data.flatten()[: weight.numel() // 8]  # as a layer of 4 bits packs it
    assert read_text_shape(model) == expected


def test_mixtures_of_experts_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = llama_settings(
        model_type="qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    layer = model.model.layers[0]
    held = sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
    with pytest.raises(UnsupportedModelError) as caught:
        read_text_shape(model)
    for part in (
        "Qwen3MoeForCausalLM",
        f"has {held:,} numbers",
        "(gated MLP)",
        "Mixtures of experts",
        "Give a TextShape",
    ):
        assert part in str(caught.value)


def test_experts_beside_an_mlp_of_the_right_width_are_seen() -> None:
    with pytest.raises(UnsupportedModelError, match="Mixtures of experts"):
        read_text_shape(model_of("aria"))


def test_a_configuration_that_lacks_a_size() -> None:
    model = fresh("llava")
    object.__setattr__(model.config.text_config, "intermediate_size", None)  # past the checks of the configuration
    with pytest.raises(UnsupportedModelError, match=r"LlavaFor.* has no intermediate_size.*Give a TextShape"):
        read_text_shape(model)


@pytest.mark.parametrize(
    ("places", "drops", "words"),
    [
        (0, (), r"cost\.places must be a whole number, at least 1, but 0 came"),
        (9, ((5, 3),), r"cost\.drops must be layers that rise, from 0 to 4, but 5 came"),
        (9, ((-1, 3),), r"layers that rise, from 0 to 4, but -1 came"),
        (9, ((2, 3), (1, 2)), r"layers that rise, from 2 to 4, but 1 came"),
        (9, ((2, 10),), r"places that fall, from 9 to 0, but 10 came"),
        (9, ((2, -1),), r"places that fall, from 9 to 0, but -1 came"),
        (9, ((2, 3), (3, 4)), r"places that fall, from 3 to 0, but 4 came"),
    ],
)
def test_drops_out_of_range_or_order(places: int, drops: Any, words: str) -> None:
    shape = dataclasses.replace(SEVEN_B, layers=4)
    for call in (
        lambda: prefill_flops(shape, places, drops),
        lambda: prefill_saving(shape, places, drops),
        lambda: kv_entries(4, places, drops),
        lambda: kv_saving(4, places, drops),
        lambda: kv_bytes(shape, places, drops),
    ):
        with pytest.raises(SettingError, match=words):
            call()
