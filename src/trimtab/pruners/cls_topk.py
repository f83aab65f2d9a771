"""Keep the tokens that the class token attends to most."""

from __future__ import annotations

import torch

from trimtab.ops.select import keep_best
from trimtab.pruners.contract import Pruner, PrunerInput, Selection
from trimtab.pruners.registry import register_pruner


@register_pruner("cls_topk")
class ClsTopkPruner(Pruner):
    """Keeps the tokens of highest class-token attention, as FasterVLM does (arXiv 2412.01818 v1).

    Needs ``cls_attention``. Cost: one sort. Weak point: near-duplicates on one object all score high.
    """

    needs = frozenset({"cls_attention"})

    @torch.no_grad()
    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Keep the most attended tokens; see `Pruner.select`."""
        self.check(inputs, num_keep)
        assert inputs.cls_attention is not None
        return Selection(*keep_best(inputs.cls_attention.float(), num_keep, inputs.valid))
