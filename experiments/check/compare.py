"""Does `trimtab check` predict what `trimtab bench` measures? Both on one small run, one after the other.

python experiments/check/compare.py [--models small deep] [--runs 2] [--records FOLDER]

Every comparison leaves a record; table.py beside this file makes the table of docs/guides/check.md from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from trimtab.data.scenes import SceneSettings, conversation, make_scenes, vocabulary
from trimtab.quickstart.model import SmallLlava, build_model, build_processor
from trimtab.records import make_record, write_record
from trimtab.run.bench import bench
from trimtab.run.check import SECONDS, check
from trimtab.run.config import load_config

HERE = Path(__file__).parent
MODELS = {
    "toy": SmallLlava(image_size=32, patch_size=4, tower_layers=1, tower_width=16, layers=1, width=16, heads=2),
    "small": SmallLlava(),
    "deep": SmallLlava(layers=12, tower_layers=8),
}
ROWS = 32


def write_run(folder: Path, sizes: SmallLlava) -> Path:
    """Write model, scenes and run file; return the run file."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor(sizes, vocabulary())
    build_model(sizes, processor.tokenizer).save_pretrained(str(folder / "model"))
    processor.save_pretrained(str(folder / "model"))
    lines = []
    scenes = make_scenes("train", ROWS, questions=2, settings=SceneSettings(canvas=sizes.image_size))
    for number, scene in enumerate(scenes):
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


def compare(folder: Path, name: str, seconds: float = SECONDS, steps: int = 10) -> dict[str, Any]:
    """Predict and measure one model.

    Args:
        folder: Where the run is written.
        name: A key of `MODELS`.
        seconds: What `check` may take.
        steps: Timed steps per mode of `bench`.

    Returns:
        The record, kind "check_compare": ``predicted`` and ``arithmetic`` (gain per step, without data, from
        `check`), ``measured`` (the same from `bench`), ``spread`` (of the rounds of `check`, see
        `trimtab.run.probe.measure`) and ``whole_model`` (whether all blocks were timed).
    """
    started, began = datetime.now(timezone.utc), time.perf_counter()
    config = load_config(write_run(folder / name, MODELS[name]))
    checked = check(config, seconds=seconds)["results"]
    if checked["measured"] is None:
        raise SystemExit(f"{name}: {checked['not_measured']}")
    benched = bench(config, steps=steps)["results"]
    results = {
        "predicted": checked["measured"]["speedup_compute"],
        "arithmetic": checked["prediction"]["speedup"],
        "measured": benched["dualspeed_speedup"],
        "spread": checked["measured"]["spread"],
        "whole_model": not checked["measured"]["scaled"],
    }
    settings = {"model": name, "sizes": asdict(MODELS[name]), "rows": ROWS, "seconds": seconds, "steps": steps}
    run = {"dualspeed": config.dualspeed and config.dualspeed.to_dict(), "batch": benched["rows"]}
    taken = time.perf_counter() - began
    return make_record("check_compare", {**settings, **run}, results, seed=0, started=started, seconds=taken)


def main(arguments: list[str] | None = None) -> None:
    """Write a record per model and run, and print what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small", "deep"])
    parser.add_argument("--runs", type=int, default=2, help="comparisons per model")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what check may take")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of bench per mode")
    parser.add_argument("--records", type=Path, default=HERE / "records")
    given = parser.parse_args(arguments)
    for run in range(1, given.runs + 1):
        for name in given.models:
            with tempfile.TemporaryDirectory() as made:
                record = compare(Path(made), name, given.seconds, given.steps)
            write_record(given.records / f"{name}-{run}.json", record)
            gains = ", ".join(f"{key} {record['results'][key]:.2f}" for key in ("predicted", "arithmetic", "measured"))
            print(f"{name}, run {run}: {gains}", flush=True)


if __name__ == "__main__":
    main()
