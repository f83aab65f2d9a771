"""Attention that a layer would pay to each place, without a full attention map.

The layer's own forward runs up to its attention function and no further: so its norm, its projections (LoRA included),
its norms of queries and keys, its rotary embedding and its scaling are those of the model, whatever the family, and
the real pass keeps its fast kernel. Only the rows of the attention map that are asked for are then computed.

Source: FastV (arXiv 2403.06764) and PyramidDrop (arXiv 2410.17247) rank visual tokens by such scores.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.errors import NotSupportedError, UnsupportedModelError
from trimtab.ops.select import gather_tokens, index_of_mask
from trimtab.shapes import Bool, Float, Int, Tensor

if TYPE_CHECKING:
    from trimtab.anatomy.drop_inside import Rows

NAME = "trimtab_layer_scores"
IMPLEMENTATION = "_attn_implementation_internal"
CHANGING = ("s_aux", "position_bias", "sliding_window", "cu_seq_lens_q", "packed_lengths")
"""Arguments of attention functions that change who attends to whom, which the scores know nothing of."""


@dataclass(frozen=True)
class Projected:
    """Queries and keys as a layer hands them to its attention function, rotated.

    Attributes:
        query: Queries of every place.
        key: Keys of every place; each serves a group of heads that stand side by side.
        scaling: What products of queries and keys are multiplied with.
        softcap: Bound that the scaled products are bent to (Gemma 2), or None.
    """

    query: Float[Tensor, "row head place size"]
    key: Float[Tensor, "row group place size"]
    scaling: float
    softcap: float | None


class _ReachedError(Exception):
    """The layer has reached its attention function; ends the layer there."""

    def __init__(self, module: nn.Module, query: Tensor, key: Tensor, settings: dict[str, Any]) -> None:
        super().__init__(type(module).__name__)
        self.module, self.query, self.key, self.settings = module, query, key, settings


def attention_scores(rows: Rows) -> Float[Tensor, "row place"]:
    """Mean attention that the query rows would pay to each place in the layer `rows.layer`.

    For every head and every query row: the softmax over the real places up to the query's own of q k^T times the
    layer's scaling, in float32; then the mean over heads and over the query rows of a row. Dropout is off. Nothing is
    recorded for gradients, and no random number is drawn.

    With a filled cache (a later part of a prompt, a later turn) the softmax runs over the places of this call only:
    what stands in the cache neither competes for a place nor takes a share of the attention.

    In a model whose prefix attends in both directions (PaliGemma) the scores are causal all the same; for the last
    place of the prefix that is the same.

    Args:
        rows: What stands at the input of the layer. Reading how many query rows there are makes the host wait for the
            device, unless `Rows.most_queries` says it.

    Returns:
        The scores, 0 for padding and behind the last query row; each row sums to 1, or is 0 everywhere where a row has
        no query row.

    Raises:
        UnsupportedModelError: The layer does not call its attention through transformers' ``AttentionInterface``.
        NotSupportedError: Its attention has sinks, a bias, a window or packed rows.
    """
    with torch.no_grad():
        projected = project_layer(rows.layer, rows.states, rows.arguments)
        most = rows.most_queries
        if most is None:
            most = int(rows.queries.sum(1).amax())
        at, counted = index_of_mask(rows.queries, min(max(most, 1), rows.queries.shape[1]))
        before = rows.source.unsqueeze(1) <= rows.source.gather(1, at).unsqueeze(2)
        paid = attention_rows(projected, at, before & rows.real.unsqueeze(1))
        paid = paid.masked_fill(~counted.unsqueeze(2), 0.0).sum(1)
        return paid / counted.sum(1, keepdim=True).clamp(min=1)


def attention_rows(
    projected: Projected, at: Int[Tensor, "row query"], seen: Bool[Tensor, "row query place"]
) -> Float[Tensor, "row query place"]:
    """Compute some rows of an attention map, mean over heads, in float32.

    Args:
        projected: Queries and keys of a layer.
        at: Places whose queries count.
        seen: Which places each of them may attend to.

    Returns:
        Attention to each place; 0 where it may not be seen.
    """
    rows, heads, _, size = projected.query.shape
    groups, places = projected.key.shape[1:3]
    with torch.autocast(projected.query.device.type, enabled=False):
        flat = projected.query.transpose(1, 2).reshape(rows, -1, heads * size)
        query = gather_tokens(flat, at).float().view(rows, -1, groups, heads // groups, size)
        logits = query.permute(0, 2, 3, 1, 4).reshape(rows, groups, -1, size) @ projected.key.float().transpose(2, 3)
        logits = logits.view(rows, heads, -1, places) * projected.scaling
        if projected.softcap is not None:
            logits = torch.tanh(logits / projected.softcap) * projected.softcap
        # A query of padding may see nothing; the smallest number instead of -inf keeps NaN out.
        logits = logits.masked_fill(~seen.unsqueeze(1), torch.finfo(logits.dtype).min)
        return logits.softmax(-1).mean(1).masked_fill(~seen, 0.0)


def project_layer(layer: nn.Module, states: Tensor, arguments: Mapping[str, Any]) -> Projected:
    """Run a layer up to its attention function, without a cache, and return what it would attend with.

    The layer is as before afterwards, whatever happens. In between it is not fit for use in another thread.

    Args:
        layer: A decoder layer of transformers.
        states: [row, place, width] at its input.
        arguments: The other keyword arguments of its forward; a cache among them is left out.

    Returns:
        Its queries and keys.

    Raises:
        UnsupportedModelError: No attention function was called, or not with queries and keys of every place.
        NotSupportedError: Its attention has sinks, a bias, a window or packed rows.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _reach)
    given = {name: value for name, value in arguments.items() if name != "hidden_states"}
    given.update({name: None for name in ("past_key_values",) if name in given})
    given.update({name: False for name in ("use_cache", "output_attentions") if name in given})
    with _stopped_at_attention(layer), torch.no_grad():
        try:
            # Not a call: hooks on the layer (ours, FSDP's, those that collect outputs) are for real passes.
            layer.forward(states.detach(), **given)
        except _ReachedError as reached:
            return _check(layer, states, reached)
    raise UnsupportedModelError(
        f"{type(layer).__name__} does not call its attention through transformers' AttentionInterface "
        "(config._attn_implementation of its modules was followed), so what its query rows attend to is not known. "
        "Let visual tokens leave without scores (withdraw), or give a model of transformers whose attention can be "
        "chosen by attn_implementation."
    )


def _reach(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise _ReachedError(module, query, key, kwargs)


@contextlib.contextmanager
def _stopped_at_attention(layer: nn.Module) -> Iterator[None]:
    """Let the modules of a layer call `_reach` as their attention, in evaluation mode (no dropout, no recomputation).

    The configuration is shared by all layers, so that each module gets a copy of it for the time.
    """
    parts = list(layer.modules())
    before = [(vars(part), part.training, vars(part).get("config")) for part in parts]
    copies: dict[int, Any] = {}
    try:
        for attributes, _, config in before:
            attributes["training"] = False
            if hasattr(config, IMPLEMENTATION):
                if id(config) not in copies:
                    copies[id(config)] = copy.copy(config)
                    setattr(copies[id(config)], IMPLEMENTATION, NAME)
                attributes["config"] = copies[id(config)]
        yield
    finally:
        for attributes, training, config in before:
            attributes["training"] = training
            if config is not None:
                attributes["config"] = config


def _check(layer: nn.Module, states: Tensor, reached: _ReachedError) -> Projected:
    query, key, name = reached.query, reached.key, type(layer).__name__
    rows, places = states.shape[:2]
    shapes = f"queries {list(query.shape)} and keys {list(key.shape)} for states {list(states.shape)}"
    whole = query.dim() == key.dim() == 4 and query.shape[::2] == key.shape[::2] == (rows, places)
    if not whole or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise UnsupportedModelError(
            f"{name} attends with {shapes}, where [row, head, place, size] with a query and a key for every place was "
            "expected. Let visual tokens leave without scores (withdraw)."
        )
    changing = [one for one in CHANGING if reached.settings.get(one) is not None]
    if changing:
        raise NotSupportedError(
            f"The attention of {name} depends on {', '.join(changing)}, which the scores of query rows do not follow. "
            "Let visual tokens leave without scores (withdraw), or give rows without packing to a model with plain "
            "causal attention."
        )
    scaling = reached.settings.get("scaling")
    return Projected(
        query, key, query.shape[3] ** -0.5 if scaling is None else scaling, reached.settings.get("softcap")
    )
