"""Cosine similarity between tokens, in float32 whatever came in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.shapes import Bool, Float, Tensor

SMALLEST_NORM = 1e-6
"""Norms below this count as this, so that a zero token has similarity 0 to everything instead of NaN."""

SAME = 1e-6
"""Cosines nearer to 1 than this are 1: float32 cannot tell such tokens apart, and noise must not break ties."""

_BLOCKS = 4
_SYMMETRY_PAYS_FROM = 256


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute matrix products in true float32 inside, whatever autocast and TF32 settings rule outside.

    Cosines of tokens crowd near 1, where bfloat16 steps are 0.004 wide and TF32 steps 0.0005.

    Args:
        device: Where the products run.
    """
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    backend = getattr(backend, "matmul", None)
    before = getattr(backend, "fp32_precision", None)
    # Touched only where it matters: torch refuses its older precision calls once the newer ones were written to.
    lowered = before not in (None, "none", "ieee")
    if lowered:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        if lowered:
            backend.fp32_precision = before


def clean_tokens(
    tokens: Float[Tensor, "image token width"], valid: Bool[Tensor, "image token"] | None
) -> Float[Tensor, "image token width"]:
    """Return the tokens detached, in float32, with zeros in place of unreal ones.

    Args:
        tokens: Tokens of every image.
        valid: Which tokens are real; None means all. Unreal ones may hold anything, NaN included.

    Returns:
        The tokens.
    """
    values = tokens.detach().float()
    return values if valid is None else values.masked_fill(~valid.unsqueeze(-1), 0.0)


def unit_tokens(tokens: Float[Tensor, "image token width"]) -> Float[Tensor, "image token width"]:
    """Scale every token to length 1, in float32; zero tokens stay zero.

    Args:
        tokens: Tokens of every image.

    Returns:
        ``x / max(|x|, 1e-6)``.
    """
    values = tokens.float()
    length: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return values / length.clamp_min(SMALLEST_NORM)


def center_tokens(
    tokens: Float[Tensor, "image token width"], valid: Bool[Tensor, "image token"] | None = None
) -> Float[Tensor, "image token width"]:
    """Subtract the mean over the real tokens of each image, in float32.

    Args:
        tokens: Tokens of every image.
        valid: Which tokens are real; None means all.

    Returns:
        The centred tokens. Unreal ones, and those that equal the mean up to rounding, are zero.
    """
    values = clean_tokens(tokens, valid)
    if valid is None:
        mean = values.mean(dim=1, keepdim=True)
    else:
        mean = values.sum(dim=1, keepdim=True) / valid.sum(dim=1).clamp_min(1)[:, None, None]
    centred = values - mean
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    noise = length <= SAME * torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    centred = centred.masked_fill(noise, 0.0)
    return centred if valid is None else centred.masked_fill(~valid.unsqueeze(-1), 0.0)


def cosine_matrix(
    tokens: Float[Tensor, "image token width"], valid: Bool[Tensor, "image token"] | None = None
) -> Float[Tensor, "image token token"]:
    """Cosine similarity of every two tokens of an image.

    The inner products are taken first and scaled after: token^2 scalings instead of token * width.

    Args:
        tokens: Tokens of every image.
        valid: Which tokens are real; None means all. Rows and columns of unreal ones are zero.

    Returns:
        Similarities in float32, detached.
    """
    values = clean_tokens(tokens, valid)
    with full_float32(values.device):
        product = _inner_products(values)
    scale = torch.linalg.vector_norm(values, dim=-1).clamp_min(SMALLEST_NORM).reciprocal()
    # One factor per pair keeps the matrix symmetric to the last bit, so that two tokens tie on their own distance.
    return product.mul_(scale.unsqueeze(2) * scale.unsqueeze(1))


def snap_ones(similarity: Tensor) -> Tensor:
    """Set cosines that float32 cannot tell from 1 to exactly 1, in place.

    Args:
        similarity: Cosines, any shape.

    Returns:
        The same tensor.
    """
    return similarity.masked_fill_(similarity >= 1 - SAME, 1.0)


def _inner_products(values: Float[Tensor, "image token width"]) -> Float[Tensor, "image token token"]:
    tokens = values.shape[1]
    if values.device.type != "cpu" or tokens < _SYMMETRY_PAYS_FROM:
        return torch.bmm(values, values.mT)
    # Arithmetic is what costs on a CPU: multiply the blocks on and below the diagonal, copy the rest.
    product = values.new_empty(values.shape[0], tokens, tokens)
    size = -(-tokens // _BLOCKS)
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        product[:, start:, start:stop] = torch.bmm(values[:, start:], values[:, start:stop].mT)
        product[:, start:stop, stop:] = product[:, stop:, start:stop].mT
    return product
