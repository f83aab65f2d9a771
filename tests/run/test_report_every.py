"""Watching a training: the report is there while it runs, and its record gives way to that of the training."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
from transformers import TrainerCallback

from trimtab.errors import OutputError, SettingError
from trimtab.records import read_record
from trimtab.run import report_every
from trimtab.run import train as training
from trimtab.run.config import RunConfig, build_config, load_config, parse_overrides
from trimtab.run.report_every import PROGRESS_FILE, ReportEvery
from trimtab.run.train import train

Make = Callable[..., RunConfig]
BASE = {"model_name_or_path": "m", "data_files": ["a.jsonl"], "output_dir": "out"}


class _StopError(Exception):
    """Ends a training in its middle."""


def _state(step: int, **changes: Any) -> SimpleNamespace:
    given = {"global_step": step, "max_steps": 10, "is_world_process_zero": True, "log_history": [{"step": step}]}
    return SimpleNamespace(**{**given, **changes})


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int, look: Callable[[], None] = lambda: None) -> None:
    """Let the next training fail right before the step after this one."""

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                for thread in [t for t in threading.enumerate() if t.name == "trimtab-report"]:
                    thread.join()
                look()
                raise _StopError

    build = training.build_trainer

    def stopping(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(Stop())
        return trainer

    monkeypatch.setattr(training, "build_trainer", stopping)


# off is off ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [None, 0])
def test_off_leaves_neither_record_nor_page(make_config: Make, tmp_path: Path, off: int | None) -> None:
    train(make_config(report_every=off, max_steps=2))
    assert not (tmp_path / "out" / PROGRESS_FILE).exists()
    assert not (tmp_path / "out" / "report.html").exists()


def test_the_losses_are_those_of_a_run_without_it(make_config: Make, tmp_path: Path) -> None:
    plain = train(make_config())["results"]["log"]
    watched = train(make_config(report_every=1, output_dir=str(tmp_path / "watched")))["results"]["log"]
    assert [one["loss"] for one in watched if "loss" in one] == [one["loss"] for one in plain if "loss" in one]


# while it runs ------------------------------------------------------------------------------------------------------


def test_a_training_that_runs_has_its_record_and_its_page(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_at(monkeypatch, 3)
    with pytest.raises(_StopError):
        train(make_config(report_every=2))
    record = read_record(tmp_path / "out" / PROGRESS_FILE)
    results = record["results"]
    assert record["kind"] == "progress"
    assert (results["status"], results["arm"]) == ("running", "dualspeed")
    assert (results["steps"], results["max_steps"], results["first_step"]) == (2, 4, 0)
    assert results["samples"] == 4
    assert results["metrics"]["steps_fast"] + results["metrics"]["steps_slow"] == 2
    assert [entry["step"] for entry in results["log"]] == [1]  # the Trainer logs a step after its end
    assert results["seconds_train"] > 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' in page


def test_at_the_end_the_record_of_the_training_stands_alone(make_config: Make, tmp_path: Path) -> None:
    train(make_config(report_every=1))
    assert not (tmp_path / "out" / PROGRESS_FILE).exists()
    assert (tmp_path / "out" / "records" / "train.json").is_file()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in page


def test_a_resumed_run_goes_on_with_its_report(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        _stop_at(patch, 2)
        with pytest.raises(_StopError):
            train(make_config(report_every=1, **saving))
    seen: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        _stop_at(patch, 3, lambda: seen.append(read_record(tmp_path / "out" / PROGRESS_FILE)["results"]))
        with pytest.raises(_StopError):  # another number of steps is no other run
            train(make_config(report_every=3, resume=True, **saving))
    assert (seen[0]["steps"], seen[0]["first_step"]) == (3, 2)
    assert [entry["step"] for entry in seen[0]["log"]] == [1, 2]
    train(make_config(resume=True, **saving))
    assert not (tmp_path / "out" / PROGRESS_FILE).exists()
    # The page that the interrupted part left behind must not reload for ever, though no report is asked for any more.
    assert 'http-equiv="refresh"' not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_plain_training_can_be_watched(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_at(monkeypatch, 2)
    with pytest.raises(_StopError):
        train(make_config(report_every=1, dualspeed=False))
    assert read_record(tmp_path / "out" / PROGRESS_FILE)["results"]["arm"] == "full"


# what must not happen -----------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_one_warning(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(report_every, "render_report", fail)
    monkeypatch.setattr(report_every, "render_aside", fail)
    record = train(make_config(report_every=1))
    assert record["results"]["steps"] == 4
    told = [one.getMessage() for one in caplog.records if "report cannot be written" in one.getMessage()]
    assert told == ["The report cannot be written (OutputError: the disk is full)."]


def test_the_page_is_drawn_outside_the_process_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def here(*_: Any, **__: Any) -> None:
        raise AssertionError("matplotlib's settings are those of the whole process, and the user may draw in it")

    monkeypatch.setattr(matplotlib, "rc_context", here)
    facts = {"arm": "full", "samples": 2}
    report = ReportEvery(1, tmp_path, {"data_files": ["a.jsonl"]}, lambda: facts)
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    report.on_step_end(SimpleNamespace(seed=0), _state(2, log_history=log), None)
    report.on_train_end(None, None, None)
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not caplog.records
    (tmp_path / "records" / "broken.json").write_text("{")
    report.on_step_end(SimpleNamespace(seed=0), _state(3), None)
    report.on_train_end(None, None, None)
    assert "broken.json is not whole JSON" in caplog.text
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8"), "the page before it stays"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    report = ReportEvery(1, tmp_path, {})
    report.on_step_end(SimpleNamespace(seed=0), _state(1, is_world_process_zero=False), None)
    report.on_train_end(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_due_while_one_is_written_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going, written = threading.Event(), []

    def slow(*_: Any, **__: Any) -> None:
        going.wait(30)
        written.append(json.loads((tmp_path / PROGRESS_FILE).read_text(encoding="utf-8"))["results"]["steps"])

    monkeypatch.setattr(report_every, "render_aside", slow)
    report = ReportEvery(1, tmp_path, {})
    for step in (1, 2, 3):
        report.on_step_end(SimpleNamespace(seed=0), _state(step), None)
    going.set()
    report.on_train_end(None, None, None)
    report.on_step_end(SimpleNamespace(seed=0), _state(4), None)
    report.on_train_end(None, None, None)
    assert written == [1, 4]


# the setting --------------------------------------------------------------------------------------------------------


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(SettingError, match=r"RunConfig\.report_every must be at least 1, or 0 or null.*-5 came"):
        build_config({**BASE, "report_every": -5})


@pytest.mark.parametrize("words", [["--report-every", "50"], ["--report_every", "50"], ["--report-every=50"]])
def test_it_can_be_given_on_the_command_line(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndata_files: a.jsonl\noutput_dir: out\n", encoding="utf-8")
    assert parse_overrides(words) == {"report_every": 50}
    assert load_config(path, words).report_every == 50


def test_it_is_no_part_of_what_makes_a_run_the_same() -> None:
    with_it, without = build_config({**BASE, "report_every": 50}), build_config(BASE)
    assert with_it.identity() == without.identity()
    assert with_it.to_dict()["report_every"] == 50
