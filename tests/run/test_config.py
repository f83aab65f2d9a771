"""Run files: every key is known or refused, every value fits or is explained, and the resolved file repeats the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import MissingExtraError, OutputError, SettingError
from trimtab.run.config import (
    RunConfig,
    build_config,
    load_config,
    merge,
    parse_overrides,
    training_arguments,
    write_resolved,
)
from trimtab.run.extras import require

BASE: dict[str, Any] = {"model_name_or_path": "m", "data_files": "train.jsonl", "output_dir": "out"}


def run_file(folder: Path, text: str = "") -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(BASE) + text, encoding="utf-8")
    return path


def test_a_run_file_becomes_typed_settings(tmp_path: Path) -> None:
    text = "learning_rate: 2e-5\nbf16: yes\neval_strategy: no\nmax_steps: 1e2\nfreeze: vision_tower\n"
    text += "dualspeed: {keep_ratio: 2e-1}\n"
    config = load_config(run_file(tmp_path, text))
    assert config == RunConfig(
        model_name_or_path="m",
        data_files=["train.jsonl"],
        output_dir="out",
        freeze=["vision_tower"],
        training={"learning_rate": 2e-5, "bf16": True, "eval_strategy": "no", "max_steps": 100},
        dualspeed=DualSpeedConfig(keep_ratio=0.2),
    )
    assert type(config.training["max_steps"]) is int


def test_the_command_line_beats_the_file(tmp_path: Path) -> None:
    path = run_file(tmp_path, "learning_rate: 2e-5\nseed: 1\ndualspeed: {keep_ratio: 0.5, pruner: random}\n")
    config = load_config(
        path, ["--learning_rate", "1e-5", "--dualspeed.keep-ratio=0.2", "--data_files", "a.json", "b.json", "--bf16"]
    )
    assert config.training == {"learning_rate": 1e-5, "seed": 1, "bf16": True}
    assert config.dualspeed == DualSpeedConfig(keep_ratio=0.2, pruner="random")
    assert config.data_files == ["a.json", "b.json"]


def test_a_block_can_be_switched_off_and_opened_from_the_command_line(tmp_path: Path) -> None:
    path = run_file(tmp_path, "dualspeed: {keep_ratio: 0.5}\n")
    assert load_config(path, ["--dualspeed", "false"]).dualspeed is None
    assert load_config(
        run_file(tmp_path), ["--dualspeed.pruner_options.centered", "true"]
    ).dualspeed == DualSpeedConfig(pruner_options={"centered": True})
    assert load_config(run_file(tmp_path), ["--dualspeed"]).dualspeed == DualSpeedConfig()


@pytest.mark.parametrize(
    ("block", "result"), [(None, None), (False, None), (True, DualSpeedConfig()), ({}, DualSpeedConfig())]
)
def test_absent_or_false_is_plain_training(block: Any, result: DualSpeedConfig | None) -> None:
    assert build_config({**BASE, "dualspeed": block}).dualspeed == result
    assert build_config(BASE).dualspeed is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, r"Unknown setting 'learning_rat' in the run file\. Did you mean 'learning_rate'"),
        ({"image_foler": "x"}, "Did you mean 'image_folder'"),
        ({"keep_ratio": 0.1}, r"belongs into the block `dualspeed:` \(on the command line --dualspeed.keep_ratio\)"),
        ({"dualspeed": {"keep_ration": 0.1}}, "Did you mean 'keep_ratio'"),
        ({"dualspeed": {"keep_ratio": "much"}}, "dualspeed.keep_ratio must be a number, but 'much' came"),
        ({"dualspeed": {"keep_ratio": 2}}, r"keep_ratio must be a number in \(0, 1\], but 2.0 came"),
        ({"dualspeed": 0.1}, "dualspeed must be a block of settings"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, but 'fast' came"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16, but 'float8' came"),
        ({"trainer": "mine"}, "trainer must be one of trainer, sft, but 'mine' came"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"data_files": []}, "data_files must be at least one file"),
        ({"output_dir": " "}, "output_dir must be a name or path"),
        ({"output_dir": None}, "output_dir must be text"),
        ({"do_train": True}, "do_train is not for run files: the command says"),
        ({"resume_from_checkpoint": "x"}, "write `resume: true`"),
        ({"remove_unused_columns": True}, "needs all columns"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"packing": True}, "Unknown setting 'packing'"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build_config({**BASE, **settings})


@pytest.mark.parametrize("name", list(BASE))
def test_what_every_run_needs_is_named(name: str) -> None:
    with pytest.raises(SettingError, match=f"lacks {name}. Add a line"):
        build_config({key: value for key, value in BASE.items() if key != name})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["0.1"], "'0.1' has no setting before it"), (["--seed", "1", "--seed=2"], "--seed stands twice")],
)
def test_bad_command_lines_are_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse_overrides(arguments)


def test_negative_numbers_are_values() -> None:
    assert parse_overrides(["--max_steps", "-1"]) == {"max_steps": -1}


def test_merging_changes_neither_side() -> None:
    settings, overrides = {"dualspeed": {"seed": 1}}, {"dualspeed.seed": 2}
    assert merge(settings, overrides) == {"dualspeed": {"seed": 2}}
    assert settings == {"dualspeed": {"seed": 1}}
    assert overrides == {"dualspeed.seed": 2}


def test_sft_takes_the_fields_of_trl() -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    assert build_config({**BASE, "trainer": "sft", "packing": "no"}).training == {"packing": False}


def test_a_missing_extra_says_how_to_get_it() -> None:
    with pytest.raises(MissingExtraError, match=r"`x: y` needs the package nowhere.*pip install 'trimtab\[nowhere\]'"):
        require("nowhere", "x: y")


@pytest.mark.parametrize(
    "block", [False, {"keep_ratio": 0.25, "pruner_options": {"centered": True}, "schedule": "bernoulli"}]
)
def test_the_resolved_file_reads_back_to_the_same_settings(tmp_path: Path, block: Any) -> None:
    training = {"learning_rate": 1e-7, "optim": "adamw_torch", "lr_scheduler_kwargs": {"a": 1}, "report_to": "none"}
    config = build_config({**BASE, **training, "dualspeed": block, "freeze": ["a", "b"]})
    path = write_resolved(config, tmp_path)
    assert path.name == "resolved.yaml"
    assert load_config(path) == config


def test_the_resolved_file_asks_neither_to_resume_nor_to_overwrite(tmp_path: Path) -> None:
    resumed = build_config({**BASE, "resume": True})
    assert load_config(write_resolved(resumed, tmp_path)).resume is False
    assert resumed.identity() == build_config({**BASE, "overwrite": True}).identity()


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError):
        write_resolved(build_config(BASE), tmp_path / "file" / "below")


@pytest.mark.parametrize(("given", "steps"), [({}, 10), ({"logging_steps": 500}, 500)])
def test_losses_are_logged_often_unless_the_settings_say_otherwise(given: dict[str, Any], steps: int) -> None:
    config = build_config({"model_name_or_path": "m", "data_files": ["a.jsonl"], "output_dir": "out", **given})
    assert training_arguments(config).logging_steps == steps
    assert config.training == given, "what is not said is not written into the run file either"
