"""Positions of the full sequence, and what batches may not do with them: hold several sequences in one row."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trimtab.anatomy.families import Host
from trimtab.errors import SettingError
from trimtab.ops.host import to_device
from trimtab.shapes import Bool, Int, Tensor

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Entries of a batch that say where its sequences begin."""


def full_positions(
    host: Host,
    batch: Mapping[str, Any],
    real: Bool[Tensor, "row seq"],
    types: Int[Tensor, "row seq"],
    *,
    from_row: bool = False,
) -> Int[Tensor, "axis row seq"]:
    """Positions of the full sequence: those given, or those that the model would count.

    Args:
        host: The opened model.
        batch: Arguments of its forward.
        real: Which places are not padding.
        types: What stands at each place, as ``mm_token_type_ids`` has it.
        from_row: Count from the first token of a row, not from padding before it.

    Returns:
        One axis, or those of the model's multimodal positions. A further axis for the text, which some models take to
        find packed sequences, is left out.
    """
    given: Tensor | None = batch.get("position_ids")
    if given is not None:
        full = given if given.dim() == 3 else given[None]
        full = full[1:] if _has_text_axis(host, full) else full
        return full.expand(full.shape[0], *real.shape)
    if host.rotary == "line":
        first = host.family.first_position
        if from_row:
            return (real.long().cumsum(1) - 1).clamp_min(0)[None] + first
        places = torch.arange(real.shape[1], device=real.device) + first
        return places.expand(1, *real.shape)
    return _multimodal_positions(host, batch, real, types)


def with_text_axis(host: Host, positions: Int[Tensor, "axis 1 length"], lengths: Sequence[int]) -> Tensor:
    """Put the axis of the text before the multimodal positions of a pack; it says where rows begin.

    Args:
        host: The opened model.
        positions: Those of the pack.
        lengths: Places of each row.

    Returns:
        The positions with one axis more, or as they are where the model knows no such axis.
    """
    if positions.shape[0] != 3 or not _knows_text_axis(host):
        return positions
    text = to_device([place for length in lengths for place in range(length)], positions.device, positions.dtype)
    return torch.cat((text[None, None], positions))


def refuse_packed_entries(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that says itself that it holds several sequences in a row.

    Raises:
        SettingError: It does; the message names the entry.
    """
    for name in PACKED:
        if batch.get(name) is not None:
            raise SettingError(f"The batch holds {name}, so it is packed or padding-free. {_REMEDY}")


def packed_rows(host: Host, batch: Mapping[str, Any], real: Bool[Tensor, "row seq"]) -> Bool[Tensor, "row"]:
    """Which rows have positions that begin anew inside them, as packed sequences do; none where none are given.

    Args:
        host: The opened model.
        batch: Arguments of its forward.
        real: Which places are not padding.
    """
    given: Tensor | None = batch.get("position_ids")
    if given is None:
        return torch.zeros_like(real[:, 0])
    full = given if given.dim() == 3 else given[None]
    inside = real[:, 1:] & real[:, :-1]
    if full.shape[0] == 1 or _has_text_axis(host, full):
        steps = full[0].expand(real.shape).diff(dim=1)
        # Without a mask transformers takes gaps, too, for the borders of packed sequences.
        unmasked = batch.get("attention_mask") is None and (host.rotary == "line" or full.shape[0] > 1)
        broken = steps != 1 if unmasked else steps < 0
        return (broken & inside).any(1)
    full = full.expand(full.shape[0], *real.shape)
    first = real.long().argmax(1)
    start = full.gather(2, first.expand(full.shape[0], -1)[..., None])
    return ((full == start).all(0) & real).sum(1) > 1  # a coordinate alone may fall, but no two places are the first


def packing_error(row: int) -> SettingError:
    """Build the error for a row in which `packed_rows` found several sequences."""
    return SettingError(
        f"position_ids begin anew or jump inside row {row}, so the batch is packed or padding-free. {_REMEDY}"
    )


_REMEDY = (
    "DualSpeed needs one sequence per row: set packing=False and padding_free=False, and let the collator pad with an "
    "attention_mask."
)


def _has_text_axis(host: Host, positions: Tensor) -> bool:
    if host.rotary == "line" or positions.shape[0] != 4:
        return False
    return _knows_text_axis(host)


def _knows_text_axis(host: Host) -> bool:
    rope = getattr(host.model.config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or ()) != 4


def _multimodal_positions(host: Host, batch: Mapping[str, Any], real: Tensor, types: Tensor) -> Tensor:
    given = batch.get("mm_token_type_ids")
    values = {**batch, "mm_token_type_ids": types if given is None else given}
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
        rows, places = real.shape
        return torch.arange(places, device=real.device).expand(3, rows, places)
    return positions
