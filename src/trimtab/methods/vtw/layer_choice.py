"""Which layer may lose its visual tokens: divergence of the next word, its curve over the layers, and the choice.

For every candidate layer K the next-token distribution p_K of the model that loses its visual tokens at K is held
against the distribution p_full of the whole model. The layer is the first whose mean KL(p_K || p_full) over the samples
is at most a threshold (VTW, arXiv 2405.05803).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trimtab.errors import setting_error
from trimtab.shapes import Bool, Float, Tensor

THRESHOLD = 0.003
"""The paper's code for LLaVA-1.5-7B and for all models it does not know; 0.0005 for LLaVA-1.5-13B and 0.0001 for
LLaVA-NeXT-vicuna-7B. In nats."""

FIRST_CANDIDATE = 5
"""Where the paper's code begins to look, in models of 32 and 40 layers."""


def withdrawal_divergence(
    withdrawn: Float[Tensor, "label vocab"], full: Float[Tensor, "label vocab"]
) -> Float[Tensor, "label"]:
    """KL(p_withdrawn || p_full) in nats, the direction of the paper's code: sum_v p_K(v) (log p_K(v) - log p_full(v)).

    Computed in float64 (float32 on devices without it), since thresholds go down to 1e-4 and the terms cancel. Summed
    as p log(p/q) - p + q, whose every term is at least 0, and what rounding makes negative is cut at 0: the value is
    never negative, and exactly 0 for equal scores. A word that both rule out (a score of minus infinity) counts
    nothing.

    Args:
        withdrawn: Scores of the model without its visual tokens from some layer on.
        full: Scores of the whole model at the same places.

    Returns:
        One value per place, at least 0; infinite where a word is possible in `withdrawn` only, NaN where scores are.
    """
    wide = torch.float32 if full.device.type == "mps" else torch.float64
    log_p = torch.log_softmax(withdrawn.to(wide), dim=-1)
    log_q = torch.log_softmax(full.to(wide), dim=-1)
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(p == 0, 0.0, log_p - log_q)
    return (p * ratio - p + q).clamp_min(0).sum(-1)


def same_first_choice(
    withdrawn: Float[Tensor, "label vocab"], full: Float[Tensor, "label vocab"]
) -> Bool[Tensor, "label"]:
    """Where both find the same word most probable.

    Args:
        withdrawn: Scores of the model without its visual tokens from some layer on.
        full: Scores of the whole model at the same places.
    """
    return withdrawn.argmax(-1) == full.argmax(-1)


@dataclass(frozen=True)
class CurvePoint:
    """What is known about one layer.

    Attributes:
        layer: Visual tokens leave at the input of this layer.
        mean: Mean divergence over the samples, in nats.
        stderr: Standard error of that mean; NaN with one sample, of which nothing can be said.
        largest: Divergence of the worst sample, in nats.
        same_token: Share of samples (of supervised places in each, then of samples) whose most probable word is the
            whole model's.
        flops_saving: Share of the prefill's arithmetic that is saved, or None for layers of an unknown form.
        kv_saving: Share of the entries of the KV cache that is saved after the prefill.
    """

    layer: int
    mean: float
    stderr: float
    largest: float
    same_token: float
    flops_saving: float | None = None
    kv_saving: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the point as a plain dict for JSON, NaN and infinity as None."""
        told = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of a sample and its standard error, sd / sqrt(n) with n - 1 in the variance.

    Args:
        values: At least one.

    Returns:
        Both; the error is NaN for one value.
    """
    number = len(values)
    mean = math.fsum(values) / number
    if number == 1 or not math.isfinite(mean):
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
    return mean, math.sqrt(variance / number)


def default_start(depth: int, first_layer: int = 0) -> int:
    """Return the first layer that is looked at: ``min(5, depth // 6)``, at least 1 and at least `first_layer`.

    The paper's code begins at 5 in models of 32 and 40 layers; shallower ones would lose candidates to that.

    Args:
        depth: Number of layers L.
        first_layer: The least layer at which tokens may leave.
    """
    return max(1, first_layer, min(FIRST_CANDIDATE, depth // 6))


def choose_layer(
    curve: Sequence[CurvePoint], depth: int, *, threshold: float = THRESHOLD, start_layer: int = 0, margin: float = 0.0
) -> int | None:
    """Return the first layer whose divergence is small enough.

    Args:
        curve: Points of the layers, in any order.
        depth: Number of layers L; K = L, the model as it is, is no choice.
        threshold: Most divergence in nats, above 0.
        start_layer: Layers before this one are passed over.
        margin: How many standard errors are added to the mean; 0 is the paper. Above 0 it takes two samples.

    Returns:
        The least K in ``start_layer..depth - 1`` with ``mean + margin * stderr <= threshold``, or None.

    Raises:
        SettingError: The threshold is not a finite number above 0, or the margin none of at least 0.
    """
    check_threshold(threshold, margin, "choose_layer")
    for point in sorted(curve, key=lambda one: one.layer):
        bound = point.mean + margin * point.stderr if margin else point.mean
        if start_layer <= point.layer < depth and bound <= threshold:
            return point.layer
    return None


def check_threshold(threshold: float, margin: float, owner: str) -> None:
    """Raise where threshold or margin are out of range.

    Args:
        threshold: In nats.
        margin: In standard errors.
        owner: Whose settings they are, for the message.

    Raises:
        SettingError: They are.
    """
    if not _is_number(threshold) or not 0 < threshold < math.inf:
        remedy = "It is a divergence in nats; the paper takes 0.003, and 0.0001 for the most careful choice."
        raise setting_error(owner, "threshold", "a finite number above 0", threshold, remedy)
    if not _is_number(margin) or not 0 <= margin < math.inf:
        remedy = "It counts standard errors above the mean; 0 looks at the mean alone."
        raise setting_error(owner, "margin", "a finite number, at least 0", margin, remedy)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
