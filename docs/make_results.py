"""Write the measured parts of the documentation from the kept records: tables between marks, and charts.

    python docs/make_results.py

Takes the records of `experiments/dualspeed` and `bench`, and the cards of the methods. A test compares what stands in
the documents with what this command makes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from scatter import Point, scatter  # the line above is for this one

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TASKS = ("scenes", "easy-VQA", "NLVR, one box")
CHARTED = {"full": "all tokens", "full_equal_time": "all tokens, stopped early", "pruned": "pruned only",
           "dualspeed": "DualSpeed"}  # fmt: skip
PARTS = ("dualspeed", "dualspeed_no_isolator", "dualspeed_no_kl", "mixed")
OPTIONS = ("dualspeed", "dualspeed_original", "dualspeed_annealed", "dualspeed_random_keep", "dualspeed_content_keep",
           "dualspeed_two_way")  # fmt: skip
SWEEP = ("dualspeed_slow_0", "dualspeed_slow_5", "dualspeed", "dualspeed_slow_20", "dualspeed_slow_30",
         "dualspeed_keep_5", "dualspeed_keep_20", "dualspeed_keep_40")  # fmt: skip
FIVE = ("dualspeed_slow_5", "dualspeed_packed_slow_5", "dualspeed_random_keep_5")
BEHIND = ("full", "full_equal_time", "pruned", "dualspeed", "dualspeed_slow_20", "dualspeed_annealed",
          "dualspeed_annealed_20", "dualspeed_annealed_15_no_kl")  # fmt: skip
LEVEL = ("full", "pruned", "dualspeed")
RELEASED = ("released", "batched", "once", "head", "padded", "packed")
"""Rows of the training benchmark from the released step on, each with one more remedy."""


def load_page() -> ModuleType:
    """Return the module that reads the records of the experiment and makes its tables."""
    place = ROOT / "experiments" / "dualspeed" / "page.py"
    spec = importlib.util.spec_from_file_location("dualspeed_page", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = load_page()


def arms() -> list[dict[str, Any]]:
    """Return the records of the experiment."""
    found: list[dict[str, Any]] = PAGE.read_records(ROOT / "experiments" / "dualspeed" / "records")
    return found


def bench(name: str) -> dict[str, Any]:
    """Return a record of the benchmarks."""
    from trimtab.records import read_record

    return read_record(ROOT / "bench" / "records" / f"{name}.json")


def front() -> list[str]:
    """Return the figures of the first page, one line per task."""
    found = PAGE.measured(arms())
    lines = ["", "| Task | All tokens | DualSpeed | Accuracy kept | Time |", "|---|---|---|---|---|"]
    for task in TASKS:
        full, ours = found[task, "full"], found[task, "dualspeed"]
        cells = [f"{100 * fmean(each.accuracy):.1f} %" for each in (full, ours)]
        cells += [f"{100 * fmean(ours.kept):.0f} %", f"{100 * fmean(ours.time):.0f} %"]
        lines.append(f"| {' | '.join([task, *cells])} |")
    return [*lines, ""]


def front_note() -> list[str]:
    """Return what must be known to read the figures of the first page."""
    found = PAGE.measured(arms())
    seeds = min(len(found[task, "dualspeed"].kept) for task in TASKS)
    told = bench("training_toy")["results"]["summary"]
    over = [f"{told[name]['median']:.1f}" for name in ("ours_over_public", "ours_over_public_packed")]
    return [
        "",
        f"[Accuracy](results/accuracy.md) on full images, {seeds} seeds, bars one standard deviation; *accuracy kept*",
        "and *time* are shares of training on all tokens. A whole step of the toy [benchmark](results/speed.md) is",
        f"{over[0]} times faster than the public recipe, {over[1]} times than the same recipe packed. Small models on",
        "two CPU cores; **no figure from a GPU yet**, and one task of three [stays behind](results/did_not_work.md).",
        "",
    ]


def methods() -> list[str]:
    """Return the table of methods with links to their pages."""
    from trimtab.cards import all_cards

    lines = ["", "| Method | What gets smaller | What comes out | Cost |", "|---|---|---|---|"]
    for card in all_cards():
        lines.append(f"| [{card.title}]({card.name}.md) | {card.gets_smaller} | {card.comes_out} | {card.cost} |")
    return [*lines, ""]


def main_arms() -> list[str]:
    """Return the table of the main arms."""
    return _apart(PAGE.table(arms(), PAGE.MAIN_ARMS))


def sweep() -> list[str]:
    """Return the table of other slow and keep ratios."""
    return _apart(PAGE.table(arms(), SWEEP, ["scenes"]))


def parts() -> list[str]:
    """Return the table of DualSpeed with parts left out."""
    return _without_time(PAGE.table(arms(), PARTS, ["scenes", "NLVR, one box"]))


def options() -> list[str]:
    """Return the table of options that brought nothing."""
    return _without_time(PAGE.table(arms(), OPTIONS, ["scenes"]))


def behind() -> list[str]:
    """Return the table of one-box NLVR."""
    return _apart(PAGE.table(arms(), BEHIND, ["NLVR, one box"]))


def level() -> list[str]:
    """Return the table of easy-VQA, which tells no arms apart."""
    return _apart(PAGE.table(arms(), LEVEL, ["easy-VQA"]))


def random_tokens() -> list[str]:
    """Return the table of random pruning."""
    return _without_time(PAGE.table(arms(), ["dualspeed", "dualspeed_random"], ["scenes"]))


def unpacked() -> list[str]:
    """Return the accuracy of modes per sample without and with packing."""
    return _without_time(PAGE.table(arms(), ["dualspeed_sample", "dualspeed_packed"], ["scenes"]))


def five_percent() -> list[str]:
    """Return the share of the full arm's accuracy that 5 % slow steps keep, seed by seed."""
    found = PAGE.measured(arms())
    seeds = len(found["scenes", FIVE[0]].kept)
    lines = ["", f"| arm | {' | '.join(f'seed {n}' for n in range(seeds))} | mean |", "|---" * (seeds + 2) + "|"]
    for arm in FIVE:
        kept = found["scenes", arm].kept
        lines.append(f"| {arm} | {' | '.join(f'{value:.3f}' for value in kept)} | {PAGE.mean(kept)} |")
    return [*lines, ""]


def remedies() -> list[str]:
    """Return how much faster than the public recipe the released step is with one more remedy each time."""
    rows = {row["name"]: row for row in bench("training_toy")["results"]["rows"]}
    lines = ["", "| way to train | times faster than the public recipe | predicted |", "|---|---|---|"]
    for name in RELEASED:
        row = rows[name]
        times = row["times_public"]
        told = f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})"
        lines.append(f"| {row['title']} | {told} | {row['predicted_public']:.2f} |")
    return [*lines, ""]


def ranks() -> list[str]:
    """Return the simulated cost of a sample when every rank draws its own mode."""
    lines = ["", "| ranks | all tokens | one mode for all ranks | each rank its own | per sample, in packs |"]
    lines.append("|---|---|---|---|---|")
    for point in bench("training_toy")["results"]["curves"]["ranks"]:
        values = [1000 * point[name] for name in ("full", "lock_step", "independent", "per_sample")]
        lines.append(f"| {point['value']} | {' | '.join(f'{value:.0f} ms' for value in values)} |")
    return [*lines, ""]


def pruner_times() -> list[str]:
    """Return how much faster pruners are in a batch than image by image."""
    found = bench("pruners_cpu_2_threads")["results"]
    lines = ["", "| pruner | in a batch | image by image | ratio |", "|---|---|---|---|"]
    for name, row in found["pruners"].items():
        times = [1000 * row["batched_s"], 1000 * row["loop_s"]]
        lines.append(f"| {name} | {times[0]:.3g} ms | {times[1]:.3g} ms | {row['ratio']:.1f} |")
    plain = found["pruners"]["divprune"]
    read_back = [f"{1000 * plain[name]:.3g} ms" for name in ("batched_s", "plain_loop_s")]
    cells = ["divprune, every pick read by the host", *read_back, f"{plain['plain_loop_ratio']:.1f}"]
    lines.append(f"| {' | '.join(cells)} |")
    told = "{images} images of {tokens} tokens, {kept} kept, {threads} CPU threads.".format(**found)
    return [*lines, "", told, ""]


DOCUMENTS: dict[str, tuple[Callable[[], list[str]], ...]] = {
    "docs/index.md": (front, front_note),
    "docs/methods/index.md": (methods,),
    "docs/results/accuracy.md": (main_arms, sweep),
    "docs/results/did_not_work.md": (
        behind, level, parts, options, five_percent, random_tokens, unpacked, remedies, ranks, pruner_times,
    ),
}  # fmt: skip
"""Every document with measured parts, and what makes them; the name of the function is that of the mark."""


def marks(name: str) -> tuple[str, str]:
    """Return the comments around a measured part."""
    return f"<!-- {name}: made by `python docs/make_results.py`; a test compares -->", f"<!-- /{name} -->"


def chart(task: str) -> str:
    """Return accuracy against time of the main arms of a task as SVG."""
    found = PAGE.measured(arms())
    points = []
    for arm, label in CHARTED.items():
        means = found.get((task, arm))
        if means is not None:
            points.append(Point(label, arm, means.time, tuple(100 * value for value in means.accuracy)))
    return scatter(points, task, "training time (all tokens: 1)", "accuracy on full images, %")


def charts() -> dict[str, str]:
    """Return file name -> chart."""
    names = {task: task.lower().split(",")[0].replace("-", "_") for task in TASKS}
    return {f"docs/pictures/accuracy_{name}.svg": chart(task) for task, name in names.items()}


def _apart(lines: Sequence[str]) -> list[str]:
    return ["", *lines, ""]


def _without_time(lines: Sequence[str]) -> list[str]:
    """Leave out the times: those of these arms were taken on a busy machine."""
    return _apart([f"|{'|'.join(line.strip('|').split('|')[:-1])}|" for line in lines])


def main() -> None:
    """Write all parts and charts."""
    from trimtab.files import write_text_atomic

    for document, makers in DOCUMENTS.items():
        for make in makers:
            PAGE.write_between_marks(ROOT / document, make(), *marks(make.__name__))
    for name, drawing in charts().items():
        write_text_atomic(ROOT / name, drawing)
    sys.stdout.write(f"Wrote {', '.join([*DOCUMENTS, *charts()])}\n")


if __name__ == "__main__":
    main()
