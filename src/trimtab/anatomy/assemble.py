"""Give a model fewer visual tokens than its placeholders announce.

A batch announces every visual token with a placeholder in ``input_ids``. `assemble` removes the surplus placeholders
from every tensor that has a value per place, packs the rows anew, and hands the kept features over through
``mm_encoder_outputs``; the stock model then runs unmodified.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trimtab.anatomy.encode import EncodedImages
from trimtab.anatomy.families import Host, open_host
from trimtab.errors import SettingError, TokenMismatchError
from trimtab.ops.label_head import IGNORED
from trimtab.ops.repack import close_gaps, gather_places, repack_index
from trimtab.shapes import Bool, Float, Int, Tensor

Positions = Literal["renumber", "original"]
TYPES = {"image": 1, "video": 2}


@dataclass(frozen=True)
class RowLayout:
    """Where a batch has placeholders and padding.

    Attributes:
        types: What stands at each place, as ``mm_token_type_ids`` has it: 0 for text and padding, 1 for a token of an
            image, 2 for one of a video.
        real: Which places are not padding.
        place: Places of all placeholders, counted through the flattened batch; those of images in reading order,
            then those of videos.
        placeholders: How many each row has.
        lengths: How many real places each row has.
        labelled: How many placeholders of the batch carry a label.
        pad_left: Whether padding stands before the rows.
        block_rows: Row of each block of features.
    """

    types: Int[Tensor, "row seq"]
    real: Bool[Tensor, "row seq"]
    place: Int[Tensor, "place"]
    placeholders: list[int]
    lengths: list[int]
    labelled: int
    pad_left: bool
    block_rows: list[int]

    @property
    def placeholder(self) -> Bool[Tensor, "row seq"]:
        """Which places hold a visual token."""
        return self.types != 0


def read_rows(model: Any, batch: Mapping[str, Any], encoded: EncodedImages | None) -> RowLayout:
    """Find placeholders and padding, and check that the features fit them; waits for the device once.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward with ``input_ids``, and ``attention_mask`` and ``labels`` where given.
        encoded: Its images and videos, or None where it has none.

    Returns:
        The layout.

    Raises:
        SettingError: ``attention_mask`` has a shape other than that of ``input_ids``.
        TokenMismatchError: Placeholders and features do not fit; the message has both counts and the row.
    """
    host = open_host(model)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise SettingError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, but {tuple(mask.shape)} came. Give "
            "the two-dimensional mask of the processor; the model builds larger ones itself."
        )
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    kinds = _placeholders(host, ids, real, encoded)
    types = torch.stack([holds * TYPES[name] for name, holds in kinds.items()]).sum(0)
    placeholder = types != 0
    labels = batch.get("labels")
    labelled = (placeholder & (labels != IGNORED)).sum(1) if labels is not None else torch.zeros_like(ids[:, 0])
    counts = torch.stack([real.sum(1), labelled, real[:, 0].long(), *(kind.sum(1) for kind in kinds.values())]).tolist()
    lengths, labelled_rows, first_real = counts[:3]
    per_kind = dict(zip(kinds, counts[3:], strict=True))
    rows: list[int] = []
    sizes = [] if encoded is None else [block.shape[0] for block in encoded.blocks]
    for name, placeholders in per_kind.items():
        count = 0 if encoded is None else encoded.counts.get(name, 0)
        rows += _rows_of_blocks(name, placeholders, lengths, sizes[len(rows) : len(rows) + count], ids.shape[1])
    order = [torch.argsort((~kind).flatten().to(torch.int8), stable=True) for kind in kinds.values()]
    return RowLayout(
        types=types,
        real=real,
        place=torch.cat([one[: sum(per_kind[name])] for name, one in zip(kinds, order, strict=True)]),
        placeholders=[sum(of_row) for of_row in zip(*per_kind.values(), strict=True)],
        lengths=lengths,
        labelled=sum(labelled_rows),
        pad_left=not all(first_real),
        block_rows=rows,
    )


def _placeholders(host: Host, ids: Tensor, real: Tensor, encoded: EncodedImages | None) -> dict[str, Tensor]:
    """Which places hold visual tokens, by modality, [row, seq]; a token that two share belongs to the one present."""
    present = () if encoded is None else tuple(encoded.outputs)
    if host.family.video_placeholder == "image" and len(present) > 1:
        raise SettingError(
            f"{type(host.model).__name__} has one placeholder for images and videos and takes only one of both in a "
            f"batch, but {' and '.join(present)} features came. Put images and videos into different batches."
        )
    taken: set[int] = set()
    found = {}
    for kind in sorted(host.modalities, key=lambda kind: kind.name not in present):
        holds = torch.zeros_like(real)
        for token in set(kind.token_ids) - taken:
            holds |= ids == token
        taken |= set(kind.token_ids)
        found[kind.name] = holds & real
    for kind in host.modalities:
        if kind.span is not None:
            shared = torch.stack(list(found.values())).any(0)
            inside = (ids == kind.span[0]).cumsum(1) > (ids == kind.span[1]).cumsum(1)
            found = {name: shared & (inside if name == kind.name else ~inside) for name in found}
    return {kind.name: found[kind.name] for kind in host.modalities}


def full_inputs(model: Any, batch: Mapping[str, Any], encoded: EncodedImages) -> dict[str, Any]:
    """Arguments of the model for all its visual tokens, with images that were encoded before.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward.
        encoded: Its images.

    Returns:
        The same arguments, with features in place of pixels.
    """
    host = open_host(model)
    done = {name for name in host.encoder_names if name.startswith("pixel_")} | {kind.mask for kind in host.modalities}
    inputs = {name: value for name, value in batch.items() if name not in done}
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
) -> dict[str, Any]:
    """Arguments of the model for some of its visual tokens.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward.
        encoded: Its images.
        kept: For each block the tokens to keep, ascending.
        prefix: Rows to put in front of every block, or None. They take places of dropped tokens.
        tokens: For each block the features to hand over in place of the kept ones (merged tokens), or None.
        positions: ``"renumber"`` closes the gaps, ``"original"`` keeps the positions of the full sequence; prefix
            rows then share the position of the block's first token.
        layout: From `read_rows`, where the caller has it already.

    Returns:
        Arguments of the model: every tensor with a value per place made shorter, images replaced by features.

    Raises:
        SettingError: A block has fewer dropped tokens than the prefix needs, or indices for another number of
            blocks came.
        TokenMismatchError: Placeholders and features do not fit.
    """
    host = open_host(model)
    sizes = [block.shape[0] for block in encoded.blocks]
    if len(kept) != len(sizes):
        raise SettingError(f"kept must have one entry for each of the {len(sizes)} blocks, but {len(kept)} came.")
    layout = read_rows(host, batch, encoded) if layout is None else layout
    fronts = [prefix.shape[0] if prefix is not None and size else 0 for size in sizes]
    counts = [front + index.shape[0] for front, index in zip(fronts, kept, strict=True)]
    for size, front, index in zip(sizes, fronts, kept, strict=True):
        if front + index.shape[0] > size:
            raise SettingError(
                f"keep_ratio keeps {index.shape[0]} of {size} visual tokens of an image, which leaves fewer than the "
                f"{front} places that the isolator needs. Lower keep_ratio or isolator_tokens."
            )
    slots = _slots(sizes, kept, fronts, layout.place.device)
    keep = layout.real.clone()
    keep.view(-1)[layout.place] = slots
    lengths = _lengths(layout, sizes, counts)
    source, real = repack_index(keep, max(lengths), layout.pad_left)
    features = list(tokens) if tokens is not None else [b[i] for b, i in zip(encoded.blocks, kept, strict=True)]
    if prefix is not None:
        features = [torch.cat((prefix[:n].to(one.dtype), one)) for n, one in zip(fronts, features, strict=True)]

    # Without a mask transformers takes gaps in the positions for the borders of packed sequences.
    gaps = positions == "original" and batch.get("position_ids") is None
    short = _shorten(host, batch, source, real, layout, needs_mask=gaps or min(lengths) < max(lengths))
    if host.rotary == "multimodal" or positions == "original" or batch.get("position_ids") is not None:
        places = _positions(host, batch, layout)
        if host.rotary == "line" and positions == "renumber":
            places = places - (layout.real & ~keep).long().cumsum(1)
        else:
            places = _move_to_origin(places, slots, _origins(sizes, kept, fronts, slots.device), layout)
        short["position_ids"] = gather_places(places, source, real, 0)
        if host.rotary == "multimodal":
            short.pop("mm_token_type_ids", None)
            if positions == "renumber":
                short["position_ids"] = close_gaps(short["position_ids"], real)
        elif places.shape[0] == 1:
            short["position_ids"] = short["position_ids"][0]
    short["mm_encoder_outputs"] = _hand_over(host, encoded, features, kept, fronts)
    return short


def _rows_of_blocks(
    kind: str, placeholders: list[int], lengths: list[int], sizes: Sequence[int], seq: int
) -> list[int]:
    rows, row, left = [], 0, list(placeholders)
    for number, size in enumerate(sizes):
        if size == 0:  # the Idefics families hand over an empty block for a row without image
            rows.append(min(row, len(left) - 1))
            continue
        while row < len(left) and left[row] == 0:
            row += 1
        if row == len(left) or left[row] < size:
            have = 0 if row == len(left) else left[row]
            raise TokenMismatchError(
                f"{kind.capitalize()} {number} of the batch has {size} visual tokens, but row "
                f"{min(row, len(left) - 1)} has {have} {kind} placeholders left for it (placeholders per row "
                f"{placeholders}, real tokens per row {lengths}, tokens per {kind} {list(sizes)}). The row was "
                f"probably cut at {seq} tokens inside it: set max_length=None, or to more than the longest row."
            )
        left[row] -= size
        rows.append(row)
    if any(left):
        bad = next(row for row, count in enumerate(left) if count)
        raise TokenMismatchError(
            f"Row {bad} has {placeholders[bad]} {kind} placeholders, {left[bad]} more than its {kind}s have visual "
            f"tokens (placeholders per row {placeholders}, tokens per {kind} {list(sizes)}). Give every {kind} that "
            "the text names, or build the text with the model's own processor."
        )
    return rows


def _slots(sizes: list[int], kept: Sequence[Tensor], fronts: list[int], device: torch.device) -> Tensor:
    """Which placeholders stay: those of kept tokens, and the earliest others for the prefix; [place]."""
    widest = max(sizes, default=0)
    stays = torch.zeros(len(sizes), widest, dtype=torch.bool, device=device)
    for row, index in enumerate(kept):
        stays[row].index_fill_(0, index, True)
    if any(fronts):
        inside = torch.arange(widest, device=device) < torch.tensor(sizes, device=device)[:, None]
        free = inside & ~stays
        stays |= free & (free.cumsum(1) <= torch.tensor(fronts, device=device)[:, None])
    flat = [number * widest + place for number, size in enumerate(sizes) for place in range(size)]
    return stays.flatten()[torch.tensor(flat, device=device, dtype=torch.long)]


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
    host: Host, batch: Mapping[str, Any], source: Tensor, real: Tensor, layout: RowLayout, needs_mask: bool
) -> dict[str, Any]:
    shape = layout.real.shape
    config = host.model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    if pad is None or pad in host.image_token_ids:
        pad = next(token for token in range(len(host.image_token_ids) + 1) if token not in host.image_token_ids)
    padding = {"input_ids": pad, "labels": IGNORED}
    short: dict[str, Any] = {}
    for name, value in batch.items():
        if name in host.encoder_names or name in ("position_ids", "mm_encoder_outputs"):
            continue
        per_place = isinstance(value, Tensor) and value.shape == shape and name not in host.audio_names
        short[name] = gather_places(value, source, real, padding.get(name, 0)) if per_place else value
    if short.get("attention_mask") is None and needs_mask:
        short["attention_mask"] = real.to(torch.long)
    return short


def _positions(host: Host, batch: Mapping[str, Any], layout: RowLayout) -> Int[Tensor, "axis row seq"]:
    """Positions of the full sequence, [axis, row, seq]."""
    given: Tensor | None = batch.get("position_ids")
    if given is not None:
        full = given if given.dim() == 3 else given[None]
        return full.expand(full.shape[0], *layout.real.shape)
    if host.rotary == "line":
        places = torch.arange(layout.real.shape[1], device=layout.real.device) + host.family.first_position
        return places.expand(1, *layout.real.shape)
    return _multimodal_positions(host, batch, layout)


def _multimodal_positions(host: Host, batch: Mapping[str, Any], layout: RowLayout) -> Tensor:
    types = batch.get("mm_token_type_ids")
    values = {**batch, "mm_token_type_ids": layout.types if types is None else types}
    if (heard := batch.get("feature_attention_mask")) is not None:
        values["audio_feature_lengths"] = heard.sum(1)  # as the forward of models with audio counts it
    names = inspect.signature(host.base.compute_3d_position_ids).parameters
    deltas = host.base.rope_deltas
    try:
        # The model would number rows by deltas of an earlier batch if any were left.
        host.base.rope_deltas = None
        positions: Tensor | None = host.base.compute_3d_position_ids(**{name: values.get(name) for name in names})
    finally:
        host.base.rope_deltas = deltas
    if positions is None:  # some need an attention mask, and without one let the language model count places
        rows, places = layout.real.shape
        return torch.arange(places, device=layout.real.device).expand(3, rows, places)
    return positions


def _move_to_origin(places: Tensor, slots: Tensor, origins: Tensor, layout: RowLayout) -> Tensor:
    """Give every retained placeholder the position of the token whose features it will hold."""
    retained = torch.argsort((~slots).to(torch.int8), stable=True)[: origins.shape[0]]
    flat = places.flatten(1).clone()
    flat[:, layout.place[retained]] = places.flatten(1)[:, layout.place[origins]]
    return flat.view_as(places)


def _hand_over(
    host: Host, encoded: EncodedImages, features: list[Tensor], kept: Sequence[Tensor], fronts: list[int]
) -> dict[str, Any]:
    """What the encoders would have returned for the kept tokens, by modality."""
    outputs, start = {}, 0
    for name, output in encoded.outputs.items():
        part = slice(start, start + encoded.counts[name])
        start = part.stop
        first = _like(host.features(output), features[part])
        short = type(output)(**{field: getattr(output, field) for field in host.family.carried})
        if host.family.features != "deepstack_features":
            short[host.family.features] = first
        if (deep := getattr(output, "deepstack_features", None)) is not None:
            short["deepstack_features"] = _deepstack(host, deep, first, kept[part], fronts[part])
        outputs[name] = short
    return outputs


def _deepstack(host: Host, deep: Any, first: Any, kept: Sequence[Tensor], fronts: list[int]) -> list[Any]:
    """The features that single layers of the language model add, for the kept tokens."""

    def cut(layer: Any) -> list[Tensor]:
        # These are added to the states of all visual places, so prefix rows get zeros.
        return [
            torch.cat((one.new_zeros(front, one.shape[1]), one[index]))
            for one, front, index in zip(layer, fronts, kept, strict=True)
        ]

    if host.family.features != "deepstack_features":
        return [cut(layer) for layer in deep]
    start = min(number for number, _ in deep)
    return [(number, first if number == start else cut(layer)) for number, layer in deep]


def _like(whole: Any, features: list[Tensor]) -> Any:
    """Features in the container that the model expects: a tensor or a list of blocks, with as many axes."""
    if isinstance(whole, Tensor):
        joined = torch.cat(features)
        return joined.view(*[1] * (whole.dim() - 2), *joined.shape)
    return [one.view(*[1] * (block.dim() - 2), *one.shape) for block, one in zip(whole, features, strict=True)]
