"""How long steps take, by mode, in the Trainer's log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Adds to every entry of the log the mean seconds per optimizer step since the one before.

    ``seconds_fast`` and ``seconds_slow`` are those of steps of one mode, ``seconds`` those of plain steps and of steps
    in which both modes meet, ``seconds_data`` is the wait for the next batch. Evaluation and the writing of checkpoints
    are in none of them. On CUDA the times are the device's own, between events that are read when the Trainer logs, so
    that no step waits for the host. The last entry of a resumed training also has ``first_step``, the step at which it
    went on: its time is that of this part.

    Args:
        handle: That of DualSpeed, or None for plain training.
    """

    def __init__(self, handle: Any = None) -> None:
        self._handle = None if handle is None or handle.config.prunes_nothing else handle
        self._spans: list[tuple[str, Any, Any]] = []
        self._start: Any = None
        self._end: Any = None
        self._counts: Mapping[str, int] = {}
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew, also where the Trainer does so with smaller batches."""
        self._spans, self._end = [], None
        self._first_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the start of a step, the batch being there."""
        self._start = _mark(args)
        self._counts = self._modes()
        if self._end is not None:
            self._spans.append(("seconds_data", self._end, self._start))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of a step."""
        self._end = _mark(args)
        self._spans.append((self._name(), self._start, self._end))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Put the means into the entry, and begin anew."""
        found: dict[str, list[float]] = {}
        for name, start, end in self._spans:
            found.setdefault(name, []).append(_seconds(start, end))
        self._spans = []
        means: dict[str, float] = {name: round(sum(values) / len(values), 6) for name, values in found.items()}
        if self._first_step and logs is not None and "train_runtime" in logs:
            means["first_step"] = self._first_step
        if logs is not None:
            logs.update(means)
        if state.log_history:
            state.log_history[-1].update(means)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation out."""
        self._end = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the writing of a checkpoint out."""
        self._end = None

    def _name(self) -> str:
        before, after = self._counts, self._modes()
        grown = [mode for mode, count in after.items() if count > before.get(mode, 0)]
        return f"seconds_{grown[0]}" if len(grown) == 1 else "seconds"

    def _modes(self) -> dict[str, int]:
        """Return how many steps of each mode there were; none where every sample has its own."""
        return {} if self._handle is None else dict(self._handle.state_dict()["steps"])


def _mark(args: Any) -> Any:
    """Return this moment: on the device's own clock where it has one, else on the host's."""
    if args.device.type != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
