"""The schedule decides modes as a pure function of settings and step, alike on every rank and after every resume."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trimtab.dualspeed.schedule import mode_of_step

KINDS = ("stratified", "bernoulli", "annealed")


def modes(steps: int, kind: str, slow_ratio: float = 0.1, seed: int = 0, start: int = 0) -> list[str]:
    total = steps if kind == "annealed" else None
    return [
        mode_of_step(step, kind=kind, slow_ratio=slow_ratio, seed=seed, total_steps=total)
        for step in range(start, steps)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_only_two_modes_and_both_occur(kind: str) -> None:
    assert set(modes(200, kind)) == {"fast", "slow"}


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_reproduces_the_tail(kind: str) -> None:
    whole = modes(300, kind)
    for start in (0, 1, 7, 10, 123, 299):
        assert modes(300, kind, start=start) == whole[start:]
    backwards = [
        mode_of_step(s, kind=kind, slow_ratio=0.1, seed=0, total_steps=300 if kind == "annealed" else None)
        for s in reversed(range(300))
    ]
    assert backwards[::-1] == whole, "asking in another order changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_without_talking(kind: str) -> None:
    """Each simulated rank has consumed other random numbers, in this process and in a fresh one."""
    found = []
    for rank in range(4):
        random.seed(rank)
        np.random.seed(rank)  # noqa: NPY002
        torch.manual_seed(rank)
        found.append(modes(200, kind, seed=9))
    assert all(modes_of_rank == found[0] for modes_of_rank in found)
    code = (
        "from trimtab.dualspeed.schedule import mode_of_step as m;"
        f"print(''.join(m(s, kind={kind!r}, slow_ratio=0.1, seed=9, total_steps=200)[0] for s in range(200)))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == "".join(mode[0] for mode in found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_asking_consumes_no_random_numbers(kind: str) -> None:
    before = random.getstate(), torch.get_rng_state()
    modes(50, kind)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_differ(kind: str) -> None:
    assert len({tuple(modes(200, kind, seed=seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("one_in", [2, 4, 5, 10, 20])
def test_stratified_has_exactly_one_slow_step_in_every_block(one_in: int) -> None:
    drawn = modes(one_in * 200, "stratified", slow_ratio=1 / one_in, seed=3)
    blocks = [drawn[start : start + one_in] for start in range(0, len(drawn), one_in)]
    assert all(block.count("slow") == 1 for block in blocks)
    offsets = [block.index("slow") for block in blocks]
    assert set(offsets) == set(range(one_in)), "every place of a block is drawn sooner or later"
    # Neither always the same place nor a rotation.
    assert len({b - a for a, b in itertools.pairwise(offsets)}) > 1


@hypothesis_settings(max_examples=40, deadline=None)
@given(ratio=st.floats(0.01, 0.99), seed=st.integers(0, 2**63 - 1))
def test_stratified_never_strays_from_its_share(ratio: float, seed: int) -> None:
    """Also where 1/ratio is no whole number: after n steps the count is within two of ratio * n."""
    count = 0
    for step, mode in enumerate(modes(400, "stratified", slow_ratio=ratio, seed=seed), start=1):
        count += mode == "slow"
        assert abs(count - ratio * step) <= 2


def test_bernoulli_mean_is_the_slow_ratio() -> None:
    steps, ratio = 100_000, 0.1
    drawn = [mode == "slow" for mode in modes(steps, "bernoulli", slow_ratio=ratio, seed=1)]
    sigma = math.sqrt(ratio * (1 - ratio) / steps)
    assert abs(sum(drawn) / steps - ratio) < 4 * sigma
    # Independent: slow after slow is as frequent as slow. 4 sigma over about 10,000 slow steps.
    after = [b for a, b in itertools.pairwise(drawn) if a]
    assert abs(sum(after) / len(after) - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / len(after))


def test_annealed_puts_slow_steps_late_with_the_same_total() -> None:
    steps, ratio = 2000, 0.1
    late, early, total = 0, 0, []
    for seed in range(10):
        slow = [mode == "slow" for mode in modes(steps, "annealed", slow_ratio=ratio, seed=seed)]
        early += sum(slow[: steps // 2])
        late += sum(slow[steps // 2 :])
        total.append(sum(slow))
    # A share that climbs from 0 to twice the mean leaves a quarter of the slow steps to the first half.
    assert 0.15 < early / (early + late) < 0.35
    sigma = math.sqrt(steps * ratio)
    assert all(abs(count - steps * ratio) < 4 * sigma for count in total)
    assert abs(sum(total) - 10 * steps * ratio) < 4 * math.sqrt(10) * sigma


@pytest.mark.parametrize("kind", ["stratified", "bernoulli"])
@pytest.mark.parametrize(("ratio", "only"), [(0.0, "fast"), (1.0, "slow")])
def test_the_ends_of_the_range(kind: str, ratio: float, only: str) -> None:
    assert set(modes(500, kind, slow_ratio=ratio)) == {only}


@pytest.mark.parametrize("kind", ["stratified", "annealed"])
def test_a_share_below_one_in_a_million_is_no_error(kind: str) -> None:
    assert set(modes(50, kind, slow_ratio=1e-9)) == {"fast"}


def test_annealed_without_slow_steps() -> None:
    assert set(modes(100, "annealed", slow_ratio=0.0)) == {"fast"}


def test_annealed_needs_to_know_how_long() -> None:
    with pytest.raises(ValueError, match="total_steps"):
        mode_of_step(0, kind="annealed", slow_ratio=0.1, seed=0)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stratified"):
        mode_of_step(0, kind="stratifed", slow_ratio=0.1, seed=0)
