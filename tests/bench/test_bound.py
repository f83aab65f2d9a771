"""The limit model against published tables, a real model's counted operations, and its own invariants."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.bench import SpeedModel, count_flops
from trimtab.errors import SettingError


def vicuna(tiles: int, text: int, slow_ratio: float = 0.1, tower_trained: bool = False, kept: int = 57) -> SpeedModel:
    """Return a 7B language model behind a CLIP-L tower of 336 pixels, with recompute."""
    return SpeedModel(
        block_parameters=6.476e9, layers=32, width=4096, vocab=32000, text_tokens=text, visual_tokens=576 * tiles,
        kept_tokens=kept * tiles, isolator_tokens=4 * tiles, slow_ratio=slow_ratio, tower_flops=382e9 * tiles,
        tower_trained=tower_trained, projector_flops=24e9 * tiles, recompute=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tiles", "text", "fast", "slow", "speedup"),
    [(1, 200, 0.34, 1.09, 2.41), (1, 300, 0.41, 1.11, 2.07), (5, 200, 0.17, 1.05, 3.94), (5, 300, 0.19, 1.06, 3.62)],
)
def test_the_cost_table(tiles, text, fast, slow, speedup):
    predicted = vicuna(tiles, text).predict()
    assert predicted.fast_over_full == pytest.approx(fast, rel=0.03)
    assert predicted.slow_over_full == pytest.approx(slow, rel=0.03)
    assert predicted.speedup == pytest.approx(speedup, rel=0.03)


@pytest.mark.parametrize(
    ("tiles", "trained", "speedups"),
    [(1, False, (2.94, 2.65, 2.41, 2.05)), (5, False, (5.99, 4.75, 3.93, 2.93)), (5, True, (5.17, 4.24, 3.60, 2.76))],
)
def test_the_table_over_slow_ratios(tiles, trained, speedups):
    for ratio, speedup in zip((0, 0.05, 0.1, 0.2), speedups, strict=True):
        assert vicuna(tiles, 200, ratio, trained).predict().speedup == pytest.approx(speedup, rel=0.03)


def test_the_operations_are_those_that_a_model_runs():
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    places = 40
    ids = torch.randint(0, 96, (1, places))
    counted = count_flops(lambda: model(input_ids=ids))
    speed = SpeedModel(
        block_parameters=blocks, layers=3, width=32, vocab=96, text_tokens=places - 30, visual_tokens=30, kept_tokens=3
    )
    causal_half = 2 * 32 * 3 * places**2
    assert counted - causal_half == pytest.approx(speed.predict().full / 3, rel=1e-6)


def test_off_costs_the_same_as_full():
    same = dataclasses.replace(vicuna(1, 200, slow_ratio=0, kept=576), isolator_tokens=0)
    assert same.predict().speedup == 1
    assert same.predict().fast_over_full == 1


def test_only_slow_steps_cost_the_teacher_on_top():
    slow = vicuna(1, 200, slow_ratio=1).predict()
    assert slow.speedup == pytest.approx(1 / slow.slow_over_full)
    assert slow.speedup < 1
    without = dataclasses.replace(vicuna(1, 200, slow_ratio=1), teacher=False).predict()
    assert without.speedup == 1


def test_a_gathered_head_leaves_more_to_gain():
    small = SpeedModel(
        block_parameters=3e8, layers=24, width=896, vocab=151936, text_tokens=200, visual_tokens=576, kept_tokens=57
    )
    gathered = dataclasses.replace(small, label_tokens=50)
    assert gathered.predict().full < small.predict().full
    more = dataclasses.replace(small, label_tokens=10_000)
    assert more.predict() == small.predict()


def test_the_bounds_are_ordered():
    predicted = vicuna(5, 200, tower_trained=True).predict()
    assert 1 < predicted.speedup < predicted.limit < predicted.text_only
    assert 0 < predicted.tower_share < 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers", 0, "SpeedModel.layers must be a finite number above 0, but 0 came"),
        ("visual_tokens", float("nan"), "visual_tokens must be a finite number above 0"),
        ("tower_flops", -1, "tower_flops must be a finite number, at least 0"),
        ("slow_ratio", 1.5, r"slow_ratio must be in \[0, 1\]"),
        ("kept_tokens", 577, "kept_tokens must be at most 576, but 577 came"),
        ("label_tokens", 0, "label_tokens must be a finite number above 0"),
    ],
)
def test_bad_counts_are_named(name, value, words):
    with pytest.raises(SettingError, match=words):
        dataclasses.replace(vicuna(1, 200), **{name: value})
