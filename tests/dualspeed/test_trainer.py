"""`with_dualspeed(Trainer)`: logs, checkpoints, resume, saving."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.dualspeed.common import KillAt, KilledError, training_arguments
from tests.tiny import FAMILIES, WIDTH, TinyRows, collate, tiny_llava, weights
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback

import trimtab
from trimtab import DualSpeedConfig

STEPS = 10
SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.4, "seed": 11, "schedule": "bernoulli"}


class Recorder(Trainer):
    """A Trainer that keeps the mode of every forward call; also shows that any Trainer class can be dressed."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not hasattr(self, "modes"):
            self.modes: list[tuple[int, str]] = []
        loss = super().training_step(*args, **kwargs)
        self.modes.append((self.state.global_step, self.dualspeed.metrics()["mode"]))
        return loss


def make_trainer(out: Path, callbacks: list[TrainerCallback] | None = None, **changes: Any) -> Any:
    settings = {**SETTINGS, **changes.pop("dualspeed", {})}
    eval_dataset = changes.pop("eval_dataset", None)
    arguments = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **changes,
    }  # fmt: skip
    return trimtab.with_dualspeed(Recorder)(
        model=tiny_llava(),
        args=training_arguments(out, **arguments),
        train_dataset=TinyRows(),
        eval_dataset=eval_dataset,
        data_collator=collate,
        callbacks=callbacks,
        dualspeed=DualSpeedConfig(**settings),
    )


def same_weights(ours: Any, theirs: Any) -> None:
    expected = weights(theirs.model)
    assert weights(ours.model).keys() == expected.keys()
    for key, value in weights(ours.model).items():
        assert torch.equal(value, expected[key]), key


def logged_losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


KILLED_AT = random.Random(20260).sample(range(2, STEPS), 3)
"""Three steps, drawn once; some lie on a checkpoint, some between two."""


@pytest.mark.parametrize("step", KILLED_AT)
def test_killed_and_resumed_is_never_killed(whole_run: Any, tmp_path: Path, step: int) -> None:
    broken = make_trainer(tmp_path, [KillAt(step)])
    with pytest.raises(KilledError):
        broken.train()
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    same_weights(resumed, whole_run)
    assert torch.equal(resumed.dualspeed.isolator.rows, whole_run.dualspeed.isolator.rows)
    assert resumed.dualspeed.micro_step == whole_run.dualspeed.micro_step == 2 * STEPS
    first = step - step % 2
    assert resumed.modes == [entry for entry in whole_run.modes if entry[0] >= first]
    assert logged_losses(resumed) == logged_losses(whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["optimizer", "micro"])
@pytest.mark.parametrize("schedule", ["stratified", "annealed"])
def test_every_schedule_resumes(tmp_path: Path, unit: str, schedule: str) -> None:
    chosen = {"dualspeed": {"schedule": schedule, "schedule_unit": unit}}
    whole = make_trainer(tmp_path / "whole", **chosen)
    whole.train()
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "broken", [KillAt(5)], **chosen).train()
    resumed = make_trainer(tmp_path / "broken", **chosen)
    resumed.train(resume_from_checkpoint=True)
    same_weights(resumed, whole)
    assert torch.equal(resumed.dualspeed.isolator.rows, whole.dualspeed.isolator.rows)
    assert resumed.modes == [entry for entry in whole.modes if entry[0] >= 4]


@pytest.mark.slow
def test_a_process_killed_without_warning_resumes(whole_run: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of a step: nothing of the process can tidy up."""
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "import tests.conftest\n"
        "from tests.dualspeed.test_trainer import KillAt, make_trainer\n"
        "class Hard(KillAt):\n"
        "    def on_substep_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"make_trainer(Path({str(tmp_path)!r}), [Hard(7)]).train()\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    same_weights(resumed, whole_run)
    assert torch.equal(resumed.dualspeed.isolator.rows, whole_run.dualspeed.isolator.rows)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).train()
    other = make_trainer(tmp_path, max_steps=4, dualspeed={"isolator_tokens": 6})
    with pytest.raises(ValueError, match=r"isolator"):
        other.train(resume_from_checkpoint=True)


def test_modes_follow_the_schedule(whole_run: Any) -> None:
    from trimtab.dualspeed.schedule import mode_of_step

    assert len(whole_run.modes) == 2 * STEPS
    assert {mode for _, mode in whole_run.modes} == {"fast", "slow"}
    for step, mode in whole_run.modes:
        assert mode == mode_of_step(step, kind="bernoulli", slow_ratio=0.4, seed=11)


def test_micro_unit_draws_per_forward_call(tmp_path: Path) -> None:
    from trimtab.dualspeed.schedule import mode_of_step

    trainer = make_trainer(tmp_path, max_steps=4, dualspeed={"schedule_unit": "micro"})
    trainer.train()
    drawn = [mode_of_step(micro, kind="bernoulli", slow_ratio=0.4, seed=11) for micro in range(8)]
    assert [mode for _, mode in trainer.modes] == drawn
    assert drawn[::2] != drawn[1::2], "with this seed two micro-batches of one step differ"


def test_logs_carry_the_metrics(whole_run: Any) -> None:
    steps = [entry for entry in whole_run.state.log_history if "loss" in entry]
    assert len(steps) == STEPS
    for name in ("visual_tokens_full", "visual_tokens_kept", "ce", "steps_fast", "steps_slow"):
        assert all(any(key.endswith(name) for key in entry) for entry in steps), name
    assert json.dumps(steps), "the Trainer writes its state as JSON"


def test_the_counts_of_steps_add_up(whole_run: Any) -> None:
    metrics = whole_run.dualspeed.metrics()
    slow = sum(mode == "slow" for _, mode in whole_run.modes)
    assert metrics["steps_slow"] == slow
    assert metrics["steps_fast"] == 2 * STEPS - slow
    assert metrics["ce_fast"] > 0
    assert metrics["ce_slow"] > 0


def test_checkpoints_carry_the_side_files(whole_run: Any) -> None:
    folders = sorted(Path(whole_run.args.output_dir).glob("checkpoint-*"), key=lambda f: int(f.name.split("-")[1]))
    assert [folder.name for folder in folders] == [f"checkpoint-{step}" for step in range(2, STEPS + 1, 2)]
    for folder in folders:
        assert {file.name for file in (folder / "dualspeed").iterdir()} == {
            "dualspeed.json", "isolator.safetensors",
        }  # fmt: skip
        tensors = load_file(folder / "model.safetensors")
        assert not any("isolator" in key for key in tensors)
        rows = next(iter(load_file(folder / "dualspeed" / "isolator.safetensors").values()))
        assert rows.shape == (4, WIDTH)


def test_save_model_writes_an_ordinary_checkpoint(whole_run: Any, tmp_path: Path) -> None:
    whole_run.save_model(str(tmp_path))
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = weights(whole_run.model)
    stored = again.state_dict()
    assert stored.keys() == tiny_llava().state_dict().keys()
    for key, value in stored.items():
        assert torch.equal(value, trained[key]), key
    saved = load_file(tmp_path / "dualspeed" / "isolator.safetensors")
    assert torch.equal(next(iter(saved.values())), whole_run.dualspeed.isolator.rows.detach())
    settings = json.loads((tmp_path / "dualspeed" / "dualspeed.json").read_text())
    assert "divprune" in json.dumps(settings)
    batch = FAMILIES["llava"].make_batch(again, (1, 0, 2))
    with torch.no_grad():
        whole_run.model.eval()
        assert torch.equal(again.eval()(**batch).logits, whole_run.model(**batch).logits)
        whole_run.model.train()


def test_the_isolator_is_trained_and_saved_values_can_start_the_next_stage(whole_run: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        fresh = trimtab.attach(tiny_llava(), DualSpeedConfig(**SETTINGS))
    rows = whole_run.dualspeed.isolator.rows.detach()
    assert not torch.equal(rows, fresh.isolator.rows.detach())
    whole_run.dualspeed.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "isolator.safetensors"):
        second = trimtab.attach(tiny_llava(), DualSpeedConfig(**SETTINGS, isolator_from=str(source)))
        assert torch.equal(second.isolator.rows.detach(), rows)


def test_a_frozen_language_model_takes_fast_steps_only(tmp_path: Path) -> None:
    model = tiny_llava()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    trainer = trimtab.with_dualspeed(Recorder)(
        model=model, args=training_arguments(tmp_path, max_steps=6), train_dataset=TinyRows(), data_collator=collate,
        dualspeed=DualSpeedConfig(**{**SETTINGS, "slow_ratio": 0.9}),
    )  # fmt: skip
    before, start = weights(model), trainer.dualspeed.isolator.rows.detach().clone()
    trainer.train()
    assert [mode for _, mode in trainer.modes] == ["fast"] * 6
    changed = {key for key, value in weights(model).items() if key in before and not torch.equal(before[key], value)}
    assert changed
    assert all("multi_modal_projector" in key or "isolator" in key for key in changed)
    assert not torch.equal(trainer.dualspeed.isolator.rows, start)


def test_the_newline_of_llava_next_does_not_count_as_language_model() -> None:
    model = FAMILIES["llava_next"].build_model().train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.model.image_newline.requires_grad_(True)
    handle = trimtab.attach(model, DualSpeedConfig(slow_ratio=1.0))
    assert handle.next_mode() == "fast"
    model.model.language_model.layers[0].mlp.requires_grad_(True)
    assert handle.next_mode() == "slow"


def test_evaluation_in_between_changes_nothing(whole_run: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=TinyRows(4, seed=5), eval_strategy="steps", eval_steps=3)
    trainer.train()
    same_weights(trainer, whole_run)
    plain = Trainer(model=trainer.model, args=trainer.args, data_collator=collate, eval_dataset=TinyRows(4, seed=5))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    """Same rows in the same order, eight at once or four times two; a step of SGD so that no moment amplifies."""
    arguments = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "save_strategy": "no", "max_grad_norm": 0.0}
    one = make_trainer(
        tmp_path / "one", per_device_train_batch_size=8, **{**arguments, "gradient_accumulation_steps": 1}
    )
    four = make_trainer(
        tmp_path / "four", per_device_train_batch_size=2, **{**arguments, "gradient_accumulation_steps": 4}
    )
    for trainer in (one, four):
        trainer.train()
    assert [mode for _, mode in four.modes[::4]] == [mode for _, mode in one.modes]
    expected = weights(one.model)
    for key, value in weights(four.model).items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(four.dualspeed.isolator.rows, one.dualspeed.isolator.rows, atol=2e-5, rtol=1e-4)


def test_settings_may_come_as_a_mapping(tmp_path: Path) -> None:
    trainer = trimtab.with_dualspeed(Trainer)(
        model=tiny_llava(), args=training_arguments(tmp_path, max_steps=1), train_dataset=TinyRows(),
        data_collator=collate, dualspeed={"keep_ratio": 0.3, "pruner": "random"},
    )  # fmt: skip
    trainer.train()
    assert trainer.dualspeed.metrics()["visual_tokens_kept"] > 0
    with pytest.raises(ValueError, match="keep_ratio"):
        trimtab.with_dualspeed(Trainer)(
            model=tiny_llava(), args=training_arguments(tmp_path), train_dataset=TinyRows(), data_collator=collate,
            dualspeed={"keep_ration": 0.3},
        )  # fmt: skip
