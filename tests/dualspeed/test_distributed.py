"""Two processes on the CPU (gloo), started the way the Trainer expects; no default of it is changed."""

from __future__ import annotations

import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import training_arguments
from tests.tiny import TinyRows, collate, tiny_llava, weights

import trimtab
from trimtab import DualSpeedConfig

pytestmark = pytest.mark.slow

STEPS = 20
SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.3, "seed": 2, "schedule": "bernoulli"}


def run_rank(rank: int, port: int, out: str, settings: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
    """Train on one rank and leave its weights, or its error, in a file."""
    os.environ.update(
        HF_HUB_OFFLINE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        found = train(Path(out), settings[rank], arguments)
    except Exception as error:
        found = {
            "error": error.args,
            "kind": [c.__name__ for c in type(error).__mro__],
            "trace": traceback.format_exc(),
        }
    torch.save(found, Path(out) / f"rank{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(out: Path, settings: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Train a LLaVA whose vision tower is frozen, as the method does, and say what became of it."""
    from transformers import Trainer

    class Recorder(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            modes.append(self.dualspeed.metrics()["mode"])
            return loss

    modes: list[str] = []
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    trainer = trimtab.with_dualspeed(Recorder)(
        model=model, args=training_arguments(out, **arguments), train_dataset=TinyRows(), data_collator=collate,
        dualspeed=DualSpeedConfig(**settings),
    )  # fmt: skip
    trainer.train()
    return {
        "weights": weights(model),
        "isolator": trainer.dualspeed.isolator.rows.detach().clone(),
        "modes": modes,
        "step": trainer.state.global_step,
    }


def two_ranks(out: Path, settings: list[dict[str, Any]], **arguments: Any) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(
        run_rank, (port, str(out), settings, {"ddp_backend": "gloo", **arguments}), nprocs=2, join=True
    )
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_10_twenty_steps_leave_equal_weights_on_both_ranks(tmp_path: Path) -> None:
    arguments = {
        "max_steps": STEPS, "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "sgd", "learning_rate": 0.05,
    }  # fmt: skip
    first, second = two_ranks(tmp_path / "two", [SETTINGS, SETTINGS], **arguments)
    for found in (first, second):
        assert "error" not in found, found.get("trace")
    assert first["step"] == STEPS
    assert first["modes"] == second["modes"]
    assert set(first["modes"]) == {"fast", "slow"}
    assert torch.equal(first["isolator"], second["isolator"])
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key

    # One process that accumulates the same two micro-batches per step makes the same updates. After 20 steps of
    # plain SGD float32 sums in another order have drifted by some 1e-5 at most.
    alone = train(tmp_path / "one", SETTINGS, {**arguments, "gradient_accumulation_steps": 2})
    assert alone["modes"][::2] == first["modes"]
    start = weights(tiny_llava())
    moved = max(float((alone["weights"][key] - start[key]).abs().max()) for key in start)
    assert moved > 1e-2
    for key, value in first["weights"].items():
        torch.testing.assert_close(value, alone["weights"][key], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(first["isolator"], alone["isolator"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changed", [{"seed": 3}, {"keep_ratio": 0.3}], ids=["seed", "keep_ratio"])
def test_09_ranks_that_disagree_stop_before_the_first_step(tmp_path: Path, changed: dict[str, Any]) -> None:
    found = two_ranks(tmp_path, [SETTINGS, {**SETTINGS, **changed}], max_steps=2)
    for rank in found:
        assert "RankDisagreementError" in rank.get("kind", []), rank.get("trace", rank)
        assert "RuntimeError" in rank["kind"]
        assert next(iter(changed)) in rank["error"][0] or "rank" in rank["error"][0]
