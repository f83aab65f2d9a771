"""Timing is paired and interleaved; its numbers are checked with a clock of our own."""

from __future__ import annotations

import pytest

from trimtab.bench import time_steps, timing
from trimtab.errors import SettingError


class Clock:
    """A clock that only the timed callables move, slower from round to round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def step(self, name: str, seconds: float, drift: float = 0.0):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + drift * len(self.calls))

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


def test_medians_quartiles_and_ratios(clock):
    result = time_steps({"full": clock.step("full", 4.0), "fast": clock.step("fast", 1.0)}, repeats=5, warmup=1)
    assert result["steps"]["full"]["seconds"] == [4.0] * 5
    assert result["steps"]["fast"] == {
        "median": 1.0, "low": 1.0, "high": 1.0, "minimum": 1.0, "seconds": [1.0] * 5
    }  # fmt: skip
    assert result["ratios"]["fast"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert result["ratios"]["full"]["median"] == 1.0
    assert (result["baseline"], result["repeats"], result["warmup"]) == ("full", 5, 1)


def test_rounds_interleave_and_the_order_turns(clock):
    seen = []
    steps = {name: clock.step(name, 1.0) for name in "abc"}
    time_steps(steps, repeats=2, warmup=1, progress=lambda done, total: seen.append((done, total)))
    assert clock.calls == list("abc" + "bca" + "cab")
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_machine_that_slows_down_hits_both_sides(clock):
    drifting = {"full": clock.step("full", 4.0, drift=0.2), "fast": clock.step("fast", 1.0, drift=0.2)}
    result = time_steps(drifting, repeats=20, warmup=0)
    assert result["steps"]["full"]["seconds"][-1] > 5 * result["steps"]["full"]["seconds"][0]
    assert result["ratios"]["fast"]["median"] == pytest.approx(4.0, rel=0.1)


def test_one_repeat_is_enough(clock):
    assert time_steps({"a": clock.step("a", 2.0)}, repeats=1, warmup=0)["steps"]["a"]["low"] == 2.0


def test_bad_settings_are_named():
    with pytest.raises(SettingError, match="no callable came"):
        time_steps({})
    with pytest.raises(SettingError, match="repeats must be at least 1, but 0 came"):
        time_steps({"a": lambda: None}, repeats=0)
    with pytest.raises(SettingError, match="warmup must be at least 0, but -1 came"):
        time_steps({"a": lambda: None}, warmup=-1)
