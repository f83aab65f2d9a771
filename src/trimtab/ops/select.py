"""Choosing, gathering and putting back tokens by index, batched and without reading anything back to the host.

Every function has output sizes that follow from its arguments alone, so none waits for the device. Ties go to the
lowest index everywhere; ``torch.topk`` promises no order among equals, a stable sort does.
"""

from __future__ import annotations

import torch

from trimtab.shapes import Bool, Float, Int, Tensor


def gather_tokens(
    tokens: Float[Tensor, "image token width"], index: Int[Tensor, "image kept"]
) -> Float[Tensor, "image kept width"]:
    """Take the tokens at `index` of every image; gradients flow back to them.

    Args:
        tokens: Tokens of every image.
        index: Which to take, each in 0..token-1.

    Returns:
        The tokens in the order of `index`.
    """
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(
    kept: Float[Tensor, "image kept width"], index: Int[Tensor, "image kept"], tokens: int
) -> Float[Tensor, "image token width"]:
    """Put tokens back to their places in the full raster; all other places are zero.

    Args:
        kept: The tokens.
        index: Their places, distinct in each image, each in 0..tokens-1.
        tokens: Tokens per image of the full raster.

    Returns:
        The full raster; gradients flow back to `kept`.
    """
    full = kept.new_zeros(kept.shape[0], tokens, kept.shape[2])
    return full.scatter(1, index.unsqueeze(-1).expand_as(kept), kept)


def mask_of_index(
    index: Int[Tensor, "image kept"], tokens: int, valid: Bool[Tensor, "image kept"] | None = None
) -> Bool[Tensor, "image token"]:
    """Turn kept indices into a mask over all tokens.

    Args:
        index: Kept indices, each in 0..tokens-1.
        tokens: Tokens per image.
        valid: Which of the indices count; None means all.

    Returns:
        True at the tokens that are kept.
    """
    counts = torch.ones_like(index) if valid is None else valid.to(index.dtype)
    hits = torch.zeros(index.shape[0], tokens, dtype=index.dtype, device=index.device)
    return hits.scatter_add_(1, index, counts) > 0


def index_of_mask(
    mask: Bool[Tensor, "image token"], num_keep: int
) -> tuple[Int[Tensor, "image kept"], Bool[Tensor, "image kept"]]:
    """Turn a mask over all tokens into ascending indices of fixed count.

    Args:
        mask: True at the tokens to keep.
        num_keep: How many indices to return, in 1..token; where a mask holds more, the lowest are taken.

    Returns:
        The indices, ascending, and which of them count. Where a mask holds fewer than `num_keep`, the rest
        points at the last token and does not count.
    """
    tokens = mask.shape[1]
    places = torch.arange(tokens, device=mask.device).expand_as(mask)
    # Only the wanted places sort below `tokens`; their order is the raster's.
    index = places.masked_fill(~mask, tokens).sort(dim=1).values[:, :num_keep]
    return index.clamp(max=tokens - 1), index < tokens


def rank_tokens(
    score: Float[Tensor, "image token"], valid: Bool[Tensor, "image token"] | None = None
) -> Int[Tensor, "image token"]:
    """Order the tokens of every image by falling score, equal scores by rising index, invalid ones last.

    Args:
        score: What to order by; finite.
        valid: Which tokens are real; None means all.

    Returns:
        Token indices, best first.
    """
    if valid is not None:
        score = score.masked_fill(~valid, float("-inf"))
    return score.sort(dim=1, descending=True, stable=True).indices


def keep_best(
    score: Float[Tensor, "image token"], num_keep: int, valid: Bool[Tensor, "image token"] | None = None
) -> tuple[Int[Tensor, "image kept"], Bool[Tensor, "image kept"]]:
    """Keep the tokens of highest score.

    Args:
        score: What to keep by; finite.
        num_keep: How many to keep, in 1..token.
        valid: Which tokens are real; None means all.

    Returns:
        The indices, ascending, and which of them count; see `in_raster_order`.
    """
    return in_raster_order(rank_tokens(score, valid)[:, :num_keep], valid, score.shape[1])


def in_raster_order(
    picks: Int[Tensor, "image kept"], valid: Bool[Tensor, "image token"] | None, tokens: int
) -> tuple[Int[Tensor, "image kept"], Bool[Tensor, "image kept"]]:
    """Sort picks ascending and say which of them count.

    Args:
        picks: Picked indices in any order, distinct among the real tokens.
        valid: Which tokens are real; None means all.
        tokens: Tokens per image.

    Returns:
        The indices, ascending, and which of them count. Picks of unreal tokens move to the end, point at the
        last token and do not count.
    """
    if valid is None:
        index = picks.sort(dim=1).values
        return index, torch.ones_like(index, dtype=torch.bool)
    return index_of_mask(mask_of_index(picks, tokens, valid.gather(1, picks)) & valid, picks.shape[1])


def pick_best(gain: Float[Tensor, "image token"], blocked: Bool[Tensor, "image token"]) -> Int[Tensor, "image 1"]:
    """Pick the token of highest gain that is not blocked; the lowest index among equals.

    Args:
        gain: What a pick brings; not NaN.
        blocked: Tokens that must not be picked. Where all are, token 0 is returned.

    Returns:
        One token index per image, as a column that ``gather`` and ``scatter`` take.
    """
    return gain.masked_fill(blocked, float("-inf")).argmax(dim=1, keepdim=True)


def gather_rows(
    matrix: Float[Tensor, "image token other"], pick: Int[Tensor, "image 1"]
) -> Float[Tensor, "image other"]:
    """Take one row of every image's matrix.

    Args:
        matrix: One matrix per image, contiguous.
        pick: Row number per image.

    Returns:
        The rows.
    """
    images, rows, width = matrix.shape
    start = torch.arange(images, device=matrix.device) * rows
    # A whole-row copy; gather along a dimension would move one element at a time.
    return matrix.view(images * rows, width).index_select(0, start + pick.squeeze(1))
