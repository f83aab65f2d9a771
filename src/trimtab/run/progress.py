"""How far long work is: its pace, when it will end, and how that looks, as a bar on a terminal and as lines elsewhere.

A bar is for eyes only: it goes to a terminal, never into a file, a pipe or the log of a build server.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

WINDOW = 60.0
"""Seconds that a pace looks back."""
LEAST_MARKS = 20
"""Marks that a pace keeps however old they are: steps may take longer than the window."""
SPACING = 0.25
"""Least seconds between two marks that are kept."""
PLAIN_INTERVALS = (10.0, 60.0)
"""Seconds between two lines about the same work where output is no terminal: at its beginning, and in the long run."""
BAR_WIDTHS = (8, 30)
"""Narrowest and widest bar, in columns."""
HUB_BARS_OFF = "HF_HUB_DISABLE_PROGRESS_BARS"
"""Variable by which transformers' hub library is told to draw no bars."""


def plain_output(stream: IO[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether to write lines without control characters: no terminal, a dumb one, or a build server (``CI``)."""
    if environment.get("CI", "").lower() not in ("", "0", "false"):
        return True
    return environment.get("TERM", "").lower() in ("dumb", "unknown") or not stream.isatty()


class Pace:
    """How fast counters rise, over the recent past.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, tuple[float, ...]]] = deque()
        self._last: tuple[float, tuple[float, ...]] | None = None

    def mark(self, *counters: float) -> None:
        """Note where the counters are now, always equally many; the first is what `seconds_left` goes by."""
        now = self._clock()
        self._last = (now, counters)
        if self._marks and now - self._marks[-1][0] < SPACING:
            return
        self._marks.append(self._last)
        while len(self._marks) > LEAST_MARKS and now - self._marks[0][0] > WINDOW:
            self._marks.popleft()

    def per_second(self, counter: int = 0) -> float | None:
        """Return how much a counter rises per second, or None where nothing is known or nothing moves."""
        if self._last is None:
            return None
        (began, first), (now, last) = self._marks[0], self._last
        risen = last[counter] - first[counter]
        return risen / (now - began) if now > began and risen > 0 else None

    def seconds_left(self, total: float) -> float | None:
        """Return how long the first counter will take to `total` at this pace, or None where nothing is known."""
        rate = self.per_second()
        if rate is None or self._last is None:
            return None
        return max(0.0, total - self._last[1][0]) / rate


def duration_text(seconds: float) -> str:
    """Return seconds as minutes and seconds (``0:25``), with hours and days where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate_text(per_second: float, one: str) -> str:
    """Return a rate of things in three digits: ``2.31 steps/s``, or ``12.3 s/step`` where one takes over 2 seconds."""
    if per_second < 0.5:
        return f"{_three(1 / per_second)} s/{one}"
    return f"{_three(per_second)} {one}s/s"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def end_text(seconds_left: float, now: datetime | None = None) -> str:
    """Return what is left and at what time it will be done; with the day where that is another one."""
    now = now or datetime.now()
    end = now + timedelta(seconds=seconds_left)
    form = "%H:%M:%S" if end.date() == now.date() else "%Y-%m-%d %H:%M"
    return f"{duration_text(seconds_left)} left, ends {end.strftime(form)}"


class ProgressLines:
    """A label, a bar, a count and figures, laid out in as many lines as the width of the terminal asks for.

    Args:
        label: What is being done.
        done: How much of it.
        total: How much there is; None draws no bar.
        parts: Figures, the most important first; none is ever cut or left out.
        label_width: Columns of the label, so that bars below one another stand in line.
    """

    def __init__(self, label: str, done: int, total: int | None, parts: Sequence[str], label_width: int = 0) -> None:
        self.label, self.done, self.total, self.parts, self.label_width = label, done, total, parts, label_width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw it."""
        from rich.text import Text

        width = options.max_width - 1  # some terminals wrap a line that is full
        count = "" if self.total is None else f" {self.done:,}/{self.total:,}"
        label = self.label.rjust(self.label_width) if self.label_width + len(count) + 12 < width else self.label
        least, most = BAR_WIDTHS
        room = width - len(label) - len(count) - 1
        beside = sum(len(part) + 2 for part in self.parts)
        one_line = room - beside >= least
        bar = 0 if self.total is None or room < least else min(most, room - beside if one_line else room)
        head = Text(label, style="bold", no_wrap=False)
        if bar:
            head.append(" ", style="not bold").append(self._bar(bar, options.ascii_only))
        head.append(count, style="not bold")
        if one_line:
            yield head.append("".join(f"  {part}" for part in self.parts), style="not bold")
            return
        yield head
        yield from (Text(line) for line in _lines_of(self.parts, width))

    def _bar(self, width: int, ascii_only: bool) -> Text:
        from rich.text import Text

        total = self.total or 0
        filled = width if self.done >= total else width * self.done // total
        full, rest = ("#", "-") if ascii_only else ("━", "─")
        colour = "not bold green" if filled == width else "not bold cyan"
        return Text(full * filled, style=colour).append(rest * (width - filled), style="not bold bright_black")


def _lines_of(parts: Sequence[str], width: int) -> list[str]:
    """Put parts behind one another, and into the next line where the width is used up."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return lines


class Work:
    """Pieces of work, each with its pace and expected end; call it with the name of a piece, done and total.

    Args:
        write: Takes a plain line about a piece; None where a bar is drawn instead.
        clock: Returns seconds.
    """

    def __init__(self, write: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._pieces: dict[str, _Piece] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Note how far a piece is; one that was through and begins again is a new one."""
        piece = self._pieces.get(what)
        if piece is None or done < piece.done:
            self._pieces.pop(what, None)  # else it would keep its old place among the others
            piece = self._pieces[what] = _Piece(self._clock)
        piece.move(done, total)
        if self._write is not None and piece.worth_a_line():
            self._write(f"trimtab: {what}: {', '.join([piece.count(), *piece.parts()])}")

    def note(self, what: str, parts: Sequence[str]) -> None:
        """Set the figures that stand behind the pace of a piece; they are told with its next line."""
        if what not in self._pieces:
            self._pieces[what] = _Piece(self._clock)
        self._pieces[what].figures = tuple(parts)

    def lines(self) -> list[ProgressLines]:
        """Return what to draw, one entry per piece in the order of their beginning."""
        pieces = list(self._pieces.items())
        widest = max((len(what) for what, _ in pieces), default=0)
        return [ProgressLines(what, one.done, one.total, one.parts(), widest) for what, one in pieces]


class _Piece:
    """One piece of work."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.done, self.total = 0, None  # type: int, int | None
        self.figures: tuple[str, ...] = ()
        self._clock, self._pace = clock, Pace(clock)
        self._began = self._told = clock()
        self._ended: float | None = None

    def move(self, done: int, total: int | None) -> None:
        """Note how far it is."""
        self.done, self.total = done, total
        self._pace.mark(done)
        if self._finished() and self._ended is None:
            self._ended = self._clock()

    def count(self) -> str:
        """Return how much is done, in words."""
        return f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"

    def parts(self) -> list[str]:
        """Return pace and expected end, or the time that it took, and the figures."""
        if self.total is None:
            return [f"getting ready, {duration_text(self._clock() - self._began)}", *self.figures]
        if self._ended is not None:
            return [f"done in {duration_text(self._ended - self._began)}", *self.figures]
        rate, left = self._pace.per_second(), self._pace.seconds_left(self.total)
        pace = [] if rate is None or left is None else [_bare_rate(rate), end_text(left)]
        return [*pace, *self.figures]

    def worth_a_line(self) -> bool:
        """Whether enough time has passed since the last line, or this is the end."""
        now = self._clock()
        first, last = PLAIN_INTERVALS
        if self._finished() or now - self._told >= min(last, max(first, (now - self._began) / 6)):
            self._told = now
            return True
        return False

    def _finished(self) -> bool:
        return self.total is not None and self.done >= self.total


def _bare_rate(per_second: float) -> str:
    return f"{_three(per_second)}/s" if per_second >= 0.5 else f"{_three(1 / per_second)} s each"


@contextmanager
def show_work(*, keep: bool = True, stream: IO[str] | None = None) -> Iterator[Work]:
    """Show pieces of work on stderr: bars on a terminal; elsewhere a line now and then, and one at each end.

    Args:
        keep: Whether bars stay on the terminal when all is done.
        stream: Another place than stderr.

    Yields:
        Call it with what is being done, how much is done and how much there is.
    """
    out = stream or sys.stderr
    if plain_output(out):
        with no_other_bars():
            yield Work(lambda line: print(line, file=out, flush=True))
        return
    work = Work()
    with live(lambda: _group(work.lines()), out, transient=not keep):
        yield work


def _group(lines: Sequence[ProgressLines]) -> Any:
    from rich.console import Group

    return Group(*lines)


@contextmanager
def live(draw: Callable[[], Any], stream: IO[str], *, transient: bool = False) -> Iterator[None]:
    """Keep something drawn at the foot of a terminal; what is printed or logged meanwhile goes above it.

    Args:
        draw: Returns what to draw; called a few times a second, from another thread.
        stream: The terminal.
        transient: Whether to take it away at the end.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False)
    # What goes into a file or a pipe does not disturb the bar, and must not end up on the terminal instead.
    prints_here = sys.stdout.isatty()
    with (
        Live(
            get_renderable=draw, console=console, refresh_per_second=4, transient=transient, redirect_stdout=prints_here
        ),
        _logs_to_stderr(),
        no_other_bars(),
    ):
        yield


@contextmanager
def _logs_to_stderr() -> Iterator[None]:
    """Let handlers that hold the stderr of earlier write to what it is now, else they write across the bar."""
    import logging

    known = [logging.getLogger(name) for name in logging.Logger.manager.loggerDict]
    handlers = [
        (handler, handler.stream)
        for logger in [logging.getLogger(), *known]
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
    ]
    for handler, _ in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in handlers:
            handler.setStream(stream)


@contextmanager
def no_other_bars() -> Iterator[None]:
    """Switch the bars of transformers off, which would be drawn across ours or into a file."""
    if "transformers" not in sys.modules:  # it looks here when it is loaded
        before = os.environ.get(HUB_BARS_OFF)
        os.environ[HUB_BARS_OFF] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[HUB_BARS_OFF]
            else:
                os.environ[HUB_BARS_OFF] = before
        return
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
