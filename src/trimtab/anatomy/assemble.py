"""Give a model fewer visual tokens than its placeholders announce.

A batch announces every visual token with a placeholder in ``input_ids``. `assemble` removes the surplus placeholders
from every tensor that has a value per place, packs the rows anew, and hands the kept features over through
``mm_encoder_outputs``; the stock model then runs unmodified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trimtab.anatomy.encode import EncodedImages
from trimtab.anatomy.families import Host, open_host
from trimtab.anatomy.positions import full_positions, packed_rows, packing_error, refuse_packed_entries
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
        SettingError: ``attention_mask`` has a shape other than that of ``input_ids``, or rows hold packed sequences.
        TokenMismatchError: Placeholders and features do not fit; the message has both counts and the row.
    """
    host = open_host(model)
    ids = batch["input_ids"]
    refuse_packed_entries(batch)
    real = _real(batch)
    kinds = _placeholders(host, ids, real, encoded)
    types = _types(kinds)
    packed = packed_rows(host, batch, real)
    placeholder = types != 0
    labels = batch.get("labels")
    labelled = (placeholder & (labels != IGNORED)).sum(1) if labels is not None else torch.zeros_like(ids[:, 0])
    per_row = [real.sum(1), labelled, real[:, 0].long(), packed.long(), *(kind.sum(1) for kind in kinds.values())]
    lengths, labelled_rows, first_real, broken, *found = torch.stack(per_row).tolist()
    if any(broken):
        raise packing_error(broken.index(1))
    per_kind = dict(zip(kinds, found, strict=True))
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


def _real(batch: Mapping[str, Any]) -> Bool[Tensor, "row seq"]:
    """Which places are not padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise SettingError(
            f"attention_mask must be a tensor of the shape of input_ids, {tuple(ids.shape)}, but {came} came. Give "
            "the two-dimensional mask of the processor; the model builds larger ones itself."
        )
    return mask != 0


def _types(kinds: Mapping[str, Tensor]) -> Int[Tensor, "row seq"]:
    return torch.stack([holds * TYPES[name] for name, holds in kinds.items()]).sum(0)


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
        The same arguments, with features in place of pixels; where positions are multimodal and the batch does not
        say what stands at each place (``mm_token_type_ids``), that too.
    """
    host = open_host(model)
    done = {name for name in host.encoder_names if name.startswith("pixel_")} | {kind.mask for kind in host.modalities}
    inputs = {name: value for name, value in batch.items() if name not in done}
    counts = host.rotary == "multimodal" and "mm_token_type_ids" in host.forward_names
    if counts and batch.get("mm_token_type_ids") is None and batch.get("position_ids") is None:
        inputs["mm_token_type_ids"] = _types(_placeholders(host, batch["input_ids"], _real(batch), encoded))
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
        prefix: Rows to put in front of every block, or None. They take places of dropped tokens; a block that keeps
            all its tokens has none for them and stays as it is. Where the first of a block's tiles drops fewer tokens
            than the prefix has rows, the tokens behind move on: into places of the next tile, past what the text has
            between the two.
        tokens: For each block the features to hand over in place of the kept ones (merged tokens), or None.
        positions: ``"renumber"`` closes the gaps, ``"original"`` keeps the positions of the full sequence; prefix
            rows then share the position of the block's first token.
        layout: From `read_rows`, where the caller has it already.

    Returns:
        Arguments of the model: every tensor with a value per place made shorter, images replaced by features.

    Raises:
        SettingError: A block drops some tokens, but fewer than the prefix needs, or indices for another number of
            blocks came.
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
    lengths = _lengths(layout, sizes, counts)
    source, real = repack_index(keep, max(lengths), layout.pad_left)
    features = list(tokens) if tokens is not None else [b[i] for b, i in zip(encoded.blocks, kept, strict=True)]
    if prefix is not None:
        features = [torch.cat((prefix[:n].to(one.dtype), one)) for n, one in zip(fronts, features, strict=True)]

    # Without a mask transformers takes gaps in the positions for the borders of packed sequences.
    gaps = positions == "original"
    short = _shorten(host, batch, source, real, layout, needs_mask=gaps or min(lengths) < max(lengths))
    if host.rotary == "multimodal" or positions == "original" or batch.get("position_ids") is not None:
        places = full_positions(host, batch, layout.real, layout.types)
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
    total, lengths = sum(sizes), torch.tensor(sizes, device=device, dtype=torch.long)
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
    host: Host, batch: Mapping[str, Any], source: Tensor, real: Tensor, layout: RowLayout, needs_mask: bool
) -> dict[str, Any]:
    shape = layout.real.shape
    config = host.model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    if pad is None or pad < 0 or pad in host.image_token_ids:
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
