"""The settings of VTW, and the file that carries them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trimtab import DataError, OutputError, SettingError
from trimtab.methods.vtw.config import VTWConfig

WHOLE = {
    "layer": 16, "positions": "reset", "sink_tokens": 4, "keep_newlines": True, "depth": 32, "model": "llava-1.5-7b",
    "task": "ScienceQA", "search": {"threshold": 0.003, "curve": [{"layer": 16, "mean": 0.002, "stderr": None}]},
}  # fmt: skip


def test_defaults_are_the_papers() -> None:
    config = VTWConfig(layer=16)
    assert (config.positions, config.sink_tokens, config.keep_newlines) == ("keep", 0, False)
    assert (config.depth, config.model, config.task, config.search) == (None, "", "", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.layer = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("layer", -1, "at least 0"),
        ("layer", 2.0, "a whole number"),
        ("layer", True, "a whole number"),
        ("layer", None, "a whole number"),
        ("positions", "original", "one of keep, reset"),
        ("sink_tokens", -1, "at least 0"),
        ("sink_tokens", True, "a whole number"),
        ("keep_newlines", 1, "true or false"),
        ("depth", 0, "at least 1, or None"),
        ("depth", 8.0, "a whole number"),
        ("model", None, "a name"),
        ("task", 3, "a name"),
        ("search", [1], "a mapping by name, or None"),
        ("search", {1: 2}, "a mapping by name"),
    ],
)
def test_a_field_out_of_range(name: str, value: object, allowed: str) -> None:
    with pytest.raises(SettingError) as caught:
        VTWConfig(**{"layer": 3, name: value})  # type: ignore[arg-type]
    for part in (f"VTWConfig.{name}", allowed, f"{value!r} came"):
        assert part in str(caught.value)


def test_a_layer_behind_the_last() -> None:
    VTWConfig(layer=8, depth=8)
    with pytest.raises(SettingError, match=r"VTWConfig\.layer must be in 0\.\.8, for 8 layers, but 9 came\. 8 leaves"):
        VTWConfig(layer=9, depth=8)
    config = VTWConfig(layer=9)
    config.check(9)
    with pytest.raises(SettingError, match=r"layer must be in 0\.\.8, for 8 layers, but 9 came"):
        config.check(8)


def test_settings_of_a_model_of_another_depth() -> None:
    config = VTWConfig(layer=3, depth=32, model="llava-1.5-7b")
    config.check(32)
    with pytest.raises(SettingError) as caught:
        config.check(40)
    for part in ("VTWConfig.depth", "40, the number of layers", "32 came", "(llava-1.5-7b)", "search anew"):
        assert part in str(caught.value)


@pytest.mark.parametrize("changes", [WHOLE, {"layer": 0}])
def test_what_is_saved_reads_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = VTWConfig(**changes)
    path = tmp_path / "deep" / "vtw.json"
    config.save(path)
    assert VTWConfig.load(path) == config
    assert VTWConfig.load(str(path)).to_dict() == config.to_dict()
    told = json.loads(path.read_text())
    assert told["trimtab_vtw"] == 1
    assert told["versions"]["torch"]


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "vtw.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"vtw\.json is there already\. .* overwrite=True"):
        VTWConfig(layer=3).save(path)
    assert path.read_text() == "mine"
    VTWConfig(layer=3).save(path, overwrite=True)
    assert VTWConfig.load(path).layer == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["vtw.json"]


def test_a_file_by_hand_needs_the_layer_alone(tmp_path: Path) -> None:
    path = tmp_path / "vtw.json"
    path.write_text('{"trimtab_vtw": 1, "layer": 7}')
    assert VTWConfig.load(path) == VTWConfig(layer=7)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", ["holds no settings of VTW", "'trimtab_vtw'", "Give a file that a search saved"]),
        ('{"layer": 3}', ["holds no settings of VTW", "'trimtab_vtw'"]),
        ('{"trimtab_vtw": 2, "layer": 3}', ["has form 2", "knows up to 1", "Upgrade"]),
        ('{"trimtab_vtw": 1}', ["field 'layer' is missing", "Search anew"]),
        (
            '{"trimtab_vtw": 1, "layer": 3, "sink_token": 1}',
            ["unknown field 'sink_token'", "Did you mean 'sink_tokens'"],
        ),
        ('{"trimtab_vtw": 1, "layer": -3}', ["VTWConfig.layer", "at least 0", "-3 came", "Mend the file"]),
        ('{"trimtab_vtw": 1, "layer": 3, "depth": 2}', ["VTWConfig.layer", "in 0..2", "3 came"]),
        ('{"trimtab_vtw": 1, "layer"', ["is not whole JSON", "make it again"]),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "vtw.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        VTWConfig.load(path)
    for part in ("vtw.json", *words):
        assert part in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*none\.json"):
        VTWConfig.load(tmp_path / "none.json")
