"""What quickstart shows: pace, mode share and losses of every arm, and last where the page is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cli.terminal import open_terminal
from tests.cli.test_cli import run
from tests.quickstart.small import small_task

from trimtab.quickstart import tasks
from trimtab.quickstart.run import RECENT, StepFigures, print_summary
from trimtab.run.progress import Work, show_work

SUMMARY = [
    {"arm": "full", "accuracy": 0.5, "accuracy_of_full": 1.0, "accuracy_pruned": None, "seconds": 12.0,
     "time_of_full": 1.0},
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_build_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def told_by(entries: list[dict[str, Any]]) -> list[str]:
    work = Work()
    figures = StepFigures(work)
    for entry in entries:
        figures("arm", entry)
    return list(work.lines()[0].parts)[1:]


def test_losses_are_means_of_recent_steps_of_their_mode() -> None:
    steps = [{"mode": "slow" if n % 2 else "fast", "ce": float(n), "kl": n / 10 if n % 2 else None} for n in range(100)]
    recent = [n for n in range(100) if n % 2][-RECENT:]
    mean = sum(recent) / RECENT
    assert told_by(steps) == [
        "50% fast, 50% slow",
        f"CE fast {mean - 1:.4g}",
        f"CE slow {mean:.4g}",
        f"KL {mean / 10:.4g}",
    ]


def test_a_plain_arm_has_one_loss_and_no_modes() -> None:
    assert told_by([{"mode": "full", "ce": 1.5}]) == ["CE 1.5"]


def test_samples_with_modes_of_their_own_are_counted_one_by_one() -> None:
    common = {"mode": "mixed", "samples": 4}
    steps = [
        {**common, "slow_samples": 1, "ce_fast": 1.0, "ce_slow": 3.0, "kl": 0.5},
        {**common, "slow_samples": 0, "ce_fast": 2.0, "ce_slow": None, "kl": None},
    ]
    assert told_by(steps) == ["88% fast, 12% slow", "CE fast 1.5", "CE slow 3", "KL 0.5"]


def test_a_pipe_gets_a_line_per_piece_and_the_page_stands_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "scenes_task", small_task)
    out = tmp_path / "out"
    for _ in range(2):  # the second time it only prints
        assert run("quickstart", "--out", str(out), "--steps", "3", "--threads", "1") == 0
        told = capsys.readouterr()
        assert told.out.splitlines()[-1] == f"Report: {out / 'report.html'}"
        assert not set(told.out + told.err) & set("\r\x1b━┃")
        if _ == 0:
            lines = [line for line in told.err.splitlines() if "3 of 3" in line]
            assert [line.split(": ")[1] for line in lines] == ["full", "pruned", "dualspeed"]
            assert "CE " in lines[0]
            assert "100% fast, 0% slow, CE fast " in lines[1]
            assert "trimtab: checkpoint: 4 of 4" in told.err
    assert (out / "report.html").is_file()


def test_a_terminal_shows_the_figures_behind_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    with open_terminal(50) as terminal, show_work(stream=terminal.stream) as work:
        figures = StepFigures(work)
        for step in range(1, 5):
            figures("dualspeed", {"mode": "fast", "ce": 1.25})
            work("dualspeed", step, 4)
    told = " ".join(" ".join(terminal.screen()).split())
    assert "4/4" in told
    assert "100% fast, 0% slow" in told
    assert "CE fast 1.25" in told
    assert max(map(len, terminal.screen())) <= 50


@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_long_path_of_the_page_is_not_broken(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    root = Path("a" * 70) / "[bold]out"
    print_summary(SUMMARY, root)
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {root}/report.html"
