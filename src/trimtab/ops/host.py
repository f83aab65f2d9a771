"""Numbers of the host on the device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.shapes import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return host numbers as a tensor on a device.

    A plain ``torch.tensor(values, device=...)`` makes the host wait until a CUDA device has done all that was asked of
    it before; from pinned memory the copy takes its turn like any other work.

    Args:
        values: The numbers, a list. (Not annotated so: the type checks of the tests draw from a list at random.)
        device: Where to.
        dtype: Their type; that of ``torch.tensor`` by default.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return copy_to(torch.tensor(values, dtype=dtype), device)


def copy_to(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for it.

    Args:
        values: A tensor in the memory of the host, which must not be changed any more; one that is on the device
            already comes back as it is.
        device: Where to.
    """
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
