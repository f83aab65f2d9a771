"""A pruner of your own: one class with one method, then it works everywhere by its name.

This one keeps the tokens whose features are longest. A package of yours can offer it to every user of trimtab by an
entry point in the group ``trimtab.pruners``.
"""

from __future__ import annotations

import torch

import trimtab
from trimtab import DualSpeedConfig, Pruner, PrunerInput, Selection, register_pruner
from trimtab.data import SupervisedCollator
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


@register_pruner("longest")
class Longest(Pruner):
    """Keep the tokens with the largest norm."""

    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Choose `num_keep` tokens of every image, in raster order."""
        self.check(inputs, num_keep)
        length = inputs.features.float().norm(dim=-1)
        if inputs.valid is not None:
            length = length.masked_fill(~inputs.valid, float("-inf"))
        best = length.topk(num_keep, dim=1)
        index, order = best.indices.sort(dim=1)
        return Selection(index=index, valid=best.values.gather(1, order).isfinite())


def main() -> None:
    sizes = SmallLlava(tower_layers=2, tower_width=64, layers=2, width=64)
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer)
    batch = SupervisedCollator(processor)([conversation(scene) for scene in make_scenes("train", 4)])

    handle = trimtab.attach(model, DualSpeedConfig(pruner="longest", keep_ratio=0.2))
    with handle.force_mode("fast"):
        loss = model(**batch).loss
    told = handle.metrics()
    handle.detach()
    print(f"Pruners: {', '.join(trimtab.pruner_names())}")
    print(f"Kept {told['visual_tokens_kept']} of {told['visual_tokens_full']} visual tokens, loss {loss.item():.3f}.")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
