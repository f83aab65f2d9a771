"""What the tests of tokens that leave inside the language model share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.dualspeed.common import ROWS
from tests.tiny import FAMILIES, IMAGE, Batch, llama_settings, tiny_llava
from torch import Tensor

from trimtab.anatomy.drop_inside import Stage
from trimtab.anatomy.drop_stages import fastv_stages, pyramid_stages, vtw_stages

ALONE: dict[str, Any] = {"pruner": "keep_all", "isolator_tokens": 0}
"""Tokens leave inside only."""
AFTER: dict[str, Any] = {"keep_ratio": 0.3, "isolator_tokens": 2}
"""Tokens leave before the language model and inside it."""
WAYS: dict[str, tuple[dict[str, Any], Callable[[], tuple[Stage, ...]]]] = {
    "vtw": ({"layer": 2}, lambda: vtw_stages(2)),
    "fastv": ({"layer": 1, "keep_ratio": 0.25}, lambda: fastv_stages(1, 0.25)),
    "pyramid_drop": ({"layers": [1, 3], "keep_ratios": [0.5, 0.2]}, lambda: pyramid_stages(4, [1, 3], [0.5, 0.2])),
}
DEPTH = 4


def deep_llava() -> Any:
    """Return a tiny LLaVA of four layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = tiny_llava().config
    text = LlamaConfig(**llama_settings(num_hidden_layers=DEPTH))
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small.vision_config.to_dict()), text_config=text, image_token_index=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    model.train()(**batch_of())  # transformers puts hooks of its own on at the first call
    return model


def batch_of(images: tuple[int, ...] = ROWS, **changes: Any) -> Batch:
    return FAMILIES["llava"].make_batch(None, images, **changes)


def settings(way: str, before: dict[str, Any] = ALONE, **changes: Any) -> dict[str, Any]:
    return {"inside": way, "inside_options": WAYS[way][0], **before, **changes}


def queries_by_hand(labels: Tensor) -> Tensor:
    """Return the places just before each answer; the last place of a row without any."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    for row, values in enumerate(labels.tolist()):
        for place in range(1, len(values)):
            if values[place] != -100 and values[place - 1] == -100:
                found[row, place - 1] = True
    return found
