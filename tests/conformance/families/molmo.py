"""Molmo2, whose images are a small view and a large one cut into crops, and Llama 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.conformance.families.intern import TiledImages
from tests.conformance.families.llava import FRAMES
from tests.tiny import IMAGE, TILE_END, TILE_START, WIDTH, Batch, Runs, TinyFamily, llama_settings, pixels
from torch import Tensor

CROPS = (2, 1, 3)
"""Crops of the large view of the images of a batch, in turn, side by side."""
PATCHES, SIDE = 16, 4
"""Patches of a crop, and how many of them make its side; two by two of them make a token."""


def _molmo2() -> Any:
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 12, "image_size": [16, 16], "patch_size": 4,
    }  # fmt: skip
    adapter = {
        "vision_feature_layer": [-1, -2], "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 12, "intermediate_size": 32, "text_hidden_size": WIDTH,
    }  # fmt: skip
    text = llama_settings(additional_vocab_size=4, head_dim=8, qk_norm_type="qwen3")
    text.update(model_type="molmo2_text", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = Molmo2Config(
        vision_config=vision, adapter_config=adapter, text_config=text, image_patch_id=IMAGE,
        image_start_token_id=TILE_START, image_end_token_id=TILE_END,
    )  # fmt: skip
    return Molmo2ForConditionalGeneration(config)


def _pooling(first: int, crops: int) -> Tensor:
    """Patches that each token of a view of some crops side by side pools, [token, patch]."""
    half = SIDE // 2
    corners = [
        (first + column // half) * PATCHES + 2 * row * SIDE + 2 * (column % half)
        for row in range(half)
        for column in range(half * crops)
    ]
    return torch.tensor(corners)[:, None] + torch.tensor([0, 1, SIDE, SIDE + 1])


def _crops(images_per_row: Sequence[int]) -> list[int]:
    """Crops of each image, of both views."""
    return [1 + CROPS[number % len(CROPS)] for number in range(sum(images_per_row))]


def _molmo_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    crops = _crops(images_per_row)
    views = []
    for number, count in enumerate(crops):
        first = sum(crops[:number])
        views += [_pooling(first, 1), _pooling(first + 1, count - 1)]
    pooling = torch.cat(views)
    pooling[::3, -1] = -1  # as at the edge of an image that the patches do not fill
    visual = {
        "pixel_values": pixels((sum(crops), PATCHES, 48), generator),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 2, 2 * (count - 1)] for count in crops]),
    }
    runs = iter([[4, 4 * (count - 1)] for count in crops])
    return visual, [[next(runs) for _ in range(images)] for images in images_per_row]


def _molmo_images_of_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    crops = _crops(images_per_row)
    first = sum(images_per_row[:row])
    own = slice(first, first + images_per_row[row])
    start, count = sum(crops[:first]), sum(crops[own])
    pooling = batch["image_token_pooling"][4 * start : 4 * (start + count)]
    return {
        "pixel_values": batch["pixel_values"][start : start + count],
        "image_token_pooling": torch.where(pooling < 0, pooling, pooling - start * PATCHES),
        "image_grids": batch["image_grids"][own],
    }


def _molmo_videos(model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    count = sum(videos_per_row)
    visual = {
        "pixel_values_videos": pixels((count * FRAMES, PATCHES, 48), generator),
        "video_token_pooling": torch.cat([_pooling(frame, 1) for frame in range(count * FRAMES)]),
        "video_grids": torch.tensor([[FRAMES, 2, 2]] * count),
    }
    return visual, [[[4] * FRAMES] * videos for videos in videos_per_row]


def _molmo_videos_of_row(batch: Batch, videos_per_row: Sequence[int], row: int) -> Batch:
    first, count = FRAMES * sum(videos_per_row[:row]), FRAMES * videos_per_row[row]
    return {
        "pixel_values_videos": batch["pixel_values_videos"][first : first + count],
        "video_token_pooling": batch["video_token_pooling"][4 * first : 4 * (first + count)] - first * PATCHES,
        "video_grids": batch["video_grids"][first // FRAMES : (first + count) // FRAMES],
    }


def _molmo_types(ids: Tensor) -> Batch:
    """1 for all tokens of images and their fences, which see each other in both directions."""
    return {"mm_token_type_ids": torch.isin(ids, torch.tensor([IMAGE, TILE_START, TILE_END])).long()}


def llama4(**text: Any) -> Any:
    """Return a Llama 4 with one chunked layer and one with experts; keywords change its language model."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = {
        "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24,
        "patch_size": 4, "projector_input_dim": 20, "projector_output_dim": 20, "vision_output_dim": 20,
    }  # fmt: skip
    settings = llama_settings(
        model_type="llama4_text", intermediate_size_mlp=48, head_dim=8, num_local_experts=2, moe_layers=[1],
        no_rope_layers=[1, 0], layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    config = Llama4Config(vision_config=vision, text_config={**settings, **text}, image_token_index=IMAGE)
    return Llama4ForConditionalGeneration(config)


LLAMA4_IMAGES = TiledImages(9, 24, apart=True)

FAMILIES = (
    TinyFamily("llama4", llama4, LLAMA4_IMAGES, LLAMA4_IMAGES.of_row, fence=True),
    TinyFamily(
        "molmo2", _molmo2, _molmo_images, _molmo_images_of_row, fence=True, types=_molmo_types,
        videos=_molmo_videos, videos_of_row=_molmo_videos_of_row, video_token=IMAGE, mixed=False,
    ),
)  # fmt: skip
