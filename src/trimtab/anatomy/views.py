"""Where the parts of an image lie that an encoder hands over as local crops, then the whole, then a separator."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from trimtab.shapes import Bool, Tensor


def view_tiles(base: Any, arguments: dict[str, Any], entries: list[Tensor], output: Any) -> list[list[int]]:
    """How many tokens each view has, image by image; the separator behind the last belongs to none.

    Args:
        base: The model without its head.
        arguments: What the image encoder took.
        entries: Features of each image, [token, width].
        output: What the encoder returned; ``last_hidden_state`` holds the views of the whole.

    Returns:
        Tokens of each crop, then of the whole; all of them as one tile where the crops are laid out line by line.
    """
    sizes = [entry.shape[0] - _separator(base) for entry in entries]
    if hasattr(base, "image_newline"):
        return [[size] for size in sizes]
    whole = output.last_hidden_state.shape[1]
    crops = _crops(arguments, len(entries))
    return [[(size - whole) // max(1, count)] * count + [whole] for size, count in zip(sizes, crops, strict=True)]


def view_filler(
    base: Any, arguments: dict[str, Any], entries: list[Tensor], output: Any
) -> list[tuple[Bool[Tensor, "token"], int] | None]:
    """Which tokens end a line and carry no picture, image by image, and how many; None where lines have no end.

    Args:
        base: The model without its head.
        arguments: What the image encoder took.
        entries: Features of each image, [token, width].
        output: What the encoder returned.
    """
    if not hasattr(base, "image_newline"):
        return [None] * len(entries)
    side = isqrt(output.last_hidden_state.shape[1])
    crops = _crops(arguments, len(entries))
    found: list[tuple[Tensor, int] | None] = []
    for number, (entry, count) in enumerate(zip(entries, crops, strict=True)):
        ends = [side] * side
        if count:
            columns, rows = (int(one) for one in arguments["patches_grid"][number])
            crop = isqrt(output.local_last_hidden_state.shape[1])
            ends = [columns * crop] * (rows * crop) + ends
        filler = torch.zeros(entry.shape[0], dtype=torch.bool)
        filler[torch.tensor([length + 1 for length in ends]).cumsum(0) - 1] = True
        found.append((filler.to(entry.device), len(ends)))
    return found


def _separator(base: Any) -> int:
    return int(hasattr(base, "view_separator"))


def _crops(arguments: dict[str, Any], images: int) -> list[int]:
    given = arguments.get("num_local_patches")
    if given is None:
        return [0] * images
    return [int(count) for count in given]
