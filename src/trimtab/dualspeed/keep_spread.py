"""Another share of every image: drawn at random, or by how much is in the image, with the mean that was asked for.

The fixed share says how many tokens a batch keeps; here they are dealt out anew among its images. Since the pruner
works on all tiles of one size and one count at once, the counts of a size take at most `LEVELS` values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from trimtab.ops.similarity import clean_tokens, full_float32, unit_tokens
from trimtab.pruners.random import uniform_noise
from trimtab.shapes import Bool, Float, Tensor

LEVELS = 8
"""Counts that tiles of one size may have, and so the most calls of the pruner for them."""

LEAST, MOST = 1 / 4, 5
"""Limits of what an image gets of its fixed count by content; the ends of a random share are as far apart."""

SKETCH = 48
"""Directions in which the content of a tile is looked at."""


# random --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def level_counts(base: int, cap: int) -> tuple[int, ...]:
    """Return the `LEVELS` counts that a random share draws from: evenly spaced in the logarithm, with mean `base`.

    The ends are a factor ``MOST / LEAST`` (20) apart; the middle is solved for so that the mean of the rounded counts,
    none below 1 or above `cap`, is `base`, or where several counts round up at once the nearest mean below it. Away
    from these limits that is 0.14 to 2.9 times `base`.

    Args:
        base: Mean count, in 1..cap.
        cap: Largest count.

    Returns:
        The counts, ascending.
    """
    low, high = math.log(base * LEAST / MOST) - 1, math.log(cap / LEAST) + math.log(MOST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(_levels(middle, cap)) > LEVELS * base else (middle, high)
    return _levels(low, cap)


def _levels(lowest: float, cap: int) -> tuple[int, ...]:
    step = math.log(MOST / LEAST) / (LEVELS - 1)
    return tuple(min(cap, max(1, round(math.exp(lowest + step * level)))) for level in range(LEVELS))


def level_of_image(seed: int, step: int, image: int) -> int:
    """Draw the level of an image, a pure function of its arguments.

    The images of a batch fall into runs of `LEVELS`, each of which has every level once, in an order of its own. So a
    batch of whole runs keeps as many tokens as with a fixed share, and every level is as likely for every image.

    Args:
        seed: Names the draw.
        step: Number of the step.
        image: Number of the image in the batch.

    Returns:
        A number in 0..LEVELS-1.
    """
    run, place = divmod(image, LEVELS)
    return sorted(range(LEVELS), key=lambda level: _hash(seed, step, run, level))[place]


def _hash(*names: int) -> bytes:
    return hashlib.blake2b(f"trimtab keep {names}".encode(), digest_size=8).digest()


# by content ----------------------------------------------------------------------------------------------------------


def shared_counts(
    base: Sequence[int], caps: Sequence[int], sizes: Sequence[int], content: Sequence[float]
) -> list[int]:
    """Deal out the tokens of a batch by content: as many in all as `base` has.

    A tile's part is in proportion to its count in `base` times its content, but at least a quarter of that count,
    never under 1, and at most its cap or five times the count; what a capped tile leaves goes to the others. Tiles of
    one size, count and cap are then sorted into few levels, a factor apart.

    Args:
        base: Fixed count of each tile, at least 1.
        caps: Largest count of each tile, at least that of `base`.
        sizes: Tokens of each tile.
        content: How much is in each tile, above 0; only ratios count.

    Returns:
        The counts. Their sum is that of `base`, unless rounding to levels runs into caps.
    """
    parts = _limited_parts(base, caps, content)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for tile, key in enumerate(zip(sizes, base, caps, strict=True)):
        groups.setdefault(key, []).append(tile)
    counts = [0] * len(parts)
    owed = 0.0
    for (_, _, cap), tiles in sorted(groups.items()):
        wanted = [parts[tile] for tile in tiles]
        found = _few_levels(wanted, cap, owed)
        owed += sum(wanted) - sum(found)
        for tile, count in zip(tiles, found, strict=True):
            counts[tile] = count
    return counts


def _limited_parts(base: Sequence[int], caps: Sequence[int], content: Sequence[float]) -> list[float]:
    """Return parts in proportion to base times content, each within its limits, with the sum of `base`."""
    total = sum(base)
    weights = [count * value for count, value in zip(base, content, strict=True)]
    limits = [(max(1.0, LEAST * c), min(cap, max(1.0, MOST * c))) for c, cap in zip(base, caps, strict=True)]

    def parts(scale: float) -> list[float]:
        return [min(high, max(low, scale * w)) for w, (low, high) in zip(weights, limits, strict=True)]

    below, above = 0.0, max(high / w for w, (_, high) in zip(weights, limits, strict=True))
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (below, middle) if sum(parts(middle)) >= total else (middle, above)
    return parts(above)


def _few_levels(parts: Sequence[float], cap: int, owed: float) -> list[int]:
    """Round parts to at most `LEVELS` whole numbers in 1..cap that sum to that of the parts and what is `owed`."""
    low, high = min(parts), max(parts)
    bins: dict[int, list[int]] = {}
    for tile, part in enumerate(parts):
        place = (LEVELS - 1) * math.log(part / low) / math.log(high / low) if high > low else 0.0
        bins.setdefault(min(LEVELS - 2, int(place)), []).append(tile)
    counts = [0] * len(parts)
    # The bin with the most tiles comes last and makes up, with two neighbouring counts, for the rounding of the others.
    *first, last = sorted(bins.values(), key=len)
    for tiles in first:
        wanted = sum(parts[tile] for tile in tiles)
        count = min(cap, max(1, round((wanted + owed) / len(tiles))))
        owed += wanted - count * len(tiles)
        for tile in tiles:
            counts[tile] = count
    count, more = divmod(round(sum(parts[tile] for tile in last) + owed), len(last))
    for place, tile in enumerate(sorted(last, key=lambda tile: -parts[tile])):
        counts[tile] = min(cap, max(1, count + (place < more)))
    return counts


def effective_ranks(
    groups: Sequence[tuple[Float[Tensor, "tile token width"], Bool[Tensor, "tile token"] | None]],
) -> list[float]:
    """Return how much is in every tile: the effective rank of its tokens, in 1..min(token, width, SKETCH).

    That is the exponential of the entropy of the singular values over their sum (Roy and Vetterli, EUSIPCO 2007), of
    tokens of length 1: 1 where all point one way, the number of directions where as many are equally strong. Wide
    tokens are first projected onto `SKETCH` fixed random directions, so that the values of every tile come from a
    small matrix. Float32, without gradients; waits for the device once, as it must, since counts decide shapes.

    Args:
        groups: Tokens of the tiles of each size, and which of them are real; None means all.

    Returns:
        One number per tile, group by group.
    """
    grams = []
    for tokens, valid in groups:
        unit = unit_tokens(clean_tokens(tokens, valid))
        with full_float32(unit.device):
            seen = unit if unit.shape[2] <= SKETCH else unit @ _directions(unit.shape[2], unit.device)
            gram = seen.mT @ seen
        grams.append(torch.nn.functional.pad(gram, (0, SKETCH - gram.shape[2], 0, SKETCH - gram.shape[1])))
    if not grams:
        return []
    small = torch.nan_to_num(torch.cat(grams).cpu(), posinf=0.0, neginf=0.0).double()  # broken tokens count as empty
    values = torch.linalg.eigvalsh(small).clamp_min(0).sqrt()
    share = values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    ranks: list[float] = torch.special.entr(share).sum(1).exp().tolist()
    return ranks


def _directions(width: int, device: torch.device) -> Float[Tensor, "width sketch"]:
    """Fixed random signs, the same on every device and in every step."""
    return torch.where(uniform_noise((0, 0, 0), SKETCH, width, device) < 0.5, -1.0, 1.0).float().mT
