"""Checkpoints of a Trainer in an output directory."""

from __future__ import annotations

import json
from pathlib import Path


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that is whole.

    A Trainer writes ``trainer_state.json`` after everything else, so a checkpoint without it (or with half of it) is
    one whose writing was interrupted. Such a one is passed over; the run then writes it anew.

    Args:
        folder: Output directory of a Trainer; need not exist.

    Returns:
        The folder ``checkpoint-<step>`` of the highest step, or None where there is none.
    """
    steps = {step: path for path in Path(folder).glob("checkpoint-*") if (step := step_of(path)) is not None}
    return next((steps[step] for step in sorted(steps, reverse=True) if _whole(steps[step])), None)


def step_of(checkpoint: Path) -> int | None:
    """Return the step in the name of a checkpoint, or None where it is no such name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def _whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
