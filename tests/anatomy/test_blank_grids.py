"""The blank image of a family, whatever form its images have, goes where a real image goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_checks import model_of

from trimtab.anatomy import encode_images
from trimtab.anatomy.blank import encode_blank

KNOWN = (
    "chameleon", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "dots3_note", "emu3",
    "ernie4_5_vl_moe", "exaone4_5", "fuyu", "gemma3", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe",
    "glm5_next", "glm_ocr", "glmga", "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2", "inkling2",
    "inkling_mm_model", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7",
    "minimax_m3_vl", "mistral3", "mistral_large4", "muse_glimmer", "muse_spark", "nemotron_h_omni", "paddleocr_vl",
    "paligemma", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker",
    "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "step3p7", "unlimited_ocr", "video_llama_3",
)  # fmt: skip


def reached(model: Any) -> set[str]:
    """Return the parameters that have a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", KNOWN)
def test_a_blank_image_reaches_the_parameters_that_an_image_reaches(name: str) -> None:
    family = SUITE[name]
    model = model_of(family, fresh=True)
    torch.cat(encode_images(model, family.make_batch(model, (1,))).blocks).sum().backward()
    expected = reached(model)
    model.zero_grad(set_to_none=True)
    encode_blank(model, torch.device("cpu")).backward()
    assert expected
    assert reached(model) >= expected
