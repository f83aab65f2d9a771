"""Tables and charts of the withdrawal experiment are those of its records."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from experiments.vtw import page
from tests.documents.reading import DOCUMENTS, ROOT, short

MARK = re.compile(rf"<!-- (\w+): {re.escape(page.MAKER)} -->")


@pytest.mark.parametrize("make", page.MAKERS, ids=lambda make: make.__name__)
def test_the_readme_shows_what_the_records_say(make: page.Callable[[], list[str]]) -> None:
    begin, end = page.marks(make.__name__)
    lines = make()
    assert len(lines) > 2, "the experiment has records"
    text = (ROOT / page.DOCUMENTS[0]).read_text(encoding="utf-8")
    assert "\n".join([begin, "", *lines, "", end]) in text, "run: python experiments/vtw/page.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_every_mark_is_known_and_filled(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = MARK.findall(text)
    assert set(names) <= {make.__name__ for make in page.MAKERS}
    assert len(names) == len(set(names)), "each table stands in a document once"
    assert not names or short(path) in page.DOCUMENTS, "enter it in DOCUMENTS of experiments/vtw/page.py"
    assert page.filled(text) == text, "run: python experiments/vtw/page.py"


def test_charts_show_what_the_records_say() -> None:
    charts = page.charts()
    assert set(charts) == {"docs/pictures/vtw_divergence.svg", "docs/pictures/vtw_accuracy.svg"}
    for name, drawing in charts.items():
        assert drawing == (ROOT / name).read_text(encoding="utf-8"), "run: python experiments/vtw/page.py"
        words = {node.text for node in ET.fromstring(drawing).iter() if node.get("class") == "key"}
        assert {"6 layers", "12 layers"} <= words


def test_a_table_is_put_between_its_marks_and_nothing_else_changes() -> None:
    begin, end = page.marks("vtw_again")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    made = "\n".join(page.vtw_again())
    assert page.filled(text) == f"before\n{begin}\n\n{made}\n\n{end}\nafter\n"
    assert page.filled("no mark\n") == "no mark\n"


def test_all_checkpoints_have_both_records_and_the_search_is_on_other_images_than_the_test() -> None:
    for depth in page.DEPTHS:
        found = list(page.pairs(depth))
        assert len(found) == 3
        for searched, judged in found:
            assert searched["last_token"]["samples"] == 20
            assert judged["chosen"] == (searched["last_token"]["layers"][page.CHOICE] or depth)
            assert judged["questions"] > 1000
