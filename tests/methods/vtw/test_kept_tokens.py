"""Visual tokens that stay on request: the first few of a row, and the rows that end a line."""

from __future__ import annotations

import pytest
import torch
from tests.methods.vtw.models import (
    DEPTH,
    ROWS,
    batch_of,
    close,
    far,
    grown,
    lengths,
    logits_of,
    model_of,
    read_prompt,
    reference_row,
    rows_of,
    visual_of,
    words,
    write,
)
from tests.tiny import Batch
from torch import Tensor

from trimtab.methods.vtw import withdraw


def first(batch: Batch, count: int) -> Tensor:
    """Return the first visual places of a row [place]."""
    visual = visual_of(batch)[0]
    return visual & (visual.cumsum(0) <= count)


def newlines(alone: Batch) -> Tensor:
    """Return the places of LLaVA-NeXT's newline rows [place]."""
    model = model_of("llava_next")
    if not visual_of(alone).any():
        return torch.zeros_like(visual_of(alone)[0])
    with torch.no_grad():
        prompt = read_prompt(model, alone)
    return prompt.visual & (prompt.states[0] == model.model.image_newline).all(-1)


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_first_visual_tokens_of_a_row_stay(name: str, count: int, positions: str) -> None:
    model, batch = model_of(name), batch_of(name)
    rows = rows_of(name, batch, ROWS)
    expected = [reference_row(model, alone, 2, positions, first(alone, count)) for alone in rows]
    without = [reference_row(model, alone, 2, positions)[0] for alone in rows]
    with withdraw(model, 2, positions=positions, sink_tokens=count):
        found = logits_of(model, batch)
    for row, (logits, stays) in enumerate(expected):
        close(found[row, batch["attention_mask"][row].bool()][stays], logits)
    far(expected[0][0][-1], without[0][-1])


def test_more_sinks_than_tokens_is_the_stock_model(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    stock, text = logits_of(model, batch), write(model, batch)
    with withdraw(model, 2, sink_tokens=1000):
        real = batch["attention_mask"].bool()
        close(logits_of(model, batch)[real], stock[real])
        assert torch.equal(write(model, batch), text)


def test_sinks_stand_in_the_cache(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (1,))
    full, text = batch["input_ids"].shape[1], int((~visual_of(batch)).sum())
    with withdraw(model, 1, sink_tokens=3) as handle, torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        assert handle.counts == [full, text + 3]
    assert lengths(cache) == [full] + [text + 3] * (DEPTH - 1)


@pytest.mark.parametrize("positions", ["keep", "reset"])
def test_text_with_sinks_is_the_same_with_and_without_cache(name: str, positions: str) -> None:
    model, batch = model_of(name), batch_of(name)
    with withdraw(model, 2, positions=positions, sink_tokens=3):
        assert torch.equal(write(model, batch), write(model, batch, use_cache=False))


@pytest.mark.parametrize("size", [1, 5, 16])
def test_chunks_keep_the_first_of_the_row_not_of_each_chunk(size: int) -> None:
    model, batch = model_of("llava"), batch_of("llava")
    with withdraw(model, 2, sink_tokens=7):
        limits = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        whole = model.generate(**batch, **limits)
        chunked = model.generate(**batch, **limits, prefill_chunk_size=size)
        assert torch.equal(chunked.sequences, whole.sequences)
        assert torch.equal(write(model, batch, 12, prefill_chunk_size=size), write(model, batch, 12))


def test_a_later_image_in_a_chat_has_the_sinks_that_the_whole_conversation_has() -> None:
    model, batch = model_of("llava"), batch_of("llava", (2,))
    edges = visual_of(batch)[0].nonzero()[:, 0]
    start = int(edges[36])
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    with withdraw(model, 2, sink_tokens=2), torch.no_grad():
        expected = logits_of(model, batch)
        cache = model(
            input_ids=ids[:, :start], attention_mask=mask[:, :start], pixel_values=pixels[:1], use_cache=True
        ).past_key_values
        found = model(
            input_ids=ids[:, start:], attention_mask=mask, pixel_values=pixels[1:], past_key_values=cache
        ).logits
    text = ~visual_of(batch)[0, start:]
    close(found[:, text], expected[:, start:][:, text])


@pytest.mark.parametrize("positions", ["keep", "reset"])
def test_newline_rows_stay(positions: str) -> None:
    model, batch = model_of("llava_next"), batch_of("llava_next")
    rows = rows_of("llava_next", batch, ROWS)
    assert [int(newlines(alone).sum()) > 0 for alone in rows] == [True, False, True]
    expected = [reference_row(model, alone, 2, positions, newlines(alone)) for alone in rows]
    with withdraw(model, 2, positions=positions, keep_newlines=True):
        found = logits_of(model, batch)
        assert torch.equal(write(model, batch), write(model, batch, use_cache=False))
    for row, (logits, stays) in enumerate(expected):
        close(found[row, batch["attention_mask"][row].bool()][stays], logits)
    far(expected[0][0][-1], reference_row(model, rows[0], 2, positions)[0][-1])


def test_newlines_and_sinks_stay_together() -> None:
    model, batch = model_of("llava_next"), batch_of("llava_next", (2,))
    also = newlines(batch) | first(batch, 3)
    assert int(also.sum()) == int(newlines(batch).sum()) + 3
    expected, stays = reference_row(model, batch, 2, "keep", also)
    with withdraw(model, 2, keep_newlines=True, sink_tokens=3):
        close(logits_of(model, batch)[0, stays], expected)


def test_newlines_of_a_prompt_in_chunks() -> None:
    model, batch = model_of("llava_next"), batch_of("llava_next", (1, 1), text_lengths=[3, 6])
    with withdraw(model, 2, keep_newlines=True):
        assert torch.equal(write(model, batch, prefill_chunk_size=5), write(model, batch))


def test_a_step_after_newlines_equals_recomputation() -> None:
    model, batch, more = model_of("llava_next"), batch_of("llava_next", (1,)), words(4)
    whole = grown(batch, more)
    with withdraw(model, 2, keep_newlines=True), torch.no_grad():
        expected = logits_of(model, whole)[:, -4:]
        cache = model(**batch, use_cache=True).past_key_values
        found = model(input_ids=more, attention_mask=whole["attention_mask"], past_key_values=cache).logits
    close(found, expected)
