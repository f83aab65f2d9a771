"""What VTW is compared with: other ways to let tokens leave between layers.

`fastv` and `pyramid_drop` choose visual tokens by attention, `random_drop` any tokens by chance. Formulas of the papers
(arXiv 2403.06764, 2410.17247, 2405.05803); how they choose stands in `trimtab.anatomy.drop_stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.anatomy.decoder import open_decoder
from trimtab.anatomy.drop_inside import DropPositions, InsideDrop, drop_inside
from trimtab.anatomy.drop_stages import fastv_stages, pyramid_stages, random_stages
from trimtab.errors import setting_error
from trimtab.shapes import Bool, Tensor


def fastv(
    model: Any,
    layer: int = 2,
    keep_ratio: float = 0.5,
    *,
    positions: DropPositions = "keep",
    visual_mask: Bool[Tensor, "row seq"] | None = None,
) -> InsideDrop:
    """Let the visual tokens leave that one layer paid least attention to (FastV, arXiv 2403.06764).

    At the input of `layer` each row keeps the visual tokens that its query row attended to most in the layer before,
    mean over heads. The query row is the last place of the prompt; in training set `InsideDrop.queries` to the places
    just before each answer. Only that row of the attention map is computed, so that sdpa and flash attention stay on.

    Unlike in the released code each row of a batch chooses for itself, wherever its visual tokens and padding stand.

    >>> with fastv(model, layer=2, keep_ratio=0.5):
    ...     output = model.generate(**inputs)

    Args:
        model: See `trimtab.methods.vtw.withdraw`.
        layer: Layers before this one see all visual tokens; from 1, the number of layers is the unmodified model.
        keep_ratio: Share of each row's visual tokens that stays, in (0, 1]; ``floor(keep_ratio * n + 1e-6)`` of n, at
            least 1. 1 is the unmodified model.
        positions: ``"keep"`` or ``"reset"``; see `trimtab.methods.vtw.withdraw`.
        visual_mask: Where visual tokens stand in the next prompt, for calls with ``inputs_embeds`` alone.

    Returns:
        The handle, also a context manager; `InsideDrop.detach` gives the model back as it was, bit for bit.

    Raises:
        SettingError: A setting is outside its range.
        UnsupportedModelError: The model's layers cannot be found or are not understood; at the first prompt with an
            image, that its attention cannot be asked.
        NotSupportedError: It is compiled, or has sliding windows or recurrent layers.
        WrongOrderError: Tokens of this model leave already.
    """
    _check_layer(model, layer, 1, "fastv")
    stages = fastv_stages(layer, keep_ratio, owner="fastv")
    return drop_inside(model, stages, owner="fastv", positions=positions, visual_mask=visual_mask)


def pyramid_drop(
    model: Any,
    layers: Sequence[int] | None = None,
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125),
    *,
    positions: DropPositions = "keep",
    visual_mask: Bool[Tensor, "row seq"] | None = None,
) -> InsideDrop:
    """Let visual tokens leave at several layers, by the attention that each is about to pay (PyramidDrop, 2410.17247).

    At the input of each of `layers` a row keeps the visual tokens to which the layer's own norm, projections and rotary
    embedding give most attention from its query row, mean over heads; see `fastv` for query rows. Unlike the released
    code it knows any padding, several images in a row, and by default leaves the positions as they are
    (``positions="reset"`` renumbers as the code does).

    >>> with pyramid_drop(model):
    ...     output = model.generate(**inputs)

    Args:
        model: See `trimtab.methods.vtw.withdraw`.
        layers: Where tokens leave, rising; by default a quarter, a half and three quarters of the model's layers.
        keep_ratios: Share of each row's original visual tokens that stays at each of `layers`, not rising.
        positions: ``"keep"`` or ``"reset"``; see `trimtab.methods.vtw.withdraw`.
        visual_mask: Where visual tokens stand in the next prompt, for calls with ``inputs_embeds`` alone.

    Returns:
        The handle, also a context manager; see `fastv`.

    Raises:
        SettingError: A setting is outside its range; layers and shares are not as many.
        UnsupportedModelError: See `fastv`.
        NotSupportedError: See `fastv`.
        WrongOrderError: Tokens of this model leave already.
    """
    stages = pyramid_stages(open_decoder(model).depth, layers, keep_ratios, owner="pyramid_drop")
    return drop_inside(model, stages, owner="pyramid_drop", positions=positions, visual_mask=visual_mask)


def random_drop(
    model: Any,
    layer: int,
    *,
    count: int | None = None,
    seed: int = 0,
    spare_last: bool = False,
    positions: DropPositions = "keep",
    visual_mask: Bool[Tensor, "row seq"] | None = None,
) -> InsideDrop:
    """Let random tokens leave at one layer, text as well as visual: the control of VTW's paper (arXiv 2405.05803).

    It computes as much as `trimtab.methods.vtw.withdraw` at the same layer, so that what VTW is better by comes from
    which tokens leave. The last place of a prompt leaves as readily as any; the next word is then predicted from the
    nearest place before it that stayed. Drawn anew in each prompt.

    Args:
        model: See `trimtab.methods.vtw.withdraw`.
        layer: Layers before this one see all tokens.
        count: How many leave of each row; by default as many as it has visual tokens.
        seed: Seed of the draws, which depend on it, on `layer` and on how many prompts came before.
        spare_last: Whether the last place of each prompt stays (with `InsideDrop.queries` those places instead): a
            control that is not beaten just because nobody is left to answer.
        positions: ``"keep"`` or ``"reset"``; see `trimtab.methods.vtw.withdraw`.
        visual_mask: Where visual tokens stand in the next prompt, for calls with ``inputs_embeds`` alone.

    Returns:
        The handle, also a context manager; see `fastv`.

    Raises:
        SettingError: A setting is outside its range.
        UnsupportedModelError: The model's layers cannot be found or are not understood.
        NotSupportedError: It is compiled, or has sliding windows or recurrent layers.
        WrongOrderError: Tokens of this model leave already.
    """
    _check_layer(model, layer, 0, "random_drop")
    stages = random_stages(layer, count, seed, spare_queries=spare_last, owner="random_drop")
    return drop_inside(model, stages, owner="random_drop", positions=positions, visual_mask=visual_mask)


def _check_layer(model: Any, layer: object, least: int, owner: str) -> None:
    decoder = open_decoder(model)
    if isinstance(layer, bool) or not isinstance(layer, int) or not least <= layer <= decoder.depth:
        allowed = f"a whole number from {least} to {decoder.depth}, the layers of {decoder.name}"
        remedy = f"At {decoder.depth} nothing leaves." if least == 0 else "The layer before it is asked."
        raise setting_error(owner, "layer", allowed, layer, remedy)
