"""What one training step carries, and how its loss is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.dualspeed.ranks import SharedStep
from trimtab.dualspeed.schedule import Mode
from trimtab.ops.label_head import IGNORED
from trimtab.shapes import Tensor


@dataclass
class Step:
    """What one training step carries from the hook before the forward to the hook after it."""

    mode: Mode
    labels: Tensor | None = None
    items: Tensor | int | None = None
    teacher: Tensor | None = None
    student: Tensor | None = None
    tokens_full: int | None = None
    tokens_kept: int | None = None
    shared: SharedStep | None = None
    pace: Any = None
    """Hook on the embeddings that has to go after the forward."""
    as_tuple: bool = False
    catching: bool = False


def loss_per_label(step: Step, output: Any) -> Tensor:
    """Return the mean per label of a loss that the model has computed, also where it divides by those of an update."""
    loss: Tensor = output["loss"] if isinstance(output, dict) else output[0]
    if step.items is None or step.labels is None:
        return loss
    return loss.detach() * step.items / (step.labels[:, 1:] != IGNORED).sum().clamp(min=1)


def at_least_one(items: Tensor | int) -> Tensor | int:
    """Where nothing at all is supervised the sum is 0, and so shall the loss be."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
