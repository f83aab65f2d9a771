"""Two ways to lay out the places that stay of a batch: a smaller padded rectangle, or one row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab.ops.host import to_device
from trimtab.ops.repack import gather_places, repack_index
from trimtab.shapes import Bool, Int, Tensor


@dataclass(frozen=True)
class Rectangle:
    """Rows beside one another, padded to the longest.

    Attributes:
        source: Place that each new place comes from.
        real: Which new places are not padding.
        rows: Which rows of the batch, or None for all.
        lengths: Real places of each row.
    """

    source: Int[Tensor, "row length"]
    real: Bool[Tensor, "row length"]
    rows: Int[Tensor, "row"] | None
    lengths: list[int]

    def take(self, values: Tensor, padding: int) -> Tensor:
        """Take the values of the kept places, [row, seq] or [axis, row, seq], and fill the padding."""
        chosen = values if self.rows is None else values.index_select(-2, self.rows)
        return gather_places(chosen, self.source, self.real, padding)

    @property
    def padded(self) -> bool:
        """Whether there is any padding."""
        return min(self.lengths) < max(self.lengths)


@dataclass(frozen=True)
class Pack:
    """Rows one behind the other.

    Attributes:
        index: Place of the flattened batch that each new place comes from.
        lengths: Places of each row.
    """

    index: Int[Tensor, "length"]
    lengths: list[int]

    def take(self, values: Tensor, padding: int) -> Tensor:
        """Take the values of the kept places, [row, seq] -> [1, length] or [axis, row, seq] -> [axis, 1, length]."""
        return values.flatten(-2).index_select(-1, self.index).unsqueeze(-2)

    @property
    def real(self) -> Bool[Tensor, "1 length"]:
        """All places."""
        return torch.ones(1, self.index.shape[0], dtype=torch.bool, device=self.index.device)

    @property
    def padded(self) -> bool:
        """Never."""
        return False


def lay_out(
    keep: Bool[Tensor, "row seq"],
    lengths: Sequence[int],
    *,
    pad_left: bool,
    rows: Sequence[int] | None = None,
    packed: bool = False,
) -> Rectangle | Pack:
    """Lay out the places that stay.

    Args:
        keep: Which places of each row stay.
        lengths: How many of each row.
        pad_left: Whether padding stands before the rows.
        rows: The rows that stay, ascending and at least one, or None for all.
        packed: Whether to make one row of them.

    Returns:
        The layout; waits for nothing.
    """
    index = None if rows is None else to_device(list(rows), keep.device)
    stays = list(lengths) if rows is None else [lengths[row] for row in rows]
    if not packed:
        chosen = keep if index is None else keep.index_select(0, index)
        source, real = repack_index(chosen, max(stays), pad_left)
        return Rectangle(source, real, index, stays)
    if index is not None:
        keep = keep & torch.zeros_like(keep).index_fill_(0, index, True)
    order = torch.argsort((~keep).flatten().to(torch.int8), stable=True)
    return Pack(order[: sum(stays)], stays)
