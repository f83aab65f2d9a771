"""What the checks of the model families share: models, batches, and references from the stock model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from tests.conformance.families import SUITE
from tests.tiny import Batch, TinyFamily
from torch import Tensor

from trimtab import DualSpeedConfig
from trimtab.anatomy import encode_images, open_host, read_rows

ROWS = (1, 0, 2)
VIDEO_ROWS = (0, 1, 1)
NO_IMAGES, BESIDE_VIDEOS = (0, 0, 0), (1, 0, 1)
TIGHT = 2e-5
SIDES = ("right", "left")


@functools.cache
def _built(name: str) -> Any:
    return SUITE[name].build_model()


def model_of(family: TinyFamily, fresh: bool = False) -> Any:
    """Return the family's model; a copy of its own where the caller will change it."""
    return copy.deepcopy(_built(family.name)) if fresh else _built(family.name)


def keep_some(blocks: Sequence[Tensor], share: float = 0.3, seed: int = 0) -> list[Tensor]:
    """Choose ascending tokens of every block at random; blocks without tokens keep none."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(len(block), generator=generator)[: max(1, int(share * len(block))) if len(block) else 0]
        .sort()
        .values
        for block in blocks
    ]


def logits_of(model: Any, inputs: Batch) -> Tensor:
    """Return the logits of a forward without labels."""
    with torch.no_grad():
        logits: Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits


def survivors(model: Any, batch: Batch, kept: Sequence[Tensor], blocks: Sequence[Tensor]) -> Tensor:
    """Return the mask of the places of the full batch that stay."""
    encoded = encode_images(model, batch)
    layout = read_rows(model, batch, encoded)
    stays = [
        torch.zeros(len(block), dtype=torch.bool).index_fill(0, k, True) for block, k in zip(blocks, kept, strict=True)
    ]
    mask = batch["attention_mask"].bool().clone()
    mask.view(-1)[layout.place] = torch.cat(stays)
    return mask


def is_floating(value: Any) -> bool:
    """Return whether a value is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def batches(family: TinyFamily, model: Any, side: str) -> list[Batch]:
    """Return the batches of the identities: images, and where the family takes videos images and videos together."""
    found = [family.make_batch(model, ROWS, padding_side=side)]
    if family.videos is not None:
        images = BESIDE_VIDEOS if family.mixed else NO_IMAGES
        found.append(family.make_batch(model, images, padding_side=side, videos_per_row=VIDEO_ROWS))
    return found


def settings(**changes: Any) -> DualSpeedConfig:
    """Return settings whose choice does not depend on the features, so that small tiles keep something."""
    return DualSpeedConfig(**{"keep_ratio": 0.25, "isolator_tokens": 2, "keep_rule": "ceil", "seed": 1, **changes})


def frames_of(family: TinyFamily, model: Any, batch: Batch) -> list[list[int]]:
    """Return how many tokens each frame has, video by video, from the batch and the placeholders of its videos."""
    assert family.videos is not None
    if (mask := batch.get("video_compression_mask")) is not None:  # some of every frame is left out, two by two patches
        shapes = [(count, rows * columns // 4) for count, rows, columns in batch["video_grid_thw"].tolist()]
        parts = mask.split([count * size for count, size in shapes])
        return [part.view(shape).sum(1).tolist() for part, shape in zip(parts, shapes, strict=True)]
    _, runs = family.videos(model, VIDEO_ROWS, torch.Generator().manual_seed(0))
    videos = [video for row in runs for video in row]
    found = []
    for number, (video, count) in enumerate(zip(videos, frame_counts(model, batch, len(videos)), strict=True)):
        assert len(video) in (1, count), f"video {number} has {len(video)} runs of placeholders for {count} frames"
        found.append(video if len(video) == count else [sum(video) // count] * count)
    return found


def frame_counts(model: Any, batch: Batch, videos: int) -> list[int]:
    """Return how many frames each video has after the encoder."""
    if (grids := batch.get("video_grid_thw")) is not None:
        merged = getattr(model.config.vision_config, "temporal_merge_size", 1)
        return [int(frames) // merged for frames in grids[:, 0]]
    if (grids := batch.get("video_grids")) is not None:
        return grids[:, 0].tolist()
    if (counts := batch.get("num_frames_per_video")) is not None:
        return counts.tolist()
    if (shapes := batch.get("target_sizes_videos")) is not None:
        assert (videos, len(shapes)) == (2, 5), "the first video of these families has two frames, the second three"
        return [2, 3]
    return [batch["pixel_values_videos"].shape[1]] * videos


def longer(batch: Batch, token: Tensor) -> Batch:
    """Return a batch with one more word in every row; what a processor adds per word is that of the last one."""
    shape = batch["input_ids"].shape
    grown = {
        name: torch.cat((value, value[:, -1:]), 1) if getattr(value, "shape", None) == shape else value
        for name, value in batch.items()
    }
    return {**grown, "input_ids": torch.cat((batch["input_ids"], token), 1)}


def membership(index: Tensor, size: int) -> Tensor:
    """Return which of `size` places are in `index`."""
    return torch.zeros(size, dtype=torch.bool).index_fill(0, index, True)


def block_sizes(model: Any, batch: Batch) -> list[int]:
    """Return how many visual tokens each block has."""
    with torch.no_grad():
        return [len(block) for block in encode_images(model, batch).blocks]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare absolutely."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def full_positions(family: TinyFamily, model: Any, batch: Batch) -> Tensor:
    """Return the positions that the stock model gives the full sequence."""
    if family.mrope:
        names = inspect.signature(model.model.get_rope_index).parameters
        renamed = {"second_per_grids": "video_second_per_grid"}
        index = {name: batch[key] for name in names if (key := renamed.get(name, name)) in batch}
        positions: Tensor = model.model.get_rope_index(**index)[0]
        return positions
    rows, places = batch["input_ids"].shape
    return torch.arange(places).expand(rows, -1)


def positions_of_row(family: TinyFamily, model: Any, batch: Batch, alone: Batch, row: int) -> Tensor:
    """Return the positions that a row has in its batch, and hold that the last row has others alone."""
    mine = full_positions(family, model, batch)[:, row : row + 1, batch["attention_mask"][row].bool()]
    differ = not torch.equal(mine, full_positions(family, model, alone))
    assert differ == (row == len(ROWS) - 1), f"declared to depend on other rows ({family.row_dependence})"
    return mine


def masked_logits(family: TinyFamily, model: Any, batch: Batch, mask: Tensor) -> Tensor:
    """Run the stock model on the full sequence with the dropped tokens masked from attention."""
    positions = full_positions(family, model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if family.mrope:
        inputs.pop("mm_token_type_ids", None)
    return logits_of(model, {**inputs, "attention_mask": mask.long(), "position_ids": positions})


def embedded_row(model: Any, inputs: Batch, row: int) -> Tensor:
    """Run one row of assembled inputs through the stock model as embeddings, so that no placeholder is involved."""
    real = inputs["attention_mask"][row].bool()
    embedded = caught_embeddings(model, inputs)[row : row + 1, real]
    positions = inputs["position_ids"]
    place = positions[:, row : row + 1, real] if positions.dim() == 3 else positions[row : row + 1, real]
    decoder = model.get_decoder()
    ids = inputs["input_ids"][row : row + 1, real]
    # Some decoders need the tokens too and search the table for every embedding, in vain for visual ones.
    with torch.no_grad(), mock.patch.object(decoder, "reverse_embedding", create=True, return_value=ids):
        # Without a mask transformers would take gaps in the positions for the borders of packed sequences.
        mask = torch.ones_like(embedded[..., 0], dtype=torch.long)
        logits: Tensor = model(inputs_embeds=embedded, attention_mask=mask, position_ids=place).logits
    return logits[0]


def caught_embeddings(model: Any, inputs: Batch) -> Tensor:
    """Return what the decoder receives for assembled inputs."""
    caught: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits_of(model, inputs)
    hook.remove()
    return caught[0]


@contextlib.contextmanager
def watched_features(model: Any) -> Iterator[list[Tensor]]:
    """While active, collect the image features of the model's own encoder, with their gradients."""
    base, found = model.base_model, []

    def encode(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        whole = open_host(model).features(output)
        found.extend([whole] if isinstance(whole, Tensor) else whole)
        for features in found:
            features.retain_grad()
        return output

    stock = base.get_image_features
    with mock.patch.object(base, "get_image_features", encode):
        yield found
