"""Gemma 3 to 4 and PaliGemma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
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
    clip_settings,
    images_of_row,
    multimodal_types,
    pixels,
)
from torch import Tensor

AUDIO = 61


def gemma_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny Gemma; its window is wider than all rows of the suite."""
    return {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "attention_dropout": 0.0, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **changes,
    }  # fmt: skip


def siglip_settings(image_size: int) -> dict[str, Any]:
    """Return the settings of a tiny SigLIP tower."""
    settings = clip_settings(image_size)
    del settings["projection_dim"]
    return {**settings, "model_type": "siglip_vision_model", "vision_use_head": False}


def gemma3(**text: Any) -> Any:
    """Return a Gemma 3 with one sliding and one full layer; keywords change its language model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration(Gemma3Config(**gemma3_settings(**text)))


def gemma3_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny Gemma 3; keywords change its language model."""
    text = gemma_settings(
        model_type="gemma3_text", layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
        final_logit_softcapping=3.0, sliding_window=256,
    )  # fmt: skip
    return {
        "vision_config": siglip_settings(24), "text_config": {**text, **changes}, "image_token_index": IMAGE,
        "mm_tokens_per_image": 9,
    }  # fmt: skip


def _gemma3n() -> Any:
    """The released models have a tower of timm, which is not installed here; one convolution stands in for it.

    It gives a map of the same form, [image, channel, row, column]; all behind it is stock.
    """
    from transformers import (
        AutoModel,
        Gemma3nConfig,
        Gemma3nForConditionalGeneration,
        Gemma3nVisionConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class Tower(PreTrainedModel):
        config_class = Gemma3nVisionConfig
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.convolution = torch.nn.Conv2d(3, config.hidden_size, 4, stride=4)
            self.post_init()

        def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
            return BaseModelOutputWithPooling(last_hidden_state=self.convolution(pixel_values))

    AutoModel.register(Gemma3nVisionConfig, Tower, exist_ok=True)
    text = gemma_settings(
        layer_types=["sliding_attention", "full_attention"], sliding_window=256, final_logit_softcapping=3.0,
        vocab_size_per_layer_input=IMAGE - 2, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0], altup_num_inputs=2,
    )  # fmt: skip
    audio = {
        "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "input_feat_size": 8,
        "sscp_conv_channel_size": (4, 4), "vocab_size": 1, "vocab_offset": VOCAB - 1,
    }  # fmt: skip
    vision = {"hidden_size": 24, "vocab_size": 3, "vocab_offset": IMAGE}
    config = Gemma3nConfig(
        text_config=text, vision_config=vision, audio_config=audio, image_token_id=IMAGE, audio_token_id=VOCAB - 1,
        vision_soft_tokens_per_image=36,
    )  # fmt: skip
    return Gemma3nForConditionalGeneration(config)


def paligemma(**changes: Any) -> Any:
    """Return a PaliGemma 2; keywords change its language model, that of the first PaliGemma is of type ``gemma``."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = {"model_type": "gemma2", "sliding_window": 256, **changes}
    config = PaliGemmaConfig(
        vision_config=siglip_settings(24), text_config=gemma_settings(**text),
        image_token_index=IMAGE, projection_dim=WIDTH, hidden_size=WIDTH, vocab_size=VOCAB,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config)


def _gemma4_text(**changes: Any) -> dict[str, Any]:
    return gemma_settings(
        layer_types=["sliding_attention", "full_attention"], global_head_dim=8, sliding_window=256,
        final_logit_softcapping=3.0, use_bidirectional_attention="vision", **changes,
    )  # fmt: skip


GEMMA4_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": AUDIO,
    "audio_config": None,
}


GEMMA4_TOWER = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 12, "patch_size": 4, "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}  # fmt: skip


def _gemma4() -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    text = _gemma4_text(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8)
    return Gemma4ForConditionalGeneration(Gemma4Config(vision_config=GEMMA4_TOWER, text_config=text, **GEMMA4_IDS))


def _gemma4_unified() -> Any:
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    vision = {
        "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 24, "mm_posemb_size": 16, "output_proj_dims": 24,
    }  # fmt: skip
    config = Gemma4UnifiedConfig(vision_config=vision, text_config=_gemma4_text(), **GEMMA4_IDS)
    return Gemma4UnifiedForConditionalGeneration(config)


GRIDS = ((6, 4), (4, 8), (8, 6))
"""Columns and rows of patches of the Gemma 4 images, in turn."""
FRAMES = (2, 3)
"""Frames of the Gemma 4 videos, in turn."""


def _patches(
    grids: Sequence[tuple[int, int]], side: int, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return patches of images and their columns and rows, -1 for padding."""
    values = torch.zeros(len(grids), most, 3 * side**2)
    places = torch.full((len(grids), most, 2), -1)
    for image, (columns, rows) in enumerate(grids):
        count = columns * rows
        values[image, :count] = pixels((count, 3 * side**2), generator)
        places[image, :count] = torch.stack([torch.arange(count) % columns, torch.arange(count) // columns], 1)
    return values, places


def _gemma4_visual(pool: int) -> tuple[Any, Any]:
    """Return the makers of images and of videos; `pool` by `pool` patches become one token."""

    def images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        grids = [GRIDS[number % len(GRIDS)] for number in range(sum(images_per_row))]
        values, places = _patches(grids, 4, 48, generator)
        lengths = iter(columns * rows // pool**2 for columns, rows in grids)
        runs = [[[next(lengths)] for _ in range(count)] for count in images_per_row]
        return {"pixel_values": values, "image_position_ids": places}, runs

    def videos(model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        frames = [FRAMES[number % len(FRAMES)] for number in range(sum(videos_per_row))]
        grids = [GRIDS[number % 2] for number, count in enumerate(frames) for _ in range(count)]
        values, places = _patches(grids, 4, 32, generator)
        visual = {
            "pixel_values_videos": values, "video_position_ids": places, "num_frames_per_video": torch.tensor(frames),
        }  # fmt: skip
        lengths = iter([GRIDS[n % 2][0] * GRIDS[n % 2][1] // pool**2] * count for n, count in enumerate(frames))
        return visual, [[next(lengths) for _ in range(count)] for count in videos_per_row]

    return images, videos


def _frames_of_row(batch: Batch, videos_per_row: Sequence[int], row: int) -> Batch:
    first = sum(videos_per_row[:row])
    counts = batch["num_frames_per_video"]
    mine = counts[first : first + videos_per_row[row]]
    start = int(counts[:first].sum())
    span = slice(start, start + int(mine.sum()))
    return {
        "pixel_values_videos": batch["pixel_values_videos"][span],
        "video_position_ids": batch["video_position_ids"][span],
        "num_frames_per_video": mine,
    }


def _gemma4_family(name: str, build: Callable[[], Any], pool: int) -> TinyFamily:
    images, videos = _gemma4_visual(pool)
    return TinyFamily(
        name, build, images, images_of_row, fence=True, videos=videos, videos_of_row=_frames_of_row,
        types=lambda ids: {"mm_token_type_ids": multimodal_types(ids)},
    )  # fmt: skip


def _square_images(tokens: int) -> Callable[[Any, Sequence[int], torch.Generator], tuple[Batch, Runs]]:
    def images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        runs = [[[tokens]] * count for count in images_per_row]
        return {"pixel_values": pixels((sum(images_per_row), 3, 24, 24), generator)}, runs

    return images


def _image_types(ids: Tensor) -> Batch:
    """1 for the tokens of images, which see each other in both directions."""
    return {"token_type_ids": (ids == IMAGE).long()}


def _suffix_types(ids: Tensor) -> Batch:
    """0 up to the last image token, where all tokens see each other; 1 behind it."""
    ahead = (ids == IMAGE).flip(1).cumsum(1).flip(1)
    return {"token_type_ids": ((ahead == 0) & (ids != PAD)).long()}


FAMILIES = (
    TinyFamily("gemma3", gemma3, _square_images(9), images_of_row, fence=True, types=_image_types),
    _gemma4_family("gemma4", _gemma4, 2),
    _gemma4_family("gemma4_unified", _gemma4_unified, 1),
    TinyFamily("gemma3n", _gemma3n, _square_images(36), images_of_row, fence=True),
    TinyFamily("paligemma", paligemma, _square_images(36), images_of_row, types=_suffix_types),
)
