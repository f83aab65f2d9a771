"""A tiny bed for the tests of `bench training`: few tokens, every part there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from trimtab.bench.shapes import SHAPES, TrainingShape
from trimtab.dualspeed import DualSpeedConfig
from trimtab.run.bench_arms import TrainingBed
from trimtab.run.bench_model import build_llava
from trimtab.run.bench_rows import Update, make_updates

TINY = replace(
    SHAPES["toy"], layers=2, width=32, mlp=48, heads=2, kv_heads=1, vocab=64, tower_layers=3, tower_width=16,
    tower_mlp=32, tower_heads=2, image_size=28, text_mean=14, micro_batch=5, samples=10, max_length=120,
    pack_tokens=260,
)  # fmt: skip
"""49 visual tokens, 4 of which stay at a keep ratio of 0.1."""


def tiny_bed(updates: int = 1, lengths: list[int] | None = None, **changes: Any) -> TrainingBed:
    """Return a bed with wide random weights, so that a wrong token changes the loss visibly.

    Args:
        updates: How many.
        lengths: Text lengths of the only update, in place of drawn ones.
        changes: Fields of the shape.
    """
    shape: TrainingShape = replace(TINY, **changes)
    model = build_llava(shape)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one in model.parameters():
            if one.dim() > 1:
                fan_in = one[0].numel()
                one.copy_(torch.randn(one.shape, generator=generator) * fan_in**-0.5)
    made = make_updates(shape, updates, slow_ratio=0.1, seed=0)
    if lengths is not None:
        made = [with_lengths(made[0], lengths)]
    return TrainingBed(model, shape, made, DualSpeedConfig(keep_ratio=0.1, slow_ratio=0.1))


def with_lengths(update: Update, lengths: list[int]) -> Update:
    """Return an update whose texts have these lengths."""
    generator = torch.Generator().manual_seed(5)
    words = [torch.randint(3, 60, (length,), generator=generator) for length in lengths]
    return replace(update, text=lengths, words=words, labels=[max(1, length // 2) for length in lengths])
