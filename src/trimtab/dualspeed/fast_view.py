"""From encoded images to the kept tokens of every block: the pruner's work, tile by tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from trimtab.anatomy import EncodedImages, Words
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.keep_spread import effective_ranks, level_counts, level_of_image, shared_counts
from trimtab.errors import SettingError
from trimtab.pruners import Pruner, PrunerInput, Selection, kept_counts
from trimtab.shapes import Tensor


@dataclass(frozen=True)
class KeptTokens:
    """What stays of every block.

    Attributes:
        index: Kept tokens of each block, ascending, [kept].
        tokens: Their features (or the merged ones), [kept, width].
    """

    index: list[Tensor]
    tokens: list[Tensor]

    @property
    def count(self) -> int:
        """Kept tokens of the whole batch."""
        return sum(one.shape[0] for one in self.index)


@dataclass(frozen=True)
class _Tile:
    block: int
    start: int
    size: int
    keep: int


def choose_tokens(
    pruner: Pruner,
    config: DualSpeedConfig,
    encoded: EncodedImages,
    draw: tuple[int, int],
    text: Words | None = None,
) -> KeptTokens:
    """Let the pruner choose, once for all tiles of one size.

    Where the ratio leaves a tile whole nothing is chosen. Newline rows of packed images and videos carry no picture:
    they are dropped first, and kept only with the whole image or video. Of a small tile, as of an icon or of a frame
    that the processor has thinned out, at least one token stays; a block that is too small for the isolator beside its
    kept tokens stays whole, without isolator.

    With another `keep_spread` than ``"fixed"`` the tokens that the ratio leaves are dealt out anew among the tiles
    (`trimtab.dualspeed.keep_spread`), which then go to the pruner in at most eight groups of each size. By content
    this waits for the device once.

    Args:
        pruner: The pruner.
        config: For `keep_ratio`, `keep_rule`, `keep_spread` and `isolator_tokens`.
        encoded: The images.
        draw: Seed and step, for pruners that draw and for random shares.
        text: The words around each block, or None.

    Returns:
        The kept tokens, block by block.

    Raises:
        SettingError: The ratio keeps 0 tokens of every tile, or leaves no block of the batch a place for the isolator,
            though the model's tiles are all of one size; or (with `check_features`) a feature is not finite.
    """
    if config.check_features:
        _check_finite(encoded)
    groups: dict[tuple[int, int], list[_Tile]] = {}
    for tile in _tiles(config, encoded, draw):
        groups.setdefault((tile.size, tile.keep), []).append(tile)
    chosen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for first, ((size, keep), tiles) in enumerate(sorted(groups.items())):
        features = _features(encoded, tiles)
        if keep == size:
            every = torch.arange(size, device=features.device)
            found = [(every, one) for one in features.unbind(0)]
        else:
            selection = _select(pruner, encoded, tiles, features, keep, (*draw, first << 20), text)
            tokens = _tokens(features, selection)
            found = list(zip(selection.index.unbind(0), tokens.unbind(0), strict=True))
        for tile, (index, tokens) in zip(tiles, found, strict=True):
            chosen[tile.block, tile.start] = (index + tile.start, tokens)
    return _by_block(encoded, chosen)


def _tiles(config: DualSpeedConfig, encoded: EncodedImages, draw: tuple[int, int]) -> list[_Tile]:
    sizes = {size for sizes in encoded.tiles for size in sizes if size}
    counts = dict.fromkeys(sizes, 0)
    if config.pruner != "keep_all":
        counts = kept_counts(sizes, config.keep_ratio, config.keep_rule, any_size=encoded.any_size)
    blocks = [_tiles_of(block, counts, config, encoded) for block in range(len(encoded.blocks))]
    _require_room(config, encoded, blocks)
    if config.keep_spread != "fixed":
        blocks = _spread(config, encoded, blocks, draw)
    return [tile for tiles in blocks for tile in tiles]


def _tiles_of(block: int, counts: dict[int, int], config: DualSpeedConfig, encoded: EncodedImages) -> list[_Tile]:
    """The tiles of a block and what to keep of each; of a block without room for the isolator everything."""
    tiles, start, filler, total = [], 0, encoded.filler[block], encoded.blocks[block].shape[0]
    for size in encoded.tiles[block]:
        if size:
            keep = size if config.pruner == "keep_all" else counts[size]
            if keep < size and filler is not None:
                keep = min(keep, size - filler[1])
            tiles.append(_Tile(block, start, size, keep))
        start += size
    if sum(tile.keep for tile in tiles) + config.isolator_tokens > total:
        tiles = [replace(tile, keep=tile.size) for tile in tiles]
    if start < total and all(tile.keep == tile.size for tile in tiles):
        tiles.append(_Tile(block, start, total - start, total - start))
    return tiles


def _spread(
    config: DualSpeedConfig, encoded: EncodedImages, blocks: list[list[_Tile]], draw: tuple[int, int]
) -> list[list[_Tile]]:
    """Give the tiles that are pruned other counts, but not in blocks whose tiles would take the isolator's places."""
    pruned = [tile for tiles in blocks for tile in tiles if tile.keep < tile.size]
    if not pruned:
        return blocks
    # One cap for all tiles of a size and count, so that they have few counts together.
    alike: dict[tuple[int, int], int] = {}
    for tile in pruned:
        cap = _cap(config, encoded, tile)
        alike[tile.size, tile.keep] = min(cap, alike.get((tile.size, tile.keep), cap))
    caps = [alike[tile.size, tile.keep] for tile in pruned]
    if config.keep_spread == "random":
        levels = [level_of_image(*draw, tile.block) for tile in pruned]
        counts = [level_counts(t.keep, cap)[level] for t, cap, level in zip(pruned, caps, levels, strict=True)]
    else:
        content = _content(encoded, pruned)
        counts = shared_counts(
            [t.keep for t in pruned], caps, [t.size for t in pruned], [content[t.block, t.start] for t in pruned]
        )
    given = {(tile.block, tile.start): count for tile, count in zip(pruned, counts, strict=True)}
    dealt = [[replace(t, keep=given.get((t.block, t.start), t.keep)) for t in tiles] for tiles in blocks]
    room = [block.shape[0] - config.isolator_tokens for block in encoded.blocks]
    fits = [sum(tile.keep for tile in tiles) <= places for tiles, places in zip(dealt, room, strict=True)]
    return [new if fit else old for new, old, fit in zip(dealt, blocks, fits, strict=True)]


def _cap(config: DualSpeedConfig, encoded: EncodedImages, tile: _Tile) -> int:
    """Most tokens that a tile may keep, so that all tiles of its block together leave the isolator its places."""
    total, filler = encoded.blocks[tile.block].shape[0], encoded.filler[tile.block]
    shared = tile.size * (total - config.isolator_tokens) // total
    return max(tile.keep, shared if filler is None else min(shared, tile.size - filler[1]))


def _content(encoded: EncodedImages, tiles: list[_Tile]) -> dict[tuple[int, int], float]:
    sizes: dict[int, list[_Tile]] = {}
    for tile in tiles:
        sizes.setdefault(tile.size, []).append(tile)
    found = effective_ranks([(_features(encoded, group), _real(encoded, group)) for group in sizes.values()])
    order = [tile for group in sizes.values() for tile in group]
    return {(tile.block, tile.start): value for tile, value in zip(order, found, strict=True)}


def _require_room(config: DualSpeedConfig, encoded: EncodedImages, blocks: list[list[_Tile]]) -> None:
    """Refuse an isolator that no block has a place for, where that is no matter of small pictures."""
    full = [tiles for tiles in blocks if tiles]
    if not config.isolator_tokens or encoded.any_size or not full:
        return
    if any(tile.keep < tile.size for tiles in full for tile in tiles):
        return
    block = full[0][0].block
    raise SettingError(
        f"keep_ratio={config.keep_ratio} (rule {config.keep_rule!r}) of the {encoded.blocks[block].shape[0]} visual "
        f"tokens of image {block}, as of every other of the batch, leaves fewer than the {config.isolator_tokens} "
        "places that the isolator needs. Lower keep_ratio or isolator_tokens."
    )


def _select(
    pruner: Pruner,
    encoded: EncodedImages,
    tiles: list[_Tile],
    features: Tensor,
    keep: int,
    draw: tuple[int, int, int],
    text: Words | None,
) -> Selection:
    def stack(values: list[Tensor] | None) -> Tensor | None:
        if values is None:
            return None
        return torch.stack([values[t.block][t.start : t.start + t.size] for t in tiles])

    inputs: dict[str, Any] = {"hidden": stack(encoded.hidden), "keys": stack(encoded.keys)}
    if encoded.cls_attention is not None:
        inputs["cls_attention"] = stack(encoded.cls_attention)
    if text is not None:
        inputs["text"], inputs["text_valid"] = text.around([t.block for t in tiles])
    valid = _real(encoded, tiles)
    return pruner.select(PrunerInput(features, valid=valid, grid=encoded.grid, draw=draw, **inputs), keep)


def _features(encoded: EncodedImages, tiles: list[_Tile]) -> Tensor:
    return torch.stack([encoded.blocks[t.block][t.start : t.start + t.size] for t in tiles])


def _real(encoded: EncodedImages, tiles: list[_Tile]) -> Tensor | None:
    """Which tokens of some tiles show something, [tile, token], or None where all do."""
    if all(encoded.filler[t.block] is None for t in tiles):
        return None
    masks: list[Tensor] = []
    for t in tiles:
        filler = encoded.filler[t.block]
        whole = torch.ones(t.size, dtype=torch.bool, device=encoded.blocks[t.block].device)
        masks.append(whole if filler is None else ~filler[0][t.start : t.start + t.size])
    return torch.stack(masks)


def _tokens(features: Tensor, selection: Selection) -> Tensor:
    if selection.tokens is not None:
        return selection.tokens.to(features.dtype)
    return features.gather(1, selection.index[..., None].expand(-1, -1, features.shape[-1]))


def _by_block(encoded: EncodedImages, chosen: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> KeptTokens:
    mine: list[list[tuple[Tensor, Tensor]]] = [[] for _ in encoded.blocks]
    for key in sorted(chosen):
        mine[key[0]].append(chosen[key])
    index, tokens = [], []
    for features, parts in zip(encoded.blocks, mine, strict=True):
        empty = torch.zeros(0, dtype=torch.long, device=features.device)
        index.append(torch.cat([one for one, _ in parts]) if parts else empty)
        tokens.append(torch.cat([one for _, one in parts]) if parts else features)
    return KeptTokens(index, tokens)


def _check_finite(encoded: EncodedImages) -> None:
    finite = torch.stack([block.isfinite().all() for block in encoded.blocks]).tolist()
    if not all(finite):
        raise SettingError(
            f"The visual features of image {finite.index(False)} of the batch hold NaN or infinity. Look at the image "
            "and at the vision tower; with check_features=False the pruner would choose among broken numbers."
        )
