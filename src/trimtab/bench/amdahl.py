"""What a faster step is worth beside the parts of a step that stay: Amdahl's law on measured seconds.

A step waits for its batch and then computes. Without worker processes the two add up; with W of them batches are made
while the step before computes, and the slower side sets the pace:

    step(mode) = tower + decoder + head + optimizer
    no workers:  time = step + data          W workers:  time = max(step, data / W)
    DualSpeed's step is (1 - slow_ratio) fast + slow_ratio slow, on average
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.errors import setting_error

MODES = ("plain", "fast", "slow")
LITTLE = 1.2
"""Gain below which DualSpeed is hardly worth its extra settings."""


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Seconds of one training step, by what they go into.

    Attributes:
        tower: Vision tower and projector, backward included where they are trained.
        decoder: The blocks of the language model, forward and backward.
        head: All else of forward and backward: embeddings, head and loss, in fast steps also the pruner.
        optimizer: The update of the weights.
    """

    tower: float
    decoder: float
    head: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.tower + self.decoder + self.head + self.optimizer


@dataclass(frozen=True)
class Gain:
    """What `expected_gain` returns.

    Attributes:
        speedup: Seconds of plain training over those of DualSpeed, waiting for data included.
        speedup_compute: The same if batches were there at once.
        shares: Part -> its share of a plain step; `"data"` is the share of waiting for the batch.
        shares_fast: The same of a fast step.
    """

    speedup: float
    speedup_compute: float
    shares: dict[str, float]
    shares_fast: dict[str, float]


def expected_gain(steps: Mapping[str, StepParts], slow_ratio: float, data_seconds: float, workers: int) -> Gain:
    """Combine measured parts into the gain to expect.

    Args:
        steps: The parts of a step in each of `MODES`.
        slow_ratio: Share of slow steps, in [0, 1].
        data_seconds: Time in which one process makes the batch of one step.
        workers: Processes that make batches; 0 where the training process does it itself.

    Returns:
        The gain and the shares.

    Raises:
        SettingError: A share outside [0, 1], negative seconds, or steps that take no time.
    """
    if not 0 <= slow_ratio <= 1:
        raise setting_error("expected_gain", "slow_ratio", "in [0, 1]", slow_ratio)
    if not 0 <= data_seconds < math.inf:
        raise setting_error("expected_gain", "data_seconds", "finite and at least 0", data_seconds)
    for mode in MODES:
        if not 0 < steps[mode].seconds < math.inf:
            raise setting_error("expected_gain", f"steps[{mode!r}]", "a step of more than 0 seconds", steps[mode])
    plain = steps["plain"].seconds
    mixed = (1 - slow_ratio) * steps["fast"].seconds + slow_ratio * steps["slow"].seconds
    return Gain(
        speedup=(plain + waiting(plain, data_seconds, workers)) / (mixed + waiting(mixed, data_seconds, workers)),
        speedup_compute=plain / mixed,
        shares=_shares(steps["plain"], data_seconds, workers),
        shares_fast=_shares(steps["fast"], data_seconds, workers),
    )


def waiting(step_seconds: float, data_seconds: float, workers: int) -> float:
    """Return how long a step waits for its batch.

    Args:
        step_seconds: What it computes.
        data_seconds: Time in which one process makes a batch.
        workers: Processes that make batches.
    """
    return data_seconds if workers == 0 else max(0.0, data_seconds / workers - step_seconds)


def times_faster(speedup: float) -> str:
    """Say a ratio of speeds in words: "2.43 times faster", or "1.32 times slower" for 0.76."""
    return f"{speedup:.2f} times faster" if round(speedup, 2) >= 1 else f"{1 / speedup:.2f} times slower"


def advice_on_counts(speedup: float, *, visual_share: float, reduction: float) -> list[str]:
    """Say what keeps DualSpeed from helping as far as counts of tokens tell, no step timed.

    Args:
        speedup: Gain to expect.
        visual_share: Share of visual tokens in the full sequence.
        reduction: Visual tokens of a fast step, isolator included, over those of a full one.

    Returns:
        Sentences, none where nothing stands in the way.
    """
    found = []
    if visual_share < 0.5:
        found.append(
            f"Text makes up {1 - visual_share:.0%} of the sequence and stays whole: at most the visual "
            f"{visual_share:.0%} can be dropped."
        )
    if reduction > 0.5:
        found.append(
            f"A fast step keeps {reduction:.0%} of the visual tokens, isolator included: the images are so small, or "
            "keep_ratio so high, that little is dropped."
        )
    if round(speedup, 2) < 1:
        found.append(f"DualSpeed would be {times_faster(speedup)} than plain training here: train plainly.")
    elif speedup < LITTLE:
        found.append(f"The gain to expect is below {LITTLE}: plain training is the simpler choice here.")
    return found


def advice(
    gain: Gain,
    steps: Mapping[str, StepParts],
    *,
    data_seconds: float,
    workers: int,
    visual_share: float,
    reduction: float,
    tower_trained: bool,
) -> list[str]:
    """Say in plain words what keeps DualSpeed from helping, most important first.

    Args:
        gain: From `expected_gain`.
        steps: What it was made of.
        data_seconds: Time in which one process makes the batch of one step.
        workers: Processes that make batches.
        visual_share: Share of visual tokens in the full sequence.
        reduction: Visual tokens of a fast step, isolator included, over those of a full one.
        tower_trained: Whether the vision tower is trained.

    Returns:
        Sentences, none where nothing stands in the way.
    """
    fast = steps["fast"].seconds
    found = []
    if waiting(fast, data_seconds, workers) > fast:
        need = max(workers + 1, math.ceil(data_seconds / fast))
        found.append(
            f"Data loading takes longer than a fast step ({data_seconds:.3g} s for a batch in one process, "
            f"dataloader_num_workers={workers}; a fast step computes {fast:.3g} s): DualSpeed will not help much until "
            f"the data comes faster. Set dataloader_num_workers to {need} where there are as many cores, or store "
            "smaller images."
        )
    elif workers == 0 and gain.speedup < 0.9 * gain.speedup_compute:
        found.append(
            f"Every step waits {data_seconds:.3g} s for its batch, which lowers the gain from "
            f"{gain.speedup_compute:.2f} to {gain.speedup:.2f}. With dataloader_num_workers=2 the batches would be "
            "made while the model computes."
        )
    tower = steps["fast"].tower / fast
    if tower > 0.5:
        found.append(
            f"The vision tower takes {tower:.0%} of a fast step's computing, and tokens are dropped behind it"
            + (": if it need not be trained, name it in freeze." if tower_trained else " although it is frozen.")
        )
    if (update := steps["fast"].optimizer / fast) > 0.5:
        found.append(
            f"The optimizer takes {update:.0%} of a fast step's computing: train fewer weights (lora, freeze)."
        )
    return [*found, *advice_on_counts(gain.speedup, visual_share=visual_share, reduction=reduction)]


def _shares(step: StepParts, data_seconds: float, workers: int) -> dict[str, float]:
    wait = waiting(step.seconds, data_seconds, workers)
    parts = {**vars(step), "data": wait}
    whole = step.seconds + wait
    return {name: seconds / whole for name, seconds in parts.items()}
