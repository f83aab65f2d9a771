"""Write the report while a training runs, so that it can be watched in a browser."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trimtab.errors import OutputError
from trimtab.records import make_record, write_record
from trimtab.report import render_report

logger = logging.getLogger("trimtab")

PROGRESS_FILE = "records/progress.json"
"""The record of a training under way, below the output directory."""
REPORT_FILE = "report.html"

_RENDER = """
import sys
from trimtab.errors import TrimtabError
from trimtab.report import render_report
try:
    render_report(*sys.argv[1:])
except TrimtabError as error:
    sys.exit(str(error))
"""


def render_aside(directory: Path) -> None:
    """Write the page of a directory in a process of its own.

    Raises:
        OutputError: The process ended with an error; its last line is told.
    """
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _RENDER, str(directory), str(directory / REPORT_FILE)],
        env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", check=False, start_new_session=True,  # an interrupt of the training does not reach it
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise OutputError(last)


class ReportEvery(TrainerCallback):  # type: ignore[misc]
    """Keeps ``records/progress.json`` and ``report.html`` up to date while a training runs.

    The training loop pays for a copy of the log: the record is written by a thread beside it, the page by a process of
    its own, since the settings of matplotlib belong to the whole process, and the user may draw in it at the same time.
    A report that is due while the last one is being written is left out. What is on the device is not asked for; the
    losses are those that the Trainer has logged. Only the first process writes. A report that cannot be written is one
    warning, and the training goes on.

    Args:
        every: Optimizer steps between two reports; 0 for none but the last of `finish`.
        directory: The output directory.
        settings: Settings of the run, for the record.
        facts: Returns what else the record shall hold; reads nothing from the device.
    """

    def __init__(
        self, every: int, directory: Path, settings: Mapping[str, Any], facts: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self.every, self.directory = every, directory
        self._settings, self._facts = settings, facts
        self._writer: threading.Thread | None = None
        self._warned = False
        self._started = datetime.now(timezone.utc)
        self._began = time.perf_counter()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, also where the Trainer begins anew with smaller batches."""
        self._started, self._began = datetime.now(timezone.utc), time.perf_counter()
        self._first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a report where one is due."""
        if not self.every or state.global_step % self.every or not state.is_world_process_zero or self._busy():
            return
        seconds = time.perf_counter() - self._began
        results = {
            "steps": state.global_step,
            "max_steps": state.max_steps,
            "first_step": self._first_step,
            "seconds_train": round(seconds, 3),
            "log": [dict(entry) for entry in state.log_history],
            **self._facts(),
            "status": "running",
        }
        self._writer = threading.Thread(target=self._write, args=(results, args.seed, seconds), name="trimtab-report")
        self._writer.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for a report that is being written: workers of the next epoch must not be forked beside a thread."""
        self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for a report that is being written."""
        self._wait()

    def finish(self) -> None:
        """Take the record of the running training away, since its own is there now, and write the last report.

        A report that an interrupted part of the run has left behind is written anew also where none is asked for, or it
        would wait for that part for ever.
        """
        self._wait()
        progress = self.directory / PROGRESS_FILE
        left_behind = progress.is_file()
        progress.unlink(missing_ok=True)
        if self.every or left_behind:
            self._try(self._render)

    def _busy(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, results: Mapping[str, Any], seed: int, seconds: float) -> None:
        def both() -> None:
            record = make_record("progress", self._settings, results, seed=seed, started=self._started, seconds=seconds)
            write_record(self.directory / PROGRESS_FILE, record)
            render_aside(self.directory)

        self._try(both)

    def _render(self) -> None:
        render_report(self.directory, self.directory / REPORT_FILE)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a full disk or a broken record must not end the training
            if not self._warned:
                self._warned = True
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                logger.warning("The report cannot be written (%s: %s).", type(error).__name__, reason)
