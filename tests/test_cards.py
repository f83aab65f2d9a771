"""Cards: parsed from source, complete, and never silently wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.cards import FIELDS, PACKAGE, Card, all_cards, find_card, markdown_table, parse_card
from trimtab.errors import SettingError

TEXT = """Small: make a thing smaller.

Paper: A Paper (arXiv 1234.56789)
Gets smaller: the thing,
    and a second thing
Goes in: a thing
Comes out: a smaller thing
Cost: nothing
Entry: `shrink(thing)`

Anything after a blank line is prose: not a field.
"""


def test_a_card_is_read_field_by_field() -> None:
    assert parse_card("small", TEXT) == Card(
        name="small",
        title="Small",
        summary="make a thing smaller.",
        paper="A Paper (arXiv 1234.56789)",
        gets_smaller="the thing, and a second thing",
        goes_in="a thing",
        comes_out="a smaller thing",
        cost="nothing",
        entry="`shrink(thing)`",
    )


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(field: str) -> None:
    without = re.sub(rf"^{field}:.*\n(?:    .*\n)*", "", TEXT, flags=re.MULTILINE)
    with pytest.raises(SettingError, match=f"card of 'small' lacks {field}"):
        parse_card("small", without)


def test_an_empty_field_counts_as_missing() -> None:
    with pytest.raises(SettingError, match="lacks Cost"):
        parse_card("small", TEXT.replace("Cost: nothing", "Cost:"))


def test_a_field_given_twice_is_an_error() -> None:
    with pytest.raises(SettingError, match="gives 'Cost' twice"):
        parse_card("small", TEXT.replace("Entry:", "Cost: more\nEntry:"))


@pytest.mark.parametrize("first", ["", "No colon here.", ": no name", "Name: "])
def test_the_first_line_must_name_and_describe(first: str) -> None:
    with pytest.raises(SettingError, match="must begin with"):
        parse_card("small", TEXT.replace("Small: make a thing smaller.", first))


def test_the_house_has_the_flagship_first_and_every_room() -> None:
    cards = all_cards()
    rooms = sorted(path.parent.name for path in (PACKAGE / "methods").glob("*/__init__.py"))
    assert [card.name for card in cards] == ["dualspeed", *rooms]
    assert cards[0].title == "DualSpeed"


def test_reading_cards_imports_no_method(tmp_path: Path) -> None:
    for folder, title in [("dualspeed", "Alpha"), ("methods/zeta", "Zeta"), ("methods/beta", "Beta")]:
        (tmp_path / folder).mkdir(parents=True)
        source = f'"""{TEXT.replace("Small", title)}"""\n\nraise RuntimeError("was imported")\n'
        (tmp_path / folder / "__init__.py").write_text(source, encoding="utf-8")
    assert [card.title for card in all_cards(tmp_path)] == ["Alpha", "Beta", "Zeta"]
    assert find_card("ZETA", tmp_path).name == "zeta"


def test_an_unknown_method_gets_the_nearest_name() -> None:
    with pytest.raises(SettingError, match="Did you mean 'dualspeed'"):
        find_card("dualsped")


def test_the_table_has_one_row_per_card_and_keeps_its_columns() -> None:
    card = parse_card("small", TEXT.replace("Cost: nothing", "Cost: one | two"))
    lines = markdown_table([card, card]).splitlines()
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert "one \\| two" in lines[2]
