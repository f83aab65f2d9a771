"""How many tokens a keep ratio leaves."""

from __future__ import annotations

import math

from trimtab.errors import SettingError, setting_error

RULES = ("floor", "round", "ceil", "released")


def kept_count(tokens: int, keep_ratio: float | int, rule: str = "floor") -> int:
    """Return how many of `tokens` visual tokens a keep ratio leaves.

    The sources differ: the released DualSpeed code takes ``int((1 - 0.9) * N)``, and ``1 - 0.9`` is a little under
    0.1, so that 10 tokens give 0 and 2,880 give 287; vbdi/divprune rounds. ``"floor"`` forgives float error and gives
    1 and 288. Of 576 both keep 57.

    Args:
        tokens: Visual tokens of one image, at least 1.
        keep_ratio: Share kept, in (0, 1].
        rule: ``"floor"`` (default), ``"round"`` (half to even), ``"ceil"`` or ``"released"``.

    Returns:
        A number in 1..tokens.

    Raises:
        SettingError: A value outside its range, or a ratio that keeps 0 tokens.
    """
    exact = _share(tokens, keep_ratio, rule)
    if exact < 1:
        raise SettingError(
            f"keep_ratio={keep_ratio} keeps 0 of {tokens} tokens (rule {rule!r}). "
            f"Raise keep_ratio to at least {1 / tokens:.4g}."
        )
    return exact


def kept_counts(
    sizes: set[int], keep_ratio: float | int, rule: str = "floor", *, any_size: bool = False
) -> dict[int, int]:
    """Return how many tokens a keep ratio leaves of tiles of several sizes, at least 1 of each.

    A small tile beside larger ones keeps one token where the ratio would leave none. Where it leaves none of any
    tile the ratio is too low for the model, unless the sizes are those of the pictures (an icon alone in a batch).

    Args:
        sizes: Tokens of each tile, at least 1.
        keep_ratio: Share kept, in (0, 1].
        rule: As in `kept_count`.
        any_size: Whether tiles are as large as their pictures happen to be.

    Returns:
        By size, a number in 1..size.

    Raises:
        SettingError: A value outside its range, or a ratio that keeps 0 tokens of every tile, with not `any_size`.
    """
    counts = {size: _share(size, keep_ratio, rule) for size in sizes}
    if counts and not any_size and not any(counts.values()):
        kept_count(max(counts), keep_ratio, rule)  # says so
    return {size: max(1, count) for size, count in counts.items()}


def _share(tokens: int, keep_ratio: float | int, rule: str) -> int:
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
    return min(kept, tokens)
