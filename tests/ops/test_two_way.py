"""Two-way distillation: either side learns from the other, and neither moves for being the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.ops.divergence import kl_divergence, two_way_divergence
from trimtab.ops.label_head import label_losses

LABELS, WIDTH, VOCAB = 7, 5, 11
CLOSE = {"atol": 1e-12, "rtol": 1e-10}
"""float64 sums of a few dozen terms of order one, in another order."""


def sides() -> tuple[Tensor, Tensor, Tensor, torch.nn.Linear]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(LABELS, WIDTH, generator=generator).double() * 2 for _ in range(2))
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, WIDTH, generator=generator))
    labels = torch.randint(VOCAB, (LABELS,), generator=generator)
    return student.requires_grad_(), teacher.requires_grad_(), labels, head


def gradients_of(loss: Callable[[Tensor, Tensor, Tensor, Any], Tensor]) -> tuple[Tensor, ...]:
    student, teacher, labels, head = sides()
    value = loss(student, teacher, labels, head)
    value.backward()
    return value.detach(), student.grad, teacher.grad, head.weight.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("chunk", "least"), [(100, 1), (3, 1), (1, 1), (3, 5)])
def test_values_and_gradients_are_those_of_the_formula_on_full_logits(
    temperature: float, chunk: int, least: int
) -> None:
    weight = 0.7

    def ours(student: Tensor, teacher: Tensor, labels: Tensor, head: Any) -> Tensor:
        ce, kl = label_losses(student, teacher, labels, head, temperature, chunk, least, two_way=True)
        return ce + weight * temperature**2 * kl

    def formula(student: Tensor, teacher: Tensor, labels: Tensor, head: Any) -> Tensor:
        s, t = (torch.softmax(head(one) / temperature, -1) for one in (student, teacher))
        taught = (t.detach() * (t.detach() / s).log()).sum()
        teaching = (s.detach() * (s.detach() / t).log()).sum()
        ce = -torch.softmax(head(student), -1)[torch.arange(LABELS), labels].log().sum()
        return ce + weight * temperature**2 * (taught + teaching)

    for found, expected in zip(gradients_of(ours), gradients_of(formula), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_one_way_is_as_before_and_moves_no_teacher() -> None:
    def one_way(student: Tensor, teacher: Tensor, labels: Tensor, head: Any) -> Tensor:
        ce, kl = label_losses(student, teacher, labels, head)
        return ce + kl

    def detached(student: Tensor, teacher: Tensor, labels: Tensor, head: Any) -> Tensor:
        scores = head(student)
        with torch.no_grad():
            target = head(teacher)
        ce = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
        return ce + kl_divergence(target, scores).sum()

    found, expected = gradients_of(one_way), gradients_of(detached)
    assert found[2] is expected[2] is None
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_both_ways_are_zero_where_both_say_the_same() -> None:
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = two_way_divergence(scores, scores.detach().clone())
    assert torch.equal(value, torch.zeros(4))
    value.sum().backward()
    # The gradient is softmax minus softmax, each rounded to 1e-7.
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), atol=1e-6, rtol=0)


def test_the_value_is_the_sum_of_both_divergences_in_float32_or_wider() -> None:
    one, other = (torch.randn(6, 9, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    both = kl_divergence(one, other, 2.0) + kl_divergence(other, one, 2.0)
    torch.testing.assert_close(two_way_divergence(one, other, 2.0), both)
    narrow = two_way_divergence(one.bfloat16(), other.bfloat16(), 2.0)
    assert narrow.dtype == torch.float32
    # bfloat16 keeps 8 bits of scores of order one, each of which moves the divergence by as much at most.
    torch.testing.assert_close(narrow, both, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("labels", [0, 3, 7])
def test_the_head_is_called_as_often_and_everything_has_a_gradient(labels: int) -> None:
    head = torch.nn.Linear(4, 5)
    calls = []
    head.register_forward_hook(lambda module, args, output: calls.append(output.requires_grad))
    student, teacher = (torch.randn(labels, 4, requires_grad=True) for _ in range(2))
    ce, kl = label_losses(student, teacher, torch.arange(labels) % 5, head, chunk=3, least_chunks=4, two_way=True)
    assert calls == [True] * 8
    ce.backward(retain_graph=True)
    kl.backward()
    for one in (student.grad, teacher.grad, head.weight.grad):
        assert one is not None, "also where nothing is supervised"
        assert bool(one.any()) == (labels > 0)


def test_without_gradients_nothing_is_kept_for_them() -> None:
    calls: list[bool] = []
    student, teacher, labels, head = sides()
    head.register_forward_hook(lambda module, args, output: calls.append(output.requires_grad))
    with torch.no_grad():
        ce, kl = label_losses(student, teacher, labels, head, two_way=True)
    assert calls == [False, False]
    assert not ce.requires_grad
    assert not kl.requires_grad
