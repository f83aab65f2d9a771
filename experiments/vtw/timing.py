"""Times: prefill, decoding and search on the checkpoints and on a wider model, for a quiet machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench.vtw import bench_cell, cells, small, time_search, time_withdrawals
from experiments.vtw.measure import prompts_alone

BATCHES = (1, 16)
SEARCH_PROMPTS = 20


def time_all(options: argparse.Namespace) -> None:
    """Make the records of times that are not there yet: checkpoints of the first seed, search, wide shape."""
    from experiments.vtw.run import checkpoint

    from trimtab.records import make_record, write_record

    folder: Path = options.records / "time"
    folder.mkdir(parents=True, exist_ok=True)
    seed = options.seeds[0]
    for layers in options.layers:
        opened: tuple[Any, Any, Any] | None = None
        for kind in (*BATCHES, "search"):
            name = f"layers-{layers}_{kind if kind == 'search' else f'batch-{kind}'}"
            path = folder / f"{name}.json"
            if path.exists():
                continue
            _say(name)
            began = time.perf_counter()
            opened = opened or _open(options, checkpoint(options, layers, seed), seed)
            results = _time(kind, options, *opened)
            settings = {"task": options.task, "arm": options.arm, "layers": layers, "threads": options.threads,
                        "repeats": options.repeats}  # fmt: skip
            seconds = time.perf_counter() - began
            if kind == "search":
                record = make_record("vtw_search_time", settings, results, seed=seed, seconds=seconds)
            else:
                record = make_record("vtw_time", settings, results, seed=seed, seconds=seconds)
            write_record(path, record)
    for cell in cells("wide"):
        path = folder / f"{cell.name}.json"
        if not path.exists():
            _say(cell.name)
            record = bench_cell(
                small(cell) if options.small else cell, torch.device("cpu"), max(1, options.repeats // 3)
            )
            write_record(path, record)


def _open(options: argparse.Namespace, folder: Path, seed: int) -> tuple[Any, Any, Any]:
    from trimtab.quickstart.task import open_start
    from trimtab.quickstart.tasks import open_task

    model, processor = open_start(folder)
    return model.eval(), processor, open_task(options.task, options.data, seed)


def _time(kind: int | str, options: argparse.Namespace, model: Any, processor: Any, task: Any) -> dict[str, Any]:
    """Time one kind on one checkpoint: the language model alone, since images pass the vision tower before."""
    inputs = prompts_alone(processor, task.train, SEARCH_PROMPTS if kind == "search" else int(kind))
    with torch.no_grad():
        encoded = model.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)
    inputs["mm_encoder_outputs"] = {"image": encoded}
    if kind == "search":
        return time_search(model, inputs, repeats=max(1, options.repeats // 3))
    depth = model.config.text_config.num_hidden_layers
    visual = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    layers = sorted({depth // 4, depth // 3, depth // 2, 3 * depth // 4, depth - 1} - {0})
    return time_withdrawals(model, inputs, layers, visual=visual, repeats=options.repeats)


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()
