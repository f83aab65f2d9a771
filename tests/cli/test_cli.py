"""The command line: parse, call one function, print; errors are one message."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.cli.commands import commands
from tests.cli.terminal import open_terminal
from tests.documents.test_documents import check_command

from trimtab.cli import cache_commands, house_commands, main, report_commands, run_commands, show, view_commands
from trimtab.cli.app import app
from trimtab.errors import SettingError, TrimtabWarning
from trimtab.run.progress import show_work

COMMANDS = sorted(commands())


def run(*arguments: str) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_the_commands_are_those_of_the_house() -> None:
    promised = {
        "quickstart",
        "train",
        "eval",
        "export",
        "check",
        "bench",
        "methods",
        "validate-data",
        "report",
        "cache",
        "view",
        "vtw search",
        "vtw generate",
        "vtw bench",
    }
    assert set(COMMANDS) == promised


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_one_example_that_holds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    told = capsys.readouterr().out
    examples = re.findall(r"Example: (trimtab .+)", told)
    assert len(examples) == 1
    check_command(shlex.split(examples[0]))


def test_help_version_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    import trimtab

    assert run("--version") == 0
    assert capsys.readouterr().out == f"trimtab {trimtab.__version__}\n"
    assert run("--help") == 0
    assert run() == 2


def test_methods_as_table_card_json_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods") == 0
    assert "dualspeed" in capsys.readouterr().out
    assert run("methods", "dualspeed") == 0
    assert "2602.03815" in capsys.readouterr().out
    assert run("methods", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "dualspeed"
    assert run("methods", "DualSpeed", "--json") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "DualSpeed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "dualsped"], "Did you mean 'dualspeed'"),
        (["train"], "trimtab train needs a run file"),
        (["train", "absent.yaml"], "There is no run file 'absent.yaml'"),
        (["check", "--config", "absent.yaml", "--seed", "1"], "There is no run file"),
        (["bench", "pruners", "--imges", "2"], "Did you mean 'images'"),
        (["export", "absent", "out"], "There is no directory 'absent'"),
        (["report", "absent"], "absent holds no record"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert told.err.startswith("trimtab: ")
    assert "Traceback" not in told.err
    assert told.err.count("\n") == 1


def test_check_prints_every_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.run.small_run import write_run

    path = write_run(tmp_path)
    (tmp_path / "train-2.png").unlink()
    assert run("check", str(path)) == 2
    told = capsys.readouterr()
    assert "train.jsonl, line 3: " in told.out
    assert "train-2.png" in told.out
    assert "Traceback" not in told.err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(SettingError):
        main(["--debug", "methods", "nothing"])


@pytest.mark.parametrize("arguments", [["nonsense"], ["methods", "--nonsense"], ["bench", "--steps", "0"]])
def test_wrong_options_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("trimtab.cards.all_cards", fail)
    with pytest.raises(ZeroDivisionError):
        main(["methods"])


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.cards.all_cards", interrupt)
    assert run("methods") == 130
    assert capsys.readouterr().err == "trimtab: interrupted.\n"


def test_our_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn() -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("mind the gap", TrimtabWarning, stacklevel=1)
        return []

    show_before = warnings.showwarning
    monkeypatch.setattr("trimtab.cards.all_cards", warn)
    run("methods")
    assert capsys.readouterr().err == "trimtab: warning: mind the gap\n"
    assert warnings.showwarning is show_before


def test_a_table_shows_names_with_brackets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for plain in (True, False):
        monkeypatch.setattr(show, "plain_output", lambda stream, plain=plain: plain)
        show.print_table("t", ("a",), [("[bold]x[/bold]",)])
        assert "[bold]x[/bold]" in capsys.readouterr().out


def test_a_table_in_a_pipe_is_text_in_columns_that_nothing_cuts(capsys: pytest.CaptureFixture[str]) -> None:
    show.print_table("t", ("name", "value"), [("a", 1), ("b" * 120, "two\nlines")])
    assert capsys.readouterr().out.splitlines() == [
        "t",
        f"  name{' ' * 116}  value",
        f"  a{' ' * 119}  1",
        f"  {'b' * 120}  two lines",
    ]


def test_a_table_without_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for plain in (True, False):
        monkeypatch.setattr(show, "plain_output", lambda stream, plain=plain: plain)
        show.print_settings("nothing", {})
        assert capsys.readouterr().out.startswith("nothing" if plain else "")


def test_a_table_that_comes_while_a_bar_is_drawn_stands_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with open_terminal(60) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal.stream)
        with show_work(stream=terminal.stream) as work:
            work("rows", 1, 2)
            show.print_settings("Cache", {"images": 8})
            work("rows", 2, 2)
    lines = [line for line in terminal.screen() if line]
    assert [line.split()[0] for line in (lines[0], lines[-1])] == ["Cache", "rows"]
    assert sum("rows" in line for line in lines) == 1
    assert " images   8 " in f"{lines[2]} "


def test_settings_on_a_terminal_stand_between_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "plain_output", lambda stream: False)
    show.print_settings("t", {"rows": 1234})
    told = capsys.readouterr().out
    title, above, row, below = told.splitlines()
    assert (title.strip(), row.split()) == ("t", ["rows", "1,234"])
    assert set(above.strip()) == set(below.strip()) == {"─"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (0.123456, "0.1235"),
        (12345, "12,345"),
        (12345.6, "12,346"),
        ("x", "x"),
        ({"a": 1, "b": 2.0}, "a 1, b 2"),
        (["a", 1], "a, 1"),
        ({}, "-"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert show.cell_text(value) == text


def test_quickstart_hands_over_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import trimtab.quickstart.run as module

    came: dict[str, Any] = {}
    monkeypatch.setattr(module, "quickstart", lambda **options: came.update(options) or {"kind": "quickstart"})
    assert run("quickstart", "--out", "x", "--seed", "3", "--steps", "5", "--threads", "1", "--json") == 0
    assert came == {"out": Path("x"), "seed": 3, "steps": 5, "threads": 1}
    assert json.loads(capsys.readouterr().out) == {"kind": "quickstart"}


def test_files_of_commands_enter_what_they_define() -> None:
    defined = {
        name
        for module in (cache_commands, house_commands, report_commands, run_commands, view_commands)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    } - {"add_to"}
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} == defined


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1"], 1),
        (["torch.distributed.run", "--nproc-per-node", "2"], 2),
    ],
    ids=["accelerate", "torchrun"],
)
def test_launchers_train_and_the_first_process_alone_prints(
    launcher: list[str], processes: int, tmp_path: Path
) -> None:
    from tests.run.small_run import write_run

    path = write_run(tmp_path, dualspeed={"keep_ratio": 0.25, "slow_ratio": 0.5}, max_steps=2)
    run_it = [sys.executable, "-m", *launcher, "-m", "trimtab", "train", "--config", str(path), "--json"]
    done = subprocess.run(run_it, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["results"]["samples"] == 2 * 2 * processes
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal of POSIX")
def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    from tests.run.small_run import write_run

    command = [sys.executable, "-m", "trimtab", "train", str(write_run(tmp_path, max_steps=100_000))]
    # A shell starts what runs in the background with the signal ignored, and that would be inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        try:
            assert process.stderr is not None
            while "step 2 of" not in (line := process.stderr.readline()):
                assert line, "it ended by itself"
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()  # else one that does not end would go on behind the other tests
    assert process.returncode == 130
    assert told.splitlines()[-1] == "trimtab: interrupted."
    assert "Traceback" not in told
