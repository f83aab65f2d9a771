"""Records stand on their own, tell nothing about the machine's owner, and are checked when read."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab import records
from trimtab.errors import DataError, SettingError
from trimtab.records import MARK, make_record, read_record, read_records, write_record


def test_a_record_reads_back(tmp_path):
    record = make_record("arm", {"keep_ratio": 0.1}, {"accuracy": 0.5}, seed=3, seconds=1.23456)
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json") == record
    assert (record["kind"], record["seed"], record["seconds"]) == ("arm", 3, 1.235)
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_gib"] > 0.1
    assert record["peak_memory_mib"] > 20


def test_the_start_is_told_in_utc():
    started = datetime(2024, 5, 1, 12, 0, tzinfo=timezone(timedelta(hours=2)))
    assert make_record("a", {}, {}, started=started)["started"] == "2024-05-01T10:00:00+00:00"
    with pytest.raises(SettingError, match="time zone"):
        make_record("a", {}, {}, started=datetime(2024, 5, 1))


def test_no_path_and_no_host_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "data": str(tmp_path / "sets" / "rows.json"),
        "out": Path("/somewhere/private/out"),
        "home": "~/secret/model",
        "nested": [{"file": "/a/b/c.png"}],
        "relative": "runs/a",
        "words": "left/right",
    }
    record = make_record("arm", settings, {"picture": tmp_path / "p.png"})
    assert record["settings"] == {
        "data": os.path.join("sets", "rows.json"), "out": "out", "home": "model", "nested": [{"file": "c.png"}],
        "relative": "runs/a", "words": "left/right",
    }  # fmt: skip
    assert record["results"] == {"picture": "p.png"}
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert platform.node() not in text
    assert str(Path.home()) not in text


def test_foreign_types_become_plain():
    results = {
        "tensor": torch.tensor([[1, 2]]), "scalar": torch.tensor(2.5), "array": np.arange(3), "number": np.float32(0.5),
        "nan": float("nan"), "inf": [float("inf")], "pair": (1, True), "set": {"b", "a"}, 4: None, "/text": "/x y",
    }  # fmt: skip
    assert make_record("a", {}, results)["results"] == {
        "tensor": [[1, 2]], "scalar": 2.5, "array": [0, 1, 2], "number": 0.5, "nan": None, "inf": [None],
        "pair": [1, True], "set": ["a", "b"], "4": None, "/text": "/x y",
    }  # fmt: skip
    with pytest.raises(DataError, match="cannot hold a object"):
        make_record("a", {}, {"x": object()})
    with pytest.raises(SettingError, match="kind must be a word"):
        make_record("", {}, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "0"}, "field 'seed' must be int or NoneType, but str came"),
        ({"seed": True}, "field 'seed' must be int or NoneType, but bool came"),
        ({"settings": []}, "field 'settings' must be dict, but list came"),
        ({MARK: 99}, "schema 99, but this trimtab knows up to 1"),
        ({MARK: "1"}, f"field '{MARK}' must be int"),
    ],
)
def test_wrong_fields_are_named(tmp_path, change, words):
    record = {**make_record("arm", {}, {}), **change}
    with pytest.raises(DataError, match=words):
        write_record(tmp_path / "a.json", record)
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"a\.json.*" + words):
        read_record(tmp_path / "a.json")


def test_missing_fields_and_other_files_are_named(tmp_path):
    record = make_record("arm", {}, {})
    del record["hardware"]
    with pytest.raises(DataError, match="field 'hardware' must be dict, but nothing came"):
        write_record(tmp_path / "a.json", record)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="is not a trimtab record"):
        read_record(tmp_path / "a.json")
    write_record(tmp_path / "b.json", make_record("arm", {}, {}))
    (tmp_path / "b.json").write_text((tmp_path / "b.json").read_text()[:-20])
    with pytest.raises(DataError, match=r"b\.json is not whole JSON"):
        read_record(tmp_path / "b.json")


def test_a_directory_gives_its_records_and_passes_over_other_json(tmp_path):
    with pytest.raises(DataError, match="holds no record"):
        read_records(tmp_path)
    write_record(tmp_path / "b.json", make_record("second", {}, {}))
    write_record(tmp_path / "a.json", make_record("first", {}, {}))
    write_record(tmp_path / "records" / "c.json", make_record("third", {}, {}))
    (tmp_path / "run.json").write_text("{}")
    assert [record["kind"] for record in read_records(tmp_path)] == ["first", "second", "third"]


def test_the_commit_is_that_of_the_repository_which_tracks_the_code(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    (tmp_path / "records.py").write_text("")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    git("init", "-q")
    assert records.git_commit() is None
    git("add", "records.py")
    git("commit", "-qm", "first")
    assert records.git_commit() == {"hash": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "records.py").write_text("# changed")
    assert records.git_commit() == {"hash": git("rev-parse", "HEAD"), "dirty": True}


def test_making_a_record_loads_no_heavy_library():
    code = "import sys; from trimtab.records import make_record; make_record('a', {}, {}); " \
           "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": "src"})


def test_the_command_is_that_of_the_program(monkeypatch, tmp_path):
    spec = type("Spec", (), {"name": "trimtab.__main__"})
    main = type("Main", (), {"__spec__": spec, "__file__": "anything"})
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with space").mkdir()
    given = [
        "train", "--config", str(tmp_path / "run.yaml"), "--learning_rate", "1e-5", "--output_dir=/somewhere/else/out",
        "--data_files", f"[{tmp_path}/a.json, /b/c.json]", str(tmp_path / "with space"), "--url", "https://h/x/y",
        "--hub_token", "hf_1", "--wandb-api-key=k", "--dualspeed.pack_tokens", "4096",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["/x/trimtab/__main__.py", *given])
    command = make_record("a", {}, {})["command"]
    assert command == [
        "trimtab", "train", "--config", "run.yaml", "--learning_rate", "1e-5", "--output_dir=out",
        "--data_files", "[a.json, c.json]", "with space", "--url", "https://h/x/y",
        "--hub_token", "***", "--wandb-api-key=***", "--dualspeed.pack_tokens", "4096",
    ]  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make_record("a", {}, {})["command"][:7] == [
        "accelerate", "launch", "--num_processes", "2", "-m", "trimtab", "train",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "module", "words"),
    [
        ("/usr/bin/trimtab", None, ["trimtab", "x"]),
        ("<root>/.venv/bin/trimtab", None, ["trimtab", "x"]),
        ("<root>/bench/training.py", None, ["python", "bench/training.py", "x"]),
        ("<root>/tests/bench/training.py", None, None),
        ("<root>/.venv/bin/pytest", None, None),
        ("/elsewhere/bench/training.py", None, None),
        ("/usr/lib/pytest/__main__.py", "pytest.__main__", None),
        (None, None, None),
    ],
)
def test_only_our_own_programs_are_named(monkeypatch, file, module, words):
    root = str(Path(records.__file__).resolve().parents[2])
    spec = None if module is None else type("Spec", (), {"name": module})
    place = None if file is None else file.replace("<root>", root)
    monkeypatch.setitem(sys.modules, "__main__", type("Main", (), {"__spec__": spec, "__file__": place}))
    monkeypatch.setattr(sys, "argv", ["anything", "x"])
    assert make_record("a", {}, {})["command"] == words


def test_a_real_process_names_its_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "bench", "pruners", "--images", "1", "--tokens", "16", "--width", "8",
         "--repeats", "1", "--names", "random", "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "src"},
    )  # fmt: skip
    assert json.loads(done.stdout)["command"][:5] == ["trimtab", "bench", "pruners", "--images", "1"]


def test_a_command_is_checked_and_may_be_missing(tmp_path):
    record = make_record("arm", {}, {})
    assert record["command"] is None, "a test run is no command that repeats anything"
    del record["command"]
    write_record(tmp_path / "old.json", record)
    assert "command" not in read_record(tmp_path / "old.json")
    for wrong in ("trimtab train", [1]):
        with pytest.raises(DataError, match="'command' must be a list of words"):
            write_record(tmp_path / "a.json", {**record, "command": wrong})
