"""Prove the withdrawal of visual tokens on trained checkpoints of two depths, and keep the records.

    python experiments/vtw/run.py --layers 6 12 --seeds 0 1 2
    python experiments/vtw/run.py --layers 12 --seeds 0 --arm full
    python experiments/vtw/run.py --time

The checkpoints are those that `experiments/dualspeed/run.py --keep-models` leaves in `--work`. What has a record is not
measured again, and an interrupted run goes on with the next setting. Two processes may work on different seeds or
depths at once; give each one thread. ``--time`` measures times, for which the machine must be quiet.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.vtw import count_search  # the line above is for these
from experiments.vtw import measure, ways

from trimtab.errors import SettingError, TrimtabError
from trimtab.records import make_record, write_record

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PARTS = ("search", "accuracy")
CHOICE = "0.003"
"""Threshold of the layer that is compared with other ways: the released code's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    try:
        if options.time:
            from experiments.vtw.timing import time_all

            time_all(options)
            return 0
        for layers in options.layers:
            for seed in options.seeds:
                prove(options, layers, seed)
    except TrimtabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="scenes", help="task of the checkpoints")
    parser.add_argument("--arm", default="dualspeed", help="arm of the DualSpeed experiment that made them")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12], help="depths of the language models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=None, help="test images that are asked about; all by default")
    parser.add_argument(
        "--curve-images", type=int, default=200, help="how many of them for layers that stand in the curve only"
    )
    parser.add_argument("--samples", type=int, default=measure.SAMPLES, help="prompts of a search")
    parser.add_argument("--again", type=int, default=measure.AGAIN, help="other sets of prompts that are searched")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the public sets")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where records go")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "vtw", help="where the checkpoints lie")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", action="store_true", help="measure times instead; on a quiet machine")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--small", action="store_true", help="with --time: every shape cut to a toy's, to try it")
    return parser


def checkpoint(options: argparse.Namespace, layers: int, seed: int) -> Path:
    """Return the folder of a checkpoint.

    Raises:
        SettingError: It is not there; the message says how to train it.
    """
    place = f"layers-{layers}/{options.task}/seed-{seed}/arms/{options.arm}"
    folder: Path = options.work / place / "model"
    if not folder.is_dir():
        command = (
            f"python experiments/dualspeed/run.py --task {options.task} --seeds {seed} --arms {options.arm} "
            f"--layers {layers} --keep-models --work runs/vtw/layers-{layers} "
            f"--records experiments/vtw/records/training/layers-{layers}"
        )
        raise SettingError(f"There is no checkpoint {place} in --work. Train it: {command}")
    return folder


def record_path(options: argparse.Namespace, layers: int, seed: int, kind: str) -> Path:
    """Return where a record lies."""
    folder: Path = options.records / f"layers-{layers}" / options.task / f"seed-{seed}"
    return folder / f"{options.arm}_{kind}.json"


def prove(options: argparse.Namespace, layers: int, seed: int) -> None:
    """Make the records of one checkpoint that are not there yet."""
    from trimtab.quickstart.task import open_start
    from trimtab.quickstart.tasks import open_task
    from trimtab.records import read_record

    wanted = {part: record_path(options, layers, seed, part) for part in PARTS}
    if all(path.exists() for part, path in wanted.items() if part in options.parts):
        return
    folder = checkpoint(options, layers, seed)
    model, processor = open_start(folder)
    model.eval()
    task = open_task(options.task, options.data, seed)
    if not wanted["search"].exists():
        _say(f"layers {layers}, seed {seed}: search")
        _search(options, model, processor, task, layers, seed, wanted["search"])
    if "accuracy" in options.parts and not wanted["accuracy"].exists():
        found = read_record(wanted["search"])["results"]["last_token"]["layers"][CHOICE]
        _accuracy(options, model, processor, task, layers, seed, layers if found is None else found, folder)


def _search(
    options: argparse.Namespace, model: Any, processor: Any, task: Any, layers: int, seed: int, path: Path
) -> None:
    began = time.perf_counter()
    results = measure.search(model, processor, task.train, options.samples, options.again)
    results["cost"] = count_search(model, [measure.prompts_alone(processor, task.train, options.samples)])
    about = _about(options, layers, samples=options.samples)
    _write(path, make_record("vtw_search", about, results, seed=seed, seconds=time.perf_counter() - began))


def _accuracy(
    options: argparse.Namespace,
    model: Any,
    processor: Any,
    task: Any,
    layers: int,
    seed: int,
    chosen: int,
    folder: Path,
) -> None:
    from trimtab.methods.vtw.cost import read_text_shape

    began = time.perf_counter()
    count = len(task.test) if options.images is None else options.images
    rows = task.test[:count]
    curve_count = min(count, options.curve_images)
    visual = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    prompts, shape = ways.read_prompts(processor, rows, visual), read_text_shape(model)
    isolator = ways.pruning_of(folder)[0].isolator_tokens
    results: list[dict[str, Any]] = []
    compared = ways.all_ways(shape, prompts, chosen, isolator)
    names = {way.name for way in compared}
    curve = [way for layer in range(shape.layers) if (way := ways.withdrawal(layer)).name not in names]
    for way, images in [(way, count) for way in compared] + [(way, curve_count) for way in curve]:
        _say(f"layers {layers}, seed {seed}: {way.name}")
        numbers = "_".join(str(value) for value in way.settings.values() if isinstance(value, int))
        place = folder.parent / f"vtw_{images}" / f"{way.name}_{numbers}.json"
        found = measure.judge(way, model, processor, rows[:images], folder, visual, place)
        cost = {"flops_share": way.flops_share(shape, prompts), "kv_share": way.kv_share(shape, prompts)}
        about = {"name": way.name, "kind": way.kind, "settings": dict(way.settings), "equal_to": way.equal_to}
        results.append({**about, **cost, **found})
    told: dict[str, Any] = {
        "chosen": chosen, "depth": shape.layers, "visual": visual, "places": prompts.places, "images": count,
        "questions": len(results[0]["marks"]), "curve_questions": min(len(one["marks"]) for one in results),
        "majority": task.majority, "language_only": task.language_only,
    }  # fmt: skip
    path = record_path(options, layers, seed, "accuracy")
    about = _about(options, layers, images=count, curve_images=curve_count)
    kept = {**told, "ways": results}
    _write(path, make_record("vtw_accuracy", about, kept, seed=seed, seconds=time.perf_counter() - began))


def _about(options: argparse.Namespace, layers: int, **settings: int) -> dict[str, Any]:
    return {"task": options.task, "arm": options.arm, "layers": layers, "threads": options.threads, **settings}


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, record)


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
