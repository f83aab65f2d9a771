"""Which samples go into one pack, or into one padded batch: pure functions of lengths, seed and epoch.

A pack is one sequence without padding, filled up to a budget of tokens. The mode of a sample is drawn for it alone
(`mode_of_sample`), and packs are dealt so that each holds the same share of slow samples, give or take one: every
step and every process then has the same work, and gradients of both modes meet in each update.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.dualspeed.config import OVERSIZE
from trimtab.dualspeed.dealing import deal_pools, halve_packs
from trimtab.dualspeed.samples import Samples as Samples
from trimtab.dualspeed.schedule import Mode, mode_of_sample
from trimtab.errors import SettingError, setting_error


class SampleLength(NamedTuple):
    """Tokens of one sample, without padding.

    Attributes:
        full: With all visual tokens.
        fast: After pruning, with the isolator.
    """

    full: int
    fast: int

    @property
    def pruned(self) -> bool:
        """Whether the modes differ. A sample that loses nothing is always fast: slow it would be the same."""
        return self.fast < self.full


def plan_packs(
    lengths: Sequence[SampleLength],
    *,
    budget: int,
    slow_ratio: float,
    seed: int,
    epoch: int,
    oversize: str = "error",
    pool: int = 64,
    packs: int = 0,
    multiple: int = 1,
) -> list[list[int]]:
    """Deal all samples of an epoch out to packs.

    Samples are shuffled, and consecutive ones are dealt together to a pool of packs. No pack exceeds the budget, and
    the slow samples of each are within one of the share that its pool has.

    Args:
        lengths: Of every sample of the data set.
        budget: Most tokens of a pack, at least 1.
        slow_ratio: Mean share of slow samples, in [0, 1].
        seed: Names shuffle and modes.
        epoch: The pass through the data set, from 0.
        oversize: What to do with a sample of more than `budget` tokens: ``"error"`` (also where it would be too long
            in another epoch), or ``"own"`` for a pack of its own.
        pool: Packs that are filled together, at least 1.
        packs: Least number of packs; where fewer would do, packs are halved.
        multiple: The number of packs is a whole multiple of this (the number of processes), for the same price.

    Returns:
        The samples of each pack, by number. With fewer samples than `packs` and `multiple` ask for, every sample has
        a pack of its own, and there are only so many packs.

    Raises:
        SettingError: A value outside its range, no lengths, or a sample that is too long.
    """
    _check_lengths("plan_packs", lengths)
    _at_least("plan_packs", budget=(budget, 1), pool=(pool, 1), packs=(packs, 0), multiple=(multiple, 1))
    if oversize not in OVERSIZE:
        raise setting_error("plan_packs", "oversize", f"one of {', '.join(OVERSIZE)}", oversize)
    if oversize == "error":
        refuse_oversize(lengths, budget, slow_ratio)
    slow = _is_slow(lengths, slow_ratio, seed, epoch)
    size = [one.full if is_slow else one.fast for one, is_slow in zip(lengths, slow, strict=True)]
    generator = random.Random(f"trimtab packs {seed} {epoch}")
    pools = list(deal_pools(size, slow, budget=budget, pool=pool, generator=generator))
    count = max(packs, sum(len(one.packs) for one in pools))
    return halve_packs(pools, -(-count // multiple) * multiple, slow)


def refuse_oversize(lengths: Sequence[SampleLength], budget: int, slow_ratio: float) -> None:
    """Refuse a sample that no pack has room for in one of the modes that it may have.

    Raises:
        SettingError: Names the first such sample, its lengths and how many there are.
    """
    long = [number for number, one in enumerate(lengths) if (one.full if slow_ratio else one.fast) > budget]
    if not long:
        return
    one = lengths[long[0]]
    raise SettingError(
        f"Sample {long[0]} has {one.full} tokens ({one.fast} after pruning), more than pack_tokens={budget}; so have "
        f"{len(long)} of {len(lengths)} samples. Raise pack_tokens, shorten the samples, or set oversize='own', which "
        "gives each of them a pack of its own."
    )


def bucket_batches(
    lengths: Sequence[SampleLength],
    *,
    batch_size: int,
    slow_ratio: float,
    seed: int,
    epoch: int,
    pool: int = 50,
    group: int = 1,
) -> list[list[int]]:
    """Make batches of samples of about one length, for models that cannot pack.

    Samples are shuffled; `pool` groups of batches are sorted by length together and cut into neighbours.

    Args:
        lengths: Of every sample of the data set.
        batch_size: Samples of a batch, at least 1.
        slow_ratio: Mean share of slow samples, in [0, 1].
        seed: Names shuffle and modes.
        epoch: The pass through the data set, from 0.
        pool: Groups that are sorted together, at least 1.
        group: Batches that the processes take together in one step (the number of processes), at least 1; they are
            neighbours in length too.

    Returns:
        The samples of each batch, by number, one group behind the other in random order. A last group that is not
        whole, and in it a last batch that is smaller, stands at the end.

    Raises:
        SettingError: A value outside its range, or no lengths.
    """
    _check_lengths("bucket_batches", lengths)
    _at_least("bucket_batches", batch_size=(batch_size, 1), pool=(pool, 1), group=(group, 1))
    slow = _is_slow(lengths, slow_ratio, seed, epoch)
    size = [one.full if is_slow else one.fast for one, is_slow in zip(lengths, slow, strict=True)]
    generator = random.Random(f"trimtab buckets {seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    step = batch_size * group
    whole = len(order) // step * step
    groups = []
    for start in range(0, whole, pool * step):
        near = sorted(order[start : min(start + pool * step, whole)], key=size.__getitem__)
        groups += [_cut(near[first : first + step], batch_size) for first in range(0, len(near), step)]
    generator.shuffle(groups)
    for batches in groups:
        generator.shuffle(batches)
    rest = sorted(order[whole:], key=size.__getitem__, reverse=True)
    return [batch for batches in groups for batch in batches] + _cut(rest, batch_size)


def lengths_of_modes(
    lengths: Sequence[SampleLength], *, slow_ratio: float, seed: int, epoch: int
) -> list[tuple[Mode, int]]:
    """Return mode and tokens that every sample has in an epoch."""
    slow = _is_slow(lengths, slow_ratio, seed, epoch)
    return [("slow", one.full) if is_slow else ("fast", one.fast) for one, is_slow in zip(lengths, slow, strict=True)]


def _cut(samples: list[int], size: int) -> list[list[int]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


# checks -----------------------------------------------------------------------------------------------------------


def _is_slow(lengths: Sequence[SampleLength], slow_ratio: float, seed: int, epoch: int) -> list[bool]:
    return [
        one.pruned and mode_of_sample(sample, epoch=epoch, slow_ratio=slow_ratio, seed=seed) == "slow"
        for sample, one in enumerate(lengths)
    ]


def _check_lengths(owner: str, lengths: Sequence[SampleLength]) -> None:
    if not len(lengths):
        raise setting_error(owner, "lengths", "the lengths of at least one sample", lengths)
    for sample, one in enumerate(lengths):
        if not 1 <= one.fast <= one.full:
            raise setting_error(owner, "lengths", f"1 <= fast <= full, also of sample {sample}", one)


def _at_least(owner: str, **settings: tuple[int, int]) -> None:
    for name, (value, least) in settings.items():
        if value < least:
            raise setting_error(owner, name, f"at least {least}", value)
