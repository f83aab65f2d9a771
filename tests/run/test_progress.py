"""Pace, expected end, and the two forms of progress: bars for terminals, lines for everything else."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from datetime import datetime

import pytest
from rich.console import Console
from tests.cli.terminal import open_terminal

from trimtab.run.progress import (
    LEAST_MARKS,
    PLAIN_INTERVALS,
    WINDOW,
    Pace,
    ProgressLines,
    Work,
    duration_text,
    end_text,
    no_other_bars,
    plain_output,
    rate_text,
    show_work,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_build_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


# pace ----------------------------------------------------------------------------------------------------------------


def test_a_pace_knows_nothing_before_two_marks() -> None:
    pace = Pace(Clock())
    assert pace.per_second() is None
    pace.mark(0)
    assert (pace.per_second(), pace.seconds_left(10)) == (None, None)


def test_a_pace_is_that_of_the_recent_past() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.mark(0, 0)
    for second in range(1, 400):
        clock.now += 1
        pace.mark(second if second < 200 else 200 + 2 * (second - 200), 10 * second)
    assert pace.per_second() == pytest.approx(2)
    assert pace.per_second(1) == pytest.approx(10)
    assert pace.seconds_left(698) == pytest.approx(50)
    assert pace.seconds_left(0) == 0, "never below nothing"


def test_a_pace_of_long_steps_looks_back_further_than_its_window() -> None:
    clock = Clock()
    pace = Pace(clock)
    for step in range(2 * LEAST_MARKS):
        clock.now += WINDOW * (1 if step % 2 else 3)
        pace.mark(step)
    assert pace.per_second() == pytest.approx(1 / (2 * WINDOW), rel=0.1)


def test_a_resumed_pace_counts_from_where_it_began() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.mark(500)
    clock.now += 10
    pace.mark(520)
    assert pace.per_second() == 2


def test_many_marks_in_a_moment_are_kept_as_one_and_the_last_counts() -> None:
    clock = Clock()
    pace = Pace(clock)
    for step in range(10_000):
        clock.now += 0.001
        pace.mark(step)
    assert len(pace._marks) < 50
    assert pace.per_second() == pytest.approx(1000, rel=0.01)


# words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (25.4, "0:25"), (3725, "1:02:05"), (90061, "1 d 1:01:01"), (59.6, "1:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(2.314, "2.31 steps/s"), (23.14, "23.1 steps/s"), (9.996, "10.0 steps/s"), (1234.5, "1,234 steps/s"),
     (0.1, "10.0 s/step")],
)  # fmt: skip
def test_rates(rate: float, text: str) -> None:
    assert rate_text(rate, "step") == text


def test_the_expected_end_has_the_day_where_it_is_another() -> None:
    now = datetime(2026, 1, 31, 23, 59, 30)
    assert end_text(20, now) == "0:20 left, ends 23:59:50"
    assert end_text(40, now) == "0:40 left, ends 2026-02-01 00:00"


# where bars may be drawn ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "plain"),
    [
        ({"TERM": "xterm"}, False),
        ({}, False),
        ({"TERM": "dumb"}, True),
        ({"CI": "true", "TERM": "xterm"}, True),
        ({"CI": "false", "TERM": "xterm"}, False),
        ({"NO_COLOR": "1", "TERM": "xterm"}, False),
    ],
)
def test_bars_are_for_terminals_and_not_for_build_servers(environment: dict[str, str], plain: bool) -> None:
    assert plain_output(Screen(), environment) == plain
    assert plain_output(io.StringIO(), environment)


# layout --------------------------------------------------------------------------------------------------------------

PARTS = ["2.31 steps/s", "0:25 left, ends 14:32:10", "90% fast, 10% slow", "CE fast 1.234", "CE slow 1.345", "KL 0.012"]


def drawn(width: int, *, done: int = 20, total: int | None = 100, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(ProgressLines("training", done, total, PARTS))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [24, 30, 40, 60, 80, 100, 160, 300])
def test_no_figure_is_lost_or_cut_at_any_width(width: int) -> None:
    lines = drawn(width)
    assert max(map(len, lines)) < max(width, 26 + 1), lines
    told = " ".join(" ".join(lines).split())
    for part in ["training", "20/100", *PARTS]:
        assert part in told, (part, lines)


def test_a_wide_terminal_takes_one_line_and_the_bar_shows_the_share() -> None:
    (line,) = drawn(200)
    filled, empty = line.count("━"), line.count("─")
    assert filled / (filled + empty) == pytest.approx(0.2, abs=0.05)
    assert drawn(200, done=100)[0].count("─") == 0


def test_a_terminal_without_unicode_gets_letters() -> None:
    line = drawn(200, encoding="ascii")[0]
    assert re.search(r"training #+-+ 20/100", line)


def test_work_of_unknown_size_has_no_bar() -> None:
    assert not set("━─/") & set(drawn(200, total=None)[0].replace("steps/s", ""))


# pieces of work ------------------------------------------------------------------------------------------------------


def test_plain_work_says_a_line_now_and_then_and_one_at_the_end() -> None:
    clock, lines = Clock(), []
    work = Work(lines.append, clock)
    for row in range(1, 1001):
        clock.now += 0.0625  # a power of two, so that sums are exact
        work("rows", row, 1000)
    assert len(lines) == 1000 * 0.0625 // PLAIN_INTERVALS[0] + 1
    assert lines[0].startswith("trimtab: rows: 161 of 1,000, 16.0/s, 0:52 left, ends ")
    assert lines[-1] == "trimtab: rows: 1,000 of 1,000, done in 1:02"


def test_long_work_says_a_line_a_minute() -> None:
    clock, lines = Clock(), []
    work = Work(lines.append, clock)
    for row in range(7200):
        clock.now += 1
        work("rows", row, 10_000)
    assert 110 < len(lines) < 140


def test_figures_of_a_piece_stand_behind_its_pace() -> None:
    clock, lines = Clock(), []
    work = Work(lines.append, clock)
    work("arm", 1, 100)
    clock.now += PLAIN_INTERVALS[0]
    work.note("arm", ["CE 1.5"])
    work("arm", 2, 100)
    assert lines[0].startswith("trimtab: arm: 2 of 100, 10.0 s each, 16:20 left")
    assert lines[0].endswith(", CE 1.5")


def test_a_piece_that_begins_again_is_a_new_one_behind_the_others() -> None:
    clock = Clock()
    work = Work(clock=clock)
    for what, done in (("answers", 8), ("arm", 1), ("answers", 2)):
        work(what, done, 8)
        clock.now += 5
    assert [(line.label, line.done) for line in work.lines()] == [("arm", 1), ("answers", 2)]
    assert "done" not in " ".join(work.lines()[1].parts)


def test_work_in_a_pipe_is_lines_without_control_characters() -> None:
    out = io.StringIO()
    with show_work(stream=out) as work:
        work("rows", 1, 2)
        work("rows", 2, 2)
    assert out.getvalue() == "trimtab: rows: 2 of 2, done in 0:00\n"


@pytest.mark.parametrize("keep", [True, False])
def test_work_on_a_terminal_is_drawn_and_stays_if_wanted(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with open_terminal(60) as terminal, show_work(keep=keep, stream=terminal.stream) as work:
        work("rows", 1, 2)
        work("rows", 2, 2)
    assert "\x1b[" in terminal.raw.decode()
    told = " ".join(terminal.screen())
    assert ("2/2  done in 0:00" in told) == keep


def test_a_bar_without_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with open_terminal(80) as terminal, show_work(stream=terminal.stream) as work:
        work("rows", 2, 2)
    assert "━" in terminal.text
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]m", terminal.raw), "a colour"


def test_what_is_logged_and_printed_meanwhile_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    logger = logging.getLogger("trimtab.tests.progress")
    with open_terminal(60) as terminal:
        monkeypatch.setattr(sys, "__stderr__", terminal.stream)
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        handler = logging.StreamHandler()  # holds the stderr of now, as those of libraries do
        logger.addHandler(handler)
        with show_work(stream=terminal.stream) as work:
            work("rows", 1, 2)
            logger.warning("mind the gap")
            print("and the step", file=sys.stderr)
            work("rows", 2, 2)
        assert handler.stream is terminal.stream
        logger.removeHandler(handler)
    assert [line for line in terminal.screen() if line][:2] == ["mind the gap", "and the step"]
    assert sum("rows" in line for line in terminal.screen()) == 1


def test_other_bars_are_off_meanwhile_and_as_before_afterwards() -> None:
    from transformers.utils import logging as host

    before = host.is_progress_bar_enabled()
    host.enable_progress_bar()
    with pytest.raises(RuntimeError, match="bars: False"), no_other_bars():
        raise RuntimeError(f"bars: {host.is_progress_bar_enabled()}")
    assert host.is_progress_bar_enabled()
    with no_other_bars(), no_other_bars():
        pass
    assert host.is_progress_bar_enabled()
    if not before:
        host.disable_progress_bar()


def test_other_bars_stay_off_in_libraries_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with no_other_bars():
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
