"""Cosines in float32."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops import similarity


@pytest.mark.parametrize("tokens", [1, 7, 255, 256, 301])
def test_equals_the_definition(tokens):
    x = torch.randn(2, tokens, 20) * torch.rand(2, tokens, 1) * 50
    wanted = torch.nn.functional.cosine_similarity(x.double()[:, :, None], x.double()[:, None], dim=-1)
    torch.testing.assert_close(similarity.cosine_matrix(x).double(), wanted, atol=2e-6, rtol=0)


def test_zero_and_unreal_tokens_are_zero():
    x = torch.randn(1, 4, 3)
    x[0, 1] = 0
    x[0, 2] = float("nan")
    valid = torch.tensor([[True, True, False, True]])
    cosines = similarity.cosine_matrix(x, valid)
    assert (cosines[0, 1] == 0).all()
    assert (cosines[0, :, 2] == 0).all()
    assert cosines.isfinite().all()
    assert (similarity.unit_tokens(torch.zeros(1, 2, 3)) == 0).all()


def test_collinear_tokens_snap_to_one():
    x = torch.randn(1, 1, 64) * torch.tensor([1.0, 3.0, 0.1, 7.7]).view(1, 4, 1)
    assert (similarity.snap_ones(similarity.cosine_matrix(x)) == 1).all()
    assert similarity.snap_ones(torch.tensor([1 - 1e-4])) < 1


def test_lowered_precision_outside_does_not_reach_in():
    x = torch.randn(2, 300, 64)
    wanted = similarity.cosine_matrix(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(similarity.cosine_matrix(x), wanted)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_centring_ignores_unreal_tokens_and_drops_rounding():
    x = torch.randn(1, 5, 3)
    valid = torch.tensor([[True, True, True, False, False]])
    centred = similarity.center_tokens(x, valid)
    torch.testing.assert_close(centred[:, :3], x[:, :3] - x[:, :3].mean(1, keepdim=True))
    assert (centred[:, 3:] == 0).all()
    assert (similarity.center_tokens(torch.full((1, 7, 3), 123.7)) == 0).all()


def test_symmetric_to_the_last_bit():
    cosines = similarity.cosine_matrix(torch.randn(2, 300, 20) * torch.rand(2, 300, 1))
    assert torch.equal(cosines, cosines.mT)
