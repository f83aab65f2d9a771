"""Use a module's own parameters outside of its forward where ZeRO-3 keeps them in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

from trimtab.shapes import Tensor


def call_inside(module: torch.nn.Module, call: Callable[[], Any]) -> Any:
    """Return what a call returns, made as if it were the forward of a module.

    ZeRO-3 gathers the parameters that a module holds itself (the newline row of LLaVA-NeXT) with hooks around its
    forward, and again for the backward pass of what came out. A method of the module that is called on its own would
    find them empty.

    Args:
        module: The module; unless ZeRO-3 has taken one of its own parameters the call is made as it is.
        call: Uses parameters of the module.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
        return call()
    kept: list[Any] = []

    def forward() -> Tensor:
        # ZeRO-3 gathers once for every tensor that comes out, and processes with different numbers of images would
        # gather differently often. So one tensor comes out.
        leaves, form = _pytree.tree_flatten(call())
        trained = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        kept.extend((leaves, form, trained))
        return torch.cat([leaves[place].flatten() for place in trained]) if trained else torch.zeros(())

    flat = _with_forward(module, forward)
    leaves, form, trained = kept
    pieces = flat.split([leaves[place].numel() for place in trained]) if trained else ()
    for place, piece in zip(trained, pieces, strict=True):
        leaves[place] = piece.view(leaves[place].shape).to(leaves[place].dtype)
    return _pytree.tree_unflatten(leaves, form)


def _with_forward(module: torch.nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """Call a module, hooks included, with another forward."""
    attributes: dict[str, Any] = vars(module)
    before = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = forward
    try:
        found: Tensor = module()
        return found
    finally:
        del attributes["forward"]
        attributes.update(before)
