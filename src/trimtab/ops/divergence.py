"""Divergences between the next-token distributions of a teacher and a student."""

from __future__ import annotations

import torch

from trimtab.shapes import Float, Tensor


def kl_divergence(
    teacher_logits: Float[Tensor, "label vocab"], student_logits: Float[Tensor, "label vocab"], temperature: float = 1.0
) -> Float[Tensor, "label"]:
    """Kullback-Leibler divergence KL(teacher || student) at each label, in nats.

    Both sides are divided by the temperature before the softmax. The factor ``temperature**2`` that keeps
    gradients comparable (Hinton et al., arXiv 1503.02531) is left to the caller.

    Args:
        teacher_logits: Scores of the teacher; a constant where it carries no gradient.
        student_logits: Scores of the student.
        temperature: Above 0.

    Returns:
        One value per label, float32 or wider, at least 0 up to rounding.
    """
    teacher = torch.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=-1)
    student = torch.log_softmax(_at_least_float32(student_logits) / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def two_way_divergence(
    teacher_logits: Float[Tensor, "label vocab"], student_logits: Float[Tensor, "label vocab"], temperature: float = 1.0
) -> Float[Tensor, "label"]:
    """KL(teacher || student) with the teacher as a constant plus KL(student || teacher) with the student as one.

    Each side is so drawn to what the other says (deep mutual learning, arXiv 1706.00384). The value is the symmetric
    Jeffreys divergence, the gradients are not its: neither side is moved for being the target.

    Args:
        teacher_logits: Scores of the one side.
        student_logits: Scores of the other.
        temperature: As in `kl_divergence`; its square is left to the caller here too.

    Returns:
        One value per label, float32 or wider, at least 0 up to rounding.
    """
    teacher = torch.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=-1)
    student = torch.log_softmax(_at_least_float32(student_logits) / temperature, dim=-1)
    to_student = teacher.detach().exp() * (teacher.detach() - student)
    to_teacher = student.detach().exp() * (student.detach() - teacher)
    return (to_student + to_teacher).sum(-1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
