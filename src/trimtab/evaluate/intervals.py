"""How sure a share of right answers is."""

from __future__ import annotations

import math

from trimtab.errors import SettingError

Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson_interval(correct: int, number: int, z: float = Z_95) -> tuple[float, float]:
    """Return the score interval of Wilson (1927) of a share.

    Unlike the interval mean +- z * sd it stays inside [0, 1] and has a width at 0 and 1.

    Args:
        correct: How many were right, in 0..number.
        number: How many there were; 0 gives (0, 1): nothing is known.
        z: Point of the normal distribution; 95 % by default.

    Raises:
        SettingError: `correct` outside 0..number.
    """
    if not 0 <= correct <= number:
        raise SettingError(f"correct must be in 0..number={number}, but {correct} came.")
    if number == 0:
        return 0.0, 1.0
    share, weight = correct / number, z * z / number
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / number + weight / (4 * number))
    return 0.0 if correct == 0 else middle - half, 1.0 if correct == number else middle + half
