"""The command that makes a page from records."""

from __future__ import annotations

from pathlib import Path

import typer

from trimtab.cli import show

JSON = typer.Option(False, "--json", help="Print what the page says as JSON.")


def add_to(app: typer.Typer) -> None:
    """Enter the commands of this file."""
    app.command(epilog="Example: trimtab report out-full out --to page.html")(report)


def report(
    directories: list[Path] = typer.Argument(help="Output directories of runs, or folders of records."),
    to: Path = typer.Option(None, help="Where the page goes; report.html in the first directory by default."),
    as_json: bool = JSON,
) -> None:
    """Write one self-contained HTML page from the records of one or several runs."""
    from trimtab.report import page_place, read_report, write_report

    with show.only_json(as_json):
        found = read_report(directories)
        page = write_report(found, page_place(directories[0], to))
    if as_json:
        show.print_json({"page": str(page), **found.to_dict()})
    else:
        print(found.verdict.headline)
        print(f"Report: {page}")
