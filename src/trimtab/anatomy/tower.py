"""Observe class-token attention, keys and states inside a vision tower, without a full attention map."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trimtab.anatomy.families import Host
from trimtab.ops.similarity import full_float32
from trimtab.shapes import Tensor

OBSERVABLE_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose attention is plain: every image by itself, queries and keys as projected (Pixtral's are turned)."""

Observed = dict[str, Tensor]
"""By need: ``hidden`` [tile, patch, channel], ``cls_attention`` [tile, patch], ``keys`` [tile, patch, key]."""


@contextlib.contextmanager
def observe_tower(host: Host, needs: frozenset[str]) -> Iterator[Observed]:
    """While active, note what one pass of the vision tower shows.

    The attention row is computed from the queries and keys of the block that feeds the features, so that the tower
    keeps its fast attention: softmax(q_cls k^T / sqrt(d)), class column dropped, mean over heads
    (token_reduction sheet, section 2). A tower without class token gives the mean over all queries instead.

    Args:
        host: The opened model; its family must have an observable tower, and for attention and keys no `block_trouble`.
        needs: Subset of ``hidden``, ``cls_attention``, ``keys``.

    Yields:
        A dict that is filled when the tower has run.
    """
    observed: Observed = {}
    caught: dict[str, Tensor] = {}
    attention = _attention_block(host) if needs & {"cls_attention", "keys"} else None
    first = 1 if host.model.config.vision_feature_select_strategy == "default" else 0
    has_class = any(name.endswith("class_embedding") for name, _ in host.base.vision_tower.named_parameters())

    def finish(module: nn.Module, args: tuple[Any, ...]) -> None:
        observed["hidden"] = args[0].detach()
        if needs & {"cls_attention", "keys"}:
            _read(attention, caught, has_class, first, observed)
        for name in set(observed) - needs:
            del observed[name]

    def catch(name: str) -> Any:
        return lambda module, args, output: caught.__setitem__(name, output.detach())

    removers = [host.base.multi_modal_projector.register_forward_pre_hook(finish)]
    if needs & {"cls_attention", "keys"}:
        removers += [getattr(attention, name).register_forward_hook(catch(name)) for name in ("q_proj", "k_proj")]
    try:
        yield observed
    finally:
        for remover in removers:
            remover.remove()


def block_trouble(host: Host) -> str:
    """Say why attention and keys cannot be observed in an observable tower, or return nothing where they can."""
    layer, count = host.model.config.vision_feature_layer, len(_blocks(host))
    if isinstance(layer, int) and layer != 0 and -count <= layer <= count:
        return ""
    return (
        f"vision_feature_layer={layer!r}: attention and keys can be observed where the features come from one block of "
        f"the vision tower (1..{count} or -{count}..-1). "
    )


def _blocks(host: Host) -> list[Any]:
    return [
        module
        for module in host.base.vision_tower.modules()
        if isinstance(getattr(module, "q_proj", None), nn.Module)
        and isinstance(getattr(module, "k_proj", None), nn.Module)
    ]


def _attention_block(host: Host) -> Any:
    layer, blocks = host.model.config.vision_feature_layer, _blocks(host)
    # Layer i > 0 is the output of block i - 1; layer -1 is the output of the last block.
    return blocks[layer - 1] if layer > 0 else blocks[layer]


def _read(attention: Any, caught: dict[str, Tensor], has_class: bool, first: int, observed: Observed) -> None:
    heads = int(attention.num_heads)
    query, key = (_heads(caught[name], heads) for name in ("q_proj", "k_proj"))
    scale = query.shape[-1] ** -0.5
    with torch.no_grad(), full_float32(query.device):
        rows = query[:, :, :1] if has_class else query
        weights = torch.softmax(rows.float() @ key.float().transpose(-1, -2) * scale, dim=-1)
        observed["cls_attention"] = weights.mean(2).mean(1)[:, first:]
        observed["keys"] = key.mean(1)[:, first:]


def _heads(states: Tensor, heads: int) -> Tensor:
    tiles, places, channels = states.shape
    return states.view(tiles, places, heads, channels // heads).transpose(1, 2)  # [tile, head, place, channel]
