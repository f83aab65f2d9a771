"""Which checkpoint a run goes on from: the newest whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.run.test_train import weights

from trimtab.run.checkpoints import last_checkpoint, step_of
from trimtab.run.config import RunConfig
from trimtab.run.train import train


def write(folder: Path, step: str, state: str | None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    assert last_checkpoint(tmp_path) is None
    write(tmp_path, "20", None)
    assert last_checkpoint(tmp_path) is None
    write(tmp_path, "9", '{"global_step": 9}')
    whole = write(tmp_path, "10", '{"global_step": 10}')
    write(tmp_path, "30", '{"global_st')
    write(tmp_path, "best", "{}")
    assert last_checkpoint(tmp_path) == whole
    assert step_of(whole) == 10
    assert step_of(tmp_path / "checkpoint-best") is None


def test_a_run_killed_while_it_wrote_a_checkpoint_goes_on(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerState

    saving = {"save_strategy": "steps", "save_steps": 1}
    train(make_config(**saving, output_dir=str(tmp_path / "whole")))
    save = TrainerState.save_to_json

    def kill(self: TrainerState, path: str) -> None:
        if self.global_step == 3:
            raise KeyboardInterrupt
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", kill)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(**saving))
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    train(make_config(**saving, resume=True))
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "out").items())


@pytest.mark.parametrize("block", [False, {"keep_ratio": 0.25, "slow_ratio": 0.5, "isolator_tokens": 2}])
def test_a_run_killed_behind_its_last_checkpoint_takes_no_further_step(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: Any
) -> None:
    saving = {
        "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "max_steps": 3, "dualspeed": block,
    }  # fmt: skip
    train(make_config(**saving, output_dir=str(tmp_path / "whole")))

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.run.train._record", kill)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(**saving))
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    record = train(make_config(**saving, resume=True))
    assert record["results"]["steps"] == 3
    assert len([entry for entry in record["results"]["log"] if "loss" in entry]) == 3
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "out").items())
