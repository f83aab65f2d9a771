"""`export`: what stock transformers would have written, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from trimtab.data import load_rows
from trimtab.errors import DataError, OutputError, SettingError
from trimtab.evaluate import exact_match
from trimtab.run.config import RunConfig
from trimtab.run.export import export
from trimtab.run.load import load_trained
from trimtab.run.train import train

Make = Callable[..., RunConfig]


def test_an_export_has_the_files_and_keys_of_the_model_that_went_in(
    trained: Path, small_run: Path, tmp_path: Path
) -> None:
    record = export(trained, tmp_path / "exported")
    before = {path.name for path in (small_run / "model").iterdir()}
    assert {path.name for path in (tmp_path / "exported").iterdir()} == before
    assert record["results"]["files"] == sorted(before)
    ours = load_file(tmp_path / "exported" / "model.safetensors")
    assert ours.keys() == load_file(small_run / "model" / "model.safetensors").keys()
    trained_ones = load_file(trained / "model.safetensors")
    assert all(torch.equal(ours[name], trained_ones[name]) for name in ours)
    assert record["results"]["missing_keys"] == record["results"]["unexpected_keys"] == 0


def test_stock_transformers_gives_the_same_answers(
    trained: Path, small_run: Path, tmp_path: Path, make_config: Make
) -> None:
    export(trained, tmp_path / "exported")
    rows = list(load_rows(small_run / "test.jsonl"))
    model = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "exported"))
    processor = AutoProcessor.from_pretrained(str(tmp_path / "exported"))
    ours = exact_match(*load_trained(trained, make_config()), rows, predictions=True)
    assert exact_match(model, processor, rows, predictions=True)["predictions"] == ours["predictions"]


def test_a_directory_with_something_in_it_is_never_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(OutputError, match="nothing is overwritten"):
        export(trained, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]


def test_an_empty_directory_is_taken(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(trained, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_failed_export_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.run.export._require_equal", fail)
    with pytest.raises(OutputError, match="No space left"):
        export(trained, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_tensors_that_do_not_fit_are_named(trained_copy: Path, tmp_path: Path, kind: str) -> None:
    tensors = load_file(trained_copy / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    if kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        tensors["mode_isolator.rows"] = torch.zeros(2, 2)
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, trained_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"do not fit its config.json|cannot load"):
        export(trained_copy, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_what_is_no_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="There is no directory"):
        export(tmp_path / "absent", tmp_path / "exported")
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(SettingError, match=r"holds no model.*Its checkpoints can be exported: checkpoint-2"):
        export(tmp_path / "run", tmp_path / "exported")


# peft 0.21 asks for a name that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_are_merged(make_config: Make, small_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra peft")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    config = make_config(lora=lora, freeze=[], max_steps=2)
    train(config)
    record = export(tmp_path / "out", tmp_path / "exported")
    assert record["results"]["merged_adapters"] is True
    ours = load_file(tmp_path / "exported" / "model.safetensors")
    base = load_file(small_run / "model" / "model.safetensors")
    assert ours.keys() == base.keys()
    assert any(not torch.equal(ours[name], base[name]) for name in ours if "q_proj" in name)
    rows = list(load_rows(small_run / "test.jsonl"))
    merged = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "exported"))
    adapted, processor = load_trained(tmp_path / "out", config)
    ours_said = exact_match(merged, processor, rows, predictions=True)["predictions"]
    assert ours_said == exact_match(adapted, processor, rows, predictions=True)["predictions"]
