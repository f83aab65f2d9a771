"""Models of transformers that cannot be supported: each is refused, and the reason says why and what to take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.conformance.families import SUITE
from tests.conformance.seam import IMAGE_TEXT_TO_TEXT, has_hook
from tests.tiny import IMAGE, PAD, llama_settings

from trimtab.anatomy import FAMILIES, REFUSED, check_model, encode_images, open_host
from trimtab.errors import SettingError, UnsupportedModelError

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = {**SMALL, "image_size": 8, "patch_size": 4}
QFORMER = {**SMALL, "vocab_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HOOK = "a forward that takes mm_encoder_outputs"
WITHOUT_HOOK = {
    "blip": (HOOK, "get_image_features", "config.image_token_id"),
    "evolla": (HOOK, "get_image_features", "config.image_token_id"),
    "florence2": ("encoder-decoder",),
    "git": (HOOK, "get_image_features", "config.image_token_id"),
    "idefics": (HOOK, "get_image_features", "config.image_token_id"),
    "kosmos-2": (HOOK, "get_image_features", "config.image_token_id"),
    "kosmos-2.5": (HOOK, "get_image_features", "config.image_token_id"),
    "mistral4": (HOOK, "get_image_features", "config.image_token_id"),
    "mllama": (HOOK, "get_image_features"),
    "pi0": (HOOK, "get_image_features", "config.image_token_id", "a language-model head"),
    "pix2struct": ("encoder-decoder",),
    "pp_formulanet": ("encoder-decoder",),
    "t5gemma2": ("encoder-decoder",),
    "udop": ("encoder-decoder",),
    "vision-encoder-decoder": ("encoder-decoder",),
}
"""What each class of the library's own image-text-to-text list lacks, where it is not the hook alone."""


def _on_meta(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    for part in (
        config,
        *(value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)),
    ):
        for layers in ("num_hidden_layers", "encoder_layers", "decoder_layers", "layers"):
            if isinstance(getattr(part, layers, None), int) and not getattr(part, "layer_types", None):
                setattr(part, layers, min(getattr(part, layers), 2))
    with torch.device("meta"):
        return getattr(transformers, IMAGE_TEXT_TO_TEXT[model_type])(config)


def _blip(kind: str) -> Any:
    configs = {
        "blip-2": (transformers.Blip2Config, transformers.Blip2ForConditionalGeneration),
        "instructblip": (transformers.InstructBlipConfig, transformers.InstructBlipForConditionalGeneration),
        "instructblipvideo": (
            transformers.InstructBlipVideoConfig,
            transformers.InstructBlipVideoForConditionalGeneration,
        ),
    }
    config, model = configs[kind]
    token = "video_token_index" if kind == "instructblipvideo" else "image_token_index"
    text = transformers.LlamaConfig(**llama_settings())
    made = config(vision_config=TOWER, qformer_config=QFORMER, text_config=text, num_query_tokens=4, **{token: IMAGE})
    return model(made).eval()


def _require_refusal(model: Any, *words: str) -> None:
    report = check_model(model)
    assert not report.supported
    assert report.reason.startswith(type(model).__name__)
    for word in words:
        assert word in report.reason
    nearest = report.reason.split("The nearest supported class is ")[1].split(";")[0]
    assert nearest in {family.name for family in FAMILIES.values()}
    with pytest.raises(UnsupportedModelError) as caught:
        open_host(model)
    assert str(caught.value) == report.reason


@pytest.mark.parametrize("model_type", sorted(WITHOUT_HOOK))
def test_a_class_without_the_hook_is_refused(model_type: str) -> None:
    _require_refusal(_on_meta(model_type), *WITHOUT_HOOK[model_type])


def test_every_class_without_the_hook_is_tested_here() -> None:
    assert sorted(WITHOUT_HOOK) == sorted(name for name in IMAGE_TEXT_TO_TEXT if not has_hook(name))


@pytest.mark.parametrize("model_type", ["blip-2", "instructblip", "instructblipvideo"])
def test_a_q_former_is_refused_and_its_forward_needs_images(model_type: str) -> None:
    model = _blip(model_type)
    _require_refusal(model, REFUSED[model_type], "num_query_tokens")
    ids = torch.full((1, 4), PAD)
    question = {} if model_type == "blip-2" else {"qformer_input_ids": ids}
    with pytest.raises((AttributeError, ValueError), match=r"pixel_values|'NoneType' object has no"):
        model(pixel_values=None, input_ids=ids, **question)  # as the reason says


def test_an_unknown_class_gets_the_most_similar_name() -> None:
    config = transformers.Qwen2Config(**{**SMALL, "num_key_value_heads": 2, "vocab_size": 16})
    reason = check_model(transformers.Qwen2ForCausalLM(config)).reason
    assert "The nearest supported class is Qwen2VLForConditionalGeneration;" in reason
    assert "LlavaForConditionalGeneration" in check_model(torch.nn.Linear(1, 1)).reason


def test_videos_of_nemotron_fail_in_the_stock_model_and_are_refused_here() -> None:
    family = SUITE["nemotron_h_omni"]
    model = family.build_model()
    videos = {"pixel_values_videos": torch.randn(4, 3, 24, 24), "input_ids": torch.full((1, 18), IMAGE)}
    with torch.no_grad(), pytest.raises(TypeError, match="must be tuple of Tensors"):
        model(**videos)
    with pytest.raises(SettingError, match=r"videos .* are not supported"):
        encode_images(model, videos)
    assert any("Images only" in note for note in check_model(model).notes)
