"""What a run's own rows are made of: tokens per image before and after pruning, and the time that a row takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch

from trimtab.anatomy import has_images, open_host
from trimtab.data import SupervisedCollator
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.view import FastView
from trimtab.errors import DataError
from trimtab.run.shallow import decoder_stack, least_tower_layers, materialise, tower_stack

SAMPLE = 8
"""Rows that are processed to count tokens, to try their lengths and to time data loading, at most."""


@dataclass
class RowTokens:
    """Counts of the rows that were processed.

    Means weigh rows with images and rows of text alone by their shares of all rows, whatever the shares among those
    processed. At least one row has images.

    Attributes:
        rows: Of each row ``images``, ``text``, ``visual``, ``labels`` (supervised tokens), ``pixels`` (values that
            enter the tower, over three channels) and ``seconds`` (of reading, decoding and processing).
        text_only: Share of rows without image among all rows that were looked at.
        full, kept: One entry per image: its visual tokens, and those that a fast step keeps. Where the model joins
            the images of a row, their mean.
        isolator: Isolator rows of each image in a fast step, mean.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    text_only: float = 0.0
    full: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    isolator: float = 0.0

    def per_row(self) -> dict[str, float]:
        """Return means per row: text, visual, kept, isolator and supervised tokens, images and pixels."""
        means = {name: self._mean(name, self.rows) for name in ("text", "visual", "labels", "images", "pixels")}
        kept = means["visual"] * sum(self.kept) / sum(self.full)
        return {**means, "kept": kept, "isolator": self.isolator * means["images"]}

    def per_image(self) -> dict[str, Any]:
        """Return least, mean and most visual tokens of an image before and after pruning, and its isolator rows."""
        return {"full": _spread(self.full), "kept": _spread(self.kept), "isolator": self.isolator}

    @property
    def seconds_per_row(self) -> float:
        """Mean time of a row, without the first where others tell: it pays for what is done once."""
        later = self.rows[1:]
        return self._mean("seconds", later if any(row["images"] for row in later) else self.rows)

    def _mean(self, name: str, rows: Sequence[dict[str, float]]) -> float:
        shown = [row[name] for row in rows if row["images"]]
        told = [row[name] for row in rows if not row["images"]]
        if not told:  # none was reached in time
            told = [0.0] if name in ("images", "visual", "pixels") else shown
        return (1 - self.text_only) * fmean(shown) + self.text_only * fmean(told)


def choose_places(images: Mapping[int, int]) -> list[int]:
    """Choose rows to process, evenly spread, with images and of text alone by turns.

    Args:
        images: Place of each row looked at -> its images; at least one row has one.

    Returns:
        At most `SAMPLE` places, beginning with a row with images. Rows of text alone come by their share, but at least
        one where there is any, and at most half.
    """
    shown = [place for place, count in images.items() if count]
    told = [place for place, count in images.items() if not count]
    texts = min(len(told), max(1, round(SAMPLE * len(told) / len(images))), SAMPLE // 2)
    pairs = zip_longest(_evenly(shown, SAMPLE - texts), _evenly(told, texts))
    return [place for pair in pairs for place in pair if place is not None]


def read_timed(
    collate: SupervisedCollator, rows: Any, places: Sequence[int], seconds: float
) -> tuple[RowTokens, dict[int, dict[str, Any]], dict[int, str]]:
    """Turn rows into batches of one, as the training's collator does, and time each.

    Args:
        collate: The collator of the run, which must keep rows without labels (``empty_labels="count"``).
        rows: Rows of the run; an image is read and decoded when its row is asked for.
        places: Which of them, in this order.
        seconds: No further row is begun after that, but for a second one.

    Returns:
        Counts, still without what pruning leaves; place -> batch of every row that could be processed; and place -> why
        training would refuse the row.
    """
    found = RowTokens()
    batches: dict[int, dict[str, Any]] = {}
    refused: dict[int, str] = {}
    began = time.perf_counter()
    for number, place in enumerate(places):
        start = time.perf_counter()
        if number >= 2 and start - began > seconds:
            break
        try:
            row = rows[place]
            batch = collate([row])
        except DataError as cause:
            refused[place] = str(cause)
            continue
        found.rows.append({**_counts(row, batch, collate), "seconds": time.perf_counter() - start})
        batches[place] = batch
        if not found.rows[-1]["labels"]:
            length = int(batch["attention_mask"].sum())
            refused[place] = _unsupervised(length, collate.max_length)
    return found, batches, refused


def _unsupervised(length: int, limit: int | None) -> str:
    if limit is not None and length >= limit:
        return f"No supervised token is left within max_length={limit}. Raise max_length, or leave the row out."
    return "No token of its answers is supervised. Correct the answers, or leave the row out."


def count_kept(
    model: Any,
    settings: DualSpeedConfig,
    found: RowTokens,
    batches: Sequence[dict[str, Any]],
    device: torch.device,
    seconds: float,
) -> None:
    """Count, image by image, what the model family's own tiles leave; completes `found`.

    The tower runs with as few blocks as it can have and random weights, since only the number of its outputs matters.

    Args:
        model: The model of the run on the meta device; it is of no use for anything else afterwards.
        settings: Those of DualSpeed.
        found: Counts of the same rows.
        batches: One per row; at least one has images.
        device: Where the tower runs.
        seconds: No further row is begun after that.

    Raises:
        SettingError: keep_ratio keeps nothing of a tile, or leaves the isolator no place.
    """
    view = _view(model, settings, device)
    prefix = torch.zeros(settings.isolator_tokens, view.host.width, device=device) if settings.isolator_tokens else None
    blocks = images = 0
    began = time.perf_counter()
    for row, batch in zip(found.rows, batches, strict=True):
        if not has_images(batch):
            continue
        number = int(row["images"])
        inputs = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            encoded, layout = view.encode(inputs)
            chosen = view.choose(inputs, encoded, layout, 0, alone=True)
            view.shorten(inputs, encoded, layout, chosen, prefix)  # refuses what training would refuse
        sizes = [block.shape[0] for block in encoded.blocks]
        places = [place for place, size in enumerate(sizes) if size]  # a row without image may have an empty block
        found.full += _by_image([sizes[place] for place in places], number)
        found.kept += _by_image([chosen.index[place].shape[0] for place in places], number)
        blocks, images = blocks + len(places), images + number
        if time.perf_counter() - began > seconds:
            break
    found.isolator = settings.isolator_tokens * blocks / images


def _view(model: Any, settings: DualSpeedConfig, device: torch.device) -> FastView:
    """Open a model whose tower alone has memory; a pruner that draws stands for the one of the settings.

    All pruners keep as many tokens as they are told, and this one asks nothing of the tower.
    """
    host = open_host(model)
    tower = tower_stack(model)
    if tower is not None:
        tower.cut(least_tower_layers(model))
    decoder_stack(model).cut(0)
    words = (host.model.get_input_embeddings(), host.output_embeddings, host.model.get_decoder())
    materialise(model, device, without=words)
    if settings.pruner != "keep_all":
        settings = replace(settings, pruner="random", pruner_options={})
    return FastView(host, settings)


def _counts(row: Any, batch: dict[str, Any], collate: SupervisedCollator) -> dict[str, float]:
    visual = int(torch.isin(batch["input_ids"], torch.tensor(collate.image_token_ids)).sum())
    pixels = batch.get("pixel_values")
    return {
        "images": len(row["images"]),
        "text": int(batch["attention_mask"].sum()) - visual,
        "visual": visual,
        "labels": int((batch["labels"] != collate.ignore_index).sum()),
        "pixels": 0.0 if pixels is None else pixels.numel() / 3,  # flat patches (Qwen) are rows of three channels too
    }


def _by_image(counts: list[int], images: int) -> list[float]:
    """Return one count per image; where blocks are not images, each image has its share of the row."""
    return [float(count) for count in counts] if len(counts) == images else [sum(counts) / images] * images


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "mean": fmean(values), "max": max(values)}


def _evenly(values: Sequence[int], count: int) -> list[int]:
    """Return `count` values, the first and the last among them, or all where there are fewer."""
    if count >= len(values):
        return list(values)
    last = max(1, count - 1)
    return [values[round(number * (len(values) - 1) / last)] for number in range(count)]
