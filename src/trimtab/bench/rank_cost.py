"""What it costs that a step waits for the slowest rank: a simulation with measured seconds per token.

All ranks exchange gradients once in a step, so each step takes as long as its slowest rank. Ranks differ by the lengths
of their rows, and by their modes where these are not agreed on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.bench.floor import FloorModel, Rows
from trimtab.bench.shapes import TrainingShape, draw_text_lengths
from trimtab.errors import setting_error

SCHEMES = ("full", "lock_step", "independent", "per_sample")
"""Plain training on all tokens; modes that all ranks share; modes drawn by every rank for itself; and modes per sample,
in packs of one number of tokens instead of one number of rows."""


@dataclass(frozen=True)
class TokenSeconds:
    """Seconds per place of a row, measured without padding.

    Attributes:
        full: Of a row of plain training.
        fast: Of a pruned row.
        slow: Of a full row with its teacher.
    """

    full: float
    fast: float
    slow: float


def simulate_ranks(
    shape: TrainingShape,
    floor: FloorModel,
    seconds: TokenSeconds,
    ranks: int,
    *,
    slow_ratio: float,
    steps: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Return the seconds per sample and rank of each of `SCHEMES`.

    Args:
        shape: For the lengths of rows and their number per step and rank.
        floor: For the visual tokens of a row in each mode.
        seconds: What a place costs.
        ranks: How many, at least 1.
        slow_ratio: Share of slow steps, or samples.
        steps: Steps to simulate, at least 1.
        seed: Of lengths and modes.

    Raises:
        SettingError: A number outside its range.
    """
    for name, value in (("ranks", ranks), ("steps", steps)):
        if value < 1:
            raise setting_error("simulate_ranks", name, "at least 1", value)
    drawn = random.Random(seed)
    pool = draw_text_lengths(shape, 2048, seed)
    rows = [drawn.choices(pool, k=shape.samples) for _ in range(ranks * steps)]
    cost = {
        "full": [_cost(floor, text, "full", seconds.full) for text in rows],
        "fast": [_cost(floor, text, "fast", seconds.fast) for text in rows],
        "slow": [_cost(floor, text, "slow", seconds.slow) for text in rows],
    }
    shared = [drawn.random() < slow_ratio for _ in range(steps)]
    own = [drawn.random() < slow_ratio for _ in rows]
    modes = {
        "full": ["full"] * len(rows),
        "lock_step": ["slow" if shared[number // ranks] else "fast" for number in range(len(rows))],
        "independent": ["slow" if one else "fast" for one in own],
    }
    found = {}
    for scheme, chosen in modes.items():
        taken = [cost[mode][number] for number, mode in enumerate(chosen)]
        found[scheme] = _waiting(taken, ranks) / (steps * shape.samples)
    found["per_sample"] = _packed(shape, floor, seconds, ranks, slow_ratio, steps, drawn, pool)
    return found


def _cost(floor: FloorModel, text: Sequence[int], view: str, seconds: float) -> float:
    nothing = [False] * len(text)
    return seconds * sum(floor.lengths(view, Rows(text, text, nothing)))


def _waiting(taken: Sequence[float], ranks: int) -> float:
    return sum(max(taken[first : first + ranks]) for first in range(0, len(taken), ranks))


def _packed(
    shape: TrainingShape,
    floor: FloorModel,
    seconds: TokenSeconds,
    ranks: int,
    slow_ratio: float,
    steps: int,
    drawn: random.Random,
    pool: Sequence[int],
) -> float:
    """Let every rank fill one pack per step, row by row, until the next row does not fit."""
    taken, samples, waiting = [], 0, None
    for _ in range(ranks * steps):
        left, spent = shape.pack_tokens, 0.0
        while True:
            text, slow = waiting or (drawn.choice(pool), drawn.random() < slow_ratio)
            length = floor.lengths("slow" if slow else "fast", Rows([text], [text], [slow]))[0]
            if length > left:
                waiting = (text, slow)
                break
            waiting = None
            left -= length
            spent += length * (seconds.slow if slow else seconds.fast)
            samples += 1
        taken.append(spent)
    return _waiting(taken, ranks) / samples * ranks
