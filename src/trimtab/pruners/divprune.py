"""Keep the tokens that lie farthest apart."""

from __future__ import annotations

import torch

from trimtab.ops.graphed import GraphedCall
from trimtab.ops.select import gather_rows, in_raster_order, pick_best
from trimtab.ops.similarity import SAME, center_tokens, clean_tokens, cosine_matrix, unit_tokens
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.options import check_flag
from trimtab.pruners.registry import register_pruner
from trimtab.shapes import Bool, Float, Int, Tensor


@register_pruner("divprune")
class DivPrunePruner(Pruner):
    """Keeps a set whose smallest cosine distance is large (DivPrune, arXiv 2503.02175).

    Greedy max-min diversity with d = 1 - cosine: first the token farthest from its nearest neighbour, then each
    time the token farthest from its nearest pick. On unit vectors d is half the squared chord, so the picks are
    those of the greedy rule on chordal distance, whose smallest distance is known to be at least half of what
    later picks could reach.

    Departures from the released code: picked tokens are blocked (there they can be picked again), zero tokens have
    distance 1 to all instead of NaN, and everything runs batched in float32.

    Cost: token^2 * width for the distances, kept * token for the picks; token^2 floats of memory per image.

    Args:
        centered: Measure distances after subtracting the image's mean token, and weigh each token by how little it
            resembles the others (Cen-Prune, arXiv 2608.30263).
        pre_projector: Measure on the vision tower's states instead of the projected features (ReDiPrune, arXiv
            2603.24680); needs ``hidden``, and the choice is fixed as long as the tower is frozen.
        graphed: On CUDA, launch the picks as one graph instead of some hundred small kernels (`trimtab.ops.graphed`);
            the picks are the same. Off by default, since each shape keeps a copy of its similarities (106 MB for 80
            tiles of 576 tokens); ``trimtab bench pruners --device cuda`` times both.
    """

    def __init__(self, centered: bool = False, pre_projector: bool = False, graphed: bool = False) -> None:
        self.centered = check_flag("DivPrunePruner", "centered", centered)
        self._spread_out = GraphedCall(spread_out) if check_flag("DivPrunePruner", "graphed", graphed) else spread_out
        self.pre_projector = check_flag("DivPrunePruner", "pre_projector", pre_projector)
        if self.pre_projector:
            self.needs = frozenset({"hidden"})

    @torch.no_grad()
    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep a diverse set; see `Pruner.select`."""
        self.check(inputs, num_keep)
        tokens = inputs.features
        if self.pre_projector:
            assert inputs.hidden is not None
            tokens = inputs.hidden
        worth = None
        if self.centered:
            worth = distinctiveness(tokens, inputs.valid)
            tokens = center_tokens(tokens, inputs.valid)
        picks = self._spread_out(cosine_matrix(tokens, inputs.valid), num_keep, inputs.valid, worth)
        return Selection(*in_raster_order(picks, inputs.valid, tokens.shape[1]))


def spread_out(
    similarity: Float[Tensor, "image token token"],
    num_keep: int,
    valid: Bool[Tensor, "image token"] | None = None,
    worth: Float[Tensor, "image token"] | None = None,
) -> Int[Tensor, "image kept"]:
    """Pick tokens greedily, each as far as possible from those picked before.

    Args:
        similarity: Cosines of every two tokens, contiguous; the diagonal is overwritten.
        num_keep: How many to pick, in 1..token.
        valid: Which tokens are real; None means all.
        worth: Factor on every token's distance, at least 0; None means 1.

    Returns:
        The picks in the order they were made; unreal tokens come only after all real ones.
    """
    images, tokens = similarity.shape[:2]
    blocked = torch.zeros(images, tokens, dtype=torch.bool, device=similarity.device) if valid is None else ~valid
    picks = torch.empty(images, num_keep, dtype=torch.int64, device=similarity.device)
    similarity.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    rivals = similarity if valid is None else similarity.masked_fill(blocked.unsqueeze(1), float("-inf"))
    # 1 - x falls as x rises, also after rounding, so the farthest neighbour's distance needs no matrix of distances.
    # A token alone in its image has no neighbour; 2 is the largest distance there is.
    distance = _distance(rivals.amax(dim=2)).clamp_max_(2.0)
    nearest = torch.full_like(distance, 2.0)
    for step in range(num_keep):
        pick = pick_best(distance if worth is None else worth * distance, blocked)
        picks[:, step : step + 1] = pick
        blocked = blocked.scatter(1, pick, True)
        distance = torch.minimum(nearest, _distance(gather_rows(similarity, pick)), out=nearest)
    return picks


def distinctiveness(
    tokens: Float[Tensor, "image token width"], valid: Bool[Tensor, "image token"] | None = None
) -> Float[Tensor, "image token"]:
    """How little a token resembles the others of its image: minus its mean cosine to them, scaled to 0..1.

    Args:
        tokens: Tokens of every image.
        valid: Which tokens are real; None means all.

    Returns:
        0 for the token most like the others, 1 for the least; 1 for all where they do not differ.
    """
    unit = unit_tokens(clean_tokens(tokens, valid))
    total = unit.sum(dim=1, keepdim=True)
    likeness = (unit * (total - unit)).sum(dim=-1)
    real = torch.ones_like(likeness, dtype=torch.bool) if valid is None else valid
    likeness = likeness / (real.sum(dim=1, keepdim=True) - 1).clamp_min(1)
    high = likeness.masked_fill(~real, float("-inf")).amax(dim=1, keepdim=True)
    low = likeness.masked_fill(~real, float("inf")).amin(dim=1, keepdim=True)
    span = high - low
    # Six decimals are what float32 sums over all tokens can tell apart; more would let rounding noise break ties.
    return torch.where(span > SAME, (high - likeness) / span.clamp_min(SAME), 1.0).round(decimals=6)


def _distance(similarity: Float[Tensor, "image token"]) -> Float[Tensor, "image token"]:
    # Equal and collinear tokens must be at distance 0 exactly, or rounding noise would choose among them.
    distance = 1.0 - similarity
    return torch.where(distance < SAME, 0.0, distance)
