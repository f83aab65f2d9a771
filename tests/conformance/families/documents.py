"""MiniCPM, and the readers of pages that see local crops before the whole image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests.tiny import (
    IMAGE,
    QWEN_IDS,
    TILE_END,
    TILE_START,
    Batch,
    Runs,
    TinyFamily,
    llama_settings,
    pixels,
    qwen_text_settings,
)

RECURRENT = "linear attention carries a state along the sequence, which a masked token still moves"
PATCH = 4
SLICE_START, SLICE_END, NEWLINE = 51, 52, 53


def qwen3_5_settings() -> dict[str, Any]:
    """Return the settings of a tiny Qwen3.5 language model: one layer of linear attention, one of full attention."""
    settings = {**qwen_text_settings(), "model_type": "qwen3_5_text", "head_dim": 16}
    rotary = {**settings["rope_parameters"], "partial_rotary_factor": 1.0, "mrope_interleaved": True}
    return {
        **settings, "rope_parameters": rotary, "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    }  # fmt: skip


def _minicpm_settings() -> dict[str, Any]:
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": PATCH,
    }  # fmt: skip
    ids = {name: QWEN_IDS[name] for name in ("image_token_id", "video_token_id")}
    return {"vision_config": vision, "text_config": qwen3_5_settings(), "insert_layer_id": 0, **ids}


def _minicpmv4_6() -> Any:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    return MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**_minicpm_settings()))


def _minicpmv4_7() -> Any:
    from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

    marks = {
        "image_start_id": TILE_START, "image_end_id": TILE_END, "slice_start_id": SLICE_START,
        "slice_end_id": SLICE_END, "newline_id": NEWLINE,
    }  # fmt: skip
    return MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**_minicpm_settings(), **marks))


def _minicpm_ocr() -> Any:
    from transformers import MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration

    return MiniCPMOcrForConditionalGeneration(MiniCPMOcrConfig(**_minicpm_settings()))


class RowsOfPatches:
    """Pictures whose patches stand side by side, one line for all, as the MiniCPM processors pack them.

    Args:
        sizes: Rows and columns of patches of the pictures of each input, in turn.
        merged: Patches that make a token.
        suffix: End of the names of the visual inputs.
    """

    def __init__(self, sizes: Sequence[Sequence[tuple[int, int]]], merged: int, suffix: str = "") -> None:
        self.sizes, self.merged = sizes, merged
        self.values, self.targets = f"pixel_values{suffix}", f"target_sizes{suffix}"

    def __call__(self, model: Any, per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        """Return patches, their grids and placeholder runs."""
        sizes = [self.sizes[number % len(self.sizes)] for number in range(sum(per_row))]
        flat = [size for pictures in sizes for size in pictures]
        patches = sum(rows * columns for rows, columns in flat)
        visual = {
            self.values: pixels((1, 3, PATCH, patches * PATCH), generator),
            self.targets: torch.tensor(flat, dtype=torch.int32),
        }
        runs = iter([rows * columns // self.merged for rows, columns in pictures] for pictures in sizes)
        return visual, [[next(runs) for _ in range(count)] for count in per_row]

    def of_row(self, batch: Batch, per_row: Sequence[int], row: int) -> Batch:
        """Return the pictures of one row."""
        first = sum(per_row[:row])
        before, mine = (
            sum(len(self.sizes[number % len(self.sizes)]) for number in numbers)
            for numbers in (range(first), range(first, first + per_row[row]))
        )
        targets = batch[self.targets]
        patches = targets.prod(1).cumsum(0).tolist()
        start, end = (PATCH * ([0, *patches][number]) for number in (before, before + mine))
        return {self.values: batch[self.values][..., start:end], self.targets: targets[before : before + mine]}


def _minicpm(name: str, build: Callable[[], Any], merged: int, mrope: bool = False) -> TinyFamily:
    images = RowsOfPatches([[(16, 20)], [(12, 16)], [(16, 16)]], merged)
    videos = RowsOfPatches([[(12, 16)] * 2, [(16, 16)] * 3], merged, "_videos")
    return TinyFamily(
        name, build, images, images.of_row, mrope=mrope, fence=True, videos=videos, videos_of_row=videos.of_row,
        not_masking=RECURRENT,
    )  # fmt: skip


CROPS = (2, 0, 3)
"""Local crops of the images, in turn."""


class Views:
    """Images as some local crops and a view of the whole.

    Args:
        whole: Height and width of the view of the whole.
        crop: Height and width of a crop.
        tokens: Crops -> visual tokens of the image.
        grid: Whether the crops' columns and rows are an input as well.
    """

    def __init__(self, whole: int, crop: int, tokens: Callable[[int], int], grid: bool = False) -> None:
        self.whole, self.crop, self.tokens, self.grid = whole, crop, tokens, grid

    def __call__(self, model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        """Return views and placeholder runs."""
        crops = [CROPS[number % len(CROPS)] for number in range(sum(images_per_row))]
        visual: Batch = {
            "pixel_values": pixels((len(crops), 3, self.whole, self.whole), generator),
            "pixel_values_local": pixels((sum(crops), 3, self.crop, self.crop), generator),
            "num_local_patches": crops,
        }
        if self.grid:
            visual["patches_grid"] = [[max(count, 1), 1] for count in crops]
        lengths = iter(self.tokens(count) for count in crops)
        return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]

    def of_row(self, batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
        """Return the views of one row."""
        first = sum(images_per_row[:row])
        span = slice(first, first + images_per_row[row])
        crops = batch["num_local_patches"]
        local = slice(sum(crops[:first]), sum(crops[: span.stop]))
        alone = {
            name: batch[name][span] for name in ("pixel_values", "num_local_patches", "patches_grid") if name in batch
        }
        return {**alone, "pixel_values_local": batch["pixel_values_local"][local]}


def _experts(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny DeepSeek-like language model, one layer dense and one of experts."""
    settings = llama_settings(
        num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
        mlp_layer_types=["dense", "sparse"], max_position_embeddings=2048, **changes,
    )  # fmt: skip
    del settings["model_type"]
    return settings


def _sam(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32, "downsample_channels": [8, 16],
        **changes,
    }  # fmt: skip


def _deepseek_ocr2() -> Any:
    from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

    encoder = {
        "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    config = DeepseekOcr2Config(
        vision_config={"sam_config": _sam(), "encoder_config": encoder}, text_config=_experts(), image_token_id=IMAGE
    )
    return DeepseekOcr2ForConditionalGeneration(config)


def _unlimited_ocr() -> Any:
    from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

    encoder = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
        "patch_size": 4,
    }  # fmt: skip
    config = UnlimitedOcrConfig(
        vision_config={"sam_config": _sam(), "encoder_config": encoder}, text_config=_experts(sliding_window=256),
        image_token_id=IMAGE,
    )  # fmt: skip
    return UnlimitedOcrForConditionalGeneration(config)


def _step3p7() -> Any:
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 48, "patch_size": 4,
        "mlp_ratio": 2.0,
    }  # fmt: skip
    text = llama_settings(
        head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, share_expert_dim=16,
        mlp_layer_types=["dense", "sparse"], layer_types=["sliding_attention", "full_attention"], sliding_window=256,
    )  # fmt: skip
    del text["model_type"]
    config = Step3p7Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return Step3p7ForConditionalGeneration(config)


_DEEPSEEK = Views(64, 48, lambda crops: 144 * (crops + 1) + 1)
_STEP = Views(48, 32, lambda crops: 4 * crops + 9)
_UNLIMITED = Views(48, 32, lambda crops: (2 * (2 * crops + 1) if crops else 0) + 3 * 4 + 1, grid=True)

FAMILIES = (
    _minicpm("minicpm_ocr", _minicpm_ocr, 4),
    _minicpm("minicpmv4_6", _minicpmv4_6, 16),
    _minicpm("minicpmv4_7", _minicpmv4_7, 16, mrope=True),
    TinyFamily("deepseek_ocr2", _deepseek_ocr2, _DEEPSEEK, _DEEPSEEK.of_row),
    TinyFamily("step3p7", _step3p7, _STEP, _STEP.of_row),
    TinyFamily("unlimited_ocr", _unlimited_ocr, _UNLIMITED, _UNLIMITED.of_row),
)
