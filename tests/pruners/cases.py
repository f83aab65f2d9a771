"""Inputs that pruner tests share."""

from __future__ import annotations

import torch

from trimtab.pruners import PrunerInput

KINDS = ("random", "duplicated", "collinear", "zero", "constant")


def tokens_of(kind: str, images: int, tokens: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, tokens, width, generator=generator)
    if kind == "duplicated":
        x = x[:, torch.randint(0, tokens // 3, (tokens,), generator=generator)]
    elif kind == "collinear":
        x = x[:, torch.arange(tokens) % (tokens // 2)] * (1 + torch.arange(tokens) // (tokens // 2))[:, None]
    elif kind == "zero":
        x[:, ::3] = 0
    elif kind == "constant":
        x = torch.full_like(x, 0.7)
    return x


def make_inputs(kind="random", images=3, tokens=24, width=16, seed=0, some_invalid=False) -> PrunerInput:
    generator = torch.Generator().manual_seed(seed + 1)
    attention = torch.rand(images, tokens, generator=generator).softmax(dim=1)
    valid = None
    if some_invalid:
        valid = torch.rand(images, tokens, generator=generator) < 0.8
        valid[0] = True
    return PrunerInput(
        features=tokens_of(kind, images, tokens, width, seed),
        valid=valid,
        grid=(4, tokens // 4) if tokens % 4 == 0 else None,
        cls_attention=attention if kind != "constant" else torch.full_like(attention, 1 / tokens),
        hidden=tokens_of(kind, images, tokens, width + 4, seed + 2),
        keys=tokens_of(kind, images, tokens, 8, seed + 3),
        text=torch.randn(images, 5, width, generator=generator),
        draw=(seed, 3, 7),
    )
