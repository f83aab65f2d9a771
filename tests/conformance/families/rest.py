"""Chameleon, Emu3, Fuyu, Dots 3 and Nemotron Omni: one of a kind each."""

from __future__ import annotations

import math
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
)

CODES = 32
CODEBOOK = "the image's tokens are rows of the embedding table, found by a codebook through which no gradient passes"


def _chameleon() -> Any:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    names = [f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z" for code in range(CODES)]
    settings = llama_settings(vocab_size=VOCAB + CODES)
    del settings["model_type"]
    config = ChameleonConfig(
        vq_config={
            "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 8, "resolution": 24, "base_channels": 32,
            "channel_multiplier": [1, 1, 1], "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE, **{name: VOCAB + code for code, name in enumerate(names)}},
        **settings,
    )  # fmt: skip
    return ChameleonForConditionalGeneration(config)


def _chameleon_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    runs = [[[36]] * count for count in images_per_row]
    return {"pixel_values": pixels((sum(images_per_row), 3, 24, 24), generator)}, runs


def _emu3() -> Any:
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    names = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    text = llama_settings(vocab_size=VOCAB + CODES + 1)
    del text["model_type"]
    config = Emu3Config(
        vq_config={
            "codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 32,
            "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
            "temporal_downsample_factor": 2,
        },
        text_config=text,
        vocabulary_map={
            "<image>": IMAGE, "<|extra_200|>": VOCAB + CODES,
            **{name: VOCAB + code for code, name in enumerate(names)},
        },
    )  # fmt: skip
    return Emu3ForConditionalGeneration(config)


EMU_SIZES = ((16, 24), (24, 20), (20, 16))
"""Heights and widths of the Emu3 images, in turn; four by four pixels make a token, and every line ends with one."""


def _emu3_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    sizes = [EMU_SIZES[number % len(EMU_SIZES)] for number in range(sum(images_per_row))]
    lengths = iter(height // 4 * (width // 4 + 1) for height, width in sizes)
    visual = {"pixel_values": pixels((len(sizes), 3, 24, 24), generator), "image_sizes": torch.tensor(sizes)}
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _fuyu() -> Any:
    from transformers import FuyuConfig, FuyuForCausalLM

    text = llama_settings(model_type="persimmon", hidden_dropout=0.0, hidden_act="relu2", qk_layernorm=True)
    return FuyuForCausalLM(FuyuConfig(text_config=text, patch_size=4, image_size=24, image_token_id=IMAGE))


def _fuyu_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    runs = [[[6] * 4] * count for count in images_per_row]  # four lines of six patches
    return {"pixel_values": pixels((sum(images_per_row), 24, 3 * 4 * 4), generator)}, runs


def _dots3_note() -> Any:
    from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    widths = {"head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
    text = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "shared_experts_intermediate_size": 16,
        "max_position_embeddings": 512, "qk_rope_head_dim": 8, "index_topk": 256, "index_head_dim": 8,
        "index_n_heads": 2, "layer_types": ["indexed_attention", "sliding_attention"], "sliding_window": 256,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **heads, **widths,
        **{f"swa_{name}": value for name, value in {**heads, **widths}.items()},
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "moe_intermediate_size": 16, "pyramid_num_routed": [-1, 4], "adapter_in_dim": 24, "adapter_out_dim": WIDTH,
    }  # fmt: skip
    audio = {
        "whisper_config": {"d_model": 16, "encoder_attention_heads": 2, "encoder_layers": 1, "encoder_ffn_dim": 16},
        "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": WIDTH,
    }  # fmt: skip
    ids = {name: QWEN_IDS[name] for name in ("image_token_id", "video_token_id")}
    config = Dots3NoteConfig(text_config=text, vision_config=vision, audio_config=audio, audio_token_id=61, **ids)
    return Dots3NoteForConditionalGeneration(config)


def _dots3_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    visual, runs = qwen_images(model, images_per_row, generator)
    return {**visual, "pixel_values": visual["pixel_values"][:, : 3 * 4 * 4]}, runs


def _dots3_videos(model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    visual, runs = qwen_videos(model, videos_per_row, generator)
    return {**visual, "pixel_values_videos": visual["pixel_values_videos"][:, : 3 * 4 * 4]}, runs


def _nemotron() -> Any:
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

    text = {
        "model_type": "nemotron_h", "vocab_size": VOCAB, "hidden_size": WIDTH, "head_dim": 8,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "ssm_state_size": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 8, "n_groups": 2, "expand": 1, "chunk_size": 16, "n_routed_experts": 4,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "max_position_embeddings": 512,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    vision = {
        "model_type": "radio", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0,
        "patch_size": 4, "image_size": 24, "max_img_size": 48, "video_temporal_patch_size": 2,
    }  # fmt: skip
    config = NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision, text_config=text, projector_hidden_size=24, vision_hidden_size=16, image_token_id=IMAGE,
        video_token_id=QWEN_IDS["video_token_id"],
    )  # fmt: skip
    return NemotronH_Omni_Reasoning_V3(config)


GRIDS = ((8, 12), (6, 8), (10, 10))
"""Rows and columns of patches of the Nemotron images, in turn; two by two of them make a token."""


def _nemotron_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    grids = [GRIDS[number % len(GRIDS)] for number in range(sum(images_per_row))]
    patches = sum(math.prod(grid) for grid in grids)
    visual = {"pixel_values": pixels((patches, 3 * 4 * 4), generator), "image_grid_hw": torch.tensor(grids)}
    lengths = iter(math.prod(grid) // 4 for grid in grids)
    return visual, [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _nemotron_images_of_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    grids = batch["image_grid_hw"]
    padded = torch.cat((torch.ones_like(grids[:, :1]), grids), 1)
    found = patches_of_row({"pixel_values": batch["pixel_values"], "image_grid_thw": padded}, images_per_row, row)
    return {"pixel_values": found["pixel_values"], "image_grid_hw": found["image_grid_thw"][:, 1:]}


FAMILIES = (
    TinyFamily("chameleon", _chameleon, _chameleon_images, images_of_row, fence=True, no_projector=CODEBOOK),
    TinyFamily("emu3", _emu3, _emu3_images, images_of_row, fence=True, no_projector=CODEBOOK),
    TinyFamily("fuyu", _fuyu, _fuyu_images, images_of_row, fence=True),
    TinyFamily(
        "dots3_note", _dots3_note, _dots3_images, patches_of_row, videos=_dots3_videos, videos_of_row=qwen_videos_of_row
    ),
    TinyFamily(
        "nemotron_h_omni", _nemotron, _nemotron_images, _nemotron_images_of_row, fence=True,
        not_masking="Mamba layers carry a state along the sequence, which a masked token still moves",
    ),
)  # fmt: skip
