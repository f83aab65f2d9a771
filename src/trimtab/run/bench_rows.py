"""Random rows for `bench training`: updates of samples, cut into padded batches or packs, the same for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.anatomy.row_layout import NOTES, PlaceholderRule, note_rows
from trimtab.bench.floor import FloorModel, Rows
from trimtab.bench.shapes import TrainingShape, draw_text_lengths, first_fit, spread_places
from trimtab.dualspeed.samples import Samples
from trimtab.dualspeed.schedule import mode_of_sample
from trimtab.ops.label_head import IGNORED
from trimtab.shapes import Float, Int, Tensor

PAD, FIRST_WORD, PROMPT = 0, 3, 4
"""Padding, the first id of a word, and how many words stand before the images."""


@dataclass(frozen=True)
class Batch:
    """Some rows of an update, put together.

    Attributes:
        rows: Which.
        entries: Arguments of the model but for the pixels.
        counts: Lengths of the rows.
    """

    rows: list[int]
    entries: dict[str, Any]
    counts: Rows


@dataclass(frozen=True)
class Update:
    """The samples of one update of the weights.

    Attributes:
        text: Words of each sample, the prompt before the image included.
        labels: How many of them are supervised; they stand at the end.
        slow: Which samples are slow where each has its own mode.
        numbers: The sample's number, from which DualSpeed draws the same mode.
        words: Ids of the words of each sample.
        pixels: All images.
    """

    text: list[int]
    labels: list[int]
    slow: list[bool]
    numbers: list[int]
    words: list[Int[Tensor, "word"]]
    pixels: Float[Tensor, "row tile channel height side"]

    @property
    def items(self) -> int:
        """Supervised words of the update that have a predecessor in their row."""
        return sum(self.labels)

    def counts(self, rows: Sequence[int]) -> Rows:
        """Return the lengths of some samples."""
        return Rows(self.text, self.labels, self.slow).only(rows)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the model for a batch."""
        index = torch.tensor(batch.rows, device=self.pixels.device)
        return {**batch.entries, "pixel_values": self.pixels.index_select(0, index).flatten(0, 1)}


def make_updates(
    shape: TrainingShape,
    count: int,
    *,
    slow_ratio: float,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Update]:
    """Return updates of random samples.

    In each the share of slow samples is the nearest that its size allows, and their lengths are spread like those of
    all, so that an update costs what a mean one costs.

    Args:
        shape: Model and data.
        count: How many updates.
        slow_ratio: Share of slow samples.
        seed: Of words, pixels, lengths and modes.
        device: Where the pixels go.
        dtype: Their type.
    """
    lengths = draw_text_lengths(shape, count * shape.samples, seed)
    generator = torch.Generator().manual_seed(seed)
    updates, number = [], 0
    for first in range(0, len(lengths), shape.samples):
        text = lengths[first : first + shape.samples]
        slow_rows = spread_places(text, round(slow_ratio * len(text)))
        slow = [row in slow_rows for row in range(len(text))]
        numbers = []
        for is_slow in slow:
            while (mode_of_sample(number, epoch=0, slow_ratio=slow_ratio, seed=seed) == "slow") != is_slow:
                number += 1
            numbers.append(number)
            number += 1
        words = [torch.randint(FIRST_WORD, shape.vocab - 1, (length,), generator=generator) for length in text]
        # One image's noise per sample: drawn on the CPU, so that every device sees the same.
        pixels = torch.randn(len(text), shape.tiles, 3, shape.image_size, shape.image_size, generator=generator)
        labels = [max(1, round(shape.label_share * length)) for length in text]
        updates.append(Update(text, labels, slow, numbers, words, pixels.to(device, dtype)))
    return updates


def padded_batch(
    shape: TrainingShape,
    update: Update,
    rows: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    placeholders: int | None = None,
    numbered: bool = False,
    rule: PlaceholderRule | None = None,
) -> Batch:
    """Put rows together as a collator does, padding on the right.

    Args:
        shape: For the image token and the number of visual tokens.
        update: The samples.
        rows: Which of them.
        device: Where the batch goes.
        placeholders: Image tokens per tile; by default one for every visual token. The released code has one per tile.
        numbered: Whether the batch carries the samples' numbers.
        rule: That of the model where the batch shall carry notes, as trimtab's Trainer makes them in the loader's
            workers, so that a step asks the device for nothing.
    """
    per_tile = shape.tile_tokens if placeholders is None else placeholders
    image = torch.full((shape.tiles * per_tile,), shape.vocab - 1)
    ids = [torch.cat((update.words[row][:PROMPT], image, update.words[row][PROMPT:])) for row in rows]
    size = (len(rows), max(map(len, ids)))
    entries: dict[str, Any] = {
        "input_ids": torch.full(size, PAD), "labels": torch.full(size, IGNORED),
        "attention_mask": torch.zeros(size, dtype=torch.long),
    }  # fmt: skip
    for place, (row, one) in enumerate(zip(rows, ids, strict=True)):
        end, answer = len(one), update.labels[row]
        entries["input_ids"][place, :end] = one
        entries["attention_mask"][place, :end] = 1
        entries["labels"][place, end - answer : end] = one[end - answer :]
    moved = {name: value.to(device) for name, value in entries.items()}
    if rule is not None:
        moved[NOTES] = note_rows(rule, {**entries, "pixel_values": update.pixels[list(rows)]})
    if numbered:
        moved["samples"] = Samples(tuple(update.numbers[row] for row in rows), 0)
    return Batch(list(rows), moved, update.counts(rows))


def split_rows(shape: TrainingShape, floor: FloorModel, update: Update, view: str, packing: bool) -> list[list[int]]:
    """Return which rows of an update meet in a batch: neighbours, or those that fit into a pack in this view."""
    everyone = list(range(len(update.text)))
    if not packing:
        return [everyone[first : first + shape.micro_batch] for first in range(0, len(everyone), shape.micro_batch)]
    return first_fit(floor.lengths(view, update.counts(everyone)), shape.pack_tokens)
