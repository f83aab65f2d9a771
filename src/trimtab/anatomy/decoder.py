"""The layers of a language model, opened for tokens that leave between two of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.anatomy.families import Host, check_model, open_host
from trimtab.errors import NotSupportedError, UnsupportedModelError

TAKEN = ("attention_mask", "past_key_values", "position_embeddings")
"""Keyword arguments that every decoder layer must take."""
KNOWN = frozenset({"hidden_states", *TAKEN, "position_ids", "use_cache", "output_attentions", "moe_mm_token_type_ids"})
"""All that a layer may name; what it names beyond has a meaning that cutting rows could break."""


@dataclass(frozen=True)
class Decoder:
    """The language model of a model, opened layer by layer.

    Attributes:
        model: The model with the language-model head (inside a PEFT wrapper where there is one).
        base: Its part without the head, which takes ``input_ids`` or ``inputs_embeds``.
        text: The language model; it has ``layers``.
        layers: Its layers, 0 to `depth` - 1.
        first_layer: The least layer at whose input tokens may leave: one behind the last layer at which the model
            itself adds visual features (DeepStack), or 0.
        token_ids: Placeholders of visual tokens; empty for a language model without vision.
        host: The model opened for visual tokens, or None for a language model without vision.
    """

    model: Any
    base: Any
    text: Any
    layers: tuple[Any, ...]
    first_layer: int
    token_ids: tuple[int, ...]
    host: Host | None

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def name(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Put a batch on the device of the model's input embedding.

        Args:
            batch: Arguments of the model's forward; what is not a tensor stays as it is.

        Returns:
            The same arguments. Where accelerate keeps the weights elsewhere until they are needed (``device_map`` with
            offloading) they stay where they are, since it moves the inputs itself.
        """
        device = self.model.get_input_embeddings().weight.device
        if device.type == "meta":
            return dict(batch)
        return {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in batch.items()}


def open_decoder(model: Any) -> Decoder:
    """Open the layers of a model's language model.

    Args:
        model: A vision-language model of transformers that `trimtab.check_model` supports, or a decoder-only language
            model; also inside a PEFT wrapper.

    Returns:
        The opened decoder.

    Raises:
        UnsupportedModelError: Its layers are not where they should be, or take arguments of an unknown meaning.
        NotSupportedError: It is compiled, or has sliding windows, states or chunks, which count places.
    """
    if any("_orig_mod" in vars(part)["_modules"] or part._compiled_call_impl for part in _modules(model)):
        raise NotSupportedError(
            f"{type(getattr(model, '_orig_mod', model)).__name__} is compiled (torch.compile), and layers that see "
            "fewer tokens than those before them are not supported under it. Give the model as it was before."
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(inner).__name__
    text = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        where = "get_decoder().layers" if text is None else f"{type(text).__name__}.layers (from get_decoder())"
        raise UnsupportedModelError(
            f"No decoder layers were found in {name}: {where} should be a ModuleList. Give a vision-language or causal "
            "language model of transformers whose language model has its layers there, without a wrapper around it."
        )
    config: Any = getattr(text, "config", None)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: {type(text).__name__}.layers attend to an encoder. Give a model whose "
            "visual tokens stand in the sequence of a decoder."
        )
    _refuse_windows(name, config)
    for layer in layers:
        names = set(inspect.signature(type(layer).forward).parameters) - {"self", "kwargs"}
        lacks, unknown = [one for one in TAKEN if one not in names], sorted(names - KNOWN)
        if lacks or unknown:
            what = f"lacks {', '.join(lacks)}" if lacks else f"takes {', '.join(unknown)}, whose rows are not known"
            raise UnsupportedModelError(
                f"{type(layer).__name__}.forward in {name} ({type(text).__name__}.layers) {what}. Layers must take "
                f"hidden_states and {', '.join(TAKEN)} as keywords, as those of Llama and Qwen do."
            )
    host = open_host(inner) if check_model(inner).supported else None
    return Decoder(
        model=inner,
        base=inner.base_model,
        text=text,
        layers=tuple(layers),
        first_layer=_first_layer(inner),
        token_ids=() if host is None else host.image_token_ids,
        host=host,
    )


def _modules(model: Any) -> list[Any]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _refuse_windows(name: str, config: Any) -> None:
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    window = None if kinds else getattr(config, "sliding_window", None)
    other = sorted(kinds - {"full_attention"}) or ([f"sliding_window={window}"] if window else [])
    if other:
        raise NotSupportedError(
            f"{name} has layers of the kind {', '.join(other)}, which count places or carry a state from place to "
            "place, so that tokens cannot leave between layers. Only models whose layers all have full attention are "
            "supported."
        )


def _first_layer(model: Any) -> int:
    """One behind the last layer at which the model adds visual features to its states."""
    config = model.config
    entries = [layer + 1 for _, layer in getattr(config, "deepstack_layer_map", None) or ()]
    entries += [layer + 1 for layer in getattr(config, "spatial_target_layers", None) or ()]
    vision = getattr(config, "vision_config", None)
    return max([*entries, len(getattr(vision, "deepstack_visual_indexes", None) or ())], default=0)
