"""Pruned inference: caches copied or emptied, compiled and wrapped models, packed embeddings, short lengths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.test_inference import GREEDY, isolator_file, prompt_of, recompute, settings
from tests.tiny import FAMILIES, Batch
from torch import Tensor
from transformers import StaticCache

import trimtab
from trimtab.anatomy import open_host
from trimtab.dualspeed.isolator import fresh_isolator
from trimtab.errors import SettingError, WrongOrderError

LLAVA = FAMILIES["llava"]


def pruned_llava(folder: Path, **changes: Any) -> tuple[Any, Batch, Any]:
    """Return a model, a prompt of one row with two images, and the handle."""
    model = LLAVA.build_model()
    handle = trimtab.prune_for_inference(model, settings(**changes), isolator_file(model, folder))
    return model, prompt_of(LLAVA, model, (2,)), handle


def expected_tokens(model: Any, handle: Any, prompt: Batch) -> Tensor:
    return recompute(model, handle.prune_inputs(prompt), GREEDY["max_new_tokens"])[0]


# caches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy])
def test_the_copy_of_a_cache_goes_on_as_the_cache_does(positions: str, copier: Any, tmp_path: Path) -> None:
    model, prompt, _ = pruned_llava(tmp_path, positions=positions)
    mask = torch.ones(1, prompt["input_ids"].shape[1] + 1, dtype=torch.long)
    word = torch.tensor([[5]])
    with torch.no_grad():
        once, again = (model(**prompt, use_cache=True).past_key_values for _ in range(2))
        expected = model(input_ids=word, past_key_values=once, attention_mask=mask).logits
        found = model(input_ids=word, past_key_values=copier(again), attention_mask=mask).logits
    assert torch.equal(found, expected)


def test_generate_refuses_the_copy_of_a_pruned_cache_too(tmp_path: Path) -> None:
    model, prompt, _ = pruned_llava(tmp_path)
    with torch.no_grad():
        cache = copy.deepcopy(model(**prompt, use_cache=True).past_key_values)
    longer = torch.cat((prompt["input_ids"], torch.tensor([[5]])), 1)
    with pytest.raises(WrongOrderError, match="whole conversation"):
        model.generate(input_ids=longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **GREEDY)


def used_and_emptied(model: Any, prompt: Batch) -> StaticCache:
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
    model.generate(**prompt, **GREEDY, past_key_values=cache)
    cache.reset()
    return cache


def test_an_emptied_cache_takes_the_next_prompt(tmp_path: Path) -> None:
    model, prompt, handle = pruned_llava(tmp_path)
    cache = used_and_emptied(model, prompt)
    made = model.generate(**prompt, **GREEDY, past_key_values=cache)
    assert torch.equal(made[:, prompt["input_ids"].shape[1] :], expected_tokens(model, handle, prompt))


def test_an_emptied_cache_takes_text(tmp_path: Path) -> None:
    """By `generate`, and by hand over two steps: the second finds the cache filled again, with another prompt."""
    model, prompt, _ = pruned_llava(tmp_path, positions="original")
    words = torch.tensor([[1, 5, 6, 7, 8]])
    expected = model.generate(input_ids=words, **GREEDY)
    assert torch.equal(
        model.generate(input_ids=words, **GREEDY, past_key_values=used_and_emptied(model, prompt)), expected
    )
    cache = used_and_emptied(model, prompt)
    with torch.no_grad():
        model(input_ids=words[:, :3], past_key_values=cache)
        found = model(input_ids=words[:, 3:], past_key_values=cache).logits
        whole = model(input_ids=words).logits[:, 3:]
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)  # the cache splits the same float32 attention


# models --------------------------------------------------------------------------------------------------------------


def test_after_detach_a_compiled_model_sees_full_images_again(tmp_path: Path) -> None:
    model = LLAVA.build_model()
    compiled = torch.compile(model, backend="eager")
    prompt = prompt_of(LLAVA, model, (2,))
    full = model.generate(**prompt, **GREEDY)
    handle = trimtab.prune_for_inference(compiled, settings(), isolator_file(model, tmp_path))
    made = compiled.generate(**prompt, **GREEDY)[:, prompt["input_ids"].shape[1] :]
    assert torch.equal(made, expected_tokens(model, handle, prompt))
    with pytest.raises(WrongOrderError, match="pruned for inference already"):
        trimtab.prune_for_inference(compiled, settings(), tmp_path)
    handle.detach()
    assert "generate" not in vars(model)
    assert not torch.equal(full[:, prompt["input_ids"].shape[1] :], made), "or nothing above would say anything"
    assert torch.equal(compiled.generate(**prompt, **GREEDY), full)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
def test_ids_by_place_reach_the_pruner_inside_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    wrapped = peft.get_peft_model(LLAVA.build_model(), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    prompt = prompt_of(LLAVA, wrapped, (2,))
    rest = {name: value for name, value in prompt.items() if name != "input_ids"}
    with trimtab.prune_for_inference(wrapped, settings(), isolator_file(wrapped, tmp_path)):
        made = wrapped.generate(prompt["input_ids"], **rest, **GREEDY)
        assert torch.equal(made, wrapped.generate(**prompt, **GREEDY))


def test_the_isolator_of_packed_embeddings_is_of_the_models_type(tmp_path: Path) -> None:
    model = LLAVA.build_model()
    isolator_file(model, tmp_path)
    packed = torch.zeros(64, 32, dtype=torch.uint8)
    model.get_input_embeddings().weight = torch.nn.Parameter(packed, requires_grad=False)
    assert fresh_isolator(open_host(model), 2, 0).rows.dtype == torch.float32
    with trimtab.prune_for_inference(model, settings(), tmp_path) as handle:
        assert handle.isolator is not None
        assert handle.isolator.rows.dtype == torch.float32


# lengths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_config", [False, True])
def test_a_length_that_the_prompt_fills_is_told_in_its_own_numbers(as_config: bool, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model, prompt, _ = pruned_llava(tmp_path)
    width = prompt["input_ids"].shape[1]
    options = {name: value for name, value in GREEDY.items() if name != "max_new_tokens"}

    def generate(**lengths: int) -> Tensor:
        if as_config:
            made = model.generate(**prompt, generation_config=GenerationConfig(**options, **lengths))
        else:
            made = model.generate(**prompt, **options, **lengths)
        assert isinstance(made, Tensor)
        return made

    for length in (1, width):
        with pytest.raises(SettingError, match=rf"max_length must be above {width}.*but {length} came"):
            generate(max_length=length)
    assert generate(max_length=width + 1).shape[1] == width + 1
