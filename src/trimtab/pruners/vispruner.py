"""Keep the most attended tokens, and the most different among the rest."""

from __future__ import annotations

import torch

from trimtab.ops.select import gather_tokens, in_raster_order, rank_tokens
from trimtab.ops.similarity import clean_tokens, cosine_matrix, snap_ones
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.options import check_number
from trimtab.pruners.registry import register_pruner
from trimtab.shapes import Bool, Float, Int, Tensor

DROPPED_PER_ROUND = 8


@register_pruner("vispruner")
class VisPrunerPruner(Pruner):
    """Keeps a share by class-token attention and fills up with tokens unlike each other (VisPruner, 2412.01818 v2).

    The rest, ordered by falling attention, is thinned in rounds: tokens at even places are compared with those at
    odd places, and the up to 8 even ones that most resemble an odd one go. Sizes of odd lists come from the lists
    themselves (the released code breaks there). Needs ``cls_attention``.

    Cost: token^2 * width once, then (token - kept) / 8 rounds on the remaining similarities.

    Args:
        saliency_share: Share of the kept tokens that attention chooses (rho of the paper), in [0, 1].
    """

    needs = frozenset({"cls_attention"})

    def __init__(self, saliency_share: float | int = 0.5) -> None:
        self.saliency_share = check_number("VisPrunerPruner", "saliency_share", saliency_share, 0, 1)

    @torch.no_grad()
    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep attended and different tokens; see `Pruner.select`."""
        self.check(inputs, num_keep)
        assert inputs.cls_attention is not None
        valid = inputs.valid
        order = rank_tokens(inputs.cls_attention.float(), valid)
        salient = int(num_keep * self.saliency_share)
        picks = order
        if salient < num_keep < order.shape[1]:
            # In the order of attention, so that lists of places index the matrix directly.
            ranked = gather_tokens(clean_tokens(inputs.features, valid), order[:, salient:])
            similarity = snap_ones(cosine_matrix(ranked))
            real = None if valid is None else valid.gather(1, order[:, salient:])
            places = thin_out(similarity, num_keep - salient, real)
            picks = torch.cat([order[:, :salient], order[:, salient:].gather(1, places)], dim=1)
        return Selection(*in_raster_order(picks[:, :num_keep], valid, order.shape[1]))


def thin_out(
    similarity: Float[Tensor, "image token token"], num_keep: int, valid: Bool[Tensor, "image token"] | None = None
) -> Int[Tensor, "image kept"]:
    """Thin a list in rounds until `num_keep` places remain.

    Args:
        similarity: Cosines of every two places of the list, contiguous.
        num_keep: How many places shall remain, at least 1.
        valid: Which places are real, all of them before the unreal ones; None means all.

    Returns:
        The remaining places, rising. An image with fewer real places keeps all of them, then unreal ones.
    """
    images, length = similarity.shape[:2]
    device = similarity.device
    places = torch.arange(length, device=device).repeat(images, 1)
    # How many real places each image's list still has; lists shorter than the longest wait for it.
    real = torch.full((images, 1), length, device=device) if valid is None else valid.sum(dim=1, keepdim=True)
    flat = similarity.view(images, -1)
    while length > num_keep:
        even, odd = places[:, 0::2], places[:, 1::2]
        near = flat.gather(1, (even.unsqueeze(2) * similarity.shape[1] + odd.unsqueeze(1)).flatten(1))
        near = near.view(images, even.shape[1], odd.shape[1])
        slot = torch.arange(length, device=device)
        near = near.masked_fill((slot[1::2] >= real).unsqueeze(1), -2.0)
        likeness = near.amax(dim=2).masked_fill(slot[0::2] >= real, float("-inf"))
        drop = torch.minimum((real - num_keep).clamp(0, DROPPED_PER_ROUND), (real + 1) // 2)
        rank = rank_tokens(likeness).argsort(dim=1)
        gone = torch.zeros_like(places, dtype=torch.bool)
        gone[:, 0::2] = rank < drop
        after = length - min(DROPPED_PER_ROUND, length - num_keep, (length + 1) // 2)
        places = places.gather(1, gone.int().argsort(dim=1, stable=True)[:, :after])
        real, length = real - drop, after
    return places
