"""Families that cut images into tiles of one size: InternVL, the Cohere models, Aria, Ovis2 and the OCR models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.conformance.families.llava import qwen2_settings, siglip_settings
from tests.tiny import IMAGE, TILE_END, TILE_START, VOCAB, WIDTH, Batch, Runs, TinyFamily, llama_settings, pixels

TILES = (1, 3, 2)
"""Tiles of the images of a batch, in turn."""


class TiledImages:
    """Images of different numbers of tiles, all in one tensor.

    Args:
        tokens: Visual tokens of a tile.
        size: Height and width of a tile.
        apart: Whether each tile has a run of placeholders of its own.
    """

    def __init__(self, tokens: int, size: int, apart: bool = False) -> None:
        self.tokens, self.size, self.apart = tokens, size, apart

    def __call__(self, model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        """Return pixels and placeholder runs."""
        tiles = _tiles(images_per_row)
        values = pixels((sum(map(sum, tiles)), 3, self.size, self.size), generator)
        return {"pixel_values": values}, [[self._runs(count) for count in row] for row in tiles]

    def _runs(self, tiles: int) -> list[int]:
        return [self.tokens] * tiles if self.apart else [self.tokens * tiles]

    def of_row(self, batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
        """Return the images of one row."""
        counts = [sum(tiles) for tiles in _tiles(images_per_row)]
        first = sum(counts[:row])
        names = [name for name in ("pixel_values", "pixel_mask") if name in batch]
        return {name: batch[name][first : first + counts[row]] for name in names}


def _tiles(images_per_row: Sequence[int]) -> list[list[int]]:
    """Tiles of each image, row by row."""
    numbers = iter(range(sum(images_per_row)))
    return [[TILES[next(numbers) % len(TILES)] for _ in range(count)] for count in images_per_row]


def _intern_tower(size: int) -> dict[str, Any]:
    return {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": size, "patch_size": 4,
    }  # fmt: skip


def _internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        vision_config=_intern_tower(24), text_config=qwen2_settings(), image_token_id=IMAGE, image_seq_length=9
    )
    return InternVLForConditionalGeneration(config)


def _qianfan_ocr() -> Any:
    from transformers import QianfanOCRConfig, QianfanOCRForConditionalGeneration

    config = QianfanOCRConfig(
        vision_config={**_intern_tower(24), "drop_path_rate": 0.0},
        text_config=qwen2_settings(model_type="qwen3", head_dim=8), image_token_id=IMAGE, image_seq_length=9,
    )  # fmt: skip
    return QianfanOCRForConditionalGeneration(config)


def _got_tower() -> dict[str, Any]:
    return {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 4, "mlp_dim": 24, "window_size": 4, "global_attn_indexes": [1],
    }  # fmt: skip


def _got_ocr2() -> Any:
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration

    config = GotOcr2Config(
        vision_config=_got_tower(), text_config=qwen2_settings(), image_token_index=IMAGE, image_seq_length=16
    )
    return GotOcr2ForConditionalGeneration(config)


def _pp_chart2table() -> Any:
    from transformers import GotOcr2ForConditionalGeneration, PPChart2TableConfig

    config = PPChart2TableConfig(
        vision_config=_got_tower(), text_config=qwen2_settings(), image_token_index=IMAGE, image_seq_length=16
    )
    return GotOcr2ForConditionalGeneration(config)


def _cohere_settings() -> dict[str, Any]:
    return llama_settings(
        model_type="cohere2", layer_types=["sliding_attention", "full_attention"], sliding_window=256, logit_scale=0.5
    )


def _aya_vision() -> Any:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    config = AyaVisionConfig(vision_config=siglip_settings(24), text_config=_cohere_settings(), image_token_index=IMAGE)
    return AyaVisionForConditionalGeneration(config)


def _cohere2_vision() -> Any:
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    config = Cohere2VisionConfig(
        vision_config=siglip_settings(24), text_config=_cohere_settings(), image_token_id=IMAGE,
        alignment_intermediate_size=48,
    )  # fmt: skip
    return Cohere2VisionForConditionalGeneration(config)


def _aria() -> Any:
    from transformers import AriaConfig, AriaForConditionalGeneration

    vision = {
        "model_type": "idefics3_vision", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 24, "patch_size": 4, "attention_dropout": 0.0,
    }  # fmt: skip
    text = llama_settings(
        model_type="aria_text", intermediate_size=16, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
    )
    config = AriaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projector_patch_to_query_dict={36: 9}
    )
    return AriaForConditionalGeneration(config)


INDICATORS = (51, 52, 53, TILE_START, TILE_END)
"""Tokens that Ovis2 embeds on the vision side; the last two fence its runs of placeholders."""


def _ovis2() -> Any:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 24, "patch_size": 4, "vocab_size": 20, "hidden_stride": 2, "num_visual_indicator_tokens": 5,
    }  # fmt: skip
    config = Ovis2Config(
        vision_config=vision, text_config=qwen2_settings(), image_token_id=IMAGE, vocab_size=VOCAB,
        hidden_size=WIDTH, visual_indicator_token_ids=INDICATORS,
    )  # fmt: skip
    return Ovis2ForConditionalGeneration(config)


class MaskedTiles(TiledImages):
    """Tiles of which every second has padding at its right edge."""

    def __call__(self, model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        """Return pixels, mask and placeholder runs."""
        visual, runs = super().__call__(model, images_per_row, generator)
        mask = torch.ones(len(visual["pixel_values"]), self.size, self.size, dtype=torch.bool)
        mask[1::2, :, -self.size // 3 :] = False
        return {**visual, "pixel_mask": mask}, runs


NINE = TiledImages(9, 24)
NINE_MASKED = MaskedTiles(9, 24)
NINE_APART = TiledImages(9, 24, apart=True)
SIXTEEN = TiledImages(16, 64)

FAMILIES = (
    TinyFamily("aria", _aria, NINE_MASKED, NINE_MASKED.of_row),
    TinyFamily("aya_vision", _aya_vision, NINE_APART, NINE_APART.of_row, fence=True),
    TinyFamily("cohere2_vision", _cohere2_vision, NINE_APART, NINE_APART.of_row, fence=True),
    TinyFamily("got_ocr2", _got_ocr2, SIXTEEN, SIXTEEN.of_row),
    TinyFamily("internvl", _internvl, NINE, NINE.of_row, fence=True),
    TinyFamily("ovis2", _ovis2, NINE_APART, NINE_APART.of_row, fence=True),
    TinyFamily("pp_chart2table", _pp_chart2table, SIXTEEN, SIXTEEN.of_row),
    TinyFamily("qianfan_ocr", _qianfan_ocr, NINE, NINE.of_row, fence=True),
)
