"""Settings of the stages at which the fast mode drops visual tokens inside the language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from trimtab.errors import SettingError, near_miss, setting_error


class _Option(NamedTuple):
    """What an option may be."""

    allowed: Callable[[Any], bool]
    words: str
    listed: bool = False


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def _rises(values: Sequence[Any]) -> bool:
    return bool(values) and all(before < after for before, after in pairwise(values))


_LAYER = _Option(lambda v: _whole(v, 1), "a whole number, at least 1")
_OPTIONS: dict[str, dict[str, _Option]] = {
    "fastv": {"layer": _LAYER, "keep_ratio": _Option(_share, "a number in (0, 1)")},
    "pyramid_drop": {
        "layers": _Option(
            lambda v: all(_whole(one, 1) for one in v) and _rises(v), "rising whole numbers, at least 1", listed=True
        ),
        "keep_ratios": _Option(
            lambda v: all(_share(one) for one in v) and _rises(v[::-1]), "falling numbers in (0, 1)", listed=True
        ),
    },
    "vtw": {
        "layer": _LAYER,
        "sink_tokens": _Option(lambda v: _whole(v, 0), "a whole number, at least 0"),
        "keep_newlines": _Option(lambda v: isinstance(v, bool), "true or false"),
    },
}
INSIDE = tuple(_OPTIONS)
"""Ways to drop visual tokens inside the language model."""
DEFAULT_RATIOS = (0.5, 0.25, 0.125)
"""Shares of PyramidDrop, of the visual tokens that enter the language model."""


def checked_options(inside: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of a way to drop tokens inside, as far as that goes without a model.

    Args:
        inside: One of `INSIDE`, or None.
        options: Its options.

    Returns:
        The same, with lists for sequences, as JSON has them; a number by itself becomes a list of one.

    Raises:
        SettingError: An option that it does not have (the nearest is named), or a value outside its range.
    """
    if inside is None:
        if options:
            raise setting_error(
                "DualSpeedConfig", "inside_options", "empty without inside", dict(options),
                f"Set inside to one of {', '.join(INSIDE)}.",
            )  # fmt: skip
        return {}
    known, checked = _OPTIONS[inside], dict(options)
    for name, value in options.items():
        if name not in known:
            raise SettingError(f"inside={inside!r} has no option {name!r} in inside_options. {near_miss(name, known)}")
        if known[name].listed:
            checked[name] = list(value) if isinstance(value, list | tuple) else [value]
        if not known[name].allowed(checked[name]):
            raise setting_error("DualSpeedConfig", f"inside_options[{name!r}]", known[name].words, value)
    if inside == "pyramid_drop":
        layers, ratios = checked.get("layers"), checked.get("keep_ratios", DEFAULT_RATIOS)
        wanted = len(DEFAULT_RATIOS) if layers is None else len(layers)
        if len(ratios) != wanted:
            what = "the default has 3" if layers is None else f"layers has {len(layers)}"
            raise setting_error(
                "DualSpeedConfig", "inside_options['keep_ratios']", f"one share for each layer ({what})",
                list(ratios), "Give layers and keep_ratios together.",
            )  # fmt: skip
    return checked
