"""Qwen VL and Omni models, and models of others that share their tower or their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.tiny import (
    IMAGE,
    QWEN_IDS,
    VIDEO,
    WIDTH,
    Batch,
    Runs,
    TinyFamily,
    patches_of_row,
    qwen_images,
    qwen_text_settings,
    qwen_timed_videos,
    qwen_videos,
    qwen_videos_of_row,
)
from torch import Tensor

RECURRENT = "its linear attention layers carry a state along the sequence"


def tower_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny tower of the Qwen kind."""
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": WIDTH, **changes,
    }  # fmt: skip


def learned_tower_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny Qwen3 tower, which has learned positions."""
    return tower_settings(num_position_embeddings=64, **changes)


def moe_settings(**changes: Any) -> dict[str, Any]:
    """Return what a tiny mixture of experts adds to the settings of a language model."""
    return {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, **changes}


def linear_attention_settings() -> dict[str, Any]:
    """Return what alternating layers of linear and full attention add."""
    return {
        "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "hidden_size": WIDTH,
    }  # fmt: skip
    config = Qwen2VLConfig(vision_config=vision, text_config=qwen_text_settings(), **QWEN_IDS)
    return Qwen2VLForConditionalGeneration(config)


def _qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    vision = learned_tower_settings(deepstack_visual_indexes=[0, 1])
    text = {**qwen_text_settings(), "head_dim": 16, **moe_settings()}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(vision_config=vision, text_config=text, **QWEN_IDS))


def _qwen3_5() -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {**qwen_text_settings(), **linear_attention_settings()}
    text["rope_parameters"] = {**text["rope_parameters"], "partial_rotary_factor": 1.0}
    config = Qwen3_5Config(vision_config=learned_tower_settings(), text_config=text, **QWEN_IDS)
    return Qwen3_5ForConditionalGeneration(config)


def _qwen3_5_moe() -> Any:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    text = {**qwen_text_settings(), **linear_attention_settings(), **moe_settings(shared_expert_intermediate_size=16)}
    text["rope_parameters"] = {**text["rope_parameters"], "partial_rotary_factor": 1.0}
    config = Qwen3_5MoeConfig(vision_config=learned_tower_settings(), text_config=text, **QWEN_IDS)
    return Qwen3_5MoeForConditionalGeneration(config)


def _qwen4_exp() -> Any:
    from transformers import Qwen4ExpConfig, Qwen4ExpForConditionalGeneration

    text = {
        **qwen_text_settings(), **linear_attention_settings(), **moe_settings(shared_expert_intermediate_size=16),
        "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8, "heads_per_ngram": 2, "split_ngram_parts": 2,
    }  # fmt: skip
    text["rope_parameters"] = {**text["rope_parameters"], "partial_rotary_factor": 1.0}
    config = Qwen4ExpConfig(vision_config=learned_tower_settings(), text_config=text, **QWEN_IDS)
    return Qwen4ExpForConditionalGeneration(config)


def few_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images of few patches, for models whose indexer takes its time."""
    return qwen_images(model, images_per_row, generator, ((1, 4, 6), (1, 6, 6), (1, 4, 4)))


def few_videos(model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return videos of few patches."""
    return qwen_timed_videos(model, videos_per_row, generator, ((2, 4, 6), (2, 4, 4)))


OMNI_IDS = {"audio_token_id": 61, "audio_start_token_id": 62, "audio_end_token_id": 63, "user_token_id": 54}


def audio_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny audio encoder."""
    return {
        "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
        "output_dim": WIDTH, "max_source_positions": 16, **changes,
    }  # fmt: skip


def _qwen2_5_omni() -> Any:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(
        vision_config=tower_settings(window_size=16, fullatt_block_indexes=[1]), text_config=qwen_text_settings(),
        audio_config=audio_settings(), image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=61,
        audio_start_token_id=62, audio_end_token_id=63, vision_start_token_id=QWEN_IDS["vision_start_token_id"],
        user_token_id=54,
    )  # fmt: skip
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen3_omni_moe() -> Any:
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    config = Qwen3OmniMoeThinkerConfig(
        vision_config=learned_tower_settings(deepstack_visual_indexes=[0, 1]),
        text_config={**qwen_text_settings(), "head_dim": 16, **moe_settings()},
        audio_config=audio_settings(downsample_hidden_size=8), **QWEN_IDS, **OMNI_IDS,
    )  # fmt: skip
    return Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _omni_videos(*arguments: Any) -> Any:
    visual, runs = qwen_videos(*arguments)
    # With 25 positions per second times are fractions, which Qwen3-Omni keeps and Qwen2.5-Omni cuts off.
    seconds = 0.42 * torch.arange(1, len(visual["video_grid_thw"]) + 1)
    return {**visual, "video_second_per_grid": seconds}, runs


def _omni_videos_of_row(batch: Batch, videos_per_row: Any, row: int) -> Batch:
    first = sum(videos_per_row[:row])
    seconds = batch["video_second_per_grid"][first : first + videos_per_row[row]]
    return {**qwen_videos_of_row(batch, videos_per_row, row), "video_second_per_grid": seconds}


def _no_types(ids: Tensor) -> Batch:
    return {}


def qwen_family(name: str, build: Any, **changes: Any) -> TinyFamily:
    """Return a family with the images and videos of Qwen and one fenced run of placeholders per video frame."""
    shared = {
        "images": qwen_images, "visual_of_row": patches_of_row, "videos": qwen_timed_videos,
        "videos_of_row": qwen_videos_of_row, "mrope": True, "fence": True, **changes,
    }  # fmt: skip
    return TinyFamily(name, build, **shared)


OMNI = {"videos": _omni_videos, "videos_of_row": _omni_videos_of_row, "types": _no_types}

FAMILIES = (
    qwen_family("qwen2_vl", _qwen2_vl, videos=qwen_videos),
    qwen_family("qwen3_vl_moe", _qwen3_vl_moe),
    qwen_family("qwen3_5", _qwen3_5, not_masking=RECURRENT),
    qwen_family("qwen3_5_moe", _qwen3_5_moe, not_masking=RECURRENT),
    qwen_family("qwen4_exp", _qwen4_exp, images=few_images, videos=few_videos, not_masking=RECURRENT),
    qwen_family("qwen2_5_omni_thinker", _qwen2_5_omni, **OMNI),
    qwen_family("qwen3_omni_moe_thinker", _qwen3_omni_moe, **OMNI),
)
