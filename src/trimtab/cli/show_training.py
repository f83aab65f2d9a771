"""How a training looks: a table before it, a bar or lines while it runs, a table of what came out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trimtab.cli import show
from trimtab.run.progress import ProgressLines, duration_text, live, no_other_bars, plain_output, rate_text

if TYPE_CHECKING:
    from trimtab.run.train_progress import Figures, TrainView

REPORT_FILE = "report.html"
"""Page of a run, below its output directory."""


@contextmanager
def watch(stream: IO[str] | None = None) -> Iterator[TrainView | None]:
    """Show a training on stderr; yields None in all processes but the first, which show nothing.

    Args:
        stream: Another place than stderr.
    """
    if not show.first_process():
        yield None
        return
    with ExitStack() as open_things:
        yield training_view(stream or sys.stderr, open_things)


def training_view(stream: IO[str], open_things: ExitStack) -> TrainView:
    """Return a view that draws on a terminal and writes lines elsewhere.

    Args:
        stream: Where to.
        open_things: Closed by the caller when all is over, also after an error.
    """
    from trimtab.run.train_progress import TrainView

    plain = plain_output(stream)
    if plain:
        open_things.enter_context(no_other_bars())

    class Shown(TrainView):
        """Draws a bar from the first step to the last, and writes lines before and after."""

        def __init__(self) -> None:
            self.figures: Figures | None = None
            self.bar: ExitStack | None = None
            self.lines = plain

        def phase(self, name: str) -> None:
            self._close()
            _say(stream, name)

        def begin(self, facts: Mapping[str, Any], figures: Figures, *, bar: bool) -> None:
            print_facts(facts, stream)
            self.figures, self.lines = figures, plain or not bar
            if not self.lines:
                self.bar = open_things.enter_context(ExitStack())
                self.bar.enter_context(live(self.draw, stream))
                open_things.callback(self._close)  # an error or Ctrl-C is no reason to say "training" for ever

        def step(self, figures: Figures) -> None:
            self.figures = figures
            if self.lines and figures.phase != "training":
                _say(stream, f"{figures.phase} at step {figures.step:,}")

        def log(self, figures: Figures) -> None:
            self.figures = figures
            if self.lines:
                _say(stream, ", ".join([f"step {figures.step:,} of {figures.steps:,}", *figures.words()]))

        def draw(self) -> ProgressLines:
            assert self.figures is not None, "drawn before the training began"
            return training_lines(self.figures)

        def _close(self) -> None:
            if self.bar is not None and self.figures is not None:
                through = self.figures.step >= self.figures.steps
                self.figures = replace(self.figures, phase="trained" if through else "stopped")
                self.bar.close()
                self.bar = None

    return Shown()


def training_lines(figures: Figures) -> ProgressLines:
    """Return what stands at the foot of the terminal while a model trains."""
    return ProgressLines(figures.phase, figures.step, figures.steps, figures.words())


def print_facts(facts: Mapping[str, Any], stream: IO[str]) -> None:
    """Print the table before the first step: framed on a terminal, aligned text elsewhere."""
    show.print_settings("Training", facts, stream)


def _say(stream: IO[str], words: str) -> None:
    print(f"trimtab: {words}", file=stream, flush=True)


# what came out -------------------------------------------------------------------------------------------------------


def print_outcome(record: Mapping[str, Any], output: str) -> None:
    """Print what a training came to, where everything lies, and what may be done next.

    Args:
        record: Its record, kind "train".
        output: The output directory, as the user named it.
    """
    show.print_settings("Trained", {**_outcome(record["results"]), **_places(Path(output))})
    page = Path(output) / REPORT_FILE
    print("Next:")
    for command in (
        f"trimtab eval --config {output}/resolved.yaml",
        f"trimtab export {output} {output.rstrip('/')}-exported",
        *(() if page.exists() else (f"trimtab report {output}",)),
    ):
        print(f"  {command}")


def _outcome(results: Mapping[str, Any]) -> dict[str, Any]:
    seconds, samples = results["seconds_train"], results["samples"]
    found = {
        "steps": results["steps"],
        "time": duration_text(seconds),
        "samples": f"{samples:,}" + (f" ({rate_text(samples / seconds, 'sample')})" if samples and seconds else ""),
        "modes": mode_words(results.get("metrics") or {}),
        "loss, mean of the run": results["loss"],
        **_last_losses(results["log"]),
        "bad rows skipped": results["rows_skipped"] or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def mode_words(metrics: Mapping[str, Any]) -> str | None:
    """Return how many steps were fast and slow, or samples where each has its mode; None where nothing was counted."""
    unit = "samples" if metrics.get("samples_fast") or metrics.get("samples_slow") else "steps"
    fast, slow = metrics.get(f"{unit}_fast", 0), metrics.get(f"{unit}_slow", 0)
    if not fast + slow:
        return None
    return f"{fast / (fast + slow):.1%} fast, {slow / (fast + slow):.1%} slow ({fast:,} and {slow:,} {unit})"


def _last_losses(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the losses of the last log that had them."""
    names = {"ce_fast": "CE fast, last", "ce_slow": "CE slow, last", "kl": "KL, last", "eval_loss": "eval loss, last"}
    found = {}
    for name, title in names.items():
        values = [entry[name] for entry in log if name in entry]
        if values:
            found[title] = values[-1]
    return found


def _places(output: Path) -> dict[str, str]:
    page = output / REPORT_FILE
    return {
        "checkpoint": str(output),
        "record": str(output / "records" / "train.json"),
        **({"report": str(page)} if page.exists() else {}),
    }
