"""Views of an image that goes to the tower whole, in tiles, or as a whole with tiles or crops beside it."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import prod
from typing import Any

import torch

from trimtab.anatomy.encode import _pack
from trimtab.anatomy.seen_views import ALIKE, Cells, Grid, NoRasterError, Source, View, put_together, square_raster
from trimtab.shapes import Float, Tensor

Pixels = Float[Tensor, "channel height width"]


def tile_views(source: Source) -> list[View]:
    """Return the views of an image of one tile or of several, each with a square raster of tokens.

    Tiles are put together where the image shows how they lie; a view of the whole before or behind them stands by
    itself. Else they stand side by side.
    """
    tiles = _real_tiles(source)
    cells = _cells_of_tiles(source, tiles)
    if len(tiles) == 1:
        return [View(tiles[0], (cells[0],) if cells else ())]
    found = _arrangement(source, tiles)
    if found is None:
        return [View(tile, (cells[place],) if cells else ()) for place, tile in enumerate(tiles)]
    (rows, columns), first = found
    whole = [place for place in range(len(tiles)) if not first <= place < first + rows * columns]
    views = [View(tiles[place], (cells[place],) if cells else ()) for place in whole]
    return [*views, _assembled(tiles, cells, first, rows, columns)]


def crop_views(source: Source) -> list[View]:
    """Return the view of the whole, then that of the local crops, whose tokens come first."""
    whole = source.natural(source.entries["pixel_values"].float())[0]
    local = source.entries.get("pixel_values_local")
    count = 0 if source.entries.get("num_local_patches") is None else sum(map(int, source.entries["num_local_patches"]))
    crops = [] if local is None else list(source.natural(local.float())[:count])
    if hasattr(source.host.base, "image_newline"):
        return _lines_of_crops(source, whole, crops)
    tiles = [*crops, whole]
    cells = _cells_of_tiles(source, tiles)
    views = [View(whole, (cells[-1],) if cells else ())]
    found = _arrangement(source, crops) if len(crops) > 1 else None
    if found is not None and prod(found[0]) == len(crops):
        return [*views, _assembled(crops, cells, 0, *found[0])]
    return [*views, *(View(crop, (cells[place],) if cells else ()) for place, crop in enumerate(crops))]


def packed_views(source: Source) -> list[View]:
    """Return the base view and the tiles put together, of models that pack them with a newline after each line.

    The model's own packing is given the place of every patch instead of its features: what comes out says where each
    token lies, also where tiles were cut or made smaller on the way.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    host, config = source.host, source.host.model.config
    side = int(config.vision_config.image_size)
    size = torch.as_tensor(source.entries["image_sizes"])[0].tolist()
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    tiles = source.natural(source.entries["pixel_values"].float()).flatten(0, -4)[: 1 + rows * columns]
    patches = _tokens_along(config)
    places = _patch_places(patches, side, rows, columns)
    (packed,) = _pack(host, dict(source.entries), places, newline=-1.0)
    base, large = packed[packed[:, 2] > 0.5], (packed[:, 2] <= 0.5).nonzero().flatten()
    first = source.tiles[0][0]
    views = [View(tiles[0], (_whole_cells(tiles[0], (patches, patches), first),))]
    if len(base) != patches**2:
        raise NoRasterError(f"{len(base)} tokens of the base view came, where {patches**2} were expected.")
    if len(tiles) == 1 + rows * columns and len(large):
        views.append(_large_view(put_together(tiles[1:], rows, columns), packed, large, first))
    return views


def _tokens_along(config: Any) -> int:
    """Rows (and columns) of tokens of one tile."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side * Fraction(getattr(config, "downsample_rate", 1)))


def _patch_places(patches: int, side: int, rows: int, columns: int) -> Float[Tensor, "tile patch 3"]:
    """Middle of every patch in the view that it is part of, and whether that is the base view."""
    middles = (torch.arange(patches) + 0.5) * side / patches
    tile = torch.stack([middles.repeat(patches), middles.repeat_interleave(patches), torch.zeros(patches**2)], 1)
    shifts = [(column * side, row * side, 0) for row in range(rows) for column in range(columns)]
    return torch.stack([tile + torch.tensor([0, 0, 1]), *(tile + torch.tensor(shift) for shift in shifts)])


def _large_view(pixels: Pixels, packed: Tensor, large: Tensor, start: int) -> View:
    """The tiles put together, with the tokens that are left of them after padding was cut off."""
    ends = [int(place) for place in large if packed[place, 2] < -0.5]
    lines = [range(before + 1, end) for before, end in pairwise([int(large[0]) - 1, *ends])]
    columns = len(lines[0]) if lines else 0
    if not columns or any(len(line) != columns for line in lines):
        raise NoRasterError("The lines of the packed image differ in length.")
    middles = packed[[place for line in lines for place in line]].view(len(lines), columns, 3)
    left, right = _span(middles[0, :, 0], pixels.shape[2])
    top, bottom = _span(middles[:, 0, 1], pixels.shape[1])
    tokens = tuple(start + place for line in lines for place in line)
    return View(pixels, (Cells((left, top, right, bottom), (len(lines), columns), tokens),))


def _span(middles: Float[Tensor, "cell"], length: int) -> tuple[int, int]:
    """Where the first cell of a line begins and the last ends, by their middles."""
    if len(middles) == 1:
        return 0, length
    half = float(middles[-1] - middles[0]) / (len(middles) - 1) / 2
    return max(0, round(float(middles[0]) - half)), min(length, round(float(middles[-1]) + half))


def _real_tiles(source: Source) -> list[Pixels]:
    """The tiles without those of padding, in natural colours."""
    values = source.natural(source.entries["pixel_values"].float())
    tiles = list(values.flatten(0, -4)) if values.dim() > 4 else list(values)
    mask = source.entries.get("pixel_attention_mask")
    if mask is not None and values.dim() > 4:
        real = torch.as_tensor(mask).bool().reshape(len(tiles), -1).any(1)
        tiles = [tile for tile, one in zip(tiles, real.tolist(), strict=True) if one]
    sizes = source.entries.get("image_sizes")
    if sizes is not None:  # padding on the right and at the bottom
        shapes = torch.as_tensor(sizes).reshape(-1, 2).tolist()
        tiles = [tile[:, :height, :width] for tile, (height, width) in zip(tiles, shapes, strict=False)]
    return tiles


def _cells_of_tiles(source: Source, tiles: list[Pixels]) -> list[Cells]:
    """The cells of each tile, or none where tokens stand in no raster."""
    if not source.host.family.raster:
        return []
    if len(source.tiles) != len(tiles):
        raise NoRasterError(f"{len(source.tiles)} groups of tokens came for {len(tiles)} tiles.")
    found = []
    for tile, (first, count) in zip(tiles, source.tiles, strict=True):
        grid = square_raster(count, tile.shape[1], tile.shape[2])
        ends = 0
        if grid is None:
            grid, ends = _raster_with_ends(count, tile.shape[1], tile.shape[2]), 1
        found.append(_whole_cells(tile, grid, first, ends))
    return found


def _raster_with_ends(count: int, height: int, width: int) -> Grid:
    """Rows and columns where a token ends each row."""
    for rows in range(1, count + 1):
        columns = rows * width // height
        if rows * width == columns * height and rows * (columns + 1) == count:
            return rows, columns
    raise NoRasterError(f"{count} tokens make no raster of square cells on {width} x {height} pixels.")


def _whole_cells(tile: Pixels, grid: Grid, first: int, ends: int = 0) -> Cells:
    rows, columns = grid
    tokens = tuple(first + row * (columns + ends) + column for row in range(rows) for column in range(columns))
    return Cells((0, 0, tile.shape[2], tile.shape[1]), grid, tokens)


def _arrangement(source: Source, tiles: list[Pixels]) -> tuple[Grid, int] | None:
    """Rows and columns of tiles and the number of the first, as the image shows; None where it does not."""
    best: tuple[float, Grid, int] | None = None
    for first, count in ((0, len(tiles)), (0, len(tiles) - 1), (1, len(tiles) - 1)):
        for rows in range(1, count + 1):
            if count % rows or len({tile.shape for tile in tiles[first : first + count]}) != 1:
                continue
            grid = (rows, count // rows)
            alike = source.likeness(put_together(tiles[first : first + count], *grid))
            if alike is not None and alike >= ALIKE and (best is None or alike > best[0]):
                best = (alike, grid, first)
    return None if best is None else best[1:]


def _assembled(tiles: list[Pixels], cells: list[Cells], first: int, rows: int, columns: int) -> View:
    """Tiles put together, each with its own cells."""
    height, width = tiles[first].shape[1:]
    moved = []
    for place in range(rows * columns if cells else 0):
        row, column = divmod(place, columns)
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        moved.append(Cells(box, cells[first + place].grid, cells[first + place].tokens))
    return View(put_together(tiles[first : first + rows * columns], rows, columns), tuple(moved))


def _lines_of_crops(source: Source, whole: Pixels, crops: list[Pixels]) -> list[View]:
    """The whole and its crops where lines run through all crops side by side and end with a token each."""
    filler = source.encoded.filler[0]
    first, count = source.tiles[0]
    ends = [] if filler is None else filler[0].nonzero().flatten().tolist()
    shown = [first + place for place in range(count) if place not in ends]
    columns, rows = (int(one) for one in source.entries["patches_grid"][0]) if crops else (0, 0)
    large = put_together(crops, rows, columns) if crops else None
    side = source.encoded.outputs["image"].last_hidden_state.shape[1]
    views = [View(whole, (_named(whole, shown[len(shown) - side :]),))]
    return views if large is None else [*views, View(large, (_named(large, shown[: len(shown) - side]),))]


def _named(pixels: Pixels, tokens: list[int]) -> Cells:
    grid = square_raster(len(tokens), pixels.shape[1], pixels.shape[2])
    if grid is None:
        raise NoRasterError(f"{len(tokens)} tokens make no raster of square cells.")
    return Cells((0, 0, pixels.shape[2], pixels.shape[1]), grid, tuple(tokens))
