"""What every patch of an image shows: the proxy labels that the vision tower is fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.data.scenes import COLOURS, DIGITS, QUADRANTS

Labels = NDArray[np.int64]

NLVR_COLOURS, NLVR_SHAPES, NLVR_SIZES = ("black", "blue", "yellow"), ("circle", "square", "triangle"), (10, 20, 30)
NLVR_SIDE, NLVR_PATCHES = 100, 10
"""Pixels of an NLVR box, and patches per side that its places are named by."""
NLVR_WORDS = (
    NLVR_COLOURS,
    NLVR_SHAPES,
    ("small", "medium", "large"),
    tuple(f"row{number}" for number in range(1, NLVR_PATCHES + 1)),
    tuple(f"column{number}" for number in range(1, NLVR_PATCHES + 1)),
)
"""The word of every class of `nlvr_labels`, for ten patches per side."""
EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def scene_labels(row: Mapping[str, Any], side: int) -> Labels:
    """Label the patches of a scene with digit, colour and place.

    Args:
        row: A row of `make_scenes`.
        side: Patches per row and column.

    Returns:
        [side * side, 3]: digit, colour and quadrant, counted from 1, of the object whose box holds the middle of the
        patch; 0 where there is none.
    """
    labels = np.zeros((side, side, 3), dtype=np.int64)
    for entry in row["objects"]:
        kinds = (DIGITS.index(entry["digit"]), list(COLOURS).index(entry["colour"]), QUADRANTS.index(entry["quadrant"]))
        _mark(labels, entry["box"], row["image"].width, kinds)
    return labels.reshape(side * side, -1)


def nlvr_labels(row: Mapping[str, Any], side: int) -> Labels:
    """Label the patches of an NLVR box with colour, shape, size and place.

    Args:
        row: A row of `nlvr_one_box_rows`.
        side: Patches per row and column.

    Returns:
        [side * side, 5]: colour, shape and size, counted from 1, of the object that covers most of the patch (the
        later one where two cover equally much), and row and column of the patch, counted from 1; 0 where no object
        covers any of it.
    """
    labels = np.zeros((side, side, 5), dtype=np.int64)
    covered = np.zeros((side, side))
    step = row["image"].width / side
    edges = np.arange(side + 1) * step
    for colour, shape, size, left, top in row["objects"]:
        across = np.clip(np.minimum(edges[1:], left + size) - np.maximum(edges[:-1], left), 0, None)
        down = np.clip(np.minimum(edges[1:], top + size) - np.maximum(edges[:-1], top), 0, None)
        area = down[:, None] * across[None, :]
        here = (area >= covered) & (area > 0)
        shown = (NLVR_COLOURS.index(colour) + 1, NLVR_SHAPES.index(shape) + 1, NLVR_SIZES.index(size) + 1)
        labels[here, :3], covered[here] = shown, area[here]
    rows, columns = np.nonzero(covered > 0)
    labels[rows, columns, 3], labels[rows, columns, 4] = rows + 1, columns + 1
    return labels.reshape(side * side, -1)


def nlvr_told(row: Mapping[str, Any]) -> list[list[str]]:
    """Name the objects of an NLVR box by colour, shape, size, and row and column of their middle.

    Args:
        row: A row of `nlvr_one_box_rows`, with or without its image.

    Returns:
        Five words of `NLVR_WORDS` per object.
    """
    step = NLVR_SIDE / NLVR_PATCHES
    told = []
    for colour, shape, size, left, top in row["objects"]:
        across, down = (min(NLVR_PATCHES - 1, int((corner + size / 2) / step)) for corner in (left, top))
        classes = (NLVR_COLOURS.index(colour), NLVR_SHAPES.index(shape), NLVR_SIZES.index(size), down, across)
        told.append([kind[number] for kind, number in zip(NLVR_WORDS, classes, strict=True)])
    return told


def easy_vqa_labels(row: Mapping[str, Any], side: int) -> Labels:
    """Label the patches of an easy-VQA image with the shape and the colour that its open questions give away.

    Args:
        row: A row of `easy_vqa_rows`.
        side: Patches per row and column.

    Returns:
        [side * side, 2], counted from 1, where the patch differs from the ground; 0 elsewhere, and for what no
        question of the image asks.
    """
    found = {"shape": 0, "colour": 0}
    for answer in row["answers"]:
        if answer in EASY_SHAPES:
            found["shape"] = EASY_SHAPES.index(answer) + 1
        elif answer in EASY_COLOURS:
            found["colour"] = EASY_COLOURS.index(answer) + 1
    pixels = np.asarray(row["image"], dtype=np.int64)
    differs = np.abs(pixels - pixels[0, 0]).max(-1) > 12
    step = pixels.shape[0] // side
    share = differs[: side * step, : side * step].reshape(side, step, side, step).mean((1, 3))
    labels: Labels = (share > 0.2)[..., None] * np.array([found["shape"], found["colour"]], dtype=np.int64)
    return labels.reshape(side * side, -1)


def _mark(labels: Labels, box: tuple[int, int, int, int], width: int, kinds: tuple[int, ...]) -> None:
    side = labels.shape[0]
    middle = (np.arange(side) + 0.5) * width / side
    left, top, right, bottom = box
    rows = (middle >= top) & (middle < bottom)
    columns = (middle >= left) & (middle < right)
    labels[np.ix_(rows, columns)] = np.array(kinds) + 1
