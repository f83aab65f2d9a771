"""From encoded images to the kept tokens of every block: the pruner's work, tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trimtab.anatomy import EncodedImages
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import SettingError
from trimtab.pruners import Pruner, PrunerInput, Selection, kept_count
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
    text: tuple[Tensor, Tensor] | None = None,
) -> KeptTokens:
    """Let the pruner choose, once for all tiles of one size.

    Where the ratio leaves a tile whole nothing is chosen. Newline rows of packed images and videos carry no picture:
    they are dropped first, and kept only with the whole image or video.

    Args:
        pruner: The pruner.
        config: For `keep_ratio` and `keep_rule`.
        encoded: The images.
        draw: Seed and step, for pruners that draw.
        text: Embeddings [block, word, width] of the words around each block and which count, or None.

    Returns:
        The kept tokens, block by block.

    Raises:
        SettingError: The ratio keeps 0 tokens of a tile, or (with `check_features`) a feature is not finite.
    """
    if config.check_features:
        _check_finite(encoded)
    groups: dict[tuple[int, int], list[_Tile]] = {}
    for tile in _tiles(config, encoded):
        groups.setdefault((tile.size, tile.keep), []).append(tile)
    chosen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for first, ((size, keep), tiles) in enumerate(sorted(groups.items())):
        features = torch.stack([encoded.blocks[t.block][t.start : t.start + size] for t in tiles])
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


def _tiles(config: DualSpeedConfig, encoded: EncodedImages) -> list[_Tile]:
    tiles = []
    for block, sizes in enumerate(encoded.tiles):
        start = 0
        filler = encoded.filler[block]
        for size in sizes:
            if size:
                keep = kept_count(size, config.keep_ratio, config.keep_rule)
                if keep < size and filler is not None:
                    keep = min(keep, size - filler[1])
                tiles.append(_Tile(block, start, size, size if config.pruner == "keep_all" else keep))
            start += size
        rest = encoded.blocks[block].shape[0] - start
        if rest and all(tile.keep == tile.size for tile in tiles if tile.block == block):
            tiles.append(_Tile(block, start, rest, rest))
    return tiles


def _select(
    pruner: Pruner,
    encoded: EncodedImages,
    tiles: list[_Tile],
    features: Tensor,
    keep: int,
    draw: tuple[int, int, int],
    text: tuple[Tensor, Tensor] | None,
) -> Selection:
    def stack(values: list[Tensor] | None) -> Tensor | None:
        if values is None:
            return None
        return torch.stack([values[t.block][t.start : t.start + t.size] for t in tiles])

    valid = None
    if any(encoded.filler[t.block] is not None for t in tiles):
        masks: list[Tensor] = []
        for t in tiles:
            filler = encoded.filler[t.block]
            whole = torch.ones(t.size, dtype=torch.bool, device=features.device)
            masks.append(whole if filler is None else ~filler[0][t.start : t.start + t.size])
        valid = torch.stack(masks)
    blocks = torch.tensor([t.block for t in tiles], device=features.device)
    inputs: dict[str, Any] = {"hidden": stack(encoded.hidden), "keys": stack(encoded.keys)}
    if encoded.cls_attention is not None:
        inputs["cls_attention"] = stack(encoded.cls_attention)
    if text is not None:
        inputs |= {"text": text[0][blocks], "text_valid": text[1][blocks]}
    return pruner.select(PrunerInput(features, valid=valid, grid=encoded.grid, draw=draw, **inputs), keep)


def _tokens(features: Tensor, selection: Selection) -> Tensor:
    if selection.tokens is not None:
        return selection.tokens.to(features.dtype)
    return features.gather(1, selection.index[..., None].expand(-1, -1, features.shape[-1]))


def _by_block(encoded: EncodedImages, chosen: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> KeptTokens:
    index, tokens = [], []
    for block, features in enumerate(encoded.blocks):
        mine = [chosen[key] for key in sorted(key for key in chosen if key[0] == block)]
        empty = torch.zeros(0, dtype=torch.long, device=features.device)
        index.append(torch.cat([one for one, _ in mine]) if mine else empty)
        tokens.append(torch.cat([one for _, one in mine]) if mine else features)
    return KeptTokens(index, tokens)


def _check_finite(encoded: EncodedImages) -> None:
    finite = torch.stack([block.isfinite().all() for block in encoded.blocks]).tolist()
    if not all(finite):
        raise SettingError(
            f"The visual features of image {finite.index(False)} of the batch hold NaN or infinity. Look at the image "
            "and at the vision tower; with check_features=False the pruner would choose among broken numbers."
        )
