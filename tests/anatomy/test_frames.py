"""Videos frame by frame: every frame is a tile, also where the encoder or the processor leaves some of it out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import NO_IMAGES, VIDEO_ROWS, model_of
from tests.tiny import Batch, qwen_videos
from torch import Tensor

from trimtab.anatomy import encode_images
from trimtab.anatomy.frames import frame_tiles

FENCED = ("cosmos3_edge", "exaone4_5", "glm4v", "glm5_next", "qwen3_5", "qwen3_vl", "video_llama_3")
"""Families whose batches here have one run of placeholders per frame."""


def runs_of(ids: Tensor, token: int) -> list[int]:
    """Return how many placeholders stand side by side, run by run."""
    holds = torch.nn.functional.pad((ids == token).long(), (1, 1)).flatten()
    steps = holds.diff()
    return ((steps == -1).nonzero() - (steps == 1).nonzero()).flatten().tolist()


def moving(name: str) -> tuple[Any, Batch, Any]:
    """Return a model, a batch of videos and its features."""
    family = SUITE[name]
    model = model_of(family)
    batch = family.make_batch(model, NO_IMAGES, videos_per_row=VIDEO_ROWS)
    with torch.no_grad():
        return model, batch, encode_images(model, batch)


@pytest.mark.parametrize("name", FENCED)
def test_every_run_of_placeholders_is_a_tile(name: str) -> None:
    _, batch, encoded = moving(name)
    assert [size for video in encoded.tiles for size in video] == runs_of(batch["input_ids"], SUITE[name].video_token)


def test_frames_that_the_encoder_merges_are_one_tile() -> None:
    _, batch, encoded = moving("ernie4_5_vl_moe")
    grids = batch["video_grid_thw"].tolist()
    assert encoded.tiles == [[rows * columns // 4] * (frames // 2) for frames, rows, columns in grids]


@pytest.mark.parametrize("name", ["muse_glimmer", "muse_spark", "qwen2_vl"])
def test_as_many_frames_as_patches_of_a_token_stay_apart(name: str) -> None:
    """Four frames have as many tokens as one frame of unmerged patches; only Muse calls its merging merge_size."""
    shapes = ((4, 4, 6), (8, 4, 4))
    family = replace(SUITE[name], videos=lambda *given: qwen_videos(*given, shapes))
    model = model_of(family)
    batch = family.make_batch(model, NO_IMAGES, videos_per_row=VIDEO_ROWS)
    with torch.no_grad():
        encoded = encode_images(model, batch)
    assert encoded.tiles == [[6] * 4, [4] * 8]


def test_features_that_the_processor_drops_are_gone_before_pruning() -> None:
    model, batch, encoded = moving("video_llama_3")
    video = {name: value for name, value in batch.items() if name.startswith(("pixel_values_v", "video_g", "video_m"))}
    with torch.no_grad():
        stock = torch.cat(model.get_video_features(**video, return_dict=True).pooler_output)
    mask = batch["video_compression_mask"]
    assert not mask.all()
    assert torch.equal(torch.cat(encoded.blocks), stock[mask])


@pytest.mark.parametrize(
    ("arguments", "shape", "tiles"),
    [
        ({"video_grid_thw": [[3, 4, 6]]}, (18, 5), [[6, 6, 6]]),
        ({"video_grid_thw": [[3, 4, 6]], "video_merge_sizes": [1]}, (72, 5), [[24, 24, 24]]),
        ({"video_grid_thw": [[2, 4, 6]]}, (13, 5), [[6, 6]]),  # a newline ends the video and belongs to no frame
        ({"video_grid_thw": [[4, 4, 6]]}, (12, 5), [[6, 6]]),  # two frames make one
        ({"num_frames_per_video": [4]}, (12, 5), [[3, 3, 3, 3]]),
        ({"pixel_values_videos": [[[[[0.0]]], [[[0.0]]]]]}, (2, 7, 5), [[7, 7]]),
        ({"pixel_values_videos": [[0.0]]}, (9, 5), [[9]]),
    ],
)
def test_frames_are_found_by_what_the_encoder_took(
    arguments: dict[str, Any], shape: tuple[int, ...], tiles: list[list[int]]
) -> None:
    class Vision:
        spatial_merge_size = 2

    given = {name: torch.tensor(value) for name, value in arguments.items()}
    assert frame_tiles(Vision(), given, [torch.zeros(shape)]) == tiles
