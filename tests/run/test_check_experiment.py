"""The comparison of `check` with `bench` runs, and the page shows its kept records."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.records import read_records

ROOT = Path(__file__).parents[2]
HERE = ROOT / "experiments" / "check"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"check_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return load("table")


def made(predicted: float, measured: float, layers: int = 4) -> dict[str, Any]:
    results = {"predicted": predicted, "arithmetic": 3.0, "measured": measured, "spread": {"plain": 0.1, "fast": 0.3}}
    sizes = {"layers": layers, "tower_layers": 2}
    return {"settings": {"sizes": sizes}, "results": results, "hardware": {"cores": 2}}


def test_the_page_shows_the_kept_records(page: ModuleType) -> None:
    records = read_records(HERE)
    assert len(records) >= 4, "two models, two runs"
    assert {record["kind"] for record in records} == {"check_compare"}
    text = (ROOT / "docs" / "guides" / "check.md").read_text(encoding="utf-8")
    assert "\n".join([page.BEGIN, *page.lines_of(records), page.END]) in text


def test_the_table_and_its_sentence_are_counted_from_the_records(page: ModuleType) -> None:
    lines = page.lines_of([made(2.0, 2.5), made(2.0, 2.0), made(3.0, 2.0, layers=8)])
    assert lines[3:6] == [
        "| 4 + 2 blocks | 1 | 2.00 | 3.00 | 2.50 |",
        "| 4 + 2 blocks | 2 | 2.00 | 3.00 | 2.00 |",
        "| 8 + 2 blocks | 1 | 3.00 | 3.00 | 2.00 |",
    ]
    said = " ".join(lines[6:])
    assert "On 2 cores" in said
    assert "up to 50% apart" in said
    assert "from itself by up to 25%" in said
    assert "spread by up to 30%" in said


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "PAGE", document)
    page.main()
    lines = "\n".join(page.lines_of(read_records(HERE)))
    assert document.read_text() == f"before\n{page.BEGIN}\n{lines}\n{page.END}\nafter\n"
    assert lines in capsys.readouterr().out


def test_a_comparison_of_toy_size_leaves_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--models", "toy", "--runs", "1", "--seconds", "20", "--steps", "1", "--records", str(tmp_path)]
    load("compare").main(given)
    (record,) = read_records(tmp_path)
    results = record["results"]
    assert all(results[name] > 0 for name in ("predicted", "arithmetic", "measured"))
    assert results["whole_model"] is True
    assert set(results["spread"]) == {"plain", "fast", "slow"}
    assert record["settings"]["batch"] == 8
    assert f"toy, run 1: predicted {results['predicted']:.2f}" in capsys.readouterr().out
