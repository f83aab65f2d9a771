"""Mistral 3 and its relatives, LightOnOCR, Idefics 2, Granite Docling and LFM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.tiny import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    QWEN_IDS,
    VOCAB,
    WIDTH,
    Batch,
    Runs,
    TinyFamily,
    images_of_row,
    llama_settings,
    patches_of_row,
    pixels,
    qwen_images,
    qwen_videos,
    qwen_videos_of_row,
    tiles_of_row,
)

PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 4, "head_dim": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
}  # fmt: skip
SIZES = ((24, 32), (16, 24), (32, 16))
"""Heights and widths of the images of any shape, in turn; eight by eight pixels become a token."""


def _mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = llama_settings(model_type="mistral", head_dim=8, sliding_window=None)
    config = Mistral3Config(vision_config=PIXTRAL, text_config=text, image_token_index=IMAGE)
    return Mistral3ForConditionalGeneration(config)


def _mistral_large4() -> Any:
    from transformers import MistralLarge4Config, MistralLarge4ForConditionalGeneration

    text = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "index_topk": 256, "index_head_dim": 16, "index_n_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "final_logit_softcapping": 3.0,
    }  # fmt: skip
    config = MistralLarge4Config(vision_config=PIXTRAL, text_config=text, image_token_index=IMAGE)
    return MistralLarge4ForConditionalGeneration(config)


def _lighton_ocr() -> Any:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

    text = llama_settings(model_type="qwen3", head_dim=8)
    return LightOnOcrForConditionalGeneration(
        LightOnOcrConfig(vision_config=PIXTRAL, text_config=text, image_token_id=IMAGE)
    )


def _sized_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images of different sizes, padded; every line of an image is a run, with a break behind it."""
    sizes = [SIZES[number % len(SIZES)] for number in range(sum(images_per_row))]
    values = torch.zeros(len(sizes), 3, 32, 32)
    for value, (height, width) in zip(values, sizes, strict=True):
        value[:, :height, :width] = pixels((3, height, width), generator)
    lines = iter([width // 8] * (height // 8) for height, width in sizes)
    visual = {"pixel_values": values, "image_sizes": torch.tensor(sizes)}
    return visual, [[next(lines) for _ in range(count)] for count in images_per_row]


def _idefics2() -> Any:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    perceiver = {
        "hidden_size": WIDTH, "resampler_n_latents": 9, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    config = Idefics2Config(
        vision_config={**VISION, "image_size": 24}, perceiver_config=perceiver,
        text_config=llama_settings(model_type="mistral", head_dim=8, sliding_window=None), image_token_id=IMAGE,
    )  # fmt: skip
    return Idefics2ForConditionalGeneration(config)


def _row_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images of two sizes, padded to one size and to one number per row."""
    values = torch.zeros(len(images_per_row), max(images_per_row), 3, 24, 24)
    mask = torch.zeros(len(images_per_row), max(images_per_row), 24, 24, dtype=torch.bool)
    for row, count in enumerate(images_per_row):
        for image in range(count):
            height = 24 if image % 2 == 0 else 16
            values[row, image, :, :height] = pixels((3, height, 24), generator)
            mask[row, image, :height] = True
    return {"pixel_values": values, "pixel_attention_mask": mask}, [[[9]] * count for count in images_per_row]


def _granite_docling() -> Any:
    from transformers import GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

    vision = {
        **VISION, "image_size": 24, "out_hidden_size": WIDTH, "scale_factor": 2, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**llama_settings(), "model_type": "granite_docling_text", "logits_scaling": 2.0}
    config = GraniteDoclingConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, pad_token_id=PAD)
    return GraniteDoclingForConditionalGeneration(config)


def _row_tiles(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images of three and two tiles, padded to one number per row."""
    tiles = [[3 if image % 2 == 0 else 2 for image in range(count)] for count in images_per_row]
    most = max(sum(row) for row in tiles)
    values = torch.zeros(len(tiles), most, 3, 24, 24)
    mask = torch.arange(most) < torch.tensor([sum(row) for row in tiles])[:, None]
    values[mask] = pixels((int(mask.sum()), 3, 24, 24), generator)
    return {"pixel_values": values, "pixel_attention_mask": mask}, [[[9] * count for count in row] for row in tiles]


def _tiles_of_masked_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    tiles = int(batch["pixel_attention_mask"][row].sum())
    return {name: batch[name][row : row + 1, :tiles] for name in ("pixel_values", "pixel_attention_mask")}


def _lfm2_vl() -> Any:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    text = llama_settings(model_type="lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    vision = {**VISION, "model_type": "siglip2_vision_model", "num_patches": 36, "vision_use_head": False}
    config = Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=48)
    return Lfm2VlForConditionalGeneration(config)


def _flat_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images of different shapes as patches, padded to one number."""
    shapes = [(height // 4, width // 4) for height, width in SIZES]
    shapes = [shapes[number % len(shapes)] for number in range(sum(images_per_row))]
    counts = torch.tensor([rows * columns for rows, columns in shapes])
    mask = torch.arange(48) < counts[:, None]
    values = torch.zeros(len(shapes), 48, 48)
    values[mask] = pixels((int(counts.sum()), 48), generator)
    lengths = iter((counts // 4).tolist())
    visual = {"pixel_values": values, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask.int()}
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _lfm3_vl() -> Any:
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration

    text = llama_settings(model_type="lfm3", layer_types=["conv", "full_attention"], head_dim=8)
    vision = {
        **VISION, "hidden_size": 32, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"],
        "temporal_patch_size": 2,
    }  # fmt: skip
    config = Lfm3VlConfig(vision_config=vision, text_config=text, projector_hidden_size=48, **QWEN_IDS)
    return Lfm3VlForConditionalGeneration(config)


CONVOLUTION = "short convolutions run along the sequence"

FAMILIES = (
    TinyFamily("mistral3", _mistral3, _sized_images, images_of_row, fence=True),
    TinyFamily("mistral_large4", _mistral_large4, _sized_images, images_of_row, fence=True),
    TinyFamily("lighton_ocr", _lighton_ocr, _sized_images, images_of_row),
    TinyFamily("idefics2", _idefics2, _row_images, tiles_of_row, fence=True),
    TinyFamily("granite_docling", _granite_docling, _row_tiles, _tiles_of_masked_row, fence=True),
    TinyFamily("lfm2_vl", _lfm2_vl, _flat_images, images_of_row, fence=True, not_masking=CONVOLUTION),
    TinyFamily(
        "lfm3_vl", _lfm3_vl, qwen_images, patches_of_row, fence=True, videos=qwen_videos,
        videos_of_row=qwen_videos_of_row, not_masking=CONVOLUTION,
    ),
)  # fmt: skip
