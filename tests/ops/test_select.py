"""Gathering, scattering, masks and ties."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.ops import select


def test_scatter_undoes_gather_and_gradients_flow():
    tokens = torch.randn(2, 6, 3, requires_grad=True)
    index = torch.tensor([[0, 4], [2, 5]])
    kept = select.gather_tokens(tokens, index)
    assert torch.equal(kept[1, 1], tokens[1, 5])
    full = select.scatter_tokens(kept, index, 6)
    mask = select.mask_of_index(index, 6)
    assert torch.equal(full, tokens * mask[..., None])
    full.sum().backward()
    assert torch.equal(tokens.grad, mask[..., None].expand(2, 6, 3).float())


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_mask_and_index_are_inverse(flags, data):
    num_keep = data.draw(st.integers(1, len(flags)))
    mask = torch.tensor([flags])
    index, valid = select.index_of_mask(mask, num_keep)
    wanted = [place for place, flag in enumerate(flags) if flag][:num_keep]
    assert index[valid].tolist() == wanted
    assert valid[0].tolist() == [True] * len(wanted) + [False] * (num_keep - len(wanted))
    back = select.mask_of_index(index, len(flags), valid)
    assert torch.nonzero(back[0]).flatten().tolist() == wanted


def test_ties_go_to_the_lowest_index():
    score = torch.zeros(2, 1000)
    score[1, 500:] = 1
    assert select.keep_best(score, 3)[0].tolist() == [[0, 1, 2], [500, 501, 502]]
    blocked = torch.zeros(2, 1000, dtype=torch.bool)
    blocked[0, :4] = True
    assert select.pick_best(score, blocked).tolist() == [[4], [500]]


def test_unreal_tokens_come_last():
    valid = torch.tensor([[True, False, True, False]])
    assert select.rank_tokens(torch.tensor([[1.0, 9.0, 2.0, 8.0]]), valid).tolist() == [[2, 0, 1, 3]]
    index, counts = select.keep_best(torch.tensor([[1.0, 9.0, 2.0, 8.0]]), 3, valid)
    assert index.tolist() == [[0, 2, 3]]
    assert counts.tolist() == [[True, True, False]]


def test_gather_rows():
    matrix = torch.randn(3, 4, 5)
    pick = torch.tensor([[2], [0], [3]])
    assert torch.equal(select.gather_rows(matrix, pick), torch.stack([matrix[0, 2], matrix[1, 0], matrix[2, 3]]))
