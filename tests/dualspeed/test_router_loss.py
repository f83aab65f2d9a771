"""Mixtures of experts: the balancing loss of the routers, where the settings of the model ask for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.dualspeed.common import ROWS, SUM_ORDER, attached
from torch import Tensor

NAMES = ("qwen3_vl_moe", "glm4v_moe")
WEIGHT = 3.0
"""Far above the usual 0.001, so that the loss shows."""


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    family = SUITE[request.param]
    model = family.build_model().train()
    text = model.config.get_text_config()
    text.output_router_logits, text.router_aux_loss_coef = True, WEIGHT
    return model, family.make_batch(model, ROWS)


def loss_of(model: Any, batch: dict[str, Any], balance: bool) -> Tensor:
    """What the stock model computes, with its balancing loss or without."""
    text = model.config.get_text_config()
    text.output_router_logits = balance
    with torch.no_grad():
        found: Tensor = model(**batch).loss
    text.output_router_logits = True
    return found


def test_a_slow_step_without_teacher_is_the_stock_loss(case: Any) -> None:
    model, batch = case
    expected = loss_of(model, batch, balance=True)
    assert expected - loss_of(model, batch, balance=False) > 0.1
    with attached(model, keep_ratio=0.25, kl_weight=0.0) as handle, handle.force_mode("slow"):
        output = model(**batch)
    torch.testing.assert_close(output.loss.detach(), expected, **SUM_ORDER)
    assert output.aux_loss > 0


def test_a_fast_step_balances_over_the_pruned_view(case: Any) -> None:
    model, batch = case
    with attached(model, keep_ratio=0.25, isolator_tokens=2) as handle:
        with handle.force_mode("fast"):
            loss = model(**batch).loss
        loss.backward()
        model.eval()
        with torch.no_grad():
            view = handle.prune_inputs(batch)
        view["mm_encoder_outputs"] = dict(view["mm_encoder_outputs"])
        expected = loss_of(model, view, balance=True)
        assert handle.metrics()["ce"] < expected - 0.1, "the cross-entropy is reported alone"
    torch.testing.assert_close(loss.detach(), expected, **SUM_ORDER)


def test_of_an_update_each_micro_batch_gives_its_share_of_the_balancing_loss(case: Any) -> None:
    model, batch = case
    labels = (batch["labels"][:, 1:] != -100).sum()
    with attached(model, keep_ratio=0.25) as handle, handle.force_mode("fast"):
        whole = model(**batch).loss
        quarter = model(**batch, num_items_in_batch=4 * labels).loss
    torch.testing.assert_close(4 * quarter, whole, **SUM_ORDER)


def test_nothing_is_added_where_the_model_is_not_asked(case: Any) -> None:
    model, batch = case
    model.config.get_text_config().output_router_logits = False
    with attached(model, keep_ratio=0.25) as handle, handle.force_mode("fast"):
        loss = model(**batch).loss
        assert loss.item() == pytest.approx(handle.metrics()["ce"], rel=1e-6)  # float32
