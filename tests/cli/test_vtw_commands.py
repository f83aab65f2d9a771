"""``trimtab vtw``: each verb on a tiny model that was saved, what users get wrong, and a house without the room."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.cli.commands import commands
from tests.cli.test_cli import run
from tests.methods.vtw.models import DEPTH, model_of
from tests.tiny import tiny_processor

import trimtab
from trimtab.cli.rooms import vtw as verbs
from trimtab.methods import vtw
from trimtab.run.ask import prompt_batch, question_row, rows_with_images, supervised_batches
from trimtab.run.load import load_to_use

VISUAL = 36
PROMPT = "what colour is this"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vtw")
    model_of("llava").save_pretrained(str(place / "model"))
    tiny_processor().save_pretrained(str(place / "model"))
    lines = []
    for number, colour in enumerate(("red", "blue", "green", "white", "black")):
        Image.new("RGB", (24, 24), colour).save(place / f"{number}.png")
        said = [{"role": "user", "content": "what digit " * number + PROMPT}]
        said.append({"role": "assistant", "content": "it is a red one"})
        lines.append({"messages": said, "images": [f"{number}.png"] if number != 1 else []})
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (place / "text.jsonl").write_text(json.dumps(lines[1]), encoding="utf-8")
    return place


@pytest.fixture(autouse=True)
def desk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    return folder


SEARCH = ("vtw", "search", "rows.jsonl", "--model", "model")
GENERATE = ("vtw", "generate", "--model", "model", "--image", "0.png", "--prompt", PROMPT, "--max-new-tokens", "4")
BENCH = ("vtw", "bench", "--model", "model", "--repeats", "1")


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def searched(**settings: Any) -> Any:
    """What the library finds on the rows with images, one row per batch."""
    model, processor = load_to_use("model")
    rows = rows_with_images("rows.jsonl", 20)
    return vtw.search_withdrawal_layer(model, supervised_batches(processor, rows), **settings)


def test_search_prints_the_curve_and_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    report = searched(threshold=100, start_layer=2)
    assert run(*SEARCH, "--threshold", "100", "--start-layer", "2") == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "4 samples" in " ".join(told[0])
    curve = {int(line[0]): line for line in told[2 : 2 + len(report.curve)]}
    assert list(curve) == [0, 1, 2, 3, 4]
    for point in report.curve:
        assert curve[point.layer][1] == f"{point.mean:.4g}"
        assert curve[point.layer][-2:] == [f"{point.flops_saving:.1%}", f"{point.kv_saving:.1%}"]
    assert ["layer", "2", "of", str(DEPTH)] in told


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ((), {}),
        (("--criterion", "answer", "--margin", "1"), {"criterion": "answer", "margin": 1.0}),
        (("--positions", "reset", "--sink-tokens", "3"), {"positions": "reset", "sink_tokens": 3}),
        (("--stacked",), {"stacked": True}),
    ],
)
def test_search_hands_over_its_options(
    words: tuple[str, ...], settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = searched(threshold=100, **settings)
    assert run(*SEARCH, "--threshold", "100", *words, "--json") == 0
    record = document(capsys)
    assert record["kind"] == "vtw_search"
    assert {name: record["settings"][name] for name in settings} == settings
    assert (record["settings"]["device"], record["settings"]["dtype"]) == ("cpu", "auto")
    results = record["results"]
    assert (results["layer"], results["samples"], results["task"]) == (report.layer, 4, "rows")
    for ours, point in zip(results["curve"], report.curve, strict=True):
        assert math.isclose(ours["mean"], point.mean, rel_tol=1e-4, abs_tol=1e-9)


def test_search_looks_at_the_first_rows_with_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SEARCH, "--threshold", "100", "--samples", "3", "--batch-size", "2", "--task", "digits", "--json") == 0
    results = document(capsys)["results"]
    assert (results["samples"], results["task"]) == (3, "digits")
    assert results["places"] > VISUAL


def test_the_defaults_of_search_are_those_of_the_library() -> None:
    library = inspect.signature(vtw.search_withdrawal_layer).parameters
    options = {one.name: one.default for one in commands()["vtw search"].params}
    shared = set(library) & set(options) - {"model", "task"}  # which the command names by the data
    assert shared == set(library) - {"model", "batches", "progress", "task"}
    assert {name: options[name] for name in shared} == {name: library[name].default for name in shared}


def test_search_writes_settings_that_generate_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vtw.json"
    assert run(*SEARCH, "--threshold", "100", "--start-layer", "2", "--sink-tokens", "1", "--to", str(file)) == 0
    assert str(file) in capsys.readouterr().out
    saved = vtw.VTWConfig.load(file)
    assert (saved.layer, saved.sink_tokens, saved.depth, saved.task) == (2, 1, DEPTH, "rows")
    assert run(*GENERATE, "--settings", str(file), "--json") == 0
    by_file = document(capsys)
    assert by_file["settings"]["withdrawal"]["sink_tokens"] == 1
    before = file.read_bytes()
    assert run(*SEARCH, "--threshold", "100", "--to", str(file)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert run(*SEARCH, "--threshold", "100", "--start-layer", "3", "--to", str(file), "--overwrite") == 0
    assert vtw.VTWConfig.load(file).layer == 3


@pytest.mark.filterwarnings("default::trimtab.TrimtabWarning")
def test_a_search_that_finds_nothing_shows_the_curve_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vtw.json"
    assert run(*SEARCH, "--threshold", "1e-9", "--to", str(file)) == 2
    told = capsys.readouterr()
    assert "not written, since there is no layer" in told.out
    assert "trimtab: warning: No layer from 1 to 3 has a mean divergence of at most 1e-09" in told.err
    assert not file.exists()
    assert run(*SEARCH, "--threshold", "1e-9", "--json") == 0
    told = document(capsys)["results"]
    assert told["layer"] is None
    assert told["kv_saving"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "model", "--overwrite"), "model is a directory. Give a file with --to."),
        (("--to", "0.png/vtw.json"), "0.png is no directory that may be written. Give another --to."),
        (("--to", "0.png/new/vtw.json"), "0.png is no directory that may be written. Give another --to."),
        (("--threshold", "nan"), "must be a finite number above 0, but nan came"),
        (("--margin", "-1"), "margin must be a finite number, at least 0"),
        (("--criterion", "answr"), "Did you mean 'answer'?"),
        (("--positions", "rest"), "positions must be 'keep' or 'reset'"),
    ],
)
def test_search_says_what_is_wrong_before_it_loads_a_model(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trimtab.run.load.load_to_use", lambda *_, **__: pytest.fail("the model was loaded"))
    assert run(*SEARCH, *words) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""


def test_search_writes_into_directories_that_are_not_there_yet(tmp_path: Path) -> None:
    assert (
        run(*SEARCH, "--threshold", "100", "--samples", "1", "--to", str(tmp_path / "new" / "deep" / "vtw.json")) == 0
    )
    assert (tmp_path / "new" / "deep" / "vtw.json").is_file()


def test_generate_answers_as_the_library_does(capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = load_to_use("model")
    batch = prompt_batch(processor, [question_row(["0.png"], PROMPT)])
    wanted = {}
    for layer in (1, DEPTH):
        with vtw.withdraw(model, layer):
            made = model.generate(**batch, max_new_tokens=4, do_sample=False)
        wanted[layer] = processor.tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert run(*GENERATE, "--layer", str(layer)) == 0
        assert capsys.readouterr().out == f"{wanted[layer]}\n"
    assert wanted[1] != wanted[DEPTH], "the model shall not answer the same whatever it sees"
    assert run(*GENERATE, "--layer", "1", "--compare", "--json") == 0
    results = document(capsys)["results"]
    assert (results["answer"], results["answer_full"]) == (wanted[1], wanted[DEPTH])
    assert [one["layer"] for one in results["prefill"]["layers"]] == [1]
    assert run(*GENERATE, "--layer", "1", "--compare") == 0
    told = capsys.readouterr().out
    assert f"{batch['input_ids'].shape[1]} places, {VISUAL} leave" in told
    assert "to layer 1" in told


def test_generate_takes_several_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*GENERATE, "--image", "2.png", "--layer", "1", "--compare", "--json") == 0
    told = document(capsys)
    assert told["settings"]["images"] == ["0.png", "2.png"]
    assert (told["settings"]["device"], told["settings"]["dtype"]) == ("cpu", "auto")
    assert told["results"]["prefill"]["left"] == 2 * VISUAL


def test_bench_prints_a_table_and_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*BENCH, "--image", "0.png", "--prompt", PROMPT, "--layers", "1, 3", "--batch-size", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 x ")
    assert [" ".join(line.split()[:3]) for line in lines[2:5]] == ["in all layers", "to layer 1", "to layer 3"]
    assert re.fullmatch(r"\S+ to \S+", re.split(r"\s{2,}", lines[3].strip())[3])
    assert "in the vision tower" in lines[5]
    assert run(*BENCH, "rows.jsonl", "--batch-size", "2", "--json") == 0
    record = document(capsys)
    assert record["kind"] == "vtw_prefill"
    assert record["settings"]["data"] == "rows.jsonl"
    assert [one["layer"] for one in record["results"]["layers"]] == [1, 2, 3]
    assert (record["results"]["rows"], record["results"]["left"]) == (2, VISUAL)


BAD = {
    "no model": ((*SEARCH[:3], "--model", "absent"), "There is no model 'absent': it is no directory here"),
    "an empty directory": ((*SEARCH[:3], "--model", "."), "holds no model: there is no config.json"),
    "no data": ((*SEARCH[:2], "absent.jsonl", *SEARCH[3:]), "absent.jsonl"),
    "no image in the data": ((*SEARCH[:2], "text.jsonl", *SEARCH[3:]), "None of the 1 rows of text.jsonl"),
    "no image to bench": ((*BENCH, "text.jsonl"), "of text.jsonl holds an image"),
    "an unknown criterion": ((*SEARCH, "--criterion", "answr"), "Did you mean 'answer'?"),
    "a threshold of nothing": ((*SEARCH, "--threshold", "0"), "must be a finite number above 0, but 0.0 came"),
    "a start behind the end": ((*SEARCH, "--start-layer", "9"), "start_layer must be a whole number from 0 to 4"),
    "unknown positions": ((*SEARCH, "--positions", "rest"), "positions must be 'keep' or 'reset', but 'rest' came"),
    "an unknown number format": ((*SEARCH, "--dtype", "float8"), "dtype must be one of"),
    "a device that is not there": ((*SEARCH, "--device", "nowhere"), "device must be a device of torch"),
    "a layer that is not there": ((*GENERATE, "--layer", "5"), "layer must be in 0..4, for 4 layers, but 5 came"),
    "a layer below 0": ((*GENERATE, "--layer", "-1"), "layer must be a whole number, at least 0, but -1 came"),
    "layer and settings": ((*GENERATE, "--layer", "1", "--settings", "x.json"), "--layer or --settings, but both came"),
    "neither layer nor settings": (GENERATE, "--layer or --settings, but neither came"),
    "no settings": ((*GENERATE, "--settings", "absent.json"), "Cannot read absent.json"),
    "settings of another kind": ((*GENERATE, "--settings", "model/config.json"), "holds no settings of VTW"),
    "no picture": ((*GENERATE, "--image", "absent.png", "--layer", "1"), "absent.png"),
    "data and image": ((*BENCH, "rows.jsonl", "--image", "0.png"), "a data file or --image, but both came"),
    "neither data nor image": (BENCH, "a data file or --image, but neither came"),
    "layers that are none": ((*BENCH, "rows.jsonl", "--layers", "1;2"), "whole numbers with commas between them"),
    "no layer at all": ((*BENCH, "rows.jsonl", "--layers", ""), "whole numbers with commas between them"),
    "a bench behind the end": ((*BENCH, "rows.jsonl", "--layers", "1,7"), "layer must be a whole number from 0 to 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_users_get_wrong_is_one_message(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("trimtab: ")
    assert message in told.err
    assert "Traceback" not in told.err
    assert told.err.count("\n") == 1


def test_an_error_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*GENERATE, "--layer", "5", "--json") == 2
    error = document(capsys)["error"]
    assert error["kind"] == "SettingError"
    assert "in 0..4" in error["message"]


def test_files_of_rooms_enter_what_they_define() -> None:
    defined = {
        name for name, value in vars(verbs).items() if inspect.isfunction(value) and value.__module__ == verbs.__name__
    }
    entered = {name.split()[1] for name in commands() if name.startswith("vtw ")}
    assert entered == {name for name in defined if not name.startswith("_")} - {"add_to"}


@pytest.mark.parametrize("there", [True, False])
def test_a_house_without_the_room_lacks_its_verbs_and_nothing_else(there: bool, tmp_path: Path) -> None:
    package = tmp_path / "trimtab"
    left_out = ("__pycache__", *([] if there else ["vtw"]))  # the folder; the file of the verbs is named vtw.py
    shutil.copytree(Path(trimtab.__file__).parent, package, ignore=shutil.ignore_patterns(*left_out))
    assert (package / "cli" / "rooms" / "vtw.py").is_file()
    assert (package / "methods" / "vtw").is_dir() is there
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def told(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout

    place = told("-c", "import trimtab; print(trimtab.__file__)")
    assert place.strip() == str(package / "__init__.py"), "the copy is what runs"
    assert ("vtw" in told("-m", "trimtab", "--help")) is there
    names = [card["name"] for card in json.loads(told("-m", "trimtab", "methods", "--json"))]
    assert ("vtw" in names) is there
    assert "dualspeed" in names
    told("-c", "import trimtab; [getattr(trimtab, name) for name in trimtab._PUBLIC]")
