"""The language-model head where labels are, and only there.

A training step needs scores at the places that predict a supervised label; in multimodal data these are a small
share of the sequence. Nothing here ever builds a [row, seq, vocab] tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trimtab.ops.divergence import kl_divergence
from trimtab.shapes import Float, Int, Tensor

IGNORED = -100
"""Label of places that carry no supervision, as in transformers and torch."""

Head = Callable[[Tensor], Tensor]
"""States [label, width] to scores [label, vocab]."""


def supervised_positions(labels: Int[Tensor, "row seq"]) -> tuple[Int[Tensor, "label"], Int[Tensor, "label"]]:
    """Find the places whose state predicts a supervised label.

    The label at place i is predicted by the state at place i - 1; a label at place 0 has no predecessor and is
    left out, as in transformers. Waits for the device once (the number of labels decides the shape).

    Args:
        labels: Token ids, or -100 where there is no supervision.

    Returns:
        Row and place of each predicting state, in reading order.
    """
    row, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return row, place


def states_at_labels(
    states: Float[Tensor, "row seq width"], labels: Int[Tensor, "row seq"]
) -> tuple[Float[Tensor, "label width"], Int[Tensor, "label"]]:
    """Gather the states that predict supervised labels, and these labels.

    Args:
        states: Last hidden states.
        labels: Token ids, or -100 where there is no supervision; same rows and places.

    Returns:
        The states and the labels they should predict, in reading order.
    """
    row, place = supervised_positions(labels)
    return states[row, place], labels[row, place + 1]


def label_losses(
    student_states: Float[Tensor, "label width"],
    teacher_states: Float[Tensor, "label width"] | None,
    labels: Int[Tensor, "label"],
    head: Head,
    temperature: float = 1.0,
    chunk: int = 1024,
    least_chunks: int = 1,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum cross-entropy and KL(teacher || student) over supervised labels, chunk by chunk.

    With more than one chunk each is recomputed in the backward pass, so that at most ``chunk`` rows of scores
    (twice that with a teacher) exist at a time. A chunk without labels passes one row of zeros through the head with
    weight zero, so that the number of chunks alone decides how often the head is called.

    Args:
        student_states: States that predict the labels; gradients flow.
        teacher_states: States of the teacher for the same labels in the same order, or None for no KL. No
            gradient flows into them or, through them, into the head.
        labels: The labels, without -100.
        head: States to scores; called once per chunk and side, and once more where a chunk is recomputed.
        temperature: Temperature of the KL, above 0; its square is left to the caller.
        chunk: Labels per chunk, at least 1.
        least_chunks: Make at least this many chunks, so that processes that share a sharded head call it equally often.

    Returns:
        Sum of cross-entropies and sum of KL, in nats; 0 (with a gradient path) where there is no label.
    """

    def losses(student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        if not target.shape[0]:
            student = student.new_zeros(1, student.shape[1]) + student.sum()
            teacher = None if teacher is None else student.detach()
        scores = head(student)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        if teacher is not None:
            with torch.no_grad():
                teacher_scores = head(teacher)
        if not target.shape[0]:
            nothing = wide.sum() * 0
            return nothing, nothing.detach().clone()
        ce = functional.cross_entropy(wide, target, reduction="sum")
        if teacher is None:
            return ce, ce.new_zeros(())
        return ce, kl_divergence(teacher_scores, wide, temperature).sum()

    count = labels.shape[0]
    chunks = max(least_chunks, -(-count // chunk))
    if chunks <= 1:
        return losses(student_states, teacher_states, labels)
    pieces = []
    for start in range(0, chunks * chunk, chunk):
        part = slice(start, start + chunk)
        teacher = None if teacher_states is None else teacher_states[part]
        pieces.append(checkpoint(losses, student_states[part], teacher, labels[part], use_reentrant=False))
    ce_sum, kl_sum = (torch.stack(values).sum() for values in zip(*pieces, strict=True))
    return ce_sum, kl_sum
