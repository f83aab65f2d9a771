"""The divergence, its curve and the choice, against the definitions written out."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import SettingError
from trimtab.methods.vtw.layer_choice import (
    CurvePoint,
    choose_layer,
    default_start,
    mean_and_error,
    same_first_choice,
    withdrawal_divergence,
)


def definition(withdrawn: list[float], full: list[float]) -> float:
    """sum_v p_K(v) (log p_K(v) - log p_full(v)) with sums that lose nothing."""

    def log_softmax(scores: list[float]) -> list[float]:
        top = max(scores)
        total = math.log(math.fsum(math.exp(score - top) for score in scores))
        return [score - top - total for score in scores]

    p, q = log_softmax(withdrawn), log_softmax(full)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def test_the_direction_is_that_of_a_hand_made_pair() -> None:
    half, nine = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    # 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1), and 0.9 ln(0.9/0.5) + 0.1 ln(0.1/0.5).
    assert float(withdrawal_divergence(half, nine)) == pytest.approx(0.5108256237659907, abs=1e-7)
    assert float(withdrawal_divergence(nine, half)) == pytest.approx(0.3680642071684971, abs=1e-7)


SCORES = st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5)


@settings(max_examples=200, deadline=None)
@given(SCORES, SCORES)
def test_values_are_those_of_the_definition_and_never_negative(withdrawn: list[float], full: list[float]) -> None:
    found = float(withdrawal_divergence(torch.tensor([withdrawn]), torch.tensor([full])))
    assert found >= 0
    # Terms of at most 60, each rounded to 1e-16 of it, over five words.
    assert found == pytest.approx(definition(withdrawn, full), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.floats(-3, 3, width=32))
def test_a_difference_that_rounding_hides_is_not_negative(scores: list[float], shift: float) -> None:
    full = torch.tensor([scores])
    almost = (full.double() + shift) * (1 + 1e-9)
    assert float(withdrawal_divergence(almost, full.double())) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_equal_scores_have_exactly_none_and_the_value_is_wide(dtype: torch.dtype) -> None:
    scores = (torch.randn(7, 1000) * 10).to(dtype)
    found = withdrawal_divergence(scores, scores.clone())
    assert torch.equal(found, torch.zeros(7, dtype=torch.float64))


def test_small_divergences_keep_their_digits() -> None:
    # KL of a small shift e of two words of probability 1/2: e^2/8; float32 would round 1.25e-13 to noise of 1e-8.
    e = 1e-6
    found = float(withdrawal_divergence(torch.tensor([[e, 0.0]]).double(), torch.zeros(1, 2).double()))
    assert found == pytest.approx(e * e / 8, rel=1e-2)


def test_words_that_are_ruled_out() -> None:
    out = -math.inf
    both = withdrawal_divergence(torch.tensor([[0.0, 0.0, out]]), torch.tensor([[1.0, 0.0, out]]))
    two = withdrawal_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(both) == pytest.approx(float(two), rel=1e-12)
    # Impossible in the withdrawn model only: that word adds nothing but the rest is renormalised.
    less = withdrawal_divergence(torch.tensor([[0.0, 0.0, out]]), torch.zeros(1, 3))
    assert float(less) == pytest.approx(math.log(3 / 2), rel=1e-12)
    assert withdrawal_divergence(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, out]])).isinf().all()
    assert withdrawal_divergence(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)).isnan().all()


def test_the_first_choice_is_compared_place_by_place() -> None:
    one, other = torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]])
    assert same_first_choice(one, other).tolist() == [True, False]


def test_mean_and_error_are_those_of_a_sample() -> None:
    values = [0.1, 0.4, 0.2, 0.9]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_error([0.25])[0] == 0.25
    assert math.isnan(mean_and_error([0.25])[1])
    assert mean_and_error([1.0, math.inf])[0] == math.inf


def points(means: dict[int, float], stderr: float = 0.01) -> list[CurvePoint]:
    return [CurvePoint(layer, mean, stderr, mean, 1.0) for layer, mean in means.items()]


MEANS = {0: 3.0, 1: 0.001, 2: 0.9, 3: 0.2, 4: 0.05, 5: 0.04, 6: 0.0}
"""A curve that is small at layer 1 by chance and then falls, over six layers."""


@pytest.mark.parametrize(
    ("threshold", "start", "margin", "expected"),
    [
        (0.05, 2, 0.0, 4),  # a mean equal to the threshold counts
        (0.049, 2, 0.0, 5),
        (0.05, 0, 0.0, 1),  # the first one, not the least
        (0.05, 2, 1.0, 5),  # 0.04 + 1 * 0.01
        (0.05, 2, 1.01, None),
        (0.03, 2, 0.0, None),  # the model as it is, K = L, is no choice
        (5.0, 0, 0.0, 0),
        (5.0, 6, 0.0, None),
    ],
)
def test_the_first_layer_from_the_start_whose_bound_is_small_enough(
    threshold: float, start: int, margin: float, expected: int | None
) -> None:
    curve = points(MEANS)
    for order in (curve, curve[::-1]):
        assert choose_layer(order, 6, threshold=threshold, start_layer=start, margin=margin) == expected


def test_what_is_not_known_is_never_small_enough() -> None:
    curve = [CurvePoint(3, 0.001, math.nan, 0.001, 1.0), CurvePoint(4, math.nan, 0.0, 0.0, 1.0)]
    assert choose_layer(curve, 6, threshold=0.01) == 3
    assert choose_layer(curve, 6, threshold=0.01, margin=1.0) is None
    assert choose_layer(curve, 6, threshold=0.01, start_layer=4) is None
    assert choose_layer([], 6, threshold=0.01) is None


@pytest.mark.parametrize(
    ("depth", "first", "expected"),
    [
        (32, 0, 5),
        (40, 0, 5),
        (30, 0, 5),
        (29, 0, 4),
        (12, 0, 2),
        (6, 0, 1),
        (2, 0, 1),
        (1, 0, 1),
        (36, 3, 5),
        (6, 3, 3),
    ],
)
def test_where_the_search_begins(depth: int, first: int, expected: int) -> None:
    assert default_start(depth, first) == expected


@pytest.mark.parametrize("threshold", [0, -0.1, math.nan, math.inf, True, "0.1", None])
def test_a_threshold_out_of_range(threshold: object) -> None:
    with pytest.raises(SettingError) as caught:
        choose_layer(points(MEANS), 6, threshold=threshold)  # type: ignore[arg-type]
    for part in ("choose_layer.threshold", "a finite number above 0", f"{threshold!r} came", "0.003"):
        assert part in str(caught.value)


@pytest.mark.parametrize("margin", [-1, math.nan, math.inf, False, "1"])
def test_a_margin_out_of_range(margin: object) -> None:
    with pytest.raises(SettingError) as caught:
        choose_layer(points(MEANS), 6, threshold=0.1, margin=margin)  # type: ignore[arg-type]
    for part in ("choose_layer.margin", "at least 0", f"{margin!r} came", "standard errors"):
        assert part in str(caught.value)


def test_a_point_is_plain_json_without_nan() -> None:
    told = CurvePoint(3, 0.5, math.nan, math.inf, 1.0, None, 0.25).to_dict()
    assert told == {
        "layer": 3, "mean": 0.5, "stderr": None, "largest": None, "same_token": 1.0, "flops_saving": None,
        "kv_saving": 0.25,
    }  # fmt: skip
