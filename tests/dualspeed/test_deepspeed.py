"""DeepSpeed's ZeRO: two processes on the CPU take the steps of one. Where it is absent: that its calls are made."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import training_arguments
from tests.dualspeed.ranks import Case, _handle, _make, on_ranks
from tests.tiny import TinyRows, collate, tiny_llava
from torch import Tensor, distributed

import trimtab
from trimtab import DualSpeedConfig
from trimtab.anatomy.inside import call_inside
from trimtab.dualspeed.isolator import ModeIsolator
from trimtab.dualspeed.ranks import needs_lockstep

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

MODES = ("fast", "slow", "slow", "fast")
TEXT_ONLY = ((1, 0, 2), (0, 0))
RATE = 0.05
SETTINGS: dict[str, Any] = {
    "gradient_clipping": 0.0,  # 1.0 by default
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
CASES: dict[str, tuple[int, Case]] = {
    f"ZeRO-{stage}, {family}{told}": (stage, Case("zero", modes=MODES, family=family, **changes))
    for stage in (2, 3)
    for family in ("llava", "llava_next", "qwen3_vl")
    for told, changes in (("", {}), (", text only", {"images": TEXT_ONLY}))
} | {
    "ZeRO-3, pruner that reads the question, text only": (
        3, Case("zero", modes=MODES, images=TEXT_ONLY, settings={"pruner": "dpp", "pruner_options": {"use_text": True}})
    ),
}  # fmt: skip


def start_deepspeed() -> Any:
    """Start its process group on the CPU."""
    os.environ.update(DS_ACCELERATOR="cpu")
    import deepspeed

    # Its own collective for CPUs would be compiled first, which takes a minute; gloo's do the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not distributed.is_initialized():
        deepspeed.init_distributed("gloo")
    return deepspeed


def train_all(cases: dict[str, tuple[int, Case]]) -> dict[str, Any]:
    deepspeed = start_deepspeed()
    return {name: train_both(deepspeed, stage, case) for name, (stage, case) in cases.items()}


def train_both(deepspeed: Any, stage: int, case: Case) -> dict[str, Any]:
    """Take the steps of a case with ZeRO on all ranks, and alone on the batches of all, and compare the weights."""
    expected = train_alone(case)
    model, batches = _make(case)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    with _handle(model, case) as handle:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # however small, in pieces
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer,
            config={**SETTINGS, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
        )  # fmt: skip
        for mode in case.modes:
            with handle.force_mode(mode):
                loss = engine(**batches[distributed.get_rank()]).loss
            engine.backward(loss)
            engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found = {name: one.detach().clone() for name, one in model.named_parameters()}
        engine.destroy()
    return {
        "difference": {name: float((found[name] - one).abs().max()) for name, one in expected.items()},
        "moved": {name: float((expected[name] - one).abs().max()) for name, one in before.items()},
        "isolator": float((expected["dualspeed_isolator.rows"] - found["dualspeed_isolator.rows"]).abs().max()),
    }


def train_alone(case: Case) -> dict[str, Tensor]:
    from unittest.mock import patch

    model, batches = _make(case)
    with patch.object(distributed, "is_initialized", return_value=False), _handle(model, case) as handle:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for step, mode in enumerate(case.modes):
            for batch in batches:
                handle.micro_step = step
                with handle.force_mode(mode):
                    (model(**batch).loss / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: one.detach().clone() for name, one in model.named_parameters()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), train_all, CASES, group=False)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_one_process(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert "error" not in rank, rank.get("trace")
        # Four float32 updates whose gradients are summed in another order; the largest difference seen was 1.2e-7.
        assert max(rank[name]["difference"].values()) <= 1e-6
        assert rank[name]["isolator"] <= 1e-6
        assert max(rank[name]["moved"].values()) > 1e-2
        newline = [moved for key, moved in rank[name]["moved"].items() if key.endswith("image_newline")]
        assert "llava_next" not in name or newline[0] > 1e-4


def train_with_trainer(stage: int, out: Path, start: Path, resume: str | None) -> dict[str, Any]:
    """Train as a user does: the TrainingArguments come first, so that ZeRO-3 loads the model in pieces."""
    start_deepspeed()
    from transformers import LlavaForConditionalGeneration, Trainer

    class Recorder(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            modes.append(self.dualspeed.metrics()["mode"])
            return loss

    modes: list[str] = []
    settings = {
        **SETTINGS, "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
    }  # fmt: skip
    arguments = training_arguments(
        out, max_steps=4, save_strategy="steps", save_steps=2, deepspeed=settings, optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = trimtab.with_dualspeed(Recorder)(
        model=LlavaForConditionalGeneration.from_pretrained(start), args=arguments, train_dataset=TinyRows(),
        data_collator=collate, dualspeed=DualSpeedConfig(keep_ratio=0.2, slow_ratio=0.5, seed=2),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "end"))
    return {"modes": modes, "micro_step": trainer.dualspeed.micro_step}


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_saves_an_ordinary_checkpoint_and_resumes(tmp_path: Path, stage: int) -> None:
    from safetensors.torch import load_file

    start, out = tmp_path / "start", tmp_path / "out"
    tiny_llava().save_pretrained(start)
    whole = on_ranks(tmp_path / "a", train_with_trainer, stage, out, start, None, group=False)
    again = on_ranks(
        tmp_path / "b", train_with_trainer, stage, tmp_path / "again", start, str(out / "checkpoint-2"), group=False
    )
    for rank in (*whole, *again):
        assert "error" not in rank, rank.get("trace")
    assert whole[0]["modes"] == whole[1]["modes"]
    assert set(whole[0]["modes"]) == {"fast", "slow"}
    assert again[0] == {"modes": whole[0]["modes"][2:], "micro_step": 4}
    # Under ZeRO-3 transformers writes LLaVA's weights under other names, also without DualSpeed; it reads them too.
    paths = (start, out / "end", tmp_path / "again" / "end")
    stock, first, second = (read_weights(path) for path in paths)
    assert load_file(out / "end" / "model.safetensors").keys().isdisjoint({"dualspeed_isolator.rows"})
    assert max(float((first[key] - stock[key]).abs().max()) for key in stock) > 1e-4
    # The resumed run repeats the last two steps of the first on the CPU, from the same float32 numbers.
    assert all(torch.equal(first[key], second[key]) for key in stock)
    isolators = [load_file(path / "end" / "dualspeed" / "isolator.safetensors") for path in (out, tmp_path / "again")]
    assert isolators[0]["rows"].shape == (4, 32)
    assert torch.equal(isolators[0]["rows"], isolators[1]["rows"])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint as users do, and see that it has every weight and no other."""
    from transformers import LlavaForConditionalGeneration

    model, told = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return dict(model.state_dict())


# Without deepspeed ------------------------------------------------------------------------------------------------


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Any], int | None]]:
    """A stand-in for deepspeed, and what it was asked to gather."""
    log: list[tuple[str, list[Any], int | None]] = []

    @contextmanager
    def gathered(parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
        log.append(("in", parameters, modifier_rank))
        full, parameters[0].data = parameters[0].data, parameters[0].complete
        yield
        parameters[0].complete = parameters[0].data if modifier_rank is not None else parameters[0].complete
        parameters[0].data = full
        log.append(("out", parameters, modifier_rank))

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=gathered)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    return log


def take_apart(parameter: Any) -> None:
    """Leave a parameter as ZeRO-3 does: empty, with its values elsewhere."""
    parameter.ds_id, parameter.complete = 0, parameter.data.clone()
    parameter.data = torch.empty(0)


def test_isolator_file_is_gathered_and_spread(tmp_path: Path, gathers: list[Any]) -> None:
    isolator = ModeIsolator(3, 8, 0, torch.device("cpu"), torch.float32)
    values = isolator.rows.detach().clone()
    take_apart(isolator.rows)
    isolator.save(tmp_path)
    isolator.rows.complete = torch.zeros(3, 8)
    isolator.load(tmp_path)
    assert torch.equal(isolator.rows.complete, values)
    assert [(kind, rank) for kind, _, rank in gathers] == [("in", None), ("out", None), ("in", 0), ("out", 0)]
    assert all(parameters[0] is isolator.rows for _, parameters, _ in gathers)


class Packing(torch.nn.Module):
    """A module that uses a parameter of its own outside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.newline = torch.nn.Parameter(torch.arange(1.0, 4.0))
        self.fallen = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self) -> Tensor:
        raise AssertionError("the forward itself must not run")

    def pack(self) -> dict[str, Any]:
        return {"blocks": [self.newline * 2, self.newline[None] * 3], "wide": self.fallen * 4, "count": 2}


def test_a_call_inside_runs_the_hooks_and_lets_one_tensor_out() -> None:
    module, seen = Packing(), []
    module.newline.ds_id = 0  # type: ignore[attr-defined]
    module.register_forward_pre_hook(lambda _, args: seen.append("gather"))
    module.register_forward_hook(lambda _, args, output: seen.append(output))
    found, expected = call_inside(module, module.pack), module.pack()
    assert seen[0] == "gather"
    assert isinstance(seen[1], Tensor)
    assert seen[1].requires_grad
    assert "forward" not in vars(module)
    assert found["count"] == 2
    tensors, wanted = ([*one["blocks"], one["wide"]] for one in (found, expected))
    for one, other in zip(tensors, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    sum(one.sum() for one in tensors).backward()
    assert module.newline.grad is not None
    assert torch.equal(module.newline.grad, torch.full((3,), 5.0))


def test_a_call_inside_is_plain_without_zero_and_puts_the_forward_back_after_an_error() -> None:
    module, seen = Packing(), []
    module.register_forward_pre_hook(lambda _, args: seen.append("gather"))
    assert call_inside(module, lambda: 3) == 3
    assert seen == []
    module.newline.ds_id = 0  # type: ignore[attr-defined]
    own = module.forward = lambda: torch.zeros(1)  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        call_inside(module, lambda: 1 / 0)
    assert vars(module)["forward"] is own


def test_zero_2_and_3_need_all_processes_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.dualspeed.ranks.process_count", lambda: 2)
    for mark in ("ds_id", "_hp_mapping"):
        model = torch.nn.Linear(2, 2)
        assert not needs_lockstep(model)
        setattr(model.bias, mark, None)
        assert needs_lockstep(model)
    monkeypatch.setattr("trimtab.dualspeed.ranks.process_count", lambda: 1)
    assert not needs_lockstep(model)
