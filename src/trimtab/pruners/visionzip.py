"""Keep the most attended tokens and merge the rest into a few."""

from __future__ import annotations

import torch

from trimtab.ops.select import gather_tokens, mask_of_index, rank_tokens
from trimtab.ops.similarity import clean_tokens, full_float32, unit_tokens
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.options import check_number
from trimtab.pruners.registry import register_pruner
from trimtab.shapes import Bool, Float, Int, Tensor


@register_pruner("visionzip")
class VisionZipPruner(Pruner):
    """Keeps dominant tokens by class-token attention and merges the rest (VisionZip, arXiv 2412.04467).

    Evenly spaced tokens of the rest become targets; every other one joins the target of largest key cosine, and a
    target's result is target + mean of its members (a sum, so about twice as long, as in the paper; a target
    without members stays). Needs ``cls_attention`` and ``keys``. Gradients flow through the merged tokens.

    Departures: the class token is not among the features, so it is not counted; the output is in raster order,
    each merged token at its target's place; images may differ in how many tokens are real.

    Args:
        contextual_share: Share of the kept tokens that are merged ones, in [0, 1]; the paper's smallest preset
            has 10 of 64. At least one token is always dominant.
    """

    needs = frozenset({"cls_attention", "keys"})

    def __init__(self, contextual_share: float | int = 10 / 64) -> None:
        self.contextual_share = check_number("VisionZipPruner", "contextual_share", contextual_share, 0, 1)

    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep dominant tokens and merge the rest; see `Pruner.select`."""
        self.check(inputs, num_keep)
        assert inputs.cls_attention is not None
        assert inputs.keys is not None
        contextual = min(int(num_keep * self.contextual_share + 1e-6), num_keep - 1)
        order = rank_tokens(inputs.cls_attention.detach().float(), inputs.valid)
        dominant = order[:, : num_keep - contextual]
        targets, counted, member = _assign(inputs.keys, dominant, contextual, inputs.valid)
        # Detached copies would cut the gradient, so unreal tokens are blanked here as well.
        features = inputs.features.float()
        if inputs.valid is not None:
            features = features.masked_fill(~inputs.valid.unsqueeze(-1), 0.0)
        size = member.sum(dim=2)
        with full_float32(features.device):
            mean = (member / size.clamp_min(1.0).unsqueeze(-1)) @ features
        merged = torch.cat([gather_tokens(features, dominant), gather_tokens(features, targets) + mean], dim=1)
        real = torch.ones_like(dominant, dtype=torch.bool)
        if inputs.valid is not None:
            real = inputs.valid.gather(1, dominant)
        weight = torch.cat([torch.ones_like(dominant, dtype=torch.float32), size + 1], dim=1)
        return _in_order(torch.cat([dominant, targets], 1), torch.cat([real, counted], 1), merged, weight, inputs)


@torch.no_grad()
def _assign(
    keys: Float[Tensor, "image token key"],
    dominant: Int[Tensor, "image dominant"],
    contextual: int,
    valid: Bool[Tensor, "image token"] | None,
) -> tuple[Int[Tensor, "image contextual"], Bool[Tensor, "image contextual"], Float[Tensor, "image contextual token"]]:
    """Choose targets among the rest; return them, which exist, and who joins whom."""
    tokens = keys.shape[1]
    rest = ~mask_of_index(dominant, tokens)
    if valid is not None:
        rest = rest & valid
    left = rest.sum(dim=1, keepdim=True)
    place = torch.arange(contextual, device=keys.device) * (left // max(contextual, 1)).clamp_min(1)
    exists = place < left
    listed = (~rest).int().argsort(dim=1, stable=True)
    targets = listed.gather(1, place.clamp(max=tokens - 1))
    unit = unit_tokens(clean_tokens(keys, valid))
    with full_float32(unit.device):
        near = gather_tokens(unit, targets) @ unit.mT
    near = near.masked_fill(~exists.unsqueeze(2), float("-inf"))
    joins = rest & ~mask_of_index(targets, tokens, exists)
    if contextual == 0:
        return targets, exists, near
    member = near.argmax(dim=1, keepdim=True) == torch.arange(contextual, device=keys.device)[:, None]
    return targets, exists, (member & joins.unsqueeze(1)).float()


def _in_order(
    index: Int[Tensor, "image kept"],
    valid: Bool[Tensor, "image kept"],
    merged: Float[Tensor, "image kept width"],
    weight: Float[Tensor, "image kept"],
    inputs: PrunerInput,
) -> Selection:
    """Sort everything by index, with what does not count at the end."""
    last = inputs.features.shape[1] - 1
    index, order = index.masked_fill(~valid, last + 1).sort(dim=1, stable=True)
    valid = index <= last
    weight = weight.gather(1, order).masked_fill(~valid, 0.0)
    tokens = gather_tokens(merged, order).to(inputs.features.dtype)
    return Selection(index.clamp(max=last), valid, tokens, weight)
