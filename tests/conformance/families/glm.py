"""GLM vision models, whose videos have the placeholder of images."""

from __future__ import annotations

from typing import Any

import torch
from tests.conformance.families.qwen import RECURRENT, few_images, few_videos, qwen_family, tower_settings
from tests.tiny import IMAGE, TILE_END, TILE_START, VIDEO, VIDEO_END, VIDEO_START, Batch, qwen_text_settings
from torch import Tensor

GLM_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": TILE_START,
    "image_end_token_id": TILE_END, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
}  # fmt: skip


def _vision(**changes: Any) -> dict[str, Any]:
    return tower_settings(image_size=32, **changes)


def _text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    return {**qwen_text_settings(), "rope_parameters": rope, **changes}


def _moe() -> dict[str, Any]:
    return {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    }  # fmt: skip


def _glm4v() -> Any:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    return Glm4vForConditionalGeneration(Glm4vConfig(vision_config=_vision(), text_config=_text(), **GLM_IDS))


def _glm4v_moe() -> Any:
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    text = _text(head_dim=16, first_k_dense_replace=1, **_moe())
    return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(vision_config=_vision(), text_config=text, **GLM_IDS))


def _glm46v() -> Any:
    from transformers import Glm46VConfig, Glm46VForConditionalGeneration

    return Glm46VForConditionalGeneration(Glm46VConfig(vision_config=_vision(), text_config=_text(), **GLM_IDS))


def _glmga() -> Any:
    from transformers import Glm46VForConditionalGeneration, GlmgaConfig

    return Glm46VForConditionalGeneration(GlmgaConfig(vision_config=_vision(), text_config=_text(), **GLM_IDS))


def _glm_ocr() -> Any:
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

    config = GlmOcrConfig(vision_config=_vision(), text_config=_text(head_dim=16), **GLM_IDS)
    return GlmOcrForConditionalGeneration(config)


def _glm5_next() -> Any:
    from transformers import Glm5NextConfig, Glm5NextForConditionalGeneration

    text = {
        **qwen_text_settings(), **_moe(), "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "layer_types": ["linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "full"], "index_topk": 8, "index_kpool": 4,
        "index_head_dim": 8, "index_n_heads": 2, "linear_head_dim": 8, "linear_num_heads": 2, "hc_mult": 2,
    }  # fmt: skip
    del text["rope_parameters"]
    vision = _vision(projection_intermediate_size=32)
    return Glm5NextForConditionalGeneration(Glm5NextConfig(vision_config=vision, text_config=text, **GLM_IDS))


def span_types(ids: Tensor) -> Batch:
    """Return what the GLM processors add: placeholders inside a fenced video are 2, others 1."""
    inside = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
    return {"mm_token_type_ids": torch.where(ids == IMAGE, 1 + inside.int(), 0)}


def _family(name: str, build: Any, **changes: Any) -> Any:
    shared = {"video_token": IMAGE, "video_fence": True, "types": span_types, "mixed": False, **changes}
    return qwen_family(name, build, **shared)


FAMILIES = (
    _family("glm4v", _glm4v),
    _family("glm4v_moe", _glm4v_moe),
    _family("glm46v", _glm46v),
    _family("glmga", _glmga),
    _family("glm_ocr", _glm_ocr),
    _family(
        "glm5_next", _glm5_next, images=few_images, videos=few_videos, mrope=False, mixed=True, not_masking=RECURRENT
    ),
)
