"""Records of `trimtab bench training` as tables, for the command line and for the page on speed in the documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import DataError
from trimtab.files import write_text_atomic
from trimtab.report.rows import Record

KIND = "bench_training"
BEGIN = "<!-- records: made by `python bench/training.py --page`; a test compares -->"
END = "<!-- /records -->"

_PARTS = ("tower", "pruner", "decoder", "head", "optimizer", "assembly")
_CURVES = {"keep": "keep ratio", "text": "mean text tokens", "tiles": "tiles per sample", "ranks": "ranks"}
_SCHEMES = {
    "full": "full rows", "lock_step": "one mode for all ranks", "independent": "each rank its own mode",
    "per_sample": "a mode for every sample, in packs",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table in words.

    Attributes:
        title: Line above it.
        columns: Headings.
        rows: Cells.
        notes: Sentences below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def training_tables(record: Record) -> list[Table]:
    """Return what a record of `bench training` says: time, parts, memory and curves.

    Args:
        record: Of kind ``"bench_training"``.

    Raises:
        DataError: It is of another kind.
    """
    if record["kind"] != KIND:
        raise DataError(
            f"A record of kind {record['kind']!r} came, but the page on speed shows those of kind {KIND!r}."
        )
    makers: list[Callable[[Record], list[Table]]] = [_time, _parts, _memory, _curves]
    return [table for make in makers for table in make(record)]


def markdown(table: Table) -> list[str]:
    """Return a table as lines of Markdown."""
    lines = [f"**{table.title}**", "", f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return [*lines, "", *(line for note in table.notes for line in (note, ""))]


def speed_lines(records: Sequence[Record]) -> list[str]:
    """Return what stands between the marks of the page: a heading and tables for each record, in the order given."""
    lines = [""]
    for record in records:
        lines += [f"### {_heading(record)}", "", _machine(record), ""]
        lines += [line for table in training_tables(record) for line in markdown(table)]
    return lines


def write_speed_page(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Replace what stands between the marks of the page.

    Args:
        path: The page.
        records: Records of `bench training`.

    Raises:
        DataError: The page has no marks, or a record is of another kind.
    """
    text = Path(path).read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise DataError(f"{path} lacks the marks between which the tables stand: {BEGIN} and {END}.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text_atomic(path, "\n".join([before + BEGIN, *speed_lines(records), END + after]))


def _time(record: Record) -> list[Table]:
    results = record["results"]
    columns = (
        "way to train", "ms per sample", "times faster than the public recipe", "predicted",
        "than the public recipe, packed", "predicted", "time over its floor",
    )  # fmt: skip
    rows = [
        (
            row["title"], _number(1000 * row["seconds_per_sample"]), _spread(row.get("times_public")),
            _number(row.get("predicted_public")), _spread(row.get("times_packed")),
            _number(row.get("predicted_packed")), _spread(row.get("over_floor")),
        )
        for row in results["rows"]
    ]  # fmt: skip
    notes = [
        "Medians over rounds, quartiles in brackets; ratios are taken within a round. The floor is the time of a way's "
        "operations at the rate at which full packed rows without recomputation run."
    ]
    pads = results["padding"]
    notes.append(
        f"A padded batch has {pads['full']:.2f} places for each real one on full rows, {pads['fast']:.2f} on pruned "
        "ones."
    )
    share, asked = results.get("slow_share"), record["settings"]["slow_ratio"]
    if share is not None and abs(share - asked) > 1e-6:
        notes.append(
            f"Of the samples with a mode of their own {share:.3g} were slow, as near to {asked:g} as an update of "
            f"{record['settings']['shape']['samples']} samples comes; the last line but two is for that share."
        )
    if results["out_of_memory"]:
        notes.append(f"Out of memory: {', '.join(results['out_of_memory'])}.")
    summary = results["summary"]
    told = {
        "ours_over_public": "the public recipe", "ours_over_public_packed": "the same given packing",
        "ours_over_public_packed_kept": "the same given packing and no recomputation",
        "ours_over_released": "DualSpeed as released",
    }  # fmt: skip
    ratios = [f"{_spread(summary[name])} than {words}" for name, words in told.items() if summary.get(name)]
    if ratios:
        notes.insert(0, f"trimtab is faster by: {'; '.join(ratios)}.")
    return [Table(f"Time, {record['settings']['size']}", columns, rows, tuple(notes))]


def _parts(record: Record) -> list[Table]:
    arms = [arm for arm in record["results"]["arms"] if "shares" in arm]
    if not arms:
        return []
    rows = [
        (
            _arm(arm["name"]),
            *(_shares(arm["shares"][part], arm["predicted_shares"].get(part)) for part in _PARTS),
            _number(arm["split_over_timed"]),
        )
        for arm in arms
    ]
    note = (
        "Measured share of the time, in brackets that of the operations. The last column is the sum of the parts, "
        "taken in a pass of its own, over the time of the whole."
    )
    return [Table("Where the time goes", ("arm", *_PARTS, "sum"), rows, (note,))]


def _memory(record: Record) -> list[Table]:
    found = record["results"]["memory"]
    if not found:
        return []
    rows = [
        (
            _arm(one["arm"]), str(one["rows"]), f"{one['tokens']:,}", f"{one['peak_mib']:,.0f}",
            f"{one['held_mib']:,.0f}", f"{one['largest']:,}",
        )
        for one in found
    ]  # fmt: skip
    budget = found[0]["budget_gib"]
    columns = ("arm", "rows", "tokens", "peak MiB", "held MiB", f"rows that fit {budget:.0f} GiB")
    note = (
        "Peak of one forward and backward pass, gradients included, beyond the weights and the optimizer's moments, "
        f"which are held all the time. Rows that fit are of mean length: {found[0]['method']}."
    )
    return [Table("Memory", columns, rows, (note,))]


def _curves(record: Record) -> list[Table]:
    tables = []
    for name, points in record["results"]["curves"].items():
        if name == "ranks":
            rows = [(str(point["value"]), *(_number(1000 * point[scheme]) for scheme in _SCHEMES)) for point in points]
            columns = (_CURVES[name], *(f"{words}, ms per sample" for words in _SCHEMES.values()))
            note = "Simulated: a step takes as long as its slowest rank, with the measured cost of a token."
            tables.append(Table("Cost against ranks", columns, rows, (note,)))
            continue
        rows = [
            (_number(point["value"]), _number(1000 * point["seconds_per_sample"]), _spread(point),
             _number(point["predicted"]))
            for point in points
        ]  # fmt: skip
        columns = (
            _CURVES[name],
            "ms per sample",
            "times faster than packed full rows, nothing recomputed",
            "predicted",
        )
        tables.append(Table(f"Cost against {_CURVES[name]}", columns, rows))
    return tables


def _heading(record: Record) -> str:
    settings = record["settings"]
    shape = settings["shape"]
    visual = shape["tiles"] * (shape["image_size"] // shape["patch_size"]) ** 2
    return f"{settings['size']}: {visual:,} visual tokens, {shape['text_mean']:g} words, {shape['layers']} blocks"


def _machine(record: Record) -> str:
    settings, hardware, versions = record["settings"], record["hardware"], record["versions"]
    place = (
        hardware["accelerator"]
        if settings["device"] != "cpu"
        else f"{hardware['cpu']}, {settings['threads']} thread(s)"
    )
    return (
        f"{place}; {settings['dtype']}, {settings['attention']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; keep ratio {settings['keep_ratio']}, slow ratio {settings['slow_ratio']}, "
        f"{settings['repeats']} rounds, seed {record['seed']}."
    )


def _arm(name: str) -> str:
    return f"`{name}`"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _spread(value: Mapping[str, float] | None) -> str:
    if not value:
        return "–"
    middle = value["median"] if "median" in value else value["speedup"]
    return f"{middle:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def _shares(measured: float, predicted: float | None) -> str:
    return f"{measured:.0%}" if predicted is None else f"{measured:.0%} ({predicted:.0%})"
