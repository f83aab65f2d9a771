"""What a page says first: how much faster, what of the accuracy was kept, what memory it took, what is not known."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import PurePath
from typing import Any

from trimtab.evaluate.compare import compare_accuracy
from trimtab.report import rows
from trimtab.report.caveats import caveats_of
from trimtab.report.runs import Run, by_dataset, full_run_of, mean_ratio
from trimtab.report.series import Log, number_of
from trimtab.report.tiles import tiles_of


@dataclass(frozen=True)
class Pair:
    """A DualSpeed run and the run on full tokens that it is held against.

    Attributes:
        dual: The one.
        full: The other.
    """

    dual: Run
    full: Run

    @property
    def time_ratio(self) -> float | None:
        """Time per sample of the one over that of the other."""
        return None if not (self.dual.pace and self.full.pace) else self.dual.pace / self.full.pace

    @property
    def same_samples(self) -> bool:
        """Whether both were trained on equally many samples."""
        return self.dual.samples == self.full.samples


@dataclass(frozen=True)
class Verdict:
    """What stands at the top of a page.

    Attributes:
        headline: One sentence.
        lead: Sentences below it.
        tiles: Figures with words: ``value`` and ``words``.
        missing: What is not known: ``what``, and the ``command`` that would add it, or empty.
        caveats: What sets the compared runs apart besides DualSpeed.
        facts: The figures, for programs.
    """

    headline: str
    lead: str
    tiles: tuple[Mapping[str, str], ...]
    missing: tuple[Mapping[str, str], ...]
    caveats: tuple[str, ...]
    facts: Mapping[str, Any]


def judge(runs: Sequence[Run], floors: Mapping[str, Mapping[str, float]]) -> Verdict:
    """Return the verdict on the first data set that has a DualSpeed run with one on full tokens; else on what there is.

    Args:
        runs: The runs.
        floors: What a model that does not see would reach, by words, by data set.
    """
    pairs = comparable_pairs(runs)
    moving = [run for run in runs if run.running]
    dual = pairs[0].dual if pairs else next((run for run in runs if run.arm.startswith("dualspeed")), None)
    facts = {
        "speed": _speed(pairs), "accuracy": _accuracy(pairs, dual), "memory": _memory(runs, pairs),
        "steps": _step_times(dual, pairs), "tokens": _tokens(dual), "running": [progress_of(run) for run in moving],
    }  # fmt: skip
    missing = _missing(runs, pairs, dual)
    return Verdict(
        headline=_headline(facts, runs, moving), lead=_lead(pairs, runs, dual),
        tiles=tuple(tiles_of(facts, runs, dual, floors)), missing=tuple(missing), caveats=tuple(_caveats(pairs)),
        facts=facts,
    )  # fmt: skip


def comparable_pairs(runs: Sequence[Run]) -> list[Pair]:
    """Return the DualSpeed runs of one data set and one choice of settings, each with its run on full tokens."""
    for group in by_dataset(runs).values():
        pairs = [
            Pair(run, full)
            for run in group
            if run.arm == "dualspeed" and not run.running and (full := full_run_of(run, group)) is not None
        ]
        if pairs:
            first = _block(pairs[0].dual)
            return [pair for pair in pairs if _block(pair.dual) == first]
    return []


def kept_share(run: Run, full: Run) -> tuple[float | None, tuple[float, float] | None]:
    """Return the share of the accuracy on full tokens, with its paired 95 % interval where every answer is known.

    Answers to differently many questions are not compared: a share would say nothing about the training.
    """
    if run.accuracy is None or not full.accuracy:
        return None, None
    ours, theirs = run.judged or {}, full.judged or {}
    if ours.get("number") != theirs.get("number"):
        return None, None
    marks = [str(one.get("marks") or "") for one in (ours, theirs)]
    if marks[0] and len(marks[0]) == len(marks[1]) and not set("".join(marks)) - {"0", "1"}:
        found = compare_accuracy(ours, theirs)
        ends = found["ratio_interval"]
        return found["ratio"], (ends[0], ends[1]) if ends else None
    return run.accuracy / full.accuracy, None


def progress_of(run: Run) -> dict[str, Any]:
    """Return how far a run under way is, its rate and when it should end.

    The rate is that of the steps since it was started or resumed (``first_step`` in its record).
    """
    done, steps = run.steps or 0, number_of(run.results.get("max_steps"))
    here = done - (number_of(run.results.get("first_step")) or 0)
    rate = here / run.seconds if run.seconds and here > 0 else None
    left = (steps - done) / rate if rate and steps and steps >= done else None
    written = _written(run)
    return {
        "name": run.name,
        "steps": done,
        "max_steps": None if steps is None else round(steps),
        "share": done / steps if steps else None,
        "steps_per_second": rate,
        "seconds_left": left,
        "written": written.isoformat(timespec="seconds") if written else None,
        "expected_end": (written + timedelta(seconds=left)).isoformat(timespec="seconds")
        if written and left is not None
        else None,
    }


def median_step(log: Log, mode: str) -> float | None:
    """Return the median time of the steps of a mode in seconds."""
    series = log.seconds.get(mode)
    return None if series is None else statistics.median(series.values.tolist())


def _caveats(pairs: Sequence[Pair]) -> list[str]:
    """Return the caveats of all pairs, each once, with the runs that it is about where it is not about all."""
    told: dict[str, list[str]] = {}
    for pair in pairs:
        for sentence in caveats_of(pair.dual, pair.full):
            told.setdefault(sentence, []).append(pair.dual.name)
    return [
        sentence if len(names) == len(pairs) else f"{', '.join(names)}: {sentence}" for sentence, names in told.items()
    ]


def _block(run: Run) -> str:
    block = run.settings.get("dualspeed")
    return repr(sorted((k, repr(v)) for k, v in block.items() if k != "seed")) if isinstance(block, Mapping) else ""


def _speed(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    ratios = [ratio for pair in pairs if (ratio := pair.time_ratio)]
    found = mean_ratio(ratios)
    if found is None:
        return None
    return {
        "time_ratio": found[0], "spread": found[1] if len(ratios) > 1 else None, "times_faster": 1 / found[0],
        "pairs": len(ratios), "same_samples": all(pair.same_samples for pair in pairs),
        "dualspeed": [pair.dual.name for pair in pairs], "full": [pair.full.name for pair in pairs],
    }  # fmt: skip


def _accuracy(pairs: Sequence[Pair], dual: Run | None) -> dict[str, Any] | None:
    told = [(pair, *kept_share(pair.dual, pair.full)) for pair in pairs]
    kept = [(pair, share, interval) for pair, share, interval in told if share is not None]
    if not kept:
        known = dual is not None and dual.accuracy is not None
        return {"dualspeed": dual.accuracy, "full": None, "kept": None} if known and dual else None
    mean, spread = mean_ratio([share for _, share, _ in kept]) or (0.0, 0.0)
    return {
        "dualspeed": statistics.fmean(pair.dual.accuracy or 0.0 for pair, _, _ in kept),
        "full": statistics.fmean(pair.full.accuracy or 0.0 for pair, _, _ in kept),
        "kept": mean, "spread": spread if len(kept) > 1 else None,
        "interval": list(kept[0][2]) if len(kept) == 1 and kept[0][2] else None, "pairs": len(kept),
    }  # fmt: skip


def _memory(runs: Sequence[Run], pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Return peaks of both sides of the first pair where each was measured by itself, else the highest of all."""
    if pairs:
        dual, full = pairs[0].dual, pairs[0].full
        both = bool(dual.own_peak and full.own_peak)
        if (both or dual.source != full.source) and dual.peak and full.peak:
            ratio = dual.peak / full.peak
            known = {"dualspeed_mib": dual.peak, "full_mib": full.peak, "ratio": ratio, "of_processes": not both}
            return known | (_memory_by_mode(dual) if both else {})
    peaks = [run.peak for run in runs if run.peak]
    return {"highest_mib": max(peaks)} if peaks else None


def _memory_by_mode(run: Run) -> dict[str, float]:
    """Return the peak of fast and of slow steps in MiB, where they were measured by themselves."""
    memory = run.results.get("memory")
    steps = memory.get("step_mib") if isinstance(memory, Mapping) else None
    held = number_of(memory.get("held_mib")) if isinstance(memory, Mapping) else None
    if held is None or not isinstance(steps, Mapping):
        return {}
    peaks = {mode: number_of(steps.get(mode)) for mode in ("fast", "slow")}
    return {f"{mode}_mib": held + peak for mode, peak in peaks.items() if peak is not None}


def _step_times(dual: Run | None, pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Return median times of fast and slow steps, and of those on full tokens where they hold equally many samples."""
    fast, slow = (median_step(dual.log, mode) if dual else None for mode in ("fast", "slow"))
    if dual is None or fast is None or slow is None:
        return None
    told = {
        "fast_seconds": fast, "slow_seconds": slow, "fast_of_slow": fast / slow if slow else None,
        "single_steps": dual.log.per_step,
    }  # fmt: skip
    other = pairs[0].full if pairs else None
    full = median_step(other.log, "full") if other else None
    if other is None or not full or not (dual.samples and dual.steps and other.samples and other.steps):
        return told
    if dual.samples * other.steps != other.samples * dual.steps:
        return told
    single = dual.log.per_step and other.log.per_step
    return {**told, "full_seconds": full, "fast_of_full": fast / full, "single_steps": single}


def _tokens(dual: Run | None) -> dict[str, Any] | None:
    """Return mean visual tokens of a step before pruning, after it in fast steps, and after it over all steps."""
    if dual is None or not dual.log.before:
        return None
    both = [(mode, dual.log.before[mode], dual.log.after[mode]) for mode in dual.log.before if mode in dual.log.after]
    before = sum(float(one.values.sum()) for _, one, _ in both)
    after = sum(float(one.values.sum()) for _, _, one in both)
    many = sum(len(one) for _, one, _ in both)
    fast = next(((b, a) for mode, b, a in both if mode == "fast"), None)
    return {
        "before": before / many, "after": after / many, "kept_share": after / before if before else None,
        "fast_before": float(fast[0].values.mean()) if fast else None,
        "fast_after": float(fast[1].values.mean()) if fast else None,
    } if many else None  # fmt: skip


def _headline(facts: Mapping[str, Any], runs: Sequence[Run], moving: Sequence[Run]) -> str:
    speed, accuracy = facts["speed"], facts["accuracy"]
    if moving and not speed:
        first = facts["running"][0]
        goal = f" of {first['max_steps']:,}" if first["max_steps"] else ""
        return f"Training is under way: step {first['steps']:,}{goal}."
    if speed:
        ratio = speed["time_ratio"]
        told = f"DualSpeed took {ratio:.2f} {'of' if ratio < 1 else 'times'} the training time"
        per_sample = "" if speed["same_samples"] else " per sample"
        kept = accuracy and accuracy["kept"]
        rest = f" and kept {rows.percent(kept)} of the accuracy on full images" if kept else ""
        return f"{told}{per_sample}{rest}."
    if facts["steps"] and facts["steps"]["fast_of_slow"]:
        ratio = facts["steps"]["fast_of_slow"]
        return f"A fast step took {ratio:.2f} {'of' if ratio < 1 else 'times'} the time of a slow one."
    tokens = facts["tokens"]
    if tokens and tokens["kept_share"]:
        return f"DualSpeed trained on {rows.percent(tokens['kept_share'])} of the visual tokens."
    return "Records of this run" if len(runs) < 2 else f"Records of {len(runs)} runs"


def _lead(pairs: Sequence[Pair], runs: Sequence[Run], dual: Run | None) -> str:
    if not pairs:
        if not runs:
            return "No training is among these records."
        return "" if dual is None else _no_pair(runs, dual)
    dataset = pairs[0].dual.dataset
    peers = [run for run in runs if run.dataset == dataset and not run.running]
    counts = sorted({run.samples for run in peers if run.samples})
    told = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "unknown many"
    text = f"{len(peers)} trainings are compared on {dataset}, of {told} samples each."
    judged = [run for run in peers if run.judged]
    numbers = {number_of((run.judged or {}).get("number")) for run in judged}
    if len(numbers) == 1 and (number := numbers.pop()):
        who = "Each" if len(judged) == len(peers) else f"{len(judged)} of them"
        text += f" {who} answered {number:,.0f} questions with every visual token in place."
    shown = {id(run) for pair in pairs for run in (pair.dual, pair.full)}
    if len(pairs) > 1:
        text += f" Ratios are means over {len(pairs)} pairs of runs."
    others = sum(run.arm == "dualspeed" and id(run) not in shown for run in runs)
    if others:
        more = f"{others} more runs" if others > 1 else "one more run"
        text += f" They are those of {pairs[0].dual.name}{' and its like' if len(pairs) > 1 else ''}; "
        text += f"the tables have {more} with DualSpeed."
    return text


def _no_pair(runs: Sequence[Run], dual: Run) -> str:
    """Return why a DualSpeed run is held against none on full tokens."""
    full = [run for run in runs if run.arm == "full"]
    alike = [run for run in full if run.dataset == dual.dataset]
    if not full:
        return "There is no run on full tokens among these records to hold it against."
    if not alike:
        return f"The runs on full tokens among these records are judged on other data than {dual.dataset}."
    if dual.running or all(run.running for run in alike):
        return "It is held against the run on full tokens once both have ended."
    return f"None of the {len(alike)} runs on full tokens has its seed, {dual.seed}, so it is held against none."


def _missing(runs: Sequence[Run], pairs: Sequence[Pair], dual: Run | None) -> list[dict[str, str]]:
    told = []
    finished = [run for run in runs if not run.running]
    if dual is not None and not pairs and not dual.running:
        told.append({
            "what": "How much faster it was than training on full tokens: train once without DualSpeed, then give both "
            "directories to trimtab report. trimtab bench measures both for a few steps.",
            "command": _suggested(dual, "train", " --dualspeed false --output_dir out-full"),
        })  # fmt: skip
    bare = [run for run in finished if run.accuracy is None]
    if bare:
        several = f" of {len(bare)} runs" if len(bare) > 1 else ""
        what = f"The accuracy on full images{several}. It needs eval_files in the run file."
        told.append({"what": what, "command": _suggested(bare[0], "eval")})
    if dual is not None and not dual.running and not dual.own_peak:
        told.append({
            "what": "The peak memory of fast and slow steps by themselves.",
            "command": _suggested(dual, "bench", " --steps 20"),
        })  # fmt: skip
    if dual is not None and not dual.running and not dual.log.seconds:
        told.append({
            "what": "The time of fast and slow steps by themselves: their records have no time for every step.",
            "command": _suggested(dual, "bench", " --steps 20"),
        })  # fmt: skip
    return told


def _suggested(run: Run, verb: str, rest: str = "") -> str:
    """Return a command with the settings of a training; empty where it was none of a run file."""
    if run.records[0]["kind"] == "arm" and not run.records[0].get("command"):
        return ""
    return f"trimtab {verb} --config {_config(run)}{rest}"


def _config(run: Run) -> str:
    """Return the file with all settings of a training, also those of its command line; else what its command names."""
    folder = run.settings.get("output_dir")
    if folder and run.records[0]["kind"] != "arm":
        return shlex.quote((PurePath(str(folder)) / "resolved.yaml").as_posix())
    words = [str(word) for word in run.records[0].get("command") or []]
    after = words.index("--config") + 1 if "--config" in words else len(words)
    given = words[after : after + 1] or [word for word in words if word.endswith((".yaml", ".yml"))]
    return shlex.quote(given[0]) if given else "run.yaml"


def _written(run: Run) -> datetime | None:
    try:
        begun = datetime.fromisoformat(str(run.records[0]["started"]))
    except ValueError:
        return None
    seconds = number_of(run.records[0]["seconds"]) or run.seconds or 0.0
    return begun + timedelta(seconds=seconds) if begun.tzinfo else None
