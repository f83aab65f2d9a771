"""Pruned inference of a finished run: `trimtab eval --pruned` and the page about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.documents.reading import blocks
from tests.run.small_run import settings

from trimtab.cli.app import main
from trimtab.records import read_record
from trimtab.run.config import build_config
from trimtab.run.evaluate import _pruned, evaluate
from trimtab.run.load import load_trained

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "pruned_inference.md"


def opened(directory: Path, small_run: Path, explicit: Sequence[str] = (), **changes: Any) -> Any:
    """Return the handle that `eval --pruned` works with."""
    config = build_config({**settings(small_run), "output_dir": str(directory), **changes})
    return _pruned(load_trained(directory, config)[0], config, directory, explicit)


def test_eval_prunes_behind_the_isolator_of_the_run(trained: Path, small_run: Path) -> None:
    with opened(trained, small_run) as handle:
        stored = load_file(trained / "dualspeed" / "isolator.safetensors")["rows"]
        assert torch.equal(handle.isolator.rows, stored)
        assert handle.config.keep_ratio == 0.25


OTHERS = {"keep_ratio": 0.5, "isolator_tokens": 0, "pruner": "random", "positions": "original"}
"""Settings of a run file that was changed after the training."""


def test_the_settings_of_the_training_beat_those_of_the_run_file(trained: Path, small_run: Path) -> None:
    for changes in ({"dualspeed": OTHERS}, {"dualspeed": False}):
        with opened(trained, small_run, **changes) as handle:
            assert (handle.config.keep_ratio, handle.config.isolator_tokens) == (0.25, 2)
            assert handle.isolator.rows.shape[0] == 2


def test_what_the_command_line_says_beats_the_training(trained: Path, small_run: Path) -> None:
    with opened(trained, small_run, ["keep_ratio"], dualspeed=OTHERS) as handle:
        assert (handle.config.keep_ratio, handle.config.isolator_tokens) == (0.5, 2)
        assert handle.config.pruner != "random"
        assert handle.isolator is not None
    with opened(trained, small_run, ["isolator_tokens", "pruner"], dualspeed=OTHERS) as handle:
        assert (handle.config.keep_ratio, handle.config.pruner, handle.isolator) == (0.25, "random", None)


def test_an_isolator_from_elsewhere_is_taken_when_named(trained: Path, small_run: Path, tmp_path: Path) -> None:
    rows = torch.full_like(load_file(trained / "dualspeed" / "isolator.safetensors")["rows"], 0.5)
    save_file({"rows": rows}, tmp_path / "isolator.safetensors")
    block = {"isolator_from": str(tmp_path / "isolator.safetensors")}
    with opened(trained, small_run, ["isolator_from"], dualspeed=block) as handle:
        assert torch.equal(handle.isolator.rows, rows)


@pytest.mark.parametrize(
    ("given", "keep_ratio", "isolator"),
    [([], 0.25, True), (["--dualspeed.keep_ratio", "0.5", "--dualspeed.isolator_tokens=0"], 0.5, False)],
)
def test_the_record_says_what_was_used_and_the_command_when_no_isolator_was(
    trained_copy: Path, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    given: list[str], keep_ratio: float, isolator: bool,
) -> None:  # fmt: skip
    chosen = {**settings(small_run), "output_dir": str(trained_copy), "dualspeed": {"keep_ratio": 0.4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(chosen))
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(tmp_path / "run.yaml"), "--pruned", "--limit", "1", "--max-new-tokens", "1", *given])
    assert not ended.value.code
    record = read_record(trained_copy / "records" / "eval.json")
    assert record["settings"]["dualspeed"]["keep_ratio"] == keep_ratio
    assert record["settings"]["isolator"] is isolator
    arm = read_record(trained_copy / "records" / "arm.json")["results"]
    assert ("accuracy_pruned" in arm) is (not given)
    assert ("No isolator stands in front" in capsys.readouterr().out) is not isolator


def test_without_a_pruned_pass_the_record_holds_the_settings_of_the_run(trained_copy: Path, small_run: Path) -> None:
    config = build_config({**settings(small_run), "output_dir": str(trained_copy), "dualspeed": OTHERS})
    told = evaluate(config, limit=1, max_new_tokens=1)["settings"]
    assert told["dualspeed"]["keep_ratio"] == 0.5
    assert "isolator" not in told


@pytest.mark.parametrize("changes", [{}, {"dualspeed": False}], ids=["settings", "no settings"])
def test_eval_of_a_model_that_no_isolator_was_trained_with_uses_none(small_run: Path, changes: Any) -> None:
    with opened(small_run / "model", small_run, **changes) as handle:
        assert handle.isolator is None
        assert handle.config.keep_ratio == (0.1 if changes else 0.25)


def test_the_example_of_the_page_runs(
    trained_copy: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = blocks(PAGE.read_text(encoding="utf-8"), "python")
    trained_copy.rename(tmp_path / "out")
    (tmp_path / "picture.png").write_bytes((small_run / "test-0.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(snippet, str(PAGE), "exec"), scope)
    prompt = scope["inputs"]["input_ids"]
    assert torch.equal(scope["made"][:, : prompt.shape[1]], prompt)
    assert scope["made"].shape[1] > prompt.shape[1]
    assert isinstance(scope["answer"], str)
    assert "generate" not in vars(scope["model"])
