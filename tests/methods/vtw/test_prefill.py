"""One forward over the prompt: withdrawal is the loop over the layers that the paper describes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conformance.family_tools import caught_embeddings
from tests.methods.vtw.models import (
    DEPTH,
    ROWS,
    TIGHT,
    Prompt,
    batch_of,
    close,
    far,
    fresh,
    from_ids,
    lengths,
    logits_of,
    model_of,
    read_prompt,
    reference,
    reference_row,
    row_of,
    rows_of,
    spread,
    visual_of,
    words,
    write,
)
from tests.tiny import BOS, IMAGE, TILE_END, TILE_START, VOCAB, llama_settings

from trimtab.errors import SettingError, TrimtabWarning
from trimtab.methods.vtw import stack_layers, withdraw

MORE = ("idefics3", "mistral3", "qwen2_vl", "llava_onevision", "vipllava", "video_llava", "got_ocr2", "lighton_ocr")


def test_the_reference_of_these_tests_is_the_stock_model_where_nothing_leaves(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (2,))
    logits, stays = reference_row(model, batch, DEPTH)
    assert len(stays) == batch["input_ids"].shape[1]
    close(logits, logits_of(model, batch)[0])


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("layer", range(1, DEPTH))
def test_prefill_equals_the_loop_over_the_layers(name: str, layer: int, positions: str) -> None:
    model, batch = model_of(name), batch_of(name, (2,))
    expected, stays = reference_row(model, batch, layer, positions)
    stock = logits_of(model, batch)[0]
    with withdraw(model, layer, positions=positions):
        found = logits_of(model, batch)[0]
    close(found[stays], expected)
    far(found[stays], stock[stays])


@pytest.mark.parametrize("other", MORE)
def test_prefill_equals_the_loop_in_more_families(other: str) -> None:
    model, batch = model_of(other), batch_of(other)
    expected = [reference_row(model, alone, 2) for alone in rows_of(other, batch, ROWS)]
    with withdraw(model, 2):
        found = logits_of(model, batch)
    for row, (logits, stays) in enumerate(expected):
        close(found[row, batch["attention_mask"][row].bool()][stays], logits, 2 * TIGHT)


def test_deepstack_rows_are_added_before_the_tokens_leave() -> None:
    model, batch = model_of("qwen3_vl"), batch_of("qwen3_vl", (2,))
    prompt = read_prompt(model, batch)
    assert sorted(prompt.added) == [0, 1]
    for layer in (2, 3):
        expected, stays = reference_row(model, batch, layer)
        with withdraw(model, layer):
            close(logits_of(model, batch)[0, stays], expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["keep", "reset"])
def test_a_padded_batch_equals_each_row_alone(name: str, side: str, positions: str) -> None:
    model, batch = model_of(name), batch_of(name, side=side)
    visual = visual_of(batch).sum(1)
    assert len(visual.unique()) == len(ROWS), "rows lose different numbers of tokens"
    expected = [reference_row(model, alone, 2, positions) for alone in rows_of(name, batch, ROWS)]
    with withdraw(model, 2, positions=positions):
        found = logits_of(model, batch)
        alone = [logits_of(model, row)[0] for row in rows_of(name, batch, ROWS)]
    assert torch.isfinite(found).all()
    for row, (logits, stays) in enumerate(expected):
        real = batch["attention_mask"][row].bool()
        close(found[row, real][stays], logits)
        close(found[row, real], alone[row])


def test_a_place_that_left_has_the_logits_of_the_nearest_place_before_it_that_stayed(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (2,))
    expected, stays = reference_row(model, batch, 2)
    count = batch["input_ids"].shape[1]
    with withdraw(model, 2):
        found = logits_of(model, batch)[0]
    assert found.shape == (count, VOCAB)
    close(found, spread(expected, stays, count))


def test_last_logits_alone_are_the_last_of_all(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    with withdraw(model, 1):
        close(logits_of(model, batch, logits_to_keep=1), logits_of(model, batch)[:, -1:], 1e-6)


def test_two_images_with_text_between_leave_together(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (2,))
    visual = visual_of(batch)[0]
    edges = visual.int().diff().abs().sum()
    assert edges >= 4, "two blocks with text between them"
    with withdraw(model, 2) as handle, torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        counts = list(handle.counts)
    full, text = len(visual), int((~visual).sum())
    assert lengths(cache) == [full, full, text, text]
    assert counts == [full, text]


@pytest.mark.filterwarnings("ignore:.*never seen")
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_without_images_all_is_bit_equal_to_the_stock_model(name: str, layer: int) -> None:
    model, batch = model_of(name), batch_of(name, (0, 0))
    stock, text = logits_of(model, batch), write(model, batch)
    with withdraw(model, layer), torch.no_grad():
        output = model(**batch, use_cache=True)
        assert torch.equal(output.logits, stock)
        assert lengths(output.past_key_values) == [batch["input_ids"].shape[1]] * DEPTH
        assert torch.equal(write(model, batch), text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_leaving_behind_the_last_layer_is_bit_equal_to_the_stock_model(name: str, side: str) -> None:
    model, batch = model_of(name), batch_of(name, side=side)
    stock, text = logits_of(model, batch), write(model, batch)
    for positions in ("keep", "reset"):
        with withdraw(model, DEPTH, positions=positions), torch.no_grad():
            output = model(**batch, use_cache=True)
            assert torch.equal(output.logits, stock)
            assert lengths(output.past_key_values) == [batch["input_ids"].shape[1]] * DEPTH
            assert torch.equal(write(model, batch), text)


def test_leaving_at_layer_0_is_the_text_alone_at_its_old_positions(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (2,))
    prompt, text = read_prompt(model, batch), (~visual_of(batch)[0]).nonzero()[:, 0]
    with torch.no_grad():
        # Without a mask transformers would take the gaps in the positions for borders of packed sequences.
        expected = model(
            inputs_embeds=prompt.states[:, text],
            position_ids=prompt.positions[..., text],
            attention_mask=torch.ones(1, len(text), dtype=torch.long),
        ).logits[0]
    with pytest.warns(TrimtabWarning, match="never seen"), withdraw(model, 0):
        found = logits_of(model, batch)[0, text]
    close(found, expected)


def test_layer_0_sees_no_pixel_at_all(name: str) -> None:
    model, one, two = model_of(name), batch_of(name, (1,), seed=0), batch_of(name, (1,), seed=1)
    two = {**one, "pixel_values": two["pixel_values"]}
    far(logits_of(model, one), logits_of(model, two))
    with pytest.warns(TrimtabWarning, match="never seen"), withdraw(model, 0):
        assert torch.equal(logits_of(model, one), logits_of(model, two))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention_agree(name: str, attention: str) -> None:
    batch = batch_of(name)
    expected = [reference_row(model_of(name), alone, 2) for alone in rows_of(name, batch, ROWS)]
    model = fresh(name)
    model.set_attn_implementation(attention)
    with withdraw(model, 2):
        found, text = logits_of(model, batch), write(model, batch)
    for row, (logits, stays) in enumerate(expected):
        close(found[row, batch["attention_mask"][row].bool()][stays], logits)
    with withdraw(model_of(name), 2):
        assert torch.equal(text, write(model_of(name), batch))


def test_half_precision_runs(name: str) -> None:
    batch = batch_of(name)
    with withdraw(model_of(name), 2):
        expected = logits_of(model_of(name), batch)
    model = fresh(name).bfloat16()
    with withdraw(model, 2):
        found = logits_of(model, batch)
        text = write(model, batch)
    assert found.dtype == torch.bfloat16
    assert text.shape == (len(ROWS), 8)
    real = batch["attention_mask"].bool()
    assert (found.float() - expected)[real].abs().mean() < 0.05


class TestMasks:
    """Masks of every form that a forward takes."""

    def test_no_mask_is_a_mask_of_ones(self, name: str) -> None:
        model, batch = model_of(name), batch_of(name, (2,))
        bare = {key: value for key, value in batch.items() if key != "attention_mask"}
        with withdraw(model, 2):
            close(logits_of(model, bare), logits_of(model, batch), 1e-6)

    def test_rows_that_lose_different_numbers_need_no_mask(self) -> None:
        model = model_of("llava")
        image = [BOS, 5, *[IMAGE] * 36, 6, 7, 8]
        one, none = from_ids("llava", image, 1), from_ids("llava", [BOS, *words(40)[0].tolist()], 0)
        batch = {
            "input_ids": torch.cat((one["input_ids"], none["input_ids"])), "pixel_values": one["pixel_values"],
        }  # fmt: skip
        with withdraw(model, 2):
            found = logits_of(model, batch)
            for row, alone in enumerate((one, none)):
                close(found[row], logits_of(model, alone)[0])

    def test_a_mask_of_four_dimensions_is_cut_with_its_rows_and_columns(self) -> None:
        model, batch = model_of("llava"), batch_of("llava", (2,))
        count = batch["input_ids"].shape[1]
        hidden = torch.rand(count, count, generator=torch.Generator().manual_seed(0)) < 0.3
        seen = (~hidden).fill_diagonal_(True).tril()
        expected, stays = reference_row(model, batch, 2, mask=seen)
        bias = torch.zeros(count, count).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        for mask in (bias, seen[None, None]):
            with withdraw(model, 2):
                close(logits_of(model, batch, attention_mask=mask)[0, stays], expected)

    def test_holes_in_the_mask_stay_holes(self) -> None:
        model, batch = model_of("llava"), batch_of("llava", (1,))
        count = batch["input_ids"].shape[1]
        hole = int(visual_of(batch)[0].nonzero()[-1]) + 3
        mask = torch.ones(1, count, dtype=torch.long)
        mask[0, [0, hole]] = 0
        seen = torch.ones(count, count, dtype=torch.bool).tril() & mask.bool()
        seen[0, 0] = True
        expected, stays = reference_row(model, batch, 2, mask=seen)
        with withdraw(model, 2):
            found = logits_of(model, batch, attention_mask=mask)[0]
        real = stays[mask[0, stays].bool()]
        close(found[real], expected[mask[0, stays].bool()])


class TestPositions:
    """Rotary attention sees differences only."""

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
    def test_with_all_text_behind_the_image_both_rules_agree(self, family: str) -> None:
        model, batch = model_of(family), _image_first(family)
        with withdraw(model, 1, positions="keep"):
            keep = logits_of(model, batch)
        with withdraw(model, 1, positions="reset"):
            reset = logits_of(model, batch)
        text = ~visual_of(batch)[0]
        close(reset[0, text], keep[0, text])
        far(keep[0, text], logits_of(model, batch)[0, text])

    @pytest.mark.parametrize("family", ["llava", "internvl"])
    def test_with_all_text_before_the_image_both_rules_agree(self, family: str) -> None:
        model, first = model_of(family), _image_first(family)
        batch = {**first, "input_ids": first["input_ids"].roll(-int(visual_of(first).sum()), 1)}
        found = []
        for positions in ("keep", "reset"):
            with pytest.warns(TrimtabWarning, match="ends with an image"), withdraw(model, 1, positions=positions):
                found.append(logits_of(model, batch)[0, ~visual_of(batch)[0]])
        close(found[0], found[1])

    def test_with_text_on_both_sides_they_differ(self, name: str) -> None:
        model, batch = model_of(name), batch_of(name, (1,))
        with withdraw(model, 1, positions="keep"):
            keep = logits_of(model, batch)
        with withdraw(model, 1, positions="reset"):
            reset = logits_of(model, batch)
        first = int(visual_of(batch)[0].nonzero()[0])
        close(reset[0, :first], keep[0, :first])
        far(reset[0, -1], keep[0, -1])

    def test_without_an_image_they_agree(self, name: str) -> None:
        model, batch = model_of(name), batch_of(name, (0,))
        with withdraw(model, 1, positions="keep"):
            keep = logits_of(model, batch)
        with withdraw(model, 1, positions="reset"):
            assert torch.equal(logits_of(model, batch), keep)

    def test_given_positions_are_kept(self) -> None:
        model, batch = model_of("llava"), batch_of("llava", (1,))
        gaps = torch.arange(batch["input_ids"].shape[1])[None] * 3 + 7
        prompt = read_prompt(model, {**batch, "position_ids": gaps})
        with torch.no_grad():
            expected, stays = reference(model, prompt, 2)
        with withdraw(model, 2):
            close(logits_of(model, batch, position_ids=gaps)[0, stays], expected)


def _image_first(family: str) -> dict[str, Any]:
    """A row that begins with its image, without anything before it."""
    whole = batch_of(family, (1,))
    tokens = int(visual_of(whole).sum())
    batch = from_ids(family, [*[IMAGE] * tokens, *words(9)[0].tolist()], 1)
    assert not {TILE_START, TILE_END} & set(batch["input_ids"][0].tolist())
    return batch


class TestMaskOfVisualTokens:
    """Where the ids do not tell, the caller does."""

    def test_embeddings_with_a_mask_equal_ids(self) -> None:
        model, batch = model_of("llava"), batch_of("llava")
        embedded = {"inputs_embeds": caught_embeddings(model, batch), "attention_mask": batch["attention_mask"]}
        with withdraw(model, 2):
            expected = logits_of(model, batch)
        with withdraw(model, 2, visual_mask=visual_of(batch)):
            close(logits_of(model, embedded), expected, 1e-6)

    def test_the_mask_may_be_set_later(self) -> None:
        model, batch = model_of("llava"), batch_of("llava")
        embedded = {"inputs_embeds": caught_embeddings(model, batch), "attention_mask": batch["attention_mask"]}
        with withdraw(model, 2) as handle:
            expected = logits_of(model, batch)
            handle.visual_mask = visual_of(batch)
            close(logits_of(model, embedded), expected, 1e-6)

    def test_generation_from_embeddings_equals_generation_from_ids(self) -> None:
        model, batch = model_of("llava"), batch_of("llava")
        embedded = caught_embeddings(model, batch)
        with withdraw(model, 2):
            expected = write(model, batch)
        with withdraw(model, 2, visual_mask=visual_of(batch)):
            found = model.generate(
                inputs_embeds=embedded, attention_mask=batch["attention_mask"], do_sample=False, min_new_tokens=8,
                max_new_tokens=8, suppress_tokens=[TILE_START, TILE_END, 59, IMAGE],
            )  # fmt: skip
        assert torch.equal(found, expected)

    def test_a_plain_language_model_with_a_mask(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = llama_settings(num_hidden_layers=DEPTH)
        del settings["model_type"]
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        batch = {"input_ids": words(12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
        visual = torch.zeros(1, 12, dtype=torch.bool)
        visual[0, 3:8] = True
        prompt = Prompt(model.get_input_embeddings()(batch["input_ids"]), torch.arange(12)[None], visual[0], {})
        with torch.no_grad():
            expected, stays = reference(model, prompt, 2)
        with withdraw(model, 2, visual_mask=visual):
            close(logits_of(model, batch)[0, stays], expected)


class TestOutputs:
    """Outputs of unequal lengths are allowed."""

    def test_hidden_states_have_the_lengths_of_their_layers(self, name: str) -> None:
        model, batch = model_of(name), batch_of(name, (2,))
        text = int((~visual_of(batch)).sum())
        full = batch["input_ids"].shape[1]
        with withdraw(model, 2), torch.no_grad():
            output = model(**batch, output_hidden_states=True)
        close(output.logits, logits_withdrawn(model, batch), 1e-6)
        inside = [states.shape[1] for states in output.hidden_states]
        assert len(inside) == DEPTH + 1
        assert inside[:2] == [full, full]
        assert inside[3:] == [text, text] or inside[3:-1] == [text], "the last states may be spread again"
        assert stack_layers(output.hidden_states[:2]).shape[:3] == (2, 1, full)
        with pytest.raises(
            SettingError, match=rf"stack_layers\.states .* one shape, but .*{full}.* then .*{text}.* sep"
        ):
            stack_layers(output.hidden_states)

    def test_attentions_have_the_lengths_of_their_layers(self) -> None:
        model, batch = fresh("llava"), batch_of("llava", (2,))
        model.set_attn_implementation("eager")
        text, full = int((~visual_of(batch)).sum()), batch["input_ids"].shape[1]
        with withdraw(model, 2), torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions
        assert [found.shape[-2:] for found in attentions] == [(full, full)] * 2 + [(text, text)] * 2


def logits_withdrawn(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with withdraw(model, 2):
        return logits_of(model, batch)


def test_row_of_gives_the_row_without_padding() -> None:
    batch = batch_of("llava")
    alone = row_of("llava", batch, ROWS, 2)
    assert alone["attention_mask"].all()
    assert int(visual_of(alone).sum()) == 72
