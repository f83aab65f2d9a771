"""`--json`: every command has it, and then stdout is one JSON document, whatever else is printed and whatever fails."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.commands import commands
from tests.cli.test_cli import COMMANDS, run
from tests.run.small_run import write_run

from trimtab.cli import show
from trimtab.errors import DataError

SEARCH = ("--samples", "2", "--start-layer", "0", "--threshold", "100")
ASK = ("--model", "model", "--prompt", "what", "--layer", "1", "--image")
PRUNERS = ("--names", "random", "--images", "1", "--tokens", "16", "--width", "8", "--repeats", "1")
TRAINING = ("--size", "toy", "--arms", "public", "--repeats", "1", "--layers", "1", "--samples", "10")

GOOD: dict[str, tuple[str, ...]] = {
    "methods": ("methods",),
    "methods of one": ("methods", "dualspeed"),
    "validate-data": ("validate-data", "train.jsonl"),
    "check": ("check", "run.yaml", "--seconds", "0", "--limit", "4"),
    "cache": ("cache", "run.yaml", "features"),
    "train": ("train", "run.yaml", "--overwrite"),
    "eval": ("eval", "run.yaml"),
    "export": ("export", "out", "exported"),
    "report": ("report", "out"),
    "bench": ("bench", "run.yaml", "--steps", "1"),
    "bench pruners": ("bench", "pruners", *PRUNERS),
    "view": ("view", "--no-open"),
    "vtw search": ("vtw", "search", "train.jsonl", "--model", "model", *SEARCH),
    "vtw generate": (
        "vtw",
        "generate",
        "--model",
        "model",
        "--image",
        "train-0.png",
        "--prompt",
        "what",
        "--layer",
        "1",
    ),
    "vtw bench": ("vtw", "bench", "train.jsonl", "--model", "model", "--layers", "0,1", "--repeats", "1"),
    "quickstart": ("quickstart", "--steps", "2", "--threads", "1"),
}
"""Arguments that succeed in the folder of the fixture, in this order."""

KINDS = {
    "check": "check", "cache": "cache", "train": "train", "eval": "eval", "export": "export", "bench": "bench",
    "bench pruners": "bench_pruners", "quickstart": "quickstart", "vtw search": "vtw_search",
    "vtw generate": "vtw_generate", "vtw bench": "vtw_prefill",
}  # fmt: skip

BAD: dict[str, tuple[str, ...]] = {
    "methods": ("methods", "dualsped"),
    "validate-data": ("validate-data", "absent.jsonl"),
    "check": ("check", "absent.yaml"),
    "cache": ("cache", "absent.yaml", "features"),
    "train": ("train", "absent.yaml"),
    "train of an unknown setting": ("train", "run.yaml", "--lerning_rate", "1"),
    "eval": ("eval", "absent.yaml"),
    "export": ("export", "absent", "exported"),
    "report": ("report", "absent"),
    "bench": ("bench", "absent.yaml"),
    "bench pruners": ("bench", "pruners", "--imges", "2"),
    "bench training": ("bench", "training", "--size", "huge"),
    "view": ("view", "--no-open", "--image", "run.yaml"),
    "vtw search": ("vtw", "search", "absent.jsonl", "--model", "model"),
    "vtw generate": (
        "vtw",
        "generate",
        "--model",
        "model",
        "--image",
        "absent.png",
        "--prompt",
        "what",
        "--layer",
        "1",
    ),
    "vtw bench": ("vtw", "bench", "--model", "model"),
    "quickstart": ("quickstart", "--out", "run.yaml"),
}
"""Arguments whose error is the user's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    names = {"model_name_or_path": "model", "data_files": ["train.jsonl"], "eval_files": ["test.jsonl"]}
    write_run(place, **names, output_dir="out", max_steps=2)
    return place


@pytest.fixture
def desk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the folder; a view is announced and ends at once, a quickstart has a small task."""
    from tests.quickstart.small import small_task

    import trimtab.view
    from trimtab.quickstart import tasks

    serve = trimtab.view.serve

    def announce(model: Any, images: Any, port: Any, *, announce: Callable[[str], None]) -> None:
        if images:  # which are at fault here
            serve(model, images, port, announce=announce)
        announce("http://127.0.0.1:1/?token=x")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(trimtab.view, "serve", announce)
    monkeypatch.setattr(tasks, "scenes_task", small_task)
    return folder


def test_every_command_has_the_option_and_both_tables_have_every_command() -> None:
    for name, command in commands().items():
        assert any("--json" in parameter.opts for parameter in command.params), name
    for table in (GOOD, BAD):
        told = [" ".join(arguments) for arguments in table.values()]
        assert all(any(f"{line} ".startswith(f"{name} ") for line in told) for name in COMMANDS)


@pytest.mark.parametrize("case", GOOD)
def test_stdout_is_one_document(case: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case in ("eval", "export", "report") and not Path("out/records/train.json").exists():  # run alone
        run(*GOOD["train"])
        capsys.readouterr()
    assert run(*GOOD[case], "--json") == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert told
    if case in KINDS:
        assert told["kind"] == KINDS[case]


@pytest.mark.slow
def test_stdout_is_one_document_of_the_training_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "training", *TRAINING, "--json") == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["kind"] == "bench_training"


@pytest.mark.parametrize("case", BAD)
def test_an_error_is_a_document_too(case: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*BAD[case], "--json") == 2
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert set(error) == {"kind", "message"}
    assert error["kind"].endswith("Error")
    assert f"trimtab: {error['message']}\n" in told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize("case", BAD)
def test_without_json_an_error_leaves_stdout_empty(case: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*BAD[case]) == 2
    assert capsys.readouterr().out == ""


def test_what_python_and_c_print_meanwhile_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with show.only_json(True):
        print("from python")
        os.write(1, b"from the system\n")
        if os.name == "posix":
            ctypes.CDLL(None).puts(b"from c")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    print("afterwards")
    told = capfd.readouterr()
    assert told.out == "afterwards\n"
    for words in ("from python", "from the system", "from a child", *(["from c"] if os.name == "posix" else [])):
        assert words in told.err


def test_without_json_nothing_is_redirected(capfd: pytest.CaptureFixture[str]) -> None:
    with show.only_json(False):
        print("here")
        os.write(1, b"")
    assert capfd.readouterr().out == "here\n"


def test_stdout_is_as_before_after_any_error(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with pytest.raises(ZeroDivisionError), show.only_json(True):
        raise ZeroDivisionError
    assert sys.stdout is before
    with pytest.raises(DataError), show.only_json(True):
        raise DataError("no rows")
    assert json.loads(capfd.readouterr().out) == {"error": {"kind": "DataError", "message": "no rows"}}


def test_of_several_processes_the_first_alone_tells_the_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DataError), show.only_json(True):
        raise DataError("no rows")
    assert capfd.readouterr().out == ""


def test_numbers_that_json_does_not_know_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    show.print_json({"a": [math.nan, 1.5], "b": (math.inf, {"c": -math.inf})})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, 1.5],
        "b": [None, {"c": None}],
    }
