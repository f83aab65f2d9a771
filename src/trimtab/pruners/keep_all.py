"""Keep every token: the baseline that prunes nothing."""

from __future__ import annotations

import torch

from trimtab.ops.select import index_of_mask
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.registry import register_pruner


@register_pruner("keep_all")
class KeepAllPruner(Pruner):
    """Keeps all tokens whatever number is asked for, so that "pruning off" takes the same path as pruning.

    The one pruner that returns more than `num_keep` indices: one for every token.
    """

    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep every valid token; see `Pruner.select`."""
        self.check(inputs, num_keep)
        images, tokens = inputs.features.shape[:2]
        if inputs.valid is not None:
            return Selection(*index_of_mask(inputs.valid, tokens))
        every = torch.ones(images, tokens, dtype=torch.bool, device=inputs.features.device)
        return Selection(*index_of_mask(every, tokens))
