"""The methods that VTW is compared with, against loops over the layers written from their definitions."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.methods.vtw.models import (
    DEPTH,
    QUIET,
    ROWS,
    Prompt,
    batch_of,
    close,
    deeper,
    far,
    fresh,
    grown,
    lengths,
    logits_of,
    model_of,
    read_prompt,
    row_of,
    spread,
    visual_of,
    words,
    write,
)
from torch import Tensor

from trimtab.anatomy.drop_inside import InsideDrop, Rows
from trimtab.errors import SettingError, WrongOrderError
from trimtab.methods.vtw import withdraw
from trimtab.methods.vtw.peers import fastv, pyramid_drop, random_drop

Peer = Callable[..., InsideDrop]
Places = Sequence[tuple[int, int, float]]
"""Per stage: at the input of which layer tokens leave, which layer is asked, and the share that stays."""
PEERS: dict[str, tuple[Peer, Places]] = {
    "fastv_1": (functools.partial(fastv, layer=1, keep_ratio=0.3), [(1, 0, 0.3)]),
    "fastv_3": (functools.partial(fastv, layer=3, keep_ratio=0.5), [(3, 2, 0.5)]),
    "pyramid": (pyramid_drop, [(1, 1, 0.5), (2, 2, 0.25), (3, 3, 0.125)]),
    "pyramid_2": (functools.partial(pyramid_drop, layers=[2], keep_ratios=[0.2]), [(2, 2, 0.2)]),
}


@functools.cache
def eager(name: str) -> Any:
    model = copy.deepcopy(model_of(name))
    model.set_attn_implementation("eager")
    return model


def run_block(block: Any, states: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Run one eager layer causally; returns its states and its attention map [place, place], mean over heads."""
    size = states.shape[1]
    bias = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
    maps: list[Tensor] = []
    hook = block.self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    found = block(states, attention_mask=bias, position_embeddings=angles, use_cache=False)
    hook.remove()
    return found, maps[0][0].mean(0)


def reference_states(
    model: Any, prompt: Prompt, places: Places, positions: str = "keep", queries: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Run an eager decoder over one row, layer after layer, ranking visual tokens by whole attention maps.

    Args:
        model: A model with eager attention and nothing attached.
        prompt: The row.
        places: Where which share stays.
        positions: What becomes of positions.
        queries: Places whose attention counts; the last one by default.

    Returns:
        Last states [1, kept, width] and the places kept at the end.
    """
    text = model.get_decoder()
    states, count = prompt.states, prompt.states.shape[1]
    asked = [count - 1] if queries is None else list(queries)
    stays, total = torch.arange(count), int(prompt.visual.sum())
    cos, sin = text.rotary_emb(states, prompt.positions)
    chosen: set[int] = set(range(count))
    for number, block in enumerate(text.layers):
        for layer, look, ratio in places:
            if look == number and total:
                weights = run_block(block, states, (cos, sin))[1]
                standing = stays.tolist()
                score = weights[[standing.index(place) for place in asked]].mean(0).tolist()
                visual = [one for one, place in enumerate(standing) if prompt.visual[place]]
                keep = max(1, math.floor(ratio * total + 1e-6))
                best = sorted(visual, key=lambda one: (-score[one], one))[:keep]
                chosen = {place for one, place in enumerate(standing) if one in best or one not in visual}
            if layer == number:
                index = torch.tensor([one for one, place in enumerate(stays.tolist()) if place in chosen])
                states, stays = states[:, index], stays[index]
                cos, sin = cos[..., index, :], sin[..., index, :]
                if positions == "reset":
                    left = prompt.positions[..., stays]  # numbered anew: what is the least becomes 0, the next 1, ...
                    cos, sin = text.rotary_emb(states, torch.searchsorted(left.unique(), left))
        states = run_block(block, states, (cos, sin))[0]
        if number in prompt.added:
            states = states + torch.zeros_like(states[0]).masked_scatter(prompt.visual[:, None], prompt.added[number])
    return text.norm(states), stays


def reference(name: str, alone: dict[str, Any], *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Logits [kept, vocab] and kept places of one row without padding."""
    model = eager(name)
    with torch.no_grad():
        states, stays = reference_states(model, read_prompt(model, alone), *args, **named)
        return model.lm_head(states)[0], stays


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("peer", PEERS)
def test_prefill_equals_the_loop_over_the_layers(name: str, peer: str, positions: str) -> None:
    attach, places = PEERS[peer]
    model, batch = model_of(name), batch_of(name, (2,))
    expected, stays = reference(name, batch, places, positions)
    stock = logits_of(model, batch)[0]
    with attach(model, positions=positions) as handle:
        found = logits_of(model, batch)[0]
    count = int(visual_of(batch).sum())
    wanted = [len(stock) - count + max(1, math.floor(ratio * count + 1e-6)) for _, _, ratio in places]
    assert handle.counts == [len(stock), *wanted]
    assert len(stays) == wanted[-1]
    far(found[stays], stock[stays])
    close(found, spread(expected, stays, len(found)))


def test_visual_features_that_the_layers_add_are_there_before_tokens_leave() -> None:
    batch = batch_of("qwen3_vl", (2,))
    for attach, places in ((functools.partial(fastv, layer=2), [(2, 1, 0.5)]), PEERS["pyramid_2"]):
        expected, stays = reference("qwen3_vl", batch, places)
        with attach(model_of("qwen3_vl")):
            close(logits_of(model_of("qwen3_vl"), batch)[0], spread(expected, stays, batch["input_ids"].shape[1]))
    with pytest.raises(SettingError, match=r"fastv\.layer must be at least 2 for Qwen3VL.*but 1 came"):
        fastv(model_of("qwen3_vl"), 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("peer", PEERS)
def test_rows_of_a_padded_batch_are_as_alone(name: str, peer: str, side: str) -> None:
    attach, places = PEERS[peer]
    model, batch = model_of(name), batch_of(name, side=side)
    with attach(model):
        together = logits_of(model, batch)
    for row in range(len(ROWS)):
        expected, stays = reference(name, row_of(name, batch, ROWS, row), places)
        real = batch["attention_mask"][row].bool()
        close(together[row, real], spread(expected, stays, int(real.sum())), 2e-5)


@pytest.mark.parametrize("peer", PEERS)
def test_cached_decoding_equals_recomputation(name: str, peer: str) -> None:
    attach, places = PEERS[peer]
    model, batch = model_of(name), batch_of(name, (2,))
    prompt = batch["input_ids"].shape[1]
    with attach(model):
        found = model.generate(
            **batch, do_sample=False, min_new_tokens=6, max_new_tokens=6, suppress_tokens=list(QUIET),
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    written = found.sequences[:, prompt:]
    assert written.shape == (1, 6)
    for step in range(6):
        # What stays was chosen by the last place of the prompt, not by what was written since.
        expected, _ = reference(name, grown(batch, written[:, :step]), places, queries=[prompt - 1])
        close(found.logits[step][0], expected[-1], 2e-5)
    count, cache = int(visual_of(batch).sum()), found.past_key_values
    wanted, kept = [], count
    for layer in range(DEPTH):
        kept = next((max(1, math.floor(share * count + 1e-6)) for at, _, share in places if at == layer), kept)
        wanted.append(prompt + 5 - count + kept)
    assert lengths(cache) == wanted


@pytest.mark.parametrize("peer", PEERS)
def test_padded_rows_write_what_they_write_alone(peer: str) -> None:
    attach, _ = PEERS[peer]
    model, batch = model_of("llava"), batch_of("llava")
    with attach(model):
        together = write(model, batch)
        beams = write(model, batch, num_beams=2)
        for row in range(len(ROWS)):
            alone = row_of("llava", batch, ROWS, row)
            assert torch.equal(write(model, alone)[0], together[row])
            assert torch.equal(write(model, alone, num_beams=2)[0], beams[row])


@pytest.mark.parametrize("peer", PEERS)
def test_a_later_image_loses_its_own_tokens_only(peer: str) -> None:
    attach, places = PEERS[peer]
    model, first = model_of("llava"), batch_of("llava", (1,))
    second = batch_of("llava", (1,), seed=1)
    seen: list[Rows] = []
    with attach(model) as handle:
        spy_on(handle, seen)
        cache = model(**first).past_key_values
        before = lengths(cache)
        mask = torch.cat((first["attention_mask"], second["attention_mask"]), 1)
        model(**{**second, "attention_mask": mask}, past_key_values=cache)
    text, kept = second["input_ids"].shape[1] - 36, 36
    for layer in range(DEPTH):
        kept = next((max(1, math.floor(share * 36 + 1e-6)) for at, _, share in places if at == layer), kept)
        assert lengths(cache)[layer] - before[layer] == text + kept
    assert [rows.total.tolist() for rows in seen] == [[36]] * (2 * len(places))


def spy_on(handle: InsideDrop, seen: list[Rows], stays: list[Tensor] | None = None) -> None:
    """Note what the choosers of a handle see, and which real places of the call they let stay."""
    width: list[int] = []  # the first chooser sees the whole call

    def watch(choose: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
        found = choose(rows)
        seen.append(rows)
        if stays is not None:
            width.append(found.shape[1])
            full = torch.zeros(len(found), width[0], dtype=torch.long)
            stays.append(full.scatter_add(1, rows.source, (found & rows.real).long()) > 0)
        return found

    handle.stages = tuple(
        dataclasses.replace(stage, choose=functools.partial(watch, stage.choose)) for stage in handle.stages
    )


@pytest.mark.parametrize(
    "attach",
    [
        lambda model: fastv(model, keep_ratio=1),
        lambda model: fastv(model, DEPTH),
        lambda model: pyramid_drop(model, [1, 2], [1.0, 1]),
        lambda model: random_drop(model, 2, count=0),
        lambda model: random_drop(model, DEPTH),
    ],
)
def test_where_nothing_leaves_the_model_is_as_it_was(name: str, attach: Peer) -> None:
    model, batch = fresh(name), batch_of(name)
    stock = logits_of(model, batch)
    with attach(model) as handle:
        assert not handle.stages
        assert torch.equal(logits_of(model, batch), stock)
        assert not any(part._forward_pre_hooks for part in model.get_decoder().layers)


@pytest.mark.parametrize("peer", [*PEERS, "random"])
def test_without_an_image_and_when_detached_the_model_is_as_it_was(name: str, peer: str) -> None:
    attach = functools.partial(random_drop, layer=2) if peer == "random" else PEERS[peer][0]
    model, text, batch = model_of(name), batch_of(name, (0, 0)), batch_of(name)
    stock, full = logits_of(model, text), logits_of(model, batch)
    with attach(model):
        assert torch.equal(logits_of(model, text), stock)
        far(logits_of(model, batch), full)
        with pytest.raises(WrongOrderError, match="leave inside already"):
            withdraw(model, 2)
    assert torch.equal(logits_of(model, batch), full)


def answers_of(batch: dict[str, Any]) -> Tensor:
    """True at the places just before each answer span."""
    labelled = batch["labels"] != -100
    before: Tensor = labelled.roll(-1, 1) & ~labelled
    before[:, -1] = False
    return before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("peer", PEERS)
def test_training_asks_the_places_before_answers(name: str, peer: str, side: str) -> None:
    attach, places = PEERS[peer]
    model = fresh(name)
    batch = deeper(name).make_batch(model, ROWS, padding_side=side)
    queries = answers_of(batch)
    assert queries.sum(1).tolist() == [2, 2, 2]
    queries[0, queries[0].nonzero()[-1]] = False  # rows may differ in how many they have
    with attach(model) as handle:
        handle.queries = queries
        found = logits_of(model, batch)
    for row in range(len(ROWS)):
        real = batch["attention_mask"][row].bool()
        asked = queries[row, real].nonzero()[:, 0].tolist()
        expected, stays = reference(name, row_of(name, batch, ROWS, row), places, queries=asked)
        close(found[row, real], spread(expected, stays, int(real.sum())), 2e-5)


@pytest.mark.parametrize("peer", PEERS)
def test_answers_do_not_choose_what_they_are_learnt_from(peer: str) -> None:
    attach, _ = PEERS[peer]
    model = fresh("llava")
    batch = deeper("llava").make_batch(model, (1, 1), turns=1)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    labelled = batch["labels"] != -100
    other["input_ids"][labelled] = words(int(labelled.sum()), seed=9)[0]

    def chosen(queries: Tensor | None) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []
        for one in (batch, other):
            found.append([])
            with attach(model) as handle:
                spy_on(handle, [], found[-1])
                handle.queries = queries
                logits_of(model, one)
        return found

    first, second = chosen(answers_of(batch))
    assert all(map(torch.equal, first, second))
    leaky, other_leaky = chosen(None)
    assert not all(map(torch.equal, leaky, other_leaky))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_under_recomputation(peer: str, reentrant: bool) -> None:
    attach, _ = PEERS[peer]
    batch = deeper("llava").make_batch(model_of("llava"), ROWS)

    def learn(recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = fresh("llava").train()
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with attach(model) as handle:
            handle.queries = answers_of(batch)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        return loss, {key: one.grad for key, one in model.named_parameters() if one.grad is not None}

    loss, gradients = learn(False)
    again, same = learn(True)
    assert torch.equal(loss, again)
    for key, gradient in gradients.items():
        if "language_model" in key or "multi_modal_projector" in key:
            close(same[key], gradient, 1e-6)


def test_explicit_masks_serve_calls_with_embeddings_only() -> None:
    model, batch = model_of("llava"), batch_of("llava", (2,))
    prompt = read_prompt(model, batch)
    for attach, _ in PEERS.values():
        with attach(model):
            expected = logits_of(model, batch)
        with attach(model, visual_mask=prompt.visual[None]), torch.no_grad():
            close(model(inputs_embeds=prompt.states).logits, expected)
    with random_drop(model, 2):
        expected = logits_of(model, batch)
    with random_drop(model, 2, visual_mask=prompt.visual[None]), torch.no_grad():
        close(model(inputs_embeds=prompt.states).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_random_drop_computes_as_much_as_withdrawal(name: str, side: str) -> None:
    model, batch = model_of(name), batch_of(name, side=side)
    with withdraw(model, 2) as handle:
        logits_of(model, batch)
        wanted = handle.counts
    seen: list[Rows] = []
    stays: list[Tensor] = []
    with random_drop(model, 2) as handle:
        spy_on(handle, seen, stays)
        first = logits_of(model, batch)
        assert handle.counts == wanted
        far(logits_of(model, batch), first)
    real = batch["attention_mask"].bool()
    visual = visual_of(batch)
    for found in stays:
        assert torch.equal((real & ~found).sum(1), visual.sum(1))
        assert (real & ~visual & ~found).any()
        assert (visual & found).any()
    with random_drop(model, 2):
        assert torch.equal(logits_of(model, batch), first)
    with random_drop(model, 2, seed=1):
        far(logits_of(model, batch), first)


def test_the_last_place_may_be_spared() -> None:
    model, batch = model_of("llava"), batch_of("llava")
    for spare in (False, True):
        stays: list[Tensor] = []
        with random_drop(model, 2, spare_last=spare) as handle:
            spy_on(handle, [], stays)
            for _ in range(10):
                logits_of(model, batch)
        last = torch.stack([found[:, -1] for found in stays])
        assert last[:, 1].all()  # has no image
        assert last.all() == spare


def test_random_drop_goes_on_from_a_cache() -> None:
    model, batch = model_of("llava"), batch_of("llava", (1,))
    width = batch["input_ids"].shape[1]
    with random_drop(model, 2, count=7):
        found = model.generate(
            **batch, do_sample=False, min_new_tokens=4, max_new_tokens=4, return_dict_in_generate=True
        )
    assert lengths(found.past_key_values) == [width + 3] * 2 + [width - 7 + 3] * 2


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda m: fastv(m, 0),
        r"fastv\.layer must be a whole number from 1 to 4, the layers of Llava.*0 came\. The layer",
    ),
    (lambda m: fastv(m, 5, 1), r"fastv\.layer must be a whole number from 1 to 4, the layers of Llava.*but 5 came"),
    (lambda m: fastv(m, "2"), r"fastv\.layer must be a whole number from 1 to 4, .*but '2' came"),  # type: ignore[arg-type]
    (lambda m: fastv(m, keep_ratio=0.0), r"fastv\.keep_ratio must be a share in \(0, 1\], but 0\.0 came\. 1 keeps all"),
    (lambda m: fastv(m, positions="renumber"), r"fastv\.positions must be 'keep' or 'reset', but 'renumber' came"),  # type: ignore[arg-type]
    (
        lambda m: pyramid_drop(m, [1, 9], [0.5, 0.25]),
        r"pyramid_drop\.layers must be .*from 0 to 4, .*\[1, 9\] came\. At",
    ),
    (
        lambda m: pyramid_drop(m, [1, 2]),
        r"pyramid_drop\.keep_ratios must be a list of 2 shares, .*\[1, 2\], .* came\. Giv",
    ),
    (lambda m: pyramid_drop(m, positions=None), r"pyramid_drop\.positions must be 'keep' or 'reset', but None came"),  # type: ignore[arg-type]
    (
        lambda m: random_drop(m, 5, count=0),
        r"random_drop\.layer must be a whole number from 0 to 4, .*5 came\. At 4 noth",
    ),
    (lambda m: random_drop(m, 2, count=-1), r"random_drop\.count must be a whole number from 0 on, but -1 came"),
    (lambda m: random_drop(m, 2, seed=0.5), r"random_drop\.seed must be a whole number from 0 on, but 0\.5 came"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_wrong_settings(call: Callable[[Any], Any], message: str) -> None:
    model = fresh("llava")
    with pytest.raises(SettingError, match=message):
        call(model)
    with withdraw(model, 2):  # nothing was left behind
        pass


def test_a_model_too_shallow_for_quarters_needs_its_layers_named() -> None:
    model = fresh("llava", 2)
    with pytest.raises(SettingError, match=r"pyramid_drop\.layers must be given .*This model has 2: pass layers"):
        pyramid_drop(model)
    with pyramid_drop(model, [1], [0.5]) as handle:
        assert [stage.layer for stage in handle.stages] == [1]
