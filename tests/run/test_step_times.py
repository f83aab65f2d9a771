"""Times of steps in the log: by mode, without data, evaluation and checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.run.small_run import write_run

from trimtab.run import step_times
from trimtab.run.config import load_config
from trimtab.run.step_times import StepTimes
from trimtab.run.train import train

ARGS = SimpleNamespace(device=SimpleNamespace(type="cpu"))


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Handle:
    """Counts the steps of each mode."""

    config = SimpleNamespace(prunes_nothing=False)

    def __init__(self) -> None:
        self.steps = {"fast": 0, "slow": 0}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self.steps)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_times, "time", clock)
    return clock


def step(times: StepTimes, clock: Clock, state: Any, seconds: float, data: float, *modes: str) -> None:
    clock.now += data
    times.on_step_begin(ARGS, state, None)
    clock.now += seconds
    for mode in modes:
        times._handle.steps[mode] += 1
    times.on_step_end(ARGS, state, None)


def logged(times: StepTimes, state: Any) -> dict[str, Any]:
    state.log_history.append({"loss": 1.0})
    logs = {"loss": 1.0}
    times.on_log(ARGS, state, None, logs=logs)
    assert state.log_history[-1] == logs
    return logs


def test_means_are_by_mode_and_begin_anew(clock: Clock) -> None:
    times, state = StepTimes(Handle()), SimpleNamespace(log_history=[])
    step(times, clock, state, 1.0, 5.0, "fast")  # what comes before the first step is no wait for data
    step(times, clock, state, 3.0, 0.5, "fast")
    step(times, clock, state, 8.0, 1.5, "slow")
    assert logged(times, state) == {"loss": 1.0, "seconds_fast": 2.0, "seconds_slow": 8.0, "seconds_data": 1.0}
    step(times, clock, state, 4.0, 2.0, "fast", "slow")
    assert logged(times, state) == {"loss": 1.0, "seconds": 4.0, "seconds_data": 2.0}
    assert logged(times, state) == {"loss": 1.0}


@pytest.mark.parametrize("pause", ["on_save", "on_evaluate"])
def test_pauses_are_in_no_time(clock: Clock, pause: str) -> None:
    times, state = StepTimes(), SimpleNamespace(log_history=[])
    step(times, clock, state, 1.0, 0.0)
    clock.now += 100
    getattr(times, pause)(ARGS, state, None)
    step(times, clock, state, 3.0, 0.25)
    assert logged(times, state) == {"loss": 1.0, "seconds": 2.0}


@pytest.mark.parametrize("block", [{"slow_ratio": 0.5, "isolator_tokens": 1}, None])
def test_the_record_of_a_training_has_them(tmp_path: Any, block: dict[str, Any] | None) -> None:
    path = write_run(tmp_path, dualspeed=block, max_steps=4, logging_steps=1)
    log = [entry for entry in train(load_config(path))["results"]["log"] if "loss" in entry]
    names = {name for entry in log for name in entry if name.startswith("seconds")}
    assert names == {"seconds_data", *(("seconds_fast", "seconds_slow") if block else ("seconds",))}
    assert all(entry[name] > 0 for entry in log for name in entry if name in names)


def test_a_resumed_training_says_where_its_time_begins(clock: Clock) -> None:
    for begin, told in ((0, {}), (30, {"first_step": 30})):
        times, state = StepTimes(), SimpleNamespace(log_history=[], global_step=begin)
        times.on_train_begin(ARGS, state, None)
        step(times, clock, state, 1.0, 0.0)
        assert logged(times, state) == {"loss": 1.0, "seconds": 1.0}
        end = {"train_runtime": 1.0}
        state.log_history.append(dict(end))
        times.on_log(ARGS, state, None, logs=end)
        assert state.log_history[-1] == end == {"train_runtime": 1.0, **told}
