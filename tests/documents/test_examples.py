"""Examples run as they stand, in seconds, and are short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.documents.reading import ROOT
from transformers import LlavaForConditionalGeneration

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_these_are_the_examples() -> None:
    names = [
        "cached_tower",
        "lora",
        "own_pruner",
        "packed_loop",
        "plain_loop",
        "scene_rows",
        "trainer_two_lines",
        "trl_plain",
        "trl_two_lines",
        "two_gpus",
        "vtw",
    ]
    assert [path.stem for path in EXAMPLES] == names


@pytest.mark.parametrize("name", ["trainer_two_lines", "plain_loop"])
def test_training_examples_leave_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    load(ROOT / "examples" / f"{name}.py").main(str(tmp_path / "out"), steps=3)
    _, info = LlavaForConditionalGeneration.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (tmp_path / "out" / "dualspeed").is_dir()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # a name that peft 0.21 asks for
def test_the_lora_example_leaves_an_adapter_and_an_ordinary_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pytest.importorskip("peft")
    load(ROOT / "examples" / "lora.py").main(str(tmp_path), steps=3)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert all("lora" in key and "language_model" in key for key in adapter)
    _, info = LlavaForConditionalGeneration.from_pretrained(str(tmp_path / "merged"), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_cache_changes_no_loss() -> None:
    plain, cached = load(ROOT / "examples" / "cached_tower.py").main(epochs=1)
    assert plain == cached


def test_the_own_pruner_keeps_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from trimtab import PrunerInput
    from trimtab.pruners.registry import PRUNERS

    module = load(ROOT / "examples" / "own_pruner.py")
    try:
        module.main()
        told = capsys.readouterr().out
        assert "longest" in told
        assert f"Kept {4 * 51} of {4 * 256} visual tokens" in told
        features = torch.tensor([[[1.0], [5.0], [-7.0], [2.0]]])
        valid = torch.tensor([[True, True, False, True]])
        chosen = module.Longest().select(PrunerInput(features=features, valid=valid), 2)
        assert chosen.index.tolist() == [[1, 3]]
    finally:
        PRUNERS._classes.pop("longest", None)


def test_the_packing_example_trains_every_sample_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(ROOT / "examples" / "packed_loop.py").main(str(tmp_path), samples=24)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert sum(int(line.split()[2]) for line in lines) == 48
    assert lines[-1].endswith("of 48")
    assert len(lines) < 24, "several samples in a pack"
    _, info = LlavaForConditionalGeneration.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_rows_that_are_written_are_sound(tmp_path: Path) -> None:
    from trimtab import validate_rows

    load(ROOT / "examples" / "scene_rows.py").main(str(tmp_path), train=6, test=2)
    for split, count in (("train", 6), ("test", 2)):
        report = validate_rows(tmp_path / f"{split}.jsonl")
        assert (report.sound, report.rows, report.images) == (True, count, count)
    assert len([*(tmp_path / "images").iterdir()]) == 8


def test_the_vtw_example_finds_a_layer_and_answers_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab.methods.vtw import VTWConfig

    report = load(ROOT / "examples" / "vtw.py").main(str(tmp_path), samples=4)
    assert VTWConfig.load(tmp_path / "vtw.json") == report.settings()
    assert 0 < report.layer < report.depth == 6
    curve, told = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert [line.partition(":")[0] for line in curve.splitlines()] == [f"layer {number}" for number in range(7)]
    before, behind = (int(word) for word in told.split() if word.isdecimal() and int(word) > 6)
    assert before - behind == 256
