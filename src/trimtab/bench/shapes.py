"""Shapes of the models and data that training is measured on: plain numbers, no weights.

The toy has the proportions of LLaVA-1.5-7B as far as a CPU allows: 0.35 words per visual token (200 to 576), a head of
2 % of the decoder's parameters, and a vision tower and projector of some 7 % of the decoder's forward pass (4 % there;
a smaller tower would be all launch costs). Its attention weighs more, since rows are long beside its width.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, fields, replace

from trimtab.errors import SettingError, near_miss, setting_error
from trimtab.pruners.budget import kept_count


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """A LLaVA-shaped model, the rows it is trained on and how they are put together.

    Attributes:
        layers: Decoder blocks.
        width: Width of the decoder.
        mlp: Inner width of its feed-forward layers (three matrices each).
        heads: Attention heads of the decoder.
        kv_heads: Heads of keys and values.
        vocab: Size of the vocabulary.
        tower_layers: Blocks of the vision tower; features come from the last but one.
        tower_width: Width of the tower.
        tower_mlp: Inner width of its feed-forward layers (two matrices each).
        tower_heads: Attention heads of the tower.
        tower_trained: Whether the tower is trained.
        image_size: Side of a tile in pixels.
        patch_size: Side of a patch in pixels.
        tiles: Tiles per sample; each is a block of visual tokens of its own (the flat merge of LLaVA-NeXT).
        text_mean: Mean text tokens per sample.
        text_cv: Standard deviation of the text lengths over their mean; lengths are lognormal.
        label_share: Share of the text that is supervised, at the end of each row.
        max_length: Longest row, visual tokens included; longer texts are cut.
        micro_batch: Rows of a padded batch.
        samples: Samples of one update of the weights, a multiple of `micro_batch`.
        pack_tokens: Most tokens of one pack.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    tower_layers: int
    tower_width: int
    tower_mlp: int
    tower_heads: int
    tower_trained: bool = False
    image_size: int
    patch_size: int
    tiles: int = 1
    text_mean: float
    text_cv: float = 0.7
    label_share: float = 0.5
    max_length: int
    micro_batch: int
    samples: int
    pack_tokens: int

    def __post_init__(self) -> None:
        """Check what a caller may change."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not 0 < value < math.inf:
                raise setting_error("TrainingShape", field.name, "a finite number above 0", value)
        if self.samples % self.micro_batch:
            raise setting_error("TrainingShape", "samples", f"a multiple of {self.micro_batch}", self.samples)
        least = self.visual_tokens + LEAST_TEXT
        for name in ("max_length", "pack_tokens"):
            if getattr(self, name) < least:
                raise setting_error(
                    "TrainingShape", name, f"at least {least} (the visual tokens and {LEAST_TEXT} words)",
                    getattr(self, name),
                )  # fmt: skip
        if self.label_share >= 1:
            raise setting_error("TrainingShape", "label_share", "below 1", self.label_share)

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a sample."""
        return self.tiles * self.tile_tokens

    @property
    def block_parameters(self) -> int:
        """Parameters of the matrices of all decoder blocks."""
        keys = self.width * self.kv_heads // self.heads
        return self.layers * self.width * (2 * self.width + 2 * keys + 3 * self.mlp)

    def keep(self, ratio: float) -> int:
        """Return how many tokens of a tile a keep ratio leaves.

        Raises:
            SettingError: The ratio is outside (0, 1], or leaves no token.
        """
        return kept_count(self.tile_tokens, ratio)


LEAST_TEXT = 8
"""Words of the shortest text."""

_LLAVA = TrainingShape(
    layers=32, width=4096, mlp=11008, heads=32, kv_heads=32, vocab=32064, tower_layers=24, tower_width=1024,
    tower_mlp=4096, tower_heads=16, image_size=336, patch_size=14, text_mean=200, max_length=2048, micro_batch=16,
    samples=80, pack_tokens=4096,
)  # fmt: skip

SHAPES: dict[str, TrainingShape] = {
    "toy": TrainingShape(
        layers=4, width=320, mlp=860, heads=5, kv_heads=5, vocab=320, tower_layers=6, tower_width=64, tower_mlp=256,
        tower_heads=2, image_size=64, patch_size=4, text_mean=90, max_length=912, micro_batch=10, samples=10,
        pack_tokens=2048,
    ),
    "llava-1.5-7b": _LLAVA,
    "llava-next-7b": replace(_LLAVA, tiles=5, max_length=4096, micro_batch=4, samples=40, pack_tokens=8192),
    "small": replace(
        _LLAVA, layers=24, width=896, mlp=4864, heads=14, kv_heads=2, vocab=151936, tower_trained=True, tiles=1,
    ),
}  # fmt: skip
"""``toy`` for a CPU; the shapes of LLaVA-1.5-7B and of LLaVA-NeXT-7B with 5 tiles; ``small``: a decoder of 0.5 billion
parameters (those of Qwen2-0.5B) behind a CLIP-L tower that is trained."""


def find_shape(size: str) -> TrainingShape:
    """Return the shape of a name.

    Raises:
        SettingError: There is none of this name.
    """
    if size not in SHAPES:
        raise SettingError(f"There is no size {size!r} of `bench training`. {near_miss(size, list(SHAPES))}")
    return SHAPES[size]


def draw_text_lengths(shape: TrainingShape, count: int, seed: int) -> list[int]:
    """Return lognormal text lengths in random order.

    The lengths are the quantiles of the distribution at evenly spread places, so that mean and spread are those asked
    for also where few are drawn; which of them meet in a batch is left to chance.

    Args:
        shape: For mean, spread and the longest row.
        count: How many, at least 1.
        seed: Of the order.

    Returns:
        Lengths between `LEAST_TEXT` and what the longest row leaves.
    """
    spread = math.sqrt(math.log(1 + shape.text_cv**2))
    normal = statistics.NormalDist(math.log(shape.text_mean) - spread**2 / 2, spread)
    most = shape.max_length - shape.visual_tokens
    drawn = [math.exp(normal.inv_cdf((place + 0.5) / count)) for place in range(count)]
    lengths = [min(most, max(LEAST_TEXT, round(length))) for length in drawn]
    random.Random(seed).shuffle(lengths)
    return lengths


def spread_places(lengths: list[int], count: int) -> list[int]:
    """Return the places of `count` rows whose lengths are evenly spread over all lengths, ascending."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return sorted(order[int((number + 0.5) * len(lengths) / count)] for number in range(count))


def first_fit(sizes: list[int], budget: int) -> list[list[int]]:
    """Put rows into packs of at most `budget` tokens, longest first, each into the first pack with room.

    Args:
        sizes: Tokens of each row, none above the budget.
        budget: Most tokens of a pack.

    Returns:
        The rows of each pack, ascending.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        if sizes[row] > budget:
            raise setting_error("first_fit", "budget", f"at least {sizes[row]}, the longest row", budget)
        place = next((number for number, left in enumerate(room) if left >= sizes[row]), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(budget)
        packs[place].append(row)
        room[place] -= sizes[row]
    return [sorted(pack) for pack in packs]
