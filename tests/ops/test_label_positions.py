"""With the number of labels known to the host, the same places are found without asking the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.ops.label_head import IGNORED, states_at_labels, supervised_positions


def drawn(rows: int, seq: int, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 50, (rows, seq), generator=generator)
    return labels.masked_fill(torch.rand(rows, seq, generator=generator) > share, IGNORED)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("rows", "seq"), [(1, 1), (1, 9), (4, 7), (3, 300)])
def test_a_known_count_gives_the_same_places_in_the_same_order(rows: int, seq: int, share: float) -> None:
    for seed in range(5):
        labels = drawn(rows, seq, share, seed)
        expected = [(r, s - 1) for r in range(rows) for s in range(1, seq) if labels[r, s] != IGNORED]
        plain = supervised_positions(labels)
        known = supervised_positions(labels, len(expected))
        for row, place in (plain, known):
            assert list(zip(row.tolist(), place.tolist(), strict=True)) == expected
            assert row.dtype == place.dtype == torch.int64


def test_states_and_their_gradients_are_the_same() -> None:
    labels = drawn(3, 11, 0.4, 0)
    states = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain, targets = states_at_labels(states, labels)
    known, same = states_at_labels(states, labels, targets.shape[0])
    assert torch.equal(plain, known)
    assert torch.equal(targets, same)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    one, other = (torch.autograd.grad((found * weight).sum(), states)[0] for found in (plain, known))
    assert torch.equal(one, other)


def test_a_wrong_count_does_what_the_docstring_says() -> None:
    labels = drawn(2, 6, 0.5, 3)
    states = torch.zeros(2, 6, 1)
    targets = states_at_labels(states, labels)[1]
    count = targets.shape[0]
    assert torch.equal(states_at_labels(states, labels, count - 1)[1], targets[:-1])
    more = states_at_labels(states, labels, count + 1)[1]
    assert torch.equal(more[:-1], targets)
    assert more[-1] == IGNORED
