"""What VTW does to a model: from one layer on it sees text only."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from trimtab.anatomy.decoder import open_decoder
from trimtab.anatomy.drop_inside import DropPositions, InsideDrop, drop_inside
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.errors import SettingError, TrimtabWarning, setting_error
from trimtab.methods.vtw.config import VTWConfig
from trimtab.shapes import Bool, Tensor

OWNER = "withdraw"


def stack_layers(states: Sequence[Tensor]) -> Tensor:
    """Stack states or attentions of several layers, as ``output_hidden_states`` and ``output_attentions`` give them.

    Args:
        states: One tensor per layer, all of one shape: those of layers before a withdrawal, or of those behind it.

    Returns:
        [layer, ...].

    Raises:
        SettingError: They differ in shape, since tokens left in between.
    """
    shapes = [tuple(one.shape) for one in states]
    if len(set(shapes)) > 1:
        first = next(place for place, shape in enumerate(shapes) if shape != shapes[0])
        raise setting_error(
            "stack_layers", "states", "tensors of one shape", f"{shapes[0]} up to entry {first - 1}, then "
            f"{shapes[first]}", "Tokens left in between: stack the layers before and behind the withdrawal separately.",
        )  # fmt: skip
    return torch.stack(list(states))


def withdraw(
    model: Any,
    layer: int | None = None,
    *,
    positions: DropPositions = "keep",
    sink_tokens: int = 0,
    keep_newlines: bool = False,
    visual_mask: Bool[Tensor, "row seq"] | None = None,
    settings: VTWConfig | str | Path | None = None,
) -> InsideDrop:
    """Let all visual tokens leave the language model at one layer (VTW, arXiv 2405.05803, section 3).

    Layers before it see the whole sequence, the others text only; ``generate``, plain calls and training go on as
    before, with a cache whose deep layers are shorter. Outputs have a state for every place: that of a visual token is
    the one of the nearest text before it. ``hidden_states`` and ``attentions`` of single layers differ in length.

    >>> with withdraw(model, layer=16):
    ...     output = model.generate(**inputs)

    Args:
        model: A vision-language model that `trimtab.check_model` supports, all of whose layers have full attention, or
            a decoder-only language model with `visual_mask`; also inside a PEFT wrapper.
        layer: Layers before this one see the image: 16 of 32 in the paper's code for LLaVA-1.5-7B. 0 is text only, the
            number of layers is the unmodified model.
        positions: ``"keep"`` leaves text its positions (the default of the released code, too), ``"reset"`` renumbers
            it without gaps in the deep layers.
        sink_tokens: How many of each row's first visual tokens stay.
        keep_newlines: Whether the rows that end the lines of an image stay (``image_newline`` of LLaVA-NeXT and its
            relatives).
        visual_mask: Where visual tokens stand in the next prompt, for calls with ``inputs_embeds`` alone.
        settings: `VTWConfig`, or the file of one, in place of the settings above.

    Returns:
        The handle, also a context manager; `InsideDrop.detach` gives the model back as it was, bit for bit.

    Raises:
        SettingError: A setting is outside its range; `layer` comes together with `settings`, or neither does.
        UnsupportedModelError: The model's layers cannot be found, or are not understood.
        NotSupportedError: It is compiled, or has sliding windows or recurrent layers.
        WrongOrderError: Tokens of this model leave already.

    Warns:
        TrimtabWarning: With ``layer=0`` the image is never seen.
    """
    decoder = open_decoder(model)
    chosen: dict[str, Any] = {"positions": positions, "sink_tokens": sink_tokens, "keep_newlines": keep_newlines}
    if settings is None:
        if layer is None:
            raise setting_error(OWNER, "layer", f"a whole number from 0 to {decoder.depth}", None, _WHERE)
    else:
        if not isinstance(settings, (VTWConfig, str, os.PathLike)):
            raise setting_error(OWNER, "settings", "a VTWConfig or the path of its file", settings)
        config = settings if isinstance(settings, VTWConfig) else VTWConfig.load(settings)
        defaults = {one.name: one.default for one in fields(VTWConfig)}
        twice = [name for name, value in chosen.items() if value != defaults[name]]
        if layer is not None or twice:
            names = ", ".join(["layer"] * (layer is not None) + twice)
            raise SettingError(f"{OWNER} takes either settings or {names}, but both came. Leave out one of them.")
        config.check(decoder.depth)
        layer = config.layer
        chosen = {name: getattr(config, name) for name in chosen}
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= decoder.depth:
        allowed = f"a whole number from 0 to {decoder.depth}, the layers of {decoder.name}"
        raise setting_error(OWNER, "layer", allowed, layer, _WHERE)
    if chosen["keep_newlines"] is True and getattr(decoder.base, "image_newline", None) is None:
        raise setting_error(
            OWNER, "keep_newlines", f"False for {decoder.name}, which has no newline rows of its own (image_newline)",
            True, "Where a family's processor writes line ends into the text, they are text and stay.",
        )  # fmt: skip
    stages = vtw_stages(layer, chosen["sink_tokens"], chosen["keep_newlines"], owner=OWNER)
    handle = drop_inside(model, stages, owner=OWNER, positions=chosen["positions"], visual_mask=visual_mask)
    if layer == 0:
        try:
            warnings.warn(
                f"{OWNER}.layer is 0: the image is never seen, since visual tokens leave before the first layer. Give "
                "the number of layers that shall see it.",
                TrimtabWarning,
                stacklevel=2,
            )
        except TrimtabWarning:  # where warnings are errors nobody would get the handle
            handle.detach()
            raise
    return handle


_WHERE = "search_withdrawal_layer finds one for a task; the paper's code takes half of the layers."
