"""Trainings are found, named apart, and held against those on full tokens of the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.errors import DataError
from trimtab.records import make_record, write_record
from trimtab.report import read_report, write_report
from trimtab.report.runs import find_runs
from trimtab.report.sources import load_sources, unique_names
from trimtab.report.verdict import progress_of


def train_record(arm="dualspeed", seconds=100.0, kind="train", seed=0, **results):
    settings = {"data_files": ["train.jsonl"], "eval_files": ["a/test.jsonl"], "dualspeed": arm != "full" and {"k": 1}}
    known = {"arm": arm, "seconds_train": seconds, "steps": 10, "samples": 20, "log": [{"step": 1, "loss": 1.0}]}
    return make_record(kind, settings, {**known, **results}, seed=seed, seconds=seconds)


def write(folder: Path, **records) -> Path:
    for name, record in records.items():
        write_record(folder / "records" / f"{name}.json", record)
    return folder


def test_an_evaluation_joins_its_training(tmp_path, arm):
    training = train_record(rows=7, metrics={"steps_fast": 9})
    judged = arm("dualspeed", 80, 100.0, dataset="test")
    judged["results"] |= {"steps": 10, "samples": 20}
    found = find_runs(load_sources(write(tmp_path / "out", train=training, arm=judged)))
    assert len(found) == 1
    assert (found[0].accuracy, found[0].results["rows"], found[0].dataset) == (0.8, 7, "test")
    other = arm("dualspeed", 80, 99.0, dataset="test")
    assert len(find_runs(load_sources(write(tmp_path / "b", train=training, arm=other)))) == 2


def test_a_training_without_an_evaluation_says_what_is_missing(tmp_path):
    record = {**train_record(), "command": ["trimtab", "train", "--config", "mine.yaml"]}
    report = read_report(write(tmp_path / "out", train=record))
    assert [run.dataset for run in report.runs] == ["test"]
    commands = [one["command"] for one in report.verdict.missing]
    assert "trimtab eval --config mine.yaml" in commands
    assert "trimtab train --config mine.yaml --dualspeed false --output_dir out-full" in commands
    both = read_report([write(tmp_path / "full", train=train_record("full", 200.0)), tmp_path / "out"])
    assert both.verdict.facts["speed"]["times_faster"] == pytest.approx(2)
    assert not any("--dualspeed false" in one["command"] for one in both.verdict.missing)
    assert both.verdict.headline == "DualSpeed took 0.50 of the training time."


def test_times_are_held_against_the_same_seed_and_per_sample(tmp_path):
    places = [
        write(tmp_path / f"out-{name}", train=record)
        for name, record in {
            "f0": train_record("full", 200.0, seed=0), "f1": train_record("full", 400.0, seed=1),
            "d0": train_record(seconds=100.0, seed=0), "d1": train_record(seconds=100.0, seed=1, samples=40),
        }.items()
    ]  # fmt: skip
    speed = read_report(places).verdict.facts["speed"]
    assert speed["time_ratio"] == pytest.approx((1 / 2 + 1 / 8) / 2)
    assert (speed["pairs"], speed["same_samples"]) == (2, False)
    third = write(tmp_path / "out-d2", train=train_record(seed=2))
    assert read_report([*places, third]).verdict.facts["speed"]["pairs"] == 2, "seed 2 has no full run of its own"


def test_runs_of_several_directories_have_names_of_their_own(tmp_path):
    first = write(tmp_path / "a" / "out", train=train_record())
    second = write(tmp_path / "b" / "out", train=train_record())
    report = read_report([first, second, tmp_path / "a" / "out" / "records", first])
    assert [run.name for run in report.runs] == ["a/out: DualSpeed", "b/out: DualSpeed"]
    report = read_report(write(tmp_path / "c", one=train_record(), two=train_record(), three=train_record(seed=1)))
    assert sorted(run.name for run in report.runs) == [
        "DualSpeed, seed 0", "DualSpeed, seed 0, no. 2", "DualSpeed, seed 1",
    ]  # fmt: skip


def test_names_of_directories_are_as_short_as_they_can_be():
    paths = [Path("/x/a/out"), Path("/x/b/out"), Path("/x/b/other")]
    assert unique_names(paths) == ["a/out", "b/out", "other"]
    assert unique_names([Path("/"), Path("/out")])[1] == "out"


def test_a_training_under_way_has_a_rate_and_an_end(tmp_path):
    record = train_record(kind="progress", seconds=50.0, steps=60, first_step=10, max_steps=160, status="running")
    record["started"] = "2030-01-01T00:00:00+00:00"
    report = read_report(write(tmp_path / "out", progress=record))
    assert report.verdict.headline == "Training is under way: step 60 of 160."
    told = report.to_dict()["running"][0]
    assert told["steps_per_second"] == pytest.approx(1.0)
    assert told["seconds_left"] == pytest.approx(100.0)
    assert told["expected_end"] == "2030-01-01T00:02:30+00:00"
    assert read_report([train_record(kind="progress", seconds=0.0)]).to_dict()["running"][0]["seconds_left"] is None
    assert progress_of(find_runs(load_sources([train_record(kind="progress", steps=None)]))[0])["steps"] == 0


def test_a_finished_training_beats_what_is_left_of_its_progress(tmp_path):
    early, late = train_record(kind="progress"), train_record()
    early["started"], late["started"] = "2030-01-01T00:00:00+00:00", "2030-01-01T00:00:00+00:00"
    report = read_report(write(tmp_path / "out", train=late, progress=early))
    assert [run.running for run in report.runs] == [False]
    early["started"] = "2030-01-02T00:00:00+00:00"
    report = read_report(write(tmp_path / "out", train=late, progress=early))
    assert [run.running for run in report.runs] == [False, True], "the training is being repeated"


def test_bad_input_is_named(tmp_path):
    good = write(tmp_path / "good", train=train_record())
    with pytest.raises(DataError, match="absent holds no record"):
        read_report([good, tmp_path / "absent"])
    (good / "records" / "broken.json").write_text(json.dumps(train_record())[:-9])
    with pytest.raises(DataError, match=r"broken\.json is not whole JSON"):
        read_report(good)
    with pytest.raises(DataError, match="either records or directories"):
        read_report([train_record(), "out"])  # type: ignore[list-item]  # the mistake itself
    with pytest.raises(DataError, match="a log that is no list"):
        read_report([train_record(log={"a": 1})])


def test_a_resumed_training_is_held_against_its_own_part(tmp_path):
    log = [{"step": 10, "loss": 1.0}, {"step": 10, "train_runtime": 20.0, "first_step": 6}]
    dual = write(tmp_path / "dual", train=train_record(seconds=40.0, log=log))
    full = write(tmp_path / "full", train=train_record("full", 200.0))
    report = read_report([dual, full])
    # 40 seconds for 4 of 10 steps, so for 8 of 20 samples.
    assert report.verdict.facts["speed"]["time_ratio"] == pytest.approx((40 / 8) / (200 / 20))
    assert report.verdict.caveats == ("dual: DualSpeed was resumed at step 6: its time is that of the steps after it.",)


def test_what_differs_besides_dualspeed_is_told(tmp_path):
    dual, full = train_record(seed=1), train_record("full", 200.0, seed=2)
    dual["settings"] |= {"learning_rate": 0.1, "output_dir": "a", "max_steps": 9, "logging_steps": 3}
    full["settings"] |= {"learning_rate": 0.2, "output_dir": "b", "max_steps": 8, "logging_steps": 1}
    full["hardware"] = {**full["hardware"], "cpu": "another"}
    full["versions"] = {**full["versions"], "torch": "0.1"}
    seeds, settings, machines, versions = read_report([dual, full]).verdict.caveats
    assert seeds == "The seeds differ: 1 and 2."
    assert settings == "Settings differ: learning_rate 0.1 against 0.2."
    assert machines.endswith("against another.")
    assert versions.endswith("against 0.1.")
    page = write_report(read_report([dual, full]), tmp_path / "a.html").read_text("utf-8")
    assert seeds in page
    assert "against the only run on full tokens, whatever its seed" in page
    assert read_report([train_record(), train_record("full")]).verdict.caveats == ()


def test_the_run_on_full_tokens_with_the_nearest_settings_is_chosen():
    far, near, dual = train_record("full", 400.0), train_record("full", 200.0), train_record()
    for record, rate in ((far, 0.2), (near, 0.1), (dual, 0.1)):
        record["settings"]["learning_rate"] = rate
    assert read_report([far, near, dual]).verdict.facts["speed"]["time_ratio"] == pytest.approx(0.5)


def test_why_there_is_no_pair_is_told():
    dual, elsewhere, under_way = train_record(), train_record("full"), train_record("full", kind="progress")
    elsewhere["settings"]["eval_files"] = ["other.jsonl"]
    under_way["started"] = "2099-01-01T00:00:00+00:00"
    for others, told in (
        ([], "There is no run on full tokens"), ([elsewhere], "judged on other data than test"),
        ([train_record("full", seed=seed) for seed in (1, 2)], "None of the 2 runs on full tokens has its seed"),
        ([under_way], "once both have ended"),
    ):  # fmt: skip
        assert told in read_report([dual, *others]).verdict.lead


def test_answers_to_differently_many_questions_are_not_compared(arm):
    dual, full = arm("dualspeed", 80, 50.0), arm("full", 90, 100.0)
    assert read_report([dual, full]).verdict.facts["accuracy"]["kept"] == pytest.approx(80 / 90)
    full["results"]["accuracy_full"] = {**full["results"]["accuracy_full"], "number": 50, "marks": "1" * 45 + "0" * 5}
    report = read_report([dual, full])
    assert report.verdict.facts["accuracy"]["kept"] is None
    assert report.verdict.caveats == ("They were asked differently many questions: 100 and 50.",)
    assert "questions" not in report.verdict.lead


def test_a_slower_training_is_not_called_faster():
    report = read_report([train_record(seconds=300.0), train_record("full", 200.0)])
    assert report.verdict.headline == "DualSpeed took 1.50 times the training time."
    assert report.verdict.tiles[0] == {"value": "0.67 ×", "words": "the speed of training on full tokens: slower"}


def test_commands_name_the_settings_that_the_training_really_had():
    record = {**train_record(), "command": ["trimtab", "train", "--config", "mine.yaml", "--seed", "7"]}
    record["settings"]["output_dir"] = "out"
    commands = [one["command"] for one in read_report([record]).verdict.missing]
    assert "trimtab eval --config out/resolved.yaml" in commands
    assert all("--config out/resolved.yaml" in command for command in commands)


def test_a_directory_that_is_given_by_two_names_counts_once(tmp_path):
    place = write(tmp_path / "out", train=train_record())
    (tmp_path / "link").symlink_to(place)
    assert len(read_report([place, tmp_path / "link"]).runs) == 1
