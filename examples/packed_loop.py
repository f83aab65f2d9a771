"""Packs of a token budget instead of padded batches: fast and slow samples meet in one sequence without padding."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader

import trimtab
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.dualspeed import NumberedRows, collate_numbered
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


def main(output_dir: str, samples: int = 64) -> None:
    sizes = SmallLlava(tower_layers=2, tower_width=64, layers=2, width=64)
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer)
    model.model.vision_tower.requires_grad_(False)
    rows = [conversation(scene) for scene in make_scenes("train", samples)]
    collate = trimtab.SupervisedCollator(processor)

    config = trimtab.DualSpeedConfig(packing=True, pack_tokens=1024, schedule_unit="sample", slow_ratio=0.1)
    handle = trimtab.attach(model, config)
    lengths = trimtab.measure_lengths(rows, collate, model, config)
    packs = trimtab.PackSampler(lengths, budget=1024, slow_ratio=config.slow_ratio, seed=config.seed)
    loader = DataLoader(NumberedRows(rows), batch_sampler=packs, collate_fn=handle.collator(collate_numbered(collate)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for epoch in range(2):
        packs.set_epoch(epoch)  # modes and packs are drawn anew
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            told = handle.metrics()
            print(f"epoch {epoch}: {len(batch['samples'].ids)} samples, loss {loss.item():.3f}, "
                  f"slow so far {told['samples_slow']} of {told['samples_slow'] + told['samples_fast']}")  # fmt: skip

    handle.detach()
    model.save_pretrained(output_dir)


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/packed_loop"])
