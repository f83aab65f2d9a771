"""Stop a vision tower behind the last block that feeds the features; the blocks behind it are dead work.

LLaVA takes the states of the last but one block of CLIP (``vision_feature_layer=-2``), and transformers runs the last
block all the same: one of 24 in the tower of LLaVA-1.5. While `stop_tower` is active such blocks hand on what comes in.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trimtab.anatomy.families import Host
from trimtab.shapes import Tensor

PLAIN_TOWERS = (
    "clip_vision_model",
    "siglip_vision_model",
    "pixtral",
    "idefics3_vision",
    "internvl_vision",
    "qianfan_ocr_vision",
)
"""Towers whose blocks stand in one list, each fed by the one before it only, states counted as transformers does."""

LIBRARY, COLLECTOR = "transformers.", "transformers.utils.output_capturing"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def stop_tower(host: Host) -> Iterator[list[nn.Module]]:
    """While active, blocks behind the last one that feeds the features let their input pass through.

    The features and their gradients stay what they were, bit for bit, since no state behind the last selected one is
    read; only ``last_hidden_state`` and ``hidden_states`` behind it differ, which the language model never sees. A
    tower with dropout draws fewer random numbers. Each block is still called, so that the states keep their numbers.

    Nothing is stopped where that is not sure: see `surplus_blocks`.

    Args:
        host: The opened model.

    Yields:
        The blocks that pass their input through.
    """
    surplus = surplus_blocks(host)
    for block in surplus:
        vars(block)["forward"] = _pass_through
    try:
        yield surplus
    finally:
        for block in surplus:
            del vars(block)["forward"]


def surplus_blocks(host: Host) -> list[nn.Module]:
    """Find the blocks of the vision towers that no feature depends on.

    There are none where the tower is none of `PLAIN_TOWERS`, or its features come from the last block. Nor are any
    reported where something else may read or manage them: parameters in pieces (FSDP2, ZeRO-3, tensor parallelism),
    a wrapped, compiled or patched module, a hook that is not transformers' own.

    Args:
        host: The opened model.

    Returns:
        The blocks, in order; of all towers where there are several.
    """
    layers = _selected_layers(host.model.config)
    if not layers or host.family.features == "last_hidden_state" or torch.compiler.is_compiling():
        return []
    return [block for part in host.base.children() for block in _surplus_of(part, layers)]


def _selected_layers(config: Any) -> list[int]:
    """Numbers of the states that become features, as the configuration has them; empty where it says nothing."""
    if (pairs := getattr(config, "deepstack_layer_map", None)) is not None:  # Granite 4 Vision
        named: Any = [*(layer for layer, _ in pairs), getattr(config, "spatial_vision_layer", None)]
    else:
        named = getattr(config, "vision_feature_layer", None)
    listed = list(named) if isinstance(named, list | tuple) else [named]
    return listed if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in listed) else []


def _surplus_of(tower: nn.Module, layers: list[int]) -> list[nn.Module]:
    config = getattr(tower, "config", None)
    if getattr(config, "model_type", None) not in PLAIN_TOWERS:
        return []
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    # The count of the configuration is what negative numbers of states are counted by.
    if len(lists) != 1 or len(lists[0]) != getattr(config, "num_hidden_layers", None):
        return []
    blocks = list(lists[0])
    states = len(blocks) + 1  # state 0 goes into the first block, state i comes out of block i - 1
    if not all(-states <= layer < states for layer in layers):
        return []
    last = max(1, *(layer % states for layer in layers))
    used = {id(module) for block in blocks[:last] for module in block.modules()}
    behind = [module for module in tower.modules() if id(module) not in used]
    plain = all(type(block) is type(blocks[0]) for block in blocks) and _from_library(tower, *blocks)
    return blocks[last:] if plain and not any(map(_is_managed, behind)) else []


def _from_library(*modules: nn.Module) -> bool:
    """Whether all are modules of transformers as they come, not a wrapper's and no class made of them."""
    return all(type(module).__module__.startswith(LIBRARY) for module in modules)


def _is_managed(module: nn.Module) -> bool:
    """Whether something else has its hand on a module."""
    if "forward" in vars(module) or "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        return True
    hooks = itertools.chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    if any(getattr(hook, "__module__", None) != COLLECTOR for hook in hooks):
        return True
    # ZeRO-3 leaves a mark; sharded and parallel parameters of torch are DTensors.
    return any(hasattr(one, "ds_id") or hasattr(one, "device_mesh") for one in module.parameters(recurse=False))


def _pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
