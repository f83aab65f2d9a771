"""Rows that know their number and epoch, and a collator that notes them in the batch.

Both travel inside the index that a sampler gives, so that worker processes of a `DataLoader`, also persistent ones,
know them without being told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch.utils.data import IterableDataset

from trimtab.dualspeed.samples import SAMPLES, Samples
from trimtab.errors import DataError, SettingError


class Drawn(int):
    """Number of a sample, and the epoch in which it was drawn."""

    epoch: int

    def __new__(cls, number: int, epoch: int) -> Drawn:
        """Make the number; it counts and compares as a plain one."""
        drawn = super().__new__(cls, number)
        drawn.epoch = epoch
        return drawn

    def __reduce__(self) -> tuple[Any, ...]:
        return Drawn, (int(self), self.epoch)


class NumberedSampler:
    """Puts the epoch beside every number that a sampler gives, for samplers that know nothing of packs.

    Attributes:
        epoch: The pass through the data set, from 0.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, with the sampler inside where it counts epochs too."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Drawn]:
        epoch = self.epoch
        for number in self.sampler:
            yield Drawn(int(number), epoch)


class NumberedRow:
    """A row of a data set with its number and epoch beside it.

    Attributes:
        row: The row, as the data set gave it.
        drawn: Its number, with the epoch.
    """

    def __init__(self, row: Any, drawn: Drawn) -> None:
        self.row, self.drawn = row, drawn


class NumberedMapping(NumberedRow, Mapping[str, Any]):
    """A row that is a mapping, and stays one."""

    def __getitem__(self, name: str) -> Any:
        return self.row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)


class NumberedRows:
    """A map-style data set whose rows know their number and epoch where a sampler says both.

    Item by `Drawn` gives the row with its number beside it (`NumberedRow`), item by a plain number the row alone.
    """

    def __init__(self, dataset: Any, sampler: Any = None) -> None:
        """Keep the data set.

        Args:
            dataset: Rows by number.
            sampler: What is told the epoch with the data set, or None. accelerate reaches a data set from under any
                number of samplers of its own, but not every sampler. Worker processes have none.

        Raises:
            SettingError: The data set has no length or no rows by number, as an iterable one.
        """
        if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")) or is_iterable_only(dataset):
            raise SettingError(
                f"{type(dataset).__name__} gives its rows one after another only, but batches by length, and modes per "
                "sample, need rows by number and their count. Give a map-style data set (with __len__ and "
                "__getitem__; of datasets a Dataset, no IterableDataset), or set pack_tokens=None and "
                "schedule_unit='optimizer'."
            )
        self.dataset: Any = dataset
        self.sampler = sampler

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sampler": None}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        row = self.dataset[int(number)]
        return _numbered(row, number) if isinstance(number, Drawn) else row

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """Return several rows, in one call where the data set has one for that."""
        if not hasattr(self.dataset, "__getitems__"):
            return [self[number] for number in numbers]
        rows = self.dataset.__getitems__([int(number) for number in numbers])
        return [
            _numbered(row, number) if isinstance(number, Drawn) else row
            for row, number in zip(rows, numbers, strict=True)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Tell sampler and data set the epoch, where they want to know."""
        for one in (self.sampler, self.dataset):
            if hasattr(one, "set_epoch"):
                one.set_epoch(epoch)


def is_iterable_only(dataset: Any) -> bool:
    """Whether a data set is of a kind that has no rows by number, whatever else it offers."""
    return isinstance(dataset, IterableDataset) or type(dataset).__name__ == "IterableDataset"


def _numbered(row: Any, drawn: Drawn) -> NumberedRow:
    return NumberedMapping(row, drawn) if isinstance(row, Mapping) else NumberedRow(row, drawn)


class CollateNumbered:
    """A collator for rows of `NumberedRows`: takes the numbers away, calls the user's, and notes them in the batch.

    Attributes:
        collator: The user's; it sees the rows as the data set gave them.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Build one batch.

        Args:
            rows: Numbered rows of one epoch.

        Returns:
            The user's batch with one entry more, ``samples`` (`Samples`). Rows without numbers make the user's batch.

        Raises:
            DataError: Some rows have numbers and others have none, or the rows are of several epochs.
        """
        drawn = [row.drawn for row in rows if isinstance(row, NumberedRow)]
        batch: Any = self.collator([row.row if isinstance(row, NumberedRow) else row for row in rows])
        if not drawn:
            return batch
        epochs = {one.epoch for one in drawn}
        if len(drawn) < len(rows) or len(epochs) > 1:
            raise DataError(
                f"{len(drawn)} of {len(rows)} rows of a batch have numbers, of the epochs {sorted(epochs)}. All must "
                "come from one sampler of trimtab in one epoch."
            )
        batch[SAMPLES] = Samples(tuple(int(one) for one in drawn), epochs.pop())
        return batch


def collate_numbered(collator: Callable[[Any], Any]) -> CollateNumbered:
    """Let a collator take rows of `NumberedRows` and note their samples in the batch; see `CollateNumbered`."""
    return CollateNumbered(collator)
