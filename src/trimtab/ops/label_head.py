"""The language-model head where labels are, and only there.

A training step needs scores at the places that predict a supervised label; in multimodal data these are a small
share of the sequence. Nothing here ever builds a [row, seq, vocab] tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trimtab.ops.divergence import kl_divergence, two_way_divergence
from trimtab.shapes import Float, Int, Tensor

IGNORED = -100
"""Label of places that carry no supervision, as in transformers and torch."""

Head = Callable[[Tensor], Tensor]
"""States [label, width] to scores [label, vocab]."""


def supervised_positions(
    labels: Int[Tensor, "row seq"], count: int | None = None
) -> tuple[Int[Tensor, "label"], Int[Tensor, "label"]]:
    """Find the places whose state predicts a supervised label.

    The label at place i is predicted by the state at place i - 1; a label at place 0 has no predecessor and is
    left out, as in transformers. Without ``count`` the host waits for the device once, since the number of labels
    decides the shape.

    Args:
        labels: Token ids, or -100 where there is no supervision.
        count: How many labels there are, apart from place 0, where the host knows it. It must be right: more gives
            places without label at the end, fewer leaves the last labels out.

    Returns:
        Row and place of each predicting state, in reading order.
    """
    supervised = labels[:, 1:] != IGNORED
    if count is None:
        row, place = supervised.nonzero(as_tuple=True)
        return row, place
    # A stable sort keeps the reading order; int8 because CUDA sorts no bool.
    order = (~supervised).flatten().to(torch.int8).argsort(stable=True)[:count]
    seq = max(1, supervised.shape[1])
    return order // seq, order % seq


def states_at_labels(
    states: Float[Tensor, "row seq width"], labels: Int[Tensor, "row seq"], count: int | None = None
) -> tuple[Float[Tensor, "label width"], Int[Tensor, "label"]]:
    """Gather the states that predict supervised labels, and these labels.

    Args:
        states: Last hidden states.
        labels: Token ids, or -100 where there is no supervision; same rows and places.
        count: How many labels there are, where the host knows it; see `supervised_positions`.

    Returns:
        The states and the labels they should predict, in reading order.
    """
    row, place = supervised_positions(labels, count)
    return states[row, place], labels[row, place + 1]


def label_losses(
    student_states: Float[Tensor, "label width"],
    teacher_states: Float[Tensor, "label width"] | None,
    labels: Int[Tensor, "label"],
    head: Head,
    temperature: float = 1.0,
    chunk: int = 1024,
    least_chunks: int = 1,
    two_way: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum cross-entropy and KL(teacher || student) over supervised labels, chunk by chunk.

    With ``two_way`` the second sum holds both directions, sg(x) being x without gradient, so that the caller's
    ``ce + a * T^2 * kl`` is ``CE(s) + a * T^2 * KL(sg(p_t) || p_s) + a * T^2 * KL(sg(p_s) || p_t)``.

    With more than one chunk each is recomputed in the backward pass, so that at most ``chunk`` rows of scores
    (twice that with a teacher) exist at a time. A chunk without labels passes one row of zeros through the head with
    weight zero, so that the number of chunks alone decides how often the head is called.

    Args:
        student_states: States that predict the labels; gradients flow.
        teacher_states: States of the teacher for the same labels in the same order, or None for no KL. No
            gradient flows into them or, through them, into the head, but for ``two_way``.
        labels: The labels, without -100.
        head: States to scores; called once per chunk and side, and once more where a chunk is recomputed.
        temperature: Temperature of the KL, above 0; its square is left to the caller.
        chunk: Labels per chunk, at least 1.
        least_chunks: Make at least this many chunks, so that processes that share a sharded head call it equally often.
        two_way: Teach the teacher by the student as well.

    Returns:
        Sum of cross-entropies and sum of KL, in nats; 0 (with a gradient path) where there is no label.
    """

    def losses(student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        if not target.shape[0]:
            student = student.new_zeros(1, student.shape[1]) + student.sum()
            if teacher is not None:
                teacher = teacher.new_zeros(1, teacher.shape[1]) + teacher.sum()
        scores = head(student)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        if teacher is not None:
            with torch.set_grad_enabled(two_way and torch.is_grad_enabled()):
                teacher_scores = head(teacher)
        if not target.shape[0]:
            nothing = wide.sum() * 0
            taught = teacher_scores.sum().to(wide.dtype) * 0 if teacher is not None and two_way else nothing.detach()
            return nothing, taught.clone()
        ce = functional.cross_entropy(wide, target, reduction="sum")
        if teacher is None:
            return ce, ce.new_zeros(())
        divergence = two_way_divergence if two_way else kl_divergence
        return ce, divergence(teacher_scores, wide, temperature).sum()

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
