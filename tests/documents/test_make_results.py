"""Tables and charts of the documentation are those of the kept records."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
from tests.documents.reading import ROOT


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results() -> Any:
    return _load()


PARTS = [(document, maker.__name__) for document, makers in _load().DOCUMENTS.items() for maker in makers]


@pytest.mark.parametrize(("document", "part"), PARTS)
def test_documents_show_what_the_records_say(results: Any, document: str, part: str) -> None:
    begin, end = results.marks(part)
    made = "\n".join([begin, *getattr(results, part)(), end])
    assert made.count("\n") > 3
    assert made in (ROOT / document).read_text(encoding="utf-8"), "run: python docs/make_results.py"


def test_charts_show_what_the_records_say(results: Any) -> None:
    charts = results.charts()
    assert len(charts) == 3
    for name, drawing in charts.items():
        assert drawing == (ROOT / name).read_text(encoding="utf-8"), "run: python docs/make_results.py"
        root = ET.fromstring(drawing)
        circles = [node for node in root.iter() if node.tag.endswith("circle")]
        labels = {node.text for node in root.iter() if node.get("class") == "name"}
        assert len(circles) == len(labels) >= 3
        assert {"all tokens", "pruned only", "DualSpeed"} <= labels


def test_labels_of_a_chart_keep_apart_and_hostile_words_stay_words(results: Any) -> None:
    points = [results.Point(f"<b>{n}", "full", (0.3,), (50.0 + n / 10,)) for n in range(4)]
    root = ET.fromstring(results.scatter(points, "<script>", "x", "y"))
    lines = sorted(float(node.get("y")) for node in root.iter() if node.get("class") == "name")
    assert all(after - before >= 15 for before, after in pairwise(lines))
    assert "<script>" in {node.text for node in root.iter()}


def test_times_of_busy_machines_are_left_out(results: Any) -> None:
    assert "time of full" not in "".join(results.options())
    assert all(line.count("|") == 7 for line in results.options() if line)


def test_every_mark_of_the_documents_is_known(results: Any) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        for document, makers in results.DOCUMENTS.items():
            if path == ROOT / document:
                assert text.count("python docs/make_results.py`; a test compares") == len(makers)
