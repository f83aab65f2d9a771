"""What a user's own Trainer class, optimizer, checkpoints and arguments could do to a run without anybody noticing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dualspeed.common import SUM_ORDER, training_arguments
from tests.tiny import FAMILIES, Batch, TinyRows, collate, multimodal_types, pad_rows, tiny_llava, weights
from transformers import LlavaForConditionalGeneration, Trainer

from trimtab import DualSpeedCallback, with_dualspeed
from trimtab.dualspeed.trainer import load_converted
from trimtab.errors import DataError, SettingError, TrimtabWarning, WrongOrderError

SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.4, "seed": 11, "isolator_tokens": 2}


def by_subclass(out: Path, kind: Any = Trainer, model: Any = None, **changes: Any) -> tuple[Any, Any]:
    """Return a Trainer with DualSpeed, and its handle; `changes` are arguments of the Trainer or of its settings."""
    own = {name: changes.pop(name) for name in ("optimizers", "eval_dataset") if name in changes}
    settings = {**SETTINGS, **changes.pop("dualspeed", {})}
    trainer = with_dualspeed(kind)(
        model=tiny_llava() if model is None else model, args=training_arguments(out, **{"max_steps": 2, **changes}),
        train_dataset=TinyRows(), data_collator=collate, dualspeed=settings, **own,
    )  # fmt: skip
    return trainer, trainer.dualspeed


def by_callback(out: Path, model: Any = None, **changes: Any) -> tuple[Any, Any]:
    own = {name: changes.pop(name) for name in ("optimizers",) if name in changes}
    callback = DualSpeedCallback(SETTINGS)
    trainer = Trainer(
        model=tiny_llava() if model is None else model, args=training_arguments(out, **{"max_steps": 2, **changes}),
        train_dataset=TinyRows(), data_collator=collate, callbacks=[callback], **own,
    )  # fmt: skip
    return trainer, callback.handle


ways = pytest.mark.parametrize("make", [by_subclass, by_callback])

# the optimizer -------------------------------------------------------------------------------------------------------


@ways
def test_an_optimizer_without_the_isolator_is_refused(make: Any, tmp_path: Path) -> None:
    model = tiny_llava()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer, handle = make(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(SettingError, match=r"(?s)optimizer does not hold the isolator.*optimizer_cls_and_kwargs"):
        trainer.train()
    start = handle.isolator.rows.detach().clone()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.05)  # as the message says
    trainer.train()
    assert not torch.equal(handle.isolator.rows, start)


def test_an_isolator_that_is_not_there_needs_no_place_in_the_optimizer(tmp_path: Path) -> None:
    model = tiny_llava()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer, _ = by_subclass(
        tmp_path, model=model, optimizers=(optimizer, None), dualspeed={"isolator_tokens": 0}, max_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 1


# losses of the user's own --------------------------------------------------------------------------------------------


class Tripling(Trainer):
    """A user's class with a loss of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        return (3 * found[0], found[1]) if isinstance(found, tuple) else 3 * found


def test_a_compute_loss_that_will_not_be_called_is_told(tmp_path: Path) -> None:
    with pytest.warns(TrimtabWarning, match=r"Tripling\.compute_loss is not called in training steps"):
        trainer, _ = by_subclass(tmp_path / "ours", kind=Tripling, eval_dataset=TinyRows(4), max_steps=1)
    theirs, _ = by_subclass(tmp_path / "theirs", eval_dataset=TinyRows(4), max_steps=1)
    first, second = (one.evaluate()["eval_loss"] for one in (trainer, theirs))
    assert first == pytest.approx(3 * second, rel=1e-6)  # float32
    for one in (trainer, theirs):
        one.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, theirs)]
    assert losses[0] == losses[1], "training steps take DualSpeed's loss"


def test_a_class_derived_after_dualspeed_calls_what_it_overrides(tmp_path: Path) -> None:
    """No warning (they are errors here), since this `compute_loss` is the one that is called."""

    class Counting(with_dualspeed(Trainer)):  # type: ignore[misc]
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().compute_loss(*args, **kwargs)

    trainer, _ = by_subclass(tmp_path, kind=Counting)
    trainer.train()
    assert trainer.calls == 2


def test_a_class_with_dualspeed_is_not_dressed_twice() -> None:
    assert with_dualspeed(with_dualspeed(Trainer)) is with_dualspeed(Trainer)


# after detach --------------------------------------------------------------------------------------------------------


def test_after_detach_a_trainer_saves_and_evaluates_as_without_dualspeed(tmp_path: Path) -> None:
    trainer, handle = by_subclass(tmp_path / "run", eval_dataset=TinyRows(4))
    trainer.train()
    handle.detach()
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "dualspeed").exists()
    plain = Trainer(model=trainer.model, args=trainer.args, data_collator=collate, eval_dataset=TinyRows(4))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@ways
def test_after_detach_a_trainer_trains_no_more(make: Any, tmp_path: Path) -> None:
    trainer, handle = make(tmp_path)
    handle.detach()
    with pytest.raises(WrongOrderError, match=r"was detached.*new Trainer"):
        trainer.train()


# checkpoints ---------------------------------------------------------------------------------------------------------


def test_resuming_from_a_plain_run_says_how_to_go_on_from_its_weights(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 2}
    Trainer(
        model=tiny_llava(), args=training_arguments(tmp_path, max_steps=2, **arguments), train_dataset=TinyRows(),
        data_collator=collate,
    ).train()  # fmt: skip
    trainer, _ = by_subclass(tmp_path, max_steps=4, **arguments)
    with pytest.raises(DataError, match=r"(?s)run without DualSpeed.*from_pretrained.*without resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def mixed_llava(seed: int = 0) -> Any:
    """A frozen tower in bfloat16 beside float32, so that ``model.dtype`` tells of the tower only."""
    model = tiny_llava(seed)
    model.model.vision_tower.to(torch.bfloat16).requires_grad_(False)
    return model


def test_weights_of_several_types_come_back_unrounded(tmp_path: Path) -> None:
    saved, other = mixed_llava(), mixed_llava(seed=1)
    saved.save_pretrained(tmp_path)
    assert other.dtype == torch.bfloat16, "the type that would round the others"
    assert load_converted(other, tmp_path)
    for key, value in weights(saved).items():
        found = other.state_dict()[key]
        assert found.dtype == value.dtype
        assert torch.equal(found, value), key


class OnlyByTheTrainer(type(FAMILIES["qwen3_vl"].build_model())):  # type: ignore[misc]
    """A user's class that cannot be loaded by itself; its weights have the stored names."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a checkpoint with the model's own names is the Trainer's to load")


def test_a_checkpoint_with_the_names_of_the_model_is_left_to_the_trainer(tmp_path: Path) -> None:
    model = FAMILIES["qwen3_vl"].build_model()
    model.__class__ = OnlyByTheTrainer
    model.save_pretrained(tmp_path)
    assert not load_converted(model, tmp_path)
    other = tiny_llava()
    other.save_pretrained(tmp_path / "llava")
    assert load_converted(other, tmp_path / "llava"), "LLaVA is stored under older names"


def test_the_best_checkpoint_brings_its_isolator(tmp_path: Path) -> None:
    trainer, handle = by_subclass(
        tmp_path, eval_dataset=TinyRows(4, seed=5), max_steps=4, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2", "the loss falls, so the largest is not that of the end"
    rows, last = (
        load_file(tmp_path / name / "dualspeed" / "isolator.safetensors")["rows"]
        for name in ("checkpoint-2", "checkpoint-4")
    )
    assert torch.equal(handle.isolator.rows.detach(), rows)
    assert not torch.equal(rows, last)
    stored = LlavaForConditionalGeneration.from_pretrained(best).state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in weights(trainer.model).items() if key in stored)


# accumulation --------------------------------------------------------------------------------------------------------


def qwen_rows(model: Any) -> list[Batch]:
    """Rows with one image each and different numbers of labels."""
    family = FAMILIES["qwen3_vl"]
    return [family.make_batch(model, [1], text_lengths=[2 + n % 4], seed=n, turns=1 + n % 3) for n in range(24)]


def qwen_collate(rows: list[Batch]) -> Batch:
    batch = pad_rows([(row["input_ids"][0], row["labels"][0]) for row in rows])
    visual = {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_thw")}
    return {**batch, **visual, "mm_token_type_ids": multimodal_types(batch["input_ids"])}


@pytest.mark.parametrize("slow_ratio", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore:slow_ratio=0:trimtab.errors.TrimtabWarning")  # the fast mode alone is looked at
def test_micro_batches_weigh_by_their_labels_where_the_models_own_loss_does_not_count(
    tmp_path: Path, slow_ratio: float
) -> None:
    """Qwen3-VL says accepts_loss_kwargs=False, and the Trainer then gives each micro-batch the same weight."""
    found = []
    for size, steps in ((8, 1), (2, 4)):
        model = FAMILIES["qwen3_vl"].build_model().train()
        assert model.accepts_loss_kwargs is False
        arguments = training_arguments(
            tmp_path, max_steps=2, optim="sgd", learning_rate=0.05, max_grad_norm=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        with_dualspeed(Trainer)(
            model=model, args=arguments, train_dataset=qwen_rows(model), data_collator=qwen_collate,
            dualspeed={**SETTINGS, "keep_ratio": 0.25, "slow_ratio": slow_ratio},
        ).train()  # fmt: skip
        found.append(weights(model))
    for key, value in found[1].items():
        torch.testing.assert_close(value, found[0][key], **SUM_ORDER)


def test_the_loss_per_label_is_reported_where_nothing_is_pruned(tmp_path: Path) -> None:
    """Without pruning the model computes the loss and divides it by the labels of the whole update."""
    nothing = {"keep_ratio": 1.0, "isolator_tokens": 0, "slow_ratio": 0.0}
    trainer, handle = by_subclass(tmp_path, dualspeed=nothing, max_steps=1, gradient_accumulation_steps=4)
    model = tiny_llava()
    batches: list[Batch] = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(dict(kwargs)), with_kwargs=True)
    trainer.train()
    assert len(batches) == 4
    batches[-1].pop("num_items_in_batch")
    with torch.no_grad():
        expected = model(**batches[-1]).loss
    torch.testing.assert_close(torch.tensor(handle.metrics()["ce"]), expected, **SUM_ORDER)
