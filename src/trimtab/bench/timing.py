"""Time several callables side by side, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trimtab.errors import SettingError, setting_error


def time_steps(
    callables: Mapping[str, Callable[[], object]],
    repeats: int = 10,
    warmup: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time each callable `repeats` times, interleaved, and compare them round by round.

    A round runs every callable once; the order turns from round to round, so that none always runs behind the
    same neighbour. Ratios are taken within a round and then summarised, so that a slow spell of the machine hits
    both sides. The device is waited for before and after each call.

    Args:
        callables: Name -> what to time; the first one is the baseline of the ratios.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before that, not counted.
        progress: Called after every round, warm-up included, with rounds done and rounds in all.

    Returns:
        ``steps``: per name median, quartiles (``low``, ``high``), ``minimum`` and all ``seconds``; ``ratios``: per
        name how many times faster than the baseline it is (baseline seconds / its seconds; median and quartiles);
        ``baseline``, ``repeats``, ``warmup``.

    Raises:
        SettingError: Nothing to time, or a number outside its range.
    """
    if not callables:
        raise SettingError("time_steps has nothing to time: no callable came. Give at least one.")
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise setting_error("time_steps", name, f"at least {least}", value)
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = _seconds(callables[name])
            if number >= warmup:
                seconds[name].append(taken)
        if progress is not None:
            progress(number + 1, warmup + repeats)
    base = seconds[names[0]]
    return {
        "steps": {name: {**_summary(s), "minimum": min(s), "seconds": s} for name, s in seconds.items()},
        "ratios": {name: _summary([b / o for b, o in zip(base, s, strict=True)]) for name, s in seconds.items()},
        "baseline": names[0],
        "repeats": repeats,
        "warmup": warmup,
    }


def wait_for_device() -> None:
    """Wait until every accelerator of this process has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _seconds(step: Callable[[], object]) -> float:
    wait_for_device()
    began = time.perf_counter()
    step()
    wait_for_device()
    return time.perf_counter() - began


def _summary(values: Sequence[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": low, "high": high}
