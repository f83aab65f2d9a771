"""The promise of two changed lines: the diff of the documents turns the plain TRL script into the other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.documents.reading import ROOT, blocks
from tests.documents.test_examples import load

import trimtab

pytest.importorskip("trl")

# TRL 1.16 itself sets the name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

PLAIN = ROOT / "examples" / "trl_plain.py"
CHANGED = ROOT / "examples" / "trl_two_lines.py"


def the_diff() -> str:
    found = blocks((ROOT / "docs" / "guides" / "trl.md").read_text(encoding="utf-8"), "diff")
    assert len(found) == 1
    return found[0]


def apply(diff: str, text: str) -> str:
    """Apply hunks that are told apart by lines of ``@@``, each of which must fit at exactly one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"does not fit at one place:\n{old}"
        text = text.replace(old, new)
    return text


def test_the_diff_has_two_new_lines_and_takes_one_away() -> None:
    marks = [line[0] for line in the_diff().splitlines()]
    assert marks.count("+") == 2
    assert marks.count("-") == 1


def test_the_diff_makes_one_script_of_the_other() -> None:
    plain = PLAIN.read_text(encoding="utf-8")
    assert apply(the_diff(), plain) == CHANGED.read_text(encoding="utf-8") != plain
    assert "trimtab" not in plain, "the plain script knows nothing of us"


def run(script: Path, start: tuple[str, str], out: Path, **names: Any) -> dict[str, torch.Tensor]:
    module = load(script)
    for name, value in names.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    module.main(*start, output_dir=str(out), steps=3)
    return load_file(out / "model.safetensors")


def test_both_scripts_run_and_taking_the_method_away_gives_the_plain_numbers(tmp_path: Path) -> None:
    start = load(PLAIN).make_small(tmp_path)
    plain = run(PLAIN, start, tmp_path / "plain")
    ours = run(CHANGED, start, tmp_path / "ours")
    assert not (tmp_path / "plain" / "dualspeed").exists()
    assert (tmp_path / "ours" / "dualspeed" / "isolator.safetensors").is_file()
    assert ours.keys() == plain.keys()
    assert any(not torch.equal(ours[key], value) for key, value in plain.items()), "DualSpeed trains otherwise"

    def everything_off() -> Any:
        return trimtab.DualSpeedConfig(keep_ratio=1.0, slow_ratio=0.0, isolator_tokens=0)

    off = run(CHANGED, start, tmp_path / "off", DualSpeedConfig=everything_off)
    none = run(CHANGED, start, tmp_path / "none", DualSpeedConfig=lambda: None)
    for key, value in plain.items():
        assert torch.equal(off[key], value), key
        assert torch.equal(none[key], value), key
