"""Checks of the options that several pruners share."""

from __future__ import annotations

import math

from trimtab.errors import setting_error


def check_flag(owner: str, name: str, value: object) -> bool:
    """Return the flag, or raise where it is not true or false.

    Args:
        owner: Class the option belongs to.
        name: Name of the option.
        value: What came.

    Returns:
        The value.

    Raises:
        SettingError: The value is not a bool.
    """
    if not isinstance(value, bool):
        raise setting_error(owner, name, "true or false", value)
    return value


def check_number(owner: str, name: str, value: object, low: float | int, high: float | int) -> float:
    """Return the number, or raise where it is outside its closed range.

    Args:
        owner: Class the option belongs to.
        name: Name of the option.
        value: What came.
        low: Smallest allowed value.
        high: Largest allowed value; infinity for none, which itself is never allowed.

    Returns:
        The value as a float.

    Raises:
        SettingError: The value is not a finite number in the range.
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:  # type: ignore[operator]
        words = f"a number in [{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number, at least {low:g}"
        raise setting_error(owner, name, words, value)
    return float(value)  # type: ignore[arg-type]
