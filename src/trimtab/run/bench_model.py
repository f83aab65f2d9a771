"""A LLaVA of a given shape with random weights, for `bench training`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.bench.shapes import TrainingShape
from trimtab.errors import setting_error


def build_llava(
    shape: TrainingShape,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
) -> Any:
    """Return a `LlavaForConditionalGeneration` with random weights, in training mode.

    Args:
        shape: Its shape. All parts are trained, the vision tower only where the shape says so.
        device: Where it is built.
        dtype: Type of its weights.
        attention: ``attn_implementation`` of transformers.
        seed: Of the weights.

    Raises:
        SettingError: transformers does not know the attention, or its package is not installed.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width, intermediate_size=shape.tower_mlp, num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads, image_size=shape.image_size, patch_size=shape.patch_size,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=max(4096, shape.max_length), tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=shape.vocab - 1, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            model = LlavaForConditionalGeneration(config).train()
    except (ImportError, ValueError) as error:
        if attention in ("sdpa", "eager"):
            raise
        raise setting_error(
            "bench training", "attention", "one that transformers has and that is installed here, such as sdpa",
            attention, f"transformers says: {error}",
        ) from error  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    model.model.vision_tower.requires_grad_(shape.tower_trained)
    return model


def set_recompute(model: nn.Module, on: bool) -> None:
    """Switch the activation checkpointing of a model on or off, in all its parts."""
    owner: Any = model
    # Its name since transformers 5.23, and the one before.
    if on:
        enable = getattr(owner, "activation_checkpointing_enable", None) or owner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        disable = getattr(owner, "activation_checkpointing_disable", None) or owner.gradient_checkpointing_disable
        disable()
