"""The quickstart: make data, train three arms from one start, judge them on full images, and show what came out."""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.quickstart.arms import ARMS, Arm
from trimtab.quickstart.task import Conversations, Progress, StepTold, Task, make_start, open_start
from trimtab.run.progress import Work, plain_output, show_work

QUICKSTART_ARMS = ("full", "pruned", "dualspeed")
PICTURES = 6
RECENT = 20
"""Steps of one mode whose mean loss is shown while an arm trains."""


def quickstart(
    out: str | os.PathLike[str] = "quickstart-out",
    seed: int = 0,
    steps: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train full, pruned-only and DualSpeed arms on scenes made on the spot, and write records, page and checkpoint.

    Interrupted, it loses at most the steps since the last checkpoint; called again with the same settings it goes on,
    and where it was finished it only prints.

    Args:
        out: Output directory: ``records/``, ``report.html``, ``checkpoint/`` (of the DualSpeed arm).
        seed: Seed of data, first weights and schedules.
        steps: Training steps per arm; None for the number that was chosen by calibration.
        threads: CPU threads; None for all cores.

    Returns:
        The record, of kind "quickstart": per arm accuracy, training time and their ratios to the full arm.

    Raises:
        OutputError: The directory holds something else, or a run with other settings.
    """
    import torch

    from trimtab.files import prepare_output
    from trimtab.quickstart.tasks import scenes_task
    from trimtab.records import read_record
    from trimtab.report import render_report

    torch.set_num_threads(threads or free_cores())
    task = scenes_task(seed=seed)
    place = prepare_output(out, resume=True, settings={"seed": seed, **task.settings(), "steps": steps or task.steps})
    root = place.path
    if place.finished:
        record = read_record(root / "quickstart.json")
        print_summary(record["results"]["arms"], root)
        return record
    with show_progress() as progress:
        chosen = [ARMS[name] for name in QUICKSTART_ARMS]
        records = run_arms(task, chosen, seed, root, progress, steps=steps, told=StepFigures(progress))
        _write_pictures(task, root, seed)
        summary = summarise(records)
        record = _write_summary(task, summary, root, seed)
        render_report(root, root / "report.html", title="trimtab quickstart")
        _keep_checkpoint(root, progress)
    place.finish()
    print_summary(summary, root)
    return record


def run_arms(
    task: Task,
    arms: list[Arm],
    seed: int,
    root: Path,
    progress: Progress,
    *,
    steps: int | None = None,
    keep_models: bool = True,
    records_folder: Path | None = None,
    save_every: int = 50,
    told: StepTold | None = None,
) -> list[dict[str, Any]]:
    """Train and judge arms of one seed from one start; what was done before is only read.

    Args:
        task: The task.
        arms: The arms, in order; one that is limited by another's time must come after it.
        seed: The seed.
        root: Output directory.
        progress: Called with what is being done, how much is done and how much there is.
        steps: Steps other than the task's.
        keep_models: Whether to keep the final models.
        records_folder: Where records go; None for ``records/`` in the output directory.
        save_every: Steps between checkpoints.
        told: Called with the arm and the line of its log after every step.

    Returns:
        Their records.
    """
    from trimtab.quickstart.train_arm import train_arm
    from trimtab.records import make_record, write_record

    start = root / "start"
    make_start(task, seed, start, progress)
    kept = records_folder or root / "records"
    write_record(kept / "dataset.json", make_record("dataset", task.settings(), _floor(task)))
    prepared: list[Conversations] = []

    def data() -> Conversations:
        if not prepared:
            _, processor = open_start(start)
            prepared.append(Conversations(task.train, processor, task.turns, lambda d, n: progress("tokens", d, n)))
        return prepared[0]

    records: dict[str, dict[str, Any]] = {}
    for arm in arms:
        records[arm.name] = train_arm(
            task,
            arm,
            seed,
            start=start,
            folder=root / "arms" / arm.name,
            record_path=kept / f"{arm.name}.json",
            data=data,
            progress=progress,
            steps=equal_time_steps(records, arm) or steps,
            keep_model=keep_models,
            save_every=save_every,
            told=told,
        )
    return list(records.values())


def free_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def equal_time_steps(records: dict[str, dict[str, Any]], arm: Arm) -> int | None:
    """Return how many steps fit into the time of the arm that limits this one, or None where nothing does."""
    if arm.time_of is None:
        return None
    full, limit = records[arm.pace_of]["results"], records[arm.time_of]["results"]
    return max(1, int(full["steps"] * limit["seconds_train"] / full["seconds_train"]))


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per arm: accuracy on full and pruned images, time, and both against the full arm."""
    full = next(record["results"] for record in records if record["results"]["arm"] == "full")
    lines = []
    for record in records:
        found = record["results"]
        pruned = found["accuracy_pruned"]
        lines.append(
            {
                "arm": found["arm"],
                "accuracy": found["accuracy_full"]["accuracy"],
                "accuracy_of_full": found["accuracy_full"]["accuracy"] / max(full["accuracy_full"]["accuracy"], 1e-9),
                "accuracy_pruned": None if pruned is None else pruned["accuracy"],
                "seconds": found["seconds_train"],
                "time_of_full": found["seconds_train"] / full["seconds_train"],
                "samples": found["samples"],
            }
        )
    return lines


def print_summary(summary: list[dict[str, Any]], root: Path) -> None:
    """Print the table of a finished quickstart and where everything is, the page last."""
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Trained from one start on equally many samples; judged on all visual tokens",
        box=None if plain_output(sys.stdout) else HEAVY_HEAD,
    )
    for title in ("arm", "accuracy", "of full", "pruned images", "training", "time of full"):
        table.add_column(title, justify="left" if title == "arm" else "right", overflow="fold")
    for line in summary:
        pruned = "" if line["accuracy_pruned"] is None else f"{line['accuracy_pruned']:.3f}"
        table.add_row(
            line["arm"],
            f"{line['accuracy']:.3f}",
            f"{line['accuracy_of_full']:.3f}",
            pruned,
            f"{line['seconds']:.0f} s",
            f"{line['time_of_full']:.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    for name, place in (("Records", "records"), ("Checkpoint", "checkpoint"), ("Report", "report.html")):
        console.print(f"{name}: {root / place}", soft_wrap=True, markup=False)


@contextmanager
def show_progress() -> Iterator[Work]:
    """Show pieces of work with pace and expected end: one bar each on a terminal, a line now and then elsewhere."""
    with show_work() as work:
        yield work


class StepFigures:
    """Shows the mode share and the losses of an arm behind its bar.

    Args:
        work: What is shown.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._counts: dict[str, Counter[str]] = {}
        self._losses: dict[str, dict[str, deque[float]]] = {}

    def __call__(self, arm: str, entry: Mapping[str, Any]) -> None:
        """Take the line of a step, see `trimtab.quickstart.train_arm.StepLog`."""
        counts = self._counts.setdefault(arm, Counter())
        if entry["mode"] == "mixed":
            counts.update(slow=entry["slow_samples"], fast=entry["samples"] - entry["slow_samples"])
            found = {"CE fast": entry["ce_fast"], "CE slow": entry["ce_slow"]}
        else:
            counts[entry["mode"]] += 1
            found = {"CE" if entry["mode"] == "full" else f"CE {entry['mode']}": entry["ce"]}
        recent = self._losses.setdefault(arm, {})
        for name, value in {**found, "KL": entry.get("kl")}.items():
            if value is not None:
                recent.setdefault(name, deque(maxlen=RECENT)).append(value)
        self._work.note(arm, self._words(counts, recent))

    @staticmethod
    def _words(counts: Counter[str], recent: Mapping[str, deque[float]]) -> list[str]:
        every = counts["fast"] + counts["slow"]
        share = [f"{counts['fast'] / every:.0%} fast, {counts['slow'] / every:.0%} slow"] if every else []
        means = ((name, recent[name]) for name in ("CE", "CE fast", "CE slow", "KL") if name in recent)
        return [*share, *(f"{name} {sum(values) / len(values):.4g}" for name, values in means)]


def _floor(task: Task) -> dict[str, Any]:
    return {
        "dataset": task.name,
        "majority": task.majority,
        "language_only": task.language_only,
        "rows": len(task.test),
    }


def _write_pictures(task: Task, root: Path, seed: int) -> None:
    """Draw what the fast mode keeps of a few test images."""
    from trimtab.dualspeed import DualSpeedConfig
    from trimtab.dualspeed.look import ImageLook
    from trimtab.records import make_record, write_record

    path = root / "records" / "pictures.json"
    if path.exists():
        return
    model, processor = open_start(root / "arms" / "dualspeed" / "model")
    config = DualSpeedConfig(**{**task.dualspeed, "seed": seed})
    entries = []
    for row in (task.test[number] for number in range(min(PICTURES, len(task.test)))):
        question, answer = row["questions"][0], row["answers"][0]
        seen = ImageLook(model, processor, row["image"], question).choose(config)
        entries.append(seen.to_entry(f"{question} {answer}"))
    results = {"pictures": entries, "arm": "dualspeed", "dataset": task.name}
    write_record(path, make_record("pictures", {"dualspeed": config.to_dict()}, results, seed=seed))


def _write_summary(task: Task, summary: list[dict[str, Any]], root: Path, seed: int) -> dict[str, Any]:
    from trimtab.records import make_record, write_record

    record = make_record("quickstart", task.settings(), {"dataset": task.name, "arms": summary}, seed=seed)
    write_record(root / "quickstart.json", record)
    return record


def _keep_checkpoint(root: Path, progress: Progress) -> None:
    """Export the DualSpeed arm's checkpoint, checked against the stock loader."""
    from trimtab.run.export import export

    target = root / "checkpoint"
    if not target.exists():
        export(root / "arms" / "dualspeed" / "model", target, lambda done, parts: progress("checkpoint", done, parts))
