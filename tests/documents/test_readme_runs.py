"""The README's own code and commands, run as they stand on a small model in place of the large one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.documents.reading import ROOT, blocks, commands
from tests.run.small_run import write_model, write_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from trimtab.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
LARGE = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def desk(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with the files that the README speaks of; the large model is a small one."""
    write_rows(tmp_path / "train.jsonl", count=8)
    write_rows(tmp_path / "test.jsonl", "test", 4)
    settings = yaml.safe_load(blocks(README, "yaml")[0])
    quick = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**settings, "model_name_or_path": str(model_folder), **quick}), encoding="utf-8"
    )
    for auto in (AutoModelForImageTextToText, AutoProcessor):
        stock = auto.from_pretrained

        def small(name: str, *rest: Any, stock: Any = stock, **more: Any) -> Any:
            return stock(str(model_folder) if name == LARGE else name, *rest, **more)

        monkeypatch.setattr(auto, "from_pretrained", small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# torch says so wherever there is no accelerator; the README speaks to those who have one.
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_the_python_blocks_train_and_save(desk: Path, number: int) -> None:
    exec(compile(blocks(README, "python")[number], "README.md", "exec"), {"__name__": "readme"})
    _, info = AutoModelForImageTextToText.from_pretrained(str(desk / "out"), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_commands_run_one_after_the_other(desk: Path) -> None:
    lines = [words[1:] for words in commands(README) if words[0] == "trimtab"]
    assert [words[0] for words in lines] == ["validate-data", "check", "bench", "train", "eval", "export", "report"]
    for words in lines:
        if words[0] == "bench":
            words = [*words[: words.index("--steps")], "--steps", "1"]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code, words
    assert (desk / "exported" / "config.json").is_file()
    assert not (desk / "exported" / "dualspeed").exists()
    assert "</html>" in (desk / "out" / "report.html").read_text(encoding="utf-8")
    shutil.rmtree(desk / "out")
