"""`DualSpeedCallback`: the run is that of `with_dualspeed`, and what a callback cannot do is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dualspeed.common import KillAt, KilledError, training_arguments
from tests.tiny import IMAGE, TinyRows, collate, tiny_llava, weights
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback

import trimtab
from trimtab import DualSpeedCallback, DualSpeedConfig
from trimtab.errors import DataError, OutputError, SettingError, TrimtabWarning, WrongOrderError

STEPS = 6
SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.4, "seed": 11, "schedule": "bernoulli"}


def placeholders_supervised(items: Any) -> Any:
    """Collate as a library would that leaves the placeholders in the labels."""
    batch = collate(items)
    batch["labels"] = batch["labels"].where(batch["input_ids"] != IMAGE, torch.tensor(IMAGE))
    return batch


def arguments(out: Path, **changes: Any) -> Any:
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    return training_arguments(out, **{**settings, **changes})


def with_callback(
    out: Path, kind: Any = Trainer, callbacks: Any = (), model: Any = None, collator: Any = collate, resume: Any = None,
    rows: Any = None, **changes: Any,
) -> Any:  # fmt: skip
    settings = {**SETTINGS, **changes.pop("dualspeed", {})}
    callback = DualSpeedCallback(settings, resume_from=resume)
    trainer = kind(
        model=tiny_llava() if model is None else model, args=arguments(out, **changes), train_dataset=TinyRows(),
        eval_dataset=rows, data_collator=collator, callbacks=[callback, *callbacks],
    )  # fmt: skip
    trainer.callback = callback
    return trainer


def with_subclass(out: Path, collator: Any = collate, dualspeed: Any = None, **changes: Any) -> Any:
    return trimtab.with_dualspeed(Trainer)(
        model=tiny_llava(), args=arguments(out, **changes), train_dataset=TinyRows(), data_collator=collator,
        dualspeed=DualSpeedConfig(**{**SETTINGS, **(dualspeed or {})}),
    )  # fmt: skip


def plain_trainer(out: Path, **changes: Any) -> Any:
    return Trainer(model=tiny_llava(), args=arguments(out, **changes), train_dataset=TinyRows(), data_collator=collate)


OF_THE_CALL = ("runtime", "per_second", "total_flos", "train_loss")
"""What tells of one call of ``train`` rather than of the run."""


def history(trainer: Any) -> list[dict[str, Any]]:
    entries = trainer.state.log_history
    return [{key: value for key, value in entry.items() if not key.endswith(OF_THE_CALL)} for entry in entries]


def same_run(ours: Any, handle: Any, theirs: Any, other: Any) -> None:
    expected = weights(theirs.model)
    assert weights(ours.model).keys() == expected.keys()
    for key, value in weights(ours.model).items():
        assert torch.equal(value, expected[key]), key
    assert history(ours) == history(theirs)
    assert handle.state_dict() == other.state_dict()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = with_callback(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def test_the_run_is_that_of_with_dualspeed_bit_for_bit(whole_run: Any, tmp_path: Path) -> None:
    theirs = with_subclass(tmp_path)
    theirs.train()
    same_run(whole_run, whole_run.callback.handle, theirs, theirs.dualspeed)
    metrics = whole_run.callback.handle.metrics()
    assert metrics["steps_fast"]
    assert metrics["steps_slow"]
    assert sum("visual_tokens_kept" in entry for entry in whole_run.state.log_history) == STEPS


@pytest.mark.parametrize("dualspeed", [{"schedule": "annealed"}, {"schedule": "annealed", "schedule_unit": "micro"}])
def test_an_annealed_schedule_learns_the_length_of_the_run(tmp_path: Path, dualspeed: dict[str, Any]) -> None:
    ours = with_callback(tmp_path / "ours", dualspeed=dualspeed, save_strategy="no")
    theirs = with_subclass(tmp_path / "theirs", dualspeed=dualspeed, save_strategy="no")
    for trainer in (ours, theirs):
        trainer.train()
    same_run(ours, ours.callback.handle, theirs, theirs.dualspeed)
    micro = dualspeed.get("schedule_unit") == "micro"
    assert ours.callback.handle.config.total_steps == STEPS * (2 if micro else 1)


def test_labels_on_placeholders_are_masked_before_they_are_counted(tmp_path: Path) -> None:
    """With warnings as errors the hook would complain of a batch that still has them."""
    ours = with_callback(tmp_path / "ours", collator=placeholders_supervised, save_strategy="no", max_steps=3)
    theirs = with_subclass(tmp_path / "theirs", save_strategy="no", max_steps=3)
    for trainer in (ours, theirs):
        trainer.train()
    same_run(ours, ours.callback.handle, theirs, theirs.dualspeed)
    assert IMAGE in placeholders_supervised([TinyRows()[0]])["labels"], "or this would show nothing"


def test_a_second_training_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    trainer = with_callback(tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.train()
    assert trainer.callback.handle.micro_step == 8


@pytest.mark.parametrize("bf16", [False, True])
def test_an_interrupted_run_is_resumed_bit_for_bit(whole_run: Any, tmp_path: Path, bf16: bool) -> None:
    whole = whole_run
    if bf16:
        whole = with_callback(tmp_path / "whole", bf16=True)
        whole.train()
    with pytest.raises(KilledError):
        with_callback(tmp_path, callbacks=[KillAt(5)], bf16=bf16).train()
    resumed = with_callback(tmp_path, bf16=bf16)
    resumed.train(resume_from_checkpoint=True)
    same_run(resumed, resumed.callback.handle, whole, whole.callback.handle)


def test_a_checkpoint_elsewhere_must_be_named(whole_run: Any, tmp_path: Path) -> None:
    elsewhere = str(Path(whole_run.args.output_dir) / "checkpoint-4")
    with pytest.raises(OutputError, match="resume_from="):
        with_callback(tmp_path / "a").train(resume_from_checkpoint=elsewhere)
    with pytest.raises(SettingError, match="checkpoint of step 4"):
        with_callback(tmp_path / "b", resume=elsewhere.replace("-4", "-2")).train(resume_from_checkpoint=elsewhere)
    for place, changes in (("c", {"resume": elsewhere}), ("d", {"resume_from_checkpoint": elsewhere})):
        resumed = with_callback(tmp_path / place, **changes)
        resumed.train(resume_from_checkpoint=elsewhere)
        same_run(resumed, resumed.callback.handle, whole_run, whole_run.callback.handle)


def test_another_run_with_a_checkpoint_of_the_same_step_is_not_taken(whole_run: Any, tmp_path: Path) -> None:
    with_callback(tmp_path, max_steps=4, dualspeed={"seed": 12}).train()
    elsewhere = str(Path(whole_run.args.output_dir) / "checkpoint-4")
    with pytest.raises(OutputError, match="resume_from="):
        with_callback(tmp_path).train(resume_from_checkpoint=elsewhere)


def test_a_checkpoint_without_side_files_cannot_be_resumed(tmp_path: Path) -> None:
    with_callback(tmp_path, max_steps=2).train()
    shutil.rmtree(tmp_path / "checkpoint-2" / "dualspeed")
    with pytest.raises(DataError, match=r"dualspeed\.json"):
        with_callback(tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_are_ordinary_and_carry_the_side_files(whole_run: Any) -> None:
    out = Path(whole_run.args.output_dir)
    for folder in (out / "checkpoint-2", out / "checkpoint-4", out / "checkpoint-6"):
        _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        stored = json.loads((folder / "dualspeed" / "dualspeed.json").read_text())
        assert stored["micro_step"] == 2 * int(folder.name.split("-")[1])
    assert not torch.equal(*(load_file(out / f"checkpoint-{n}/dualspeed/isolator.safetensors")["rows"] for n in (2, 4)))
    final = load_file(out / "dualspeed" / "isolator.safetensors")["rows"]
    assert torch.equal(final, whole_run.callback.handle.isolator.rows.detach())


@pytest.mark.parametrize("kind", ["callback", "subclass"])
def test_the_files_are_those_that_a_plain_trainer_writes(kind: str, tmp_path: Path) -> None:
    arms = {"ours": with_callback if kind == "callback" else with_subclass, "plain": plain_trainer}
    for name, make in arms.items():
        trainer = make(tmp_path / f"run-{name}", max_steps=1, save_strategy="no")
        trainer.train()
        trainer.save_model(str(tmp_path / name))
    ours, plain = ({path.name for path in (tmp_path / name).iterdir()} for name in arms)
    assert ours - {"dualspeed"} == plain
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    stored = [load_file(tmp_path / name / "model.safetensors") for name in arms]
    assert [(key, value.shape, value.dtype) for key, value in stored[0].items()] == [
        (key, value.shape, value.dtype) for key, value in stored[1].items()
    ]


def test_the_best_checkpoint_brings_its_isolator(tmp_path: Path) -> None:
    trainer = with_callback(
        tmp_path, rows=TinyRows(4, seed=5), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}", "the loss falls, so the largest is not that of the end"
    rows = load_file(best / "dualspeed" / "isolator.safetensors")["rows"]
    assert torch.equal(trainer.callback.handle.isolator.rows.detach(), rows)
    stored = LlavaForConditionalGeneration.from_pretrained(best).state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in weights(trainer.model).items() if key in stored)


def test_a_callback_before_the_trackers_gives_them_the_metrics(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = with_callback(tmp_path, max_steps=1, save_strategy="no")
    trainer.callback_handler.callbacks.insert(0, Tracker())  # where a Trainer puts those of report_to
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(DualSpeedCallback))
    trainer.train()
    assert "visual_tokens_kept" in seen[0]


# what is refused -------------------------------------------------------------------------------------------------


class OwnLoss(Trainer):
    """A Trainer that computes its loss from the hidden states."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
        scores = self.model.lm_head(states)
        return functional.cross_entropy(scores.flatten(0, 1), torch.zeros(scores.shape[:2]).long().flatten())


def test_a_trainer_that_ignores_the_loss_is_refused_before_its_first_update(tmp_path: Path) -> None:
    trainer = with_callback(tmp_path, kind=OwnLoss)
    before = weights(trainer.model)
    with pytest.raises(SettingError, match=r"ignores outputs\.loss.*with_dualspeed"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in weights(trainer.model).items())


# TRL 1.16 itself sets the name that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_trainer_of_trl_is_refused_with_the_way_that_works(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(SettingError, match=r"with_dualspeed\(SFTTrainer\)"):
        DualSpeedCallback(SETTINGS).on_init_end(args, None, None, model=tiny_llava())


def test_arguments_that_would_not_do_what_they_say_are_refused(tmp_path: Path) -> None:
    model = tiny_llava()
    with pytest.raises(SettingError, match="label_smoothing_factor"):
        with_callback(tmp_path, model=model, label_smoothing_factor=0.1)
    trimtab.attach(model, DualSpeedConfig()).detach()  # the refusal has left nothing on the model


def test_a_model_made_anew_is_refused(tmp_path: Path) -> None:
    made = {"args": arguments(tmp_path), "train_dataset": TinyRows(), "data_collator": collate}
    trainer = Trainer(model_init=lambda: tiny_llava(), callbacks=[DualSpeedCallback(SETTINGS)], **made)
    with pytest.raises(SettingError, match="model_init"):
        trainer.train()
    with pytest.raises(SettingError, match="model_init"):
        trimtab.with_dualspeed(Trainer)(model_init=lambda: tiny_llava(), dualspeed=SETTINGS, **made)


def test_a_callback_that_comes_late_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    trainer.add_callback(DualSpeedCallback(SETTINGS))
    with pytest.raises(WrongOrderError, match=r"callbacks=\[\.\.\.\]"):
        trainer.train()


def test_a_callback_serves_one_trainer(whole_run: Any, tmp_path: Path) -> None:
    with pytest.raises(WrongOrderError, match="another Trainer"):
        Trainer(model=tiny_llava(), args=arguments(tmp_path), callbacks=[whole_run.callback])


@pytest.mark.parametrize("config", [None, 0.1, "divprune"])
def test_the_callback_needs_settings(config: Any) -> None:
    with pytest.raises(SettingError, match=r"DualSpeedCallback\.config"):
        DualSpeedCallback(config)


def test_a_checkpoint_in_another_place_is_told(whole_run: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.warns(TrimtabWarning, match="cannot be resumed"):
        whole_run.callback.on_save(args, whole_run.state, whole_run.control)
    assert list(tmp_path.iterdir()) == []


# several processes --------------------------------------------------------------------------------------------------


def run_on_a_rank(out: Path, seeds: list[int]) -> dict[str, Any]:
    """Train with the callback, once whole and once from a checkpoint in the middle."""
    rank = int(os.environ["RANK"])
    settings = {"dualspeed": {"seed": seeds[rank]}, "ddp_backend": "gloo"}
    whole = with_callback(out, model=frozen_tower(), **settings)
    whole.train()
    resumed = with_callback(out, model=frozen_tower(), **settings)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    return {
        name: {**weights(trainer.model), "rows": trainer.callback.handle.isolator.rows.detach().clone()}
        for name, trainer in (("whole", whole), ("resumed", resumed))
    }


def frozen_tower() -> Any:
    """The last layer of the tower has no gradient, which DDP does not allow."""
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    return model


@pytest.mark.slow
def test_two_processes_resume_as_one_model(tmp_path: Path) -> None:
    from tests.dualspeed.ranks import on_ranks

    first, second = on_ranks(tmp_path, run_on_a_rank, tmp_path / "out", [11, 11], group=False)
    assert "error" not in first, first
    stored = load_file(tmp_path / "out" / "dualspeed" / "isolator.safetensors")["rows"]
    assert torch.equal(first["whole"]["rows"], stored)
    for other in (first["resumed"], second["whole"], second["resumed"]):
        for key, value in first["whole"].items():
            assert torch.equal(other[key], value), key


@pytest.mark.slow
def test_two_processes_with_other_settings_stop_before_the_first_step(tmp_path: Path) -> None:
    from tests.dualspeed.ranks import on_ranks

    found = on_ranks(tmp_path, run_on_a_rank, tmp_path / "out", [11, 12], group=False)
    for one in found:
        assert "RankDisagreementError" in one["kind"], one
