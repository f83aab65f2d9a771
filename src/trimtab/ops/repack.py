"""Drop places from rows of different length and pack what is left into a smaller rectangle."""

from __future__ import annotations

import torch

from trimtab.shapes import Bool, Float, Int, Tensor


def repack_index(
    keep: Bool[Tensor, "row seq"], length: int, pad_left: bool
) -> tuple[Int[Tensor, "row length"], Bool[Tensor, "row length"]]:
    """Where each place of the smaller rectangle comes from.

    Args:
        keep: Which places of each row stay; at most `length` in any row.
        length: Places per row afterwards.
        pad_left: Whether padding stands before the row (else after it).

    Returns:
        Source place of each new place (arbitrary where there is padding), and which new places are real.
    """
    source = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :length]
    count = keep.sum(1, keepdim=True)
    place = torch.arange(length, device=keep.device).expand(keep.shape[0], -1)
    if not pad_left:
        return source, place < count
    shifted = place - (length - count)
    return source.gather(1, shifted.clamp_min(0)), shifted >= 0


def gather_places(
    values: Tensor, source: Int[Tensor, "row length"], real: Bool[Tensor, "row length"], padding: int
) -> Tensor:
    """Take the values of the kept places and fill the padding.

    Args:
        values: [row, seq] or [axis, row, seq].
        source: From `repack_index`.
        real: From `repack_index`.
        padding: Value of padded places.

    Returns:
        The same with `length` places instead of seq.
    """
    index = source if values.dim() == 2 else source.expand(values.shape[0], -1, -1)
    return values.gather(-1, index).masked_fill(~real, padding)


def close_gaps(
    positions: Int[Tensor, "axis row seq"] | Float[Tensor, "axis row seq"], real: Bool[Tensor, "row seq"]
) -> Int[Tensor, "axis row seq"] | Float[Tensor, "axis row seq"]:
    """Renumber positions densely, row by row, keeping their order and their ties.

    All coordinates of a row share one scale: the smallest becomes 0 and each next distinct value one more, so
    tokens with equal coordinates keep equal coordinates. Positions without gaps that start at 0 come back as they
    are. Padded places get 0.

    Args:
        positions: Non-negative coordinates; some models count time in fractions.
        real: Which places count.

    Returns:
        The renumbered coordinates, same type.
    """
    axes, rows, places = positions.shape
    flat = positions.permute(1, 0, 2).reshape(rows, axes * places)
    counts = real.repeat(1, axes)
    limits = torch.finfo if positions.is_floating_point() else torch.iinfo
    far = limits(positions.dtype).max
    ordered, order = flat.masked_fill(~counts, far).sort(dim=1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(ordered.dtype)
    dense = torch.zeros_like(flat).scatter(1, order, steps.cumsum(1)).masked_fill(~counts, 0)
    return dense.reshape(rows, axes, places).permute(1, 0, 2)
