"""What `bench training` compares with: the public recipe and a step with the costs of the released DualSpeed code.

The released step is our own code, after the description of what that code does, not after its text. Its costs, each of
which can be mended by name (`trimtab.bench.floor.REMEDIES`), are those that the description lists:

- rows are put together one by one in Python and padded to the longest of the batch;
- DivPrune runs image by image in the model's own precision, and the host reads every pick (``batched``);
- the host reads every label, for teacher and student, to find the places of the KL term (``batched``);
- the vision tower, all its blocks, and the projector run twice in slow steps (``tower_once``);
- all hidden states are returned, and the scores of all places are computed in float32, for teacher and student, whose
  own loss is computed for the log (``label_head``);
- losses are read by the host in every step (``batched``);
- every pass recomputes its activations, and one mode holds for a whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trimtab.ops.label_head import IGNORED, label_losses, states_at_labels
from trimtab.pruners import PrunerInput, build_pruner
from trimtab.shapes import Float, Int, Tensor


def released_keep(tokens: int, keep_ratio: float) -> int:
    """Return how many tokens of an image the released code keeps: int((1 - pruning ratio) * tokens)."""
    return int((1 - (1 - keep_ratio)) * tokens)


def divprune_loop(features: Float[Tensor, "token width"], keep: int) -> list[int]:
    """Choose the tokens of one image, reading each pick back.

    Args:
        features: In the precision of the model, in which everything is computed.
        keep: How many.

    Returns:
        The picks, ascending.
    """
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    rivals = distance.clone().fill_diagonal_(float("inf"))
    picks = [int(rivals.min(dim=1).values.argmax())]
    nearest = distance[picks[0]].clone()
    for _ in range(keep - 1):
        nearest[picks[-1]] = float("-inf")
        picks.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[picks[-1]])
    return sorted(picks)


class ReleasedStep:
    """The loss of a released-style step on a LLaVA model.

    Args:
        model: A `LlavaForConditionalGeneration` in training mode, without hooks.
        isolator: Rows that stand before the kept tokens of every image, [prefix, width].
        keep_ratio: Share of tokens that the fast view keeps.
        max_length: Longest row; longer ones are cut on the right.
        remedies: Names of the costs that are mended.
    """

    def __init__(
        self,
        model: Any,
        isolator: nn.Parameter,
        *,
        keep_ratio: float = 0.1,
        max_length: int = 2048,
        remedies: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.isolator = model, isolator
        self.keep_ratio, self.max_length, self.remedies = keep_ratio, max_length, remedies
        self.pruner = build_pruner("divprune", {})

    def loss(self, batch: Mapping[str, Any], mode: str) -> Tensor:
        """Return the loss of one micro-batch.

        Args:
            batch: Rows with one image token per image, and the pixels of the images in order.
            mode: ``"fast"`` or ``"slow"``.
        """
        if mode == "fast":
            loss = self._loss(*self._pass(batch, self._pruned(self.encode(batch))))
            self._log(loss)
            return loss
        features = self.encode(batch) if "tower_once" in self.remedies else None
        with torch.no_grad():
            seen = self.encode(batch) if features is None else features.detach()
            teacher, labels = self._pass(batch, self._pruned(seen))
            if "label_head" not in self.remedies:
                self._log(self._loss(teacher, labels))
        features = self.encode(batch) if features is None else features
        student, wanted = self._pass(batch, list(features.unbind(0)))
        if "label_head" in self.remedies:
            ce, divergence = label_losses(student, teacher, wanted, self.model.lm_head)
            return (ce + divergence) / max(1, wanted.shape[0])
        loss = self._loss(student, wanted)
        divergence = self._divergence((teacher, labels), (student, wanted))
        self._log(loss, divergence)
        return loss + divergence

    def encode(self, batch: Mapping[str, Any]) -> Float[Tensor, "image token width"]:
        """Run the whole tower and the projector, all tokens."""
        base = self.model.model
        states = base.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        projected: Tensor = base.multi_modal_projector(states[base.config.vision_feature_layer][:, 1:])
        return projected

    def choose(self, features: Float[Tensor, "image token width"]) -> Sequence[Any]:
        """Return the indices that stay of each image."""
        keep = released_keep(features.shape[1], self.keep_ratio)
        if "batched" in self.remedies:
            return self.pruner.select(PrunerInput(features.detach()), keep).index.unbind(0)
        with torch.no_grad():
            return [divprune_loop(image, keep) for image in features.detach()]

    def _pruned(self, features: Tensor) -> list[Tensor]:
        kept = self.choose(features)
        return [torch.cat((self.isolator, image[index])) for image, index in zip(features, kept, strict=True)]

    def _pass(self, batch: Mapping[str, Any], images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the scores of all places and the labels at them; with a label head, states at labels and these."""
        embeddings, labels, mask, positions = self._put_together(batch, images)
        whole = "label_head" not in self.remedies
        states = self.model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False,
            output_hidden_states=whole,
        ).last_hidden_state  # fmt: skip
        return (self.model.lm_head(states).float(), labels) if whole else states_at_labels(states, labels)

    def _loss(self, found: Tensor, labels: Tensor) -> Tensor:
        if "label_head" in self.remedies:
            return label_losses(found, None, labels, self.model.lm_head)[0] / max(1, labels.shape[0])
        ahead, wanted = found[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return functional.cross_entropy(ahead, wanted, ignore_index=IGNORED)

    def _put_together(
        self, batch: Mapping[str, Any], images: list[Tensor]
    ) -> tuple[Tensor, Int[Tensor, "row place"], Tensor, Tensor]:
        """Put the images' rows where their tokens stand, row by row; then pad."""
        embed, image_token = self.model.get_input_embeddings(), self.model.config.image_token_id
        left = iter(images)
        rows: list[tuple[Tensor, Tensor]] = []
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            places = [-1, *torch.where(ids == image_token)[0].tolist(), ids.shape[0]]
            words = embed(torch.cat([ids[a + 1 : b] for a, b in pairwise(places)]))
            pieces: list[Tensor] = []
            targets: list[Tensor] = []
            start = 0
            for number, (before, after) in enumerate(pairwise(places)):
                count = after - before - 1
                pieces.append(words[start : start + count])
                targets.append(labels[before + 1 : after])
                start += count
                if number < len(places) - 2:
                    pieces.append(next(left))
                    targets.append(labels.new_full((pieces[-1].shape[0],), IGNORED))
            rows.append((torch.cat(pieces)[: self.max_length], torch.cat(targets)[: self.max_length]))
        longest = max(one.shape[0] for one, _ in rows)
        wanted = batch["labels"].new_full((len(rows), longest), IGNORED)
        seen = torch.zeros_like(wanted)
        padded = []
        for number, (one, known) in enumerate(rows):
            padded.append(torch.cat((one, one.new_zeros(longest - one.shape[0], one.shape[1]))))
            wanted[number, : one.shape[0]] = known
            seen[number, : one.shape[0]] = 1
        positions = torch.arange(longest, device=seen.device).expand(len(rows), -1) * seen
        return torch.stack(padded), wanted, seen, positions

    def _divergence(self, teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> Tensor:
        """Return KL(teacher || student) per label."""
        pick = states_at_labels if "batched" in self.remedies else _rows_before_labels
        known, asked = pick(*teacher)[0], pick(*student)[0]
        return functional.kl_div(asked.log_softmax(-1), known.softmax(-1), reduction="batchmean")

    def _log(self, *losses: Tensor) -> None:
        if "batched" not in self.remedies:
            for loss in losses:
                loss.detach().item()


def _rows_before_labels(
    scores: Float[Tensor, "row place vocab"], labels: Int[Tensor, "row place"]
) -> tuple[Float[Tensor, "label vocab"], list[int]]:
    """Find the labels one by one, each read by the host; return the scores before them and how many each row has."""
    found, counts = [], []
    for number, row in enumerate(labels):
        places = [place - 1 for place, label in enumerate(row) if place >= 1 and label != IGNORED]
        found.append(scores[number, places])
        counts.append(len(places))
    return torch.cat(found), counts
