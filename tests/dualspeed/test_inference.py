"""Pruned inference: `generate` equals a recomputed pruned forward, and the model comes back as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import ROWS, attached, portrait, same_model
from tests.tiny import EOS, FAMILIES, IMAGE, PAD, Batch, TinyFamily, weights
from torch import Tensor

import trimtab
from trimtab import DualSpeedConfig
from trimtab.dualspeed.isolator import ModeIsolator
from trimtab.errors import OutputError, SettingError, WrongOrderError

CACHE = {"atol": 2e-5, "rtol": 1e-4}
"""The cache splits the same float32 attention into other matrix products; logits are of order one."""

SIX = {"llava", "llava_next", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl"}
families = pytest.mark.parametrize(
    "family", [one for name, one in FAMILIES.items() if name in SIX], ids=lambda family: family.name
)
layouts = pytest.mark.parametrize("positions", ["renumber", "original"])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
DETAILS: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


def prompt_of(family: TinyFamily, model: Any, rows: tuple[int, ...] = ROWS) -> Batch:
    """Return a batch of unequal prompts with padding on the left."""
    batch = family.make_batch(model, rows, padding_side="left", turns=1)
    return {name: value for name, value in batch.items() if name != "labels"}


def isolator_file(model: Any, folder: Path, tokens: int = 2) -> Path:
    """Write rows that are not those of a fresh isolator."""
    isolator = ModeIsolator(tokens, model.get_input_embeddings().weight.shape[1], 99, model.device, model.dtype)
    isolator.save(folder)
    return folder


def settings(**changes: Any) -> DualSpeedConfig:
    return DualSpeedConfig(**{"keep_ratio": 0.25, "isolator_tokens": 2, **changes})


def grown(view: Batch, tokens: Tensor) -> Batch:
    """Return the arguments of the pruned prompt with tokens after it, positions counted on by hand."""
    count = tokens.shape[1]
    longer = {**view, "input_ids": torch.cat((view["input_ids"], tokens), 1)}
    if view.get("attention_mask") is not None:
        longer["attention_mask"] = torch.cat((view["attention_mask"], torch.ones_like(tokens)), 1)
    if view.get("position_ids") is not None:
        last = view["position_ids"].amax(-1, keepdim=True) if view["position_ids"].dim() == 2 else None
        if last is None:  # after text all three coordinates are the same, that of the last token
            last = view["position_ids"][..., -1:]
            assert (last == last[:1]).all()
        longer["position_ids"] = torch.cat((view["position_ids"], last + torch.arange(1, count + 1)), -1)
    return longer


def recompute(model: Any, view: Batch, steps: int) -> tuple[Tensor, Tensor]:
    """Decode greedily without a cache: the whole pruned sequence anew at every step."""
    tokens = view["input_ids"][:, :0]
    logits = []
    with torch.no_grad():
        for _ in range(steps):
            # The model may add to the dict of features, so each call gets its own.
            inputs = {**grown(view, tokens), "mm_encoder_outputs": dict(view["mm_encoder_outputs"])}
            logits.append(model(**inputs, use_cache=False).logits[:, -1])
            tokens = torch.cat((tokens, logits[-1].argmax(-1, keepdim=True)), 1)
    return tokens, torch.stack(logits)


# generate equals the recomputed forward -------------------------------------------------------------------------


@families
@layouts
def test_greedy_tokens_and_logits_equal_those_without_a_cache(
    family: TinyFamily, positions: str, tmp_path: Path
) -> None:
    model = family.build_model()
    prompt = prompt_of(family, model)
    config = settings(positions=positions)
    with trimtab.prune_for_inference(model, config, isolator_file(model, tmp_path)) as handle:
        made = model.generate(**prompt, **DETAILS)
        view = handle.prune_inputs(prompt)
    tokens, logits = recompute(model, view, 4)
    width = prompt["input_ids"].shape[1]
    assert torch.equal(made.sequences[:, :width], prompt["input_ids"])
    assert torch.equal(made.sequences[:, width:], tokens)
    torch.testing.assert_close(torch.stack(made.logits), logits, **CACHE)
    # The pruned prompt is shorter, and the full one answers otherwise: else nothing above would say anything.
    assert view["input_ids"].shape[1] < width
    full = torch.stack(model.generate(**prompt, **DETAILS).logits)
    assert (full - logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_pruned_too(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.build_model()
    batch = family.make_batch(model, (0, 0), padding_side="left", turns=1, videos_per_row=(1, 2))
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)) as handle:
        made = model.generate(**prompt, **DETAILS)
        view = handle.prune_inputs(prompt)
    tokens, logits = recompute(model, view, 4)
    assert view["input_ids"].shape[1] < prompt["input_ids"].shape[1]
    assert torch.equal(made.sequences[:, prompt["input_ids"].shape[1] :], tokens)
    torch.testing.assert_close(torch.stack(made.logits), logits, **CACHE)


@families
def test_a_row_alone_answers_as_within_the_batch(family: TinyFamily, tmp_path: Path) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side="left", turns=1)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    width = prompt["input_ids"].shape[1]
    with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)):
        together = model.generate(**prompt, **GREEDY)[:, width:]
        for row in range(len(ROWS)):
            alone = {name: value for name, value in family.take_row(batch, ROWS, row).items() if name != "labels"}
            said = model.generate(**alone, **GREEDY)
            assert torch.equal(said[:, alone["input_ids"].shape[1] :], together[row : row + 1])


@families
def test_beams_repeat_images_with_their_rows(family: TinyFamily, tmp_path: Path) -> None:
    """Beam search must equal the search of a row alone, with the images of that row only."""
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side="left", turns=1)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    beams["return_dict_in_generate"] = True
    width = prompt["input_ids"].shape[1]
    with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)) as handle:
        made = model.generate(**prompt, **beams)
        stock = type(model).generate(model, **handle.prune_inputs(prompt), **beams)
        assert torch.equal(made.sequences[:, :width], prompt["input_ids"].repeat_interleave(2, 0))
        assert torch.equal(made.sequences_scores, stock.sequences_scores)
        for row in range(len(ROWS)):
            alone = {name: value for name, value in family.take_row(batch, ROWS, row).items() if name != "labels"}
            one = model.generate(**alone, **beams)
            assert torch.equal(
                one.sequences[:, alone["input_ids"].shape[1] :], made.sequences[2 * row : 2 * row + 2, width:]
            )
            torch.testing.assert_close(one.sequences_scores, made.sequences_scores[2 * row : 2 * row + 2], **CACHE)


def test_sampled_sequences_of_a_row_follow_its_images(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model, (1, 2))
    sample = {**DETAILS, "do_sample": True, "num_return_sequences": 3, "top_k": 5}
    with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)) as handle:
        torch.manual_seed(5)
        made = model.generate(**prompt, **sample)
        view = handle.prune_inputs(prompt)
    width = prompt["input_ids"].shape[1]
    assert torch.equal(made.sequences[:, :width], prompt["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in made.sequences[:, width:]}) > 2
    first = recompute(model, view, 1)[1][0]
    torch.testing.assert_close(made.logits[0], first.repeat_interleave(3, 0), **CACHE)
    # Every later step must score the sequence that was sampled before it.
    tokens = made.sequences[:, width:]
    for copy_number in range(3):
        mine = tokens[copy_number::3]
        with torch.no_grad():
            longer = {**grown(view, mine[:, :3]), "mm_encoder_outputs": dict(view["mm_encoder_outputs"])}
            expected = model(**longer, use_cache=False).logits[:, -1]
        torch.testing.assert_close(made.logits[3][copy_number::3], expected, **CACHE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_every_way_of_generating_says_the_same(name: str, tmp_path: Path) -> None:
    """Each of these derives something from the length of the prompt: cache sizes, chunks, where to cut the cache."""
    family = FAMILIES[name]
    model = family.build_model()
    prompt = prompt_of(family, model, (2,))
    with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)) as handle:
        tokens, _ = recompute(model, handle.prune_inputs(prompt), 4)
        width = prompt["input_ids"].shape[1]
        for way in (
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prefill_chunk_size": 5},
            {"prompt_lookup_num_tokens": 2},
        ):
            assert torch.equal(model.generate(**prompt, **GREEDY, **way)[:, width:], tokens), way


def test_a_pruner_that_observes_the_tower_works(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    config = settings(pruner="cls_topk")
    with trimtab.prune_for_inference(model, config, isolator_file(model, tmp_path)) as handle:
        made = model.generate(**prompt, **GREEDY)
        tokens, _ = recompute(model, handle.prune_inputs(prompt), 4)
    assert torch.equal(made[:, prompt["input_ids"].shape[1] :], tokens)


# the forward -----------------------------------------------------------------------------------------------------


@families
@layouts
def test_a_loop_by_hand_with_the_users_own_mask_goes_on_rightly(
    family: TinyFamily, positions: str, tmp_path: Path
) -> None:
    model = family.build_model()
    prompt = prompt_of(family, model)
    with (
        trimtab.prune_for_inference(model, settings(positions=positions), isolator_file(model, tmp_path)) as handle,
        torch.no_grad(),
    ):
        view = handle.prune_inputs(prompt)
        tokens, logits = recompute(model, view, 3)
        out = model(**prompt, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], logits[0], **CACHE)
        mask = prompt["attention_mask"]
        for step in range(2):
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            given = {"attention_mask": mask} if step == 0 else {}
            out = model(input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values, **given)
            torch.testing.assert_close(out.logits[:, -1], logits[step + 1], **CACHE)
        plain = model(**prompt, use_cache=True, return_dict=False)
        again = model(input_ids=tokens[:, :1], past_key_values=plain[1], return_dict=False)
        torch.testing.assert_close(again[0][:, -1], logits[1], **CACHE)


def test_the_loss_is_that_of_the_pruned_view_by_place_or_by_name(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    with torch.no_grad():
        full = model(**batch).loss
        with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)) as handle:
            out = model(**batch)
            expected = model(**handle.prune_inputs(batch))
            by_place = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], labels=batch["labels"])
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(by_place.loss, expected.loss)
    assert out.logits.shape == expected.logits.shape != (*batch["input_ids"].shape, out.logits.shape[-1])
    assert abs(float(full - out.loss)) > 1e-3


@families
def test_training_mode_and_text_are_untouched(family: TinyFamily, tmp_path: Path) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    text = prompt_of(family, model, (0, 0))
    with torch.no_grad():
        spoken = model.generate(**text, **GREEDY)
        prompt = prompt_of(family, model)
        full = torch.stack(model.generate(**prompt, **DETAILS).logits)
        scored = model(**text).logits
        loss = model.train()(**batch).loss
        with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)):
            assert torch.equal(model(**batch).loss, loss)
            # The tiny models drop nothing in training mode, so they answer as in evaluation mode.
            assert torch.equal(torch.stack(model.generate(**prompt, **DETAILS).logits), full)
            model.eval()
            assert torch.equal(model.generate(**text, **GREEDY), spoken)
            assert torch.equal(model(**text).logits, scored)


# where settings and isolator come from ---------------------------------------------------------------------------


def test_the_training_handle_lends_its_isolator_and_keeps_working(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    with attached(model, keep_ratio=0.25, isolator_tokens=2) as training:
        full = model.generate(**prompt, **GREEDY)
        with trimtab.prune_for_inference(model, training) as handle:
            expected = recompute(model, training.prune_inputs(prompt), 4)[0]
            width = prompt["input_ids"].shape[1]
            assert torch.equal(model.generate(**prompt, **GREEDY)[:, width:], expected)
            with torch.no_grad():
                training.isolator.rows.mul_(-3)
            assert handle.isolator is training.isolator
            moved = recompute(model, training.prune_inputs(prompt), 4)
            logits = torch.stack(model.generate(**prompt, **DETAILS).logits)
            torch.testing.assert_close(logits, moved[1], **CACHE)
            model.train()
            with training.force_mode("fast"):
                model(**family.make_batch(model, ROWS)).loss.backward()
            assert training.metrics()["steps_fast"] == 1
            assert training.isolator.rows.grad is not None
            model.eval()
        assert torch.equal(model.generate(**prompt, **GREEDY), full)


def test_side_files_alone_are_enough(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    with attached(model, keep_ratio=0.25, isolator_tokens=3, positions="original", seed=7) as training:
        with torch.no_grad():
            training.isolator.rows.add_(0.5)
        training.save_pretrained(tmp_path / "out" / "dualspeed")
        with trimtab.prune_for_inference(model, training):
            expected = torch.stack(model.generate(**prompt, **DETAILS).logits)
    for place in (tmp_path / "out", str(tmp_path / "out" / "dualspeed")):
        with trimtab.prune_for_inference(model, place) as handle:
            assert (handle.config.keep_ratio, handle.config.seed) == (0.25, 7)
            assert torch.equal(torch.stack(model.generate(**prompt, **DETAILS).logits), expected)


def test_side_files_of_a_run_without_an_isolator_are_enough(tmp_path: Path) -> None:
    model = FAMILIES["llava"].build_model()
    with attached(model, keep_ratio=0.5, isolator_tokens=0) as training:
        training.save_pretrained(tmp_path)
    with trimtab.prune_for_inference(model, tmp_path) as handle:
        assert (handle.config.keep_ratio, handle.isolator) == (0.5, None)


def test_settings_without_an_isolator_need_none() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)) as handle:
        assert handle.isolator is None
        kept = (handle.prune_inputs(prompt)["input_ids"] == IMAGE).sum(1).tolist()
    assert kept == [9, 0, 18]


def test_an_isolator_that_nobody_names_is_an_error() -> None:
    model = FAMILIES["llava"].build_model()
    with pytest.raises(SettingError, match=r"isolator_from must be .*isolator_tokens=2.*isolator_tokens=0"):
        trimtab.prune_for_inference(model, settings())
    assert "generate" not in vars(model)


def test_a_named_isolator_without_places_for_it_is_an_error(tmp_path: Path) -> None:
    model = FAMILIES["llava"].build_model()
    with pytest.raises(SettingError, match="isolator_from must be None with isolator_tokens=0"):
        trimtab.prune_for_inference(model, settings(isolator_tokens=0), tmp_path)


def test_an_isolator_of_another_shape_or_place_is_an_error(tmp_path: Path) -> None:
    model = FAMILIES["llava"].build_model()
    isolator_file(model, tmp_path, tokens=3)
    with pytest.raises(SettingError, match="Set isolator_tokens=3"):
        trimtab.prune_for_inference(model, settings(), tmp_path)
    with pytest.raises(OutputError, match=r"no isolator\.safetensors"):
        trimtab.prune_for_inference(model, settings(), tmp_path / "absent")
    with pytest.raises(SettingError, match=r"holds no dualspeed\.json"):
        trimtab.prune_for_inference(model, tmp_path)


def test_a_handle_of_another_model_and_one_beside_a_path_are_errors(tmp_path: Path) -> None:
    model, other = FAMILIES["llava"].build_model(), FAMILIES["llava"].build_model(1)
    with attached(other) as handle:
        with pytest.raises(SettingError, match="belongs to another model"):
            trimtab.prune_for_inference(model, handle)
        with pytest.raises(SettingError, match="None beside a handle"):
            trimtab.prune_for_inference(other, handle, tmp_path)
    with pytest.raises(SettingError, match=r"source must be the handle of attach.*but 3 came"):
        trimtab.prune_for_inference(model, 3)  # type: ignore[arg-type]


# coming and going ------------------------------------------------------------------------------------------------


@families
def test_after_detaching_the_model_is_as_before(family: TinyFamily, tmp_path: Path) -> None:
    model = family.build_model()
    prompt = prompt_of(family, model)
    answer = model.generate(**prompt, **GREEDY)  # the first call of any model leaves marks of transformers on it
    before = (portrait(model), weights(model))
    keys = list(model.state_dict())
    handle = trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path))
    assert list(model.state_dict()) == keys
    model.generate(**prompt, **GREEDY)
    model(**prompt)
    handle.detach()
    handle.detach()
    same_model(model, before)
    assert torch.equal(model.generate(**prompt, **GREEDY), answer)


def test_an_error_inside_the_block_detaches_too() -> None:
    model = FAMILIES["llava"].build_model()
    before = (portrait(model), weights(model))
    with pytest.raises(KeyError), trimtab.prune_for_inference(model, settings(isolator_tokens=0)):
        raise KeyError
    same_model(model, before)


def test_a_generate_that_the_instance_had_is_used_and_given_back() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    calls: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[1])
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    prompt = prompt_of(family, model)
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)) as handle:
        model.generate(**prompt, **GREEDY)
        assert calls == [handle.prune_inputs(prompt)["input_ids"].shape[1]]
    assert model.generate is own


def test_a_second_handle_on_one_model_is_an_error() -> None:
    model = FAMILIES["llava"].build_model()
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)):
        with pytest.raises(WrongOrderError, match="pruned for inference already"):
            trimtab.prune_for_inference(model, settings(isolator_tokens=0))
        with pytest.raises(WrongOrderError, match="pruned for inference already"):
            trimtab.prune_for_inference(copy.deepcopy(model), settings(isolator_tokens=0))
    trimtab.prune_for_inference(model, settings(isolator_tokens=0)).detach()


def test_a_deep_copy_is_pruned_by_itself(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)):
        expected = torch.stack(model.generate(**prompt, **DETAILS).logits)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.get_output_embeddings().weight.zero_()
    assert torch.equal(torch.stack(twin.generate(**prompt, **DETAILS).logits), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
def test_inside_peft_the_outermost_module_is_pruned(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    family = FAMILIES["llava"]
    model = family.build_model()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    prompt = prompt_of(family, model)
    with trimtab.prune_for_inference(wrapped, settings(), isolator_file(model, tmp_path)) as handle, torch.no_grad():
        made = wrapped.generate(**prompt, **GREEDY)
        view = handle.prune_inputs(prompt)
        assert torch.equal(wrapped(**prompt).logits, wrapped(**view).logits)
    assert torch.equal(made[:, prompt["input_ids"].shape[1] :], recompute(wrapped, view, 4)[0])
    assert "generate" not in vars(wrapped)


# arguments of generate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_lengths_that_count_the_prompt_count_the_one_that_came(where: str) -> None:
    from transformers import GenerationConfig

    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    width = prompt["input_ids"].shape[1]
    lengths = {"max_length": width + 3, "min_length": width + 2}
    plain = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    call: dict[str, Any] = dict(plain)
    given = None
    if where == "argument":
        call |= lengths
    elif where == "config":
        given = GenerationConfig(**plain, **lengths)
        call = {"generation_config": given}
    else:
        model.generation_config.update(**lengths)
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)):
        assert model.generate(**prompt, **call).shape[1] == width + 3
    if given is not None:
        assert (given.max_length, given.min_length) == (width + 3, width + 2)
    if where == "model":
        assert model.generation_config.max_length == width + 3


def test_new_token_counts_stand_above_lengths() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    width = prompt["input_ids"].shape[1]
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)):
        assert model.generate(**prompt, **GREEDY, max_length=3).shape[1] == width + 4


def test_the_prompt_may_come_by_place() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)):
        expected = model.generate(**prompt, **GREEDY)
        ids = prompt.pop("input_ids")
        assert torch.equal(model.generate(ids, **prompt, **GREEDY), expected)


def test_several_rows_need_a_mask() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    del prompt["attention_mask"]
    with (
        trimtab.prune_for_inference(model, settings(isolator_tokens=0)),
        pytest.raises(SettingError, match="attention_mask must be given"),
    ):
        model.generate(**prompt, **GREEDY)


def test_images_without_ids_are_an_error() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    embeds = model.get_input_embeddings()(prompt.pop("input_ids"))
    with (
        trimtab.prune_for_inference(model, settings(isolator_tokens=0)),
        pytest.raises(SettingError, match="input_ids must be given beside images"),
    ):
        model.generate(**prompt, inputs_embeds=embeds, **GREEDY)


def test_images_beside_a_filled_cache_are_an_error_and_beside_an_empty_one_not() -> None:
    from transformers import DynamicCache

    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model, (1,))
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)):
        cache = DynamicCache(config=model.config.get_text_config())
        expected = model.generate(**prompt, **GREEDY)
        assert torch.equal(model.generate(**prompt, past_key_values=cache, **GREEDY), expected)
        for call in (model.generate, model):
            filled = DynamicCache(config=model.config.get_text_config())
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6]]), past_key_values=filled)
            with pytest.raises(WrongOrderError, match="give the whole conversation"):
                call(**prompt, past_key_values=filled)


def test_going_on_from_the_cache_of_a_pruned_prompt_is_an_error() -> None:
    from transformers import DynamicCache

    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model, (1,))
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)):
        made = model.generate(**prompt, **DETAILS)
        longer = torch.cat((made.sequences, torch.tensor([[7, 8]])), 1)
        mine = DynamicCache(config=model.config.get_text_config())
        model.generate(**prompt, past_key_values=mine, **GREEDY)
        for cache in (made.past_key_values, mine):
            with pytest.raises(WrongOrderError, match="came from pruned inference"):
                model.generate(longer, past_key_values=cache, **GREEDY)


def test_features_that_were_encoded_before_pass_as_they_are() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    prompt = prompt_of(family, model)
    with trimtab.prune_for_inference(model, settings(isolator_tokens=0)) as handle:
        view = handle.prune_inputs(prompt)
        made = model.generate(**view, **GREEDY)
        assert torch.equal(made[:, : view["input_ids"].shape[1]], view["input_ids"])
        assert torch.equal(
            made[:, view["input_ids"].shape[1] :], model.generate(**prompt, **GREEDY)[:, prompt["input_ids"].shape[1] :]
        )


def test_exact_match_under_pruning_shares_no_full_features(tmp_path: Path) -> None:
    """Two questions about one image: exact_match would encode it once, past the pruner."""
    from PIL import Image
    from tests.tiny import tiny_processor

    model = FAMILIES["llava"].build_model()
    image = Image.new("RGB", (24, 24), (200, 30, 60))
    rows = [{"image": image, "questions": ["what colour is this", "is it red"], "answers": ["red", "yes"]}]
    ask: dict[str, Any] = {"max_new_tokens": 6, "predictions": True}
    with trimtab.prune_for_inference(model, settings(), isolator_file(model, tmp_path)) as handle:
        implied = trimtab.exact_match(model, tiny_processor(), rows, **ask)["predictions"]
        explicit = trimtab.exact_match(model, tiny_processor(), rows, prepare=handle.prune_inputs, **ask)["predictions"]
    full = trimtab.exact_match(model, tiny_processor(), rows, **ask)["predictions"]
    assert implied == explicit != full
