"""The page of one or several runs: what came out, where the time went, what was pruned, and how to make it again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import OutputError
from trimtab.files import write_text_atomic
from trimtab.report import figures, memory, rows, tables
from trimtab.report.blocks import Section, Table
from trimtab.report.drawing import clean
from trimtab.report.overlays import overlays_of
from trimtab.report.rows import Record
from trimtab.report.runs import Run, by_dataset, find_runs
from trimtab.report.sources import Given, Source, commands_of, load_sources, report_command
from trimtab.report.verdict import Verdict, judge

TITLE = "trimtab: training on pruned visual tokens"
PAGE_FILE = "report.html"
RELOAD_SECONDS = 15
"""A page of a training under way reloads itself after so many seconds."""

_BEGIN = "<!doctype html>"


@dataclass(frozen=True)
class Report:
    """What a page says, before it is written.

    Attributes:
        sources: Where the records come from.
        runs: The trainings among them.
        verdict: What stands first.
    """

    sources: tuple[Source, ...]
    runs: tuple[Run, ...]
    verdict: Verdict

    @property
    def records(self) -> list[Record]:
        """All records, in the order of their sources."""
        return [record for source in self.sources for record in source.records]

    def to_dict(self) -> dict[str, Any]:
        """Return what the page says as plain numbers and words."""
        return {
            "headline": self.verdict.headline,
            **self.verdict.facts,
            "missing": [dict(one) for one in self.verdict.missing],
            "caveats": list(self.verdict.caveats),
            "runs": [_told(run) for run in self.runs],
            "records": len(self.records),
            "command": report_command(self.sources) or None,
        }


def read_report(given: Given) -> Report:
    """Read records and judge them, without writing anything.

    Args:
        given: Records, a directory that holds them, or several directories.

    Returns:
        What a page of them says.

    Raises:
        DataError: A directory holds no record or a broken one, or an arm lacks what the page needs.
    """
    sources = load_sources(given)
    records = [record for source in sources for record in source.records]
    runs = find_runs(sources)
    floors = {name: rows.baselines(records, name) for name in by_dataset(runs)}
    return Report(tuple(sources), tuple(runs), judge(runs, floors))


def render_report(given: Given, out_path: str | os.PathLike[str], *, title: str = TITLE) -> Path:
    """Write the page of one or several runs: one HTML file with everything inside, without scripts or outside sources.

    The same records give the same page, byte for byte. As long as a training is under way (a record of kind
    "progress"), its page reloads itself.

    Args:
        given: Records, a directory that holds them, or several directories. Kinds "arm", "train" and "progress" make
            tables and charts, "dataset" the lines that a model without eyes would reach, "pictures" the overlays;
            others are listed with their figures.
        out_path: The HTML file.
        title: Small heading above the main line, and the name of the page.

    Returns:
        The path of the page.

    Raises:
        DataError: No record, a broken one, or an arm without what the page needs.
        OutputError: The page cannot be written, or something that is no page would be lost.
    """
    return write_report(read_report(given), out_path, title=title)


def write_report(report: Report, out_path: str | os.PathLike[str], *, title: str = TITLE) -> Path:
    """Write the page of a report that was read; see `render_report`.

    Raises:
        OutputError: The page cannot be written, or something that is no page would be lost.
    """
    places = [source.name for source in report.sources for _ in source.records] if len(report.sources) > 1 else []
    overlays, left_out = overlays_of(report.records, places)
    differ, alike = tables.settings_tables(report.runs) if report.runs else (None, None)
    moving = report.verdict.facts["running"]
    as_of = max((one["written"] for one in moving if one["written"]), default="")
    return write_page(
        "page.html", out_path, report.records, page_title=title, verdict=report.verdict,
        sections=_sections(report), overlays=overlays, left_out=left_out,
        picture_commands=commands_of(record for record in report.records if record["kind"] == "pictures"),
        conditions=[table for table in (differ, alike, tables.machine_table(report.records)) if table is not None],
        page_command=report_command(report.sources), reload=RELOAD_SECONDS if moving else None,
        as_of=as_of.replace("T", " ").replace("+00:00", " UTC"),
    )  # fmt: skip


def page_place(directory: str | os.PathLike[str], to: str | os.PathLike[str] | None = None) -> Path:
    """Return where a page goes: where it is asked for, in a directory that was named, or beside the first records."""
    place = Path(directory) if to is None else Path(to)
    return place / PAGE_FILE if to is None or place.is_dir() else place


def write_page(template: str, out_path: str | os.PathLike[str], records: Sequence[Record], **content: Any) -> Path:
    """Fill a template of this folder with what every page shows, and write it whole or not at all.

    Raises:
        OutputError: The page cannot be written, or something that is no page would be lost.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    path = Path(out_path)
    _refuse_foreign(path)
    environment = Environment(
        loader=PackageLoader("trimtab.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    text = environment.get_template(template).render(style=style, footer=_footer(records), **content)
    write_text_atomic(path, clean(text))
    return path


def _refuse_foreign(path: Path) -> None:
    """Refuse to replace a file that is no page: a slip of the hand must not cost a checkpoint."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        begin = stream.read(64).lstrip()
    if begin and not begin.lower().startswith(_BEGIN.encode()):
        raise OutputError(f"{path} is no HTML page and would be lost. Give another file for the page.")


def _sections(report: Report) -> list[Section]:
    sections = [
        _section(dataset, runs, rows.baselines(report.records, dataset))
        for dataset, runs in by_dataset(report.runs).items()
    ]
    others = tables.other_tables(report.records, report.runs)
    return [*sections, *([Section("Other records", folded=others)] if others else [])]


def _section(dataset: str, runs: Sequence[Run], floor: Mapping[str, float]) -> Section:
    judged = any(run.accuracy is not None for run in runs)
    drawn = [
        figures.accuracy_figure(runs, floor, dataset),
        *figures.loss_figures(runs, dataset),
        *figures.step_figures(runs, dataset),
        figures.token_figure(runs, dataset),
        memory.memory_figure(runs, dataset),
        figures.family_figure(runs, dataset),
    ]
    wrong = tables.wrong_answers(runs, dataset)
    folded: list[Table] = [wrong] if wrong else []
    return Section(
        f"Results on {dataset}" if judged else f"Training for {dataset}",
        [tables.comparison(runs, floor, dataset)],
        [figure for figure in drawn if figure is not None],
        folded,
        () if judged else ("Not evaluated yet.",),
    )


def _footer(records: Sequence[Record]) -> str:
    commits = {f"{c['hash'][:12]}{' with local changes' * c['dirty']}": None for r in records if (c := r["commit"])}
    told = [f"{len(records)} records", *(f"commit {words}" for words in commits)]
    made = records[0]["versions"].get("trimtab", "")
    return f"{', '.join(told)}, started {records[0]['started'][:10]}. Written by trimtab {made}".rstrip() + "."


def _told(run: Run) -> dict[str, Any]:
    return {
        "name": run.name, "arm": run.arm, "dataset": run.dataset, "source": run.source or None, "seed": run.seed,
        "status": "running" if run.running else "finished", "seconds_train": run.seconds, "steps": run.steps,
        "samples": run.samples, "accuracy": run.accuracy, "interval": list(run.interval) if run.interval else None,
        "accuracy_pruned": run.pruned_accuracy, "peak_memory_mib": run.peak, "peak_is_of_process": not run.own_peak,
    }  # fmt: skip
