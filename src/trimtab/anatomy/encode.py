"""Encode the images of a batch once, and observe on the way what a pruner may need."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from trimtab.anatomy.families import Host, open_host
from trimtab.anatomy.tower import OBSERVABLE_TOWERS, Observed, observe_tower
from trimtab.errors import SettingError, UnsupportedModelError
from trimtab.ops.label_head import IGNORED
from trimtab.shapes import Bool, Float, Int, Tensor

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EncodedImages:
    """Visual features of a batch, one block per entry that the model itself would scatter.

    A block is one image, except in the Idefics3 and SmolVLM families, where it is all images of one row.

    Attributes:
        output: What the model's own image encoder returned; its ``pooler_output`` holds the blocks.
        blocks: Features of each block, [token, width], with gradients where the encoder has them.
        tiles: How many tokens of each block belong to each of its tiles, in order; pruners choose per tile.
        grid: Rows and columns of a tile, where all tiles have the same and it is known; else None.
        filler: For each block which tokens carry no picture (newline rows) and how many, or None for none.
        hidden: States of the vision tower before the projector per block, or None where not asked for.
        cls_attention: Attention of the class token per block, or None.
        keys: Key vectors per block, or None.
    """

    output: Any
    blocks: list[Float[Tensor, "token width"]]
    tiles: list[list[int]]
    grid: tuple[int, int] | None
    filler: list[tuple[Bool[Tensor, "token"], int] | None]
    hidden: list[Float[Tensor, "token channel"]] | None = None
    cls_attention: list[Float[Tensor, "token"]] | None = None
    keys: list[Float[Tensor, "token key"]] | None = None


def has_images(batch: Mapping[str, Any]) -> bool:
    """Whether a batch carries images.

    Raises:
        UnsupportedModelError: It carries videos, whose tokens are not pruned.
    """
    if batch.get("pixel_values_videos") is not None:
        raise UnsupportedModelError(
            "The batch holds pixel_values_videos, but trimtab prunes image tokens only. Train this data without "
            "trimtab, or give the frames as images."
        )
    return batch.get("pixel_values") is not None


def supplied_needs(model: Any) -> frozenset[str]:
    """What a pruner may ask of this model beyond the features; a subset of ``trimtab.pruners.NEEDS``."""
    host = open_host(model)
    if host.family.tower and host.model.config.vision_config.model_type in OBSERVABLE_TOWERS:
        return frozenset({"text", "hidden", "cls_attention", "keys"})
    return frozenset({"text"})


def encode_images(model: Any, batch: Mapping[str, Any], needs: frozenset[str] = NOTHING) -> EncodedImages:
    """Encode the images of a batch once, through the model's own encoder.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward; entries that its image encoder takes are used.
        needs: What to observe on the way, a subset of `supplied_needs`.

    Returns:
        The features and what was observed, block by block.

    Raises:
        SettingError: A need that this model cannot supply.
    """
    host = open_host(model)
    missing = needs - supplied_needs(host)
    if missing:
        raise SettingError(
            f"{type(host.model).__name__} cannot supply {', '.join(sorted(missing))}, which the pruner needs. Choose "
            "one that needs features only, such as 'divprune'."
        )
    arguments = {name: batch[name] for name in host.encoder_names if batch.get(name) is not None}
    with observe_tower(host, needs) if needs - {"text"} else contextlib.nullcontext() as observed:
        output = host.base.get_image_features(**arguments, return_dict=True)
    blocks = list(output.pooler_output)
    tiles = _tiles(host, blocks)
    return EncodedImages(
        output=output,
        blocks=blocks,
        tiles=tiles,
        grid=_grid(host, arguments, tiles),
        filler=_filler(host, arguments, len(blocks)),
        **_per_block(host, arguments, observed),
    )


def question_embeddings(
    model: Any, batch: Mapping[str, Any], placeholder: Bool[Tensor, "row seq"], block_rows: list[int]
) -> tuple[Float[Tensor, "image word width"], Bool[Tensor, "image word"]]:
    """Embeddings of the words around each block that are not answers.

    Words are the tokens of the block's row that are neither placeholders nor padding nor supervised, so an answer
    can never steer which tokens are kept.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward with ``input_ids``.
        placeholder: Which places hold a visual token.
        block_rows: Row of each block.

    Returns:
        Embeddings for each block, and which of them count.
    """
    ids: Int[Tensor, "row seq"] = batch["input_ids"]
    words = ~placeholder
    if batch.get("attention_mask") is not None:
        words = words & batch["attention_mask"].bool()
    if batch.get("labels") is not None:
        words = words & (batch["labels"] == IGNORED)
    rows = torch.tensor(block_rows, device=ids.device)
    with torch.no_grad():
        embedded = open_host(model).model.get_input_embeddings()(ids)
    return embedded[rows], words[rows]


def _tiles(host: Host, blocks: list[Tensor]) -> list[list[int]]:
    if host.family.tiles != "square":
        return [[block.shape[0]] for block in blocks]
    config = host.model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    size = patches // config.scale_factor**2
    return [[size] * (block.shape[0] // size) for block in blocks]


def _grid(host: Host, arguments: dict[str, Any], tiles: list[list[int]]) -> tuple[int, int] | None:
    """Rows and columns that all tiles share, or None."""
    if host.family.tiles == "packed" or arguments.get("image_sizes") is not None:
        return None
    patches = arguments.get("image_grid_thw")
    if patches is not None:  # images of any shape: frames, rows and columns of patches, several of which make a token
        merge = int(host.model.config.vision_config.spatial_merge_size)
        shapes = {(rows // merge, columns // merge) for frames, rows, columns in patches.tolist() if frames == 1}
        still = bool((patches[:, 0] == 1).all())
        return next(iter(shapes)) if still and len(shapes) == 1 else None
    counts = {count for block in tiles for count in block}
    side = isqrt(next(iter(counts))) if len(counts) == 1 else 0
    return (side, side) if side * side in counts else None


def _filler(host: Host, arguments: dict[str, Any], count: int) -> list[tuple[Tensor, int] | None]:
    if host.family.tiles != "packed":
        return [None] * count
    marks = _pack(host, arguments, None, newline=0.0)
    device = arguments["pixel_values"].device
    return [((mark[:, 0] == 0).to(device), int((mark == 0).sum())) for mark in marks]


def _pack(host: Host, arguments: dict[str, Any], values: Tensor | None, newline: float) -> list[Tensor]:
    """Let the model lay out [tile, patch, channel] values (None for ones on the CPU) as it lays out its features."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = host.model.config
    size = config.vision_config.image_size
    patches = (size // config.vision_config.patch_size) ** 2
    counts = [
        image_size_to_num_patches(image_size=one, grid_pinpoints=config.image_grid_pinpoints, patch_size=size)
        for one in arguments["image_sizes"]
    ]
    tiles = torch.ones(sum(counts), patches, 1) if values is None else values
    packed, _ = host.base.pack_image_features(
        torch.split(tiles, counts, dim=0),
        arguments["image_sizes"],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=tiles.new_full((tiles.shape[-1],), newline),
    )
    return list(packed)


def _per_block(host: Host, arguments: dict[str, Any], observed: Observed | None) -> dict[str, list[Tensor]]:
    """Sort what was observed per tile, [tile, patch, channel], into blocks."""
    if observed is None:
        return {}
    blocks: dict[str, list[Tensor]] = {}
    for name, values in observed.items():
        wide = values.unsqueeze(-1) if values.dim() == 2 else values
        found = _pack(host, arguments, wide, newline=0.0) if host.family.tiles == "packed" else list(wide)
        blocks[name] = [one[:, 0] for one in found] if values.dim() == 2 else found
    return blocks
