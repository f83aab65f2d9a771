"""Samplers over packs and over buckets of padded batches.

Together with rows that know their numbers they make batches that know their samples::

    sampler = PackSampler(lengths, budget=4096, slow_ratio=0.1, seed=0)
    loader = DataLoader(NumberedRows(rows), batch_sampler=sampler, collate_fn=collate_numbered(collator))
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from trimtab.dualspeed.numbered import CollateNumbered as CollateNumbered
from trimtab.dualspeed.numbered import Drawn as Drawn
from trimtab.dualspeed.numbered import NumberedRow as NumberedRow
from trimtab.dualspeed.numbered import NumberedRows as NumberedRows
from trimtab.dualspeed.numbered import NumberedSampler as NumberedSampler
from trimtab.dualspeed.numbered import collate_numbered as collate_numbered
from trimtab.dualspeed.packs import SampleLength, bucket_batches, lengths_of_modes, plan_packs
from trimtab.errors import SettingError, setting_error


class _PlannedSampler:
    """Yields the batches of a plan; what `PackSampler` and `BucketSampler` have in common.

    Attributes:
        epoch: The pass through the data set, from 0.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._given = 0
        self._plan: tuple[int, list[list[int]]] | None = None

    def plan(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._make_plan(epoch))
        return self._plan[1]

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; to its beginning unless it is the one that the sampler is in."""
        if epoch < 0:
            raise setting_error(type(self).__name__, "epoch", "at least 0", epoch)
        if epoch != self.epoch:
            self.epoch, self._given = epoch, 0

    def fingerprint(self) -> str:
        """Return a short name of the plan of this epoch; equal plans have equal names."""
        digest = hashlib.blake2b(digest_size=8)
        for batch in self.plan(self.epoch):
            digest.update(array("q", [len(batch), *batch]).tobytes())
        return digest.hexdigest()

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Return what `load_state_dict` needs to give exactly the rest of the epoch.

        Args:
            done: Batches of this epoch that are done with. None takes those that were handed out; a `DataLoader` with
                worker processes asks for more than it has given away.
        """
        return {"epoch": self.epoch, "done": self._given if done is None else done, "plan": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            SettingError: This sampler plans that epoch otherwise.
        """
        self.epoch, self._given = int(state["epoch"]), int(state["done"])
        if self.fingerprint() != state["plan"]:
            raise SettingError(
                f"The plan of epoch {self.epoch} is another than that of the interrupted run, so that samples would be "
                "left out or come twice. Resume with the same data, lengths, settings and number of processes."
            )

    def __len__(self) -> int:
        """Batches of the current epoch, all of them."""
        return len(self.plan(self.epoch))

    def __iter__(self) -> Iterator[list[Drawn]]:
        epoch, plan = self.epoch, self.plan(self.epoch)
        start, self._given = self._given, 0
        for place in range(start, len(plan)):
            self._given = place + 1
            yield [Drawn(sample, epoch) for sample in plan[place]]
        self._given = 0

    def _make_plan(self, epoch: int) -> list[list[int]]:
        raise NotImplementedError


class PackSampler(_PlannedSampler):
    """A batch sampler that fills packs up to a budget of tokens; see `plan_packs`.

    Attributes:
        epoch: The pass through the data set, from 0.
    """

    def __init__(
        self,
        lengths: Sequence[SampleLength],
        *,
        budget: int,
        slow_ratio: float,
        seed: int,
        oversize: str = "error",
        pool: int = 64,
        multiple: int = 1,
    ) -> None:
        """Keep the settings and plan the first epoch.

        Args:
            lengths: Of every sample of the data set.
            budget: Most tokens of a pack.
            slow_ratio: Mean share of slow samples.
            seed: Names shuffle and modes.
            oversize: ``"error"``, or ``"own"`` for a pack of its own.
            pool: Packs that are filled together.
            multiple: The number of packs is a whole multiple of this; give the number of processes.

        Raises:
            SettingError: As `plan_packs`.
        """
        super().__init__()
        self.lengths, self.budget, self.least = lengths, budget, 0
        self._draw: dict[str, Any] = {"slow_ratio": slow_ratio, "seed": seed}
        self._settings: dict[str, Any] = {"oversize": oversize, "pool": pool, "multiple": multiple}
        self.plan(0)

    def even_out(self, epochs: int) -> None:
        """Give each of the first epochs as many packs as the fullest of them needs.

        Modes are drawn anew in each epoch, and with them lengths, so that one epoch may need a pack more than another.
        A Trainer takes it for granted that all have as many batches as the first.

        Args:
            epochs: How many, at least 1.
        """
        if epochs < 1:
            raise setting_error("PackSampler.even_out", "epochs", "at least 1", epochs)
        self.least, self._plan = 0, None
        self.least = max(len(self._make_plan(epoch)) for epoch in range(epochs))

    def fill(self) -> float:
        """Return the mean share of the budget that the packs of this epoch fill."""
        packs = self.plan(self.epoch)
        modes = lengths_of_modes(self.lengths, **self._draw, epoch=self.epoch)
        return sum(tokens for _, tokens in modes) / (len(packs) * self.budget)

    def _make_plan(self, epoch: int) -> list[list[int]]:
        return plan_packs(
            self.lengths, budget=self.budget, packs=self.least, epoch=epoch, **self._draw, **self._settings
        )


class BucketSampler(_PlannedSampler):
    """A batch sampler of padded batches whose samples have about one length; see `bucket_batches`.

    Samples that fill no whole group are shared out to one batch for every process. Where there are fewer of them than
    processes, those of the group before are shared out with them, to two batches for every process.

    Attributes:
        epoch: The pass through the data set, from 0.
    """

    def __init__(
        self,
        lengths: Sequence[SampleLength],
        *,
        batch_size: int,
        slow_ratio: float,
        seed: int,
        pool: int = 50,
        group: int = 1,
        drop_last: bool = False,
    ) -> None:
        """Keep the settings and plan the first epoch.

        Args:
            lengths: Of every sample of the data set.
            batch_size: Samples of a batch.
            slow_ratio: Mean share of slow samples.
            seed: Names shuffle and modes.
            pool: Groups of batches that are sorted together.
            group: Batches that the processes take together in one step. The number of batches is a whole multiple of
                it, save with batches of one sample, or fewer samples than `group`.
            drop_last: Leave out the samples that fill no whole group; other ones in each epoch.

        Raises:
            SettingError: As `bucket_batches`.
        """
        super().__init__()
        self.lengths, self._drop_last = lengths, drop_last
        self._draw: dict[str, Any] = {"slow_ratio": slow_ratio, "seed": seed}
        self._settings: dict[str, Any] = {"batch_size": batch_size, "pool": pool, "group": group}
        self.plan(0)

    def fill(self) -> float:
        """Return the share of the places of this epoch's batches that hold tokens, and no padding."""
        size = self._sizes(self.epoch)
        batches = [[size[sample] for sample in batch] for batch in self.plan(self.epoch)]
        return sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)

    def _make_plan(self, epoch: int) -> list[list[int]]:
        batches = bucket_batches(self.lengths, epoch=epoch, **self._draw, **self._settings)
        whole = len(self.lengths) // (self._settings["batch_size"] * self._settings["group"]) * self._settings["group"]
        return batches[:whole] if self._drop_last else self._share_out(batches, whole, epoch)

    def _share_out(self, batches: list[list[int]], whole: int, epoch: int) -> list[list[int]]:
        """Cut the samples behind the first `whole` batches anew, so that the batches are whole groups."""
        group, left = self._settings["group"], sum(map(len, batches[whole:]))
        if not left:
            return batches
        if left < group <= whole:
            whole -= group
        rest = [sample for batch in batches[whole:] for sample in batch]
        count = -(-(len(batches) - whole) // group) * group
        if len(rest) < count:
            return batches
        if len(rest) > left:
            rest.sort(key=self._sizes(epoch).__getitem__, reverse=True)
        edges = [len(rest) * place // count for place in range(count + 1)]
        return batches[:whole] + [rest[start:end] for start, end in pairwise(edges)]

    def _sizes(self, epoch: int) -> list[int]:
        return [tokens for _, tokens in lengths_of_modes(self.lengths, **self._draw, epoch=epoch)]
