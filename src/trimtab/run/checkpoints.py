"""Checkpoints of a Trainer in an output directory, and going on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
"""What a Trainer writes last into a checkpoint."""


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
        return isinstance(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def train_from(trainer: Any, checkpoint: Path | None) -> None:
    """Train, or go on from a checkpoint; where that was the last one of the run, only load it.

    A Trainer that resumes from its own last checkpoint takes one step too many before it notices that it has come
    to the end.

    Args:
        trainer: A Trainer of transformers, with the settings of the interrupted run.
        checkpoint: From `last_checkpoint`, or None to start.
    """
    from transformers import TrainerState

    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if sharded or not 0 < state.max_steps <= state.global_step:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
