"""Put flattened patches back into a picture, whatever order and layout the processor gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt, prod
from typing import Any

import torch

from trimtab.anatomy.seen_views import ALIKE, Cells, Grid, NoRasterError, Source, View
from trimtab.shapes import Float, Tensor

PATCHED = ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes", "image_position_ids")
"""Entries that come beside patches; each says how many rows and columns of them an image has."""

Patches = Float[Tensor, "patch channel height width"]


def shape_entry(entries: Mapping[str, Any]) -> str | None:
    """Name of the entry that says how many rows and columns of patches there are, or None where pixels are whole."""
    return next((name for name in PATCHED if entries.get(name) is not None), None)


def patch_views(source: Source, name: str) -> list[View]:
    """Return one view for each grid of patches.

    How the values of a patch stand (channels first or last) and how patches do (line by line, or those of one token
    together) is not in the batch: the guess whose picture is most like the image is taken.

    Raises:
        NoRasterError: No guess is like the image, or the grids do not fit the tokens.
    """
    grids, order = _grids(source.entries, name)
    groups = _groups(source.entries["pixel_values"].float(), name, grids, order)
    merges = _merges(source, grids)
    best: tuple[float, list[Tensor]] | None = None
    for pictures in _guesses(source, groups, grids, merges, explicit=order is not None):
        natural = [source.natural(picture) for picture in pictures]
        found = [source.likeness(picture) for picture in natural]
        # Of slices of an image one shows the whole of it.
        score = max(-1.0 if one is None else one for one in found)
        if best is None or score > best[0]:
            best = (score, natural)
    if best is None:
        raise NoRasterError("The values of a patch do not make a square of three channels.")
    if best[0] < ALIKE and not (order is not None or _told_by_nothing(source)):
        raise NoRasterError("No known order of the patches gives the picture that went in.")
    return [
        View(pixels, _cells(source, place, grid, merge, pixels))
        for place, (pixels, grid, merge) in enumerate(zip(best[1], grids, merges, strict=True))
    ]


def _told_by_nothing(source: Source) -> bool:
    """Whether an image came that is one plain colour, whose order does not matter."""
    return source.small is not None and source.likeness(source.small) is None


def _grids(entries: Mapping[str, Any], name: str) -> tuple[list[Grid], Tensor | None]:
    """Rows and columns of patches of each view, and the place of each patch where the batch tells it."""
    given = torch.as_tensor(entries[name])
    if name != "image_position_ids":
        return [(int(one[-2]), int(one[-1])) for one in given], None
    columns, rows = given[0, :, 0], given[0, :, 1]
    real = (columns >= 0) & (rows >= 0)
    grid = (int(rows[real].max()) + 1, int(columns[real].max()) + 1)
    place = torch.where(real, rows * grid[1] + columns, -1)
    if len(given) != 1 or int(real.sum()) != prod(grid):
        raise NoRasterError("The positions of the patches do not make one rectangle.")
    return [grid], place


def _groups(values: Tensor, name: str, grids: list[Grid], order: Tensor | None) -> list[Tensor]:
    """The patches of each view, in the order in which they came."""
    counts = [rows * columns for rows, columns in grids]
    if order is not None:
        patches = values[0]
        sorted_patches = torch.empty(counts[0], *patches.shape[1:])
        sorted_patches[order[order >= 0]] = patches[order >= 0]
        return [sorted_patches]
    if name == "target_sizes":  # patches side by side in one strip, [1, channel, height, patch * width]
        patches = values[0].unflatten(-1, (-1, values.shape[-2])).permute(2, 0, 1, 3)
    elif name == "spatial_shapes":  # padded, view by view
        patches = torch.cat([view[:count] for view, count in zip(values, counts, strict=True)])
    else:
        patches = values
    if len(patches) != sum(counts):
        raise NoRasterError(f"{len(patches)} patches came for grids of {sum(counts)}.")
    return list(patches.split(counts))


def _merges(source: Source, grids: list[Grid]) -> list[int]:
    """How many patches make one token, along each side."""
    if source.host.family.tiles == "lines":
        return [int(source.host.model.config.vision_config.spatial_merge_size)] * len(grids)
    if len(source.tiles) != len(grids):
        raise NoRasterError(f"{len(source.tiles)} groups of tokens came for {len(grids)} grids of patches.")
    merges = []
    for (rows, columns), (_, tokens) in zip(grids, source.tiles, strict=True):
        merge = isqrt(rows * columns // max(1, tokens))
        if not merge or rows % merge or columns % merge or rows * columns != tokens * merge**2:
            raise NoRasterError(f"{tokens} tokens do not fill {rows} x {columns} patches.")
        merges.append(merge)
    return merges


def _guesses(
    source: Source, groups: list[Tensor], grids: list[Grid], merges: list[int], *, explicit: bool
) -> Iterator[list[Tensor]]:
    """Pictures of all views for every layout and order that would fit."""
    orders = (False,) if explicit or max(merges) == 1 else (True, False)
    for blocks in orders:
        for layout in (_channels_first, _channels_last):
            squares = [layout(source, group) for group in groups]
            if all(square is not None for square in squares):
                yield [
                    _raster(square, grid, merge if blocks else 1)  # type: ignore[arg-type]
                    for square, grid, merge in zip(squares, grids, merges, strict=True)
                ]


def _channels_first(source: Source, patches: Tensor) -> Patches | None:
    """Patches as (channel, moment, row, column); of several moments of a still image the first is shown."""
    if patches.dim() == 4 and patches.shape[1] == 3:
        return patches
    moments, side = _patch_shape(source, patches)
    return patches.unflatten(1, (3, moments, side, side))[:, :, 0] if side else None


def _channels_last(source: Source, patches: Tensor) -> Patches | None:
    """Patches as (moment, row, column, channel)."""
    if patches.dim() > 2:
        if patches.shape[-1] != 3:
            return None
        return (patches[:, 0] if patches.dim() == 5 else patches).permute(0, 3, 1, 2)
    moments, side = _patch_shape(source, patches)
    return patches.unflatten(1, (moments, side, side, 3))[:, 0].permute(0, 3, 1, 2) if side else None


def _patch_shape(source: Source, patches: Tensor) -> tuple[int, int]:
    """Moments and side of flattened patches, or 0 where they are no squares of three channels."""
    if patches.dim() != 2:
        return 0, 0
    configured = getattr(getattr(source.host.model.config, "vision_config", None), "temporal_patch_size", None)
    for moments in (configured or 1, 1, 2):
        side = isqrt(patches.shape[1] // (3 * moments))
        if side and 3 * moments * side**2 == patches.shape[1]:
            return moments, side
    return 0, 0


def _raster(patches: Patches, grid: Grid, merge: int) -> Float[Tensor, "channel height width"]:
    """Lay patches out, blocks of merge x merge of them one after another."""
    rows, columns = grid
    blocks: Tensor = patches.unflatten(0, (rows // merge, columns // merge, merge, merge))
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 6).flatten(1, 3)


def _cells(source: Source, place: int, grid: Grid, merge: int, pixels: Tensor) -> tuple[Cells, ...]:
    if not source.host.family.raster:
        return ()
    rows, columns = grid[0] // merge, grid[1] // merge
    first, count = source.tiles[place]
    ends = source.host.family.tiles == "lines"  # one token before the lines, and one at the end of each
    tokens = tuple(first + ends + row * (columns + ends) + column for row in range(rows) for column in range(columns))
    if count != (rows * (columns + 1) + 2 if ends else rows * columns):
        raise NoRasterError(f"{count} tokens do not fill {rows} x {columns} cells.")
    return (Cells((0, 0, pixels.shape[2], pixels.shape[1]), (rows, columns), tokens),)
