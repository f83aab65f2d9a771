"""`trimtab report`: several directories, where the page goes, and its figures for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.cli.app import main
from trimtab.records import make_record, write_record


def out(folder: Path, arm: str, seconds: float) -> Path:
    settings = {"data_files": ["a.json"], "dualspeed": {} if arm == "dualspeed" else False}
    results = {"arm": arm, "seconds_train": seconds, "steps": 2, "samples": 4, "log": [{"step": 1, "loss": 1.0}]}
    write_record(folder / "records" / "train.json", make_record("train", settings, results, seed=0))
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_page_goes_beside_the_first_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = out(tmp_path / "full", "full", 100.0), out(tmp_path / "dual", "dualspeed", 25.0)
    assert run("report", first, second) == 0
    assert "DualSpeed took 0.25 of the training time." in capsys.readouterr().out
    assert (first / "report.html").is_file()
    assert not (second / "report.html").exists()


def test_json_is_all_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = out(tmp_path / "full", "full", 100.0), out(tmp_path / "dual", "dualspeed", 25.0)
    assert run("report", first, second, "--to", tmp_path / "page.html", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(tmp_path / "page.html")
    assert told["speed"]["times_faster"] == pytest.approx(4)
    assert [one["source"] for one in told["runs"]] == ["full", "dual"]
    assert (tmp_path / "page.html").is_file()


def test_a_failed_report_leaves_the_page_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = out(tmp_path / "out", "full", 1.0)
    assert run("report", folder) == 0
    before = (folder / "report.html").read_bytes()
    (folder / "records" / "train.json").write_text("{")
    assert run("report", folder) == 2
    assert "is not whole JSON" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == before
