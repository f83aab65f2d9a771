"""Keep salient tokens that together cover the image."""

from __future__ import annotations

import torch

from trimtab.ops.select import gather_rows, in_raster_order, pick_best
from trimtab.ops.similarity import cosine_matrix, snap_ones
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.options import check_number
from trimtab.pruners.registry import register_pruner
from trimtab.shapes import Bool, Float, Int, Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 26


@register_pruner("scope")
class ScopePruner(Pruner):
    """Keeps tokens by saliency times new coverage (SCOPE, arXiv 2510.24214).

    A token's gain is its class-token attention to the power alpha, times how much it raises the best similarity
    that each token has to a kept one. Needs ``cls_attention``.

    Cost: token^2 * width + kept * token^2; token^2 floats of memory per image, and a working space that does not
    grow with the number of tokens.

    Args:
        alpha: Power of the attention, at least 0; 0 leaves coverage alone.
    """

    needs = frozenset({"cls_attention"})

    def __init__(self, alpha: float | int = 1.0) -> None:
        self.alpha = check_number("ScopePruner", "alpha", alpha, 0, float("inf"))

    @torch.no_grad()
    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep a salient cover; see `Pruner.select`."""
        self.check(inputs, num_keep)
        assert inputs.cls_attention is not None
        similarity = snap_ones(cosine_matrix(inputs.features, inputs.valid))
        saliency = inputs.cls_attention.float().clamp_min(0.0).pow(self.alpha)
        picks = cover(similarity, saliency, num_keep, inputs.valid)
        return Selection(*in_raster_order(picks, inputs.valid, similarity.shape[1]))


def cover(
    similarity: Float[Tensor, "image token token"],
    saliency: Float[Tensor, "image token"],
    num_keep: int,
    valid: Bool[Tensor, "image token"] | None = None,
) -> Int[Tensor, "image kept"]:
    """Pick tokens greedily, each by saliency times the coverage it adds.

    Args:
        similarity: Cosines of every two tokens, contiguous, symmetric, 0 for unreal tokens.
        saliency: Factor on every token's gain, at least 0.
        num_keep: How many to pick, in 1..token.
        valid: Which tokens are real; None means all.

    Returns:
        The picks in the order they were made; unreal tokens come only after all real ones.
    """
    images = saliency.shape[0]
    blocked = torch.zeros_like(saliency, dtype=torch.bool) if valid is None else ~valid
    picks = torch.empty(images, num_keep, dtype=torch.int64, device=saliency.device)
    covered = torch.zeros_like(saliency)
    for step in range(num_keep):
        pick = pick_best(saliency * _added(similarity, covered), blocked)
        picks[:, step : step + 1] = pick
        blocked = blocked.scatter(1, pick, True)
        covered = torch.maximum(covered, gather_rows(similarity, pick))
    return picks


def _added(
    similarity: Float[Tensor, "image token token"], covered: Float[Tensor, "image token"]
) -> Float[Tensor, "image token"]:
    """Coverage that each token would add: sum over the others of max(0, S - covered)."""
    images, tokens = covered.shape
    room = _CHUNK_ELEMENTS.get(covered.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    size = max(1, room // (images * tokens))
    base = covered.unsqueeze(1)
    parts = [(part - base).clamp_min_(0.0).sum(dim=2) for part in similarity.split(size, dim=1)]
    return torch.cat(parts, dim=1)
