"""What a batch says of its samples beside its tensors: which they are, and counts that were made on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.anatomy.row_layout import NOTES, PlaceholderRule, note_rows
from trimtab.dualspeed.cache_keys import ENTRY
from trimtab.errors import SettingError

SAMPLES = "samples"
"""Entry of a batch that holds its `Samples`."""

ENTRIES = frozenset({SAMPLES, NOTES, ENTRY})
"""Entries of a batch that only a step of DualSpeed understands."""


@dataclass(frozen=True)
class Samples:
    """Which samples of a data set the rows of a batch are.

    Attributes:
        ids: Number of each row's sample.
        epoch: The epoch, from 0; modes are drawn anew in every one.
    """

    ids: tuple[int, ...]
    epoch: int = 0


def require_samples(samples: Any, rows: int) -> Samples:
    """Return what a batch says of its samples.

    Raises:
        SettingError: It says nothing, or of another number of rows.
    """
    if not isinstance(samples, Samples):
        raise SettingError(
            f"schedule_unit='sample' draws a mode for every sample, but the batch does not say which samples its "
            f"{rows} rows are. Train with with_dualspeed(...), which adds it, or add it in your collator: "
            "batch['samples'] = trimtab.Samples(ids=(...), epoch=0), with one number per row."
        )
    if len(samples.ids) != rows:
        raise SettingError(
            f"batch['samples'] has {len(samples.ids)} ids, but the batch has {rows} rows. Give one number per row."
        )
    return samples


class NoteRows:
    """A collator that counts the rows of every batch while it is still on the host (entry ``row_notes``).

    Attributes:
        collate: The user's collator.
        rule: What tells visual tokens.
    """

    def __init__(self, collate: Callable[..., Any], rule: PlaceholderRule) -> None:
        self.collate = collate
        self.rule = rule

    def __call__(self, rows: Any) -> Any:
        """Build one batch.

        Args:
            rows: What the user's collator takes.

        Returns:
            Its batch, with the notes where they can be made.
        """
        batch: Any = self.collate(rows)
        notes = note_rows(self.rule, batch)
        if notes is not None:
            batch[NOTES] = notes
        return batch
