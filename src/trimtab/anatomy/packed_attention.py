"""Attention within the rows of a pack, and never across their borders.

With SDPA the borders reach the attention function as plain lengths, and each row is attended by itself (on CUDA in half
precision all in one call of torch's variable-length kernel): exact, and without work on pairs of tokens of different
rows. Flash attention of transformers takes the borders as ``cu_seq_lens``. Eager and flex attention find them in the
positions, which begin anew at each row, and mask everything between rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from inspect import signature
from itertools import accumulate
from typing import Any

import torch

from trimtab.anatomy.families import Host
from trimtab.errors import SettingError
from trimtab.ops.host import to_device
from trimtab.shapes import Tensor

NAME = "trimtab_sdpa"
BY_POSITIONS = ("eager", "flex_attention")
FLASH = "flash_attention"
LENGTHS = "packed_lengths"
PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention", "reference_sliding_attention"})
_inside: ContextVar[bool] = ContextVar("trimtab_pack", default=False)


def backend_of(host: Host) -> str:
    """Return the attention of the language model: ``"sdpa"``, one of `BY_POSITIONS`, or a flash attention.

    Raises:
        SettingError: It is another one, of which is not known how rows are kept apart.
    """
    name = str(host.model.config.get_text_config()._attn_implementation)
    if name in ("sdpa", NAME):
        return "sdpa"
    if name in BY_POSITIONS or name.startswith(FLASH):
        return name
    raise SettingError(
        f"packing=True needs to know how attention keeps the rows of a pack apart, but attn_implementation={name!r} is "
        "not one of sdpa, flash_attention_2, flash_attention_3, flash_attention_4, flex_attention, eager. Load the "
        "model with one of them, or batch rows of like length (bucket_pool, or trimtab.BucketSampler) with "
        "packing=False."
    )


def use_packed_attention(host: Host) -> Callable[[], None]:
    """Let a model with SDPA attend within the rows of packs; without a pack it does what it did.

    Args:
        host: The opened model.

    Returns:
        What brings the model's own attention back.

    Raises:
        SettingError: Its attention, or its family, cannot be packed.
    """
    if reason := host.family.unpackable or _unknown_layers(host):
        raise SettingError(
            f"packing=True is not possible with {type(host.model).__name__}: {reason} Batch rows of "
            "like length (bucket_pool, or trimtab.BucketSampler) with packing=False."
        )
    text = host.model.config.get_text_config()
    before = text._attn_implementation
    if before in BY_POSITIONS and not host.family.packs_by_positions:
        raise SettingError(
            f"packing=True is not possible with {type(host.model).__name__} under attn_implementation={before!r}: "
            "transformers finds the rows of a pack by their positions there, and lets those of this family see each "
            "other. Load the model with attn_implementation='sdpa'; where it has none (PaliGemma 2), batch rows of "
            "like length (bucket_pool, or trimtab.BucketSampler) with packing=False."
        )
    if backend_of(host) != "sdpa" or before == NAME:
        return lambda: None
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend_within_rows)
    AttentionMaskInterface.register(NAME, mask_of_rows)
    # The setter of the configuration would reach into every part of the model; only the language model changes.
    text._attn_implementation_internal = NAME

    # No closure: a deep copy of the model has to give back its own attention, not that of the original.
    return partial(_restore, text, before)


def _restore(text: Any, before: str) -> None:
    text._attn_implementation_internal = before


def require_packed_attention(host: Host) -> None:
    """Make sure that what `use_packed_attention` has prepared still holds.

    Raises:
        SettingError: Somebody has given the model another attention since, under which rows would see each other.
    """
    name = host.model.config.get_text_config()._attn_implementation
    if name == "sdpa" or (name in BY_POSITIONS and not host.family.packs_by_positions):
        raise SettingError(
            f"attn_implementation was set to {name!r} after packing had begun, so that the rows of a pack would see "
            "each other. Set it before DualSpeed is attached, or detach and attach again."
        )


def _unknown_layers(host: Host) -> str:
    """Say which layers of a language model are not known to keep rows apart, whatever its family, or nothing."""
    text = host.model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - PLAIN_LAYERS
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(map(str, kinds)))}, which may look across rows."
    if any(name.rpartition(".")[2] == "indexer" for name, _ in host.model.get_decoder().named_modules()):
        return "its indexed layers choose the best places of all rows together."
    return ""


def packed_arguments(host: Host, lengths: Sequence[int], device: torch.device, *, gaps: bool) -> dict[str, Any]:
    """Arguments that tell a model where the rows of a pack are.

    Args:
        host: The opened model.
        lengths: Places of each row.
        device: Where the pack is.
        gaps: Whether positions may jump inside rows.

    Returns:
        Arguments of its forward, the attention mask among them.

    Raises:
        SettingError: Its attention finds rows by their positions, which have gaps, or no row has a place.
    """
    lengths = tuple(length for length in lengths if length)
    if not lengths:
        raise SettingError(
            "The batch holds no token (attention_mask is 0 everywhere), so there is nothing to pack. Leave empty rows "
            "out of the data, or look at the collator."
        )
    backend = backend_of(host)
    if backend in BY_POSITIONS:
        if gaps:
            raise SettingError(
                f"positions='original', or position_ids in the batch, may leave gaps inside rows, which "
                f"attn_implementation={backend!r} takes for the borders of a pack. Load the model with "
                "attn_implementation='sdpa', or set positions='renumber' and leave position_ids out."
            )
        return {"attention_mask": None}
    ends = to_device([0, *accumulate(lengths)], device, torch.int32)
    longest = max(lengths)
    borders = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    if backend == "sdpa":
        # With a mask that leaves nothing out transformers does not look for borders in the positions.
        everything = torch.ones(1, sum(lengths), dtype=torch.long, device=device)
        return {"attention_mask": everything, LENGTHS: lengths, **borders}
    return {"attention_mask": None, **borders}


@contextlib.contextmanager
def inside_pack(active: bool = True) -> Iterator[None]:
    """While active, every pass of the language model is one of a pack."""
    token = _inside.set(active)
    try:
        yield
    finally:
        _inside.reset(token)


def enter_pack() -> Callable[[], None]:
    """Begin what `inside_pack` does, where beginning and end are in different functions; returns what ends it."""
    _inside.set(True)

    def leave() -> None:
        _inside.set(False)

    return leave


def mask_of_rows(**kwargs: Any) -> Tensor | None:
    """Build the mask of SDPA, or none for a pack whose rows are plainly causal; called by transformers."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if _inside.get():
        if kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
            return None
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(**kwargs)
    return mask


def attend_within_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each row of a pack; without lengths like SDPA of transformers.

    Args:
        module: The attention layer.
        query: [1, head, length, size].
        key: The same, perhaps with fewer heads.
        value: The same as `key`.
        attention_mask: [1, 1, length, length], of which only the blocks of the rows are looked at; None for causal.
        packed_lengths: Places of each row.
        kwargs: Further arguments of an attention function of transformers.

    Returns:
        [1, length, head, size], and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_lengths is None:
        if _inside.get():
            raise SettingError(
                f"{type(module).__name__} does not hand on to its attention where the rows of a pack are, so they "
                "would see each other. Set packing=False for this model."
            )
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found, None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and (kernel := _varlen_kernel(query, value, kwargs)) is not None:
        return kernel(query, key, value), None
    lengths = list(packed_lengths)
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs, start = [], 0
    for length, (row_query, row_key, row_value) in zip(lengths, parts, strict=True):
        block = None
        if attention_mask is not None:
            block = attention_mask[..., start : start + length, start : start + length]
        outputs.append(sdpa_attention_forward(module, row_query, row_key, row_value, block, **kwargs)[0])
        start += length
    return torch.cat(outputs, dim=1), None


def _varlen_kernel(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
    """Torch's kernel for rows of different length, where it can do what is asked for."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = not kwargs.get("dropout") and kwargs.get("position_bias") is None
    if query.device.type != "cuda" or not half or not plain or query.shape[-1] != value.shape[-1]:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    call: Any = varlen_attn
    causal = {"window_size": (-1, 0)} if "window_size" in signature(varlen_attn).parameters else {"is_causal": True}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        rows = [one[0].transpose(0, 1).contiguous() for one in (query, key, value)]
        found: Tensor = call(*rows, ends, ends, longest, longest, scale=kwargs.get("scaling"), **causal)
        return found[None]

    return attend
