"""Two-way distillation inside a slow step: the loss and gradients of the formula, on full logits of both views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.dualspeed.common import attached
from tests.tiny import FAMILIES, gradients
from torch import Tensor

from trimtab.ops.label_head import supervised_positions

CLOSE = {"atol": 1e-10, "rtol": 1e-8}
"""float64 through two layers, the same sums in another order."""
SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "isolator_tokens": 2, "temperature": 2.0, "kl_weight": 0.5}


def slow_step(model: Any, batch: Any, **settings: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    with attached(model, **{**SETTINGS, **settings}) as handle, handle.force_mode("slow"):
        loss = model(**batch).loss
        loss.backward()
        found = gradients(model)
        measured = handle.metrics()
    model.zero_grad(set_to_none=True)
    return loss.detach(), found, measured


def formula(model: Any, batch: Any, ways: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The same step spelled out: both views by the stock model, every logit, autograd."""
    heat, weight = SETTINGS["temperature"], SETTINGS["kl_weight"]

    def logits(arguments: Any, labels: Tensor) -> Tensor:
        row, place = supervised_positions(labels)
        scores: Tensor = model(**arguments, use_cache=False).logits[row, place]
        return scores

    with attached(model, **SETTINGS) as handle:
        pruned = handle.prune_inputs(batch)
        model.eval()
        labels = pruned.pop("labels")
        teacher = torch.log_softmax(logits(pruned, labels) / heat, -1)
        plain = {name: value for name, value in batch.items() if name != "labels"}
        scores = logits(plain, batch["labels"])
        row, place = supervised_positions(batch["labels"])
        ce = torch.nn.functional.cross_entropy(scores, batch["labels"][row, place + 1], reduction="sum")
        student = torch.log_softmax(scores / heat, -1)
        kl = (teacher.detach().exp() * (teacher.detach() - student)).sum()
        if ways == 2:
            kl = kl + (student.detach().exp() * (student.detach() - teacher)).sum()
        loss = (ce + weight * heat**2 * kl) / len(row)
        loss.backward()
        found = gradients(model)
        model.train()
    model.zero_grad(set_to_none=True)
    return loss.detach(), found, kl.detach() / len(row)


def step_batch(name: str) -> tuple[Any, Any]:
    model = FAMILIES[name].build_model().double().train()
    batch = FAMILIES[name].make_batch(model, (1, 2))
    batch["pixel_values"] = batch["pixel_values"].double()
    return model, batch


@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ways", [1, 2])
def test_a_slow_step_is_the_formula(ways: int, packing: bool, chunk: int) -> None:
    model, batch = step_batch("llava")
    kind = "two_way" if ways == 2 else "one_way"
    loss, found, measured = slow_step(model, batch, distillation=kind, packing=packing, head_chunk=chunk)
    expected_loss, expected, kl = formula(model, batch, ways)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    assert measured["kl"] == pytest.approx(float(kl), rel=1e-8)
    assert bool(found["dualspeed_isolator.rows"].any()) == (ways == 2), "the pruned view learns"
    for name in found.keys() | expected.keys():
        zero = torch.zeros_like(found.get(name, expected.get(name)))
        torch.testing.assert_close(found.get(name, zero), expected.get(name, zero), **CLOSE)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "smolvlm"])
def test_other_families_learn_both_ways(name: str) -> None:
    model = FAMILIES[name].build_model().train()
    batch = FAMILIES[name].make_batch(model, (1, 0, 2))
    one, two = (slow_step(model, batch, distillation=kind) for kind in ("one_way", "two_way"))
    assert two[2]["kl"] > one[2]["kl"] > 0
    assert not one[1]["dualspeed_isolator.rows"].any()
    assert two[1]["dualspeed_isolator.rows"].any()


def test_without_distillation_there_is_no_way_at_all() -> None:
    model, batch = step_batch("llava")
    one, two = (slow_step(model, batch, distillation=kind, kl_weight=0.0) for kind in ("one_way", "two_way"))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(value, two[1][name]) for name, value in one[1].items())


def test_fast_steps_are_the_same_in_both_kinds() -> None:
    model, batch = step_batch("llava")
    found = []
    for kind in ("one_way", "two_way"):
        with attached(model, **SETTINGS, distillation=kind) as handle, handle.force_mode("fast"):
            loss = model(**batch).loss
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        model.zero_grad(set_to_none=True)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
