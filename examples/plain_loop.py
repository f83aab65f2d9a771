"""DualSpeed in a plain loop: attach, train, detach; the model is an ordinary one before and after."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration

import trimtab
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


def main(output_dir: str, steps: int = 20) -> None:
    sizes = SmallLlava(tower_layers=2, tower_width=64, layers=2, width=64)
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer)
    model.model.vision_tower.requires_grad_(False)
    rows = [conversation(scene) for scene in make_scenes("train", 8 * steps)]
    loader = DataLoader(rows, batch_size=8, collate_fn=trimtab.SupervisedCollator(processor))

    handle = trimtab.attach(model, trimtab.DualSpeedConfig(keep_ratio=0.1, slow_ratio=0.25))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)  # isolator included
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told = handle.metrics()
        kept, full = told["visual_tokens_kept"], told["visual_tokens_full"]
        print(f"step {step}: {told['mode']}, {kept} of {full} visual tokens, loss {loss.item():.3f}")

    handle.save_pretrained(f"{output_dir}/dualspeed")
    handle.detach()
    model.save_pretrained(output_dir)
    _, info = LlavaForConditionalGeneration.from_pretrained(output_dir, output_loading_info=True)
    print(
        f"Loads without trimtab: {len(info['missing_keys'])} missing, {len(info['unexpected_keys'])} unexpected keys."
    )


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/plain_loop"])
