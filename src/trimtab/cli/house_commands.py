"""Commands that need no run file: quickstart, methods, validate-data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from trimtab.cli import show

JSON = typer.Option(False, "--json", help="Print the record as JSON.")


def add_to(app: typer.Typer) -> None:
    """Enter the commands of this file."""
    app.command(epilog="Example: trimtab quickstart --out quickstart-out --seed 1")(quickstart)
    app.command(epilog="Example: trimtab methods dualspeed")(methods)
    app.command(epilog="Example: trimtab validate-data train.jsonl --image-folder images")(validate_data)


def methods(
    name: str = typer.Argument(None, metavar="[NAME]", help="Show the whole card of one method."),
    as_json: bool = JSON,
    markdown: bool = typer.Option(False, "--markdown", help="Print the table of the README."),
) -> None:
    """List every method: what gets smaller, paper, entry, cost."""
    from trimtab.cards import all_cards, find_card, markdown_table

    with show.only_json(as_json):
        cards = [find_card(name)] if name else all_cards()
    if as_json:
        show.print_json(cards[0].to_dict() if name else [card.to_dict() for card in cards])
    elif markdown:
        print(markdown_table(cards))
    elif name:
        card = cards[0]
        shown = {key.replace("_", " "): value for key, value in card.to_dict().items() if key not in ("name", "title")}
        show.print_settings(f"{card.title} ({card.name})", shown)
    else:
        columns = ("method", "gets smaller", "entry", "cost", "paper")
        show.print_table("Methods", columns, [(c.name, c.gets_smaller, c.entry, c.cost, c.paper) for c in cards])


def validate_data(
    files: list[Path] = typer.Argument(help="JSON or JSON-lines files in any known layout."),
    image_folder: Path = typer.Option(None, help="Folder that relative image paths start from."),
    limit: int = typer.Option(None, min=1, help="Look at the first rows only."),
    as_json: bool = JSON,
) -> None:
    """Read every row and open every image; report what is wrong, with row numbers."""
    from trimtab.data import validate_rows

    reports = []
    for file in files:
        with show.only_json(as_json), show.progress_bar(f"rows of {file.name}") as progress:
            reports.append(validate_rows(file, image_folder=image_folder, limit=limit, progress=progress))
    if as_json:
        show.print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            _print_validation(report.to_dict())
    if not all(report.sound for report in reports):
        raise typer.Exit(2)


def _print_validation(report: dict[str, Any]) -> None:
    problems = report.pop("problems")
    show.print_settings(report.pop("name"), report)
    if problems:
        columns = (report["counting"], "kind", "problem")
        show.print_table("Problems", columns, [tuple(problem.values()) for problem in problems])


def quickstart(
    out: Path = typer.Option(Path("quickstart-out"), help="Where models, records and the page go."),
    seed: int = typer.Option(0, min=0, help="Seed of data, weights and schedule."),
    steps: int = typer.Option(None, min=1, help="Training steps per arm; the default is chosen to converge."),
    threads: int = typer.Option(None, min=1, help="CPU threads; all cores by default."),
    as_json: bool = JSON,
) -> None:
    """Train, compare, evaluate and report on data made on the spot; no download, no GPU.

    Run it again to continue an interrupted run.
    """
    from trimtab.quickstart.run import quickstart as run

    with show.only_json(as_json):
        record = run(out=out, seed=seed, steps=steps, threads=threads)
    if as_json:
        show.print_json(record)
