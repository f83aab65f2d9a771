"""Which step or sample is fast and which is slow: a pure function of settings and number.

Every rank computes the same answer without talking, a resumed run continues where it stopped, and no random state
outside is touched. The released code draws from Python's global generator inside the forward pass instead, so that
ranks agree only as long as none of them draws anything else.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Literal

from trimtab.dualspeed.config import SCHEDULES
from trimtab.errors import setting_error

Mode = Literal["fast", "slow"]


def mode_of_step(step: int, *, kind: str, slow_ratio: float, seed: int, total_steps: int | None = None) -> Mode:
    """Say whether a step is fast or slow.

    - ``"bernoulli"``: each step is slow with probability `slow_ratio`, independently (the paper's draw).
    - ``"stratified"``: the steps fall into blocks of 1/slow_ratio, with exactly one slow step at a random place
      in each (blocks of unequal length where 1/slow_ratio is no whole number).
    - ``"annealed"``: stratified with a share that climbs linearly from 0 at the first step to twice `slow_ratio`
      at the last, so that the total is that of the other kinds. Steps past `total_steps` go on at the full share.

    Args:
        step: Number of the step, from 0.
        kind: One of the three.
        slow_ratio: Mean share of slow steps, in [0, 1]; at most 0.5 for ``"annealed"``.
        seed: Names the draw.
        total_steps: Steps of the whole run, at least 1; ``"annealed"`` needs it.

    Returns:
        ``"fast"`` or ``"slow"``.

    Raises:
        SettingError: A value outside its range.
    """
    _check(step, kind, slow_ratio, total_steps)
    if slow_ratio == 0:
        return "fast"
    if slow_ratio == 1:
        return "slow"
    if kind == "bernoulli":
        return "slow" if _uniform(seed, "step", step) < slow_ratio else "fast"
    # 0.1 as a float is a little more than a tenth; the nearest short fraction is what was meant.
    ratio = Fraction(slow_ratio).limit_denominator(1_000_000) or Fraction(slow_ratio)
    if kind == "annealed" and total_steps is not None:
        start, end, block = _annealed_block(step, ratio, total_steps)
    else:
        block = step * ratio.numerator // ratio.denominator
        start, end = (math.ceil(Fraction(edge) / ratio) for edge in (block, block + 1))
    chosen = start + int(_uniform(seed, kind, block) * (end - start))
    return "slow" if step == chosen else "fast"


def mode_of_sample(sample: int, *, epoch: int, slow_ratio: float, seed: int) -> Mode:
    """Say whether a sample is fast or slow in an epoch: slow with probability `slow_ratio`, independently.

    Args:
        sample: Its number in the data set, at least 0.
        epoch: The epoch, from 0.
        slow_ratio: Mean share of slow samples, in [0, 1].
        seed: Names the draw.

    Returns:
        ``"fast"`` or ``"slow"``.

    Raises:
        SettingError: A value outside its range.
    """
    for name, value in (("sample", sample), ("epoch", epoch)):
        if value < 0:
            raise setting_error("mode_of_sample", name, "at least 0", value)
    if not 0 <= slow_ratio <= 1:
        raise setting_error("mode_of_sample", "slow_ratio", "a number in [0, 1]", slow_ratio)
    return "slow" if _uniform(seed, f"sample {epoch}", sample) < slow_ratio else "fast"


def _annealed_block(step: int, ratio: Fraction, total: int) -> tuple[int, int, int]:
    """The block around a step: expected slow steps up to step s are ratio * s^2 / total, then 2 * ratio a step."""

    def expected(s: int) -> Fraction:
        return ratio * s * s / total if s <= total else ratio * total + 2 * ratio * (s - total)

    def first(count: int) -> int:
        """Return the first step at which at least `count` slow steps are expected."""
        if count >= ratio * total:
            return total + math.ceil((count - ratio * total) / (2 * ratio))
        guess = math.isqrt(math.floor(count * total / ratio))
        while expected(guess) < count:
            guess += 1
        return guess

    block = math.floor(expected(step))
    return first(block), first(block + 1), block


def _uniform(seed: int, stream: str, number: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"trimtab {seed} {stream} {number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _check(step: int, kind: str, slow_ratio: float, total_steps: int | None) -> None:
    if step < 0:
        raise setting_error("mode_of_step", "step", "at least 0", step)
    if kind not in SCHEDULES:
        raise setting_error("mode_of_step", "kind", f"one of {', '.join(SCHEDULES)}", kind)
    if not 0 <= slow_ratio <= 1:
        raise setting_error("mode_of_step", "slow_ratio", "a number in [0, 1]", slow_ratio)
    if kind != "annealed":
        return
    if slow_ratio > 0.5:
        raise setting_error("mode_of_step", "slow_ratio", "at most 0.5 where the share is annealed", slow_ratio)
    if total_steps is None or total_steps < 1:
        raise setting_error(
            "mode_of_step", "total_steps", "at least 1 where the share is annealed", total_steps,
            "Give the number of steps of the whole run.",
        )  # fmt: skip
