"""accelerate's own loop, and mixed precision in every way to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tests.dualspeed.common import ROWS, training_arguments
from tests.tiny import FAMILIES, TinyRows, collate, tiny_llava, weights
from torch.utils.data import DataLoader
from transformers import Trainer

import trimtab
from trimtab import DualSpeedCallback, DualSpeedConfig
from trimtab.dualspeed.schedule import mode_of_step

SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.4, "seed": 11, "schedule": "bernoulli"}
STEPS = 4


def forget_precision() -> None:
    """accelerate keeps the precision in global state."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    forget_precision()  # a Trainer of another test has made the state that all share
    yield
    forget_precision()


def accelerate_loop(precision: str | None = None, accumulation: int = 2, clip: float = 1.0) -> tuple[Any, Any, list]:
    """The loop of accelerate's documentation, with DualSpeed in it."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    model = tiny_llava()
    handle = trimtab.attach(model, DualSpeedConfig(**SETTINGS), accumulation_steps=accumulation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(TinyRows(2 * accumulation * STEPS), batch_size=2, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return accelerator.unwrap_model(model), handle, losses


def test_the_loop_of_accelerate_is_the_plain_loop() -> None:
    model, handle, losses = accelerate_loop()
    other = tiny_llava()
    twin = trimtab.attach(other, DualSpeedConfig(**SETTINGS), accumulation_steps=2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    expected = []
    for number, batch in enumerate(DataLoader(TinyRows(4 * STEPS), batch_size=2, collate_fn=collate)):
        loss = other(**batch).loss
        (loss / 2).backward()
        expected.append(loss.item())
        if number % 2:
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert losses == expected
    for key, value in weights(other).items():
        assert torch.equal(weights(model)[key], value), key
    assert handle.state_dict() == twin.state_dict()
    assert handle.metrics()["steps_slow"]
    assert handle.metrics()["steps_fast"]


def test_the_loop_of_accelerate_leaves_an_ordinary_model() -> None:
    model, handle, _ = accelerate_loop()
    handle.detach()
    assert weights(model).keys() == weights(tiny_llava()).keys()


def test_the_shorter_update_at_the_end_of_an_epoch_counts_as_one() -> None:
    """Six batches at four per update: accelerate ends the second update after two of them."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = tiny_llava()
    handle = trimtab.attach(model, DualSpeedConfig(**{**SETTINGS, "seed": 6}), accumulation_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(TinyRows(6), batch_size=1, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    updates: list[list[str]] = [[]]
    for epoch in range(4):
        if epoch == 2:  # as a run that is resumed
            state = handle.state_dict()
            handle.load_state_dict({**state, "micro_step": 0, "skipped": 0})
            handle.load_state_dict(state)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                updates[-1].append(handle.metrics()["mode"])
                if accelerator.sync_gradients:
                    updates.append([])
                optimizer.step()
                optimizer.zero_grad()
    drawn = [mode_of_step(update, kind="bernoulli", slow_ratio=0.4, seed=6) for update in range(8)]
    assert set(drawn) == {"fast", "slow"}
    assert updates[:-1] == [[mode] * (2 if update % 2 else 4) for update, mode in enumerate(drawn)]


def test_a_loop_outside_of_accelerates_loaders_does_not_ask_accelerate() -> None:
    """Accelerator's state outlives its loop; in a plain loop it would say that every call ends an update."""
    accelerate_loop(accumulation=2)
    left = Accelerator(cpu=True, gradient_accumulation_steps=2).prepare(DataLoader(TinyRows(8), collate_fn=collate))
    opened = iter(left)
    next(opened)
    state = GradientState()
    assert (state.sync_gradients, state.in_dataloader, state.num_steps) == (True, True, 2)
    model = tiny_llava()
    handle = trimtab.attach(model, DualSpeedConfig(**SETTINGS), accumulation_steps=2)
    modes = []
    for number in range(8):
        model(**FAMILIES["llava"].make_batch(None, (1,), seed=number))
        modes.append(handle.metrics()["mode"])
    assert modes == [mode_of_step(call // 2, kind="bernoulli", slow_ratio=0.4, seed=11) for call in range(8)]


# bf16 ----------------------------------------------------------------------------------------------------------------

BF16 = {"rtol": 0.05, "atol": 0.05}
"""A bf16 number has 8 bits of mantissa, 0.4 % of a product; a loss of about 5 through six layers stays within 5 %."""


def one_step_with_accelerate(mode: Any, precision: str) -> tuple[Any, Any, Any]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = tiny_llava()
    handle = trimtab.attach(model, DualSpeedConfig(**SETTINGS))
    prepared = accelerator.prepare(model)
    with handle.force_mode(mode):
        loss = prepared(**FAMILIES["llava"].make_batch(None, ROWS)).loss
    accelerator.backward(loss)
    return loss.detach(), handle, model


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_bf16_of_accelerate_reaches_the_whole_step(mode: str) -> None:
    """Encoder, teacher and head run outside of the forward that accelerate wraps, and in the same precision."""
    exact, plain, _ = one_step_with_accelerate(mode, "no")
    forget_precision()
    loss, handle, model = one_step_with_accelerate(mode, "bf16")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, **BF16)
    assert not torch.equal(loss, exact), "bf16 shows in the digits, or nothing ran in it"
    assert model.lm_head.weight.grad.dtype == torch.float32
    if mode == "fast":
        gradient, expected = handle.isolator.rows.grad, plain.isolator.rows.grad
        assert gradient.isfinite().all()
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.99, "rounding turns the gradient by less than this"


def test_under_bf16_the_encoder_and_the_head_compute_in_bf16() -> None:
    """Matrix products of the projector and of the head, both outside of the forward, are cast."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny_llava()
    handle = trimtab.attach(model, DualSpeedConfig(**SETTINGS))
    seen = {}
    for name, part in (("projector", model.model.multi_modal_projector.linear_2), ("head", model.lm_head)):
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    prepared = accelerator.prepare(model)
    with handle.force_mode("fast"):
        prepared(**FAMILIES["llava"].make_batch(None, (1, 1)))
    assert seen == {"projector": torch.bfloat16, "head": torch.bfloat16}
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    seen.clear()
    with handle.force_mode("fast"):
        model(**FAMILIES["llava"].make_batch(None, (1, 1)))
    assert seen == {"projector": torch.float32, "head": torch.float32}, "the wrapper is gone, and the cast with it"


def train_with_subclass(out: Path, **changes: Any) -> tuple[Any, Any]:
    trainer = trimtab.with_dualspeed(Trainer)(
        model=tiny_llava(), args=training_arguments(out, max_steps=STEPS, **changes), train_dataset=TinyRows(),
        data_collator=collate, dualspeed=SETTINGS,
    )  # fmt: skip
    trainer.train()
    return trainer, trainer.dualspeed


def train_with_callback(out: Path, **changes: Any) -> tuple[Any, Any]:
    callback = DualSpeedCallback(SETTINGS)
    trainer = Trainer(
        model=tiny_llava(), args=training_arguments(out, max_steps=STEPS, **changes), train_dataset=TinyRows(),
        data_collator=collate, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return trainer, callback.handle


@pytest.mark.parametrize("train", [train_with_subclass, train_with_callback])
def test_bf16_trains_close_to_float32(train: Callable[..., Any], tmp_path: Path) -> None:
    exact, _ = train(tmp_path / "exact")
    forget_precision()
    trainer, handle = train(tmp_path / "bf16", bf16=True)
    losses, expected = (
        [entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, exact)
    )
    assert losses != expected
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), **BF16)
    metrics = handle.metrics()
    assert metrics["steps_fast"]
    assert metrics["steps_slow"]
    fresh = trimtab.attach(tiny_llava(), DualSpeedConfig(**SETTINGS)).isolator.rows
    assert not torch.equal(handle.isolator.rows, fresh)
    assert handle.isolator.rows.isfinite().all()


def test_callback_and_subclass_agree_under_bf16(tmp_path: Path) -> None:
    ours, handle = train_with_callback(tmp_path / "ours", bf16=True)
    theirs, other = train_with_subclass(tmp_path / "theirs", bf16=True)
    for key, value in weights(theirs.model).items():
        assert torch.equal(weights(ours.model)[key], value), key
    assert handle.state_dict() == other.state_dict()
