"""Quickstart and experiment runner: same start, same samples, interrupted loses nothing, stock classes load the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quickstart.small import small_task
from transformers import AutoProcessor, LlavaForConditionalGeneration

from trimtab.errors import OutputError
from trimtab.quickstart import run, tasks
from trimtab.quickstart.arms import ARMS, arm_of
from trimtab.quickstart.run import QUICKSTART_ARMS, equal_time_steps, quickstart, run_arms, summarise
from trimtab.quickstart.train_arm import STEP_LOG, StepLog

THREE = [ARMS[name] for name in QUICKSTART_ARMS]


def quiet(what: str, done: int, total: int) -> None:
    """Show no progress."""


def final_weights(root: Path, arm: str) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(root / "arms" / arm / "model").state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("whole")
    return root, run_arms(small_task(), THREE, 0, root, quiet)


def test_every_arm_has_the_same_number_of_samples(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    _, records = whole
    assert [record["results"]["arm"] for record in records] == list(QUICKSTART_ARMS)
    assert {record["results"]["samples"] for record in records} == {24}
    assert all(len(record["results"]["log"]) == 6 for record in records)


def test_the_modes_of_the_arms_are_what_their_names_say(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    modes = {r["results"]["arm"]: {entry["mode"] for entry in r["results"]["log"]} for r in whole[1]}
    assert modes == {"full": {"full"}, "pruned": {"fast"}, "dualspeed": {"fast", "slow"}}


def test_times_are_sums_of_the_steps(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    for record in whole[1]:
        found = record["results"]
        assert found["seconds_train"] == pytest.approx(sum(entry["seconds"] for entry in found["log"]))
        assert found["seconds_train"] > 0


def test_the_tower_is_the_same_in_every_arm_and_stays(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = whole
    start = LlavaForConditionalGeneration.from_pretrained(root / "start").state_dict()
    for arm in QUICKSTART_ARMS:
        end = final_weights(root, arm)
        moved = {name for name in start if not torch.equal(start[name], end[name])}
        assert moved
        assert not any("vision_tower" in name for name in moved)


def test_summary_is_against_the_full_arm(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = summarise(whole[1])
    assert lines[0]["time_of_full"] == 1
    assert lines[0]["accuracy_pruned"] is None
    assert lines[2]["accuracy_pruned"] is not None


class StopError(RuntimeError):
    """Ends a run in the middle."""


@pytest.mark.parametrize("arm", ["full", "dualspeed"])
def test_interrupted_and_run_again_is_never_interrupted(
    whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    written = StepLog.on_step_end

    def stop(self: StepLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        written(self, args, state, control, **kwargs)
        if self.arm == arm and state.global_step == 5:
            raise StopError

    monkeypatch.setattr(StepLog, "on_step_end", stop)
    with pytest.raises(StopError):
        run_arms(small_task(), THREE, 0, tmp_path, quiet, save_every=2)
    monkeypatch.setattr(StepLog, "on_step_end", written)
    seen: list[str] = []
    records = run_arms(small_task(), THREE, 0, tmp_path, lambda what, done, total: seen.append(what), save_every=2)
    assert ("full" in seen) == (arm == "full"), "a finished arm is not trained again"
    expected = final_weights(whole[0], arm)
    for name, value in final_weights(tmp_path, arm).items():
        assert torch.equal(value, expected[name]), name
    for ours, theirs in zip(records, whole[1], strict=True):
        kept = ("step", "mode", "loss")
        assert [[e[k] for k in kept] for e in ours["results"]["log"]] == [
            [e[k] for k in kept] for e in theirs["results"]["log"]
        ]


@pytest.mark.parametrize("log_lost", [False, True])
def test_interrupted_behind_the_last_step_takes_no_further_one_unless_its_log_is_lost(
    whole: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lost: bool
) -> None:
    def stop(*_: Any) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.quickstart.train_arm.judge_arm", stop)
        with pytest.raises(StopError):
            run_arms(small_task(), THREE[:1], 0, tmp_path, quiet, save_every=4)
    if log_lost:
        (tmp_path / "arms" / "full" / STEP_LOG).unlink()
    record = run_arms(small_task(), THREE[:1], 0, tmp_path, quiet, save_every=4)[0]
    assert [entry["step"] for entry in record["results"]["log"]] == [1, 2, 3, 4, 5, 6]
    assert record["results"]["seconds_train"] > 0
    expected = final_weights(whole[0], "full")
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(tmp_path, "full").items())


def test_quickstart_leaves_records_a_page_and_a_stock_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "scenes_task", small_task)
    out = tmp_path / "out"
    record = quickstart(out=out, seed=0, steps=4, threads=1)
    assert [line["arm"] for line in record["results"]["arms"]] == list(QUICKSTART_ARMS)
    assert json.loads((out / "quickstart.json").read_text()) == record
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    model, info = LlavaForConditionalGeneration.from_pretrained(out / "checkpoint", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    AutoProcessor.from_pretrained(out / "checkpoint")
    trained = final_weights(out, "dualspeed")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    printed = capsys.readouterr().out
    assert "dualspeed" in printed

    monkeypatch.setattr(run, "run_arms", lambda *args, **kwargs: pytest.fail("trained again"))
    assert quickstart(out=out, seed=0, steps=4, threads=1) == record
    with pytest.raises(OutputError, match="seed"):
        quickstart(out=out, seed=1, steps=4, threads=1)


def test_an_arm_of_equal_time_takes_the_steps_that_fit() -> None:
    records = {
        "full": {"results": {"steps": 100, "seconds_train": 50.0}},
        "dualspeed": {"results": {"steps": 100, "seconds_train": 20.0}},
    }
    assert equal_time_steps(records, arm_of("full_equal_time")) == 40
    assert equal_time_steps(records, arm_of("full")) is None
    records["full_packed"] = {"results": {"steps": 100, "seconds_train": 40.0}}
    records["dualspeed_packed"] = {"results": {"steps": 100, "seconds_train": 10.0}}
    assert equal_time_steps(records, arm_of("full_packed_equal_time")) == 25


def test_an_unknown_arm_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="dualspeed_no_kl"):
        arm_of("dualspeed_no_lk")


def test_settings_of_the_arms_differ_as_their_names_say() -> None:
    assert ARMS["full"].config(0) is None
    configs = {name: arm.config(3) for name, arm in ARMS.items()}
    assert configs["pruned"].slow_ratio == 0
    assert configs["dualspeed_no_isolator"].isolator_tokens == 0
    assert configs["dualspeed_no_kl"].kl_weight == 0
    assert configs["dualspeed_random"].pruner == "random"
    assert configs["dualspeed"].seed == 3
