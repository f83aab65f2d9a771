"""The arms that may beat the paper: each trains and is judged, and its record says what its name says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tests.quickstart.small import small_task

from trimtab.quickstart.arms import ARMS, PACKED_FULL
from trimtab.quickstart.run import run_arms
from trimtab.quickstart.train_arm import StepLog
from trimtab.report import render_experiment

NEW = [arm for arm in ARMS.values() if (arm.letter == "I" and arm.time_of is None) or arm.name == "dualspeed_original"]
BY_SAMPLE = {arm.name for arm in NEW if (arm.dualspeed or {}).get("schedule_unit") == "sample"}


def quiet(what: str, done: int, total: int) -> None:
    """Show no progress."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    arms = [ARMS["full"], ARMS["dualspeed"], *NEW]
    found = run_arms(small_task(), arms, 0, tmp_path_factory.mktemp("new"), quiet, steps=3, keep_models=False)
    return {record["results"]["arm"]: record for record in found}


@pytest.mark.parametrize("name", [arm.name for arm in NEW])
def test_a_new_arm_trains_and_is_judged(records: dict[str, dict[str, Any]], name: str) -> None:
    results = records[name]["results"]
    assert len(results["log"]) == 3
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["ce"]) for entry in results["log"])
    assert results["samples"] == records["full"]["results"]["samples"]
    assert (results["accuracy_pruned"] is None) == (name == "full_packed")
    modes = {entry["mode"] for entry in results["log"]}
    assert modes <= ({"mixed"} if name in BY_SAMPLE else {"full"} if name == "full_packed" else {"fast", "slow"})


def test_a_packed_full_arm_is_the_full_arm(records: dict[str, dict[str, Any]]) -> None:
    assert PACKED_FULL["packing"]
    losses = [[entry["loss"] for entry in records[name]["results"]["log"]] for name in ("full", "full_packed")]
    # Rounded to five digits in the log; three steps of AdamW on float32 sums in another order before.
    assert losses[0] == pytest.approx(losses[1], abs=5e-4)


@pytest.mark.parametrize("name", sorted(BY_SAMPLE))
def test_a_mixed_step_tells_the_losses_of_the_modes_it_had(records: dict[str, dict[str, Any]], name: str) -> None:
    for entry in records[name]["results"]["log"]:
        assert 0 <= entry["slow_samples"] <= 4
        assert (entry["ce_slow"] is None) == (entry["kl"] is None) == (entry["slow_samples"] == 0)
        assert (entry["ce_fast"] is None) == (entry["slow_samples"] == 4)
        parts = [entry[part] for part in ("ce_fast", "ce_slow") if entry[part] is not None]
        assert min(parts) - 1e-4 <= entry["ce"] <= max(parts) + 1e-4, "a mean over the labels of both"


def test_what_a_step_did_not_measure_is_not_told_again() -> None:
    class Handle:
        config = ARMS["dualspeed_packed"].config(0)
        metrics_of_steps = iter(
            {"mode": "mixed", "ce": 1.0, "ce_fast": 1.0, "ce_slow": 2.0, "kl": 0.5, "samples_slow": done,
             "visual_tokens_full": 8, "visual_tokens_kept": 4} for done in (2, 2, 6)
        )  # fmt: skip

        def metrics(self) -> dict[str, Any]:
            return next(self.metrics_of_steps)

    class Arguments:
        per_device_train_batch_size = 4

    class Loss:
        def item(self) -> float:
            return 1.0

    class Trainer:
        dualspeed, last_loss, args = Handle(), Loss(), Arguments()

    log = StepLog("dualspeed_packed", quiet)
    log.trainer = Trainer()
    entries = [log._losses() for _ in range(3)]
    assert [entry["slow_samples"] for entry in entries] == [2, 0, 4]
    assert [entry["kl"] for entry in entries] == [0.5, None, 0.5]
    assert [(entry["ce_fast"], entry["ce_slow"]) for entry in entries] == [(1.0, 2.0), (1.0, None), (None, 2.0)]


def test_counts_of_slow_samples_are_right_after_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(RuntimeError):
        pass

    arm, written = [ARMS["dualspeed_sample"]], StepLog.on_step_end
    whole = run_arms(small_task(), arm, 0, tmp_path / "whole", quiet, save_every=2)[0]

    def stop(self: StepLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        written(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "on_step_end", stop)
        with pytest.raises(StopError):
            run_arms(small_task(), arm, 0, tmp_path / "cut", quiet, save_every=2)
    cut = run_arms(small_task(), arm, 0, tmp_path / "cut", quiet, save_every=2)[0]
    told = [[(e["step"], e["slow_samples"], e["loss"]) for e in run["results"]["log"]] for run in (whole, cut)]
    assert told[0] == told[1]
    assert sum(slow for _, slow, _ in told[0]) > 0


def test_the_page_shows_mixed_steps(records: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    text = render_experiment(list(records.values()), tmp_path / "page.html").read_text(encoding="utf-8")
    for words in ("DualSpeed, packed", "DualSpeed, two way", "DualSpeed, content keep", "Full tokens, packed"):
        assert words in text
