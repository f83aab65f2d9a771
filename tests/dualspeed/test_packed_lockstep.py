"""Processes that must keep in step call the same modules in the same order, whatever rows their batches have."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from tests.dualspeed.common import attached
from tests.dualspeed.packing_tools import SETTINGS, same_step, take_step
from tests.dualspeed.test_empty_rows import with_empty_row
from tests.dualspeed.test_packed_modes import PER_SAMPLE, samples
from tests.tiny import FAMILIES, Batch, tiny_llava

from trimtab.dualspeed import prepare
from trimtab.dualspeed.ranks import SharedStep

LLAVA = FAMILIES["llava"]
BATCHES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "fast": (("fast", "fast"), (1, 1)),
    "slow": (("slow", "slow"), (1, 1)),
    "both": (("fast", "slow"), (1, 1)),
    "text": (("fast", "slow"), (0, 0)),
    "fast text": (("fast", "fast"), (0, 0)),
    "slow text": (("slow", "slow"), (0, 0)),
    "slow row of text": (("fast", "slow"), (1, 0)),
    "fast row of text": (("fast", "slow"), (0, 1)),
}
"""What the batch of one process may have: the mode of each row, and its images."""
READS_TEXT: dict[str, Any] = {"pruner": "dpp", "pruner_options": {"use_text": True}}

packed_or_not = pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
taught_or_not = pytest.mark.parametrize("kl_weight", [0.0, 1.0], ids=["no teacher", "teacher"])
any_pruner = pytest.mark.parametrize("pruner", [{}, READS_TEXT], ids=["images only", "reads text"])


@pytest.fixture(autouse=True)
def in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for another process, whose batch has rows of every kind and up to eight labels of each mode."""
    monkeypatch.setattr(sys.modules["trimtab.dualspeed.attach"], "needs_lockstep", lambda model: True)
    share_with_another(monkeypatch, slow=True)


def share_with_another(monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> None:
    told = SharedStep(visual=True, labels=8, slow_labels=8 if slow else 0, slow=slow)
    monkeypatch.setattr(prepare, "share_step", lambda *mine: told)


def batch_of(model: Any, name: str) -> Batch:
    modes, images = BATCHES[name]
    return {**LLAVA.make_batch(model, images), "samples": samples(modes)}


def calls_of_step(name: str, **settings: Any) -> tuple[list[str], list[str]]:
    """Return which modules a step calls, and which parameters get gradients, each in order.

    Each parameter stands for the module that a sharded model would gather or reduce with it.
    """
    model = tiny_llava()
    batch = batch_of(model, name)
    forward: list[str] = []
    backward: list[str] = []
    with attached(model, **{**SETTINGS, **PER_SAMPLE, **settings}) as handle:
        parts = {
            "tower": model.model.vision_tower, "projector": model.model.multi_modal_projector,
            "embeddings": model.get_input_embeddings(), "isolator": handle.isolator,
            **{f"layer {number}": layer for number, layer in enumerate(model.get_decoder().layers)},
            "head": model.lm_head,
        }  # fmt: skip
        for part, module in parts.items():
            module.register_forward_pre_hook(lambda *call, part=part: forward.append(part))
            for parameter in list(module.parameters())[:1]:
                parameter.register_post_accumulate_grad_hook(lambda *call, part=part: backward.append(part))
        model(**batch).loss.backward()
        assert handle._lockstep
    return forward, backward


@packed_or_not
@taught_or_not
@any_pruner
def test_every_batch_calls_the_same_modules_in_the_same_order(
    pruner: dict[str, Any], kl_weight: float, packing: bool
) -> None:
    settings = {"kl_weight": kl_weight, "packing": packing, **pruner}
    found = {name: calls_of_step(name, **settings) for name in BATCHES}
    forward, backward = found["both"]
    assert forward.count("layer 0") == (2 if kl_weight else 1), "a pass of the teacher and one of the student"
    assert {"projector", "embeddings", "isolator", "layer 0", "layer 1", "head"} <= set(backward)
    assert {name: calls for name, calls in found.items() if calls != (forward, backward)} == {}


@packed_or_not
@any_pruner
def test_without_slow_rows_anywhere_there_is_no_teacher(
    pruner: dict[str, Any], packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_with_another(monkeypatch, slow=False)
    found = {name: calls_of_step(name, packing=packing, **pruner) for name in ("fast", "fast text")}
    assert found["fast"] == found["fast text"]
    assert found["fast"][0].count("layer 0") == 1


@packed_or_not
@taught_or_not
@pytest.mark.parametrize("name", BATCHES)
def test_keeping_step_changes_no_loss_and_no_gradient(
    name: str, kl_weight: float, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava()
    batch = batch_of(model, name)
    settings = {"kl_weight": kl_weight, "packing": packing, **PER_SAMPLE}
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(sys.modules["trimtab.dualspeed.attach"], "needs_lockstep", lambda model: False)
        expected = take_step(model, batch, **settings)
    same_step(take_step(model, batch, **settings), expected)


@packed_or_not
@taught_or_not
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_an_empty_row_in_front_is_no_matter(mode: str, kl_weight: float, packing: bool) -> None:
    """A process without slow rows shows the teacher a row all the same, which may not be one of padding only."""
    model = tiny_llava()
    batch = batch_of(model, "fast")
    settings = {"packing": packing, "kl_weight": kl_weight, **PER_SAMPLE}
    expected = take_step(model, batch, **settings)
    empty = {**with_empty_row(batch, 0), "samples": samples((mode, "fast", "fast"))}
    same_step(take_step(model, empty, **settings), expected)
