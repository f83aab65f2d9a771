"""From records to the words and numbers that pages show."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.records import check_record, read_records
from trimtab.report.charts import arm_color, css_variable

Record = Mapping[str, Any]

ARM_LABELS = {"full": "Full tokens", "pruned": "Pruned only", "dualspeed": "DualSpeed"}
ARM_ORDER = tuple(ARM_LABELS)
_ARM_FIELDS = ("arm", "seconds_train", "samples", "steps", "accuracy_full", "dataset")
FEW = 3
"""So many arms at most are named beside a setting that not all arms have."""
FIRST = 20
"""So many parts of a long list are shown."""
COMPUTED = ("name", "arm", "majority", "language_only")
"""What records list among their settings, though tables and headings tell it."""

_WORDS = {
    "keep_ratio": "keep ratio", "slow_ratio": "slow ratio", "isolator_tokens": "isolator", "kl_weight": "KL weight",
    "pruner": "pruner", "schedule": "schedule", "positions": "positions",
}  # fmt: skip


def load(source: Sequence[Record] | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return checked records from a list or a directory.

    Raises:
        DataError: No record, a broken one, or an arm without what pages need.
    """
    if isinstance(source, (str, os.PathLike)):
        records = read_records(Path(source))
    else:
        records = [check_record(record, f"record {number}") for number, record in enumerate(source)]
    if not records:
        raise DataError("There is nothing to report: no record came. Give at least one record of kind 'arm'.")
    for number, record in enumerate(records):
        missing = [name for name in _ARM_FIELDS if name not in record["results"]] if record["kind"] == "arm" else []
        if missing:
            raise DataError(f"Record {number} of kind 'arm' lacks {', '.join(missing)} in its results. Make it again.")
    return records


def arms_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the arm records by data set; in each, full first, then pruned, DualSpeed, and the rest by name."""
    found: dict[str, list[Record]] = {}
    for record in sorted((r for r in records if r["kind"] == "arm"), key=arm_rank):
        found.setdefault(str(record["results"]["dataset"]), []).append(record)
    return found


def baselines(records: Sequence[Record], dataset: str) -> dict[str, float]:
    """Return what a model that does not see would reach on a data set, by the words for it."""
    found: dict[str, float] = {}
    for record in records:
        results = record["results"]
        if record["kind"] == "dataset" and str(results.get("dataset", dataset)) == dataset:
            for name, words in (("majority", "majority"), ("language_only", "language only")):
                value = results.get(name)
                value = value.get("accuracy") if isinstance(value, Mapping) else value
                if value is not None:
                    found[words] = float(value)
    return found


def label_of(arm: str) -> str:
    """Return the words for an arm, for example "DualSpeed, no isolator" for ``dualspeed_no_isolator``."""
    base, _, rest = arm.partition("_")
    words = [ARM_LABELS.get(base, base.capitalize()), rest.replace("_", " ")]
    return (", " if base in ARM_LABELS else " ").join(word for word in words if word)


def color_of(arm: str, arms: Sequence[str]) -> str:
    """Return the stand-in colour of an arm among those of a page."""
    return arm_color(arm, [name for name in arms if name not in ARM_LABELS])


def variable_of(arm: str, arms: Sequence[str]) -> str:
    """Return the CSS variable of an arm's colour."""
    return css_variable(color_of(arm, arms))


def setting(record: Record, name: str) -> Any:
    """Return a setting, from the top or from the block of DualSpeed; None where there is none."""
    settings = record["settings"]
    block = settings.get("dualspeed")
    inner = block.get(name) if isinstance(block, Mapping) else None
    return settings.get(name, inner)


def variant_of(record: Record, peers: Sequence[Record]) -> str:
    """Return in words how a record departs from the commonest settings of its arm, for example "keep ratio 0.2"."""
    told = []
    for name, words in _WORDS.items():
        common = statistics.mode(repr(setting(peer, name)) for peer in peers)
        if repr(setting(record, name)) != common:
            told.append(f"{words} {setting(record, name)}")
    return ", ".join(told)


def accuracy(record: Record) -> float:
    """Return the accuracy on full images."""
    return float(record["results"]["accuracy_full"]["accuracy"])


def pruned_accuracy(record: Record) -> float | None:
    """Return the accuracy on pruned images, if it was measured."""
    result = record["results"].get("accuracy_pruned")
    return float(result["accuracy"]) if result else None


def duration(seconds: float) -> str:
    """Return seconds in words of fitting units."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (over n - 1; 0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def settings_table(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return name and value of every setting of the arms; where arms differ, the commonest value and who departs."""
    arms = sorted((record for record in records if record["kind"] == "arm"), key=arm_rank)
    flat = [
        (str(r["results"]["dataset"]), label_of(str(r["results"]["arm"])), flat_settings(r["settings"])) for r in arms
    ]
    names = dict.fromkeys(name for _, _, values in flat for name in values)
    return [(name, _values(name, flat)) for name in names if name not in COMPUTED]


def machine_table(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return name and value of what the records ran on; several values where records differ."""
    hardware = {
        "processor": "cpu", "cores": "cores", "memory (GiB)": "memory_gib", "accelerator": "accelerator",
        "threads": "threads", "system": "system",
    }  # fmt: skip
    rows = [(words, _distinct(record["hardware"].get(key) for record in records)) for words, key in hardware.items()]
    packages = dict.fromkeys(package for record in records for package in record["versions"])
    rows += [(name, _distinct(record["versions"].get(name) for record in records)) for name in packages]
    peaks = [record["peak_memory_mib"] for record in records if record["peak_memory_mib"]]
    rows.append(("peak resident memory", f"{max(peaks):,.0f} MiB" if peaks else ""))
    rows.append(("seeds", _distinct(record["seed"] for record in records)))
    return [(name, value) for name, value in rows if value]


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as words by their names, those of blocks with the block's name and a point before them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flat_settings(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = "–" if value is None or value == {} else _setting(value)
    return flat


def _setting(value: Any) -> str:
    text = str(value)
    return f"{value:.6g}" if isinstance(value, float) and len(text) > 10 else text


def flat_results(results: Any, prefix: str = "") -> dict[str, str]:
    """Return the figures and words of results by their places; long lists and texts are cut short."""
    if isinstance(results, Mapping):
        pairs: list[tuple[str, Any]] = [(str(name), value) for name, value in results.items()]
    elif isinstance(results, list) and any(isinstance(item, (Mapping, list)) for item in results):
        pairs = [(str(number + 1), value) for number, value in enumerate(results[:FIRST])]
    else:
        return {prefix.removesuffix("."): figure(results)}
    flat: dict[str, str] = {}
    for name, value in pairs:
        flat.update(flat_results(value, f"{prefix}{name}."))
    return flat


def figure(value: Any) -> str:
    """Return a figure with four digits, a list in one line, words cut where they are long."""
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        rest = f", ... ({len(value)} in all)" if len(value) > FIRST else ""
        return ", ".join(figure(item) for item in value[:FIRST]) + rest
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}\N{HORIZONTAL ELLIPSIS}"


def arm_rank(record: Record) -> tuple[int, list[tuple[bool, int, str]], str]:
    """Return the main arms first, then the others by name, numbers in it by size."""
    arm = str(record["results"]["arm"])
    parts = [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in arm.split("_")]
    return (ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER), parts, str(record["seed"]))


def _values(name: str, flat: Sequence[tuple[str, str, Mapping[str, str]]]) -> str:
    """Return the value of a setting, by data set where these differ."""
    told = {}
    for dataset in dict.fromkeys(dataset for dataset, _, _ in flat):
        of_set = [(arm, values) for place, arm, values in flat if place == dataset]
        if any(name in values for _, values in of_set):
            told[dataset] = _values_of_set(name, of_set)
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return ". ".join(f"{dataset}: {words}" for dataset, words in told.items())


def _values_of_set(name: str, flat: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Return the commonest value among the arms of one data set, then the others with their arms."""
    arms: dict[str, list[str]] = {}
    for arm, values in flat:
        if name in values and arm not in arms.setdefault(values[name], []):
            arms[values[name]].append(arm)
    common = max(arms, key=lambda value: len(arms[value]))
    everyone = {arm for arm, _ in flat}
    holders = {arm for found in arms.values() for arm in found}
    only = f" ({', '.join(arms[common])})" if holders != everyone and len(holders) <= FEW else ""
    others = [f"{value} ({', '.join(found)})" for value, found in arms.items() if value != common]
    return "; ".join([common + only, *others])


def _distinct(values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))
