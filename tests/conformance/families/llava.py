"""LLaVA's relatives, the models that join a tower to a language model with a small projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.tiny import (
    IMAGE,
    NEXT_SIZES,
    VIDEO,
    WIDTH,
    Batch,
    Runs,
    TinyFamily,
    clip_settings,
    images_of_row,
    llama_settings,
    pixels,
)

FRAMES = 3
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def siglip_settings(image_size: int, patch_size: int = 4) -> dict[str, Any]:
    """Return the settings of a tiny SigLIP tower, which has no class token."""
    settings = {**clip_settings(image_size, patch_size), "model_type": "siglip_vision_model", "vision_use_head": False}
    del settings["projection_dim"]
    return settings


def qwen2_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a tiny Qwen2 or Qwen3 language model."""
    return llama_settings(**{"model_type": "qwen2", "max_window_layers": 2, **changes})


class SingleImages:
    """Images of one size and one tile each.

    Args:
        tokens: Visual tokens of an image.
        size: Height and width.
        others: More inputs, by name, as (height and width).
    """

    def __init__(self, tokens: int, size: int, **others: int) -> None:
        self.tokens = tokens
        self.sizes = {"pixel_values": size, **others}

    def __call__(self, model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        """Return pixels and placeholder runs."""
        count = sum(images_per_row)
        visual = {name: pixels((count, 3, size, size), generator) for name, size in self.sizes.items()}
        return visual, [[[self.tokens]] * images for images in images_per_row]

    def of_row(self, batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
        """Return the images of one row."""
        first = sum(images_per_row[:row])
        return {name: batch[name][first : first + images_per_row[row]] for name in self.sizes}


class FrameVideos:
    """Videos of `FRAMES` frames of one size.

    Args:
        tokens: Visual tokens of a frame.
        size: Height and width.
        ending: Tokens behind the last frame.
    """

    def __init__(self, tokens: int, size: int, ending: int = 0) -> None:
        self.tokens, self.size, self.ending = tokens, size, ending

    def __call__(self, model: Any, videos_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
        """Return pixels and placeholder runs."""
        values = pixels((sum(videos_per_row), FRAMES, 3, self.size, self.size), generator)
        runs = [[[FRAMES * self.tokens + self.ending]] * count for count in videos_per_row]
        return {"pixel_values_videos": values}, runs

    def of_row(self, batch: Batch, videos_per_row: Sequence[int], row: int) -> Batch:
        """Return the videos of one row."""
        first = sum(videos_per_row[:row])
        return {"pixel_values_videos": batch["pixel_values_videos"][first : first + videos_per_row[row]]}


def _with_llama() -> dict[str, Any]:
    return {"image_token_index": IMAGE, "text_config": llama_settings()}


def _vipllava() -> Any:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    config = VipLlavaConfig(**_with_llama(), vision_config=clip_settings(24), vision_feature_layer=[-2, -1, 1])
    return VipLlavaForConditionalGeneration(config)


def _video_llava() -> Any:
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(**_with_llama(), vision_config=clip_settings(16), video_token_index=VIDEO)
    return VideoLlavaForConditionalGeneration(config)


def _llava_next_video() -> Any:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        **_with_llama(), vision_config=clip_settings(16), video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextVideoForConditionalGeneration(config)


def _packed_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images cut into tiles, two grids of them, with rows that unpadding removes."""
    sizes = [NEXT_SIZES[number % len(NEXT_SIZES)] for number in range(sum(images_per_row))]
    visual = {"pixel_values": pixels((len(sizes), 5, 3, 16, 16), generator), "image_sizes": torch.tensor(sizes)}
    return visual, _runs_of_features(model, visual, images_per_row)


def _runs_of_features(model: Any, visual: Batch, images_per_row: Sequence[int]) -> Runs:
    with torch.no_grad():
        output = model.get_image_features(**visual, return_dict=True)
    features = output.deepstack_features[0][1] if output.pooler_output is None else output.pooler_output
    lengths = iter(len(tokens) for tokens in features)
    return [[[next(lengths)] for _ in range(count)] for count in images_per_row]


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    # At most one tile's worth of tokens, so that the largest images are made smaller by interpolation.
    config = LlavaOnevisionConfig(
        image_token_index=IMAGE, video_token_index=VIDEO, vision_config=siglip_settings(16),
        text_config=qwen2_settings(), image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_1",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def _onevision_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    """Return images that are cut into tiles where a row has one, and left whole where it has several."""
    sizes = [NEXT_SIZES[number % len(NEXT_SIZES)] for number in range(sum(images_per_row))]
    visual = {
        "pixel_values": pixels((len(sizes), 5, 3, 16, 16), generator),
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor(list(images_per_row)),
    }
    return visual, _runs_of_features(model, visual, images_per_row)


def _onevision_row(batch: Batch, images_per_row: Sequence[int], row: int) -> Batch:
    found = images_of_row(batch, images_per_row, row)
    return {**found, "batch_num_images": batch["batch_num_images"][row : row + 1]}


def _janus() -> Any:
    from transformers import JanusConfig, JanusForConditionalGeneration

    vision = {
        "hidden_size": 24, "mlp_ratio": 1.5, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "projection_dim": WIDTH, "num_image_tokens": 16,
    }  # fmt: skip
    codes = {
        "embed_dim": 4, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "projection_dim": WIDTH, "image_token_embed_dim": WIDTH,
    }  # fmt: skip
    config = JanusConfig(vision_config=vision, vq_config=codes, text_config=llama_settings(), image_token_id=IMAGE)
    return JanusForConditionalGeneration(config)


def _deepseek_vl() -> Any:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    config = DeepseekVLConfig(vision_config=siglip_settings(16), text_config=llama_settings(), image_token_id=IMAGE)
    return DeepseekVLForConditionalGeneration(config)


def _deepseek_vl_hybrid() -> Any:
    from transformers import DeepseekVLHybridConfig, DeepseekVLHybridForConditionalGeneration

    fine = {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 4, "mlp_dim": 24, "window_size": 4, "global_attn_indexes": [1],
    }  # fmt: skip
    config = DeepseekVLHybridConfig(
        vision_config=siglip_settings(16), high_res_vision_config=fine, text_config=llama_settings(),
        image_token_id=IMAGE,
    )  # fmt: skip
    return DeepseekVLHybridForConditionalGeneration(config)


def _fast_vlm() -> Any:
    """The released models have a tower of timm; a convolutional one of transformers gives a map of the same form."""
    from transformers import ConvNextConfig, FastVlmConfig, FastVlmForConditionalGeneration

    tower = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=4, hidden_size=16)
    config = FastVlmConfig(vision_config=tower, text_config=qwen2_settings(), image_token_index=IMAGE)
    return FastVlmForConditionalGeneration(config)


def _perception_lm() -> Any:
    """The released models have a tower of timm; a CLIP tower gives patches behind a class token as it does."""
    from transformers import CLIPVisionConfig, PerceptionLMConfig, PerceptionLMForConditionalGeneration

    tower = CLIPVisionConfig(**clip_settings(32), model_args={"embed_dim": 24})
    config = PerceptionLMConfig(
        vision_config=tower, text_config=llama_settings(), image_token_id=IMAGE, video_token_id=VIDEO,
        projector_pooling_ratio=2, vision_use_cls_token=True,
    )  # fmt: skip
    return PerceptionLMForConditionalGeneration(config)


PERCEPTION_TILES = 2


def _perception_images(model: Any, images_per_row: Sequence[int], generator: torch.Generator) -> tuple[Batch, Runs]:
    values = pixels((sum(images_per_row), PERCEPTION_TILES, 3, 32, 32), generator)
    return {"pixel_values": values}, [[[16 * PERCEPTION_TILES]] * count for count in images_per_row]


JANUS_IMAGES = SingleImages(16, 16)
PERCEPTION_VIDEOS = FrameVideos(16, 32)
DEEPSEEK_IMAGES = SingleImages(16, 16)
HYBRID_IMAGES = SingleImages(16, 16, high_res_pixel_values=32)
FAST_IMAGES = SingleImages(16, 32)


def _granite4_vision() -> Any:
    from transformers import Granite4VisionConfig, Granite4VisionForConditionalGeneration

    text = llama_settings(
        num_hidden_layers=3, embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5,
        attention_multiplier=0.35,
    )  # fmt: skip
    text["model_type"] = "granite4_vision_text"
    config = Granite4VisionConfig(
        vision_config={**clip_settings(16), "hidden_size": 64}, text_config=text, image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS, downsample_rate="1/2", projector_dropout=0.0,
        deepstack_layer_map=[[-1, 1], [-2, 0]], spatial_vision_layer=-1, spatial_target_layers=[2],
        qformer_config={
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32,
            "cross_attention_frequency": 1, "use_qformer_text_input": False, "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
        },
    )  # fmt: skip
    return Granite4VisionForConditionalGeneration(config)


VIP_IMAGES = SingleImages(36, 24)
VIDEO_LLAVA_IMAGES, VIDEO_LLAVA_VIDEOS = SingleImages(16, 16), FrameVideos(17, 16)
NEXT_VIDEOS = FrameVideos(4, 16)
ONEVISION_VIDEOS = FrameVideos(4, 16, ending=1)

FAMILIES = (
    TinyFamily("deepseek_vl", _deepseek_vl, DEEPSEEK_IMAGES, DEEPSEEK_IMAGES.of_row),
    TinyFamily("deepseek_vl_hybrid", _deepseek_vl_hybrid, HYBRID_IMAGES, HYBRID_IMAGES.of_row),
    TinyFamily("fast_vlm", _fast_vlm, FAST_IMAGES, FAST_IMAGES.of_row),
    TinyFamily("granite4_vision", _granite4_vision, _packed_images, images_of_row),
    TinyFamily("janus", _janus, JANUS_IMAGES, JANUS_IMAGES.of_row),
    TinyFamily(
        "llava_next_video", _llava_next_video, _packed_images, images_of_row,
        videos=NEXT_VIDEOS, videos_of_row=NEXT_VIDEOS.of_row,
    ),
    TinyFamily(
        "llava_onevision", _llava_onevision, _onevision_images, _onevision_row,
        videos=ONEVISION_VIDEOS, videos_of_row=ONEVISION_VIDEOS.of_row,
    ),
    TinyFamily(
        "perception_lm", _perception_lm, _perception_images, images_of_row,
        videos=PERCEPTION_VIDEOS, videos_of_row=PERCEPTION_VIDEOS.of_row,
    ),
    TinyFamily(
        "video_llava", _video_llava, VIDEO_LLAVA_IMAGES, VIDEO_LLAVA_IMAGES.of_row,
        videos=VIDEO_LLAVA_VIDEOS, videos_of_row=VIDEO_LLAVA_VIDEOS.of_row,
    ),
    TinyFamily("vipllava", _vipllava, VIP_IMAGES, VIP_IMAGES.of_row),
)  # fmt: skip
