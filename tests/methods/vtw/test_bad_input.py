"""Bad input and what is said about it: section 7 of the sheet, as far as it concerns withdrawal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import caught_embeddings
from tests.methods.vtw.models import (
    DEPTH,
    batch_of,
    close,
    deeper,
    fresh,
    from_ids,
    logits_of,
    model_of,
    reference_row,
    visual_of,
    words,
    write,
)
from tests.tiny import BOS, IMAGE, llama_settings
from torch import nn

from trimtab.anatomy.drop_inside import drop_inside
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.errors import NotSupportedError, SettingError, TrimtabWarning, UnsupportedModelError
from trimtab.methods.vtw import VTWConfig, withdraw


def hooks_of(model: Any) -> int:
    """Return how many forward hooks the modules of a model have."""
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


def says(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    """Hold that a message has all of these."""
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


class TestLayer:
    """Layers are counted from 0 to the number of them."""

    @pytest.mark.parametrize(
        "layer", [-1, DEPTH + 1, 100, 1.0, 1.5, "2", True, False, float("nan"), [1], torch.tensor(1)]
    )
    def test_others_are_errors_that_name_the_number_of_layers(self, layer: Any) -> None:
        model = model_of("llava")
        hooks = hooks_of(model)
        with pytest.raises(SettingError) as error:
            withdraw(model, layer)
        assert isinstance(error.value, ValueError)
        says(error, "layer", f"from 0 to {DEPTH}", "LlavaForConditionalGeneration", repr(layer))
        assert hooks_of(model) == hooks

    def test_no_layer_at_all(self) -> None:
        with pytest.raises(SettingError) as error:
            withdraw(model_of("llava"))
        says(error, "withdraw.layer", f"from 0 to {DEPTH}", "None", "search_withdrawal_layer")

    def test_layer_and_settings(self) -> None:
        with pytest.raises(SettingError) as error:
            withdraw(model_of("llava"), 2, settings=VTWConfig(layer=1))
        says(error, "layer", "settings")

    def test_settings_of_another_kind(self) -> None:
        with pytest.raises(SettingError) as error:
            withdraw(model_of("llava"), settings={"layer": 1})  # type: ignore[arg-type]
        says(error, "withdraw.settings", "VTWConfig", "path", "{'layer': 1}")

    def test_settings_of_a_deeper_model(self) -> None:
        with pytest.raises(SettingError) as error:
            withdraw(model_of("llava"), settings=VTWConfig(layer=9))
        says(error, "layer", f"0..{DEPTH}", "9")

    def test_settings_made_for_another_depth(self) -> None:
        with pytest.raises(SettingError) as error:
            withdraw(model_of("llava"), settings=VTWConfig(layer=2, depth=32))
        says(error, "32", str(DEPTH))

    def test_layer_0_warns_once(self) -> None:
        model, batch = model_of("llava"), batch_of("llava")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with withdraw(model, 0):
                logits_of(model, batch)
                write(model, batch)
        assert [one.category for one in caught] == [TrimtabWarning]
        assert "layer is 0: the image is never seen" in str(caught[0].message)

    def test_a_warning_that_is_an_error_leaves_nothing_attached(self) -> None:
        model = fresh()
        with pytest.raises(TrimtabWarning, match="never seen"):
            withdraw(model, 0)
        with withdraw(model, 1):
            pass
        assert hooks_of(model) == hooks_of(fresh())

    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
    def test_below_the_deepstack_layers(self, family: str, layer: int) -> None:
        model = model_of(family)
        with pytest.raises(SettingError) as error:
            withdraw(model, layer)
        says(error, "layer", "2", repr(layer))
        assert "2.." in str(error.value) or "at least 2" in str(error.value)

    def test_at_the_deepstack_layers(self) -> None:
        model, batch = model_of("qwen3_vl"), batch_of("qwen3_vl")
        with withdraw(model, 2):
            assert torch.equal(write(model, batch), write(model, batch, use_cache=False))

    def test_deepstack_by_a_map_of_layers(self) -> None:
        model = deeper("granite4_vision", 5).build_model()
        with pytest.raises(SettingError) as error:
            withdraw(model, 2)
        says(error, "3")
        with withdraw(model, 3):
            pass


class TestOtherSettings:
    """The other arguments of `withdraw`."""

    @pytest.mark.parametrize(
        ("setting", "value", "allowed"),
        [
            ("positions", "original", "'keep' or 'reset'"), ("positions", None, "'keep' or 'reset'"),
            ("sink_tokens", -1, "from 0 on"), ("sink_tokens", 1.5, "from 0 on"), ("sink_tokens", True, "from 0 on"),
            ("keep_newlines", "yes", "True or False"), ("keep_newlines", 1, "True or False"),
        ],
    )  # fmt: skip
    def test_errors_name_setting_range_and_value(self, setting: str, value: Any, allowed: str) -> None:
        with pytest.raises(SettingError) as error:
            withdraw(model_of("llava"), 2, **{setting: value})
        says(error, setting, allowed, repr(value))

    def test_newlines_in_a_family_without_them(self) -> None:
        with pytest.raises(SettingError) as error:
            withdraw(model_of("llava"), 2, keep_newlines=True)
        says(error, "keep_newlines", "LlavaForConditionalGeneration", "image_newline", "True")

    def test_a_settings_file_that_is_not_there(self, tmp_path: Any) -> None:
        with pytest.raises((OSError, ValueError), match=r"nowhere\.json"):
            withdraw(model_of("llava"), settings=tmp_path / "nowhere.json")


class Unknown(nn.Module):
    """A layer with an argument of its own."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        alibi_slopes: Any = None,
    ) -> torch.Tensor:
        return hidden_states


class Poor(nn.Module):
    """A layer that takes nothing but states."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class TestModels:
    """Models that cannot be cut."""

    def refused(self, model: Any, *parts: str, kind: type[Exception] = UnsupportedModelError) -> None:
        with pytest.raises(kind) as error:
            withdraw(model, 1)
        assert isinstance(error.value, TypeError if kind is UnsupportedModelError else NotImplementedError)
        says(error, *parts)

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.ReLU()), None, "llava", 3])
    def test_no_model_of_transformers(self, model: Any) -> None:
        self.refused(model, type(model).__name__, "layers")

    def test_an_encoder_decoder(self) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
        self.refused(T5ForConditionalGeneration(T5Config(**sizes)), "T5ForConditionalGeneration", "layers")

    def test_an_encoder_decoder_with_layers(self) -> None:
        from transformers import BartConfig, BartForConditionalGeneration

        sizes: dict[str, Any] = {f"{side}_{key}": 1 for side in ("encoder", "decoder") for key in ("layers",)}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
        config = BartConfig(**sizes, encoder_ffn_dim=8, d_model=16, vocab_size=16, pad_token_id=0)
        self.refused(BartForConditionalGeneration(config), "BartForConditionalGeneration", "layers")

    def test_layers_under_another_name(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16, bos_token_id=1, eos_token_id=2)
        )
        self.refused(model, "GPT2LMHeadModel", "layers")

    @pytest.mark.parametrize(("layer", "said"), [(Unknown, "alibi_slopes"), (Poor, "attention_mask")])
    def test_layers_with_other_arguments(self, layer: type[nn.Module], said: str) -> None:
        model = fresh()
        model.model.language_model.layers = nn.ModuleList([layer() for _ in range(2)])
        hooks = hooks_of(model)
        self.refused(model, layer.__name__, "LlavaForConditionalGeneration", said)
        assert hooks_of(model) == hooks

    @pytest.mark.parametrize("family", ["aya_vision", "cohere2_vision", "qwen3_5", "lfm2_vl"])
    def test_windows_and_states(self, family: str) -> None:
        self.refused(
            SUITE[family].build_model(), SUITE[family].build_model().__class__.__name__, kind=NotSupportedError
        )

    def test_a_window_in_the_settings_of_the_language_model(self) -> None:
        from transformers import MistralConfig, MistralForCausalLM

        settings = {**llama_settings(head_dim=8), "sliding_window": 16}
        del settings["model_type"]
        self.refused(MistralForCausalLM(MistralConfig(**settings)), "sliding", kind=NotSupportedError)

    def test_gemma_3(self) -> None:
        self.refused(SUITE["gemma3"].build_model(), "sliding", kind=NotSupportedError)


class TestVisualMask:
    """Which tokens are visual must be known."""

    @pytest.fixture
    def embedded(self) -> dict[str, torch.Tensor]:
        batch = batch_of("llava")
        states = caught_embeddings(model_of("llava"), batch)
        return {"inputs_embeds": states, "attention_mask": batch["attention_mask"]}

    def test_embeddings_without_a_mask(self, embedded: Any) -> None:
        model = model_of("llava")
        with withdraw(model, 2), pytest.raises(SettingError) as error:
            logits_of(model, embedded)
        says(error, "visual_mask", "inputs_embeds")

    @pytest.mark.parametrize("form", ["shorter", "fewer rows", "one dimension", "three"])
    def test_a_mask_of_another_shape(self, embedded: Any, form: str) -> None:
        model, mask = model_of("llava"), visual_of(batch_of("llava"))
        wrong = {
            "shorter": mask[:, 1:],
            "fewer rows": mask[:2],
            "one dimension": mask[0],
            "three": mask[None],
        }
        with withdraw(model, 2, visual_mask=wrong[form]), pytest.raises(SettingError) as error:
            logits_of(model, embedded)
        says(error, "visual_mask", *map(str, mask.shape), str(tuple(wrong[form].shape)))

    @pytest.mark.parametrize("wrong", [[True, False], "mask", torch.ones(3, 100), torch.ones(3, 100, dtype=torch.long)])
    def test_a_mask_of_another_type(self, embedded: Any, wrong: Any) -> None:
        model = model_of("llava")

        def run() -> None:
            with withdraw(model, 2, visual_mask=wrong):
                logits_of(model, embedded)

        with pytest.raises(SettingError) as error:
            run()
        says(error, "visual_mask", "bool")

    def test_embeddings_of_a_step_need_no_mask(self) -> None:
        model, batch = model_of("llava"), batch_of("llava", (1,))
        with withdraw(model, 2), torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
            word = words(1)
            twin = model(**batch, use_cache=True).past_key_values
            expected = model(input_ids=word, past_key_values=cache).logits
            found = model(inputs_embeds=model.get_input_embeddings()(word), past_key_values=twin).logits
        close(found, expected, 1e-6)

    def test_a_plain_language_model_without_a_mask(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = llama_settings()
        del settings["model_type"]
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()

        def run() -> None:
            with withdraw(model, 1):
                logits_of(model, {"input_ids": words(5)})

        with pytest.raises(SettingError) as error:
            run()
        says(error, "visual_mask")


class TestCachesAndCompilers:
    """What needs layers of one length is refused, with its cause."""

    def test_a_static_cache(self) -> None:
        from transformers import StaticCache

        model, batch = model_of("llava"), batch_of("llava", (1,))
        cache = StaticCache(config=model.config.text_config, max_cache_len=128)
        with withdraw(model, 2), pytest.raises(NotSupportedError) as error:
            logits_of(model, batch, past_key_values=cache)
        says(error, "StaticCache", "DynamicCache")
        assert isinstance(error.value, NotImplementedError)

    def test_generation_with_a_static_cache(self) -> None:
        model, batch = fresh(), batch_of("llava", (1,))
        with withdraw(model, 2):
            with pytest.raises(NotSupportedError) as error:
                write(model, batch, cache_implementation="static")
            says(error, "StaticCache")
            assert write(model, batch).shape == (1, 8), "the next call is fine"

    def test_a_cache_of_sliding_windows(self) -> None:
        from transformers import DynamicCache, MistralConfig

        model, batch = model_of("llava"), batch_of("llava", (1,))
        cache = DynamicCache(config=MistralConfig(sliding_window=8, num_hidden_layers=DEPTH))
        with withdraw(model, 2), pytest.raises(NotSupportedError) as error:
            logits_of(model, batch, past_key_values=cache)
        says(error, "liding")

    @pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "packed_lengths"])
    def test_borders_of_packed_rows(self, name: str) -> None:
        model, batch = model_of("llava"), batch_of("llava", (1,))
        count = batch["input_ids"].shape[1]
        borders: Any = (count,) if name == "packed_lengths" else torch.tensor([0, count], dtype=torch.int32)
        with withdraw(model, 2), pytest.raises(NotSupportedError) as error:
            logits_of(model, batch, **{name: borders})
        says(error, "withdraw", name, "without packing", "position_ids")
        with withdraw(model, DEPTH):
            logits_of(model, batch, **{name: borders})

    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_compiled_model(self) -> None:
        compiled = torch.compile(fresh(), backend="eager")
        with pytest.raises(NotSupportedError) as error:
            withdraw(compiled, 2)
        says(error, "LlavaForConditionalGeneration", "compile")

    def test_a_model_compiled_in_place(self) -> None:
        model = fresh()
        model.compile(backend="eager")
        with pytest.raises(NotSupportedError, match="compile"):
            withdraw(model, 2)

    def test_a_language_model_compiled_in_place(self) -> None:
        model = fresh()
        model.model.language_model.compile(backend="eager")
        with pytest.raises(NotSupportedError, match="compile"):
            withdraw(model, 2)

    @pytest.mark.parametrize("part", ["language_model", "layers"])
    def test_a_part_that_was_replaced_by_a_compiled_one(self, part: str) -> None:
        model = fresh()
        if part == "layers":
            model.model.language_model.layers[1] = torch.compile(model.model.language_model.layers[1], backend="eager")
        else:
            model.model.language_model = torch.compile(model.model.language_model, backend="eager")
        with pytest.raises(NotSupportedError) as error:
            withdraw(model, 2)
        says(error, "LlavaForConditionalGeneration", "compile")

    def test_a_model_compiled_while_attached(self) -> None:
        model, batch = fresh(), batch_of("llava", (1,))
        with withdraw(model, 2):
            compiled = torch.compile(model, backend="eager")
            with pytest.raises(NotSupportedError, match="compile"):
                logits_of(compiled, batch)
        torch._dynamo.reset()
        assert torch.isfinite(logits_of(model, batch)).all()


class TestLastImage:
    """Deep layers know of an image what text behind it has taken up."""

    def ending(self, words_behind: int = 0) -> dict[str, Any]:
        return from_ids("llava", [BOS, 5, 6, *[IMAGE] * 36, *words(words_behind)[0].tolist()], 1)

    def test_a_prompt_that_ends_with_the_image_warns_once(self) -> None:
        model, batch = model_of("llava"), self.ending()
        with withdraw(model, 2):
            with pytest.warns(TrimtabWarning, match="ends with an image") as caught:
                first = logits_of(model, batch)
            assert len(caught) == 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(logits_of(model, batch), first)
                write(model, batch)

    def test_its_numbers_are_those_of_the_loop(self) -> None:
        model, batch = model_of("llava"), self.ending()
        expected, stays = reference_row(model, batch, 2)
        with pytest.warns(TrimtabWarning, match="ends with an image"), withdraw(model, 2):
            found = logits_of(model, batch)[0]
        close(found[stays], expected)
        close(found[-1], expected[-1])

    def test_one_row_of_several_is_enough(self) -> None:
        model = model_of("llava")
        one, two = self.ending(), from_ids("llava", [BOS, *[IMAGE] * 36, 7, 8], 1, seed=1)
        batch = {key: torch.cat((one[key], two[key])) for key in one}
        with pytest.warns(TrimtabWarning, match="ends with an image"), withdraw(model, 2):
            logits_of(model, batch)

    def test_padding_is_no_text(self) -> None:
        model = model_of("llava")
        one, two = self.ending(), from_ids("llava", [BOS, *[IMAGE] * 36, 7, 8, 9, 10], 1, seed=1)
        filler = {
            "input_ids": torch.zeros(1, 2, dtype=torch.long),
            "attention_mask": torch.zeros(1, 2, dtype=torch.long),
        }
        one = {**one, **{key: torch.cat((one[key], value), 1) for key, value in filler.items()}}
        batch = {key: torch.cat((one[key], two[key])) for key in one}
        with pytest.warns(TrimtabWarning, match="ends with an image"), withdraw(model, 2):
            logits_of(model, batch)

    def test_a_word_behind_the_image_is_enough(self) -> None:
        model, batch = model_of("llava"), self.ending(1)
        with withdraw(model, 2):
            logits_of(model, batch)
            write(model, batch)

    def test_at_the_last_layer_nothing_is_lost(self) -> None:
        model, batch = model_of("llava"), self.ending()
        with withdraw(model, DEPTH):
            logits_of(model, batch)

    def test_chunks_within_an_image_are_no_ending(self) -> None:
        model, batch = model_of("llava"), self.ending(4)
        with withdraw(model, 2):
            write(model, batch, prefill_chunk_size=6)

    def test_where_its_last_token_stays_there_is_nothing_to_warn_of(self) -> None:
        model, batch = model_of("llava"), self.ending()
        with withdraw(model, 2, sink_tokens=36):
            logits_of(model, batch, use_cache=False)

    def test_what_leaves_behind_a_later_stage_counts(self) -> None:
        model, batch = model_of("llava"), self.ending()
        stages = (*vtw_stages(1, 36), *vtw_stages(3))
        with pytest.warns(TrimtabWarning, match="its last visual token leaves") as caught:  # noqa: SIM117
            with drop_inside(model, stages, owner="both"):
                logits_of(model, batch, use_cache=False)
        assert len(caught) == 1
        for word in ("both", "text behind it", "Put the question behind the image"):
            assert word in str(caught[0].message)
