"""`bench/training.py`: the records of a GPU's table at toy size, and the page made from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trimtab.bench import shapes
from trimtab.records import read_record
from trimtab.report.speed import BEGIN, END, speed_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_script", ROOT / "bench" / "training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(shapes, "SHAPES", dict(shapes.SHAPES))
    monkeypatch.setattr("trimtab.bench.shapes.SHAPES", shapes.SHAPES)
    return module


def test_the_real_sizes_run_at_toy_size(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--only", "llava_1_5_7b_40", "small_trained_tower"]
    command = ["--size", "real", "--small", "--repeats", "1", "--records", str(tmp_path), *wanted]
    assert script.main(command) == 0
    assert "ours_over_public_packed" in capsys.readouterr().out
    made = {path.stem: read_record(path) for path in tmp_path.glob("*.json")}
    assert set(made) == {"training_llava_1_5_7b_40", "training_small_trained_tower"}
    assert made["training_small_trained_tower"]["settings"]["shape"]["tower_trained"]
    assert set(made["training_small_trained_tower"]["results"]["curves"]) == {"text", "tiles"}
    assert script.main(command) == 0
    assert capsys.readouterr().out == "", "a record that exists is kept"
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    assert script.main(["--page", "--records", str(tmp_path), "--to", str(page)]) == 0
    assert page.read_text().count("### ") == 2


def test_real_sizes_without_a_gpu_are_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--size", "real", "--records", str(tmp_path)]) == 2
    assert "--size real needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_record_that_is_not_there_is_named(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--size", "real", "--small", "--only", "llava_2", "--records", str(tmp_path)]
    assert script.main(command) == 2
    assert "--only must name some of" in capsys.readouterr().err


def test_every_size_stands_in_the_table_of_a_gpu(script: ModuleType) -> None:
    means = {(given["size"], given.get("text_mean")) for _, given in script.REAL}
    for size in ("llava-1.5-7b", "llava-next-7b"):
        assert {(size, mean) for mean in (40, 200, 300)} <= means
    assert {given["size"] for _, given in script.REAL} == set(shapes.SHAPES) - {"toy"}


def test_the_page_shows_the_kept_records(script: ModuleType) -> None:
    page = (ROOT / "docs" / "results" / "speed.md").read_text(encoding="utf-8")
    records = script.read_training_records(ROOT / "bench" / "records")
    assert "\n".join([BEGIN, *(speed_lines(records) if records else []), END]) in page
