"""Trainings, finished or not, as a page compares them: what they cost, what they can, and a name for each."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from trimtab.errors import DataError
from trimtab.report import rows
from trimtab.report.rows import Record
from trimtab.report.series import Log, number_of, read_log
from trimtab.report.sources import Source

_IMMATERIAL = (
    "arm", "name", "output_dir", "seed", "steps", "max_steps", "num_train_epochs", "logging_steps", "logging_strategy",
    "logging_first_step", "save_steps", "save_strategy", "save_total_limit", "eval_strategy", "eval_steps",
    "disable_tqdm", "report_to", "run_name", *rows.COMPUTED,
)  # fmt: skip
"""Settings that change neither weights nor the time per sample; seed and steps are told by themselves."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Words for it, unlike those of any other run of the page.
        arm: Name of the arm, for example "full" or "dualspeed".
        dataset: What it was judged on, or is to be.
        source: Where its records were found.
        seed: Its seed.
        settings: Its settings.
        results: What its records say, those of training and evaluation together.
        records: The records themselves; the first is that of the training.
        log: Its log.
    """

    name: str
    arm: str
    dataset: str
    source: str
    seed: int | None
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    records: tuple[Record, ...]
    log: Log

    @property
    def running(self) -> bool:
        """Whether it was under way when the record was written."""
        return str(self.records[0]["kind"]) == "progress"

    @property
    def seconds(self) -> float | None:
        """Time of the training, so far or in all."""
        return number_of(self.results.get("seconds_train"))

    @property
    def steps(self) -> int | None:
        """Steps done."""
        return _whole(self.results.get("steps"))

    @property
    def samples(self) -> int | None:
        """Samples that were trained on."""
        return _whole(self.results.get("samples"))

    @property
    def judged(self) -> Mapping[str, Any] | None:
        """The result on full images, if it was evaluated."""
        result = self.results.get("accuracy_full")
        return result if isinstance(result, Mapping) and number_of(result.get("accuracy")) is not None else None

    @property
    def accuracy(self) -> float | None:
        """The share of right answers on full images."""
        return None if self.judged is None else float(self.judged["accuracy"])

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the accuracy."""
        ends = self.judged.get("interval") if self.judged else None
        low, high = map(number_of, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
        return None if low is None or high is None else (low, high)

    @property
    def pruned_accuracy(self) -> float | None:
        """The share of right answers on pruned images."""
        result = self.results.get("accuracy_pruned")
        return number_of(result.get("accuracy")) if isinstance(result, Mapping) else None

    @property
    def pace(self) -> float | None:
        """Seconds per sample, of a resumed training those of its last part."""
        share = 1 - self.first_step / self.steps if self.first_step and self.steps else 1.0
        return self.seconds / (self.samples * share) if self.seconds and self.samples and share > 0 else None

    @property
    def first_step(self) -> int:
        """The step at which the part of the training began that its seconds tell of; 0 for all of it."""
        return _whole(self.results.get("first_step")) or self.log.first_step

    @property
    def own_peak(self) -> float | None:
        """Peak memory of this training alone in MiB, where that was measured."""
        return number_of(self.results.get("peak_memory_mib"))

    @property
    def peak(self) -> float | None:
        """Peak memory in MiB: of this training alone, or of the whole process that it ran in."""
        return number_of(self.records[0]["peak_memory_mib"]) if self.own_peak is None else self.own_peak


def find_runs(sources: Sequence[Source]) -> list[Run]:
    """Return the trainings of all sources, the main arms first in each; the record of an evaluation joins its training.

    A record of progress counts only where the training has not ended since.
    """
    found = [run for source in sources for run in _runs_of(source)]
    return _named(found, several=len(sources) > 1)


def by_dataset(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by what they are judged on, in the order in which these come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.dataset, []).append(run)
    return groups


def full_run_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the finished run on full tokens that a run is held against.

    Of several of its seed it is the one whose settings are nearest, then one of its directory. A single one of another
    seed will do, and `trimtab.report.caveats` says so; of several of other seeds none.
    """
    full = [one for one in runs if one.arm == "full" and one.dataset == run.dataset and not one.running]
    same_seed = [one for one in full if one.seed == run.seed]
    if same_seed:
        return min(same_seed, key=lambda one: (_far(one, run), one.source != run.source))
    return full[0] if len(full) == 1 else None


def outside_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return as words what a training was set to besides DualSpeed, as far as it can change its weights or its time."""
    chosen = {name: value for name, value in settings.items() if name != "dualspeed" and name not in _IMMATERIAL}
    return rows.flat_settings(chosen)


def _far(one: Run, other: Run) -> int:
    """Return in how many settings besides DualSpeed two runs differ."""
    ours, theirs = outside_settings(one.settings), outside_settings(other.settings)
    return sum(ours.get(name) != theirs.get(name) for name in {**ours, **theirs})


def _runs_of(source: Source) -> list[Run]:
    trained = [record for record in source.records if record["kind"] == "train"]
    arms = [record for record in source.records if record["kind"] == "arm"]
    under_way = [record for record in source.records if record["kind"] == "progress" and _goes_on(record, trained)]
    runs = []
    for arm in sorted(arms, key=rows.arm_rank):
        training = next((record for record in trained if _same_training(record, arm)), None)
        if training is None:
            runs.append(_run(source, (arm,)))
        else:
            trained.remove(training)
            runs.append(_run(source, (training, arm)))
    if under_way:
        # What ended before in this directory is being repeated or gone on with.
        runs = [run for run in runs if run.settings != under_way[0]["settings"]]
    return [*runs, *(_run(source, (record,)) for record in [*trained, *under_way])]


def _goes_on(record: Record, trained: Sequence[Record]) -> bool:
    return all(str(record["started"]) > str(other["started"]) for other in trained)


def _same_training(training: Record, arm: Record) -> bool:
    names = ("arm", "seconds_train", "steps", "samples")
    return all(training["results"].get(name) == arm["results"].get(name) for name in names)


def _run(source: Source, records: tuple[Record, ...]) -> Run:
    results: dict[str, Any] = {}
    for record in records:
        # The arm's log leaves out entries without a step, else both are the same.
        results.update(record["results"])
    settings = records[0]["settings"]
    arm = str(results.get("arm") or ("dualspeed" if settings.get("dualspeed") else "full"))
    if not isinstance(results.get("log", []), list):
        raise DataError(f"The record of {arm} has a log that is no list. Make it again.")
    return Run(
        name=rows.label_of(arm), arm=arm, dataset=_dataset(settings, results), source=source.name,
        seed=records[0]["seed"], settings=settings, results=results, records=records,
        log=read_log(results.get("log"), arm),
    )  # fmt: skip


def _dataset(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the name that `trimtab eval` gives to what it asks, or will."""
    if results.get("dataset"):
        return str(results["dataset"])
    files = settings.get("eval_files") or settings.get("data_files") or []
    stems = [PurePath(str(file)).stem for file in ([files] if isinstance(files, str) else files)]
    return ", ".join(stems) or "its data"


def _named(runs: Sequence[Run], several: bool) -> list[Run]:
    """Return the runs under names that differ: by directory, by what sets them apart, by seed, at last by number."""
    named = list(runs)
    if several:
        named = [replace(run, name=f"{run.source}: {run.name}") for run in named]
    parts: list[Callable[[Run], str]] = [
        lambda run: rows.variant_of(run.records[0], [p.records[0] for p in runs if p.arm == run.arm]),
        lambda run: "" if run.seed is None else f"seed {run.seed}",
    ]
    for part in parts:
        named = _told_apart(named, part)
    seen: Counter[tuple[str, str]] = Counter()
    for place, run in enumerate(named):
        seen[run.dataset, run.name] += 1
        if seen[run.dataset, run.name] > 1:
            named[place] = replace(run, name=f"{run.name}, no. {seen[run.dataset, run.name]}")
    return named


def _told_apart(runs: list[Run], part: Callable[[Run], str]) -> list[Run]:
    """Add a part to names that several runs of a data set share, where the part differs among these."""
    shared = Counter((run.dataset, run.name) for run in runs)
    kinds: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        kinds.setdefault((run.dataset, run.name), set()).add(part(run))
    return [
        replace(run, name=f"{run.name}, {words}")
        if shared[key := (run.dataset, run.name)] > 1 and len(kinds[key]) > 1 and (words := part(run))
        else run
        for run in runs
    ]


def mean_ratio(values: Sequence[float]) -> tuple[float, float] | None:
    """Return mean and standard deviation of ratios, or None where there are none."""
    return (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def _whole(value: Any) -> int | None:
    number = number_of(value)
    return None if number is None else round(number)
