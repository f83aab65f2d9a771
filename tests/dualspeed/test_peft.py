"""Adapters of PEFT: every kind trains, is saved as itself, and merges into the stock model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dualspeed.common import ROWS, SUM_ORDER, attached, training_arguments
from tests.tiny import FAMILIES, TinyRows, collate, gradients, tiny_llava, weights
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback

import trimtab
from trimtab import DualSpeedCallback
from trimtab.errors import SettingError

peft = pytest.importorskip("peft")

# peft 0.21 asks for a name that transformers 5.23 has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),  # said of every adapter on the head
]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "trained projector": {"modules_to_save": ["multi_modal_projector"]},
    "trained head": {"modules_to_save": ["lm_head"]},
    "lora on the head": {"target_modules": ["lm_head", "v_proj"]},
}
SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.4, "seed": 11, "schedule": "bernoulli"}


def adapted(kind: str = "lora", base: Any = None) -> Any:
    """Return the tiny LLaVA with an adapter in its language model that is already far from zero."""
    settings = {"r": 2, "target_modules": r".*language_model.*\.(q_proj|v_proj)", **KINDS[kind]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_llava() if base is None else base, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def batch_of(seed: int = 0) -> Any:
    return FAMILIES["llava"].make_batch(None, ROWS, seed=seed)


def train(model: Any, handle: Any, steps: int = 4) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for number in range(steps):
        with handle.force_mode("slow" if number % 2 else "fast"):
            model(**batch_of(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch_of(9)).logits


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_with_nothing_pruned_an_adapter_has_the_stock_loss(kind: str, mode: str) -> None:
    stock, model = adapted(kind), adapted(kind)
    expected = stock(**batch_of()).loss
    expected.backward()
    with attached(model, keep_ratio=1.0, isolator_tokens=0, slow_ratio=0.5) as handle, handle.force_mode(mode):
        loss = model(**batch_of()).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, **SUM_ORDER)
    ours, theirs = gradients(model), gradients(stock)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **SUM_ORDER)


def test_a_slow_step_pulls_the_adapter_to_its_own_pruned_view(kind: str) -> None:
    """Cross-entropy and KL written out; the head of the teacher is the trained one, without a gradient."""
    model, other = adapted(kind), adapted(kind)
    batch = batch_of()
    with attached(model, keep_ratio=0.2) as handle, handle.force_mode("slow"):
        loss = model(**batch).loss
        loss.backward()
        view = handle.prune_inputs(batch)
        rows = handle.isolator.rows.grad
    assert rows is None or not rows.any(), "the isolator belongs to the teacher of a slow step"
    student = other(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]
    targets = batch["labels"][:, 1:]
    with torch.no_grad():
        pruned = {name: value for name, value in view.items() if name != "labels"}
        teacher = other(**pruned).logits[:, :-1][view["labels"][:, 1:] != -100]
    ce = functional.cross_entropy(student, targets[targets != -100])
    kl = functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    assert kl > 0.01
    (ce + kl).backward()
    torch.testing.assert_close(loss, ce + kl, **SUM_ORDER)
    ours = {name: value for name, value in gradients(model).items() if "isolator" not in name}
    assert ours.keys() == gradients(other).keys()
    for name, value in gradients(other).items():
        torch.testing.assert_close(ours[name], value, **SUM_ORDER)


def test_the_saved_adapter_on_the_stock_base_is_the_trained_model(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    with attached(model, keep_ratio=0.2) as handle:
        start = handle.isolator.rows.detach().clone()
        train(model, handle)
        assert not torch.equal(handle.isolator.rows, start)
        model.save_pretrained(str(tmp_path))
        handle.save_pretrained(tmp_path / "dualspeed")
        expected = logits(model)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    never = adapted(kind)
    never.save_pretrained(str(tmp_path / "never"))
    assert saved.keys() == load_file(tmp_path / "never" / "adapter_model.safetensors").keys()
    assert (tmp_path / "dualspeed" / "isolator.safetensors").is_file()
    again = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path))
    assert torch.equal(logits(again), expected)
    assert not torch.equal(logits(never), expected), "training changed the model"


def test_merged_it_is_the_base_model_again(kind: str, tmp_path: Path) -> None:
    base = tiny_llava()
    base.save_pretrained(tmp_path / "base")
    config = base.config.to_dict()
    model = adapted(kind, base)
    with attached(model, keep_ratio=0.2) as handle:
        train(model, handle)
        expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlavaForConditionalGeneration
    assert merged.state_dict().keys() == tiny_llava().state_dict().keys()
    assert merged.config.to_dict() == config
    # One product of the merged matrix in place of two or three: rounding of float32 in another order.
    torch.testing.assert_close(logits(merged), expected, atol=5e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_text() == (tmp_path / "base" / name).read_text()
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "base"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(merged))


# Trainers ------------------------------------------------------------------------------------------------------------


class KilledError(RuntimeError):
    """Stands for whatever ends a run."""


class KillAt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KilledError


def by_subclass(out: Path, callbacks: Any = ()) -> tuple[Any, Any]:
    trainer = trimtab.with_dualspeed(Trainer)(
        model=adapted("trained projector"), args=arguments(out), train_dataset=TinyRows(), data_collator=collate,
        callbacks=list(callbacks), dualspeed=SETTINGS,
    )  # fmt: skip
    return trainer, trainer.dualspeed


def by_callback(out: Path, callbacks: Any = ()) -> tuple[Any, Any]:
    callback = DualSpeedCallback(SETTINGS)
    trainer = Trainer(
        model=adapted("trained projector"), args=arguments(out), train_dataset=TinyRows(), data_collator=collate,
        callbacks=[*callbacks, callback],
    )  # fmt: skip
    return trainer, callback.handle


def arguments(out: Path) -> Any:
    return training_arguments(out, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)


def test_trainers_resume_an_adapter_bit_for_bit_and_save_nothing_else(tmp_path: Path) -> None:
    runs: list[tuple[Any, Any]] = []
    makers: list[Callable[..., tuple[Any, Any]]] = [by_subclass, by_callback]
    for make in makers:
        whole = make(tmp_path / make.__name__ / "whole")
        whole[0].train()
        with pytest.raises(KilledError):
            make(tmp_path / make.__name__, [KillAt()])[0].train()
        resumed = make(tmp_path / make.__name__)
        resumed[0].train(resume_from_checkpoint=True)
        runs += [whole, resumed]
    first, handle = runs[0]
    assert handle.metrics()["steps_slow"]
    for trainer, other in runs[1:]:
        for key, value in weights(first.model).items():
            assert torch.equal(weights(trainer.model)[key], value), key
        assert other.state_dict() == handle.state_dict()
    for trainer, _ in runs:
        saved = load_file(Path(trainer.args.output_dir) / "checkpoint-4" / "adapter_model.safetensors")
        assert all("lora" in key or "multi_modal_projector" in key for key in saved)
        assert (Path(trainer.args.output_dir) / "checkpoint-4" / "dualspeed" / "isolator.safetensors").is_file()


# gradient checkpointing ------------------------------------------------------------------------------------------


# torch says so of every reentrant checkpoint whose inputs have no gradient.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpointing_that_cuts_off_what_is_trained_is_refused() -> None:
    """The isolator keeps the loss differentiable, so that torch itself would not complain."""

    def partly_frozen() -> Any:
        model = tiny_llava().requires_grad_(False)
        model.model.language_model.layers[1].mlp.requires_grad_(True)
        return model

    model = partly_frozen()
    model.activation_checkpointing_enable({"use_reentrant": True})  # also makes the embeddings require gradients
    with attached(model, keep_ratio=0.2) as handle, handle.force_mode("slow"):
        model.disable_input_require_grads()
        with pytest.raises(SettingError, match=r"use_reentrant.*enable_input_require_grads"):
            model(**batch_of(), use_cache=False)
        model.enable_input_require_grads()
        model(**batch_of(), use_cache=False).loss.backward()
        found = gradients(model)
    plain = partly_frozen()
    with attached(plain, keep_ratio=0.2) as handle, handle.force_mode("slow"):
        plain(**batch_of()).loss.backward()
        expected = gradients(plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **SUM_ORDER)
