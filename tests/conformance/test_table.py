"""docs/reference/families.md is what the suite and the family table say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.conformance import table
from tests.conformance.families import SUITE

from trimtab.anatomy import FAMILIES, REFUSED


def test_the_page_is_the_generated_one() -> None:
    assert table.FILE.read_text() == table.page(), "run: python -m tests.conformance.table"


def test_every_family_has_a_row_with_every_check() -> None:
    lines = {line.split("`")[1]: line for line in table.page().splitlines() if line.startswith("| `")}
    for name, family in FAMILIES.items():
        cells = [cell.strip() for cell in lines[name].strip("|").split(" | ")]
        assert len(cells) == 5 + len(table.COLUMNS)
        assert cells[1] == f"`{family.name}`"
    for name, reason in REFUSED.items():
        assert reason[1:].rstrip(".") in lines[name]


def test_a_reason_becomes_a_no_with_a_footnote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITE, "llava", replace(SUITE["llava"], not_masking="a made-up reason"))
    text = table.page()
    row = next(line for line in text.splitlines() if line.startswith("| `llava` "))
    number = row.split("no[^")[1].split("]")[0]
    assert f"[^{number}]: A made-up reason." in text
