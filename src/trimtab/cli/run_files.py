"""What the commands that take a run file share: their options, and how the file is found and read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trimtab.errors import SettingError

if TYPE_CHECKING:
    from trimtab.run.config import RunConfig

JSON = typer.Option(False, "--json", help="Print the record as JSON.")
CONFIG = typer.Option(None, "--config", "-c", help="The run file (YAML); may also stand as the first argument.")


def load(context: typer.Context, config: Path | None) -> RunConfig:
    """Return the settings of the run file, what stands on the command line behind it laid over them."""
    from trimtab.run.config import load_config

    return load_config(*run_file(context, config))


def run_file(context: typer.Context, config: Path | None) -> tuple[Path, list[str]]:
    """Return the run file, and what stands on the command line behind it."""
    rest = list(context.args)
    if config is None:
        if not rest or rest[0].startswith("-"):
            raise SettingError(f"{context.command_path} needs a run file: {context.command_path} --config run.yaml")
        config = Path(rest.pop(0))
    return config, rest
