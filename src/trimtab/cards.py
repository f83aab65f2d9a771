"""Cards: what each method makes smaller, read from docstrings without importing a method.

A card is the docstring of a method's ``__init__.py``::

    Name: one sentence that says what it does.

    Paper: title, venue or arXiv number
    Gets smaller: what shrinks
    Goes in: what the user supplies
    Comes out: what the user gets back
    Cost: what it takes, in time, data or memory
    Entry: the names to import or the command to type

A field may run over several lines; the following lines are indented.
"""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.errors import SettingError, near_miss

FIELDS = ("Paper", "Gets smaller", "Goes in", "Comes out", "Cost", "Entry")
"""Fields of a card, in order; all must be there."""

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """One method at a glance.

    Attributes:
        name: Name of the folder, as in ``trimtab methods NAME``.
        title: Name as the paper writes it.
        summary: One sentence.
        paper: Title and where it appeared.
        gets_smaller: What shrinks.
        goes_in: What the user supplies.
        comes_out: What the user gets back.
        cost: What it takes.
        entry: Names to import, or the command.
    """

    name: str
    title: str
    summary: str
    paper: str
    gets_smaller: str
    goes_in: str
    comes_out: str
    cost: str
    entry: str

    def to_dict(self) -> dict[str, str]:
        """Return the card as a plain dict for JSON."""
        return asdict(self)


def parse_card(name: str, docstring: str) -> Card:
    """Read a card from a docstring.

    Args:
        name: Name of the method's folder.
        docstring: The cleaned docstring.

    Returns:
        The card.

    Raises:
        SettingError: The first line is not ``Name: sentence``, or a field is missing, empty or given twice.
    """
    lines = docstring.strip().splitlines()
    title, colon, summary = lines[0].partition(": ") if lines else ("", "", "")
    if not (colon and title.strip() and summary.strip()) or title in FIELDS:
        raise SettingError(f"The card of {name!r} must begin with 'Name: one sentence', but begins {lines[:1]!r}.")
    found = _read_fields(name, lines[1:])
    missing = [field for field in FIELDS if not found.get(field)]
    if missing:
        raise SettingError(f"The card of {name!r} lacks {', '.join(missing)}. Each is a line 'Field: text'.")
    values = {field.lower().replace(" ", "_"): found[field] for field in FIELDS}
    return Card(name=name, title=title.strip(), summary=summary.strip(), **values)


def _read_fields(name: str, lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    current = ""
    for line in lines:
        label, colon, text = line.partition(":")
        if colon and label in FIELDS:
            if label in found:
                raise SettingError(f"The card of {name!r} gives {label!r} twice.")
            current, found[label] = label, text.strip()
        elif current and line.startswith(" "):
            found[current] = f"{found[current]} {line.strip()}"
        else:
            current = ""
    return found


def all_cards(package: Path = PACKAGE) -> list[Card]:
    """Read every card of the house: the flagship first, then the rooms by name.

    Args:
        package: Folder of the package.

    Returns:
        The cards.

    Raises:
        SettingError: A card is malformed; the message names it.
    """
    rooms = sorted(path.parent for path in (package / "methods").glob("*/__init__.py"))
    return [_read_card(folder) for folder in (package / "dualspeed", *rooms)]


def _read_card(folder: Path) -> Card:
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    return parse_card(folder.name, ast.get_docstring(tree) or "")


def find_card(name: str, package: Path = PACKAGE) -> Card:
    """Return the card of one method.

    Args:
        name: Name of the method's folder, upper or lower case.
        package: Folder of the package.

    Raises:
        SettingError: No such method; the nearest is named.
    """
    cards = {card.name: card for card in all_cards(package)}
    if name.lower() not in cards:
        raise SettingError(f"Unknown method {name!r}. {near_miss(name.lower(), cards)}")
    return cards[name.lower()]


def markdown_table(cards: list[Card]) -> str:
    """Write the cards as the table of the README.

    Args:
        cards: The methods, in order.

    Returns:
        A Markdown table without a final newline.
    """
    rows = [["Method", "What gets smaller", "What comes out", "Cost", "Paper"]]
    rows += [[f"**{c.title}** (`{c.name}`)", c.gets_smaller, c.comes_out, c.cost, c.paper] for c in cards]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
