"""The results in the documents are those of the kept records."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dualspeed_page", ROOT / "experiments" / "dualspeed" / "page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("document", ["README.md", "experiments/dualspeed/README.md"])
def test_the_documents_show_the_tables_of_the_records(page: ModuleType, document: str) -> None:
    records = page.read_records(ROOT / "experiments" / "dualspeed" / "records")
    lines = page.table(records, page.MAIN_ARMS if document == "README.md" else None)
    assert len(lines) > 2, "the experiment has records"
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "\n".join([page.BEGIN, *lines, page.END]) in text


def test_times_that_say_nothing_are_in_no_table(page: ModuleType) -> None:
    found = page.measured(page.read_records(ROOT / "experiments" / "dualspeed" / "records"))
    assert set(page.UNTIMED) - {arm for _, arm in found} == {"full_packed_equal_time"}, "which has no record"
    for (task, arm), means in found.items():
        assert bool(means.time) is (arm not in page.UNTIMED), (task, arm)
        assert all(time > 0 for time in means.time), (task, arm)


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(page: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_between_marks(path, ["new"])
    assert path.read_text() == f"before\n{page.BEGIN}\nnew\n{page.END}\nafter\n"
