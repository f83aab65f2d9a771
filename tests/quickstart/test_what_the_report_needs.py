"""What the page of a quickstart is made of: memory of each training by itself, and pictures of the test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quickstart.small import SIZES, small_task

from trimtab.dualspeed import DualSpeedConfig, attach
from trimtab.quickstart.arms import ARMS
from trimtab.quickstart.run import QUICKSTART_ARMS, _write_pictures, run_arms
from trimtab.quickstart.task import open_start
from trimtab.records import read_record


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a small quickstart."""
    found = tmp_path_factory.mktemp("arms")
    run_arms(small_task(), [ARMS[name] for name in QUICKSTART_ARMS], 0, found, lambda *_: None)
    _write_pictures(small_task(), found, 0)
    return found


def results_of(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_record(root / "records" / f"{name}.json")["results"]
    return found


def test_each_arm_has_the_memory_of_its_own_steps(root: Path) -> None:
    memory = {name: results_of(root, name)["memory"]["step_mib"] for name in QUICKSTART_ARMS}
    assert {name: set(found) for name, found in memory.items()} == {
        "full": {"full"}, "pruned": {"fast"}, "dualspeed": {"fast", "slow"},
    }  # fmt: skip
    # Fewer tokens hold less; a slow step has all of them, as a full one.
    assert memory["dualspeed"]["fast"] < memory["dualspeed"]["slow"]
    assert memory["pruned"]["fast"] < memory["full"]["full"]
    assert memory["dualspeed"]["slow"] == pytest.approx(memory["full"]["full"], rel=0.25)


def test_the_peak_is_what_is_held_and_the_largest_step(root: Path) -> None:
    found = results_of(root, "dualspeed")
    assert found["peak_memory_mib"] == pytest.approx(
        found["memory"]["held_mib"] + max(found["memory"]["step_mib"].values()), abs=0.02
    )
    model, _ = open_start(root / "arms" / "full" / "model")
    weights = sum(one.numel() * one.element_size() for one in model.parameters()) / 2**20
    assert results_of(root, "full")["memory"]["held_mib"] > weights


def test_measuring_leaves_the_trained_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.quickstart.train_arm.step_memory", lambda *_: {})
    run_arms(small_task(), [ARMS["full"]], 0, tmp_path, lambda *_: None)
    ours, theirs = (open_start(place / "arms" / "full" / "model")[0].state_dict() for place in (root, tmp_path))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert results_of(root, "full")["accuracy_full"]["marks"] == results_of(tmp_path, "full")["accuracy_full"]["marks"]


def test_pictures_are_those_of_the_test_images_and_the_trained_arm(root: Path) -> None:
    task = small_task()
    record = read_record(root / "records" / "pictures.json")
    entries = record["results"]["pictures"]
    assert len(entries) == 6
    model, processor = open_start(root / "arms" / "dualspeed" / "model")
    handle = attach(model, DualSpeedConfig(**{**task.dualspeed, "seed": 0}))
    for row, entry in zip(task.test, entries, strict=False):
        kept = handle.chosen_tokens(dict(processor(images=[row["image"]], text="<image>", return_tensors="pt")))[0]
        assert entry["parts"][0]["kept"] == kept.tolist()
        assert entry["parts"][0]["grid"] == [8, 8]
        assert (entry["width"], entry["height"]) == (SIZES.image_size, SIZES.image_size)
        assert entry["caption"] == f"{row['questions'][0]} {row['answers'][0]}"
