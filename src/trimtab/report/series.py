"""The log of a training as numbers by mode, and long series as lines that hide no extreme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MODES = ("full", "fast", "slow", "mixed")
RAW = 40
"""A series of so many values at most is drawn as it is."""

STRETCHES = 160
"""A longer one is drawn as at most so many medians, with the least and the greatest value of each stretch."""


@dataclass(frozen=True)
class Series:
    """Values by step.

    Attributes:
        steps: Steps, rising.
        values: Values, finite.
    """

    steps: Array
    values: Array

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.steps)

    @property
    def end(self) -> float:
        """The median of the last tenth."""
        return float(np.median(self.values[-max(1, len(self) // 10) :]))


@dataclass(frozen=True)
class Envelope:
    """A series in stretches of about equally many values.

    Attributes:
        steps: Middle of each stretch.
        middle: Median of each.
        low: Least value of each.
        high: Greatest value of each.
    """

    steps: Array
    middle: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Log:
    """What a log of a training holds.

    Attributes:
        loss: Cross-entropy by mode; the loss where no cross-entropy was logged.
        kl: KL term of slow steps.
        held_out: Loss on data that was held out.
        seconds: Time by mode.
        before: Visual tokens before pruning, by mode.
        after: Visual tokens after pruning, by mode.
        per_step: Whether there is an entry for every step, so that times add up.
        gaps: How many entries have a loss that is no number.
        first_step: The step at which a resumed training went on, where the log says so; 0 for the beginning.
    """

    loss: dict[str, Series] = field(default_factory=dict)
    kl: Series | None = None
    held_out: Series | None = None
    seconds: dict[str, Series] = field(default_factory=dict)
    before: dict[str, Series] = field(default_factory=dict)
    after: dict[str, Series] = field(default_factory=dict)
    per_step: bool = False
    gaps: int = 0
    first_step: int = 0


def read_log(entries: Any, arm: str) -> Log:
    """Read a log of the quickstart (an entry per step, with its mode) or of a Trainer (means since the last entry).

    Args:
        entries: List of mappings; what has no step is passed over.
        arm: Name of the arm, which says what steps without a mode are.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    gaps, first_step = 0, 0
    places: list[float] = []
    for entry in entries if isinstance(entries, list) else []:
        step = number_of(entry.get("step")) if isinstance(entry, Mapping) else None
        if step is None:
            continue
        mode = _mode(entry, arm)
        values = dict(_values(entry, mode))
        for key, value in values.items():
            if value is not None:
                found.setdefault(key, []).append((step, value))
        losses = [value for (kind, _), value in values.items() if kind == "loss"]
        gaps += bool(losses) and all(value is None for value in losses)
        places += [step] if losses else []
        first_step = round(number_of(entry.get("first_step")) or first_step)
    series = {key: _series(points) for key, points in found.items()}
    return Log(
        loss=_by_mode(series, "loss"),
        kl=series.get(("kl", "")),
        held_out=series.get(("held_out", "")),
        seconds=_by_mode(series, "seconds"),
        before=_by_mode(series, "before"),
        after=_by_mode(series, "after"),
        per_step=len(places) > 1 and places[-1] - places[0] == len(places) - 1,
        gaps=gaps,
        first_step=first_step,
    )


def envelope(series: Series, stretches: int = STRETCHES) -> Envelope:
    """Return a series in stretches; one of few values is its own envelope."""
    many = len(series)
    if many <= RAW:
        return Envelope(series.steps, series.values, series.values, series.values)
    stretches = min(stretches, max(RAW, many // 8))
    starts = np.linspace(0, many, stretches + 1).astype(int)
    ends = starts[1:]
    starts = starts[:-1]
    middle = [float(np.median(series.values[a:b])) for a, b in zip(starts, ends, strict=True)]
    return Envelope(
        (series.steps[starts] + series.steps[ends - 1]) / 2,
        np.array(middle),
        np.minimum.reduceat(series.values, starts),
        np.maximum.reduceat(series.values, starts),
    )


def upper_end(every: Iterable[Series]) -> float | None:
    """Return where a drawing may end so that single spikes do not press everything else flat; None where none does."""
    series = [one for one in every if len(one)]
    if not series:
        return None
    usual = 1.15 * max(float(envelope(one).middle.max()) for one in series)
    highest = max(float(one.values.max()) for one in series)
    return usual if usual > 0 and highest > 2 * usual else None


def number_of(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _mode(entry: Mapping[str, Any], arm: str) -> str:
    mode = entry.get("mode")
    if mode in MODES:
        return str(mode)
    if arm.startswith("full"):
        return "full"
    # A Trainer's entry tells of the steps since the last one, which may all have been of one mode.
    share = number_of(entry.get("slow_share"))
    return {0.0: "fast", 1.0: "slow"}.get(share, "mixed") if share is not None else "mixed"


def _values(entry: Mapping[str, Any], mode: str) -> Iterable[tuple[tuple[str, str], float | None]]:
    """Yield kind and mode of what an entry holds, with its number or None."""
    parts = [name for name in ("fast", "slow") if f"ce_{name}" in entry]
    own = [name for name in ("ce", "loss") if name in entry]
    if parts and mode == "mixed":
        yield from ((("loss", name), number_of(entry[f"ce_{name}"])) for name in parts)
    elif own:
        yield ("loss", mode), number_of(entry[own[0]])
    for name, key in (("kl", "kl"), ("held_out", "eval_loss")):
        if entry.get(key) is not None and (name != "kl" or mode in ("slow", "mixed")):
            yield (name, ""), number_of(entry[key])
    if entry.get("seconds") is not None:
        yield ("seconds", mode), number_of(entry["seconds"])
    for name in ("fast", "slow", "data", "save"):
        if entry.get(f"seconds_{name}") is not None:
            yield ("seconds", name), number_of(entry[f"seconds_{name}"])
    for kind, key in (("before", "visual_tokens_full"), ("after", "visual_tokens_kept")):
        if entry.get(key) is not None:
            yield (kind, mode), number_of(entry[key])


def _by_mode(series: Mapping[tuple[str, str], Series], kind: str) -> dict[str, Series]:
    known = {mode: one for (name, mode), one in series.items() if name == kind}
    return {mode: known[mode] for mode in (*MODES, "data", "save") if mode in known}


def _series(points: Sequence[tuple[float, float]]) -> Series:
    steps, values = np.array(points, dtype=np.float64).T
    order = np.argsort(steps, kind="stable")
    return Series(steps[order], values[order])
