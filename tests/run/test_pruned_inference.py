"""Pruned inference of a finished run: `trimtab eval --pruned` and the page about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.documents.reading import blocks
from tests.run.small_run import settings

from trimtab.run.config import build_config
from trimtab.run.evaluate import _pruned
from trimtab.run.load import load_trained

PAGE = Path(__file__).parents[2] / "docs" / "pruned_inference.md"


def opened(directory: Path, small_run: Path, **changes: Any) -> Any:
    """Return the handle that `eval --pruned` works with."""
    config = build_config({**settings(small_run), "output_dir": str(directory), **changes})
    return _pruned(load_trained(directory, config)[0], config, directory)


def test_eval_prunes_behind_the_isolator_of_the_run(trained: Path, small_run: Path) -> None:
    with opened(trained, small_run) as handle:
        stored = load_file(trained / "dualspeed" / "isolator.safetensors")["rows"]
        assert torch.equal(handle.isolator.rows, stored)
        assert handle.config.keep_ratio == 0.25


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
