"""Encode the images of a batch once, and observe on the way what a pruner may need."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import isqrt, prod
from typing import Any

import torch

from trimtab.anatomy.families import Host, Modality, open_host
from trimtab.anatomy.frames import drop_masked, frame_tiles
from trimtab.anatomy.frozen_parts import without_frozen_gradients
from trimtab.anatomy.inside import call_inside
from trimtab.anatomy.tower import OBSERVABLE_TOWERS, Observed, block_trouble, observe_tower
from trimtab.anatomy.tower_stop import stop_tower
from trimtab.anatomy.views import view_filler, view_tiles
from trimtab.errors import HostLibraryError, SettingError
from trimtab.ops.host import copy_to, to_device
from trimtab.ops.label_head import IGNORED
from trimtab.ops.repack import gather_places, repack_index
from trimtab.shapes import Bool, Float, Int, Tensor

NOTHING: frozenset[str] = frozenset()
SHAPES = ("image_sizes", "image_position_ids", "video_position_ids", "spatial_shapes", "image_grids", "video_grids")
"""Arguments of encoders that take images of any shape; how many tokens come does not tell rows from columns."""
PATCHES = ("image_grid_hw", "target_sizes", "target_sizes_videos")
"""Arguments with rows and columns of patches of each image or frame."""
SIZES = (
    "image_sizes", "image_grid_thw", "video_grid_thw", "image_grid_hw", "target_sizes", "target_sizes_videos",
    "image_grids", "video_grids", "patches_grid", "num_local_patches", "batch_num_images", "num_frames_per_video",
    "video_merge_sizes",
)  # fmt: skip
"""Arguments of encoders with sizes and counts that decide shapes, so that the host must know them. Where the batch
carries ``row_notes`` with copies that never left the host (``sizes``), these are read, and the host need not wait."""
CHOICES = ("vision_feature_layer", "vision_feature_select_strategy")
TowerContext = Callable[[Host, frozenset[str]], contextlib.AbstractContextManager[Observed]]
"""What observes the vision tower, and may stand in for it; `observe_tower` is one."""
OBSERVED = ("hidden", "cls_attention", "keys")


@dataclass(frozen=True)
class EncodedImages:
    """Visual features of a batch, one block per entry that the model itself would scatter.

    A block is one image, one video, or one tile where the model keeps tiles apart; in the Idefics3 and SmolVLM
    families it is all images of one row.
    Blocks of images stand before blocks of videos.

    Attributes:
        outputs: What the model's own encoders returned, by modality; `Host.features` finds the blocks in them.
        counts: How many blocks each modality has.
        blocks: Features of each block, [token, width], with gradients where the encoder has them.
        tiles: How many tokens of each block belong to each of its tiles, in order; pruners choose per tile. Frames
            of a video are tiles. Tokens behind the last tile carry no picture (the newline row of a video).
        grid: Rows and columns of a tile, where all tiles have the same and it is known; else None.
        filler: For each block which tokens carry no picture (newline rows) and how many, or None for none.
        hidden: States of the vision tower before the projector per block, or None where not asked for.
        cls_attention: Attention of the class token per block, or None.
        keys: Key vectors per block, or None.
        any_size: Whether tiles are as large as their pictures happen to be, so that some may be very small.
    """

    outputs: dict[str, Any]
    counts: dict[str, int]
    blocks: list[Float[Tensor, "token width"]]
    tiles: list[list[int]]
    grid: tuple[int, int] | None
    filler: list[tuple[Bool[Tensor, "token"], int] | None]
    hidden: list[Float[Tensor, "token channel"]] | None = None
    cls_attention: list[Float[Tensor, "token"]] | None = None
    keys: list[Float[Tensor, "token key"]] | None = None
    any_size: bool = False


@dataclass(frozen=True)
class Words:
    """The words around the blocks of a batch, each row's once.

    Attributes:
        embeddings: [row, word, width].
        counts: Which of them count.
        block_rows: Row of each block.
    """

    embeddings: Float[Tensor, "row word width"]
    counts: Bool[Tensor, "row word"]
    block_rows: list[int]

    def around(self, blocks: Sequence[int]) -> tuple[Float[Tensor, "tile word width"], Bool[Tensor, "tile word"]]:
        """Return the words of some tiles and which of them count, without a copy where all are of one row.

        Args:
            blocks: The block of each tile.
        """
        rows = [self.block_rows[block] for block in blocks]
        if len(set(rows)) == 1:
            one = slice(rows[0], rows[0] + 1)
            return self.embeddings[one].expand(len(rows), -1, -1), self.counts[one].expand(len(rows), -1)
        index = to_device(rows, self.counts.device)
        return self.embeddings[index], self.counts[index]


def has_images(batch: Mapping[str, Any]) -> bool:
    """Whether a batch carries images or videos.

    Raises:
        SettingError: It carries images under the old name that the processor of Video-LLaVA gives them.
    """
    if batch.get("pixel_values_images") is not None:
        raise SettingError(
            "pixel_values_images is an old name, which transformers is about to drop: the images must come as "
            "pixel_values. Rename the entry, or give the image processor return_legacy_image_output=False."
        )
    return batch.get("pixel_values") is not None or batch.get("pixel_values_videos") is not None


def supplied_needs(model: Any) -> frozenset[str]:
    """What a pruner may ask of this model beyond the features; a subset of ``trimtab.pruners.NEEDS``."""
    host = open_host(model)
    if host.family.width:  # words and features do not compare
        return NOTHING
    if not host.family.tower or host.model.config.vision_config.model_type not in OBSERVABLE_TOWERS:
        return frozenset({"text"})
    return frozenset({"text", "hidden"} if block_trouble(host) else {"text", "hidden", "cls_attention", "keys"})


def encode_images(
    model: Any, batch: Mapping[str, Any], needs: frozenset[str] = NOTHING, tower: TowerContext | None = None
) -> EncodedImages:
    """Encode the images and videos of a batch once, through the model's own encoders.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward; entries that its encoders take are used.
        needs: What to observe on the way, a subset of `supplied_needs`.
        tower: What stands for `observe_tower` while images are encoded, or None; not asked for videos.

    Returns:
        The features and what was observed, block by block.

    Raises:
        SettingError: A need that this model, or a video, cannot supply, videos that it does not take, or another
            choice of vision layers than the configuration's.
        HostLibraryError: An encoder returned something that this release does not know.
    """
    host = open_host(model)
    _refuse_choices(host, batch)
    missing = needs - supplied_needs(host)
    if missing:
        known = host.family.tower and host.model.config.vision_config.model_type in OBSERVABLE_TOWERS
        raise SettingError(
            f"{type(host.model).__name__} cannot supply {', '.join(sorted(missing))}, which the pruner needs. "
            f"{block_trouble(host) if known else ''}Choose one that needs features only, such as 'divprune'."
        )
    kinds = [kind for kind in host.modalities if batch.get(kind.pixels) is not None]
    if batch.get("pixel_values_videos") is not None and "video" not in [kind.name for kind in kinds]:
        raise SettingError(
            f"The batch holds videos (pixel_values_videos), but those of {type(host.model).__name__} are not "
            "supported. Give images; trimtab.check_model(model).notes says more."
        )
    parts = [_encode(host, kind, batch, needs, tower if kind.name == "image" else None) for kind in kinds]
    grids = {part.grid for part in parts}
    return EncodedImages(
        outputs={name: output for part in parts for name, output in part.outputs.items()},
        counts={name: count for part in parts for name, count in part.counts.items()},
        blocks=[block for part in parts for block in part.blocks],
        tiles=[tiles for part in parts for tiles in part.tiles],
        grid=grids.pop() if len(grids) == 1 else None,
        filler=[filler for part in parts for filler in part.filler],
        any_size=any(part.any_size for part in parts),
        **({name: getattr(parts[0], name) for name in OBSERVED} if len(parts) == 1 else {}),
    )


def _refuse_choices(host: Host, batch: Mapping[str, Any]) -> None:
    """Refuse another choice of vision layers than the configuration's, which a forward of LLaVA takes per call."""
    for name in CHOICES:
        given, own = batch.get(name), getattr(host.model.config, name, None)
        if given is not None and given != own:
            raise SettingError(
                f"{name}={given!r} came with the batch, but DualSpeed encodes images as the configuration says "
                f"({own!r}). Set model.config.{name}, and leave it out of the call."
            )


def _encode(
    host: Host, kind: Modality, batch: Mapping[str, Any], needs: frozenset[str], tower: TowerContext | None
) -> EncodedImages:
    """Encode what a batch has of one modality."""
    observed_needs = needs - {"text"}
    if kind.name == "video" and observed_needs:
        raise SettingError(
            f"The batch holds videos, for which {', '.join(sorted(observed_needs))} cannot be supplied. Choose a "
            "pruner that needs features only, such as 'divprune'."
        )
    arguments = {name: batch[name] for name in kind.arguments if batch.get(name) is not None}
    parameters = dict(zip(kind.arguments, kind.parameters, strict=True))
    known = getattr(batch.get("row_notes"), "sizes", {})
    on_host = {name: known[name] for name in SIZES if name in arguments and name in known}
    if host.family.tiles == "packed" and "image_sizes" in arguments:
        # Read image by image, by the encoder as well.
        if "image_sizes" not in on_host:
            on_host["image_sizes"] = torch.as_tensor(arguments["image_sizes"]).cpu()
        arguments["image_sizes"] = on_host["image_sizes"]
    watch = tower or (observe_tower if observed_needs else None)
    observing = contextlib.nullcontext() if watch is None else watch(host, observed_needs)
    # stop_tower leaves towers alone whose forward somebody has replaced, so it comes before what replaces it here.
    with observing as observed, stop_tower(host), without_frozen_gradients(host):
        named = {parameters[name]: _typed(host, value) for name, value in arguments.items()}
        output = call_inside(host.base, partial(getattr(host.base, kind.encoder), **named, return_dict=True))
    arguments |= on_host
    entries = _entries(host, kind, arguments, batch, output)
    tiles = _tiles(host, kind, arguments, entries, output)
    if kind.mask is not None and batch.get(kind.mask) is not None:
        output, tiles = drop_masked(output, tiles, batch[kind.mask])
        entries = list(output.pooler_output)
    blocks = [entry.flatten(0, 1) if entry.dim() == 3 else entry for entry in entries]
    return EncodedImages(
        outputs={kind.name: output},
        counts={kind.name: len(blocks)},
        blocks=blocks,
        tiles=tiles,
        grid=_grid(host, kind, arguments, tiles),
        filler=_filler(host, kind, arguments, blocks, output),
        any_size=_any_size(host, kind, arguments),
        **_per_block(host, arguments, observed),
    )


def encode_stock(model: Any, kind: Modality, arguments: Mapping[str, Any]) -> Any:
    """Return the features that the stock model hands to its language model, encoded with all that it does on the way.

    Args:
        model: The model, or what `open_host` made of it.
        kind: One of its modalities.
        arguments: Those of the encoder, by its own names; None for those that are not given.

    Returns:
        A tensor or a list of them.
    """
    host = open_host(model)
    given = {name: _typed(host, value) for name, value in arguments.items() if value is not None}
    return host.features(getattr(host.base, kind.encoder)(**given, return_dict=True))


def _typed(host: Host, value: Any) -> Any:
    """What the model's own forward would hand to the encoder."""
    if not host.family.casts_pixels or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    weight = host.model.get_input_embeddings().weight
    return value.to(weight.dtype if weight.is_floating_point() else host.model.dtype)


def _any_size(host: Host, kind: Modality, arguments: dict[str, Any]) -> bool:
    if host.family.tiles == "packed":  # the base view has one size, and tiles are as large
        return False
    shaped = any(arguments.get(name) is not None for name in (f"{kind.name}_grid_thw", *SHAPES, *PATCHES))
    return shaped or host.family.tiles == "runs" or arguments[kind.pixels].dim() < 4  # flat patches


def _entries(
    host: Host, kind: Modality, arguments: dict[str, Any], batch: Mapping[str, Any], output: Any
) -> list[Tensor]:
    """The features of each block, [token, width] or [frame, token, width]."""
    found = host.features(output)
    if kind.name == "video" and isinstance(found, Tensor) and found.dim() == 3:
        values = arguments[kind.pixels]
        if values.dim() == 5 and found.shape[0] == values.shape[0] * values.shape[1]:  # one entry per frame
            found = found.unflatten(0, values.shape[:2])
    entries = list(found) if isinstance(found, Tensor | list | tuple) else []
    if isinstance(found, Tensor) and host.family.tiles == "runs":
        entries = _split_at_runs(found.flatten(0, -2), batch["input_ids"], kind)
    if not all(isinstance(entry, Tensor) and entry.dim() in (2, 3) for entry in entries) or found is None:
        raise HostLibraryError(
            f"{type(host.model).__name__}.{kind.encoder} returned {type(output).__name__} with a "
            f"{host.family.features} of {type(found).__name__}, where trimtab expects [token, width] features for "
            f"every {kind.name}. This release of transformers may be newer than trimtab; install the newest trimtab, "
            "or an older transformers."
        )
    return entries


def _split_at_runs(features: Tensor, ids: Int[Tensor, "row seq"], kind: Modality) -> list[Tensor]:
    """Cut [token, width] features where placeholders do not stand side by side; all in one if their counts differ."""
    found = torch.stack([ids == token for token in kind.token_ids]).any(0).cpu()
    holds = torch.nn.functional.pad(found, (1, 0)).flatten()
    starts = holds & ~holds.roll(1)
    runs: list[int] = torch.bincount(starts.cumsum(0)[holds] - 1).tolist()
    return list(features.split(runs)) if sum(runs) == features.shape[0] else [features]


def question_embeddings(
    model: Any,
    batch: Mapping[str, Any],
    placeholder: Bool[Tensor, "row seq"],
    block_rows: list[int],
    most: int | None = None,
) -> Words:
    """Embeddings of the words around each block that are not answers; waits for the device once without ``most``.

    Words are the tokens of the block's row that are neither placeholders nor padding nor supervised, so an answer
    can never steer which tokens are kept. Only they are embedded.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward with ``input_ids``.
        placeholder: Which places hold a visual token.
        block_rows: Row of each block.
        most: A number of words that no row has more of, where the host knows one.

    Returns:
        The words of each row.
    """
    ids: Int[Tensor, "row seq"] = batch["input_ids"]
    words = ~placeholder
    if batch.get("attention_mask") is not None:
        words = words & batch["attention_mask"].bool()
    if batch.get("labels") is not None:
        words = words & (batch["labels"] == IGNORED)
    length = int(words.sum(1).max()) if most is None else most
    source, counts = repack_index(words, max(1, length), pad_left=False)
    with torch.no_grad():
        embeddings = open_host(model).model.get_input_embeddings()(gather_places(ids, source, counts, 0))
    return Words(embeddings, counts, block_rows)


def _tiles(
    host: Host, kind: Modality, arguments: dict[str, Any], entries: list[Tensor], output: Any
) -> list[list[int]]:
    if kind.name == "video":
        return frame_tiles(host.model.config.vision_config, arguments, entries)
    if (views := arguments.get("image_grids")) is not None:  # rows and columns of a small view, then of a large one
        return [[one for one in (rows * columns, high * wide) if one] for rows, columns, high, wide in views.tolist()]
    if host.family.tiles == "views":
        return view_tiles(host.base, arguments, entries, output)
    if host.family.tiles != "square":
        return [[entry.shape[:-1].numel()] for entry in entries]
    # The vision tower saw the tiles one by one and without those of padding.
    size = sum(entry.shape[0] for entry in entries) // max(1, output.last_hidden_state.shape[0])
    return [[size] * (entry.shape[0] // max(1, size)) for entry in entries]


def _grid(host: Host, kind: Modality, arguments: dict[str, Any], tiles: list[list[int]]) -> tuple[int, int] | None:
    """Rows and columns that all tiles share, or None."""
    if (
        not host.family.raster
        or host.family.tiles in ("packed", "views")
        or any(arguments.get(name) is not None for name in SHAPES)
    ):
        return None
    named = (arguments.get(name) for name in (f"{kind.name}_grid_thw", *PATCHES))
    patches = next((given for given in named if given is not None), None)
    if patches is not None:  # images of any shape: frames, rows and columns of patches, several of which make a token
        listed = patches.tolist()
        merge = max(1, isqrt(sum(map(prod, listed)) // max(1, sum(map(sum, tiles)))))
        shapes = {(rows // merge, columns // merge) for *_, rows, columns in listed}
        shape = next(iter(shapes))
        fits = all(count == shape[0] * shape[1] for block in tiles for count in block)
        return shape if len(shapes) == 1 and fits else None
    values = arguments[kind.pixels]
    if values.dim() < 4 or values.shape[-2] != values.shape[-1]:
        return None
    counts = {count for block in tiles for count in block}
    side = isqrt(next(iter(counts))) if len(counts) == 1 else 0
    return (side, side) if side * side in counts else None


def _filler(
    host: Host, kind: Modality, arguments: dict[str, Any], blocks: list[Tensor], output: Any
) -> list[tuple[Tensor, int] | None]:
    if kind.name == "image" and host.family.tiles == "views":
        return view_filler(host.base, arguments, blocks, output)
    if kind.name == "image" and host.family.tiles == "lines":
        return _line_filler(host, arguments, [block.device for block in blocks])
    if kind.name == "video" or host.family.tiles != "packed":
        return [None] * len(blocks)
    marks = _pack(host, arguments, None, newline=0.0)
    device = arguments["pixel_values"].device
    return [(copy_to(mark[:, 0] == 0, device), int((mark == 0).sum())) for mark in marks]


def _line_filler(host: Host, arguments: dict[str, Any], devices: list[torch.device]) -> list[tuple[Tensor, int] | None]:
    """First token, newlines and last token of images in lines."""
    side = int(host.model.config.vision_config.spatial_merge_size)
    grids = arguments["image_grid_thw"]
    found: list[tuple[Tensor, int] | None] = []
    for (_, rows, columns), device in zip(grids.tolist(), devices, strict=True):
        lines = torch.zeros(rows // side, columns // side + 1, dtype=torch.bool, device=device)
        lines[:, -1] = True
        found.append((torch.nn.functional.pad(lines.flatten(), (1, 1), value=True), rows // side + 2))
    return found


def _pack(host: Host, arguments: dict[str, Any], values: Tensor | None, newline: float) -> list[Tensor]:
    """Let the model lay out [tile, patch, channel] values (None for ones on the CPU) as it lays out its features."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = host.model.config
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    patches = int(side * Fraction(getattr(config, "downsample_rate", 1))) ** 2
    sizes = arguments["image_sizes"]
    several = arguments.get("batch_num_images")  # LLaVA-OneVision cuts only images that stand alone into tiles
    alone = [True] * len(sizes) if several is None else [n == 1 for n in several.tolist() for _ in range(n)]
    counts = [
        image_size_to_num_patches(image_size=one, grid_pinpoints=config.image_grid_pinpoints, patch_size=size)
        if cut
        else 1
        for one, cut in zip(sizes, alone, strict=True)
    ]
    tiles = torch.ones(sum(counts), patches, 1) if values is None else values
    known = inspect.signature(host.base.pack_image_features).parameters
    options = {
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": arguments.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None),
    }
    packed = host.base.pack_image_features(
        torch.split(tiles, counts, dim=0),
        sizes,
        image_newline=tiles.new_full((tiles.shape[-1],), newline),
        **{name: value for name, value in options.items() if name in known},
    )
    return list(packed[0] if isinstance(packed, tuple) else packed)


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
