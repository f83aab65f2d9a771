"""The optimizer that the parts of a small LLaVA are fitted with before the arms start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def make_optimizer(parameters: Sequence[torch.Tensor], rate: float, steps: int, **options: Any) -> tuple[Any, Any]:
    """Return AdamW and the schedule of its learning rate.

    Args:
        parameters: What to train.
        rate: Peak learning rate.
        steps: Updates in all; see `warm_cosine`.
        options: More settings of ``torch.optim.AdamW``.
    """
    import torch

    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01, **options)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))


def update(loss: torch.Tensor, parameters: Sequence[torch.Tensor], optimizer: Any, schedule: Any) -> None:
    """Take one step down the gradient of a loss; the norm over `parameters` is clipped to 1."""
    import torch

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def warm_cosine(step: int, steps: int) -> float:
    """Return the factor on the learning rate: rising over the first tenth of the steps, then a cosine down to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))
