"""Models of several makers whose images are grids of patches of any shape, most of them relatives of Qwen-VL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tests.conformance.families.qwen import learned_tower_settings, qwen_family, tower_settings
from tests.tiny import (
    IMAGE,
    QWEN_IDS,
    TILE_END,
    TILE_START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    WIDTH,
    Batch,
    Runs,
    TinyFamily,
    llama_settings,
    multimodal_types,
    patches_of_row,
    qwen_images,
    qwen_text_settings,
    qwen_timed_videos,
    qwen_videos,
    qwen_videos_of_row,
)
from torch import Tensor

PATCH = 3 * 4 * 4


def _flat_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images whose patches have one moment only."""
    visual, runs = qwen_images(model, images_per_row, generator)
    return {**visual, "pixel_values": visual["pixel_values"][:, :PATCH]}, runs


def _flat_videos(model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    visual, runs = qwen_timed_videos(model, videos_per_row, generator)
    return {**visual, "pixel_values_videos": visual["pixel_values_videos"][:, :PATCH]}, runs


FLAT = {"images": _flat_images, "videos": _flat_videos}
NO_VIDEOS = {"videos": None, "videos_of_row": None}


def _ernie() -> Any:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_merge_size": 2,
    }  # fmt: skip
    text = {
        **qwen_text_settings(), "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
        "moe_intermediate_size": [16, 8], "mlp_layer_types": ["dense", "sparse"],
    }  # fmt: skip
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 2, 4]}
    ids = {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": TILE_START,
        "image_end_token_id": TILE_END, "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
    }  # fmt: skip
    return Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(vision_config=vision, text_config=text, **ids))


def _ernie_videos(model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return videos of which the encoder makes one frame of two."""
    visual, _ = qwen_videos(model, videos_per_row, generator, ((4, 4, 6), (6, 4, 4)))
    lengths = iter(math.prod(grid) // 8 for grid in visual["video_grid_thw"].tolist())
    visual["pixel_values_videos"] = visual["pixel_values_videos"][:, :PATCH]
    return visual, [[[next(lengths)] for _ in range(count)] for count in videos_per_row]


def _ernie_types(ids: Tensor) -> Batch:
    fences = (ids == TILE_START) | (ids == TILE_END)
    types = multimodal_types(ids)
    return {"mm_token_type_ids": types, "moe_mm_token_type_ids": types + fences.int()}


def _paddle() -> Any:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 4, "spatial_merge_size": 2,
    }  # fmt: skip
    config = PaddleOCRVLConfig(vision_config=vision, text_config={**qwen_text_settings(), "head_dim": 16}, **QWEN_IDS)
    return PaddleOCRVLForConditionalGeneration(config)


def _paddle_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    visual, runs = _flat_images(model, images_per_row, generator)
    return {**visual, "pixel_values": visual["pixel_values"].unflatten(1, (3, 4, 4))}, runs


def _hunyuan() -> Any:
    from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration

    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "max_image_size": 48, "out_hidden_size": WIDTH,
    }  # fmt: skip
    text = {**qwen_text_settings(), "head_dim": 16}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 2, 2, 2]}
    config = HunYuanVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, im_start_id=TILE_START, im_end_id=TILE_END,
        im_newline_id=VIDEO,
    )  # fmt: skip
    return HunYuanVLForConditionalGeneration(config)


def _hunyuan_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images with a token at the end of every line, one before all and one behind all."""
    visual, _ = _flat_images(model, images_per_row, generator)
    lengths = iter(rows // 2 * (columns // 2 + 1) + 2 for _, rows, columns in visual["image_grid_thw"].tolist())
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _cohere() -> Any:
    from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

    text = {
        **qwen_text_settings(), "logit_scale": 1.5, "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    rope = text["rope_parameters"]
    text["rope_parameters"] = {"sliding_attention": rope, "full_attention": rope}
    vision = learned_tower_settings(deepstack_visual_indexes=[0, 1])
    return CohereCompassForConditionalGeneration(
        CohereCompassConfig(vision_config=vision, text_config=text, **QWEN_IDS)
    )


def _cosmos_edge() -> Any:
    from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "num_patches": 64, "spatial_merge_size": 2,
    }  # fmt: skip
    text = {**qwen_text_settings(), "head_dim": 16}
    config = Cosmos3EdgeConfig(vision_config=vision, text_config=text, projector_hidden_size=32, **QWEN_IDS)
    return Cosmos3EdgeForConditionalGeneration(config)


def _cosmos_omni() -> Any:
    from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration

    vision = learned_tower_settings(deepstack_visual_indexes=[0, 1])
    text = {**qwen_text_settings(), "head_dim": 16}
    return Cosmos3OmniForConditionalGeneration(Cosmos3OmniConfig(vision_config=vision, text_config=text, **QWEN_IDS))


def _exaone() -> Any:
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration

    vision = tower_settings(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=1)
    text = {
        **llama_settings(model_type="exaone4"), "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    config = Exaone4_5_Config(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)
    return Exaone4_5_ForConditionalGeneration(config)


def _hyperclova() -> Any:
    from transformers import HyperCLOVAXVisionV2Config, HyperCLOVAXVisionV2ForConditionalGeneration

    vision = tower_settings(window_size=16, fullatt_block_indexes=[1], model_type="qwen2_5_vl_vision")
    text = llama_settings(model_type="hyperclovax", logits_scaling=0.5, embedding_multiplier=2.0)
    config = HyperCLOVAXVisionV2Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return HyperCLOVAXVisionV2ForConditionalGeneration(config)


def _video_llama() -> Any:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    }  # fmt: skip
    text = llama_settings(model_type="qwen2")
    config = VideoLlama3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)
    return VideoLlama3ForConditionalGeneration(config)


def _video_llama_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images that are merged by one or by two, in turn."""
    visual, _ = _flat_images(model, images_per_row, generator)
    grids = visual["image_grid_thw"]
    merges = torch.tensor([2 - number % 2 for number in range(len(grids))])
    lengths = iter((grids.prod(-1) // merges**2).tolist())
    runs = [[[next(lengths)] for _ in range(count)] for count in images_per_row]
    return {**visual, "image_merge_sizes": merges}, runs


def _video_llama_videos(model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return videos of which the processor keeps some tokens of every frame, as many as it likes."""
    visual, _ = _flat_videos(model, videos_per_row, generator)
    kept = []
    for frames, rows, columns in visual["video_grid_thw"].tolist():
        mask = torch.rand(frames, rows * columns // 4, generator=generator) < 0.7
        mask[:, 0] = True
        kept.append(mask)
    visual["video_merge_sizes"] = torch.full((len(kept),), 2)
    visual["video_compression_mask"] = torch.cat([mask.flatten() for mask in kept])
    videos = iter(mask.sum(1).tolist() for mask in kept)
    return visual, [[next(videos) for _ in range(count)] for count in videos_per_row]


def _video_llama_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    first = sum(images_per_row[:row])
    merges = batch["image_merge_sizes"][first : first + images_per_row[row]]
    return {**patches_of_row(batch, images_per_row, row), "image_merge_sizes": merges}


def _video_llama_videos_of_row(batch: Batch, videos_per_row: Sequence[int], row: int) -> Batch:
    first = sum(videos_per_row[:row])
    span = slice(first, first + videos_per_row[row])
    tokens = (batch["video_grid_thw"].prod(-1) // batch["video_merge_sizes"] ** 2).tolist()
    masks = batch["video_compression_mask"].split(tokens)[span]
    return {
        **qwen_videos_of_row(batch, videos_per_row, row),
        "video_merge_sizes": batch["video_merge_sizes"][span],
        "video_compression_mask": torch.cat(masks),
    }


FAMILIES: tuple[TinyFamily, ...] = (
    qwen_family("ernie4_5_vl_moe", _ernie, images=_flat_images, videos=_ernie_videos, types=_ernie_types),
    qwen_family("paddleocr_vl", _paddle, images=_paddle_images, **NO_VIDEOS),
    qwen_family(
        "hunyuan_vl", _hunyuan, images=_hunyuan_images, **NO_VIDEOS,
        row_dependence="positions count the images of all rows before",
    ),
    qwen_family("cohere_compass", _cohere),
    qwen_family("cosmos3_edge", _cosmos_edge, **FLAT),
    qwen_family("cosmos3_omni", _cosmos_omni),
    qwen_family("exaone4_5", _exaone, mrope=False),
    qwen_family("hyperclovax_vision_v2", _hyperclova, mrope=False),
    qwen_family(
        "video_llama_3", _video_llama, images=_video_llama_images, visual_of_row=_video_llama_row,
        videos=_video_llama_videos, videos_of_row=_video_llama_videos_of_row, mrope=False,
    ),
)  # fmt: skip
