"""The smallest image of a model: for a process whose batch has none while others encode theirs together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from trimtab.anatomy.families import open_host
from trimtab.anatomy.inside import call_inside
from trimtab.errors import UnsupportedModelError
from trimtab.shapes import Float, Tensor


def encode_blank(model: Any, device: torch.device) -> Float[Tensor, ""]:
    """Send one blank image through the model's own image encoder.

    Args:
        model: The model, or what `open_host` made of it.
        device: Where the batch is.

    Returns:
        The mean of its features, with gradients where the encoder has them; to be added with weight zero.

    Raises:
        UnsupportedModelError: The encoder takes something else than is known here.
    """
    host = open_host(model)
    names = next(kind.arguments for kind in host.modalities if kind.name == "image")
    try:
        given = _arguments(host, names, device)
        output = call_inside(host.base, partial(host.base.get_image_features, **given, return_dict=True))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"A batch without images came while other processes have some, and with FSDP and ZeRO all must "
            f"encode together; but no blank image of {type(host.model).__name__} is known ({error}). Give every batch "
            "an image, or train with DDP."
        ) from error
    # Deepstack features of earlier layers reach the language model too, through parts of the encoder of their own.
    entries = [host.features(output), getattr(output, "deepstack_features", None) or ()]
    total: Tensor = torch.stack([one.mean() for one in _tensors(entries)]).mean()
    return total


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [] if isinstance(value, int) else [tensor for one in value for tensor in _tensors(one)]


def _arguments(host: Any, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    def ones(*shape: int) -> Tensor:  # Idefics takes an image of zeros for padding
        return torch.ones(shape, device=device, dtype=host.model.dtype)

    vision = getattr(host.model.config, "vision_config", None)
    if vision is None:
        return _without_tower(host.model.config, names, ones)
    channels = next((getattr(vision, n) for n in ("in_channels", "in_chans", "num_channels") if hasattr(vision, n)), 3)
    if "image_grid_thw" in names:
        return _patch_grid(vision, names, channels, ones)
    if "target_sizes" in names or "image_grid_hw" in names:
        return _line_of_patches(host.model.config, names, channels, ones)
    if "image_position_ids" in names:
        return _placed_patches(vision, channels, ones)
    if "spatial_shapes" in names:
        side = int(host.model.config.downsample_factor)
        mask = torch.ones(1, side**2, device=device, dtype=torch.long)
        values = ones(1, side**2, channels * vision.patch_size**2)
        return {"pixel_values": values, "spatial_shapes": mask.new_tensor([[side, side]]), "pixel_attention_mask": mask}
    if host.family.tiles == "runs":
        return {"pixel_values": ones(1, vision.temporal_patch_size, vision.patch_size, vision.patch_size, channels)}
    seen = getattr(vision, "sam_config", vision).image_size
    size = seen if isinstance(seen, int) else seen[0]
    if host.family.tiles == "packed":
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        tiles = image_size_to_num_patches([size, size], host.model.config.image_grid_pinpoints, size)
        sizes = torch.tensor([[size, size]], device=device)
        return {"pixel_values": ones(1, tiles, channels, size, size), "image_sizes": sizes}
    if host.family.tiles == "square":
        real = {"pixel_attention_mask": torch.ones(1, 1, device=device, dtype=torch.bool)}
        return {"pixel_values": ones(1, 1, channels, size, size), **(real if "tile_fine_mask" in names else {})}
    if host.model.config.model_type == "perception_lm":  # tiles by image
        return {"pixel_values": ones(1, 1, channels, size, size)}
    given = {"pixel_values": ones(1, channels, size, size)}
    if "high_res_pixel_values" in names:
        high = host.model.config.high_res_vision_config.image_size
        given["high_res_pixel_values"] = ones(1, channels, high, high)
    if vision.model_type == "pixtral":
        given["image_sizes"] = torch.tensor([[size, size]], device=device)
    return given


def _patch_grid(vision: Any, names: tuple[str, ...], channels: int, ones: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The patches of one token, flat or as the tower takes them, and how many rows and columns they have."""
    size, merge = int(vision.patch_size), _first(vision, ("spatial_merge_size", "merge_size", "merge_kernel_size"))
    rows = merge
    patch: tuple[int, ...] = (channels * _first(vision, ("temporal_patch_size", "patch_temporal")) * size**2,)
    if vision.model_type in ("kimi_k25_vision", "paddleocr_vl_vision"):
        patch = (channels, size, size)
    elif vision.model_type == "inkling2_vision":  # takes tokens, not patches
        rows, patch = 1, (merge * size, merge * size, channels)
    values = ones(rows * rows, *patch)
    grid = torch.tensor([[1, rows, rows]], device=values.device)
    made = {"pixel_values": values, "image_grid_thw": grid}
    return made | ({"image_merge_sizes": grid[:, 1]} if "image_merge_sizes" in names else {})


def _without_tower(config: Any, names: tuple[str, ...], ones: Callable[..., Tensor]) -> dict[str, Tensor]:
    """One patch, or as many pixels as a codebook needs for four words; its norms fail on one."""
    if not hasattr(config, "vq_config"):
        return {"pixel_values": ones(1, 1, config.num_channels * config.patch_size**2)}
    side = 2 ** len(config.vq_config.channel_multiplier)
    values = ones(1, config.vq_config.in_channels, side, side)
    given = {"image_sizes": torch.tensor([[side, side]], device=values.device)} if "image_sizes" in names else {}
    return {"pixel_values": values, **given}


def _line_of_patches(
    config: Any, names: tuple[str, ...], channels: int, ones: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The patches of one token, side by side, and how many rows and columns they have."""
    size = int(config.vision_config.patch_size)
    if "image_grid_hw" in names:
        side = round(1 / config.downsample_ratio)
        values = ones(side**2, channels * size**2)
        return {"pixel_values": values, "image_grid_hw": torch.tensor([[side, side]], device=values.device)}
    side = int(config.vision_config.window_kernel_size[0]) * int(config.merge_kernel_size[0]) ** config.merger_times
    values = ones(1, channels, size, side**2 * size)
    return {"pixel_values": values, "target_sizes": torch.tensor([[side, side]], device=values.device)}


def _first(vision: Any, names: tuple[str, ...]) -> int:
    """The first of these settings that a tower has, one number for both sides; 1 where it has none."""
    found = next((getattr(vision, name) for name in names if hasattr(vision, name)), 1)
    return int(found if isinstance(found, int) else found[0])


def _placed_patches(vision: Any, channels: int, ones: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The patches of one token with their columns and rows; without a tower they come merged."""
    merged = hasattr(vision, "model_patch_size")
    side = 1 if merged else int(vision.pooling_kernel_size)
    values = ones(1, side**2, channels * (vision.model_patch_size if merged else vision.patch_size) ** 2)
    line = torch.arange(side, device=values.device)
    return {"pixel_values": values, "image_position_ids": torch.cartesian_prod(line, line)[None]}
