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
