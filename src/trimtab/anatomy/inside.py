"""Use a module's own parameters outside of its forward where ZeRO-3 keeps them in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def call_inside(module: torch.nn.Module, call: Callable[[], Result]) -> Result:
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
    attributes: dict[str, Any] = vars(module)
    had, before = "forward" in attributes, attributes.get("forward")
    attributes["forward"] = call
    try:
        found: Result = module()
        return found
    finally:
        if had:
            attributes["forward"] = before
        else:
            del attributes["forward"]
