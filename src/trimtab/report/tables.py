"""Tables of a page: runs side by side, settings, machine, wrong answers, other records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import DataError
from trimtab.report import rows, speed
from trimtab.report.blocks import Table, commands_of_runs
from trimtab.report.rows import Record
from trimtab.report.runs import Run, full_run_of
from trimtab.report.sources import commands_of
from trimtab.report.verdict import kept_share, progress_of

MOST_ROWS = 60
"""So many lines of a record of another kind are shown."""

_SHOWN = ("arm", "train", "progress", "dataset", "pictures", "quickstart")
"""Kinds that other parts of the page show."""


def comparison(runs: Sequence[Run], floor: Mapping[str, float], dataset: str) -> Table:
    """Return runs side by side: accuracy, time, both against full tokens of the same seed, memory, samples."""
    names = [run.arm for run in runs]
    cells, main = [], set()
    for place, run in enumerate(runs):
        full = full_run_of(run, runs)
        kept, interval = kept_share(run, full) if full is not None and run is not full else (None, None)
        ratio = run.pace / full.pace if full is not None and run.pace and full.pace else None
        if run.arm == "dualspeed":
            main.add(place)
        ends = f"{100 * run.interval[0]:.1f} to {100 * run.interval[1]:.1f}" if run.interval else ""
        cells.append((
            run.name + (" (under way)" if run.running else ""),
            (rows.percent(run.accuracy), ends),
            rows.percent(run.pruned_accuracy),
            "–" if run.seconds is None else rows.duration(run.seconds),
            "–" if ratio is None else f"{ratio:.2f}",
            (rows.percent(kept), f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""),
            "–" if run.peak is None else f"{run.peak:,.0f}{'' if run.own_peak else '*'}",
            _done(run),
            "–" if run.samples is None else f"{run.samples:,}",
        ))  # fmt: skip
    # Where arms repeat, lines have colours of their own, and a dot of the arm's would point at the wrong one.
    colors = tuple(rows.variable_of(name, names) for name in names) if len(set(names)) == len(names) else ()
    columns = (
        "Training on", "Accuracy on full images", "Accuracy on pruned images", "Training time",
        "Time ratio per sample", "Accuracy kept", "Peak memory (MiB)", "Steps", "Samples",
    )  # fmt: skip
    return Table(
        f"Runs on {dataset} side by side", columns, cells, frozenset(main), _note(runs, floor),
        commands_of_runs(runs, judged=True), colors,
    )  # fmt: skip


def wrong_answers(runs: Sequence[Run], dataset: str) -> Table | None:
    """Return questions that the DualSpeed model got wrong, or None."""
    dual = next((run for run in runs if run.arm == "dualspeed" and run.judged), None)
    wrong = (dual.judged or {}).get("wrong") if dual else None
    if not isinstance(wrong, list) or not wrong or dual is None:
        return None
    cells = [tuple(str(one.get(name, "")) for name in ("question", "answer", "predicted")) for one in wrong[:12]]
    columns = ("Question", "True answer", "Model's answer")
    caption = f"Wrong answers of the DualSpeed model on {dataset}"
    return Table(caption, columns, cells, commands=commands_of_runs([dual], judged=True), words=True)


def settings_tables(runs: Sequence[Run]) -> tuple[Table | None, Table | None]:
    """Return the settings in which runs differ, what departs from the commonest value marked; and the others."""
    flat = [_flat(run) for run in runs]
    names = [name for name in dict.fromkeys(n for one in flat for n in one) if name not in rows.COMPUTED]
    differing = [name for name in names if len({one[name] for one in flat if name in one}) > 1]
    commands = commands_of_runs(runs)
    cells, marked = [], set()
    for row, name in enumerate(differing):
        values = [one.get(name, "") for one in flat]
        common = Counter(value for value in values if value).most_common(1)[0][0]
        cells.append((name, *(value or "–" for value in values)))
        marked |= {(row, place + 1) for place, value in enumerate(values) if value not in ("", common)}
    columns = ("Setting", *(f"{run.name} ({run.dataset})" if _datasets(runs) > 1 else run.name for run in runs))
    differ = Table(
        "Settings in which the runs differ", columns, cells, marked=frozenset(marked), commands=commands, words=True,
        note="Marked: what departs from the commonest value. A dash: the run has no such setting.",
    )  # fmt: skip
    same = [(name, next(one[name] for one in flat if name in one)) for name in names if name not in differing]
    shared = "Settings" if len(runs) == 1 else "Settings that all runs share"
    alike = Table(shared, ("Setting", "Value"), same, commands=commands, words=True)
    return differ if cells else None, alike if same else None


def machine_table(records: Sequence[Record]) -> Table:
    """Return what the records ran on, with what versions."""
    pairs = rows.machine_table(records)
    return Table("Machine and versions", ("What", "Value"), pairs, commands=tuple(commands_of(records)), words=True)


def other_tables(records: Sequence[Record], runs: Sequence[Run]) -> list[Table]:
    """Return tables of the records of other kinds: benchmarks as their page shows them, the rest number by number."""
    known = [run.judged for run in runs if run.judged]
    tables: list[Table] = []
    for number, record in enumerate(records):
        if record["kind"] in _SHOWN or (record["kind"] == "eval" and record["results"].get("full") in known):
            continue
        tables += _other(record, number)
    return tables


def _other(record: Record, number: int) -> list[Table]:
    commands = tuple(commands_of([record]))
    name = f"Record {number + 1}, {record['kind']}"
    if record["kind"] == speed.KIND:
        try:
            found = speed.training_tables(record)
        except (DataError, KeyError, TypeError):
            found = []
        if found:
            return [
                Table(f"{name}: {one.title}", one.columns, one.rows, note=" ".join(one.notes), commands=commands)
                for one in found
            ]
    flat = rows.flat_results(record["results"])
    cells = [(key, value) for key, value in list(flat.items())[:MOST_ROWS]]
    note = f"The first {MOST_ROWS} of {len(flat)} figures." if len(flat) > MOST_ROWS else ""
    begun = f", started {record['started'][:10]}"
    return [Table(f"{name}{begun}", ("Figure", "Value"), cells, note=note, commands=commands, words=True)]


def _flat(run: Run) -> dict[str, str]:
    """Return the settings of a run as words; whether it has DualSpeed is one of them."""
    flat = rows.flat_settings({**run.settings, "dualspeed": None})
    block = run.settings.get("dualspeed")
    inner = rows.flat_settings(block, "dualspeed.") if isinstance(block, Mapping) else {}
    return {**flat, "dualspeed": "on" if inner else "off", **inner}


def _done(run: Run) -> str:
    if run.steps is None:
        return "–"
    goal = progress_of(run)["max_steps"] if run.running else None
    return f"{run.steps:,} of {goal:,}" if goal else f"{run.steps:,}"


def _note(runs: Sequence[Run], floor: Mapping[str, float]) -> str:
    told = []
    if any(run.accuracy is not None for run in runs):
        told.append("Small figures: 95\N{NO-BREAK SPACE}% intervals over questions (kept: paired bootstrap).")
    mixed = any((full := full_run_of(run, runs)) is not None and full.seed != run.seed for run in runs)
    against = "the only run on full tokens, whatever its seed" if mixed else "full tokens of the same seed"
    told.append(f"Time: the training without the questions asked after it; its ratio is taken against {against}.")
    resumed = [run.name for run in runs if run.first_step]
    if resumed:
        told.append(f"Time since the last start only, and ratio for that part: {', '.join(resumed)}.")
    if any(run.peak and not run.own_peak for run in runs):
        told.append("*\N{NO-BREAK SPACE}Peak of the process that trained, which may have done other work before.")
    if floor:
        told.append(f"Without looking at the image: {', '.join(f'{w} {rows.percent(v)}' for w, v in floor.items())}.")
    return " ".join(told)


def _datasets(runs: Sequence[Any]) -> int:
    return len({run.dataset for run in runs})
