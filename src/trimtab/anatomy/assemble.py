"""Give a model fewer visual tokens than its placeholders announce.

A batch announces every visual token with a placeholder in ``input_ids``. `assemble` removes the surplus placeholders
from every tensor that has a value per place, packs the rows anew, and hands the kept features over through
``mm_encoder_outputs``; the stock model then runs unmodified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from trimtab.anatomy.encode import EncodedImages
from trimtab.anatomy.families import Host, open_host
from trimtab.anatomy.pack import Pack, Rectangle, lay_out
from trimtab.anatomy.packed_attention import packed_arguments
from trimtab.anatomy.positions import full_positions, with_text_axis
from trimtab.anatomy.row_layout import (
    NOTES,
    RowLayout,
    find_placeholders,
    place_types,
    read_rows,
    real_places,
)
from trimtab.errors import SettingError
from trimtab.ops.host import to_device
from trimtab.ops.label_head import IGNORED
from trimtab.ops.repack import close_gaps
from trimtab.shapes import Float, Int, Tensor

Positions = Literal["renumber", "original"]


def full_inputs(model: Any, batch: Mapping[str, Any], encoded: EncodedImages) -> dict[str, Any]:
    """Arguments of the model for all its visual tokens, with images that were encoded before.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward.
        encoded: Its images.

    Returns:
        The same arguments, with features in place of pixels; where positions are multimodal and the batch does not
        say what stands at each place (``mm_token_type_ids``), that too.
    """
    host = open_host(model)
    pixels = {name for name in host.encoder_names if name.startswith("pixel_")}
    done = pixels | {kind.mask for kind in host.modalities} | {NOTES}
    inputs = {name: value for name, value in batch.items() if name not in done}
    counts = host.rotary == "multimodal" and "mm_token_type_ids" in host.forward_names
    if counts and batch.get("mm_token_type_ids") is None and batch.get("position_ids") is None:
        inputs["mm_token_type_ids"] = place_types(find_placeholders(host, batch, real_places(batch), encoded))
    return {**inputs, "mm_encoder_outputs": dict(encoded.outputs)}


def assemble(
    model: Any,
    batch: Mapping[str, Any],
    encoded: EncodedImages,
    kept: Sequence[Int[Tensor, "kept"]],
    *,
    prefix: Float[Tensor, "prefix width"] | None = None,
    tokens: Sequence[Float[Tensor, "kept width"]] | None = None,
    positions: Positions = "renumber",
    layout: RowLayout | None = None,
    rows: Sequence[int] | None = None,
    packed: bool = False,
) -> dict[str, Any]:
    """Arguments of the model for some of its visual tokens.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward.
        encoded: Its images.
        kept: For each block the tokens to keep, ascending.
        prefix: Rows to put in front of every block, or None. They take places of dropped tokens; a block that keeps
            all its tokens has none for them and stays as it is. Where the first of a block's tiles drops fewer tokens
            than the prefix has rows, the tokens behind move on: into places of the next tile, past what the text has
            between the two.
        tokens: For each block the features to hand over in place of the kept ones (merged tokens), or None.
        positions: ``"renumber"`` closes the gaps, ``"original"`` keeps the positions of the full sequence; prefix
            rows then share the position of the block's first token.
        layout: From `read_rows`, where the caller has it already.
        rows: The rows of the batch to take, ascending and at least one, or None for all.
        packed: Put the rows one behind the other into one, with attention only within each
            (`trimtab.anatomy.packed_attention`), instead of beside one another with padding.

    Returns:
        Arguments of the model: every tensor with a value per place made shorter, images replaced by features.

    Raises:
        SettingError: A block drops some tokens, but fewer than the prefix needs, indices for another number of
            blocks came, or the attention of the model cannot be packed.
        TokenMismatchError: Placeholders and features do not fit.
    """
    host = open_host(model)
    sizes = [block.shape[0] for block in encoded.blocks]
    if len(kept) != len(sizes):
        raise SettingError(f"kept must have one entry for each of the {len(sizes)} blocks, but {len(kept)} came.")
    layout = read_rows(host, batch, encoded) if layout is None else layout
    whole = [index.shape[0] == size for size, index in zip(sizes, kept, strict=True)]
    fronts = [0 if prefix is None or uncut else prefix.shape[0] for uncut in whole]
    counts = [front + index.shape[0] for front, index in zip(fronts, kept, strict=True)]
    for block, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if count > size:
            raise SettingError(
                f"{count - fronts[block]} of {size} visual tokens are kept of block {block} (row "
                f"{layout.block_rows[block]}), which leaves fewer than the {fronts[block]} places that the prefix "
                "needs. Keep fewer, or all of them, or give a shorter prefix."
            )
    slots = _slots(sizes, kept, fronts, layout.place.device)
    keep = layout.real.clone()
    keep.view(-1)[layout.place] = slots
    places = lay_out(keep, _lengths(layout, sizes, counts), pad_left=layout.pad_left, rows=rows, packed=packed)
    features = list(tokens) if tokens is not None else [b[i] for b, i in zip(encoded.blocks, kept, strict=True)]
    if prefix is not None:
        features = [torch.cat((prefix[:n].to(one.dtype), one)) for n, one in zip(fronts, features, strict=True)]

    # Without a mask transformers takes gaps in the positions for the borders of packed sequences.
    gaps = positions == "original"
    short = _shorten(host, batch, places, layout, needs_mask=not packed and (gaps or places.padded))
    given = batch.get("position_ids") is not None
    if host.rotary == "multimodal" or gaps or given or packed:
        full = full_positions(host, batch, layout.real, layout.types, from_row=packed)
        if host.rotary == "line" and positions == "renumber":
            full = full - (layout.real & ~keep).long().cumsum(1)
        else:
            full = _move_to_origin(full, slots, _origins(sizes, kept, fronts, slots.device), layout)
        if host.rotary == "multimodal":
            short.pop("mm_token_type_ids", None)
            if positions == "renumber":
                full = close_gaps(full, keep)
        short["position_ids"] = places.take(full, 0)
        if full.shape[0] == 1 and host.rotary == "line":
            short["position_ids"] = short["position_ids"][0]
    if isinstance(places, Pack):
        if host.rotary == "multimodal":
            short["position_ids"] = with_text_axis(host, short["position_ids"], places.lengths)
        short |= packed_arguments(
            host, places.lengths, places.index.device, gaps=(gaps or given) and host.rotary == "line"
        )
    wanted = set(layout.block_rows if rows is None else rows)
    taken = [block for block, row in enumerate(layout.block_rows) if row in wanted]
    if encoded.blocks:
        short["mm_encoder_outputs"] = _hand_over(host, encoded, features, kept, fronts, taken)
    return short


def _slots(sizes: list[int], kept: Sequence[Tensor], fronts: list[int], device: torch.device) -> Tensor:
    """Which placeholders stay: those of kept tokens, and the earliest others for the prefix; [place]."""
    widest = max(sizes, default=0)
    stays = torch.zeros(len(sizes), widest, dtype=torch.bool, device=device)
    for row, index in enumerate(kept):
        stays[row].index_fill_(0, index, True)
    if any(fronts):
        inside = torch.arange(widest, device=device) < to_device(sizes, device)[:, None]
        free = inside & ~stays
        stays |= free & (free.cumsum(1) <= to_device(fronts, device)[:, None])
    total, lengths = sum(sizes), to_device(sizes, device, torch.long)
    ahead = torch.arange(len(sizes), device=device) * widest - (lengths.cumsum(0) - lengths)  # empty places before it
    places = torch.arange(total, device=device) + ahead.repeat_interleave(lengths, output_size=total)
    return stays.flatten()[places]


def _origins(sizes: list[int], kept: Sequence[Tensor], fronts: list[int], device: torch.device) -> Tensor:
    """For each handed-over row the placeholder whose position it takes; prefix rows take the block's first."""
    parts, start = [], 0
    for size, front, index in zip(sizes, fronts, kept, strict=True):
        parts += [torch.full((front,), start, device=device), index.to(device) + start]
        start += size
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=device)


def _lengths(layout: RowLayout, sizes: list[int], counts: list[int]) -> list[int]:
    left = list(layout.lengths)
    for row, size, count in zip(layout.block_rows, sizes, counts, strict=True):
        left[row] -= size - count
    return left


def _shorten(
    host: Host, batch: Mapping[str, Any], places: Rectangle | Pack, layout: RowLayout, needs_mask: bool
) -> dict[str, Any]:
    shape = layout.real.shape
    config = host.model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    if pad is None or pad < 0 or pad in host.image_token_ids:
        pad = next(token for token in range(len(host.image_token_ids) + 1) if token not in host.image_token_ids)
    padding = {"input_ids": pad, "labels": IGNORED}
    short: dict[str, Any] = {}
    for name, value in batch.items():
        if name in host.encoder_names or name in ("position_ids", "mm_encoder_outputs", NOTES):
            continue
        per_place = isinstance(value, Tensor) and value.shape == shape and name not in host.audio_names
        short[name] = places.take(value, padding.get(name, 0)) if per_place else value
    if short.get("attention_mask") is None and needs_mask:
        short["attention_mask"] = places.real.to(torch.long)
    return short


def _move_to_origin(places: Tensor, slots: Tensor, origins: Tensor, layout: RowLayout) -> Tensor:
    """Give every retained placeholder the position of the token whose features it will hold."""
    retained = torch.argsort((~slots).to(torch.int8), stable=True)[: origins.shape[0]]
    flat = places.flatten(1).clone()
    flat[:, layout.place[retained]] = places.flatten(1)[:, layout.place[origins]]
    return flat.view_as(places)


def _hand_over(
    host: Host,
    encoded: EncodedImages,
    features: list[Tensor],
    kept: Sequence[Tensor],
    fronts: list[int],
    taken: Sequence[int],
) -> dict[str, Any]:
    """What the encoders would have returned for the kept tokens of the blocks that are taken, by modality."""
    outputs, start = {}, 0
    for name, output in encoded.outputs.items():
        stop = start + encoded.counts[name]
        part = [block for block in taken if start <= block < stop]
        within, start = [block - start for block in part], stop
        if not part:  # rows without this kind
            continue
        first = _like(host.features(output), [features[block] for block in part], within)
        short = type(output)(**{field: getattr(output, field) for field in host.family.carried})
        if host.family.features != "deepstack_features":
            short[host.family.features] = first
        if (deep := getattr(output, "deepstack_features", None)) is not None:
            cut = [(one, kept[block], fronts[block]) for one, block in zip(within, part, strict=True)]
            short["deepstack_features"] = _deepstack(host, deep, first, cut)
        outputs[name] = short
    return outputs


def _deepstack(host: Host, deep: Any, first: Any, parts: Sequence[tuple[int, Tensor, int]]) -> list[Any]:
    """The features that single layers of the language model add, for the kept tokens of some blocks."""

    def cut(layer: Any) -> list[Tensor]:
        # These are added to the states of all visual places, so prefix rows get zeros.
        return [
            torch.cat((layer[block].new_zeros(front, layer[block].shape[1]), layer[block][index]))
            for block, index, front in parts
        ]

    if host.family.features != "deepstack_features":
        return [cut(layer) for layer in deep]
    start = min(number for number, _ in deep)
    return [(number, first if number == start else cut(layer)) for number, layer in deep]


def _like(whole: Any, features: list[Tensor], blocks: Sequence[int]) -> Any:
    """Features in the container that the model expects: a tensor or a list of blocks, with as many axes."""
    if isinstance(whole, Tensor):
        joined = torch.cat(features)
        return joined.view(*[1] * (whole.dim() - 2), *joined.shape)
    shapes = [whole[block].dim() for block in blocks]
    return [one.view(*[1] * (axes - 2), *one.shape) for axes, one in zip(shapes, features, strict=True)]
