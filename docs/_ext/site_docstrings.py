"""How docstrings of the house become reference entries: fields with type and default, and readable tensor shapes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import TYPE_CHECKING, Any, get_type_hints

from sphinx.util.typing import stringify_annotation

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FIELD = re.compile(r"^    (\w+): (.*)$")


def field_entries(cls: type, lines: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take the section ``Attributes:`` out of the docstring of a dataclass.

    Args:
        cls: The dataclass.
        lines: Its docstring.

    Returns:
        The other lines, and the lines about each field.
    """
    if "Attributes:" not in lines:
        return list(lines), {}
    start = lines.index("Attributes:")
    end = next((n for n in range(start + 1, len(lines)) if lines[n] and not lines[n].startswith(" ")), len(lines))
    about: dict[str, list[str]] = {}
    for line in lines[start + 1 : end]:
        found = FIELD.match(line)
        if found:
            about[found[1]] = [found[2]]
        elif line.strip():
            list(about.values())[-1].append(line.strip())
    return [*lines[:start], *lines[end:]], about


def returns_as_text(lines: list[str]) -> list[str]:
    """Write the section ``Returns:`` as a field: types stand in the signature, so a colon in it is only a colon."""
    if "Returns:" not in lines:
        return list(lines)
    start = lines.index("Returns:")
    return [*lines[:start], f":returns: {lines[start + 1].strip()}", *lines[start + 2 :]]


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field as it is written in code, or an empty text where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "" if field.default is dataclasses.MISSING else repr(field.default)


def _describe(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give the fields of a dataclass their types and defaults; runs before napoleon."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # or else napoleon takes what stands before a colon of the first line for a type
    lines[:] = returns_as_text(lines)
    if not (inspect.isclass(obj) and dataclasses.is_dataclass(obj)):
        return
    rest, about = field_entries(obj, lines)
    if not about:
        return
    known = {field.name: field for field in dataclasses.fields(obj)}
    types = get_type_hints(obj)
    for field_name, words in about.items():
        rest += ["", f".. attribute:: {field_name}"]
        field = known.get(field_name)
        if field is not None:
            rest.append(f"   :type: {stringify_annotation(types[field_name], 'smart')}")
            rest += [f"   :value: {default_of(field)}"] if default_of(field) else []
        rest += ["", *(f"   {line}" for line in words)]
    lines[:] = [*rest, ""]


def _sign(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """Leave out the signature of a dataclass with described fields: they say the same, and more."""
    if inspect.isclass(obj) and dataclasses.is_dataclass(obj) and "Attributes:" in (inspect.getdoc(obj) or ""):
        return "", None
    return None


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples where they stand a second time, without a word of meaning."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Enter the extension."""
    app.connect("autodoc-process-docstring", _describe, priority=100)
    app.connect("autodoc-process-signature", _sign)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
