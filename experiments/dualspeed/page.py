"""Write one page from the kept records of the DualSpeed experiment.

    python experiments/dualspeed/page.py

Also prints the table of means over seeds, one line per task and arm, and puts it into the README beside this file, its
main arms into the README of the project, both between marks. `python docs/make_results.py` makes the pages of the
documentation from the same records.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
Record = dict[str, Any]
BEGIN = "<!-- results: made by `python experiments/dualspeed/page.py`; a test compares -->"
END = "<!-- /results -->"

MAIN_ARMS = ("full", "full_equal_time", "pruned", "dualspeed")
"""Arms of the README of the project; the one of the experiment lists all."""

UNTIMED = (
    "full_packed", "full_packed_equal_time", "dualspeed_original", "dualspeed_sample", "dualspeed_packed",
    "dualspeed_packed_slow_5", "dualspeed_random_keep", "dualspeed_random_keep_5", "dualspeed_content_keep",
    "dualspeed_two_way",
)  # fmt: skip
"""Arms that ran beside up to ten other processes: their times say nothing, and the tables leave them out."""

PARAGRAPHS = (
    "All arms of a task and seed start from one small LLaVA with a fitted, frozen vision tower, see equally many "
    "samples (the arm of equal time excepted), and are judged on full images by greedy generation and exact match.",
    "For one-box NLVR that shared start is also taught language: its language model has learnt to answer about scenes "
    "told in words, and its projector to put patches into these words, before any arm trains on images.",
    "Arms are named for what they change against DualSpeed with the paper's settings (10 % kept, 10 % slow steps, "
    "four isolator rows, KL weight and temperature 1, max-min diversity); modes are stratified by optimizer step.",
    "The times of packed arms, of modes by sample, of random, content and two-way arms and of original positions are "
    "left out: they ran on a machine busy with other work, and one of them (full packed, seed 2) lost its log. "
    "docs/results/speed.md has times of arms that took turns.",
)


def read_records(folder: Path) -> list[Record]:
    """Read all records of the experiment, arms in the order of the plan."""
    from trimtab.quickstart.arms import ARMS
    from trimtab.records import read_record

    order = {name: number for number, name in enumerate(ARMS)}
    paths = sorted(folder.glob("*/seed-*/*.json"), key=lambda p: (p.parts[-3], order.get(p.stem, -1), p.parts[-2]))
    return [read_record(path) for path in paths]


class Means(NamedTuple):
    """What the seeds of one arm on one task measured, in the order of the seeds.

    Attributes:
        accuracy: Accuracy on full images.
        kept: The same over that of the full arm of the same seed.
        pruned: Accuracy on pruned images, where it was asked for.
        time: Training time over that of the full arm of the same seed; none of the arms of `UNTIMED`.
    """

    accuracy: tuple[float, ...]
    kept: tuple[float, ...]
    pruned: tuple[float, ...]
    time: tuple[float, ...]


def measured(records: Sequence[Record]) -> dict[tuple[str, str], Means]:
    """Return task and arm -> what its seeds measured, in the order of the records.

    Seeds without a full arm are left out, since ratios are taken within a seed.
    """
    arms = [record for record in records if record["kind"] == "arm"]
    full = {(r["results"]["dataset"], r["seed"]): r["results"] for r in arms if r["results"]["arm"] == "full"}
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in arms:
        if (record["results"]["dataset"], record["seed"]) in full:
            groups[record["results"]["dataset"], record["results"]["arm"]].append(record)
    found = {}
    for (task, arm), members in groups.items():
        base = [full[task, record["seed"]] for record in members]
        score = [record["results"]["accuracy_full"]["accuracy"] for record in members]
        pruned = [r["results"]["accuracy_pruned"]["accuracy"] for r in members if r["results"]["accuracy_pruned"]]
        both = zip(members, base, strict=True) if arm not in UNTIMED else ()
        time = [r["results"]["seconds_train"] / b["seconds_train"] for r, b in both]
        kept = [s / b["accuracy_full"]["accuracy"] for s, b in zip(score, base, strict=True)]
        found[task, arm] = Means(tuple(score), tuple(kept), tuple(pruned), tuple(time))
    return found


def table(records: Sequence[Record], names: Sequence[str] | None = None, tasks: Sequence[str] = ()) -> list[str]:
    """Return lines of a Markdown table: means over seeds, ratios against the full arm of the same seed.

    Args:
        records: Records of the experiment.
        names: Arms to show, in this order; None for all, in the order of the plan.
        tasks: Tasks to show; all where empty.
    """
    groups = measured(records)
    lines = [
        "| task | arm | seeds | full images | of full | pruned images | time of full |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = groups if names is None else [(t, a) for t in dict.fromkeys(t for t, _ in groups) for a in names]
    for task, arm in shown:
        found = groups.get((task, arm))
        if found is None or (tasks and task not in tasks):
            continue
        told = [mean(found.accuracy), mean(found.kept), mean(found.pruned), mean(found.time, 2)]
        lines.append(f"| {' | '.join([task, arm, str(len(found.accuracy)), *told])} |")
    return lines


def write_between_marks(path: Path, lines: Sequence[str], begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the marks of a document."""
    from trimtab.files import write_text_atomic

    before, rest = path.read_text(encoding="utf-8").split(begin, 1)
    _, after = rest.split(end, 1)
    write_text_atomic(path, "\n".join([before + begin, *lines, end + after]))


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard deviation as text, empty where there are no values."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def main() -> None:
    """Write the page and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=HERE / "records")
    parser.add_argument("--out", type=Path, default=HERE / "page.html")
    arguments = parser.parse_args()

    from trimtab.report import render_experiment

    records = read_records(arguments.records)
    lines = table(records)
    write_between_marks(HERE / "README.md", lines)
    write_between_marks(HERE.parents[1] / "README.md", table(records, MAIN_ARMS))
    print("\n".join(lines))
    print(render_experiment(records, arguments.out, paragraphs=PARAGRAPHS, untimed=UNTIMED))


if __name__ == "__main__":
    main()
