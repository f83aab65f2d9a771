"""A whole run in a folder: a tiny LLaVA with its processor, data files with images, and a run file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from trimtab.data.scenes import SceneSettings, conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor

SIZES = SmallLlava(image_size=32, patch_size=4, tower_layers=1, tower_width=16, layers=1, width=16, heads=2)
TOKENS = 64
"""Visual tokens of one image."""


def write_model(folder: Path, layers: int = SIZES.layers) -> Path:
    """Write model and processor as transformers does."""
    processor = build_processor(SIZES, vocabulary())
    build_model(replace(SIZES, layers=layers), processor.tokenizer).save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    return folder


def write_rows(path: Path, split: str = "train", count: int = 8) -> Path:
    """Write conversations about scenes as JSON lines, with images beside them."""
    scenes = make_scenes(split, count, questions=2, settings=SceneSettings(canvas=32))
    lines = []
    for number, scene in enumerate(scenes):
        row = conversation(scene)
        name = f"{path.stem}-{number}.png"
        row["images"][0].save(path.parent / name)
        lines.append(json.dumps({"messages": row["messages"], "images": [name]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run of a few steps on a CPU."""
    return {
        "model_name_or_path": str(folder / "model"),
        "data_files": [str(folder / "train.jsonl")],
        "eval_files": [str(folder / "test.jsonl")],
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "freeze": ["vision_tower"],
        "dualspeed": {"keep_ratio": 0.25, "slow_ratio": 0.5, "isolator_tokens": 2},
        **changes,
    }


def write_run(folder: Path, **changes: Any) -> Path:
    """Write model, data and run file; return the run file."""
    write_model(folder / "model")
    write_rows(folder / "train.jsonl")
    write_rows(folder / "test.jsonl", "test", 4)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)), encoding="utf-8")
    return path
