"""`torch.compile` around DualSpeed: the same numbers, whichever came first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import ROWS, training_arguments
from tests.tiny import FAMILIES, TinyRows, collate, tiny_llava, weights
from torch._dynamo.testing import CompileCounter
from transformers import Trainer

import trimtab
from trimtab import DualSpeedConfig

SETTINGS = DualSpeedConfig(keep_ratio=0.2, slow_ratio=0.5, schedule="bernoulli", seed=3)

# torch's compiler looks at the .grad of every input of a graph, also of those that are no leaves.
pytestmark = pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attach_then_compile(model: Any, backend: Any) -> tuple[Any, Any]:
    handle = trimtab.attach(model, SETTINGS)
    return torch.compile(model, backend=backend), handle


def compile_then_attach(model: Any, backend: Any) -> tuple[Any, Any]:
    compiled = torch.compile(model, backend=backend)
    return compiled, trimtab.attach(compiled, SETTINGS)


def attach_then_compile_in_place(model: Any, backend: Any) -> tuple[Any, Any]:
    handle = trimtab.attach(model, SETTINGS)
    model.compile(backend=backend)
    return model, handle


def plain(model: Any, backend: Any) -> tuple[Any, Any]:
    return model, trimtab.attach(model, SETTINGS)


def losses_of(make: Any, backend: Any) -> tuple[list[float], Any, Any]:
    """Train a few steps on batches of different lengths."""
    model = tiny_llava()
    call, handle = make(model, backend)
    optimizer = torch.optim.SGD(call.parameters(), lr=0.05)
    losses = []
    for number in range(4):
        batch = FAMILIES["llava"].make_batch(None, ROWS, seed=number, text_lengths=[3 + number % 2, 4, 5])
        loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model, handle


@pytest.mark.parametrize(
    "make",
    [
        compile_then_attach,
        pytest.param(attach_then_compile, marks=pytest.mark.slow),
        pytest.param(attach_then_compile_in_place, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_trains_as_the_plain_one(make: Any) -> None:
    """The graphs run by torch's own kernels here, so the numbers are the same to the last bit."""
    expected, other, _ = losses_of(plain, None)
    graphs = CompileCounter()
    losses, model, handle = losses_of(make, graphs)
    assert graphs.frame_count > 0, "nothing was compiled"
    assert losses == expected
    metrics = handle.metrics()
    assert metrics["steps_fast"]
    assert metrics["steps_slow"]
    for key, value in weights(other).items():
        assert torch.equal(weights(model)[key], value), key
    handle.detach()
    assert weights(model).keys() == weights(tiny_llava()).keys()


def test_the_hooks_are_not_compiled() -> None:
    """They run as Python; only the model's own forward makes graphs, and no more of them in later steps."""
    graphs = CompileCounter()
    model = tiny_llava()
    call, handle = attach_then_compile(model, graphs)
    batch = FAMILIES["llava"].make_batch(None, ROWS)
    counts = []
    for _ in range(3):
        with handle.force_mode("fast"):
            call(**batch)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1] > 0


def test_a_compiled_model_is_supported() -> None:
    assert trimtab.check_model(torch.compile(tiny_llava(), backend="eager")).supported


@pytest.mark.slow
def test_a_trainer_that_compiles_trains_as_one_that_does_not(tmp_path: Path) -> None:
    runs = []
    for compiles in (False, True):
        arguments = training_arguments(
            tmp_path / str(compiles), max_steps=4, torch_compile=compiles,
            torch_compile_backend="eager" if compiles else None,
        )  # fmt: skip
        trainer = trimtab.with_dualspeed(Trainer)(
            model=tiny_llava(), args=arguments, train_dataset=TinyRows(), data_collator=collate, dualspeed=SETTINGS
        )
        trainer.train()
        runs.append(([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    for key, value in runs[0][1].items():
        assert torch.equal(runs[1][1][key], value), key
