"""Gemma models that are refused, and the facts of transformers behind it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.families.gemma import GEMMA4_TOWER, gemma3, gemma3_settings, gemma_settings
from tests.tiny import IMAGE

from trimtab.anatomy import check_model, open_host
from trimtab.errors import UnsupportedModelError


def _shieldgemma2() -> Any:
    from transformers import Gemma3ForConditionalGeneration, ShieldGemma2Config

    return Gemma3ForConditionalGeneration(ShieldGemma2Config(**gemma3_settings()))


def _diffusion_gemma() -> Any:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = gemma_settings(
        layer_types=["sliding_attention", "full_attention"], global_head_dim=8, num_experts=2, top_k_experts=1,
        moe_intermediate_size=8, final_logit_softcapping=3.0,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config={**GEMMA4_TOWER, "model_type": "gemma4_vision"}, image_token_id=IMAGE
    )  # fmt: skip
    with torch.device("meta"):
        return DiffusionGemmaForBlockDiffusion(config)


@pytest.mark.parametrize(
    ("build", "cause"),
    [(_shieldgemma2, "names that it does not find again"), (_diffusion_gemma, "no next-token loss")],
)
def test_the_refusal_says_why(build: Any, cause: str) -> None:
    model = build()
    report = check_model(model)
    assert not report.supported
    assert report.reason.startswith(f"{type(model).__name__} is not supported: ")
    assert cause in report.reason
    with pytest.raises(UnsupportedModelError) as caught:
        open_host(model)
    assert str(caught.value) == report.reason


def test_diffusion_gemma_takes_no_labels() -> None:
    assert "labels" not in inspect.signature(type(_diffusion_gemma()).forward).parameters


def test_transformers_loses_a_saved_shieldgemma2(tmp_path: Path) -> None:
    # Once this fails, transformers loads what it saved, and the family can move to the table of supported ones.
    model = _shieldgemma2()
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    assert any("language_model" in key for key in info["missing_keys"])


def test_shieldgemma2_loads_as_gemma3(tmp_path: Path) -> None:
    from transformers import Gemma3ForConditionalGeneration

    gemma3().save_pretrained(tmp_path)  # the names of the released ShieldGemma 2 are those of Gemma 3
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "shieldgemma2"}))
    model, info = Gemma3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    model.config.model_type = "gemma3"  # as the refusal advises
    assert check_model(model).tested
    model.save_pretrained(tmp_path)
    loaded, info = Gemma3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.model_type == "gemma3"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
