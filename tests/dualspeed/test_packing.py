"""Packing: the rows of a batch in one sequence give the losses and gradients of the padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.dualspeed.common import ROWS, attached, portrait, same_model
from tests.dualspeed.packing_tools import (
    SETTINGS,
    STOCK,
    implementations,
    in_words,
    label_count,
    only_row,
    row_lengths,
    same_gradients,
    same_loss,
    same_step,
    seen_by_decoder,
    take_step,
)
from tests.tiny import FAMILIES, IMAGE, TinyFamily, gradients, tiny_llava, weights

from trimtab import DualSpeedConfig

LLAVA = FAMILIES["llava"]
SHAPES = {"usual": ROWS, "text only": (0, 0), "one each": (1, 1, 1), "one row": (2,), "text first": (0, 2)}


@pytest.fixture(params=["llava", "llava_next", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def attend_by(model: Any, implementation: str) -> Any:
    model.get_decoder().set_attn_implementation(implementation)
    return model


# off is identity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detaching_leaves_the_model_as_it_was(family: TinyFamily, implementation: str) -> None:
    model = attend_by(family.build_model().train(), implementation)
    batch = family.make_batch(model, ROWS)
    model(**batch)  # transformers installs its own capturing hooks on the first forward
    before, attention = (portrait(model), weights(model)), implementations(model)
    with attached(model, packing=True, **SETTINGS) as handle:
        for mode in ("fast", "slow"):
            with handle.force_mode(mode):
                model(**batch).loss.backward()
    model.zero_grad()
    same_model(model, before)
    assert implementations(model) == attention
    assert implementation in attention.values(), "or nothing was compared"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_evaluation_and_generate_are_untouched_while_attached(family: TinyFamily, implementation: str) -> None:
    model = attend_by(family.build_model(), implementation)
    batch = family.make_batch(model, ROWS)
    alone = family.make_batch(model, [1], text_lengths=[3], turns=1)
    prompt = {name: value for name, value in alone.items() if name != "labels"}

    def answers() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            out = model.eval()(**batch)
            return out.loss, out.logits, model.generate(**prompt, max_new_tokens=4, do_sample=False)

    expected = answers()
    saved = model.config.to_json_string()
    with attached(model, packing=True, **SETTINGS) as handle:
        model.train()(**batch).loss.backward()
        found = answers()
        assert model.config.to_json_string() == saved, "what is saved meanwhile is the stock configuration"
        assert handle.micro_step == 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_an_exception_inside_the_forward_leaves_no_trace(mode: str) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    model(**batch)
    before, attention = (portrait(model), weights(model)), implementations(model)

    def fail(*_: Any) -> None:
        raise ArithmeticError("made to fail")

    with attached(model, packing=True, **SETTINGS) as handle, handle.force_mode(mode):
        expected = model(**batch).loss.detach()
        while_attached = portrait(model)
        hook = model.get_decoder().layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError, match="made to fail"):
            model(**batch)
        hook.remove()
        assert portrait(model) == while_attached
        assert torch.equal(model(**batch).loss.detach(), expected), "the next forward works as if nothing had been"
    same_model(model, before)
    assert implementations(model) == attention


# packed is padded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_packed_is_padded(family: TinyFamily, mode: str, positions: str, side: str) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS, padding_side=side)
    padded, packed = (take_step(model, batch, mode, positions=positions, packing=packing) for packing in (False, True))
    same_step(packed, padded)
    assert packed.metrics.keys() >= padded.metrics.keys()
    for name, value in padded.metrics.items():
        assert packed.metrics[name] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_packed_is_padded_to_the_last_bits_in_double_precision(family: TinyFamily, mode: str) -> None:
    """What float32 leaves between the two is the order of its sums, and nothing else."""
    model = family.build_model().double().train()
    batch = {
        name: value.double() if value.is_floating_point() else value
        for name, value in family.make_batch(model, ROWS).items()
    }
    padded, packed = (take_step(model, batch, mode, packing=packing) for packing in (False, True))
    same_step(packed, padded, share=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isolator", [0, 2])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_packed_is_padded_whatever_the_rows_hold(mode: str, isolator: int, shape: str) -> None:
    for name in ("llava", "qwen2_5_vl"):
        family = FAMILIES[name]
        model = family.build_model().train()
        batch = family.make_batch(model, SHAPES[shape], padding_side="left")
        settings = {"isolator_tokens": isolator, "temperature": 2.0, "kl_weight": 0.5}
        padded, packed = (take_step(model, batch, mode, packing=packing, **settings) for packing in (False, True))
        same_step(packed, padded)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_packed_is_padded_under_eager_attention(family: TinyFamily, mode: str) -> None:
    model = attend_by(family.build_model().train(), "eager")
    batch = family.make_batch(model, ROWS)
    padded, packed = (take_step(model, batch, mode, positions="renumber", packing=packing) for packing in (False, True))
    same_step(packed, padded)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_videos_are_packed_too(mode: str) -> None:
    for name in ("qwen2_5_vl", "qwen3_vl"):
        family = FAMILIES[name]
        model = family.build_model().train()
        batch = family.make_batch(model, (1, 0, 1), videos_per_row=(0, 1, 1))
        padded, packed = (take_step(model, batch, mode, packing=packing) for packing in (False, True))
        same_step(packed, padded)


def test_a_batch_without_mask_is_packed_too() -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, (1, 1), text_lengths=(4, 4))
    assert batch["attention_mask"].all()
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    same_step(take_step(model, without, "slow", packing=True), take_step(model, batch, "slow"))


def test_the_loss_is_divided_by_the_labels_of_the_update() -> None:
    model = tiny_llava()
    batch = {**LLAVA.make_batch(model, ROWS), "num_items_in_batch": torch.tensor(50)}
    padded, packed = (take_step(model, batch, "slow", packing=packing) for packing in (False, True))
    same_step(packed, padded)
    of_batch = take_step(model, LLAVA.make_batch(model, ROWS), "slow", packing=True)
    same_loss(packed.loss, of_batch.loss * label_count(batch) / 50)


def test_the_last_token_of_a_row_does_not_predict_the_first_of_the_next() -> None:
    """With every token labelled, also the first of every row, padded rows teach all but their first."""
    model = tiny_llava()
    for side in ("right", "left"):
        batch = LLAVA.make_batch(model, ROWS, padding_side=side)
        batch["labels"] = batch["input_ids"].masked_fill((batch["attention_mask"] == 0), -100)
        batch["labels"][batch["input_ids"] == IMAGE] = -100
        padded, packed = (take_step(model, batch, "fast", packing=packing) for packing in (False, True))
        same_step(packed, padded)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_packed_step_returns_a_tuple_on_request(mode: str) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    with attached(model, packing=True, **SETTINGS) as handle, handle.force_mode(mode):
        output = model(**batch)
        as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)


@pytest.mark.filterwarnings("ignore:A batch has no supervised label")
def test_a_pack_without_labels_teaches_nothing() -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    batch["labels"].fill_(-100)
    for mode in ("fast", "slow"):
        with attached(model, packing=True, **SETTINGS) as handle, handle.force_mode(mode):
            loss = model(**batch).loss
            loss.backward()
            assert loss.item() == 0
            assert handle.metrics()["unlabelled_batches"] == 1
        assert not any(one.any() for one in gradients(model).values())


def test_schedule_and_choice_of_a_random_pruner_are_those_of_padded_steps() -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    found = []
    for packing in (False, True):
        steps = []
        settings = {"pruner": "random", "slow_ratio": 0.5, "schedule": "bernoulli", "schedule_unit": "micro"}
        with attached(model, packing=packing, **SETTINGS, **settings) as handle:
            for _ in range(6):
                loss = model(**batch).loss
                steps.append((handle.metrics()["mode"], loss.item()))
            assert handle.micro_step == 6
        found.append(steps)
    assert [mode for mode, _ in found[0]] == [mode for mode, _ in found[1]]
    assert {mode for mode, _ in found[0]} == {"fast", "slow"}
    assert len({round(loss, 5) for _, loss in found[0]}) > 2, "every fast step chooses anew, or the draw is not seen"
    assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in found[0]], abs=2e-6)


# one row, no padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", [ROWS, (0, 0)], ids=["images", "text only"])
def test_the_language_model_sees_one_row_without_padding(family: TinyFamily, side: str, rows: tuple[int, ...]) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, rows, padding_side=side)
    every = row_lengths(model, batch, "full")
    full, pruned = sum(every), row_lengths(model, batch, "pruned") if any(rows) else every
    assert (sum(pruned) < full) == any(rows)
    assert full < batch["input_ids"].numel(), "there is padding, or this test could not fail"
    # Rows without image lose nothing, so they have nothing to learn from a teacher.
    taught = [sum(length for length, images in zip(pruned, rows, strict=True) if images)] if any(rows) else []
    for mode, expected in {"fast": [sum(pruned)], "slow": [*taught, full]}.items():
        with seen_by_decoder(model) as calls, attached(model, packing=True, **SETTINGS) as handle:
            with handle.force_mode(mode):
                model(**batch).loss.backward()
            assert [tuple(one.shape[:2]) for one in calls] == [(1, total) for total in expected]
    model.zero_grad()


@pytest.mark.parametrize("mode", ["fast", "slow"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_gradient_of_a_row_reaches_another(family: TinyFamily, mode: str, implementation: str) -> None:
    model = attend_by(family.build_model().train(), implementation)
    batch = family.make_batch(model, (1, 1, 0, 2))
    lengths = row_lengths(model, batch, "full" if mode == "slow" else "pruned")
    settings = {**SETTINGS, "packing": True, "positions": "renumber"}
    for row in range(4):
        with seen_by_decoder(model) as calls, attached(model, **settings) as handle, handle.force_mode(mode):
            model(**only_row(batch, row)).loss.backward()
        reached = [bool(part.any()) for part in calls[-1].grad[0].split(lengths)]
        assert reached == [number == row for number in range(4)]
    model.zero_grad()


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_words_of_a_row_change_no_loss_of_another(family: TinyFamily, mode: str) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    with attached(model, packing=True, **SETTINGS) as handle, handle.force_mode(mode), torch.enable_grad():
        for row in range(3):
            mine = only_row(batch, row)
            expected = model(**mine).loss
            for changed in range(3):
                found = model(**in_words(mine, changed, 5)).loss
                assert torch.equal(found, expected) == (changed != row)


# plain training, packed -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:slow_ratio=0 trains the language model on pruned images only")
@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_training_can_be_packed(family: TinyFamily, side: str) -> None:
    for rows in (ROWS, (0, 0)):
        model = family.build_model().train()
        batch = family.make_batch(model, rows, padding_side=side)
        stock = model(**batch, use_cache=False).loss
        stock.backward()
        expected = gradients(model)
        model.zero_grad(set_to_none=True)
        with seen_by_decoder(model) as calls:
            found = take_step(model, batch, packing=True, **STOCK)
        assert [tuple(one.shape[:2]) for one in calls] == [(1, int(batch["attention_mask"].sum()))]
        same_loss(found.loss, stock.detach())
        same_gradients(found.gradients, expected)
        assert found.metrics["mode"] == "fast"
        assert found.metrics["ce"] == pytest.approx(stock.item(), abs=2e-6)


def test_packing_alone_is_not_nothing() -> None:
    assert not DualSpeedConfig(packing=True, **STOCK).prunes_nothing
    assert DualSpeedConfig(**STOCK).prunes_nothing
