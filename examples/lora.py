"""LoRA in a plain loop: wrap with PEFT first, then attach; the merged model is an ordinary one.

The model is small and random so that this runs on a CPU in seconds; put your own in its place.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import trimtab
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


def main(output_dir: str, steps: int = 20) -> None:
    sizes = SmallLlava(tower_layers=2, tower_width=64, layers=2, width=64)
    processor = build_processor(sizes, vocabulary())
    base = build_model(sizes, processor.tokenizer)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=r".*language_model.*(q_proj|v_proj)"))
    rows = [conversation(scene) for scene in make_scenes("train", 8 * steps)]
    loader = DataLoader(rows, batch_size=8, collate_fn=trimtab.SupervisedCollator(processor))

    handle = trimtab.attach(model, trimtab.DualSpeedConfig(keep_ratio=0.1, slow_ratio=0.1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)  # adapter and isolator
    model.train()
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(handle.metrics())

    out = Path(output_dir)
    handle.save_pretrained(out / "dualspeed")
    handle.detach()
    model.save_pretrained(out / "adapter")  # the adapter and nothing else
    model.merge_and_unload().save_pretrained(out / "merged")  # for whatever loads the base model
    print(f"Saved the adapter to {out / 'adapter'} and the merged model to {out / 'merged'}.")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/lora"])
