"""Measure how long the page of long runs takes, and how large it is.

    python bench/report.py                            10 runs of 10,000 steps; keeps bench/records/report_10x10000.json
    python bench/report.py --runs 3 --steps 500 --to page.html --out record.json

The records are made from a seed in a temporary directory, with an entry for every step, as quickstart keeps them: their
losses fall and have spikes, every tenth step is slow. Reading and checking the records is part of the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 576
KEPT = 57


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    from trimtab.records import make_record, write_record

    options = _parser().parse_args(arguments)
    if options.runs < 1 or options.steps < 1:
        sys.stderr.write("error: --runs and --steps must be at least 1.\n")
        return 2
    started = datetime.now(timezone.utc)
    with tempfile.TemporaryDirectory() as folder:
        directories = [Path(folder) / f"out-{number}" for number in range(options.runs)]
        for number, directory in enumerate(directories):
            write_record(directory / "records" / "train.json", long_record(number, options.steps, options.seed))
        results = measure(directories, options.to or Path(folder) / "page.html")
    settings = {"runs": options.runs, "steps": options.steps}
    record = make_record("bench_report", settings, results, seed=options.seed, started=started)
    write_record(options.out or ROOT / "bench" / "records" / f"report_{options.runs}x{options.steps}.json", record)
    sys.stdout.write(f"{results['seconds']:.2f} s, {results['bytes']:,} bytes\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="output directories")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each, with an entry in the log for each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the records")
    parser.add_argument("--to", type=Path, help="keep the page here")
    parser.add_argument("--out", type=Path, help="file for the record, in bench/records by default")
    return parser


def long_record(number: int, steps: int, seed: int) -> dict[str, Any]:
    """Return the record of a training with an entry for every step; the first of all runs is one on full tokens."""
    from trimtab.records import make_record

    random = np.random.default_rng((seed, number))
    full = number == 0
    falling = 0.3 + 3.0 / (1 + np.arange(steps) / 200)
    losses = falling * random.lognormal(0, 0.2, steps) + 8 * (random.random(steps) < 0.001)
    slow = random.random(steps) < 0.1
    seconds = (
        np.where(slow, 0.5, 0.1) * random.lognormal(0, 0.1, steps) if not full else random.lognormal(-1, 0.1, steps)
    )
    log = [
        {
            "step": step + 1, "seconds": round(float(seconds[step]), 5),
            "mode": "full" if full else "slow" if slow[step] else "fast",
            "loss": round(float(losses[step]), 5), "ce": round(float(losses[step]), 5),
            "kl": round(float(losses[step]) / 10, 5) if slow[step] and not full else None,
            "visual_tokens_full": TOKENS, "visual_tokens_kept": TOKENS if full or slow[step] else KEPT,
        }
        for step in range(steps)
    ]  # fmt: skip
    block = False if full else {"pruner": "divprune", "keep_ratio": 0.1, "slow_ratio": 0.1, "seed": seed + number}
    settings = {"data_files": ["train.jsonl"], "learning_rate": 1e-5 * (1 + number), "dualspeed": block}
    results = {
        "arm": "full" if full else "dualspeed", "seconds_train": float(seconds.sum()), "steps": steps,
        "samples": 16 * steps, "loss": float(losses.mean()), "log": log,
    }  # fmt: skip
    return make_record("train", settings, results, seed=seed + number)


def measure(directories: Sequence[Path], page: Path) -> dict[str, Any]:
    """Make the page once; return its time, its size, and the size of the records."""
    from trimtab.report import render_report

    begun = time.perf_counter()
    render_report(directories, page)
    seconds = time.perf_counter() - begun
    read = sum(path.stat().st_size for directory in directories for path in directory.glob("records/*.json"))
    return {"seconds": round(seconds, 3), "bytes": page.stat().st_size, "bytes_read": read}


if __name__ == "__main__":
    sys.exit(main())
