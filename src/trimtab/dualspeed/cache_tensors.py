"""Small moves of stored tensors: onto the device in one go, and of some images out of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trimtab.anatomy import EncodedImages
from trimtab.shapes import Tensor


def stack_on(values: list[Tensor], device: torch.device) -> Tensor:
    """Stack tensors and send them to a device in one go."""
    if all(value.device == device for value in values):
        return torch.stack(values)
    shape = (len(values), *values[0].shape)
    room = torch.empty(shape, dtype=values[0].dtype, pin_memory=device.type == "cuda")
    for number, value in enumerate(values):
        room[number].copy_(value)
    return room.to(device, non_blocking=True)


def send_indices(indices: list[Tensor], device: torch.device) -> list[Tensor]:
    """Send indices to a device in one go."""
    if not indices:
        return []
    return list(torch.cat(indices).to(device).long().split([one.shape[0] for one in indices]))


def some_images(encoded: EncodedImages, numbers: list[int]) -> EncodedImages:
    """Return the features of some of the images."""
    chosen: dict[str, Any] = {}
    for name in ("blocks", "tiles", "filler", "hidden", "cls_attention", "keys"):
        values = getattr(encoded, name)
        chosen[name] = None if values is None else [values[number] for number in numbers]
    return replace(encoded, **chosen)


def images_in_rows(
    batch: Mapping[str, Any], tokens: Sequence[int], rows: Sequence[int], sizes: list[int]
) -> list[bool]:
    """Say of each image whether it stands in one of these rows of the batch; waits for the device.

    Args:
        batch: With ``input_ids``.
        tokens: Placeholders.
        rows: The rows.
        sizes: Tokens of each image.
    """
    ids = batch["input_ids"]
    found: list[bool] = []
    for row, places in enumerate(torch.isin(ids, ids.new_tensor(tokens)).sum(1).tolist()):
        while places > 0 and len(found) < len(sizes):
            places -= sizes[len(found)]
            found.append(row in rows)
        if places:  # of videos
            return [True] * len(sizes)
    return found
