"""Fit the vision tower of a small LLaVA on what lies under every patch, then freeze it.

A tower from scratch sees nothing, and through a language model it would learn to see far too slowly for a run of
minutes. Object lists say for every patch what it shows (for example digit and colour); linear heads on the tower's
output learn that in about a minute, and are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import setting_error
from trimtab.quickstart.fitting import make_optimizer, update

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration

Labels = NDArray[np.int64]
PatchLabels = Callable[[Mapping[str, Any]], Labels]


@dataclass(frozen=True, kw_only=True)
class TowerFit:
    """How the vision tower is fitted.

    Attributes:
        steps: Number of updates, at least 1.
        batch_size: Images per update, at least 1.
        learning_rate: Peak learning rate (AdamW; linear warm-up over the first tenth, then cosine to 0), above 0.
        seed: Seed of the heads and of the order of the images.
    """

    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field; see the class for the ranges."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise setting_error("TowerFit", name, "at least 1", getattr(self, name))
        if not self.learning_rate > 0:
            raise setting_error("TowerFit", "learning_rate", "above 0", self.learning_rate)


def patch_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Run the vision tower and return the states that the projector will see, [image, token, channel]."""
    states = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    seen: torch.Tensor = states[model.config.vision_feature_layer][:, 1:]
    return seen


def fit_tower(
    model: LlavaForConditionalGeneration,
    pixel_values: torch.Tensor,
    labels: Labels | torch.Tensor,
    settings: TowerFit | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Fit the vision tower on patch labels and freeze it.

    Args:
        model: A model of `build_model`; only its vision tower changes.
        pixel_values: Preprocessed images, [image, 3, height, width].
        labels: Classes of every patch, [image, token, kind], raster order; class 0 of a kind means background.
        settings: How to fit; None for the defaults.
        on_step: Called after every update with its number from 1 and its loss, for example to show progress.

    Returns:
        The loss of every update. The tower's parameters no longer require gradients.

    Raises:
        SettingError: The labels do not fit to the images or to the tower's patches.
    """
    import torch

    settings = settings or TowerFit()
    target = torch.as_tensor(labels)
    tower = model.model.vision_tower
    tokens = tower.embeddings.num_patches
    if target.dim() != 3 or target.shape[:2] != (len(pixel_values), tokens):
        allowed = f"of shape [{len(pixel_values)} images, {tokens} patches, kinds]"
        raise setting_error("fit_tower", "labels", allowed, tuple(target.shape))
    generator = torch.Generator().manual_seed(settings.seed)
    kinds = [int(target[..., kind].max()) + 1 for kind in range(target.shape[-1])]
    head = _linear_head(tower.config.hidden_size, sum(kinds), generator)
    tower.requires_grad_(True)
    trained = [*tower.parameters(), *head.parameters()]
    optimizer, schedule = make_optimizer(trained, settings.learning_rate, settings.steps)
    losses = []
    for step in range(settings.steps):
        chosen = torch.randint(len(target), (settings.batch_size,), generator=generator)
        logits = head(patch_features(model, pixel_values[chosen]))
        loss = _patch_loss(logits.split(kinds, dim=-1), target[chosen])
        update(loss, [*tower.parameters()], optimizer, schedule)
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    tower.requires_grad_(False)
    return losses


def _linear_head(width: int, classes: int, generator: torch.Generator) -> torch.nn.Sequential:
    import torch

    with torch.random.fork_rng(devices=[]):
        linear = torch.nn.Linear(width, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * width**-0.5)
        linear.bias.zero_()
    return torch.nn.Sequential(torch.nn.LayerNorm(width), linear)


def _patch_loss(logits: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over kinds; patches with an object and patches without weigh the same in sum."""
    import torch
    from torch.nn import functional

    shown = labels[..., 0] > 0
    weight = shown / shown.sum().clamp(min=1) + ~shown / (~shown).sum().clamp(min=1)
    per_kind = [
        functional.cross_entropy(one.flatten(0, 1), labels[..., kind].flatten(), reduction="none")
        for kind, one in enumerate(logits)
    ]
    return (torch.stack(per_kind).mean(0) * weight.flatten()).sum() / 2
