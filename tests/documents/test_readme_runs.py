"""What the README promises of its own code and commands, looked at while they run as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.documents.blocks import bare, blocks_of, command_lines
from tests.documents.blocks_desk import Desk, let_warnings_pass, run_page, write_tiny_model
from tests.documents.reading import ROOT
from transformers import AutoModelForImageTextToText

README = ROOT / "README.md"


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_every_way_leaves_an_ordinary_checkpoint(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    let_warnings_pass()
    ways = []
    for desk, block in run_page(README, Desk(tmp_path / "desk", write_tiny_model(tmp_path / "model"), patch)):
        if (desk.folder / "out" / "config.json").is_file():
            _, info = AutoModelForImageTextToText.from_pretrained(str(desk.folder / "out"), output_loading_info=True)
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            ways.append(block.language)
    assert ways == ["python", "python", "bash"]
    assert (desk.folder / "exported" / "config.json").is_file()
    assert not (desk.folder / "exported" / "dualspeed").exists()
    assert "</html>" in (desk.folder / "out" / "report.html").read_text(encoding="utf-8")


def test_the_commands_are_in_the_order_of_a_run() -> None:
    lines = [bare(words) for one in blocks_of(README) if one.language == "bash" for words in command_lines(one.text)]
    verbs = [words[1] for words in lines if words[0] == "trimtab"]
    assert verbs == ["validate-data", "check", "bench", "train", "eval", "export", "report"]
