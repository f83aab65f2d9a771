"""Keep the most probable set of a determinantal point process."""

from __future__ import annotations

import torch

from trimtab.ops.select import gather_rows, in_raster_order, pick_best
from trimtab.ops.similarity import SAME, clean_tokens, cosine_matrix, full_float32, snap_ones, unit_tokens
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.options import check_flag
from trimtab.pruners.registry import register_pruner
from trimtab.shapes import Bool, Float, Int, Tensor

SMALLEST_GAIN = 1e-12
"""Gains below this count as this, so that no square root of zero or less is taken."""


@register_pruner("dpp")
class DppPruner(Pruner):
    """Keeps a set that spans a large volume, by greedy MAP inference (Chen et al., NeurIPS 2018).

    The kernel is diag(q) S diag(q) with S the cosines of the features and q the relevance of each token: 1 without
    text, or as in CDPruner (arXiv 2506.10967) the rescaled negative mean cosine to the question's words.

    Departures from CDPruner's released code: relevance is scaled per image (there over the batch, so results
    depend on batch mates), and words are compared with the projected features instead of in CLIP's shared space,
    which needs no second text tower. The minus sign is theirs; nobody has published why it helps.

    Cost: token^2 * width + kept^2 * token; token^2 floats of memory per image.

    Args:
        use_text: Weigh tokens by the question; needs ``text``.
    """

    def __init__(self, use_text: bool = False) -> None:
        self.use_text = check_flag("DppPruner", "use_text", use_text)
        if self.use_text:
            self.needs = frozenset({"text"})

    @torch.no_grad()
    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep a set of large volume; see `Pruner.select`."""
        self.check(inputs, num_keep)
        similarity = snap_ones(cosine_matrix(inputs.features, inputs.valid))
        quality = torch.ones_like(similarity[:, 0])
        if self.use_text:
            assert inputs.text is not None
            quality = relevance(inputs.features, inputs.text, inputs.valid, inputs.text_valid)
        picks = widest_set(similarity, quality, num_keep, inputs.valid)
        return Selection(*in_raster_order(picks, inputs.valid, similarity.shape[1]))


def relevance(
    features: Float[Tensor, "image token width"],
    text: Float[Tensor, "image word width"],
    valid: Bool[Tensor, "image token"] | None = None,
    text_valid: Bool[Tensor, "image word"] | None = None,
) -> Float[Tensor, "image token"]:
    """Relevance of every token to its image's words: ``(r - min + 1e-6) / (max - min)``, r the minus mean cosine.

    Args:
        features: Tokens.
        text: Words of the question.
        valid: Which tokens are real; None means all.
        text_valid: Which words are real; None means all. An image without words finds all tokens equally relevant.

    Returns:
        Values above 0, scaled per image; 1 for all where they do not differ.
    """
    words = unit_tokens(clean_tokens(text, text_valid))
    count = torch.full_like(words[:, 0, 0], words.shape[1]) if text_valid is None else text_valid.sum(dim=1)
    mean_word = words.sum(dim=1) / count.clamp_min(1).unsqueeze(-1)
    score = -(unit_tokens(clean_tokens(features, valid)) * mean_word.unsqueeze(1)).sum(dim=-1)
    real = torch.ones_like(score, dtype=torch.bool) if valid is None else valid
    low = score.masked_fill(~real, float("inf")).amin(dim=1, keepdim=True)
    span = score.masked_fill(~real, float("-inf")).amax(dim=1, keepdim=True) - low
    return torch.where(real & (span > SAME), (score - low + 1e-6) / span.clamp_min(SAME), 1.0)


def widest_set(
    similarity: Float[Tensor, "image token token"],
    quality: Float[Tensor, "image token"],
    num_keep: int,
    valid: Bool[Tensor, "image token"] | None = None,
) -> Int[Tensor, "image kept"]:
    """Pick tokens greedily, each adding most to the log-determinant of ``diag(q) S diag(q)``.

    Args:
        similarity: Cosines of every two tokens, contiguous.
        quality: q, at least 0.
        num_keep: How many to pick, in 1..token.
        valid: Which tokens are real; None means all.

    Returns:
        The picks in the order they were made; unreal tokens come only after all real ones.
    """
    images, tokens = quality.shape
    blocked = torch.zeros_like(quality, dtype=torch.bool) if valid is None else ~valid
    picks = torch.empty(images, num_keep, dtype=torch.int64, device=quality.device)
    factor = torch.zeros(images, num_keep, tokens, device=quality.device)
    whole = quality.square() * similarity.diagonal(dim1=1, dim2=2)
    gain = whole.clamp_min(SMALLEST_GAIN)
    with full_float32(quality.device):
        for step in range(num_keep):
            pick = pick_best(gain, blocked)
            picks[:, step : step + 1] = pick
            blocked = blocked.scatter(1, pick, True)
            best = gain.gather(1, pick)
            row = gather_rows(similarity, pick) * quality * quality.gather(1, pick)
            known = factor[:, :step]
            at_pick = known.gather(2, pick.unsqueeze(1).expand(-1, step, 1))
            row = (row - (at_pick * known).sum(dim=1)) / best.sqrt()
            # A token that adds nothing has a residue of pure rounding; dividing by its root would blow that up.
            row = row.masked_fill(best <= SMALLEST_GAIN, 0.0)
            factor[:, step] = row
            gain = gain - row.square()
            gain = gain.masked_fill(gain <= SAME * whole, SMALLEST_GAIN).clamp_min(SMALLEST_GAIN)
    return picks
