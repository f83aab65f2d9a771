"""Dealing samples out to packs of equal work: as many tokens, and as large a share of slow samples, in each."""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

STEP = 0.9975
"""By how much fewer tokens are tried where a pool does not fit into its packs."""


class Pool(NamedTuple):
    """Samples that were dealt together.

    Attributes:
        packs: The packs, none of them empty.
        slow: How many of the samples are slow.
        samples: How many samples were dealt; one with a pack of its own is not counted.
    """

    packs: list[list[int]]
    slow: int
    samples: int


def deal_pools(
    size: Sequence[int], slow: Sequence[bool], *, budget: int, pool: int, generator: random.Random
) -> Iterator[Pool]:
    """Shuffle samples and deal them out, as many at once as fill a pool of packs.

    Args:
        size: Tokens of every sample.
        slow: Which samples are slow.
        budget: Most tokens of a pack; a longer sample has a pack of its own.
        pool: Packs that are filled together.
        generator: For the shuffle.

    Yields:
        The pools. In each the slow samples of every pack are within one of their share.
    """
    order = list(range(len(size)))
    generator.shuffle(order)
    own = [sample for sample in order if size[sample] > budget]
    order = [sample for sample in order if size[sample] <= budget] if own else order
    ends = list(accumulate((size[sample] for sample in order), initial=0))
    start, share = 0, 1.0
    while start < len(order):
        stop = bisect_right(ends, ends[start] + pool * budget * share) - 1
        stop = min(max(stop, start + 1), len(order))
        count = pool if stop < len(order) else -(-(ends[stop] - ends[start]) // budget)
        dealt = _deal(order[start:stop], size, slow, min(count, stop - start), budget)
        if dealt is None and stop < len(order):
            share *= STEP
            continue
        while dealt is None:  # one sample to a pack always fits
            count += 1
            dealt = _deal(order[start:stop], size, slow, count, budget)
        share = min(1.0, share / STEP)
        # Long samples are spread over the epoch as the others are.
        long = [own.pop() for _ in range(len(own) * (stop - start) // (len(order) - start))]
        samples = order[start:stop]
        packs = [*dealt, *([sample] for sample in long)]
        generator.shuffle(packs)
        yield Pool(packs, sum(slow[sample] for sample in samples), len(samples))
        start = stop
    if own:
        yield Pool([[sample] for sample in own], 0, 0)


def halve_packs(pools: Sequence[Pool], count: int, slow: Sequence[bool]) -> list[list[int]]:
    """Return the packs of all pools, the largest cut in two until there are `count`, or no pack can be cut.

    Args:
        pools: From `deal_pools`.
        count: How many packs there shall be at least.
        slow: Which samples are slow.

    Returns:
        The packs; the slow samples of each are still within one of the share that its pool has.
    """
    packs = [(pack, pool) for pool in pools for pack in pool.packs]
    missing = count - len(packs)
    if missing <= 0:
        return [pack for pack, _ in packs]
    parts = {place: [pack] for place, (pack, _) in enumerate(packs)}
    heap = [(-len(pack), place, 0) for place, (pack, _) in enumerate(packs)]
    heapq.heapify(heap)
    while missing and heap and heap[0][0] <= -2:
        _, place, part = heapq.heappop(heap)
        pool = packs[place][1]
        halves = _cut_in_two(parts[place][part], slow, pool.slow / max(1, pool.samples))
        parts[place][part] = halves[0]
        parts[place].append(halves[1])
        heapq.heappush(heap, (-len(halves[0]), place, part))
        heapq.heappush(heap, (-len(halves[1]), place, len(parts[place]) - 1))
        missing -= 1
    return [part for place in range(len(packs)) for part in parts[place]]


def _cut_in_two(pack: list[int], slow: Sequence[bool], share: float) -> tuple[list[int], list[int]]:
    """Cut a pack so that both halves have within one of their share of slow samples, as the whole had."""
    slow_ones = [sample for sample in pack if slow[sample]]
    fast_ones = [sample for sample in pack if not slow[sample]]
    first = len(pack) // 2
    wanted = round(len(slow_ones) / 2 + share * (first - len(pack) / 2))
    taken = min(max(wanted, first - len(fast_ones)), first, len(slow_ones))
    rest = first - taken
    slow_ones, fast_ones = (ones[::2] + ones[1::2] for ones in (slow_ones, fast_ones))  # long and short ones in both
    return slow_ones[:taken] + fast_ones[:rest], slow_ones[taken:] + fast_ones[rest:]


def _deal(
    samples: list[int], size: Sequence[int], slow: Sequence[bool], count: int, budget: int
) -> list[list[int]] | None:
    """Deal samples out to so many packs, or return None where a pack would exceed the budget.

    First the slow ones, round by round, the longest to the pack with the fewest tokens, so that their numbers differ by
    one at most. Then the fast ones, the longest first, each to the pack with the fewest tokens of those whose share of
    slow samples allows it.
    """
    by_length = sorted(samples, key=size.__getitem__, reverse=True)
    slow_ones = [sample for sample in by_length if slow[sample]]
    fast_ones = [sample for sample in by_length if not slow[sample]]
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for start in range(0, len(slow_ones), count):
        emptiest = sorted(range(count), key=loads.__getitem__)
        for pack, sample in zip(emptiest, slow_ones[start : start + count], strict=False):
            packs[pack].append(sample)
            loads[pack] += size[sample]
    if max(loads) > budget:
        return None
    least, most = _fast_bounds([len(pack) for pack in packs], len(slow_ones), len(samples))
    heap = [(load, pack) for pack, load in enumerate(loads)]
    heapq.heapify(heap)
    owed, stop = sum(least), most
    for left, sample in zip(range(len(fast_ones), 0, -1), fast_ones, strict=True):
        if owed == left and stop is most:  # what is left belongs to packs with too many slow samples
            stop = least
            heap = [entry for entry in heap if least[entry[1]] > 0]
            heapq.heapify(heap)
        load, pack = heap[0]
        load += size[sample]
        if load > budget:
            return None
        packs[pack].append(sample)
        owed -= least[pack] > 0
        least[pack] -= 1
        if stop is most:
            most[pack] -= 1
        if stop[pack] > 0:
            heapq.heapreplace(heap, (load, pack))
        else:
            heapq.heappop(heap)
    return packs


def _fast_bounds(slow_of: list[int], slow: int, samples: int) -> tuple[list[int], list[int]]:
    """Least and most fast samples of packs with so many slow ones, so that these are within one of their share."""
    if slow == 0:
        return [0] * len(slow_of), [samples] * len(slow_of)
    least = [max(0, -(-(own - 1) * samples // slow) - own) for own in slow_of]
    most = [(own + 1) * samples // slow - own for own in slow_of]
    return least, most
