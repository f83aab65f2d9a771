"""What tokens that leave between layers save: arithmetic of the prefill, and entries of the KV cache.

A layer of width D, with H heads of width d, G key-value heads and an MLP of width M does for s places

    f(s) = s (2 D H d + 2 D G d) + 2 s^2 H d + (3 or 2) s D M

multiply-adds: projections, attention, MLP (3 matrices where it is gated). With H d = G d = D this is the usual
4 s D^2 + 2 s^2 D + 2 s D M. **All functions here return floating-point operations, two for each multiply-add**, as
`torch.utils.flop_counter` counts them.

Left out: embeddings, vision tower and projector, norms, rotary angles, softmax, activation functions, residual sums,
the language-model head, and what a method spends on choosing tokens. Attention counts as if no place were masked;
kernels that skip the places behind a causal mask do down to half of that. Shares (`prefill_saving`, `kv_saving`) are so
shares of what the layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UnsupportedModelError, setting_error

Drops = Sequence[tuple[int, int]]
"""Where tokens leave, by rising layer: (layer, places that are left at its input and behind it)."""


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Form of a language model of equal, dense layers.

    Attributes:
        layers: How many (L).
        width: Width of the states (D).
        heads: Heads of the queries (H).
        kv_heads: Heads of keys and values (G), fewer than `heads` with grouped queries.
        head_width: Width of a head (d).
        mlp_width: Inner width of the MLP (M).
        gated: Whether the MLP has a gate, a third matrix.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    gated: bool

    @property
    def layer_weights(self) -> int:
        """Numbers in the weight matrices of one layer, biases and norms left out: multiply-adds per place."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.width * self.mlp_width


def read_text_shape(model: Any) -> TextShape:
    """Read the form of a model's language model from its configuration, and hold it against the layers themselves.

    Args:
        model: A model of transformers, also inside a PEFT wrapper (adapters are not counted).

    Returns:
        The form.

    Raises:
        UnsupportedModelError: The weight matrices of a layer are not those of the formula, as in mixtures of experts,
            of which a token uses only some, and in latent or gated attention; or the configuration lacks a size.
    """
    from trimtab.anatomy.decoder import open_decoder

    decoder = open_decoder(model)
    config = decoder.model.config.get_text_config()
    name = decoder.name
    sizes: dict[str, Any] = {
        one: getattr(config, one, None) for one in ("hidden_size", "num_attention_heads", "intermediate_size")
    }
    if missing := [one for one, size in sizes.items() if not isinstance(size, int)]:
        raise UnsupportedModelError(
            f"The text configuration of {name} has no {', '.join(missing)}, so its arithmetic cannot be counted. Give "
            "a TextShape by hand."
        )
    width, heads, mlp_width = sizes.values()
    shapes = [
        TextShape(
            layers=decoder.depth,
            width=width,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or width // heads,
            mlp_width=mlp_width,
            gated=gated,
        )
        for gated in (True, False)
    ]
    found = [_matrix_numbers(layer) for layer in decoder.layers]
    for shape in shapes:
        if all(number == shape.layer_weights for number in found):
            return shape
    told = f"{shapes[0].layer_weights:,} (gated MLP) or {shapes[1].layer_weights:,}"
    odd = next(number for number in found if number != shapes[0].layer_weights)
    raise UnsupportedModelError(
        f"A layer of {name} has {odd:,} numbers in its weight matrices, where its configuration says {told}. Mixtures "
        "of experts, latent or gated attention and layers of unequal widths are not counted. Give a TextShape of what "
        "a token uses by hand."
    )


def _matrix_numbers(layer: Any) -> int:
    """Numbers in a layer's matrices, stacks of experts included, adapters not.

    A linear layer counts by the sizes that it says, since a quantized one is packed.
    """
    total = 0
    for name, part in layer.named_modules():
        if "lora_" in name:
            continue
        own = [weight for weight in part.parameters(recurse=False) if weight.dim() > 1]
        rows, columns = getattr(part, "out_features", None), getattr(part, "in_features", None)
        sized = isinstance(rows, int) and isinstance(columns, int) and next(part.children(), None) is None
        if sized and all(weight.dim() == 2 for weight in own):
            total += int(rows or 0) * int(columns or 0)
        else:
            total += sum(weight.numel() for weight in own)
    return total


def withdrawal(layer: int, places: int, visual: int) -> tuple[tuple[int, int], ...]:
    """Return the drops of a withdrawal: at one layer all visual tokens leave.

    Args:
        layer: The layer K.
        places: Places of the prompt (S).
        visual: Visual tokens that leave (n).
    """
    return ((layer, places - visual),)


def layer_flops(places: int, shape: TextShape) -> int:
    """Return the floating-point operations of one layer over `places` places, 2 f(s).

    Args:
        places: Places of one sequence (s).
        shape: Form of the language model.
    """
    return 2 * (places * shape.layer_weights + 2 * places**2 * shape.heads * shape.head_width)


def prefill_flops(shape: TextShape, places: int, drops: Drops = ()) -> int:
    """Return the floating-point operations of all layers over one prompt.

    Args:
        shape: Form of the language model.
        places: Places of the prompt (S).
        drops: Where tokens leave; none for the model as it is.

    Raises:
        SettingError: Layers or places of `drops` are out of range or out of order.
    """
    return sum(layer_flops(length, shape) for length in _lengths(shape.layers, places, drops))


def prefill_saving(shape: TextShape, places: int, drops: Drops) -> float:
    """Return the share of the prefill's arithmetic that is saved, in [0, 1).

    For a withdrawal this is 1 - (K f(S) + (L - K) f(S - n)) / (L f(S)).

    Args:
        shape: Form of the language model.
        places: Places of the prompt (S), at least 1.
        drops: Where tokens leave.

    Raises:
        SettingError: Layers or places of `drops` are out of range or out of order.
    """
    return 1 - prefill_flops(shape, places, drops) / prefill_flops(shape, places)


def kv_entries(layers: int, places: int, drops: Drops = ()) -> int:
    """Return the entries of the KV cache after the prefill: one for each place of each layer.

    Args:
        layers: Number of layers (L).
        places: Places of the prompt (S).
        drops: Where tokens leave; none for the model as it is.

    Raises:
        SettingError: Layers or places of `drops` are out of range or out of order.
    """
    return sum(_lengths(layers, places, drops))


def kv_saving(layers: int, places: int, drops: Drops) -> float:
    """Return the share of the cache's entries that is saved, in [0, 1]; (L - K) n / (L S) for a withdrawal.

    Args:
        layers: Number of layers (L).
        places: Places of the prompt (S), at least 1.
        drops: Where tokens leave.

    Raises:
        SettingError: Layers or places of `drops` are out of range or out of order.
    """
    return 1 - kv_entries(layers, places, drops) / kv_entries(layers, places)


def kv_bytes(shape: TextShape, places: int, drops: Drops = (), number_bytes: int = 2) -> int:
    """Return the memory of the KV cache of one prompt after the prefill, in bytes.

    Args:
        shape: Form of the language model.
        places: Places of the prompt (S).
        drops: Where tokens leave; none for the model as it is.
        number_bytes: Bytes of one number; 2 for bfloat16.

    Raises:
        SettingError: Layers or places of `drops` are out of range or out of order.
    """
    return 2 * shape.kv_heads * shape.head_width * number_bytes * kv_entries(shape.layers, places, drops)


def search_evaluations(depth: int, layers: Sequence[int], share: float) -> tuple[float, float]:
    """Return how many full layers a search over K costs: run branch by branch, and run anew for each K.

    A full layer is one layer over all places. Branches start from the states that one whole run kept, so they cost
    ``L + sum_K (L - K) share``; the naive search costs ``L + sum_K (K + (L - K) share)``.

    Args:
        depth: Number of layers L.
        layers: The candidates K; L itself costs neither anything, since the whole run is made anyway.
        share: Places that stay over all places.

    Returns:
        Ours and the naive number.
    """
    behind = share * sum(depth - layer for layer in layers)
    return depth + behind, depth + behind + sum(layer for layer in layers if layer < depth)


def _lengths(layers: int, places: int, drops: Drops) -> list[int]:
    """Places that each layer sees."""
    if places < 1:
        raise setting_error("cost", "places", "a whole number, at least 1", places)
    lengths = [places] * layers
    least, most = 0, places
    for layer, left in drops:
        if not least <= layer <= layers:
            raise setting_error("cost", "drops", f"layers that rise, from {least} to {layers}", layer)
        if not 0 <= left <= most:
            raise setting_error("cost", "drops", f"places that fall, from {most} to 0", left)
        lengths[layer:] = [left] * (layers - layer)
        least, most = layer, left
    return lengths
