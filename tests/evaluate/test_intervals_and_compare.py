"""Intervals of shares, and paired comparison of two models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.errors import DataError, SettingError
from trimtab.evaluate import compare_accuracy, wilson_interval


@pytest.mark.parametrize(("correct", "number"), [(0, 10), (3, 10), (10, 10), (812, 1000)])
def test_wilson_ends_solve_the_score_equation(correct, number):
    share = correct / number
    for end in wilson_interval(correct, number):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / number), rel=1e-5)
    low, high = wilson_interval(correct, number)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(SettingError, match=r"0\.\.number=3, but 4 came"):
        wilson_interval(4, 3)


def marks(values: np.ndarray) -> dict[str, str]:
    return {"marks": "".join("1" if value else "0" for value in values)}


def test_a_model_against_itself_keeps_everything_exactly():
    same = {"marks": "1101001110" * 6}
    compared = compare_accuracy(same, same)
    assert (compared["ratio"], compared["difference"], compared["number"]) == (1, 0, 60)
    assert compared["ratio_interval"] == [1, 1]
    assert compared["difference_interval"] == [0, 0]


def test_the_interval_is_that_of_drawing_questions():
    random = np.random.default_rng(0)
    ours, theirs = random.random(300) < 0.7, random.random(300) < 0.8
    compared = compare_accuracy(marks(ours), marks(theirs), draws=20_000)
    drawn = random.integers(0, 300, size=(20_000, 300))
    naive = np.quantile(ours[drawn].mean(1) / theirs[drawn].mean(1), [0.025, 0.975])
    assert compared["ratio"] == pytest.approx(ours.mean() / theirs.mean())
    assert compared["ratio_interval"] == pytest.approx(naive, abs=0.006)
    assert compared["ratio_interval"][0] < compared["ratio"] < compared["ratio_interval"][1]


def test_pairing_narrows_the_interval():
    theirs = np.arange(400) % 5 != 0
    paired = theirs & (np.arange(400) % 40 != 1)
    apart = np.roll(paired, 7)
    width = [np.ptp(compare_accuracy(marks(ours), marks(theirs))["difference_interval"]) for ours in (paired, apart)]
    assert width[0] < 0.5 * width[1]


def test_the_seed_decides():
    ours, theirs = {"marks": "1101001110"}, {"marks": "1111001011"}
    assert compare_accuracy(ours, theirs, seed=1) == compare_accuracy(ours, theirs, seed=1)
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state must stay as it was
    compare_accuracy(ours, theirs)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_nothing_right_gives_no_ratio():
    compared = compare_accuracy({"marks": "01"}, {"marks": "00"})
    assert compared["ratio"] is None
    assert compared["ratio_interval"] is None
    assert compared["difference"] == 0.5


@pytest.mark.parametrize("wrong", [{}, {"marks": ""}, {"marks": "0x"}])
def test_missing_marks_are_named(wrong):
    with pytest.raises(DataError, match="theirs has no marks"):
        compare_accuracy({"marks": "01"}, wrong)


def test_unequal_sets_are_refused():
    with pytest.raises(DataError, match="2 and 3 came"):
        compare_accuracy({"marks": "01"}, {"marks": "010"})
    with pytest.raises(SettingError, match="draws must be at least 100"):
        compare_accuracy({"marks": "01"}, {"marks": "01"}, draws=10)
