"""Decoding with caches whose layers have unequal lengths equals running everything again."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import caught_embeddings
from tests.methods.vtw.models import (
    DEPTH,
    ROWS,
    batch_of,
    close,
    far,
    fresh,
    from_ids,
    grown,
    lengths,
    logits_of,
    model_of,
    positions_of,
    reference_row,
    row_of,
    rows_of,
    visual_of,
    words,
    write,
)
from tests.tiny import BOS, IMAGE, PAD, VIDEO, Batch
from torch import Tensor
from transformers import DynamicCache

from trimtab.errors import TrimtabWarning, WrongOrderError
from trimtab.methods.vtw import withdraw

STEPS = 8


def prefilled(model: Any, batch: Batch) -> Any:
    """Run the prompt and return its output, with the cache."""
    with torch.no_grad():
        return model(**batch, use_cache=True)


def go_on(model: Any, name: str, batch: Batch, more: Tensor, cache: Any) -> Tensor:
    """Feed words behind a batch that is in the cache; return their logits."""
    whole = grown(batch, more)
    given: Batch = {"input_ids": more, "attention_mask": whole["attention_mask"], "past_key_values": cache}
    given["position_ids"] = positions_of(name, whole)[..., -more.shape[1] :]
    return logits_of(model, given)


def pick(model: Any, name: str, batch: Batch, more: Tensor) -> Tensor:
    """Return the logits of words behind a batch, all of it computed anew."""
    return logits_of(model, grown(batch, more), use_cache=False)[:, -more.shape[1] :]


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("images", [(2,), ROWS], ids=["alone", "padded"])
def test_eight_cached_steps_equal_recomputation(name: str, images: tuple[int, ...], positions: str) -> None:
    model, batch = model_of(name), batch_of(name, images)
    more = words(STEPS, seed=3, rows=len(images))
    last = [
        reference_row(model, grown(alone, more[row : row + 1]), 2, positions)[0]
        for row, alone in enumerate(rows_of(name, batch, images))
    ]
    with withdraw(model, 2, positions=positions):
        expected = pick(model, name, batch, more)
        cache = prefilled(model, batch).past_key_values
        for step in range(STEPS):
            seen = grown(batch, more[:, :step]) if step else batch
            found = go_on(model, name, seen, more[:, step : step + 1], cache)
            close(found[:, 0], expected[:, step])
    close(expected, torch.stack([logits[-STEPS:] for logits in last]))


def test_steps_without_positions_and_mask_continue_behind_the_whole_prompt() -> None:
    model, batch, more = model_of("llava"), batch_of("llava", (1,)), words(4)
    with withdraw(model, 2):
        expected = pick(model, "llava", batch, more)
        cache = prefilled(model, {k: v for k, v in batch.items() if k != "attention_mask"}).past_key_values
        found = [logits_of(model, {"input_ids": word, "past_key_values": cache}) for word in more.split(1, 1)]
    close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("positions", ["keep", "reset"])
def test_steps_beside_a_row_of_words_that_loses_nothing(positions: str) -> None:
    model = model_of("llava")
    image, text = (
        from_ids("llava", [BOS, 5, *[IMAGE] * 36, 6, 7], 1),
        from_ids("llava", [BOS, *words(39)[0].tolist()], 0),
    )
    batch = {**image, **{key: torch.cat((image[key], text[key])) for key in text}}
    more = words(3, rows=2)
    with withdraw(model, 2, positions=positions):
        cache = prefilled(model, batch).past_key_values
        assert lengths(cache) == [40] * DEPTH, "the deep layers are as long as the longest row"
        found = [
            go_on(model, "llava", grown(batch, more[:, :step]), more[:, step : step + 1], cache) for step in range(3)
        ]
        close(torch.cat(found, 1), pick(model, "llava", batch, more))
        for row, alone in enumerate((image, text)):
            close(torch.cat(found, 1)[row], pick(model, "llava", alone, more[row : row + 1])[0])


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("layer", [1, 3])
def test_greedy_text_is_the_same_with_and_without_cache(name: str, layer: int, positions: str) -> None:
    model, batch = model_of(name), batch_of(name)
    stock = write(model, batch, 12)
    with withdraw(model, layer, positions=positions):
        cached, anew = write(model, batch, 12), write(model, batch, 12, use_cache=False)
    assert torch.equal(cached, anew)
    assert not torch.equal(cached, stock)


def test_a_padded_batch_writes_what_each_prompt_writes_alone(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    with withdraw(model, 2):
        together = write(model, batch)
        for row, alone in enumerate(rows_of(name, batch, ROWS)):
            assert torch.equal(write(model, alone)[0], together[row])


def test_layers_of_the_cache_have_their_own_lengths(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (1,))
    full, text = batch["input_ids"].shape[1], int((~visual_of(batch)).sum())
    for layer in (1, 2, 3):
        with withdraw(model, layer):
            cache = prefilled(model, batch).past_key_values
            assert lengths(cache) == [full] * layer + [text] * (DEPTH - layer)
            go_on(model, name, batch, words(1), cache)
            assert lengths(cache) == [full + 1] * layer + [text + 1] * (DEPTH - layer)


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("layer", [1, 2])
def test_beam_search_equals_beam_search_without_cache(name: str, layer: int, beams: int) -> None:
    model, batch = model_of(name), batch_of(name, (1, 1), text_lengths=[3, 6])
    assert not batch["attention_mask"].all(), "one row is padded"
    settings: dict[str, Any] = {"num_beams": beams, "num_return_sequences": 2}
    orders: list[list[int]] = []

    def reorder(cache: Any, order: Tensor) -> None:
        orders.append(order.tolist())
        stock(cache, order)

    stock = DynamicCache.reorder_cache
    with withdraw(model, layer), mock.patch.object(DynamicCache, "reorder_cache", reorder):
        cached = write(model, batch, **settings)
        assert any(order != list(range(2 * beams)) for order in orders), "beams change their places"
        assert torch.equal(cached, write(model, batch, **settings, use_cache=False))


def test_beams_of_rows_with_and_without_an_image() -> None:
    model, batch = model_of("llava"), batch_of("llava", (1, 0))
    with withdraw(model, 2):
        assert torch.equal(write(model, batch, num_beams=2), write(model, batch, num_beams=2, use_cache=False))


class TestCacheOperations:
    """What users and `generate` do with a cache between calls."""

    @pytest.fixture
    def prompt(self) -> Batch:
        return batch_of("llava", (1,))

    def test_reordered_beams(self, prompt: Batch) -> None:
        model = model_of("llava")
        batch = {**prompt, **{key: prompt[key].repeat(2, 1) for key in ("input_ids", "attention_mask")}}
        batch["pixel_values"] = prompt["pixel_values"].repeat(2, 1, 1, 1)
        more = words(3, rows=2)
        order = torch.tensor([1, 0])
        with withdraw(model, 2):
            expected = pick(model, "llava", batch, torch.cat((more[order], words(1, 9, 2)), 1))[:, -1]
            cache = prefilled(model, batch).past_key_values
            go_on(model, "llava", batch, more, cache)
            cache.reorder_cache(order)
            assert lengths(cache)[1] > lengths(cache)[2]
            found = go_on(model, "llava", grown(batch, more[order]), words(1, 9, 2), cache)[:, -1]
        close(found, expected)

    def test_a_copy_of_a_cache_serves_several_questions(self, prompt: Batch) -> None:
        model = model_of("llava")
        with withdraw(model, 2):
            cache = prefilled(model, prompt).past_key_values
            for seed in (1, 2):
                asked = grown(prompt, words(4, seed))
                ids = {key: asked[key] for key in ("input_ids", "attention_mask")}
                found = write(model, ids, past_key_values=copy.deepcopy(cache))
                assert torch.equal(found, write(model, asked))
            assert lengths(cache)[0] == prompt["input_ids"].shape[1], "the first cache is as it was"

    def test_a_repeated_cache_serves_a_batch_of_questions(self, prompt: Batch) -> None:
        model, more = model_of("llava"), words(4, rows=3)
        with withdraw(model, 2):
            cache = prefilled(model, prompt).past_key_values
            cache.batch_repeat_interleave(3)
            batch = {key: prompt[key].repeat(3, 1) for key in ("input_ids", "attention_mask")}
            found = go_on(model, "llava", batch, more, cache)
            again = go_on(model, "llava", grown(batch, more), words(1, 5, 3), cache)
            for row in range(3):
                mine = grown(prompt, more[row : row + 1])
                close(found[row], pick(model, "llava", prompt, more[row : row + 1])[0])
                close(again[row], pick(model, "llava", mine, words(1, 5, 3)[row : row + 1])[0])

    def test_other_rows_than_those_of_the_cache_are_refused(self) -> None:
        model, batch = model_of("llava"), batch_of("llava")
        keep, more = torch.tensor([2, 0]), words(3, rows=2)
        with withdraw(model, 2):
            cache = prefilled(model, batch).past_key_values
            chosen = {key: batch[key][keep] for key in ("input_ids", "attention_mask")}
            with pytest.raises(WrongOrderError, match="filled for 3 rows, but 2 came"):
                go_on(model, "llava", chosen, more, cache)

    @pytest.mark.parametrize("images", [(1,), (1, 0)], ids=["alone", "padded"])
    @pytest.mark.parametrize("positions", ["keep", "reset"])
    def test_cropped_words_are_as_if_never_fed(self, images: tuple[int, ...], positions: str) -> None:
        model, batch, rows = model_of("llava"), batch_of("llava", images), len(images)
        wrong, right = words(5, 1, rows), words(5, 2, rows)
        with withdraw(model, 2, positions=positions):
            cache = prefilled(model, batch).past_key_values
            go_on(model, "llava", batch, wrong, cache)
            before = lengths(cache)
            cache.crop(-3)
            assert lengths(cache) == [length - 3 for length in before]
            start = grown(batch, wrong[:, :2])
            close(go_on(model, "llava", start, right, cache), pick(model, "llava", start, right))

    def test_a_reset_cache_begins_anew(self, prompt: Batch) -> None:
        model, other = model_of("llava"), batch_of("llava", (2,), seed=4)
        with withdraw(model, 2):
            expected = logits_of(model, other)
            cache = prefilled(model, prompt).past_key_values
            cache.reset()
            close(logits_of(model, other, past_key_values=cache), expected, 1e-6)
            close(go_on(model, "llava", other, words(2), cache), pick(model, "llava", other, words(2)))

    def test_two_caches_in_turn(self, prompt: Batch) -> None:
        model, other, more = model_of("llava"), batch_of("llava", (0, 2), seed=4), words(3, 7, 2)
        with withdraw(model, 2):
            expected = pick(model, "llava", prompt, more[:1]), pick(model, "llava", other, more)
            first, second = (prefilled(model, batch).past_key_values for batch in (prompt, other))
            for step in range(3):
                for batch, cache, result in ((prompt, first, expected[0]), (other, second, expected[1])):
                    mine = more[: len(result)]
                    seen = grown(batch, mine[:, :step])
                    close(go_on(model, "llava", seen, mine[:, step : step + 1], cache)[:, 0], result[:, step])

    def test_a_cache_filled_while_detached_continues_whole(self, prompt: Batch) -> None:
        model, more = model_of("llava"), words(2)
        expected = pick(model, "llava", prompt, more)
        cache = prefilled(model, prompt).past_key_values
        with withdraw(model, 2):
            close(go_on(model, "llava", prompt, more, cache), expected)


class TestChat:
    """A later turn may bring another image, and the cache of the turns before."""

    @pytest.mark.parametrize("positions", ["keep", "reset"])
    def test_a_second_image_leaves_as_in_the_whole_conversation(self, name: str, positions: str) -> None:
        model, whole = model_of(name), batch_of(name, (2,))
        first, later = turns_of(name, whole)
        assert visual_of(first).any()
        assert visual_of(later).any()
        start, reference = first["input_ids"].shape[1], reference_row(model, whole, 2, positions)[0]
        with withdraw(model, 2, positions=positions):
            expected = logits_of(model, whole, use_cache=False)
            cache = prefilled(model, first).past_key_values
            found = logits_of(model, later, past_key_values=cache)
            more = words(2)
            close(go_on(model, name, whole, more, cache), pick(model, name, whole, more))
        text = ~visual_of(whole)[0]
        close(expected[0, text], reference)
        close(found[0, text[start:]], expected[0, start:][text[start:]])
        full, left = len(text) + 2, int(text.sum()) + 2
        assert lengths(cache) == [full, full, left, left]

    @pytest.mark.parametrize("positions", ["keep", "reset"])
    def test_rows_of_a_batch_bring_an_image_in_different_turns(self, positions: str) -> None:
        model = model_of("llava")
        whole = {key: torch.cat([turn[key] for turn in TURNS], 1) for key in ("input_ids", "attention_mask")}
        pixels = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        more = words(3, rows=4)
        with withdraw(model, 2, positions=positions):
            # The images of a call come row by row: rows 0 and 2 have theirs in the first turn, 1 and 2 in the second.
            expected = logits_of(model, grown({**whole, "pixel_values": pixels[[0, 2, 1, 3]]}, more), use_cache=False)
            cache = prefilled(model, {**TURNS[0], "pixel_values": pixels[[0, 1]]}).past_key_values
            later = {"input_ids": TURNS[1]["input_ids"], "attention_mask": whole["attention_mask"]}
            found = logits_of(model, {**later, "pixel_values": pixels[[2, 3]]}, past_key_values=cache)
            steps = go_on(model, "llava", whole, more, cache)
        start, full = TURNS[0]["input_ids"].shape[1], whole["input_ids"].shape[1]
        text = ~visual_of(later) & TURNS[1]["attention_mask"].bool()
        close(found[text], expected[:, start:full][text])
        close(steps, expected[:, full:])

    def test_generation_takes_the_cache_of_the_first_turn(self) -> None:
        model, whole = model_of("llava"), batch_of("llava", (2,))
        first, later = turns_of("llava", whole)
        settings = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
        first = {key: first[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        with withdraw(model, 2):
            said = model.generate(**first, return_dict_in_generate=True, **settings)
            ids = torch.cat((said.sequences, later["input_ids"]), 1)
            both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            new = {**both, "pixel_values": later["pixel_values"], "past_key_values": said.past_key_values}
            assert torch.equal(write(model, new), write(model, {**both, "pixel_values": whole["pixel_values"]}))

    def test_a_turn_of_words_alone(self, name: str) -> None:
        model, batch = model_of(name), batch_of(name)
        more = words(7, rows=len(ROWS))
        with withdraw(model, 2):
            cache = prefilled(model, batch).past_key_values
            close(go_on(model, name, batch, more, cache), pick(model, name, batch, more))


def turn(seed: int, images: tuple[int, ...], padding: tuple[int, ...]) -> Batch:
    """Return a turn of 48 places in every row: padding, 36 image tokens or none among words."""
    rows = []
    for row, (image, left) in enumerate(zip(images, padding, strict=True)):
        said = words(48, 10 * seed + row)[0]
        if image:
            said[left + 4 : left + 40] = IMAGE
        said[:left] = PAD
        rows.append(said)
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


TURNS = (turn(1, (1, 0, 1, 0), (0, 3, 5, 0)), turn(2, (0, 1, 1, 0), (0, 0, 0, 4)))


def turns_of(name: str, whole: Batch) -> tuple[Batch, Batch]:
    """Cut a row of two images in front of its second; the second part goes with the cache of the first."""
    family, visual = SUITE[name], visual_of(whole)[0]
    before = int(visual_of(batch_of(name, (1,))).sum())
    start = int(visual.nonzero()[before]) - family.fence
    positions = positions_of(name, whole)
    if name == "smolvlm":  # all tiles of a row stand in one tensor
        parts = [{key: whole[key][:, span] for key in TILES} for span in (slice(3), slice(3, 5))]
    else:
        parts = [family.visual_of_row(whole, (1, 1), number) for number in range(2)]
    first = {"input_ids": whole["input_ids"][:, :start], "attention_mask": whole["attention_mask"][:, :start]}
    later = {"input_ids": whole["input_ids"][:, start:], "attention_mask": whole["attention_mask"]}
    first, later = {**first, **parts[0]}, {**later, **parts[1]}
    return {**first, "position_ids": positions[..., :start]}, {**later, "position_ids": positions[..., start:]}


TILES = ("pixel_values", "pixel_attention_mask")


@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("positions", ["keep", "reset"])
def test_a_prompt_in_chunks_writes_what_the_whole_writes(size: int, positions: str) -> None:
    model, batch = model_of("llava"), batch_of("llava")
    with withdraw(model, 2, positions=positions):
        whole = write(model, batch)
        assert torch.equal(write(model, batch, prefill_chunk_size=size), whole)


def test_chunks_of_other_families(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (1, 1), text_lengths=[3, 6])
    with withdraw(model, 2):
        whole = write(model, batch)
        assert torch.equal(write(model, batch, prefill_chunk_size=7), whole)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_chunk_of_nothing_but_the_image(before: int, attention: str) -> None:
    model = fresh()
    model.set_attn_implementation(attention)
    batch = from_ids("llava", [BOS, 7][:before] + [IMAGE] * 36 + words(6)[0].tolist(), 1)
    states, visual, full = caught_embeddings(model, batch), visual_of(batch), before + 42
    cache = DynamicCache()
    with withdraw(model, 2) as handle:
        expected = logits_of(model, batch)
        for chunk in (slice(before), slice(before, 20), slice(20, before + 36), slice(before + 36, full)):
            if not visual[0, chunk].numel():
                continue
            handle.visual_mask = visual[:, chunk]
            with torch.no_grad():
                output = model(inputs_embeds=states[:, chunk], past_key_values=cache)
        handle.visual_mask = None
        close(output.logits, expected[:, before + 36 :])
        assert lengths(cache) == [full, full, before + 8, before + 8], "padding stands for each chunk of image alone"
        more = words(2)
        close(go_on(model, "llava", batch, more, cache), pick(model, "llava", batch, more))


def test_a_row_without_any_text_beside_others() -> None:
    model = model_of("llava")
    alone = from_ids("llava", [IMAGE] * 36, 1)
    with pytest.warns(TrimtabWarning, match="ends with an image"), withdraw(model, 2):
        assert torch.isfinite(logits_of(model, alone)).all()
    other = from_ids("llava", [BOS, *words(35)[0].tolist()], 0)
    both = {**alone, **{key: torch.cat((alone[key], other[key])) for key in other}}
    with pytest.warns(TrimtabWarning, match="ends with an image"), withdraw(model, 2):
        found, expected = logits_of(model, both), logits_of(model, other)
    assert torch.isfinite(found).all()
    close(found[1], expected[0])


@pytest.mark.parametrize("guesses", [2, 5])
@pytest.mark.parametrize("positions", ["keep", "reset"])
def test_prompt_lookup_writes_what_greedy_writes(name: str, guesses: int, positions: str) -> None:
    model, batch = model_of(name), batch_of(name, (1,))
    with withdraw(model, 2, positions=positions):
        plain = write(model, batch, 24)
        assert torch.equal(write(model, batch, 24, prompt_lookup_num_tokens=guesses), plain)


def test_an_assistant_writes_what_greedy_writes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, batch = model_of("llava"), batch_of("llava", (1,))
    torch.manual_seed(1)
    settings = model.config.text_config.to_dict()
    assistant = LlamaForCausalLM(LlamaConfig(**{**settings, "num_hidden_layers": 1})).eval()
    with withdraw(model, 2):
        plain = write(model, batch, 12)
        try:
            found = write(model, batch, 12, assistant_model=assistant)
        except (TypeError, ValueError) as error:
            pytest.skip(f"this release gives assistants the image: {error}")
        assert torch.equal(found, plain)


def test_sampling_sees_the_same_probabilities() -> None:
    model, batch = model_of("llava"), batch_of("llava")
    found = []
    with withdraw(model, 2):
        for cached in (True, False):
            torch.manual_seed(7)
            found.append(write(model, batch, do_sample=True, use_cache=cached))
    assert torch.equal(found[0], found[1])


def test_deeper_withdrawal_comes_nearer_to_the_stock_model() -> None:
    model, batch = model_of("llava", 6), batch_of("llava", (1,))
    stock = logits_of(model, batch)[0, -1].softmax(-1)
    apart = []
    for layer in range(1, 7):
        with withdraw(model, layer):
            apart.append(float((logits_of(model, batch)[0, -1].softmax(-1) - stock).abs().sum()))
    assert apart[-1] == 0
    assert apart[0] > 0
    far(torch.tensor(apart[0]), torch.tensor(0.0))


@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0]])
@pytest.mark.parametrize("way", ["reorder_cache", "batch_select_indices"])
def test_what_left_follows_the_rows_of_a_cache(way: str, order: list[int]) -> None:
    """Rows of different prompts change places in a filled cache, with what each of them has lost."""
    model, batch, rows = model_of("llava"), batch_of("llava", (1, 0)), torch.tensor(order)
    more = words(2, rows=len(order))
    with withdraw(model, 2), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        getattr(cache, way)(rows)
        whole = grown({name: batch[name][rows] for name in ("input_ids", "attention_mask")}, more)
        mask = whole["attention_mask"]
        found = logits_of(
            model,
            {"input_ids": more, "attention_mask": mask},
            past_key_values=cache,
            position_ids=torch.arange(mask.shape[1])[None, -2:].expand(len(order), -1),
        )
        for number, row in enumerate(order):
            alone = grown(row_of("llava", batch, (1, 0), row), more[number : number + 1])
            close(found[number], logits_of(model, alone, use_cache=False)[0, -2:])
