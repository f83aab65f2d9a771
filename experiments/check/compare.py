"""Does `trimtab check` predict what `trimtab bench` measures? Both on one small run, one after the other.

python experiments/check/compare.py [folder]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from trimtab.data.scenes import conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor
from trimtab.run.bench import bench
from trimtab.run.check import check
from trimtab.run.config import load_config

MODELS = {"small": SmallLlava(), "deep": SmallLlava(layers=12, tower_layers=8)}
ROWS = 32


def write_run(folder: Path, sizes: SmallLlava) -> Path:
    """Write model, scenes and run file; return the run file."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor(sizes, vocabulary())
    build_model(sizes, processor.tokenizer).save_pretrained(str(folder / "model"))
    processor.save_pretrained(str(folder / "model"))
    lines = []
    for number, scene in enumerate(make_scenes("train", ROWS, questions=2)):
        row = conversation(scene)
        row["images"][0].save(folder / f"{number}.png")
        lines.append(json.dumps({"messages": row["messages"], "images": [f"{number}.png"]}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "data_files": [str(folder / "train.jsonl")],
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 8,
        "freeze": ["vision_tower"],
        "dualspeed": {"keep_ratio": 0.1, "slow_ratio": 0.1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "run.yaml"


def main(folder: Path) -> None:
    """Print, per model, the predicted and the measured gain per step."""
    for name, sizes in MODELS.items():
        config = load_config(write_run(folder / name, sizes))
        results = check(config)["results"]
        if results["measured"] is None:
            raise SystemExit(f"{name}: {results['not_measured']}")
        measured = bench(config, steps=10)["results"]["dualspeed_speedup"]
        predicted = results["measured"]["speedup_compute"]
        arithmetic = results["prediction"]["speedup"]
        print(f"{name}: check {predicted:.2f} (arithmetic alone {arithmetic:.2f}), bench {measured:.2f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
