"""What every patch of an image shows: the proxy labels that the vision tower is fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.data.scenes import COLOURS, DIGITS

Labels = NDArray[np.int64]


def scene_labels(row: Mapping[str, Any], side: int) -> Labels:
    """Label the patches of a scene with digit and colour.

    Args:
        row: A row of `make_scenes`.
        side: Patches per row and column.

    Returns:
        [side * side, 2]: digit and colour, counted from 1, of the object whose box holds the middle of the patch;
        0 where there is none.
    """
    labels = np.zeros((side, side, 2), dtype=np.int64)
    step = row["image"].width / side
    middle = (np.arange(side) + 0.5) * step
    for entry in row["objects"]:
        left, top, right, bottom = entry["box"]
        rows = (middle >= top) & (middle < bottom)
        columns = (middle >= left) & (middle < right)
        labels[np.ix_(rows, columns)] = (DIGITS.index(entry["digit"]) + 1, list(COLOURS).index(entry["colour"]) + 1)
    return labels.reshape(side * side, 2)
