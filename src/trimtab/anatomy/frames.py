"""Which tokens of a video belong to which of its frames, so that a pruner can choose frame by frame."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from trimtab.shapes import Tensor


def frame_tiles(vision: Any, arguments: dict[str, Any], entries: list[Tensor]) -> list[list[int]]:
    """How many tokens each frame has, video by video; encoders that merge frames count as one what they merge.

    Args:
        vision: Configuration of the vision tower.
        arguments: What the video encoder took.
        entries: Features of each video, [token, width] or [frame, token, width].

    Returns:
        Tokens of each frame, in order; the whole video as one frame where its frames are not known.
    """
    grids = arguments.get("video_grid_thw")
    if grids is None or len(grids) != len(entries):
        counts = _frame_counts(arguments, len(entries))
        return [_equal_frames(entry, count) for entry, count in zip(entries, counts, strict=True)]
    merges = arguments.get("video_merge_sizes")
    common = getattr(vision, "spatial_merge_size", None)
    sides = [common] * len(entries) if merges is None else merges.tolist()
    return [
        _grid_frames(entry, tuple(grid), side) for grid, side, entry in zip(grids.tolist(), sides, entries, strict=True)
    ]


def _grid_frames(entry: Tensor, grid: tuple[int, int, int], side: int | None) -> list[int]:
    """Tokens of each frame of a video with as many frames, rows and columns of patches; `side` of them merged."""
    frames, rows, columns = grid
    size, rest = divmod(entry.shape[0], frames)
    patches, uneven = divmod(rows * columns, max(1, size))
    if rest == uneven == 0 and isqrt(patches) ** 2 == patches:  # squares of patches make a token
        return [size] * frames
    if side is not None:
        size = rows * columns // side**2
        whole, rest = divmod(entry.shape[0], max(1, size))
        if rest == 0:  # several frames make one
            return [size] * whole
    return _equal_frames(entry, frames)


def drop_masked(output: Any, tiles: list[list[int]], keep: Tensor) -> tuple[Any, list[list[int]]]:
    """Drop the features that the batch itself marks as dropped, as the model would do after its encoder.

    Args:
        output: What the encoder returned; ``pooler_output`` holds the videos.
        tiles: Tokens of each frame.
        keep: Which tokens of all videos stay, [token].

    Returns:
        The output without those features, and how many tokens of each frame are left.
    """
    keep = keep.to(output.pooler_output[0].device)
    marks = keep.split([len(entry) for entry in output.pooler_output])
    output.pooler_output = tuple(entry[mark] for entry, mark in zip(output.pooler_output, marks, strict=True))
    sizes = [size for video in tiles for size in video]
    left = iter(torch.stack([frame.sum() for frame in keep.split(sizes)]).tolist())
    return output, [[next(left) for _ in video] for video in tiles]


def _frame_counts(arguments: dict[str, Any], videos: int) -> list[int]:
    for name in ("video_grid_thw", "video_grids", "num_frames_per_video"):
        if (given := arguments.get(name)) is not None:
            counts = given[:, 0] if given.dim() == 2 else given
            if len(counts) == videos:
                return [int(count) for count in counts.tolist()]
    values = arguments["pixel_values_videos"]
    return [values.shape[1] if values.dim() == 5 else 1] * videos


def _equal_frames(entry: Tensor, frames: int) -> list[int]:
    if entry.dim() == 3:
        return [entry.shape[1]] * entry.shape[0]
    size, rest = divmod(entry.shape[0], frames)
    # One token more than the frames have is the newline row that ends a video.
    return [size] * frames if size and rest <= 1 else [entry.shape[0]]
