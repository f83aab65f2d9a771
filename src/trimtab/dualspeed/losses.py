"""The loss of a step: cross-entropy at all labels, and the divergence of the two views at those of slow rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.step import Step, values_of_rows
from trimtab.ops.label_head import label_losses, states_at_labels
from trimtab.shapes import Tensor


@dataclass(frozen=True)
class StepLosses:
    """Sums over labels, in nats.

    Attributes:
        ce: Cross-entropy of all labels.
        ce_fast: That of the rows in fast mode, or None where there are none.
        ce_slow: That of the rows in slow mode, or None where there are none.
        kl: Divergence at the labels of slow rows, or None without a teacher.
        labels_fast: Labels of the rows in fast mode.
        labels_slow: Labels of the rows in slow mode.
    """

    ce: Tensor
    ce_fast: Tensor | None
    ce_slow: Tensor | None
    kl: Tensor | None
    labels_fast: int
    labels_slow: int


def losses_of_step(step: Step, head: Callable[[Tensor], Tensor], config: DualSpeedConfig) -> StepLosses:
    """Apply the head where labels are, and sum the losses.

    Args:
        step: A step whose student has run.
        head: States to scores.
        config: For temperature, chunk and kind of distillation.

    Returns:
        The sums. Processes that share a sharded head call it equally often.
    """
    assert step.student is not None and step.labels is not None  # noqa: PT018
    counts = step.label_counts
    states, labels = states_at_labels(step.student, step.labels, sum(counts))
    slow = step.slow_rows
    fast = sorted(set(range(len(counts))) - set(slow))
    labels_slow = sum(counts[row] for row in slow)
    labels_fast = sum(counts) - labels_slow
    with_slow, with_fast = bool(slow), bool(fast)
    if step.shared is not None:
        with_slow, with_fast = step.shared.slow, step.mode != "slow"
    slow_part = fast_part = (states, labels)
    if with_slow and with_fast:
        slow_part, fast_part = (
            (values_of_rows(states, counts, rows), values_of_rows(labels, counts, rows)) for rows in (slow, fast)
        )
    ce_slow = ce_fast = kl = None
    if with_slow:
        least = 1 if step.shared is None else -(-step.shared.slow_labels // config.head_chunk)
        ce_slow, kl_sum = label_losses(
            slow_part[0], step.teacher, slow_part[1], head, config.temperature, config.head_chunk, least_chunks=least,
            two_way=config.distillation == "two_way",
        )  # fmt: skip
        kl = None if step.teacher is None else kl_sum
    if with_fast:
        least = 1 if step.shared is None else -(-step.shared.labels // config.head_chunk)
        ce_fast, _ = label_losses(
            fast_part[0], None, fast_part[1], head, config.temperature, config.head_chunk, least_chunks=least
        )
    ce = sum(one for one in (ce_fast, ce_slow) if one is not None)
    assert isinstance(ce, Tensor)
    return StepLosses(ce, ce_fast, ce_slow, kl, labels_fast, labels_slow)
