"""What a run's own rows are made of: tokens per image before and after pruning, and the time that a row takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
"""Rows that are processed to count tokens and to time data loading, at most."""


@dataclass
class RowTokens:
    """Sums over the rows that were processed.

    Attributes:
        text, visual, labels: Tokens in all: text, visual, supervised.
        pixels: Values that enter the tower, over three channels.
        images: Images of each row.
        row_seconds: Time of reading, decoding and processing each row.
        full, kept: One entry per image: its visual tokens, and those that a fast step keeps. Where the model joins
            the images of a row, their mean.
        isolator: Isolator rows of each image in a fast step, mean.
    """

    text: int = 0
    visual: int = 0
    labels: int = 0
    pixels: float = 0.0
    images: list[int] = field(default_factory=list)
    row_seconds: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    isolator: float = 0.0

    @property
    def rows(self) -> int:
        """Rows that were processed."""
        return len(self.images)

    def per_row(self) -> dict[str, float]:
        """Return means per row: text, visual, kept, isolator and supervised tokens, images and pixels."""
        images = sum(self.images)
        sums = {
            "text": self.text,
            "visual": self.visual,
            "kept": self.visual * sum(self.kept) / sum(self.full),
            "isolator": self.isolator * images,
            "labels": self.labels,
            "images": images,
            "pixels": self.pixels,
        }
        return {name: value / self.rows for name, value in sums.items()}

    def per_image(self) -> dict[str, Any]:
        """Return least, mean and most visual tokens of an image before and after pruning, and its isolator rows."""
        return {"full": _spread(self.full), "kept": _spread(self.kept), "isolator": self.isolator}

    @property
    def seconds_per_row(self) -> float:
        """Mean time of a row, without the first where there are others: it pays for what is done once."""
        return fmean(self.row_seconds[1:] or self.row_seconds)


def read_timed(collate: SupervisedCollator, rows: Any, seconds: float) -> tuple[RowTokens, list[dict[str, Any]]]:
    """Turn the first rows into batches of one, as the training's collator does, and time each.

    Args:
        collate: The collator of the run.
        rows: Rows of the run; an image is read and decoded when its row is asked for.
        seconds: No further row is begun after that, but for a second one.

    Returns:
        Counts, still without what pruning leaves, and the batches.

    Raises:
        DataError: A row cannot be used, or no row has a visual token.
    """
    found, batches = RowTokens(), []
    began = time.perf_counter()
    for place in range(min(SAMPLE, len(rows))):
        start = time.perf_counter()
        row = rows[place]
        batch = collate([row])
        found.row_seconds.append(time.perf_counter() - start)
        _add(found, row, batch, collate)
        batches.append(batch)
        if place and time.perf_counter() - began > seconds:
            break
    if not found.visual:
        raise DataError("The rows looked at hold no visual token, so there is nothing to prune. Are the images given?")
    return found, batches


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
        batches: One per row.
        device: Where the tower runs.
        seconds: No further row is begun after that.

    Raises:
        SettingError: keep_ratio keeps nothing of a tile, or leaves the isolator no place.
    """
    view = _view(model, settings, device)
    prefix = torch.zeros(settings.isolator_tokens, view.host.width, device=device) if settings.isolator_tokens else None
    blocks = images = 0
    began = time.perf_counter()
    for number, batch in zip(found.images, batches, strict=True):
        if not has_images(batch):
            continue
        inputs = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            encoded, layout = view.encode(inputs)
            chosen = view.choose(inputs, encoded, layout, 0)
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


def _add(found: RowTokens, row: Any, batch: dict[str, Any], collate: SupervisedCollator) -> None:
    visual = int(torch.isin(batch["input_ids"], torch.tensor(collate.image_token_ids)).sum())
    found.visual += visual
    found.text += int(batch["attention_mask"].sum()) - visual
    found.labels += int((batch["labels"] != collate.ignore_index).sum())
    found.images.append(len(row["images"]))
    if (values := batch.get("pixel_values")) is not None:
        found.pixels += values.numel() / 3  # flat patches (Qwen) are rows of three channels too


def _by_image(counts: list[int], images: int) -> list[float]:
    """Return one count per image; where blocks are not images, each image has its share of the row."""
    return [float(count) for count in counts] if len(counts) == images else [sum(counts) / images] * images


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "mean": fmean(values), "max": max(values)}
