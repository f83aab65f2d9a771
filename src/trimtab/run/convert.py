"""Values of a run file to the types that their fields declare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from trimtab.errors import SettingError, near_miss, setting_error

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def convert(owner: str, name: str, value: Any, hint: Any) -> Any:
    """Bring a value to the type of its field.

    Text becomes a number or a truth value where the field wants one, a whole number becomes a float, and a single
    value becomes a list of one; nothing else is guessed.

    Args:
        owner: What the field belongs to, for messages.
        name: Name of the field, for messages.
        value: What the run file or the command line gave.
        hint: Declared type of the field.

    Returns:
        The converted value.

    Raises:
        SettingError: The value does not fit the type.
    """
    options = _options(hint)
    if value is None and NoneType in options:
        return None
    for option in sorted(options, key=lambda option: (type(value) is not _plain(option), _strictness(option))):
        fitted = _fit(value, option)
        if fitted is not _NO:
            return fitted
    raise setting_error(owner, name, " or ".join(_word(option) for option in options), value)


def convert_all(owner: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Convert named values; an unknown name is an error.

    Args:
        owner: What the names belong to, for messages.
        values: Name -> value.
        hints: Name -> declared type.

    Returns:
        Name -> converted value.

    Raises:
        SettingError: An unknown name (the nearest is named), or a value that does not fit its type.
    """
    for name in values:
        if name not in hints:
            raise SettingError(f"Unknown setting {name!r} of {owner}. {near_miss(name, hints)}")
    return {name: convert(owner, name, value, hints[name]) for name, value in values.items()}


_NO = object()


def _options(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _plain(option: Any) -> Any:
    return get_origin(option) or option


def _strictness(option: Any) -> int:
    """Order in which the members of a union are tried: the one that takes everything last."""
    order = [bool, int, float, dict, list, str]
    plain = _plain(option)
    return order.index(plain) if plain in order else 0


def _fit(value: Any, option: Any) -> Any:
    plain = _plain(option)
    if option is Any:
        return value
    if plain is Literal:
        return value if value in get_args(option) else _NO
    if isinstance(plain, type) and issubclass(plain, Enum):
        return value if value in [member.value for member in plain] else _NO
    if plain in (list, tuple, Sequence):
        return _fit_list(value, plain, option)
    simple = {bool: _fit_bool, int: _fit_int, float: _fit_float, str: _fit_text, dict: _fit_dict}.get(plain)
    return simple(value) if simple else (value if isinstance(plain, type) and isinstance(value, plain) else _NO)


def _fit_list(value: Any, plain: Any, option: Any) -> Any:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    inner = (get_args(option) or (Any,))[0]
    fitted = [_fit(item, inner) for item in items]
    return (
        _NO if value is None or any(item is _NO for item in fitted) else fitted if plain is Sequence else plain(fitted)
    )


def _fit_bool(value: Any) -> Any:
    if isinstance(value, str):
        return _WORDS.get(value.lower(), _NO)
    return value if isinstance(value, bool) else _NO


def _fit_int(value: Any) -> Any:
    number = _fit_float(value)
    return int(number) if number is not _NO and math.isfinite(number) and number == int(number) else _NO


def _fit_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _NO
    try:
        return float(value)
    except ValueError:
        return _NO


def _fit_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (str, int, float)) else _NO


def _fit_dict(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else _NO


def _word(option: Any) -> str:
    plain = _plain(option)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    if plain is NoneType:
        return "null"
    if plain in (list, tuple, Sequence):
        return "a list"
    if plain is Literal:
        return " or ".join(map(repr, get_args(option)))
    if isinstance(plain, type) and issubclass(plain, Enum):
        return "one of " + ", ".join(str(member.value) for member in plain)
    return words.get(plain, getattr(plain, "__name__", str(plain)))
