"""`trimtab train` on a terminal, in a pipe and for programs: the same figures, in a form that fits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import yaml
from tests.cli.terminal import Terminal, open_terminal
from tests.cli.test_cli import run
from tests.run.small_run import settings, write_run

from trimtab.cli import show_training
from trimtab.run.config import RunConfig, load_config
from trimtab.run.train import train
from trimtab.run.train_progress import Figures, TrainView

Make = Callable[..., Path]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture(autouse=True)
def no_build_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    write_run(place)
    return place


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    """Return a function that writes a run file whose output lies in the folder of the test."""

    def made(**changes: Any) -> Path:
        path = tmp_path / "run.yaml"
        chosen = {**settings(folder), "output_dir": str(tmp_path / "out"), "disable_tqdm": False, **changes}
        path.write_text(yaml.safe_dump(chosen), encoding="utf-8")
        return path

    return made


class Heard(TrainView):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.facts: list[dict[str, Any]] = []
        self.steps: list[Figures] = []
        self.logs: list[Figures] = []
        self.bar = False

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def begin(self, facts: Any, figures: Figures, *, bar: bool) -> None:
        self.facts.append(dict(facts))
        self.steps.append(figures)
        self.bar = bar

    def step(self, figures: Figures) -> None:
        self.steps.append(figures)

    def log(self, figures: Figures) -> None:
        self.logs.append(figures)


def heard_in(config: RunConfig) -> tuple[Heard, dict[str, Any]]:
    view = Heard()
    return view, train(config, view)


# the figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_log_and_of_the_schedule(make: Make) -> None:
    view, record = heard_in(load_config(make()))
    assert view.phases == ["reading the data", "loading the model", "saving the checkpoint"]
    assert [figures.step for figures in view.steps if figures.phase == "training"][-1] == 4
    assert {figures.steps for figures in view.steps} == {4}
    told = record["results"]["metrics"]
    share = told["steps_slow"] / (told["steps_slow"] + told["steps_fast"])
    assert view.logs[-1].slow_share == view.steps[-1].slow_share == share
    for name in ("ce_fast", "ce_slow", "kl", "learning_rate"):
        logged = [entry[name] for entry in record["results"]["log"] if name in entry]
        assert getattr(view.logs[-1], name) == pytest.approx(logged[-1])
    assert view.logs[-1].ce is None, "there are two modes"
    assert view.bar
    last = view.steps[-1]
    assert last.samples_per_second == pytest.approx(2 * (last.steps_per_second or 0))


@pytest.mark.parametrize(("unit", "what"), [("optimizer", "steps"), ("sample", "samples")])
def test_the_mode_share_moves_between_two_logs(make: Make, unit: str, what: str) -> None:
    block = {"keep_ratio": 0.25, "slow_ratio": 0.5, "schedule_unit": unit}
    view, record = heard_in(load_config(make(logging_steps=50, dualspeed=block)))
    shares = [figures.slow_share for figures in view.steps if figures.phase == "training" and figures.step]
    told = record["results"]["metrics"]
    assert shares[-1] == told[f"{what}_slow"] / (told[f"{what}_slow"] + told[f"{what}_fast"])
    assert len(set(shares)) > 1


def test_nothing_is_read_from_the_device_between_two_logs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for view in (TrainView(), None):
        reads = []
        item = torch.Tensor.item
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", lambda self, item=item, reads=reads: reads.append(1) or item(self))
            train(load_config(make(logging_steps=50, overwrite=True)), view)
        counts.append(len(reads))
    assert counts[0] == counts[1]


def test_the_weights_are_those_of_a_training_nobody_watches(make: Make, tmp_path: Path) -> None:
    heard_in(load_config(make()))
    train(load_config(make(output_dir=str(tmp_path / "other"))))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_a_plain_training_has_one_loss_and_no_modes(make: Make) -> None:
    view, record = heard_in(load_config(make(dualspeed=False)))
    losses = [entry["loss"] for entry in record["results"]["log"] if "loss" in entry]
    assert view.logs[-1].ce == pytest.approx(losses[-1])
    assert view.logs[-1].slow_share is None
    assert not any("CE fast" in word or "slow" in word for word in view.logs[-1].words())
    assert view.facts[0]["DualSpeed"].startswith("off")


def test_samples_with_modes_of_their_own_and_packs_that_vary(make: Make) -> None:
    packs = {"packing": True, "pack_tokens": 300, "schedule_unit": "sample", "keep_ratio": 0.25, "slow_ratio": 0.5}
    view, record = heard_in(load_config(make(dualspeed=packs)))
    told = record["results"]["metrics"]
    assert view.logs[-1].slow_share == told["samples_slow"] / (told["samples_slow"] + told["samples_fast"])
    assert (view.steps[-1].samples_per_second or 0) > 2 * (view.steps[-1].steps_per_second or 0)
    assert view.facts[0]["packing"] == "rows joined up to 300 tokens"
    assert view.facts[0]["batch"] == "1 pack per step"
    assert view.facts[0]["slow ratio"] == "0.5 of the samples"


def test_accumulation_counts_every_forward_call_and_optimizer_steps(make: Make) -> None:
    block = {"keep_ratio": 0.25, "slow_ratio": 0.5, "schedule_unit": "micro"}
    view, record = heard_in(load_config(make(gradient_accumulation_steps=2, logging_steps=50, dualspeed=block)))
    told = record["results"]["metrics"]
    assert told["steps_slow"] + told["steps_fast"] == 8
    assert view.steps[-1].slow_share == told["steps_slow"] / 8
    assert view.steps[-1].steps == 4
    assert view.facts[0]["batch"] == "4 rows per step (2 per device x 2 accumulated)"


def test_evaluating_and_saving_are_said_and_then_it_is_training_again(make: Make) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    view, _ = heard_in(load_config(make(**changes, save_strategy="steps", save_steps=3)))
    phases = [figures.phase for figures in view.steps]
    assert phases == ["training", "training", "evaluating", "training", "saving", "training", "evaluating"]
    assert view.logs[-1].eval_loss is not None


def test_a_resumed_training_starts_at_its_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(RuntimeError):
        pass

    class Stops(Heard):
        def step(self, figures: Figures) -> None:
            if figures.step == 3:
                raise StopError

    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(StopError):
        train(load_config(make(**saving)), Stops())
    view, record = heard_in(load_config(make(**saving, resume=True)))
    told = record["results"]["metrics"]
    assert view.steps[-1].slow_share == told["steps_slow"] / 4, "the steps before the break count, too"
    assert [figures.step for figures in view.steps[:2]] == [2, 3]
    assert view.logs[0].step == 3
    assert view.facts[0]["steps"] == "4, going on behind step 2"
    assert record["results"]["steps"] == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_the_trainer_of_trl_is_watched_too(make: Make) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    view, _ = heard_in(load_config(make(trainer="sft", max_steps=2, bf16=False)))
    assert [figures.step for figures in view.logs] == [1, 2]
    assert view.logs[-1].slow_share is not None


# the table before the first step -------------------------------------------------------------------------------------


def test_the_table_says_what_is_trained_on_what(make: Make) -> None:
    view, record = heard_in(load_config(make()))
    (facts,) = view.facts
    assert facts["family"] == "llava (LlavaForConditionalGeneration)"
    assert facts["data"] == "8 rows"
    assert facts["batch"] == "2 rows per step"
    assert facts["pruner"] == "divprune"
    assert facts["keep ratio"] == "0.25 of the visual tokens in fast mode"
    assert facts["slow ratio"] == "0.5 of the steps"
    assert facts["frozen"] == "vision_tower"
    assert facts["visual tokens"] == "64 -> about 16 in the first row"
    metrics = record["results"]["metrics"]
    assert metrics["visual_tokens_full"] == 2 * 64
    assert {"device", "dtype", "isolator", "schedule", "packing", "output", "steps"} <= facts.keys()


def test_parameters_are_counted_with_and_without_the_frozen_ones(make: Make) -> None:
    from trimtab.run.load import load_model

    config = load_config(make(dualspeed=False))
    model = load_model(config)
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    view, _ = heard_in(config)
    assert view.facts[0]["parameters"] == f"{every:,} in all, {trained:,} trained ({trained / every:.1%})"


# how it looks --------------------------------------------------------------------------------------------------------


def shown_on_a_terminal(path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", str(columns))
    with open_terminal(columns) as terminal, show_training.watch(terminal.stream) as view:
        train(load_config(path), view)
    return terminal


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_shows_a_table_and_one_bar(columns: int, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = shown_on_a_terminal(make(max_steps=6), columns, monkeypatch)
    lines = terminal.screen()
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if "━" in line and "6/6" in line]
    assert len(bars) == 1, lines
    assert bars[0].startswith("trained ")
    below = " ".join(" ".join(lines[lines.index(bars[0]) :]).split())
    for figure in (r"steps/s", r"\d+% fast, \d+% slow", r"CE fast \d", r"CE slow \d", r"KL \d", r"lr \d"):
        assert re.search(figure, below), (figure, below)
    assert "divprune" in " ".join(lines)
    assert not any("{'loss'" in line for line in lines), "the Trainer's own lines"


def test_a_training_that_was_interrupted_is_shown_as_stopped() -> None:
    def interrupted(stream: IO[str]) -> None:
        with show_training.watch(stream) as view:
            assert view is not None
            view.begin({"model": "tiny"}, Figures(1, 4), bar=True)
            raise KeyboardInterrupt

    with open_terminal(100) as terminal, pytest.raises(KeyboardInterrupt):
        interrupted(terminal.stream)
    assert [line.split()[0] for line in terminal.screen() if "1/4" in line] == ["stopped"]


def test_disable_tqdm_takes_the_bar_away_and_leaves_the_lines(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = shown_on_a_terminal(make(disable_tqdm=True), 100, monkeypatch)
    assert "4/4" not in terminal.text
    assert "trimtab: step 4 of 4, " in terminal.text


@pytest.mark.parametrize("variable", [{"TERM": "dumb"}, {"CI": "1"}])
def test_a_terminal_that_is_none_gets_lines(
    variable: dict[str, str], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    terminal = shown_on_a_terminal(make(max_steps=2), 100, monkeypatch)
    assert b"\x1b" not in terminal.raw
    assert "trimtab: step 2 of 2, " in terminal.text


def test_a_pipe_gets_one_line_per_log_and_the_result_on_stdout(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(logging_steps=2)
    assert run("train", "--config", str(path)) == 0
    told = capsys.readouterr()
    assert not CONTROL.search(told.err + told.out)
    steps = [line for line in told.err.splitlines() if line.startswith("trimtab: step ")]
    assert [line.split(",")[0] for line in steps] == ["trimtab: step 2 of 4", "trimtab: step 4 of 4"]
    for figure in ("steps/s", "% fast", "CE fast", "CE slow", "KL", "samples/s", "lr"):
        assert figure in steps[-1]
    assert "left, ends" in steps[0]
    assert told.err.count("pruner") == 1, "one table"
    out = path.parent / "out"
    for line in ("steps +4", r"time +0:0\d", "modes +.+ fast", f"checkpoint +{out}", "record +.+train.json"):
        assert re.search(line, told.out), line
    assert f"trimtab export {out} {out}-exported" in told.out
    assert "trimtab: " not in told.out


def test_the_commands_named_at_the_end_hold(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", str(make(max_steps=1))) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  trimtab ")]
    assert [words[1] for words in commands] == ["eval", "export", "report"]
    for words in commands:
        assert run(*words[1:]) == 0, words


def test_other_processes_print_nothing(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with show_training.watch() as view:
        assert view is None
    assert capsys.readouterr() == ("", "")


def test_a_python_caller_keeps_the_lines_of_the_trainer(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train(load_config(make(max_steps=1, disable_tqdm=True)))
    told = capsys.readouterr()
    assert "trimtab:" not in told.err + told.out
    assert "{'loss'" in told.out


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_real_process_draws_on_the_terminal_and_writes_the_record_into_the_pipe(make: Make) -> None:
    path = make(max_steps=6)
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    with open_terminal(100) as terminal:
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", "train", str(path), "--json"],
            stdout=subprocess.PIPE, stderr=terminal.stream, text=True, timeout=300, check=True,
            env={**environment, "TERM": "xterm", "COLUMNS": "100"},
        )  # fmt: skip
    assert json.loads(done.stdout)["results"]["steps"] == 6
    assert any(line.startswith("trained ━") for line in terminal.screen())
