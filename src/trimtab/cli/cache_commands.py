"""The command that makes a cache of the frozen vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from trimtab.cli import show

JSON = typer.Option(False, "--json", help="Print the record as JSON.")


def add_to(app: typer.Typer) -> None:
    """Enter the command of this file."""
    example = "trimtab cache run.yaml features --kind features --dtype bfloat16"
    app.command("cache", epilog=f"Then train with `dualspeed: {{cache_from: features}}`.\n\nExample: {example}")(cache)


def cache(
    config: Path = typer.Argument(help="The run file (YAML)."),
    out: Path = typer.Argument(help="Folder of the cache; one that is there is completed."),
    kind: str = typer.Option("features", help="features, kept (tokens of fast steps) or indices (the choice alone)."),
    dtype: str = typer.Option("bfloat16", help="Number format of stored states: float32, bfloat16 or float16."),
    on_stale: str = typer.Option("error", help="What to do with a cache of something else: error or rebuild."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say how large it would be."),
    as_json: bool = JSON,
) -> None:
    """Run the frozen vision tower over all images once, so that training need not do it again.

    Says first how large the cache will be. Go on after a break with the same command.
    """
    from trimtab.run.cache import cache as run
    from trimtab.run.config import load_config

    def announce(told: Mapping[str, Any]) -> None:
        show.print_settings("Cache", {name: _words(name, value) for name, value in told.items()})

    with show.only_json(as_json), show.progress_bar("rows") as progress:
        record = run(
            load_config(config), out, kind=kind, dtype=dtype, on_stale=on_stale,  # type: ignore[arg-type]  # checked there
            dry_run=dry_run, announce=announce, progress=progress,
        )  # fmt: skip
    if as_json:
        show.print_json(record)
    elif not dry_run:
        names = ("images_found", "made", "broken", "written")
        show.print_settings("Made", {name: _words(name, record["results"][name]) for name in names})


def _words(name: str, value: Any) -> Any:
    if name not in ("bytes_per_image", "bytes", "present", "free", "written"):
        return value
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
