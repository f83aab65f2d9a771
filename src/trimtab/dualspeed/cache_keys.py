"""Names of images by their content, so that a changed image is another image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trimtab.shapes import Tensor

ENTRY = "image_keys"
"""Name under which a batch carries its keys; no tensor, and taken out before the model sees the batch."""

KEY_BYTES = 16
Keys = tuple[tuple[str, ...], ...]
"""For each image the keys of its tiles, in order."""


class KeyImages:
    """Adds the keys of its images to every batch of a collator.

    In the worker processes of a DataLoader this costs the training step nothing (1 to 2 ms per 336 pixel tile there);
    without it the pixels are hashed in the step, and come back from the device for it. It must be the last that
    touches the pixels: a batch whose pixels were changed afterwards would get the features of the old ones.

    Args:
        collator: Any collator whose batches hold ``pixel_values``.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Build a batch, with its keys where it has images.

        Args:
            rows: What the collator takes.

        Returns:
            Its batch, of the type it came in.
        """
        batch = self.collator(rows)
        keys = image_keys(batch)
        if keys is not None:
            batch[ENTRY] = keys
        return batch

    def __getattr__(self, name: str) -> Any:
        """Pass on what is asked of the collator inside."""
        if name.startswith("__") or name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)


def image_keys(batch: Mapping[str, Any]) -> Keys | None:
    """Return the keys of a batch's images, or None where it has none.

    Args:
        batch: With ``pixel_values`` [tile, color, height, width], one tile per image, or [image, tile, color, height,
            width], where images of fewer tiles are filled up; what fills up has keys too, which nobody asks for.
    """
    values = batch.get("pixel_values")
    if not isinstance(values, Tensor) or values.dim() not in (4, 5):
        return None
    if values.dim() == 4:
        return tuple((key,) for key in tile_keys(values))
    flat = tile_keys(values.flatten(0, 1))
    count = values.shape[1]
    return tuple(tuple(flat[first : first + count]) for first in range(0, len(flat), count))


def tile_keys(tiles: Tensor) -> list[str]:
    """Return a key for each tile: a hash of its bytes, shape and number format.

    Args:
        tiles: [tile, ...], on any device; waits for it.

    Returns:
        32 hexadecimal digits each.
    """
    head = f"{tiles.dtype} {tuple(tiles.shape[1:])}".encode()
    raw = tiles.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy() if tiles.numel() else ()
    return [hashlib.blake2b(memoryview(one), digest_size=KEY_BYTES, salt=_salt(head)).hexdigest() for one in raw]


def joint_key(keys: Sequence[str], size: Sequence[int]) -> str:
    """Return the key of a whole image from those of its tiles.

    Args:
        keys: Those of its tiles.
        size: Rows and columns of pixels that it had, which steer how its tiles are packed; empty where they do not.
    """
    text = f"{' '.join(keys)} {'x'.join(str(int(one)) for one in size)}"
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


def _salt(head: bytes) -> bytes:
    return hashlib.blake2b(head, digest_size=hashlib.blake2b.SALT_SIZE).digest()
