"""Plans of packs and of buckets: every sample once, the budget kept, an equal share of slow samples."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.dualspeed.dealing import deal_pools, halve_packs
from trimtab.dualspeed.packs import SampleLength, bucket_batches, lengths_of_modes, plan_packs
from trimtab.dualspeed.schedule import mode_of_sample
from trimtab.errors import SettingError

DRAW: dict[str, Any] = {"slow_ratio": 0.1, "seed": 5, "epoch": 0}


def text_lengths(count: int, spread: float, mean: float = 150, seed: int = 1) -> list[int]:
    """Lognormal lengths with this mean and coefficient of variation, as the speed sheet has them, cut at 1,400."""
    generator, sigma = random.Random(seed), math.sqrt(math.log(1 + spread**2))
    drawn = (round(generator.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)) for _ in range(count))
    return [min(max(8, length), 1400) for length in drawn]


def samples(count: int, spread: float = 0.8) -> list[SampleLength]:
    """LLaVA-1.5: 576 visual tokens, of which 57 and 4 of the isolator stay; every tenth sample is of text alone."""
    texts = text_lengths(count, spread)
    return [SampleLength(t, t) if n % 10 == 9 else SampleLength(t + 576, t + 61) for n, t in enumerate(texts)]


def tokens(lengths: Sequence[SampleLength], **draw: Any) -> list[int]:
    return [count for _, count in lengths_of_modes(lengths, **{**DRAW, **draw})]


def slow_ones(lengths: Sequence[SampleLength], **draw: Any) -> list[bool]:
    return [mode == "slow" for mode, _ in lengths_of_modes(lengths, **{**DRAW, **draw})]


def every_sample_once(batches: Sequence[Sequence[int]], count: int) -> None:
    assert sorted(sample for batch in batches for sample in batch) == list(range(count))
    assert all(batches), "no batch is empty"


# the modes --------------------------------------------------------------------------------------------------------


def test_a_sample_that_loses_nothing_is_never_slow() -> None:
    lengths = samples(500)
    modes = [mode for mode, _ in lengths_of_modes(lengths, slow_ratio=1, seed=0, epoch=0)]
    assert modes == ["fast" if n % 10 == 9 else "slow" for n in range(500)]


def test_modes_are_those_that_a_training_step_draws() -> None:
    lengths = samples(300)
    for epoch in range(3):
        for sample, (mode, count) in enumerate(lengths_of_modes(lengths, slow_ratio=0.3, seed=7, epoch=epoch)):
            drawn = mode_of_sample(sample, epoch=epoch, slow_ratio=0.3, seed=7)
            assert mode == (drawn if lengths[sample].pruned else "fast")
            assert count == (lengths[sample].full if mode == "slow" else lengths[sample].fast)


# brute force on tiny input ----------------------------------------------------------------------------------------


def best_count(sizes: Sequence[int], budget: int) -> int:
    """The least number of packs that any partition needs."""
    left = frozenset(range(len(sizes)))

    def fits(rest: frozenset[int], packs: int) -> bool:
        if not rest:
            return True
        if packs == 0:
            return False
        first, *others = sorted(rest)
        choices = (set(more) | {first} for count in range(len(others) + 1) for more in combinations(others, count))
        return any(sum(sizes[n] for n in one) <= budget and fits(rest - one, packs - 1) for one in choices)

    return next(packs for packs in range(1, len(sizes) + 1) if fits(left, packs))


@pytest.mark.parametrize("seed", range(8))
def test_few_samples_need_at_most_one_pack_more_than_the_best_partition(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [SampleLength(size, size) for size in (generator.randint(1, 60) for _ in range(7))]
    plan = plan_packs(lengths, budget=100, **DRAW)
    every_sample_once(plan, 7)
    assert len(plan) <= best_count([one.full for one in lengths], 100) + 1


# invariants ---------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 90)).map(lambda two: SampleLength(max(two), min(two))),
    min_size=1, max_size=80,
)  # fmt: skip
RATIOS = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0])


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(90, 400), RATIOS, st.integers(0, 3), st.integers(1, 9), st.integers(1, 5), st.data())
def test_any_plan_keeps_to_its_promises(
    lengths: list[SampleLength], budget: int, ratio: float, epoch: int, pool: int, multiple: int, data: st.DataObject
) -> None:
    draw = {"slow_ratio": ratio, "seed": 3, "epoch": epoch}
    natural = len(plan_packs(lengths, budget=budget, pool=pool, **draw))
    least = data.draw(st.integers(0, 2 * natural))
    plan = plan_packs(lengths, budget=budget, pool=pool, packs=least, multiple=multiple, **draw)
    size = tokens(lengths, **draw)
    every_sample_once(plan, len(lengths))
    assert max(sum(size[sample] for sample in pack) for pack in plan) <= budget
    wanted = -(-max(natural, least) // multiple) * multiple
    assert len(plan) == min(wanted, len(lengths))


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(90, 400), RATIOS, st.integers(1, 9), st.integers(0, 40))
def test_slow_samples_of_every_pack_are_within_one_of_their_share(
    lengths: list[SampleLength], budget: int, ratio: float, pool: int, more: int
) -> None:
    size, slow = (made(lengths, slow_ratio=ratio) for made in (tokens, slow_ones))
    pools = list(deal_pools(size, slow, budget=budget, pool=pool, generator=random.Random(1)))
    share_of = {}
    for one in pools:
        members = [sample for pack in one.packs for sample in pack]
        assert one.samples == len(members)
        assert one.slow == sum(slow[sample] for sample in members)
        assert len(one.packs) <= max(pool, one.samples)
        share_of.update(dict.fromkeys(members, one.slow / one.samples))
    for packs in (
        [pack for one in pools for pack in one.packs],
        halve_packs(pools, sum(len(one.packs) for one in pools) + more, slow),
    ):
        for pack in packs:
            exact = share_of[pack[0]] * len(pack)
            assert abs(sum(slow[sample] for sample in pack) - exact) <= 1 + 1e-9  # rounding of the share


def test_a_pack_with_more_slow_samples_gets_fast_ones_too() -> None:
    """31 slow samples of 100 tokens in ten packs: four in one, which then lacks the fast ones of its share."""
    size, slow = [100] * 31 + [10] * 31, [True] * 31 + [False] * 31
    (found,) = deal_pools(size, slow, budget=405, pool=64, generator=random.Random(0))
    for pack in found.packs:
        assert abs(sum(slow[sample] for sample in pack) - len(pack) / 2) <= 1
    assert max(sum(size[sample] for sample in pack) for pack in found.packs) <= 405


@pytest.mark.parametrize(("visual", "kept"), [(576, 61), (2880, 292)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_shares_are_equal_over_a_whole_epoch(visual: int, kept: int, ratio: float) -> None:
    """Every pack of a long epoch against the share of all samples, from which that of its pool differs by chance."""
    lengths = [SampleLength(t + visual, t + kept) for t in text_lengths(4000, 0.8)]
    slow = slow_ones(lengths, slow_ratio=ratio)
    plan = plan_packs(lengths, budget=16384, **{**DRAW, "slow_ratio": ratio})
    share = sum(slow) / len(slow)
    for pack in plan:
        assert abs(sum(slow[sample] for sample in pack) - share * len(pack)) <= 1 + 0.1 * len(pack)


@pytest.mark.parametrize("spread", [0.5, 0.8, 1.1])
def test_packs_are_full(spread: float) -> None:
    lengths = [SampleLength(t + 576, t + 61) for t in text_lengths(12_000, spread)]
    plan = plan_packs(lengths, budget=4096, **DRAW)
    assert sum(tokens(lengths)) / (4096 * len(plan)) >= 0.97


@pytest.mark.parametrize("spread", [0.5, 0.8, 1.1])
def test_buckets_pad_as_little_as_the_speed_sheet_says(spread: float) -> None:
    """1.05 to 1.14 for 128 neighbours of a pool of 6,400, all processes of a step taken together."""
    lengths = [SampleLength(t + 576, t + 61) for t in text_lengths(12_800, spread)]
    size = tokens(lengths)
    batches = bucket_batches(lengths, batch_size=16, group=8, **DRAW)
    padded = 0
    for first in range(0, len(batches), 8):
        step = [size[sample] for batch in batches[first : first + 8] for sample in batch]
        padded += max(step) * len(step)
    assert padded / sum(size) <= 1.16
    shuffled = random.Random(0).sample(size, len(size))
    mixed = sum(128 * max(shuffled[first : first + 128]) for first in range(0, len(size), 128))
    assert mixed / sum(size) > 2


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), RATIOS)
def test_any_buckets_keep_to_their_promises(
    lengths: list[SampleLength], batch_size: int, pool: int, group: int, ratio: float
) -> None:
    batches = bucket_batches(lengths, batch_size=batch_size, slow_ratio=ratio, seed=2, epoch=1, pool=pool, group=group)
    every_sample_once(batches, len(lengths))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1]), "only the last may be smaller"


def test_the_batches_of_a_step_are_neighbours_in_length() -> None:
    lengths = [SampleLength(n + 1, n + 1) for n in range(96)]
    batches = bucket_batches(lengths, batch_size=4, pool=100, group=3, **DRAW)
    steps = [sorted(sample for batch in batches[first : first + 3] for sample in batch) for first in range(0, 24, 3)]
    assert sorted(steps) == [list(range(first, first + 12)) for first in range(0, 96, 12)]
    assert steps != sorted(steps), "the order of steps is drawn"
    flat = [batch[0] for batch in batches]
    assert any(flat[first] > flat[first + 2] for first in range(0, 24, 3)), "no process has the short ones always"


@pytest.mark.parametrize("make", [plan_packs, bucket_batches])
def test_a_plan_is_a_pure_function_of_seed_and_epoch(make: Any) -> None:
    lengths = samples(400)
    how = {"budget": 4096} if make is plan_packs else {"batch_size": 8}
    state = random.getstate()
    plans = [make(lengths, slow_ratio=0.1, seed=s, epoch=e, **how) for s, e in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert random.getstate() == state
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]
    assert plans[0][0] != sorted(plans[0][0]) or plans[0][1] != sorted(plans[0][1])


def test_long_samples_get_packs_of_their_own_where_allowed() -> None:
    lengths = [*samples(200), SampleLength(9000, 700), SampleLength(9000, 8000), SampleLength(5000, 5000)]
    draw = {"slow_ratio": 1.0, "seed": 1, "epoch": 0}
    plan = plan_packs(lengths, budget=4096, oversize="own", **draw)
    every_sample_once(plan, len(lengths))
    assert sorted(pack for pack in plan if pack[0] >= 200) == [[200], [201], [202]]
    fast = plan_packs(lengths, budget=4096, oversize="own", **{**draw, "slow_ratio": 0})
    assert [201] in fast
    assert next(len(pack) for pack in fast if 200 in pack) > 1, "as a fast sample it fits beside others"


def test_long_samples_are_spread_over_the_epoch() -> None:
    lengths = [SampleLength(5000 if n < 20 else 100, 100 if n >= 20 else 5000) for n in range(4020)]
    plan = plan_packs(lengths, budget=1000, oversize="own", pool=20, **DRAW)
    places = [place for place, pack in enumerate(plan) if pack[0] < 20]
    halves = Counter(place < len(plan) / 2 for place in places)
    assert halves == {True: 10, False: 10}


# bad input ----------------------------------------------------------------------------------------------------------


def test_a_sample_that_fits_in_no_pack_is_named() -> None:
    lengths = [*samples(40), SampleLength(4100, 300)]
    for epoch in range(5):  # also where its mode in this epoch would fit
        with pytest.raises(SettingError, match=r"(?s)Sample 40 has 4100 tokens \(300 after.*4096.*Raise.*'own'"):
            plan_packs(lengths, budget=4096, slow_ratio=0.1, seed=1, epoch=epoch)
    assert plan_packs(lengths, budget=4096, slow_ratio=0, seed=1, epoch=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budget": 0}, "plan_packs.budget"),
        ({"pool": 0}, "plan_packs.pool"),
        ({"multiple": 0}, "plan_packs.multiple"),
        ({"packs": -1}, "plan_packs.packs"),
        ({"oversize": "drop"}, "plan_packs.oversize"),
        ({"slow_ratio": 2}, "slow_ratio"),
        ({"epoch": -1}, "epoch"),
        ({"lengths": []}, "plan_packs.lengths"),
        ({"lengths": [SampleLength(3, 4)]}, "plan_packs.lengths"),
        ({"lengths": [SampleLength(3, 0)]}, "plan_packs.lengths"),
    ],
)
def test_settings_outside_their_range_are_refused(changes: dict[str, Any], named: str) -> None:
    settings_of_plan: dict[str, Any] = {"lengths": samples(20), "budget": 4096, **DRAW, **changes}
    with pytest.raises(SettingError, match=named):
        plan_packs(settings_of_plan.pop("lengths"), **settings_of_plan)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"pool": 0}, {"group": 0}, {"lengths": []}])
def test_buckets_refuse_settings_outside_their_range(changes: dict[str, Any]) -> None:
    (name,) = changes
    settings_of_plan: dict[str, Any] = {"lengths": samples(20), "batch_size": 4, **DRAW, **changes}
    with pytest.raises(SettingError, match=f"bucket_batches.{name}"):
        bucket_batches(settings_of_plan.pop("lengths"), **settings_of_plan)
