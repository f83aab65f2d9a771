"""A run whose visual tokens leave inside the language model: check, train, eval with fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.run.small_run import TOKENS, write_model

from trimtab.errors import SettingError
from trimtab.run.check import check
from trimtab.run.config import RunConfig
from trimtab.run.evaluate import _pruned, evaluate
from trimtab.run.load import load_trained
from trimtab.run.train import train

Make = Callable[..., RunConfig]
INSIDE: dict[str, Any] = {
    "keep_ratio": 0.25, "slow_ratio": 0.5, "isolator_tokens": 2, "inside": "fastv",
    "inside_options": {"layer": 1, "keep_ratio": 0.5},
}  # fmt: skip


def config_of(make: Make, folder: Path, **changes: Any) -> RunConfig:
    return make(model_name_or_path=str(write_model(folder / "deep", layers=2)), dualspeed={**INSIDE, **changes})


def test_check_leaves_it_out_of_the_estimate_and_says_so(make_config: Make, tmp_path: Path) -> None:
    results = check(config_of(make_config, tmp_path), limit=2, seconds=0)["results"]
    assert results["summary"]["not in the estimate"].endswith("(inside='fastv')")
    plain = check(config_of(make_config, tmp_path, inside=None, inside_options={}), limit=2, seconds=0)["results"]
    assert results["prediction"] == plain["prediction"]
    assert "not in the estimate" not in plain["summary"]


def test_check_knows_the_layers_of_the_model(make_config: Make, tmp_path: Path) -> None:
    config = config_of(make_config, tmp_path, inside_options={"layer": 2})
    with pytest.raises(SettingError, match=r"inside_options\['layer'\] must be from 1 to 1 for the 2 layers"):
        check(config, limit=2, seconds=0)


def test_a_run_trains_and_answers(make_config: Make, tmp_path: Path) -> None:
    config = config_of(make_config, tmp_path)
    found = train(config)["results"]["log"]
    deep = [entry["visual_tokens_deep"] for entry in found if "visual_tokens_deep" in entry]
    kept = TOKENS // 4
    assert len(deep) == 4
    assert set(deep) == {2 * kept // 2, 2 * TOKENS}, "a fast and a slow step of two images"
    directory = Path(config.output_dir)
    results = evaluate(config, directory, pruned=True)["results"]
    assert results["pruned"]["number"] == results["full"]["number"]
    model, _ = load_trained(directory, config)
    with _pruned(model, config, directory) as handle:
        assert (handle.config.inside, handle.config.inside_options) == ("fastv", INSIDE["inside_options"])
    other = config_of(make_config, tmp_path, inside="vtw", inside_options={})
    with _pruned(model, other, directory, ["inside"]) as handle:
        assert (handle.config.inside, handle.config.inside_options) == ("vtw", {})
