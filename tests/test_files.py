"""Files are written whole or not at all; directories of others are safe."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest

from trimtab.errors import DataError, OutputError, SettingError
from trimtab.files import (
    JsonLines,
    prepare_output,
    read_json,
    read_json_lines,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)


@pytest.fixture
def small_disk():
    """Let no file grow beyond 1,000 bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_text_and_json_read_back(tmp_path):
    write_text_atomic(tmp_path / "deep" / "a.txt", "été\n")
    write_json_atomic(tmp_path / "b.json", {"x": [1, 2]})
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "été\n"
    assert read_json(tmp_path / "b.json") == {"x": [1, 2]}
    assert names(tmp_path) == ["b.json", "deep"]


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path, small_disk):
    target = tmp_path / "weights.bin"
    write_bytes_atomic(target, b"old")
    with pytest.raises(OutputError, match=r"weights\.bin \(5,000 bytes\).*[Ff]ree"):
        write_bytes_atomic(target, b"x" * 5000)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["weights.bin"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.files.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(tmp_path / "a.txt", "new")
    assert names(tmp_path) == []


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*choose another"):
        write_text_atomic(tmp_path / "file" / "a.txt", "x")


def test_json_refuses_nan_before_it_touches_the_file(tmp_path):
    write_json_atomic(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"a": [1,', "not whole JSON"), (b"\xff\xfe", "not a UTF-8"), (b"", "not whole JSON")],
)
def test_broken_json_is_named(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json.*{words}|a\.json is {words}"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        read_json(tmp_path / "none.json")


def test_lines_survive_a_kill(tmp_path):
    path = tmp_path / "log" / "steps.jsonl"
    with JsonLines(path) as lines:
        lines.append({"step": 1})
        lines.append({"step": 2})
    with path.open("ab") as stream:
        stream.write(b'{"step": 3, "lo')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    with JsonLines(path) as lines:
        lines.append({"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_lines_reach_the_disk_before_close(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.append({"step": 1})
    assert read_json_lines(tmp_path / "a.jsonl") == [{"step": 1}]
    lines.close()
    lines.close()


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not JSON"):
        read_json_lines(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[2]\n')
    with pytest.raises(DataError, match="line 2 must be an object, but a list came"):
        read_json_lines(tmp_path / "a.jsonl")


def test_missing_lines_read_as_empty(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_full_disk_keeps_the_lines_before(tmp_path, small_disk):
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.append({"step": 1})
    with pytest.raises(OutputError, match=r"a\.jsonl"):
        lines.append({"text": "x" * 2000})
    lines.append({"step": 2})
    lines.close()
    assert read_json_lines(tmp_path / "a.jsonl") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("make", [True, False])
def test_an_empty_directory_becomes_a_run(tmp_path, make):
    path = tmp_path / "out"
    if make:
        path.mkdir()
    found = prepare_output(path, settings={"seed": 1})
    state = read_json(path / "run.json")
    assert (found.resumed, found.finished) == (False, False)
    assert (state["status"], state["settings"], state["made_by"]) == ("running", {"seed": 1}, "trimtab")


def test_files_of_others_are_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty \(1 entries, for example 'notes\.txt'\).*overwriting"):
        prepare_output(tmp_path, resume=True)
    prepare_output(tmp_path, overwrite=True)
    (tmp_path / "model.bin").write_text("ours")
    prepare_output(tmp_path, overwrite=True)
    assert names(tmp_path) == ["notes.txt", "run.json"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_half_written_run_says_how_to_go_on(tmp_path):
    prepare_output(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "a").write_text("x")
    with pytest.raises(OutputError, match=r"did not finish.*Continue it with resume"):
        prepare_output(tmp_path)
    found = prepare_output(tmp_path, resume=True)
    assert (found.resumed, found.finished) == (True, False)
    assert names(tmp_path) == ["checkpoint", "run.json"]
    prepare_output(tmp_path, overwrite=True)
    assert names(tmp_path) == ["run.json"]


def test_overwriting_does_not_follow_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data").write_text("mine")
    prepare_output(tmp_path / "out")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    prepare_output(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["run.json"]
    assert (tmp_path / "elsewhere" / "data").read_text() == "mine"


def test_a_finished_run_says_so(tmp_path):
    prepare_output(tmp_path).finish()
    with pytest.raises(OutputError, match="holds a finished run"):
        prepare_output(tmp_path)
    found = prepare_output(tmp_path, resume=True)
    assert (found.resumed, found.finished) == (True, True)


def test_resume_needs_equal_settings(tmp_path):
    prepare_output(tmp_path, settings={"seed": 1, "sizes": (1, 2)})
    assert prepare_output(tmp_path, resume=True, settings={"seed": 1, "sizes": [1, 2]}).resumed
    with pytest.raises(OutputError, match="has seed=1, but 2 came"):
        prepare_output(tmp_path, resume=True, settings={"seed": 2, "sizes": [1, 2]})


def test_a_foreign_or_broken_run_file_is_refused_even_for_overwriting(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run.json").write_text(json.dumps({"status": "running"}))
    with pytest.raises(OutputError, match="was not written by trimtab"):
        prepare_output(tmp_path, overwrite=True)
    (tmp_path / "run.json").write_text('{"status"')
    with pytest.raises(DataError, match="not whole JSON"):
        prepare_output(tmp_path, overwrite=True)
    assert names(tmp_path) == ["precious", "run.json"]


def test_contradicting_wishes_and_files_in_the_way(tmp_path):
    with pytest.raises(SettingError, match="exclude each other"):
        prepare_output(tmp_path, overwrite=True, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        prepare_output(tmp_path / "file", overwrite=True)
