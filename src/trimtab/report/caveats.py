"""What speaks against a comparison: whatever sets two runs apart besides DualSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trimtab.report import rows
from trimtab.report.rows import Record
from trimtab.report.runs import Run, outside_settings

_MACHINE = {"cpu": "processor", "cores": "cores", "accelerator": "accelerator", "threads": "threads"}
_PACKAGES = ("torch", "transformers", "trimtab")


def caveats_of(dual: Run, full: Run) -> list[str]:
    """Return sentences on what sets a DualSpeed run and the run on full tokens apart besides DualSpeed."""
    told = []
    if dual.seed != full.seed:
        told.append(f"The seeds differ: {dual.seed} and {full.seed}.")
    told += _sentence("Settings", _differences(outside_settings(dual.settings), outside_settings(full.settings)))
    told += _sentence("Machines", _of_record(dual, full, _machine))
    told += _sentence("Versions", _of_record(dual, full, _versions))
    numbers = [(run.judged or {}).get("number") for run in (dual, full)]
    if None not in numbers and numbers[0] != numbers[1]:
        told.append(f"They were asked differently many questions: {numbers[0]:,} and {numbers[1]:,}.")
    for run in (dual, full):
        if run.first_step:
            told.append(f"{run.name} was resumed at step {run.first_step:,}: its time is that of the steps after it.")
    return told


def _of_record(one: Run, other: Run, read: Callable[[Record], Mapping[str, str]]) -> dict[str, tuple[str, str]]:
    return _differences(read(one.records[0]), read(other.records[0]))


def _machine(record: Record) -> dict[str, str]:
    return {words: str(record["hardware"].get(name)) for name, words in _MACHINE.items()}


def _versions(record: Record) -> dict[str, str]:
    return {name: str(record["versions"].get(name)) for name in _PACKAGES}


def _differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    both = {name: (ours.get(name, "–"), theirs.get(name, "–")) for name in [*ours, *theirs]}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _sentence(what: str, found: Mapping[str, tuple[str, str]]) -> list[str]:
    if not found:
        return []
    told = [f"{name} {rows.figure(ours)} against {rows.figure(theirs)}" for name, (ours, theirs) in found.items()]
    rest = f", and {len(told) - rows.FEW} more" if len(told) > rows.FEW else ""
    return [f"{what} differ: {'; '.join(told[: rows.FEW])}{rest}."]
