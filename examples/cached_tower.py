"""Keep what a frozen vision tower makes of the images, and train on that; the losses stay the same to the last bit.

For a run file this is `trimtab cache run.yaml features`, then `dualspeed: {cache_from: features}`.
"""

from __future__ import annotations

import copy
import tempfile
import time
from typing import Any

import torch

import trimtab
from trimtab.anatomy import encode_images, open_host
from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.dualspeed.cache import TowerCache
from trimtab.dualspeed.cache_keys import KeyImages
from trimtab.pruners import build_pruner
from trimtab.quickstart.model import SmallLlava, build_model, build_processor


def train(model: Any, settings: dict[str, Any], batches: list[Any], epochs: int) -> list[float]:
    handle = trimtab.attach(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, began = [], time.perf_counter()
    for batch in batches * epochs:
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{time.perf_counter() - began:.2f} s, tiles from the cache: {handle.metrics().get('cache_hits', 0)}")
    return [loss.item() for loss in losses]


def main(epochs: int = 3) -> list[list[float]]:
    sizes = SmallLlava(tower_layers=8)
    processor = build_processor(sizes, vocabulary())
    model = build_model(sizes, processor.tokenizer).train()
    model.model.vision_tower.requires_grad_(False)  # only what does not move can be stored
    collate = KeyImages(trimtab.SupervisedCollator(processor))  # hashes pixels where batches are made
    rows = [conversation(scene) for scene in make_scenes("train", 8, questions=2)]
    batches = [collate(rows[:4]), collate(rows[4:])]
    config = trimtab.DualSpeedConfig(keep_ratio=0.1, slow_ratio=0.5)
    with tempfile.TemporaryDirectory() as folder:
        host, pruner = open_host(model), build_pruner(config.pruner)
        cache = TowerCache(folder, host, config, pruner, write=True, dtype="float32")
        with cache.store, torch.no_grad():
            for batch in batches:
                encode_images(host, batch, tower=cache.tower(batch))
        choices = (config.to_dict(), {**config.to_dict(), "cache_from": folder})
        return [train(copy.deepcopy(model), chosen, batches, epochs) for chosen in choices]


if __name__ == "__main__":
    plain, cached = main()
    print("the same losses" if plain == cached else "other losses")
