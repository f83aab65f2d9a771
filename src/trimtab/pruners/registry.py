"""The table of pruners; installed packages add to it by the entry-point group ``trimtab.pruners``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.errors import SettingError
from trimtab.pruners.contract import Pruner
from trimtab.registry import Registry

PRUNERS: Registry[Pruner] = Registry("pruner", Pruner, "trimtab.pruners")  # type: ignore[type-abstract]
register_pruner = PRUNERS.register


def pruner_names() -> list[str]:
    """Return the names of all pruners, sorted."""
    return PRUNERS.names()


def build_pruner(name: str, options: Mapping[str, Any] | None = None) -> Pruner:
    """Build the pruner of that name.

    Args:
        name: A name from `pruner_names`.
        options: Keyword arguments of the pruner's ``__init__``.

    Returns:
        The pruner.

    Raises:
        SettingError: Unknown name (the nearest is named), unknown option, or an option outside its range.
    """
    cls = PRUNERS.get(name)
    try:
        return cls(**dict(options or {}))
    except TypeError as error:
        raise SettingError(f"Pruner {name!r} cannot take the options {dict(options or {})!r}: {error}.") from error
