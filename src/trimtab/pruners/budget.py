"""How many tokens a keep ratio leaves."""

from __future__ import annotations

import math

from trimtab.errors import SettingError, setting_error

RULES = ("floor", "round", "ceil", "released")


def kept_count(tokens: int, keep_ratio: float | int, rule: str = "floor") -> int:
    """Return how many of `tokens` visual tokens a keep ratio leaves.

    The sources differ: the released DualSpeed code takes ``int((1 - 0.9) * 576)``, which is 57 because
    ``1 - 0.9`` is a little under 0.1; vbdi/divprune rounds. ``"floor"`` forgives float error and gives 57,
    and 1 of 10 where the released rule gives 0.

    Args:
        tokens: Visual tokens of one image, at least 1.
        keep_ratio: Share kept, in (0, 1].
        rule: ``"floor"`` (default), ``"round"`` (half to even), ``"ceil"`` or ``"released"``.

    Returns:
        A number in 1..tokens.

    Raises:
        SettingError: A value outside its range, or a ratio that keeps 0 tokens.
    """
    if tokens < 1:
        raise setting_error("kept_count", "tokens", "at least 1", tokens)
    if not 0 < keep_ratio <= 1:
        raise setting_error("kept_count", "keep_ratio", "in (0, 1]", keep_ratio)
    exact = keep_ratio * tokens
    if rule == "floor":
        kept = math.floor(exact + 1e-6)
    elif rule == "round":
        kept = round(exact)
    elif rule == "ceil":
        kept = math.ceil(exact - 1e-6)
    elif rule == "released":
        kept = int((1 - (1 - keep_ratio)) * tokens)
    else:
        raise setting_error("kept_count", "rule", f"one of {', '.join(RULES)}", rule)
    if kept < 1:
        raise SettingError(
            f"keep_ratio={keep_ratio} keeps 0 of {tokens} tokens (rule {rule!r}). "
            f"Raise keep_ratio to at least {1 / tokens:.4g}."
        )
    return min(kept, tokens)
