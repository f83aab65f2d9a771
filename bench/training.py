"""Measure ways to train at real shapes, and put the records into the page on speed.

    python bench/training.py --size toy                      on a CPU: one record, with its curves
    python bench/training.py --size real                     on a GPU: every size, text lengths and tiles, all curves
    python bench/training.py --size real --layers 8          the same with shallow decoders, where memory is short
    python bench/training.py --page                          write docs/results/speed.md anew from the records

``real`` measures LLaVA-1.5-7B and LLaVA-NeXT-7B with 40, 200 and 300 words per sample, and a decoder of 0.5 billion
parameters behind a trained tower. Each record is written as soon as it is made; one that exists is kept, so that the
command can be run again after an interruption. ``--small`` cuts every shape to a toy's, to try the command on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.errors import SettingError, TrimtabError

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "records"
PAGE = ROOT / "docs" / "results" / "speed.md"
ALL_CURVES = ["keep", "text", "tiles", "ranks"]
REAL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llava_1_5_7b_200", {"size": "llava-1.5-7b", "text_mean": 200.0, "curves": ["keep", "ranks"]}),
    ("llava_1_5_7b_40", {"size": "llava-1.5-7b", "text_mean": 40.0}),
    ("llava_1_5_7b_300", {"size": "llava-1.5-7b", "text_mean": 300.0}),
    ("llava_next_7b_200", {"size": "llava-next-7b", "text_mean": 200.0, "curves": ["ranks"]}),
    ("llava_next_7b_40", {"size": "llava-next-7b", "text_mean": 40.0}),
    ("llava_next_7b_300", {"size": "llava-next-7b", "text_mean": 300.0}),
    ("small_trained_tower", {"size": "small", "curves": ["text", "tiles"]}),
)
"""Name of the record and what is measured."""

TOY: tuple[tuple[str, dict[str, Any]], ...] = (("toy", {"size": "toy", "curves": ALL_CURVES}),)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.size is not None:
            measure(options)
        if options.page:
            write_page(options.records, options.to)
    except TrimtabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("toy", "real"), help="what to measure; nothing where left out")
    parser.add_argument("--only", nargs="*", help="names of records, to measure some of `real`")
    parser.add_argument("--repeats", type=int, help="timed rounds; 5 for toy, 3 for real")
    parser.add_argument("--layers", type=int, help="decoder blocks, to cut models that do not fit")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--small", action="store_true", help="cut every shape to a toy's, and use the CPU")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--page", action="store_true", help="write the page from the records")
    parser.add_argument("--to", type=Path, default=PAGE, help="the page")
    return parser


def measure(options: argparse.Namespace) -> None:
    """Make the records that are not there yet.

    Raises:
        SettingError: There is no GPU for ``real``, or no such record.
    """
    import torch

    from trimtab.records import write_record
    from trimtab.run.bench_training import bench_training

    if options.size == "real" and not options.small and not torch.cuda.is_available():
        raise SettingError(
            "--size real needs a GPU, but torch sees none. Give --small to try the command on a CPU, or --size toy."
        )
    if options.small and options.records.resolve() == RECORDS:
        raise SettingError("--small makes no records for the page. Give another folder with --records.")
    runs = REAL if options.size == "real" else TOY
    known = [name for name, _ in runs]
    for name in options.only or ():
        if name not in known:
            raise SettingError(f"--only must name some of {', '.join(known)}, but {name!r} came.")
    for name, given in runs:
        cut = "" if options.layers is None else f"_{options.layers}_layers"
        path = options.records / f"training_{name}{cut}.json"
        if path.exists() or (options.only and name not in options.only):
            continue
        sys.stdout.write(f"{name} ...\n")
        usual = 5 if options.size == "toy" else 3
        extra: dict[str, Any] = {"repeats": usual if options.repeats is None else options.repeats}
        extra["attention"] = options.attention
        if options.layers is not None:
            extra["layers"] = options.layers
        if options.small:
            cut_shapes()
            extra |= {"device": "cpu", "text_mean": 12.0}
        record = bench_training(**{**given, **extra})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, record)
        print_summary(record)


def cut_shapes() -> None:
    """Make every shape small, its tiles and what is trained as before."""
    from trimtab.bench.shapes import SHAPES

    for name, shape in SHAPES.items():
        SHAPES[name] = replace(
            shape, layers=1, width=32, mlp=48, heads=2, kv_heads=1, vocab=64, tower_layers=2, tower_width=16,
            tower_mlp=32, tower_heads=2, image_size=28, patch_size=4, micro_batch=5, samples=10, max_length=400,
            pack_tokens=800,
        )  # fmt: skip


def print_summary(record: dict[str, Any]) -> None:
    """Print the ratios of a record."""
    for name, value in record["results"]["summary"].items():
        if value:
            sys.stdout.write(f"  {name}: {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})\n")


def read_training_records(folder: Path) -> list[dict[str, Any]]:
    """Return the kept records, the toy's first."""
    from trimtab.records import read_record

    paths = sorted(folder.glob("training_*.json"), key=lambda path: (path.stem != "training_toy", path.stem))
    return [read_record(path) for path in paths]


def write_page(folder: Path, page: Path) -> None:
    """Put the tables of the kept records between the marks of the page."""
    from trimtab.report.speed import write_speed_page

    write_speed_page(page, read_training_records(folder))


if __name__ == "__main__":
    sys.exit(main())
