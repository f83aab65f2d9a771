"""How many tokens a keep ratio leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SettingError
from trimtab.pruners import kept_count, kept_counts
from trimtab.pruners.budget import RULES


@pytest.mark.parametrize(
    ("tokens", "ratio", "rule", "kept"),
    [
        (576, 0.1, "floor", 57),
        (576, 0.1, "round", 58),
        (576, 0.1, "ceil", 58),
        (576, 0.1, "released", 57),
        (10, 0.1, "floor", 1),
        (576, 0.098, "round", 56),
        (30, 0.1, "floor", 3),
        (30, 0.1, "ceil", 3),
        (576, 1.0, "floor", 576),
        (5, 1, "released", 5),
    ],
)
def test_counts(tokens, ratio, rule, kept):
    assert kept_count(tokens, ratio, rule) == kept


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(1, 5000), st.floats(0.01, 1), st.sampled_from(RULES))
def test_always_in_range(tokens, ratio, rule):
    try:
        assert 1 <= kept_count(tokens, ratio, rule) <= tokens
    except SettingError:
        assert ratio * tokens < 1.001


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.5), "tokens"),
        ((5, 0.0), "keep_ratio"),
        ((5, 1.1), "keep_ratio"),
        ((5, 0.5, "up"), "rule"),
        ((5, 0.1), "keeps 0 of 5"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(SettingError, match=words):
        kept_count(*arguments)


def test_small_tiles_keep_one_token_where_others_keep_some():
    assert kept_counts({4, 64}, 0.1) == {4: 1, 64: 6}
    assert kept_counts({4}, 0.1, any_size=True) == {4: 1}
    assert kept_counts(set(), 0.1) == {}
    with pytest.raises(SettingError, match=r"keeps 0 of 9 tokens \(rule 'round'\).*at least 0\.1111"):
        kept_counts({4, 9}, 0.05, "round")
    with pytest.raises(SettingError, match="tokens"):
        kept_counts({0}, 0.5, any_size=True)
