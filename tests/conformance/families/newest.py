"""Kimi K2.5, MiniMax M3, Muse and Inkling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.conformance.families.gemma import AUDIO
from tests.conformance.families.others import CONVOLUTION
from tests.tiny import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    VIDEO,
    VOCAB,
    WIDTH,
    Batch,
    Runs,
    TinyFamily,
    llama_settings,
    patches_of_row,
    pixels,
    qwen_images,
    qwen_videos,
    qwen_videos_of_row,
)

EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def _vision(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        **changes,
    }  # fmt: skip


def _kimi_k25() -> Any:
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    text = llama_settings(
        model_type="deepseek_v3", num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
        num_mtp_layers=0, **EXPERTS,
    )  # fmt: skip
    vision = _vision(pos_emb_height=8, pos_emb_width=8)
    config = Kimi_K25Config(vision_config=vision, text_config=text, projection_hidden_size=32, **IDS)
    return Kimi_K25ForConditionalGeneration(config)


def _kimi_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    visual, runs = qwen_images(model, images_per_row, generator)
    return {**visual, "pixel_values": visual["pixel_values"][:, :48].view(-1, 3, 4, 4)}, runs


def minimax_m3_vl(**changes: Any) -> Any:
    """Return a MiniMax M3 with one sparse layer; keywords change its language model."""
    from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig

    text = {
        **llama_settings(), "model_type": "minimax_m3_vl_text", "head_dim": 8, "num_experts_per_tok": 2,
        "num_local_experts": 4, "dense_intermediate_size": 48, "shared_intermediate_size": 24, "rotary_dim": 4,
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2, "index_head_dim": 8, **changes,
    }  # fmt: skip
    config = MiniMaxM3VLConfig(
        vision_config=_vision(image_size=48), text_config=text, image_token_index=IMAGE, video_token_index=VIDEO,
        projector_hidden_size=WIDTH,
    )  # fmt: skip
    return MiniMaxM3SparseForConditionalGeneration(config)


def _muse_settings(**text: Any) -> dict[str, Any]:
    vision = _vision(
        pos_emb_height=8,
        pos_emb_width=8,
        max_position_embeddings=64,
        layer_types=["window_attention", "full_attention"],
    )
    settings = {
        **llama_settings(), "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 256, "final_logit_softcapping": 3.0, "output_multiplier": 0.5,
    }  # fmt: skip
    del settings["model_type"]
    return {
        "vision_config": vision, "text_config": {**settings, **text}, "out_hidden_size": 4 * 32,
        "projector_hidden_size": 32, **IDS,
    }  # fmt: skip


def _muse_glimmer() -> Any:
    from transformers import MuseGlimmerConfig, MuseGlimmerForConditionalGeneration

    return MuseGlimmerForConditionalGeneration(MuseGlimmerConfig(**_muse_settings()))


def _muse_spark() -> Any:
    from transformers import MuseSparkConfig, MuseSparkForConditionalGeneration

    settings = _muse_settings(num_local_experts=4, moe_hidden_size=16, **EXPERTS)
    audio = {
        "patch_sizes": [2], "hidden_sizes": [8], "depths": [1], "num_hidden_layers": 1, "out_hidden_size": WIDTH,
    }  # fmt: skip
    return MuseSparkForConditionalGeneration(MuseSparkConfig(**settings, audio_config=audio, audio_token_id=AUDIO))


def _inkling_text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "unpadded_vocab_size": VOCAB - 1, "hidden_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1, "swa_head_dim": 16, "sliding_window_size": 256, "d_rel": 4, "rel_extent": 256,
        "layer_types": ["hybrid_sliding", "hybrid"], "max_position_embeddings": 512, "n_routed_experts": 4,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **EXPERTS, **changes,
    }  # fmt: skip


def _inkling2() -> Any:
    from transformers import Inkling2Config, Inkling2ForConditionalGeneration

    vision = _vision(posemb_grid_size=8, projection_hidden_dim=32, text_hidden_size=WIDTH)
    text = _inkling_text(final_logit_softcapping=3.0, n_layers_per_attn_res_block=1)
    return Inkling2ForConditionalGeneration(
        Inkling2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


TOKEN_GRIDS = ((1, 4, 6), (1, 3, 4), (1, 5, 5))
"""Tokens of the Inkling images, in turn: frames, rows, columns."""


def _token_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images with the pixels of one token after another."""
    grids = torch.tensor([TOKEN_GRIDS[number % len(TOKEN_GRIDS)] for number in range(sum(images_per_row))])
    lengths = iter(grids.prod(-1).tolist())
    visual = {"pixel_values": pixels((int(grids.prod(-1).sum()), 8, 8, 3), generator), "image_grid_thw": grids}
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _inkling() -> Any:
    from transformers import InklingConfig, InklingForConditionalGeneration

    vision = {"patch_size": 4, "temporal_patch_size": 2, "hidden_size": 32, "num_hidden_layers": 2}
    text = _inkling_text(intermediate_size=48, logits_mup_width_multiplier=2.0, n_shared_experts=1)
    audio = {"n_mel_bins": 4, "mel_vocab_size": 4}
    config = InklingConfig(
        vision_config=vision, text_config=text, audio_config=audio, image_token_id=IMAGE, audio_token_id=AUDIO
    )
    return InklingForConditionalGeneration(config)


def _loose_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return the patches of all images, which nothing but the placeholders counts."""
    counts = [(24, 12, 25)[number % 3] for number in range(sum(images_per_row))]
    lengths = iter(counts)
    visual = {"pixel_values": pixels((sum(counts), 2, 4, 4, 3), generator)}
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _loose_of_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    counts = (batch["input_ids"] == IMAGE).sum(1)
    first = int(counts[:row].sum())
    return {"pixel_values": batch["pixel_values"][first : first + int(counts[row])]}


def _grid_family(name: str, build: Any, **more: Any) -> TinyFamily:
    return TinyFamily(name, build, qwen_images, patches_of_row, fence=True, **more)


VIDEOS = {"videos": qwen_videos, "videos_of_row": qwen_videos_of_row}

FAMILIES = (
    TinyFamily("kimi_k25", _kimi_k25, _kimi_images, patches_of_row, fence=True),
    _grid_family("minimax_m3_vl", minimax_m3_vl, **VIDEOS),
    _grid_family("muse_glimmer", _muse_glimmer, **VIDEOS),
    _grid_family("muse_spark", _muse_spark, **VIDEOS),
    TinyFamily("inkling2", _inkling2, _token_images, patches_of_row, fence=True, not_masking=CONVOLUTION),
    TinyFamily("inkling_mm_model", _inkling, _loose_images, _loose_of_row, fence=True, not_masking=CONVOLUTION),
)  # fmt: skip
