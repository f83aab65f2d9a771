"""Gradients of two processes equal those of one that averages over both batches, whatever the batches hold."""

from __future__ import annotations

from typing import Any

import pytest
from tests.dualspeed.ranks import Case, compare, on_ranks

TEXT_ONLY = ((1, 0, 2), (0, 0))
"""The second rank has no image at all."""

FROZEN = ("model.vision_tower",)
PROJECTOR_ONLY = ("model.vision_tower", "model.language_model", "lm_head")

CASES: dict[str, Case] = {
    "DDP": Case("ddp"),
    "DDP, frozen tower": Case("ddp", frozen=FROZEN),
    "DDP, text only": Case("ddp", images=TEXT_ONLY),
    "FSDP2": Case("fsdp2"),
    "FSDP2, text only": Case("fsdp2", images=TEXT_ONLY, settings={"head_chunk": 4}),
}

SLOW_CASES: dict[str, Case] = {
    "DDP, looking for unused parts": Case("ddp_find"),
    "DDP, checkpointing": Case("ddp", checkpointing=True),
    "DDP, nothing supervised": Case("ddp", unlabelled=1),
    "FSDP2, checkpointing": Case("fsdp2", checkpointing=True),
    "FSDP2, checkpointing, text only": Case(
        "fsdp2", images=TEXT_ONLY, checkpointing=True, settings={"head_chunk": 4}
    ),
    "FSDP2, frozen tower, text only": Case("fsdp2", images=TEXT_ONLY, frozen=FROZEN),
    "FSDP2, projector only, text only": Case(
        "fsdp2", modes=("fast", "fast"), images=TEXT_ONLY, frozen=PROJECTOR_ONLY
    ),
    "FSDP2, nothing supervised": Case("fsdp2", unlabelled=1),
    "FSDP2, pruner that observes the tower, text only": Case(
        "fsdp2", images=TEXT_ONLY, settings={"pruner": "vispruner"}
    ),
    **{
        f"{wrap}, {family}, text only": Case(wrap, images=TEXT_ONLY, family=family)
        for family in ("llava_next", "idefics3", "qwen2_5_vl", "qwen3_vl")
        for wrap in ("ddp", "fsdp2")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), compare, CASES)


@pytest.fixture(scope="module")
def slowly_found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), compare, SLOW_CASES)


def is_the_mean(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        one = rank.get(name, rank)
        assert "error" not in one, one.get("trace", one)
        # Two float32 gradients of order one, halved before or after the sum over two steps: their last bits differ.
        # The largest difference seen was 1.3e-7.
        assert one["difference"] <= 1e-6
        assert one["largest"] > 1e-2
        assert one["isolator"] > 1e-3
        assert one["missing"] == [], "parameters without gradient that have one in a single process"
        assert one["more"] == [], "parameters with a gradient other than zero that have none in a single process"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_mean_of_the_ranks(found: list[dict[str, Any]], name: str) -> None:
    is_the_mean(found, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_gradients_are_the_mean_of_the_ranks_in_more_cases(slowly_found: list[dict[str, Any]], name: str) -> None:
    is_the_mean(slowly_found, name)
