"""Two models on the same questions: how much of the accuracy is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimtab.errors import DataError, setting_error


def compare_accuracy(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, draws: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Return the ratio and the difference of two accuracies with paired 95 % bootstrap intervals over questions.

    The same questions are drawn for both, so that what makes a question hard cancels out. The interval says how
    much depends on the choice of questions, not on the seed of the training.

    Args:
        ours: Result of `exact_match`; numerator and minuend.
        theirs: Result of `exact_match` on the same questions in the same order.
        draws: How many resamples, at least 100.
        seed: Seed of the resampling.

    Returns:
        ``ratio`` (None where theirs is 0), ``ratio_interval`` (None where a resample of theirs has no right
        answer), ``difference``, ``difference_interval``, ``number``, ``draws``, ``seed``.

    Raises:
        DataError: The two have different numbers of questions, or none.
        SettingError: Too few draws.
    """
    if draws < 100:
        raise setting_error("compare_accuracy", "draws", "at least 100", draws)
    a, b = _marks(ours, "ours"), _marks(theirs, "theirs")
    if len(a) != len(b):
        raise DataError(
            f"Paired comparison needs the same questions, but {len(a)} and {len(b)} came. Evaluate both on one set."
        )
    means_a, means_b = _resample(a, b, draws, seed)
    known = bool((means_b > 0).all())
    return {
        "ratio": float(a.mean() / b.mean()) if b.any() else None,
        "ratio_interval": _interval(means_a / means_b) if known else None,
        "difference": float(a.mean() - b.mean()),
        "difference_interval": _interval(means_a - means_b),
        "number": len(a),
        "draws": draws,
        "seed": seed,
    }


def _marks(result: Mapping[str, Any], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    marks = result.get("marks", "")
    if not marks or set(marks) - {"0", "1"}:
        raise DataError(f"{name} has no marks ('0' and '1' per question). Give a whole result of exact_match.")
    return np.array([mark == "1" for mark in marks], dtype=np.float64)


def _resample(a: Any, b: Any, draws: int, seed: int) -> tuple[Any, Any]:
    """Draw through counts of the four outcomes of a pair, which has the same law as drawing questions."""
    outcomes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    shares = np.bincount((2 * a + b).astype(int), minlength=4) / len(a)
    means = np.random.default_rng(seed).multinomial(len(a), shares, size=draws) @ outcomes / len(a)
    return means[:, 0], means[:, 1]


def _interval(values: Any) -> list[float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]
