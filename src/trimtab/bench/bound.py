"""The limit that arithmetic sets to the gain: how fast DualSpeed can be, from plain counts.

Everything that is not a matrix product (launches, data loading, communication, padding) is left out, so a
measured gain above this bound means that the two sides did not do the same work, and one far below it that time
goes elsewhere. Per sample, with P parameters in the decoder blocks, width d, L layers and S places:

    forward(S) = 2 P S + 2 d L S^2      (the attention of a causal model, half of the square)
    training   = 3 forward, or 4 with recompute (gradient checkpointing)
    head(n)    = 2 d vocab n forward, 3 times that in training; n = S, or the supervised places when gathered
    fast       = training of text + kept + isolator;  slow = training of text + visual, and the teacher's forward
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from trimtab.errors import setting_error

_MAY_BE_ZERO = ("isolator_tokens", "slow_ratio", "tower_flops", "projector_flops", "text_tokens")


@dataclass(frozen=True)
class SpeedPrediction:
    """What `SpeedModel.predict` returns.

    Attributes:
        full: Operations of one sample of ordinary training.
        fast_over_full: Cost of a fast step in full steps.
        slow_over_full: Cost of a slow step, with its teacher, in full steps.
        speedup: Full training over DualSpeed at the given slow ratio.
        limit: The same with slow ratio 0; no choice of schedule goes beyond.
        text_only: The same if no visual token were left and the tower cost nothing.
        tower_share: Share of the tower and projector in a fast step.
    """

    full: float
    fast_over_full: float
    slow_over_full: float
    speedup: float
    limit: float
    text_only: float
    tower_share: float


@dataclass(frozen=True, kw_only=True)
class SpeedModel:
    """Counts that decide how much pruned training can gain.

    Attributes:
        block_parameters: Parameters of all decoder blocks together, without embeddings and head.
        layers: Decoder blocks.
        width: Width of the language model.
        vocab: Size of the vocabulary.
        text_tokens: Text tokens per sample, mean.
        visual_tokens: Visual tokens per sample on full images, all images together.
        kept_tokens: Visual tokens per sample that the fast mode keeps.
        isolator_tokens: Isolator rows per sample.
        slow_ratio: Share of slow steps, in [0, 1].
        tower_flops: Forward operations of the vision tower per sample.
        tower_trained: Whether the tower is trained.
        projector_flops: Forward operations of the projector per sample, always trained.
        recompute: Whether gradient checkpointing runs the forward pass twice.
        label_tokens: Places whose logits are computed, or None for every place.
        teacher: Whether slow steps run the teacher (off with kl_weight 0).
    """

    block_parameters: float
    layers: int
    width: int
    vocab: int
    text_tokens: float
    visual_tokens: float
    kept_tokens: float
    isolator_tokens: float = 4
    slow_ratio: float = 0.1
    tower_flops: float = 0.0
    tower_trained: bool = False
    projector_flops: float = 0.0
    recompute: bool = False
    label_tokens: float | None = None
    teacher: bool = True

    def __post_init__(self) -> None:
        """Check every count."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or (field.name == "label_tokens" and value is None):
                continue
            least = 0 if field.name in _MAY_BE_ZERO else math.ulp(0.0)
            if not (isinstance(value, (int, float)) and least <= value < math.inf):
                words = "a finite number, at least 0" if least == 0 else "a finite number above 0"
                raise setting_error("SpeedModel", field.name, words, value)
        if self.slow_ratio > 1:
            raise setting_error("SpeedModel", "slow_ratio", "in [0, 1]", self.slow_ratio)
        if self.kept_tokens > self.visual_tokens:
            raise setting_error("SpeedModel", "kept_tokens", f"at most {self.visual_tokens}", self.kept_tokens)

    def predict(self) -> SpeedPrediction:
        """Return the costs of both modes and the combined gain."""
        short = self.kept_tokens + self.isolator_tokens + self.text_tokens
        vision = self._vision()
        full = self._training(self.visual_tokens + self.text_tokens) + vision
        fast = self._training(short) + vision
        slow = full + (self._forward(short) if self.teacher else 0.0)
        mean = (1 - self.slow_ratio) * fast + self.slow_ratio * slow
        text = self._training(self.text_tokens)
        return SpeedPrediction(
            full=full,
            fast_over_full=fast / full,
            slow_over_full=slow / full,
            speedup=full / mean,
            limit=full / fast,
            text_only=full / text if text else math.inf,
            tower_share=vision / fast,
        )

    def full_parts(self) -> dict[str, float]:
        """Return the operations of one sample of ordinary training by part: tower, decoder (its blocks) and head."""
        places = self.visual_tokens + self.text_tokens
        head = 3 * self._head(places)
        return {"tower": self._vision(), "decoder": self._training(places) - head, "head": head}

    def _blocks(self, places: float) -> float:
        return 2 * self.block_parameters * places + 2 * self.width * self.layers * places**2

    def _head(self, places: float) -> float:
        """Return the forward operations of the head for one pass over that many places."""
        seen = places if self.label_tokens is None else min(self.label_tokens, places)
        return 2 * self.width * self.vocab * seen

    def _forward(self, places: float) -> float:
        return self._blocks(places) + self._head(places)

    def _training(self, places: float) -> float:
        return (4 if self.recompute else 3) * self._blocks(places) + 3 * self._head(places)

    def _vision(self) -> float:
        """Return the operations of tower and projector; the tower trains with the recompute of the whole model."""
        times = (4 if self.recompute else 3) if self.tower_trained else 1
        return times * self.tower_flops + 3 * self.projector_flops
