"""Measured parts of a step put together by hand, and the sentences that they lead to."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trimtab.bench import StepParts, advice, advice_on_counts, expected_gain, times_faster
from trimtab.errors import SettingError


def steps(**changes: Any) -> dict[str, StepParts]:
    """Return steps of 10, 2.5 and 12 seconds, with other parts of the fast step where they are given."""
    fast: dict[str, float] = {"tower": 0.5, "decoder": 1.5, "head": 0.25, "optimizer": 0.25, **changes}
    return {
        "plain": StepParts(tower=0.5, decoder=8.25, head=1.0, optimizer=0.25),
        "fast": StepParts(**fast),
        "slow": StepParts(tower=0.5, decoder=10.25, head=1.0, optimizer=0.25),
    }


def said(workers: int = 4, data: float = 0.1, **changes: Any) -> str:
    """Return all advice in one string, for a run where nothing stands in the way but for the changes."""
    made = changes.pop("steps", steps())
    slow_ratio = changes.pop("slow_ratio", 0.1)
    settings = {"visual_share": 0.8, "reduction": 0.1, "tower_trained": False, **changes}
    gain = expected_gain(made, slow_ratio, data, workers)
    return " ".join(advice(gain, made, data_seconds=data, workers=workers, **settings))


def test_the_steps_are_mixed_by_the_slow_ratio() -> None:
    for ratio, mean in ((0, 2.5), (0.1, 3.45), (1, 12)):
        gain = expected_gain(steps(), ratio, 0.0, 0)
        assert gain.speedup == gain.speedup_compute == pytest.approx(10 / mean)


def test_without_workers_every_step_waits_for_its_batch() -> None:
    gain = expected_gain(steps(), 0.1, 5.0, 0)
    assert gain.speedup == pytest.approx(15 / 8.45)
    assert gain.speedup_compute == pytest.approx(10 / 3.45)
    assert gain.shares["data"] == pytest.approx(5 / 15)
    assert gain.shares_fast["data"] == pytest.approx(5 / 7.5)


def test_workers_hide_what_is_shorter_than_the_step() -> None:
    assert expected_gain(steps(), 0.1, 6.8, 2).speedup == pytest.approx(10 / 3.45)  # 3.4 s per batch hide behind 3.45
    bound = expected_gain(steps(), 0.1, 16.0, 2)
    assert bound.speedup == pytest.approx(10 / 8)
    assert bound.shares["data"] == 0
    assert bound.shares_fast["data"] == pytest.approx(5.5 / 8)
    assert expected_gain(steps(), 0.1, 50.0, 2).speedup == 1  # both wait for the same data


def test_the_shares_are_those_of_the_parts() -> None:
    gain = expected_gain(steps(), 0.1, 0.0, 0)
    assert gain.shares == pytest.approx({"tower": 0.05, "decoder": 0.825, "head": 0.1, "optimizer": 0.025, "data": 0})
    assert sum(gain.shares_fast.values()) == pytest.approx(1)
    assert gain.shares_fast["decoder"] == pytest.approx(1.5 / 2.5)


def test_nothing_is_said_where_nothing_stands_in_the_way() -> None:
    assert said() == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": 11.0, "workers": 2}, "Data loading takes longer than a fast step .*dataloader_num_workers to 5"),
        ({"data": 2.6, "workers": 0}, "Data loading takes longer than a fast step .*dataloader_num_workers to 2"),
        ({"data": 1.0, "workers": 0}, "waits 1 s for its batch, which lowers the gain from 2.90 to 2.47"),
        ({"steps": steps(tower=3.0)}, "The vision tower takes 60% .*although it is frozen"),
        ({"steps": steps(tower=3.0), "tower_trained": True}, "The vision tower takes 60% .*name it in freeze"),
        ({"steps": steps(optimizer=3.0)}, "The optimizer takes 57% of a fast step"),
        ({"visual_share": 0.3}, "Text makes up 70% of the sequence"),
        ({"reduction": 0.75}, "A fast step keeps 75% of the visual tokens"),
        ({"slow_ratio": 0.7}, "The gain to expect is below 1.2"),
        ({"slow_ratio": 1.0}, "DualSpeed would be 1.20 times slower than plain training"),
    ],
)
def test_each_obstacle_has_its_sentence_and_no_other(changes: dict[str, Any], words: str) -> None:
    text = said(**changes)
    assert re.search(words, text)
    others = ("Data loading", "waits", "vision tower", "optimizer takes", "Text makes", "keeps")
    assert sum(word in text for word in others) == (0 if "slow_ratio" in changes else 1)


def test_less_than_one_is_called_slower() -> None:
    assert times_faster(2.428) == "2.43 times faster"
    assert times_faster(0.76) == "1.32 times slower"
    assert times_faster(0.996) == times_faster(1) == "1.00 times faster"


def test_counts_alone_give_their_sentences() -> None:
    assert advice_on_counts(2.0, visual_share=0.8, reduction=0.1) == []
    text, kept, gain = advice_on_counts(1.1, visual_share=0.3, reduction=0.75)
    assert "Text makes up 70%" in text
    assert "keeps 75%" in kept
    assert "below 1.2" in gain
    assert advice_on_counts(0.5, visual_share=0.8, reduction=0.1) == [
        "DualSpeed would be 2.00 times slower than plain training here: train plainly."
    ]


def test_data_that_workers_keep_up_with_is_no_obstacle() -> None:
    assert said(data=4.0, workers=2) == ""


@pytest.mark.parametrize(
    ("ratio", "data", "words"),
    [(1.1, 0.0, "slow_ratio must be in"), (0.1, -1.0, "data_seconds must be"), (0.1, float("inf"), "data_seconds")],
)
def test_bad_numbers_are_named(ratio: float, data: float, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        expected_gain(steps(), ratio, data, 0)


def test_a_step_that_takes_no_time_is_refused() -> None:
    nothing = StepParts(tower=0, decoder=0, head=0, optimizer=0)
    with pytest.raises(SettingError, match=r"steps\['slow'\] must be a step of more than 0 seconds"):
        expected_gain({**steps(), "slow": nothing}, 0.1, 0.0, 0)
