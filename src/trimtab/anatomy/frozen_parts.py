"""Leave out the backward pass of parts in front of the language model that train nothing.

With activation checkpointing switched on, transformers lets the inputs of every part ask for gradients
(``enable_input_require_grads``), also those of a frozen vision tower. The tower then keeps its activations, runs its
forward pass twice and a backward pass besides, and nothing reads the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trimtab.anatomy.families import Host
from trimtab.shapes import Tensor


@contextlib.contextmanager
def without_frozen_gradients(host: Host) -> Iterator[list[nn.Module]]:
    """While active, parts without a trained parameter keep no graph, unless what comes in asks for gradients.

    Args:
        host: The opened model.

    Yields:
        These parts: a frozen vision tower, and a frozen projector behind it.
    """
    decoder = host.model.get_decoder()
    parts = [
        part
        for part in host.base.children()
        if part is not decoder
        and "forward" not in vars(part)
        and not any(parameter.requires_grad for parameter in part.parameters())
    ]
    for part in parts:
        vars(part)["forward"] = _without_graph(part.forward)
    try:
        yield parts
    finally:
        for part in parts:
            del vars(part)["forward"]


def _without_graph(forward: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        asked = any(isinstance(one, Tensor) and one.requires_grad for one in (*args, *kwargs.values()))
        with contextlib.nullcontext() if asked else torch.no_grad():
            return forward(*args, **kwargs)

    return call
