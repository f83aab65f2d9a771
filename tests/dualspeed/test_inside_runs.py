"""Tokens that leave inside the language model: pruned inference, several processes, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import ROWS, attached, portrait
from tests.dualspeed.inside_tools import AFTER, ALONE, WAYS, batch_of, deep_llava, settings
from tests.dualspeed.ranks import Case, compare, on_ranks
from tests.tiny import IMAGE, PAD, Batch
from torch import Tensor
from transformers import DynamicCache

import trimtab
from trimtab import DualSpeedConfig
from trimtab.anatomy.drop_inside import drop_inside
from trimtab.dualspeed import prune_for_inference
from trimtab.dualspeed.isolator import ModeIsolator
from trimtab.errors import NotSupportedError

ways = pytest.mark.parametrize("way", WAYS)
where = pytest.mark.parametrize("before", [ALONE, AFTER], ids=["alone", "after a pruner"])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
CACHE = {"atol": 2e-5, "rtol": 1e-4}
"""The cache splits the same float32 attention into other matrix products; logits are of order one."""


def prompt_of(rows: tuple[int, ...] = ROWS) -> Batch:
    batch = batch_of(rows, padding_side="left", turns=1)
    return {name: value for name, value in batch.items() if name != "labels"}


def pruned(model: Any, way: str, before: dict[str, Any], folder: Path) -> Any:
    config = DualSpeedConfig(**settings(way, before))
    if config.isolator_tokens:
        ModeIsolator(config.isolator_tokens, model.get_input_embeddings().weight.shape[1], 99, "cpu", model.dtype).save(
            folder
        )
    return prune_for_inference(model, config, folder if config.isolator_tokens else None)


def first_logits(model: Any, way: str, before: dict[str, Any], folder: Path, prompt: Batch) -> tuple[Batch, Tensor]:
    """Return the shortened prompt, and what the stock model says behind it while tokens leave."""
    plain = {name: value for name, value in before.items() if name in AFTER or name in ALONE}
    with prune_for_inference(model, DualSpeedConfig(**plain), folder if plain["isolator_tokens"] else None) as handle:
        view = handle.prune_inputs(prompt)
    visual = view["input_ids"] == IMAGE
    front = plain["isolator_tokens"]
    for row, images in enumerate(ROWS):  # every image is a run of placeholders, the isolator first
        places = visual[row].nonzero()[:, 0].tolist()
        for image in range(images):
            for place in places[image * len(places) // images :][:front]:
                visual[row, place] = False
    with torch.no_grad(), drop_inside(model, WAYS[way][1](), owner="test", visual_mask=visual):
        return view, model(**{**view, "mm_encoder_outputs": dict(view["mm_encoder_outputs"])}).logits[:, -1]


@where
@ways
def test_generating_drops_inside_from_the_prompt_on(way: str, before: dict[str, Any], tmp_path: Path) -> None:
    model, prompt = deep_llava().eval(), prompt_of()
    untouched = portrait(model)
    more: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with pruned(model, way, before, tmp_path) as handle:
        made = model.generate(**prompt, **more)
        with torch.no_grad():
            called = model(**prompt).logits[:, -1]
            text = model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits
        prepared = handle.prune_inputs(prompt)
        short = prepared["input_ids"].shape[1]
        again = model.generate(**prepared, **more)
    assert portrait(model) == untouched
    view, expected = first_logits(model, way, before, tmp_path, prompt)
    torch.testing.assert_close(made.logits[0], expected, **CACHE)
    torch.testing.assert_close(called, expected, **CACHE)
    assert all(torch.equal(one, other) for one, other in zip(again.logits, made.logits, strict=True))
    assert torch.equal(text, model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits)
    lengths = [layer.get_seq_length() for layer in made.past_key_values.layers]
    assert view["input_ids"].shape[1] == short
    assert lengths[0] == short + 3
    assert lengths[-1] < lengths[0]
    assert torch.equal(made.sequences[:, : prompt["input_ids"].shape[1]], prompt["input_ids"])


@ways
def test_decoding_equals_the_whole_sequence_anew(way: str, tmp_path: Path) -> None:
    """Each new token sees the places that stayed; chosen by the last place of the prompt, they stay the same."""
    model, prompt = deep_llava().eval(), prompt_of((1,))
    with pruned(model, way, AFTER, tmp_path) as handle:
        made = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
        new = made.sequences[:, prompt["input_ids"].shape[1] :]
        view = handle.prune_inputs(prompt)
        inside = handle._view.inside
        assert inside is not None
        rows = handle._leaving
        assert rows is not None
        longer = torch.nn.functional.pad(rows.visual, (0, 3))
        with torch.no_grad():
            inside.drop.visual_mask, inside.drop.active = longer, True
            inside.drop.queries = torch.zeros_like(longer)
            inside.drop.queries[0, view["input_ids"].shape[1] - 1] = True
            ids = torch.cat((view["input_ids"], new[:, :3]), 1)
            mask = torch.ones_like(ids)
            outputs = dict(view["mm_encoder_outputs"])
            whole = model.model(input_ids=ids, attention_mask=mask, mm_encoder_outputs=outputs).last_hidden_state
            inside.leave()
            expected = model.lm_head(whole)[0, -4:]
    torch.testing.assert_close(torch.cat(made.logits), expected, **CACHE)


@ways
def test_beams_drop_what_one_beam_drops(way: str, tmp_path: Path) -> None:
    model, prompt = deep_llava().eval(), prompt_of()
    with pruned(model, way, AFTER, tmp_path):
        one = model.generate(
            **prompt, **{**GREEDY, "max_new_tokens": 1}, return_dict_in_generate=True, output_logits=True
        )
        more = model.generate(
            **prompt, **{**GREEDY, "max_new_tokens": 1}, num_beams=3, return_dict_in_generate=True, output_logits=True
        )
    torch.testing.assert_close(more.logits[0][::3], one.logits[0], **CACHE)


def test_the_handle_of_a_training_lends_its_stages(tmp_path: Path) -> None:
    model, prompt, batch = deep_llava(), prompt_of(), batch_of()
    with attached(model, **settings("fastv", AFTER)) as handle, handle.force_mode("fast"):
        before = model(**batch).loss
        with prune_for_inference(model, handle) as pruning:
            inside = model.eval().generate(**prompt, **GREEDY)
            assert torch.equal(model.train()(**batch).loss, before)
            handle.save_pretrained(tmp_path)
        assert pruning._view.inside is handle._view.inside
        assert torch.equal(model(**batch).loss, before), "the stages are still there"
    with prune_for_inference(model.eval(), DualSpeedConfig(**settings("fastv", AFTER)), tmp_path):
        assert torch.equal(model.generate(**prompt, **GREEDY), inside)


def test_prompts_in_parts_are_refused(tmp_path: Path) -> None:
    model = deep_llava().eval()
    with (
        pruned(model, "vtw", ALONE, tmp_path),
        pytest.raises(NotSupportedError, match=r"(?s)inside='vtw'.*prefill_chunk_size.*Leave it out"),
    ):
        model.generate(**prompt_of((1,)), **GREEDY, prefill_chunk_size=8)


def test_features_of_the_user_are_left_alone(tmp_path: Path) -> None:
    """As without `inside`, what was encoded before is not pruned."""
    model, prompt = deep_llava().eval(), prompt_of((1,))
    with torch.no_grad():
        encoded = model.get_image_features(prompt["pixel_values"], return_dict=True)
        given = {**{n: v for n, v in prompt.items() if n != "pixel_values"}, "past_key_values": None}
        expected = model(**given, mm_encoder_outputs={"image": encoded}).logits
        with pruned(model, "vtw", ALONE, tmp_path):
            assert torch.equal(model(**given, mm_encoder_outputs={"image": encoded}).logits, expected)
    assert DynamicCache().get_seq_length() == 0


# several processes ----------------------------------------------------------------------------------------------------

TEXT_ONLY = ((1, 0, 2), (0, 0))
INSIDE_ONE: dict[str, Any] = {"inside_options": {"layer": 1}, "isolator_tokens": 2}
CASES: dict[str, Case] = {
    "DDP, vtw": Case("ddp", settings={"inside": "vtw", **INSIDE_ONE}),
    "DDP, fastv, text only": Case("ddp", images=TEXT_ONLY, settings={"inside": "fastv", **INSIDE_ONE}),
    "FSDP2, vtw": Case("fsdp2", settings={"inside": "vtw", **INSIDE_ONE}),
    "FSDP2, fastv, text only": Case("fsdp2", images=TEXT_ONLY, settings={"inside": "fastv", **INSIDE_ONE}),
    "FSDP2, fastv, checkpointing": Case("fsdp2", settings={"inside": "fastv", **INSIDE_ONE}, checkpointing=True),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), compare, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_mean_of_the_ranks(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        one = rank.get(name, rank)
        assert "error" not in one, one.get("trace", one)
        assert one["difference"] <= 1e-6
        assert one["largest"] > 1e-2
        assert one["missing"] == []
        assert one["more"] == []


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_refused() -> None:
    given = DualSpeedConfig(**settings("vtw"))
    model = deep_llava()
    with pytest.raises(NotSupportedError, match=r"inside='vtw'.*torch.compile.*set inside to None"):
        trimtab.attach(torch.compile(model, backend="eager"), given)
    model.compile(backend="eager")
    with pytest.raises(NotSupportedError, match=r"compiled"):
        trimtab.attach(model, given)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor:UserWarning")
def test_a_model_that_is_compiled_afterwards_is_refused_in_its_first_step(in_place: bool) -> None:
    model, batch = deep_llava(), batch_of()
    with attached(model, **settings("vtw")) as handle, handle.force_mode("fast"):
        expected = model(**batch).loss
        compiled: Any = model if in_place else torch.compile(model, backend="eager")
        if in_place:
            model.compile(backend="eager")
        with pytest.raises(NotSupportedError, match=r"inside='vtw'.*torch\.compile.*set inside to None"):
            compiled(**batch)
        if not in_place:
            assert torch.equal(model(**batch).loss, expected)


def test_a_pass_without_hooks_is_an_error() -> None:
    """As compiled code would make it that does not see them."""
    model, batch = deep_llava(), batch_of()
    with attached(model, **settings("vtw")) as handle, handle.force_mode("fast"):
        handle._view.inside.drop.detach()
        with pytest.raises(NotSupportedError, match=r"inside='vtw'.*had no effect.*without torch\.compile"):
            model(**batch)
