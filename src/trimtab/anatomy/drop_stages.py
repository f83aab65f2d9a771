"""Who leaves where: the stages of VTW and of the methods it is compared with, for `drop_inside`.

Formulas of VTW (arXiv 2405.05803), FastV (arXiv 2403.06764) and PyramidDrop (arXiv 2410.17247). All choose row by row,
with any number of visual tokens in each, under padding, and without a loop over rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch

from trimtab.anatomy.drop_inside import Rows, Stage
from trimtab.anatomy.layer_scores import attention_scores
from trimtab.errors import setting_error
from trimtab.ops.host import copy_to
from trimtab.ops.select import rank_tokens
from trimtab.shapes import Bool, Float, Int, Tensor

_BITS = 40
Count = TypeVar("Count", int, Tensor)


def kept_of(total: Count, keep_ratio: float) -> Count:
    """How many of some visual tokens stay: ``floor(keep_ratio * total + 1e-6)``, at least 1 unless there is none.

    Whole numbers only (the ratio has 40 binary digits), so that host and device count alike.

    Args:
        total: Visual tokens of a row, or of each of several rows.
        keep_ratio: Share that stays.

    Returns:
        The count, of the type of `total`.
    """
    kept: Count = (total * round(keep_ratio * 2**_BITS) + round(1e-6 * 2**_BITS)) >> _BITS
    if isinstance(kept, int):
        return max(kept, min(total, 1))
    return kept.maximum(total.clamp(max=1))


def keep_highest(
    score: Float[Tensor, "row place"], among: Bool[Tensor, "row place"], keep: Int[Tensor, "row"]
) -> Bool[Tensor, "row place"]:
    """Keep the places of highest score in each row, the first among equals.

    Args:
        score: What to choose by; finite.
        among: Which places may be chosen.
        keep: How many to choose in each row; where it is more than there are, all are.

    Returns:
        True at the chosen places.
    """
    order = rank_tokens(score, among)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    standing = torch.empty_like(order).scatter_(1, order, places)
    return among & (standing < keep.unsqueeze(1))


def vtw_stages(
    layer: int, sink_tokens: int = 0, keep_newlines: bool = False, *, owner: str = "vtw_stages"
) -> tuple[Stage, ...]:
    """VTW: all visual tokens of a row leave at one layer.

    Args:
        layer: They leave at the input of this layer.
        sink_tokens: How many visual tokens of each row stay, the first ones; 0 as in the paper.
        keep_newlines: Whether newline rows (``image_newline`` of LLaVA-NeXT and its relatives) stay besides.
        owner: Who asks, for messages.

    Returns:
        One stage.

    Raises:
        SettingError: `layer` or `sink_tokens` is not a whole number from 0 on, or `keep_newlines` no bool.
    """
    _check_whole(owner, "layer", layer, 0)
    _check_whole(owner, "sink_tokens", sink_tokens, 0)
    if not isinstance(keep_newlines, bool):
        raise setting_error(owner, "keep_newlines", "True or False", keep_newlines)
    kept = None if keep_newlines else partial(min, sink_tokens)
    return (Stage(layer, partial(_without_visual, sink_tokens=sink_tokens, marks=keep_newlines), kept=kept),)


def _without_visual(rows: Rows, *, sink_tokens: int, marks: bool) -> Tensor:
    stays = ~rows.visual | (rows.rank < sink_tokens)
    return stays | rows.marks if marks else stays


def fastv_stages(layer: int, keep_ratio: float, *, owner: str = "fastv_stages") -> tuple[Stage, ...]:
    """FastV: at one layer the visual tokens leave that got least attention in the layer before it.

    The score is the attention of each row's query rows, mean over heads; see `attention_scores`. The query row is the
    last place of a prompt. In training set `InsideDrop.queries` to the places just before each answer: the last place
    would be the end of the answer, which must not choose what the answer is learnt from (the released code lets it).

    Args:
        layer: Tokens leave at the input of this layer; at least 1, since the layer before it is asked. 2 in the paper.
        keep_ratio: Share of each row's visual tokens that stays, in (0, 1]; see `kept_of`. 0.5 in the paper.
        owner: Who asks, for messages.

    Returns:
        One stage; none for a `keep_ratio` of 1.

    Raises:
        SettingError: `layer` is not a whole number from 1 on, or `keep_ratio` is not in (0, 1].
    """
    _check_whole(owner, "layer", layer, 1)
    _check_ratio(owner, "keep_ratio", keep_ratio)
    return () if keep_ratio == 1 else (_scored(layer, layer - 1, keep_ratio),)


def pyramid_stages(
    depth: int,
    layers: Sequence[int] | None = None,
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125),
    *,
    owner: str = "pyramid_stages",
) -> tuple[Stage, ...]:
    """PyramidDrop: at several layers the visual tokens leave that the layer is about to pay least attention to.

    The score is the attention that the layer's own norm, projections and rotary embedding give for each row's query
    rows; see `attention_scores`, and `fastv_stages` for query rows in training. What left stays away.

    Args:
        depth: Layers of the model.
        layers: At the input of which layers tokens leave, rising; a quarter, a half and three quarters of `depth` by
            default, as in the paper (8, 16 and 24 of 32).
        keep_ratios: Share of each row's original visual tokens that stays at each of them, each in (0, 1], not rising;
            see `kept_of`.
        owner: Who asks, for messages.

    Returns:
        The stages; none for a ratio of 1 or the same as the one before, at which nothing leaves.

    Raises:
        SettingError: Layers or ratios outside their range or order, or not as many of the one as of the other.
    """
    _check_whole(owner, "depth", depth, 1)
    if layers is None:
        layers = default_pyramid_layers(depth, owner)
    if not isinstance(layers, Sequence) or not all(
        isinstance(one, int) and not isinstance(one, bool) for one in layers
    ):
        raise setting_error(owner, "layers", "a list of whole numbers, or None", layers)
    inside = all(0 <= one <= depth for one in layers)
    if not layers or not inside or any(second <= first for first, second in pairwise(layers)):
        raise setting_error(
            owner, "layers", f"one or more rising whole numbers from 0 to {depth}, the layers of the model",
            list(layers), "At a layer tokens leave once.",
        )  # fmt: skip
    if not isinstance(keep_ratios, Sequence) or len(keep_ratios) != len(layers):
        raise setting_error(
            owner, "keep_ratios", f"a list of {len(layers)} shares, one for each of the layers {list(layers)}",
            keep_ratios, "Give as many shares as layers.",
        )  # fmt: skip
    for ratio in keep_ratios:
        _check_ratio(owner, "keep_ratios", ratio)
    if any(second > first for first, second in pairwise(keep_ratios)):
        raise setting_error(
            owner, "keep_ratios", "not rising, since what left stays away", list(keep_ratios),
            "Each is a share of the original count of visual tokens, not of what the stage before has left.",
        )  # fmt: skip
    before = (1.0, *keep_ratios)
    chosen = zip(layers, keep_ratios, before, strict=False)
    return tuple(_scored(layer, layer, ratio) for layer, ratio, last in chosen if ratio < last)


def default_pyramid_layers(depth: int, owner: str = "pyramid_stages") -> tuple[int, ...]:
    """A quarter, a half and three quarters of the layers of a model.

    Args:
        depth: Layers of the model.
        owner: Who asks, for messages.

    Returns:
        Three layers.

    Raises:
        SettingError: There are less than 4.
    """
    if depth < 4:
        raise setting_error(
            owner, "layers", "given for a model of less than 4 layers, where a quarter, a half and three "
            "quarters are not three layers", None, f"This model has {depth}: pass layers and as many keep_ratios.",
        )  # fmt: skip
    return depth // 4, depth // 2, 3 * depth // 4


def _scored(layer: int, look: int, keep_ratio: float) -> Stage:
    choose = partial(_highest_scores, keep_ratio=keep_ratio)
    return Stage(layer, choose, look=look, kept=partial(kept_of, keep_ratio=keep_ratio))


def _highest_scores(rows: Rows, *, keep_ratio: float) -> Tensor:
    chosen = keep_highest(attention_scores(rows), rows.visual, kept_of(rows.total, keep_ratio))
    return ~rows.visual | chosen


def random_stages(
    layer: int,
    count: int | None = None,
    seed: int = 0,
    *,
    spare_queries: bool = False,
    owner: str = "random_stages",
) -> tuple[Stage, ...]:
    """The control of VTW: at one layer random places leave, whatever they hold.

    The last place of a prompt may be among them, as in the released code; the next token is then predicted from the
    nearest place before it that stayed.

    As with VTW, nothing leaves in calls without visual tokens. Each call draws anew, from a generator of its own that
    is seeded by (`seed`, `layer`, number of the call); on every device the same.

    Args:
        layer: They leave at the input of this layer.
        count: How many leave of each row, of which at least one place stays; by default as many as the row has visual
            tokens, so that VTW at the same layer computes just as much.
        seed: Seed of the draws.
        spare_queries: Whether query rows (the last place of a prompt) stay, for a control that can still answer.
        owner: Who asks, for messages.

    Returns:
        One stage; none for a `count` of 0.

    Raises:
        SettingError: `layer`, `count` or `seed` is not a whole number from 0 on.
    """
    _check_whole(owner, "layer", layer, 0)
    if count is not None:
        _check_whole(owner, "count", count, 0)
    _check_whole(owner, "seed", seed, 0)
    return () if count == 0 else (Stage(layer, _RandomPlaces(layer, count, seed, spare_queries)),)


@dataclass
class _RandomPlaces:
    """Chooses random places to leave; counts its calls."""

    layer: int
    count: int | None
    seed: int
    spare_queries: bool
    calls: int = field(default=0, init=False)

    def __call__(self, rows: Rows) -> Tensor:
        name = hashlib.sha256(f"{self.seed} {self.layer} {self.calls}".encode()).digest()
        self.calls += 1
        generator = torch.Generator().manual_seed(int.from_bytes(name[:7], "big"))
        noise = copy_to(torch.rand(rows.real.shape, generator=generator), rows.real.device)
        among = rows.real & ~rows.queries if self.spare_queries else rows.real
        count = rows.total if self.count is None else torch.full_like(rows.total, self.count)
        # At least one real place stays.
        return ~keep_highest(noise, among, torch.minimum(count, rows.real.sum(1) - 1))


def _check_whole(owner: str, setting: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise setting_error(owner, setting, f"a whole number from {least} on", value)


def _check_ratio(owner: str, setting: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise setting_error(owner, setting, "a share in (0, 1]", value, "1 keeps all visual tokens.")
