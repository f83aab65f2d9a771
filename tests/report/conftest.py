"""Records like those of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from trimtab.evaluate import wilson_interval
from trimtab.records import make_record
from trimtab.report import draw_kept, picture_entry

Record = dict[str, Any]


def share(correct: int, number: int) -> dict[str, Any]:
    return {
        "accuracy": correct / number, "correct": correct, "number": number,
        "interval": list(wilson_interval(correct, number)),
    }  # fmt: skip


def accuracy(correct: int, number: int = 100) -> dict[str, Any]:
    half = correct // 2
    wrong = [{"row": 0, "family": "a", "question": "Is 1 < 2?", "answer": "yes", "predicted": "<b>no</b>"}]
    families = {"digit": share(half, number // 2), "place": share(correct - half, number // 2)}
    marks = "1" * correct + "0" * (number - correct)
    return {**share(correct, number), "families": families, "marks": marks, "wrong": wrong}


def log_of(arm: str) -> list[dict[str, Any]]:
    modes = {"full": ["full"], "pruned": ["fast"]}.get(arm, ["fast", "fast", "fast", "slow"])
    seconds = {"full": 0.4, "fast": 0.1, "slow": 0.5}
    used = [modes[step % len(modes)] for step in range(20)]
    return [
        {"step": step, "mode": mode, "loss": 2 / (1 + step), "ce": 2 / (1 + step), "kl": 0.0, "seconds": seconds[mode]}
        for step, mode in enumerate(used)
    ]


@pytest.fixture
def arm() -> Callable[..., Record]:
    def make(name: str, correct: int, seconds: float, seed: int = 0, dataset: str = "scenes", **method: Any) -> Record:
        block = {} if name == "full" else {"dualspeed": {"keep_ratio": 0.1, "slow_ratio": 0.1, **method}}
        results = {
            "arm": name, "seconds_train": seconds, "samples": 3200, "steps": 200, "dataset": dataset,
            "accuracy_full": accuracy(correct), "log": log_of(name),
            "accuracy_pruned": None if name == "full" else accuracy(correct - 10),
        }  # fmt: skip
        return make_record("arm", {"learning_rate": 0.001, **block}, results, seed=seed)

    return make


@pytest.fixture
def run(arm) -> list[Record]:
    """The records of one run, in an order that no page should depend on."""
    picture = picture_entry(
        draw_kept(Image.new("RGB", (32, 32), (200, 90, 40)), [0, 5], (4, 4)), "divprune keeps 2 of 16"
    )
    return [
        make_record("pictures", {}, {"pictures": [picture]}),
        arm("dualspeed", 88, 50.0),
        arm("pruned", 80, 40.0),
        make_record("dataset", {}, {"dataset": "scenes", "majority": 0.2, "language_only": {"accuracy": 0.3}}),
        arm("full", 80 + 10, 125.0),
    ]
