"""Where a batch has placeholders, padding and labels, and what of it the host may know before the device does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from trimtab.anatomy.encode import SIZES, EncodedImages
from trimtab.anatomy.families import Host, Modality, open_host
from trimtab.anatomy.positions import PACKED, packed_rows, packing_error, refuse_packed_entries
from trimtab.errors import SettingError, TokenMismatchError
from trimtab.ops.label_head import IGNORED
from trimtab.shapes import Bool, Int, Tensor

TYPES = {"image": 1, "video": 2}
NOTES = "row_notes"
"""Entry of a batch that holds its `RowNotes`."""


@dataclass(frozen=True)
class RowNotes:
    """Counts of the rows of a batch, made where the batch is made, so that a training step need not ask the device.

    Attributes:
        shape: Rows and places of ``input_ids``.
        lengths: Real places of each row.
        labelled: Placeholders of each row that carry a label.
        labels: Supervised labels of each row, without those on placeholders, padding and first places.
        answers: Runs of them that each row has.
        starts_real: Of each row whether its first place is real.
        placeholders: Of each kind of visual input the placeholders of each row.
        sizes: Entries of the batch with sizes of images (`trimtab.anatomy.encode.SIZES`), which stay on the host.
    """

    shape: tuple[int, int]
    lengths: list[int]
    labelled: list[int]
    labels: list[int]
    answers: list[int]
    starts_real: list[bool]
    placeholders: dict[str, list[int]]
    sizes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PlaceholderRule:
    """What tells visual tokens in ``input_ids``; plain values, so that worker processes can have it.

    Attributes:
        modalities: Kinds of visual input.
        one_for_both: Whether images and videos share their placeholder without a fence around either.
        model: Name of the model's class, for messages.
    """

    modalities: tuple[Modality, ...]
    one_for_both: bool
    model: str


@dataclass(frozen=True)
class RowLayout:
    """Where a batch has placeholders, padding and labels.

    Attributes:
        types: What stands at each place, as ``mm_token_type_ids`` has it: 0 for text and padding, 1 for a token of an
            image, 2 for one of a video.
        real: Which places are not padding.
        place: Places of all placeholders, counted through the flattened batch; those of images in reading order,
            then those of videos.
        placeholders: How many each row has.
        lengths: How many real places each row has.
        labelled: How many placeholders of the batch carry a label.
        labels: How many supervised labels each row has, without those on placeholders, padding and first places.
        answers: How many runs of them each row has.
        pad_left: Whether padding stands before the rows.
        block_rows: Row of each block of features.
    """

    types: Int[Tensor, "row seq"]
    real: Bool[Tensor, "row seq"]
    place: Int[Tensor, "place"]
    placeholders: list[int]
    lengths: list[int]
    labelled: int
    labels: list[int]
    answers: list[int]
    pad_left: bool
    block_rows: list[int]

    @property
    def most_words(self) -> int:
        """A number of words, neither placeholders nor supervised, that no row has more of."""
        counts = zip(self.lengths, self.placeholders, self.labels, strict=True)
        return max((length - visual - answers for length, visual, answers in counts), default=0)

    @property
    def placeholder(self) -> Bool[Tensor, "row seq"]:
        """Which places hold a visual token."""
        return self.types != 0


def read_rows(model: Any, batch: Mapping[str, Any], encoded: EncodedImages | None) -> RowLayout:
    """Find placeholders, padding and labels, and check that the features fit; without notes waits for the device once.

    Args:
        model: The model, or what `open_host` made of it.
        batch: Arguments of its forward with ``input_ids``, and ``attention_mask``, ``labels`` and ``row_notes`` where
            given.
        encoded: Its images and videos, or None where it has none.

    Returns:
        The layout.

    Raises:
        SettingError: ``attention_mask`` has a shape other than that of ``input_ids``, rows hold packed sequences, or
            ``row_notes`` are those of another batch.
        TokenMismatchError: Placeholders and features do not fit; the message has both counts and the row.
    """
    host = open_host(model)
    ids = batch["input_ids"]
    refuse_packed_entries(batch)
    real = real_places(batch)
    present = () if encoded is None else tuple(encoded.outputs)
    kinds = _placeholders(placeholder_rule(host), ids, real, present)
    notes = cast("RowNotes | None", batch.get(NOTES))
    if notes is None:
        packed = packed_rows(host, batch, real)
        notes = _count(batch, real, kinds, packed)
    elif notes.shape != tuple(ids.shape) or set(notes.placeholders) != set(kinds):
        raise SettingError(
            f"{NOTES} are those of a batch of {notes.shape[0]} rows of {notes.shape[1]} places, but input_ids has the "
            f"shape {tuple(ids.shape)}. Something has changed the batch after its notes were made: leave {NOTES} out."
        )
    if host.rotary == "multimodal" and encoded is not None and 0 in notes.lengths:
        raise SettingError(
            f"Row {notes.lengths.index(0)} holds no token (attention_mask is 0 everywhere), and "
            f"{type(host.model).__name__} cannot count positions for it. Leave empty rows out of the data, or look at "
            "the collator."
        )
    rows: list[int] = []
    sizes = [] if encoded is None else [block.shape[0] for block in encoded.blocks]
    for name, placeholders in notes.placeholders.items():
        count = 0 if encoded is None else encoded.counts.get(name, 0)
        rows += _rows_of_blocks(name, placeholders, notes.lengths, sizes[len(rows) : len(rows) + count], ids.shape[1])
    order = [torch.argsort((~kind).flatten().to(torch.int8), stable=True) for kind in kinds.values()]
    return RowLayout(
        types=place_types(kinds),
        real=real,
        place=torch.cat([one[: sum(notes.placeholders[name])] for name, one in zip(kinds, order, strict=True)]),
        placeholders=[sum(of_row) for of_row in zip(*notes.placeholders.values(), strict=True)],
        lengths=notes.lengths,
        labelled=sum(notes.labelled),
        labels=notes.labels,
        answers=notes.answers,
        pad_left=not all(notes.starts_real),
        block_rows=rows,
    )


def note_rows(rule: PlaceholderRule, batch: Mapping[str, Any]) -> RowNotes | None:
    """Count the rows of a batch that is still on the host.

    Args:
        rule: From `placeholder_rule`.
        batch: Arguments of the model's forward.

    Returns:
        The notes; None for a batch that the step must look at itself: without ids or labels, with positions of its
        own, or with a mask that it will refuse.
    """
    ids, mask, labels = (batch.get(name) for name in ("input_ids", "attention_mask", "labels"))
    given = [batch.get(name) is not None for name in ("position_ids", *PACKED)]
    fits = isinstance(labels, Tensor) and (mask is None or (isinstance(mask, Tensor) and mask.shape == labels.shape))
    if not isinstance(ids, Tensor) or not fits or any(given):
        return None
    present = tuple(kind.name for kind in rule.modalities if batch.get(kind.pixels) is not None)
    real = real_places(batch)
    sizes = {name: value for name in SIZES if isinstance(value := batch.get(name), Tensor)}
    return replace(_count(batch, real, _placeholders(rule, ids, real, present), None), sizes=sizes)


def placeholder_rule(model: Any) -> PlaceholderRule:
    """Return what tells the visual tokens of a model."""
    host = open_host(model)
    return PlaceholderRule(host.modalities, host.family.video_placeholder == "image", type(host.model).__name__)


def _count(batch: Mapping[str, Any], real: Tensor, kinds: Mapping[str, Tensor], packed: Tensor | None) -> RowNotes:
    ids, labels = batch["input_ids"], batch.get("labels")
    placeholder = place_types(kinds) != 0
    none = torch.zeros_like(ids[:, 0])
    labelled = supervised = answers = none
    if labels is not None:
        labelled = (placeholder & (labels != IGNORED)).sum(1)
        taught = clean_labels(labels, real, placeholder) != IGNORED
        supervised, answers = taught.sum(1), (taught[:, 1:] & ~taught[:, :-1]).sum(1)
    broken = none if packed is None else packed.long()
    counts = [real.sum(1), labelled, supervised, answers, real[:, 0].long(), broken]
    told = torch.stack([*counts, *(kind.sum(1) for kind in kinds.values())]).tolist()
    lengths, labelled_rows, label_rows, answer_rows, first, wrong, *found = told
    if any(wrong):
        raise packing_error(wrong.index(1))
    per_kind = dict(zip(kinds, found, strict=True))
    starts = [bool(one) for one in first]
    return RowNotes(tuple(ids.shape), lengths, labelled_rows, label_rows, answer_rows, starts, per_kind)


def clean_labels(labels: Tensor, real: Tensor, placeholder: Tensor) -> Int[Tensor, "row seq"]:
    """Take out the labels that no step trains: those on placeholders, on padding, and on the first place of a row.

    A row's first token has no predecessor. Where padding or another row stands before it, it would seem to have one.
    """
    first = real & (real.cumsum(1) == 1)
    return labels.masked_fill(placeholder | ~real | first, IGNORED)


def real_places(batch: Mapping[str, Any]) -> Bool[Tensor, "row seq"]:
    """Which places are not padding.

    Raises:
        SettingError: ``attention_mask`` has another shape than ``input_ids``.
    """
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


def place_types(kinds: Mapping[str, Tensor]) -> Int[Tensor, "row seq"]:
    """What stands at each place, as ``mm_token_type_ids`` has it."""
    return torch.stack([holds * TYPES[name] for name, holds in kinds.items()]).sum(0)


def find_placeholders(
    host: Host, batch: Mapping[str, Any], real: Tensor, encoded: EncodedImages
) -> dict[str, Bool[Tensor, "row seq"]]:
    """Which places hold visual tokens, by modality; a token that two share belongs to the one present."""
    return _placeholders(placeholder_rule(host), batch["input_ids"], real, tuple(encoded.outputs))


def _placeholders(rule: PlaceholderRule, ids: Tensor, real: Tensor, present: Sequence[str]) -> dict[str, Tensor]:
    if rule.one_for_both and len(present) > 1:
        raise SettingError(
            f"{rule.model} has one placeholder for images and videos and takes only one of both in a "
            f"batch, but {' and '.join(present)} features came. Put images and videos into different batches."
        )
    taken: set[int] = set()
    found = {}
    for kind in sorted(rule.modalities, key=lambda kind: kind.name not in present):
        holds = torch.zeros_like(real)
        for token in set(kind.token_ids) - taken:
            holds |= ids == token
        taken |= set(kind.token_ids)
        found[kind.name] = holds & real
    for kind in rule.modalities:
        if kind.span is not None:
            shared = torch.stack(list(found.values())).any(0)
            inside = (ids == kind.span[0]).cumsum(1) > (ids == kind.span[1]).cumsum(1)
            found = {name: shared & (inside if name == kind.name else ~inside) for name in found}
    return {kind.name: found[kind.name] for kind in rule.modalities}


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
