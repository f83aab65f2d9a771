"""Keep an even lattice of tokens, or pool the image evenly to fewer tokens."""

from __future__ import annotations

import math

import torch

from trimtab.errors import setting_error
from trimtab.ops.host import copy_to
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.options import check_flag
from trimtab.pruners.registry import register_pruner
from trimtab.shapes import Bool, Int, Tensor


@register_pruner("grid_pool")
class GridPoolPruner(Pruner):
    """Keeps tokens spread evenly over the image, or averages the cells around them.

    The raster is cut into `num_keep` cells of nearly equal size: bands of rows, each cut into runs of columns. A
    cell's middle is kept, or with ``merge`` its mean, which for counts that divide the raster is adaptive average
    pooling as in Matryoshka multimodal models (arXiv 2405.17430). Unlike there any count can be met exactly.
    Images without a grid, or with unreal tokens, are cut into runs of their real tokens in raster order.
    VTC-Bench (arXiv 2510.07143): plain down-sampling beats many methods, so always compare with it.

    Args:
        merge: Replace the kept tokens by the means of their cells.
    """

    def __init__(self, merge: bool = False) -> None:
        self.merge = check_flag("GridPoolPruner", "merge", merge)

    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep an even lattice; see `Pruner.select`."""
        self.check(inputs, num_keep)
        images, tokens = inputs.features.shape[:2]
        rows, columns = inputs.grid or (1, tokens)
        if rows * columns != tokens:
            raise setting_error(
                "PrunerInput", "grid", f"rows and columns that multiply to the {tokens} tokens per image", inputs.grid
            )
        cell, middle = _cells(rows, columns, num_keep)
        device = inputs.features.device
        cell = copy_to(cell, device).expand(images, tokens)
        index = copy_to(middle, device).expand(images, num_keep)
        valid = torch.ones(images, num_keep, dtype=torch.bool, device=device)
        if inputs.valid is not None:
            run, last, enough = _runs(inputs.valid, num_keep)
            whole = inputs.valid.all(dim=1, keepdim=True)
            cell, index, valid = torch.where(whole, cell, run), torch.where(whole, index, last), whole | enough
        if not self.merge:
            return Selection(index.contiguous(), valid)
        member = cell.unsqueeze(1) == torch.arange(num_keep, device=device)[:, None]
        features = inputs.features
        if inputs.valid is not None:
            features = features.masked_fill(~inputs.valid.unsqueeze(-1), 0.0)
        size = member.sum(dim=2)
        mean = (member.float() / size.clamp_min(1).unsqueeze(-1)) @ features.float()
        return Selection(index.contiguous(), valid, mean.to(features.dtype), size.float())


def _cells(rows: int, columns: int, count: int) -> tuple[Int[Tensor, "token"], Int[Tensor, "kept"]]:
    """Cut a raster into `count` cells; return the cell of every token and the middle token of every cell."""
    # As many bands as make cells about square, and no more tokens in a band than it has columns.
    bands = min(max(round(math.sqrt(count * rows / columns)), -(-count // columns), 1), rows, count)
    cell = torch.empty(rows, columns, dtype=torch.int64)
    middle: list[int] = []
    for band in range(bands):
        first, after = band * count // bands, (band + 1) * count // bands
        runs = after - first
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        cell[top:bottom] = first + torch.arange(columns) * runs // columns
        row = (top + bottom) // 2
        for run in range(runs):
            left, right = -(-run * columns // runs), -(-(run + 1) * columns // runs)
            middle.append(row * columns + (left + right) // 2)
    return cell.flatten(), torch.tensor(middle)


def _runs(
    valid: Bool[Tensor, "image token"], count: int
) -> tuple[Int[Tensor, "image token"], Int[Tensor, "image kept"], Bool[Tensor, "image kept"]]:
    """Cut the real tokens into runs; return the run of every token, the last token of every run, and if it exists."""
    tokens = valid.shape[1]
    real = valid.sum(dim=1, keepdim=True)
    runs = real.clamp(max=count)
    rank = valid.cumsum(dim=1) - 1
    run = (rank * runs // real.clamp_min(1)).masked_fill(~valid, count)
    places = torch.arange(tokens, device=valid.device).expand_as(run)
    last = torch.full((valid.shape[0], count + 1), -1, device=valid.device)
    last = last.scatter_reduce(1, run, places, "amax")[:, :count]
    exists = torch.arange(count, device=valid.device) < runs
    return run, last.masked_fill(~exists, tokens - 1), exists
