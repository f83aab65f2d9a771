"""Logs become numbers by mode, and long series keep their extremes."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.report.series import RAW, STRETCHES, Series, envelope, number_of, read_log, upper_end


def series(values) -> Series:
    values = np.asarray(values, dtype=float)
    return Series(np.arange(1.0, len(values) + 1), values)


@pytest.mark.parametrize("many", [1, 2, RAW, RAW + 1, 97, 1000, 10_001])
def test_no_extreme_of_a_long_series_is_lost(many):
    random = np.random.default_rng(many)
    values = random.normal(size=many)
    values[random.integers(many)] = 99.0
    values[random.integers(many)] = -99.0
    cover = envelope(series(values))
    assert len(cover.steps) <= STRETCHES
    assert (cover.high.max(), cover.low.min()) == (values.max(), values.min())
    assert (cover.low <= cover.middle).all()
    assert (cover.middle <= cover.high).all()
    assert (np.diff(cover.steps) > 0).all()


def test_a_stretch_is_the_median_least_and_greatest_of_its_steps():
    values = np.arange(800.0)[::-1]
    cover = envelope(series(values))
    parts = np.array_split(values, len(cover.steps))
    assert cover.middle == pytest.approx([np.median(part) for part in parts])
    assert cover.low == pytest.approx([part.min() for part in parts])
    assert cover.high == pytest.approx([part.max() for part in parts])
    assert cover.steps[0] == pytest.approx((1 + len(parts[0])) / 2)


def test_a_short_series_is_drawn_as_it_is():
    cover = envelope(series([3.0, 1.0, 2.0]))
    assert cover.middle.tolist() == cover.low.tolist() == cover.high.tolist() == [3.0, 1.0, 2.0]


def test_a_drawing_ends_below_single_spikes_only():
    falling = 4 / (1 + np.arange(500) / 20)
    assert upper_end([series(falling)]) is None
    spiked = falling.copy()
    spiked[400] = 1000.0
    end = upper_end([series(spiked), series(falling)])
    assert end is not None
    assert falling.max() * 0.8 < end < 10
    assert upper_end([]) is None
    assert upper_end([series([0.0])]) is None


def test_a_log_with_an_entry_per_step_is_read_by_mode():
    entries = [
        {"step": 2, "mode": "slow", "ce": 1.0, "loss": 1.5, "kl": 0.5, "seconds": 0.4, "visual_tokens_full": 8,
         "visual_tokens_kept": 8},
        {"step": 1, "mode": "fast", "ce": 2.0, "loss": 2.0, "kl": None, "seconds": 0.1, "visual_tokens_full": 8,
         "visual_tokens_kept": 2},
        {"step": 3, "mode": "fast", "ce": None, "loss": 9.0, "seconds": None},
        {"step": 4, "mode": "fast", "ce": float("nan"), "loss": 9.0},
        "no entry", {"loss": 1.0}, {"step": "x", "loss": 1.0},
    ]  # fmt: skip
    log = read_log(entries, "dualspeed")
    assert {mode: (one.steps.tolist(), one.values.tolist()) for mode, one in log.loss.items()} == {
        "fast": ([1.0], [2.0]), "slow": ([2.0], [1.0]),
    }  # fmt: skip
    assert log.kl is not None
    assert log.kl.values.tolist() == [0.5]
    assert {mode: one.values.tolist() for mode, one in log.seconds.items()} == {"fast": [0.1], "slow": [0.4]}
    assert {mode: one.values.tolist() for mode, one in log.after.items()} == {"fast": [2.0], "slow": [8.0]}
    assert log.gaps == 2


def test_a_log_of_a_trainer_is_read_by_mode():
    entries = [
        {"step": 10, "loss": 1.0, "ce": 0.9, "ce_fast": 0.8, "ce_slow": 1.2, "kl": 0.1, "visual_tokens_full": 64.0},
        {"step": 20, "loss": 0.5, "ce": 0.5, "ce_fast": 0.5},
        {"step": 20, "eval_loss": 0.7},
        {"step": 20, "train_loss": 0.7, "train_runtime": 3.0},
    ]
    log = read_log(entries, "dualspeed")
    assert {mode: one.values.tolist() for mode, one in log.loss.items()} == {"fast": [0.8, 0.5], "slow": [1.2]}
    assert log.held_out is not None
    assert log.held_out.values.tolist() == [0.7]
    assert not log.per_step
    plain = read_log([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], "full")
    assert list(plain.loss) == ["full"]
    assert plain.per_step


@pytest.mark.parametrize("entries", [None, [], "text", [None], [{}], {"step": 1}])
def test_a_log_that_is_none_is_empty(entries):
    log = read_log(entries, "full")
    assert (log.loss, log.kl, log.seconds) == ({}, None, {})


@pytest.mark.parametrize("value", [None, True, "1", [], float("nan"), float("inf"), 10**400])
def test_what_is_no_number_is_none(value):
    assert number_of(value) is None


def test_entries_of_a_trainer_whose_steps_had_one_mode_are_of_that_mode():
    tokens = {"visual_tokens_full": 64.0, "visual_tokens_kept": 16.0}
    entries = [
        {"step": 10, "loss": 1.0, "slow_share": 0.0, "seconds_fast": 0.1, "seconds_data": 0.02, **tokens},
        {"step": 20, "loss": 1.0, "slow_share": 0.1, "seconds_fast": 0.1, "seconds_slow": 0.3, **tokens},
        {"step": 30, "loss": 1.0, "slow_share": 1.0, "seconds_slow": 0.3, **tokens},
        {"step": 30, "train_runtime": 9.0, "first_step": 10},
    ]
    log = read_log(entries, "dualspeed")
    assert {mode: one.steps.tolist() for mode, one in log.after.items()} == {"fast": [10], "slow": [30], "mixed": [20]}
    assert {mode: len(one) for mode, one in log.seconds.items()} == {"fast": 2, "slow": 2, "data": 1}
    assert (log.first_step, log.per_step) == (10, False)
