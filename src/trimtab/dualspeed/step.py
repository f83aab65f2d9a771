"""What one training step carries, and how its loss is divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trimtab.dualspeed.inside import InsideRows
from trimtab.dualspeed.ranks import SharedStep
from trimtab.ops.label_head import IGNORED
from trimtab.shapes import Tensor


@dataclass
class Step:
    """What one training step carries from the hook before the forward to the hook after it.

    Attributes:
        mode: That of all rows, or ``"mixed"`` where each row has its own.
        labels: Labels of what the student sees.
        label_counts: How many of them each row has.
        items: Labels of the whole update.
        teacher: States of the pruned view at the labels of `slow_rows`, or None.
        slow_rows: Rows of the batch that are seen in full, of a single process only those that pruning would change.
        student: States of the student, once it has run.
        tokens_full: Visual tokens of the batch.
        tokens_kept: Visual tokens that the student sees.
        tokens_deep: Those of them that reach the last layer, where tokens leave inside and the host knows.
        inside: What may leave inside in the student's pass, or None.
        shared: What the batches of all processes hold, where they must keep in step.
        pace: Hook on the embeddings that has to go after the forward.
        leave: What has to be undone after the forward.
        as_tuple: Whether the caller asked for a tuple.
        catching: Whether the student's pass is the next one.
    """

    mode: Literal["fast", "slow", "mixed"]
    labels: Tensor | None = None
    label_counts: list[int] = field(default_factory=list)
    items: Tensor | int | None = None
    teacher: Tensor | None = None
    slow_rows: list[int] = field(default_factory=list)
    student: Tensor | None = None
    tokens_full: int | None = None
    tokens_kept: int | None = None
    tokens_deep: int | None = None
    inside: InsideRows | None = None
    shared: SharedStep | None = None
    pace: Any = None
    leave: list[Callable[[], None]] = field(default_factory=list)
    as_tuple: bool = False
    catching: bool = False

    @property
    def has_slow(self) -> bool:
        """Whether this process, or one that it must keep in step with, sees any row in full."""
        return bool(self.slow_rows) if self.shared is None else self.shared.slow


def loss_per_label(step: Step, output: Any) -> Tensor:
    """Return the mean per label of a loss that the model has computed, also where it divides by those of an update."""
    loss: Tensor = output["loss"] if isinstance(output, dict) else output[0]
    if step.items is None or step.labels is None:
        return loss
    return loss.detach() * step.items / (step.labels[:, 1:] != IGNORED).sum().clamp(min=1)


def at_least_one(items: Tensor | int) -> Tensor | int:
    """Where nothing at all is supervised the sum is 0, and so shall the loss be."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def values_of_rows(values: Tensor, counts: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Take the values of some rows, without waiting for the device.

    Args:
        values: Those of all rows, one row behind the other.
        counts: How many each row has.
        rows: The rows to take, in this order.
    """
    parts = values.split(list(counts))
    return torch.cat([parts[row] for row in rows]) if rows else values[:0]
