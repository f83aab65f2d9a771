"""Attaching and detaching: a model is as it was, whatever happened in between."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.dualspeed.common import ROWS, SUM_ORDER, attached, portrait, same_model
from tests.tiny import FAMILIES, IMAGE, WIDTH, TinyFamily, gradients, tiny_llava, weights

import trimtab
from trimtab import DualSpeedConfig
from trimtab.errors import WrongOrderError


@pytest.fixture(params=["llava", "llava_next", "idefics3", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def test_detaching_leaves_the_model_as_it_was(family: TinyFamily) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    model(**batch)  # transformers installs its own capturing hooks on the first forward
    before = portrait(model), weights(model)
    with attached(model, keep_ratio=0.2) as handle:
        assert portrait(model) != before[0], "attaching shows, or this test could not fail"
        for mode in ("fast", "slow"):
            with handle.force_mode(mode):
                model(**batch).loss.backward()
    model.zero_grad()
    same_model(model, before)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_an_exception_inside_the_forward_leaves_no_trace(mode: str) -> None:
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)
    model(**batch)  # transformers installs its own capturing hooks on the first forward
    before = portrait(model), weights(model)
    layer = model.model.language_model.layers[1]

    def fail(*_: Any) -> None:
        raise ArithmeticError("made to fail")

    with attached(model, keep_ratio=0.2) as handle, handle.force_mode(mode):
        expected = model(**batch).loss.detach()
        while_attached = portrait(model)
        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError, match="made to fail"):
            model(**batch)
        hook.remove()
        assert portrait(model) == while_attached
        assert torch.equal(model(**batch).loss.detach(), expected), "the next forward works as if nothing had been"
    same_model(model, before)


def test_evaluation_is_untouched_while_attached(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    with torch.no_grad():
        expected = model(**batch)
        with attached(model, keep_ratio=0.2) as handle:
            out = model(**batch)
            step = handle.micro_step
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    assert step == 0, "evaluation does not move the schedule"


# random states, checkpointing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", ["divprune", "random"])
def test_nobody_elses_random_numbers_are_consumed(pruner: str) -> None:
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)

    def states() -> list[Any]:
        numpy_state = pickle.dumps(np.random.get_state())  # noqa: NPY002
        return [random.getstate(), numpy_state, torch.get_rng_state().tolist()]

    before = states()
    with attached(model, pruner=pruner, keep_ratio=0.2) as handle:
        for _ in range(3):
            model(**batch)
        for mode in ("fast", "slow"):
            with handle.force_mode(mode):
                model(**batch).loss.backward()
    assert states() == before


def test_the_same_seed_gives_the_same_isolator_whatever_ran_before() -> None:
    rows = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        with attached(tiny_llava(), seed=4) as handle:
            rows.append(handle.isolator.rows.detach().clone())
    assert torch.equal(*rows)
    assert rows[0].shape == (4, WIDTH)
    # The first values are those of a bias-free linear layer on that width: uniform within 1/sqrt(width).
    assert rows[0].abs().max() <= 1 / math.sqrt(WIDTH)
    assert rows[0].std() > 0.3 / math.sqrt(WIDTH)


# torch says so of every reentrant checkpoint under no_grad; the teacher of a slow step is one.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("mode", ["fast", "slow"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family: TinyFamily, mode: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = family.build_model().train()
        batch = family.make_batch(model, ROWS)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with attached(model, keep_ratio=0.2) as handle, handle.force_mode(mode):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            found.append((loss.detach(), gradients(model), handle.isolator.rows.grad.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], **SUM_ORDER)
    torch.testing.assert_close(found[0][2], found[1][2], **SUM_ORDER)
    assert found[0][1].keys() == found[1][1].keys()
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, **SUM_ORDER)


def test_the_placeholder_rows_of_prune_inputs_carry_the_isolator() -> None:
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, (1, 0))
    with attached(model, keep_ratio=0.25) as handle:
        pruned = handle.prune_inputs(batch)
        rows = handle.isolator.rows.detach()
    assert (pruned["input_ids"] == IMAGE).sum(1).tolist() == [4 + 9, 0]
    features = torch.cat(list(pruned["mm_encoder_outputs"]["image"].pooler_output)).detach()
    assert torch.equal(features[:4], rows)


def test_a_plain_loop_resumes_where_it_stood() -> None:
    settings = {"schedule": "bernoulli", "schedule_unit": "micro", "slow_ratio": 0.5, "seed": 8, "keep_ratio": 0.2}
    batch = FAMILIES["llava"].make_batch(None, ROWS)

    def modes(model: Any, handle: Any, steps: int) -> list[str]:
        found = []
        for _ in range(steps):
            model(**batch)
            found.append(handle.metrics()["mode"])
        return found

    model = tiny_llava()
    with attached(model, **settings) as handle:
        whole = modes(model, handle, 12)
    assert {"fast", "slow"} == set(whole[5:])
    with attached(model, **settings) as handle:
        assert modes(model, handle, 5) == whole[:5]
        assert handle.micro_step == 5
        state = handle.state_dict()
    with attached(model, **settings) as handle:
        handle.load_state_dict(state)
        assert handle.micro_step == 5
        assert modes(model, handle, 7) == whole[5:]


def test_a_slow_step_under_autocast_trains_every_weight_of_the_language_model() -> None:
    """The teacher runs without gradients on the same weights, whose cast copies autocast may keep."""
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)
    with attached(model, keep_ratio=0.2) as handle, handle.force_mode("slow"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    without = [name for name, p in model.named_parameters() if "vision_tower" not in name and p.grad is None]
    assert without == []


def test_what_autocast_keeps_of_the_teacher_is_gone_before_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above cannot show it with torch 2.13, which keeps no weight that was cast without gradients."""
    model = tiny_llava()
    events: list[str] = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (events.append("clear"), clear()))
    model.model.language_model.register_forward_pre_hook(
        lambda *_: events.append("student" if torch.is_grad_enabled() else "teacher")
    )
    with attached(model, keep_ratio=0.2) as handle, handle.force_mode("slow"):
        model(**FAMILIES["llava"].make_batch(model, ROWS))
    teacher, student = events.index("teacher"), events.index("student")
    assert "clear" in events[teacher:student]


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_a_training_step_returns_a_tuple_on_request(mode: str) -> None:
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)
    with attached(model, keep_ratio=0.2) as handle, handle.force_mode(mode):
        output = model(**batch)
        as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)
    assert len(as_tuple) == len(output.to_tuple())


# copies and lost handles ---------------------------------------------------------------------------------------------


def test_a_copy_is_told_from_its_original_and_can_be_freed() -> None:
    """A deep copy has copies of the hooks and of the handle, which nobody holds."""
    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, ROWS)
    model(**batch)  # transformers installs its own capturing hooks on the first forward
    plain = portrait(model), weights(model)
    with attached(model, keep_ratio=0.2):
        original = portrait(model)
        twin = copy.deepcopy(model)
        with pytest.raises(WrongOrderError, match=r"copy of a model that had it.*trimtab\.detach\(model\)"):
            trimtab.attach(twin, DualSpeedConfig())
        trimtab.detach(twin)
        same_model(twin, plain)
        assert portrait(model) == original, "the original keeps its own"
        with attached(twin, keep_ratio=0.2) as other:
            twin(**batch).loss.backward()
            assert other.isolator.rows.grad is not None
            assert model.dualspeed_isolator.rows.grad is None
    same_model(model, plain)


def test_a_model_whose_handle_is_lost_can_be_freed() -> None:
    model = tiny_llava()
    model(**FAMILIES["llava"].make_batch(model, ROWS))
    compiled = torch.compile(model, backend="eager")
    before = portrait(model), weights(model)
    trimtab.attach(model, DualSpeedConfig())
    with pytest.raises(WrongOrderError, match=r"trimtab\.detach"):
        trimtab.attach(compiled, DualSpeedConfig())
    trimtab.detach(compiled)
    same_model(model, before)
    trimtab.detach(model)
    same_model(model, before)


def test_a_copied_handle_reads_the_precision_of_its_own_model() -> None:
    """accelerate marks the model that it prepares; the copy of a model that is not prepared computes as before."""
    model = tiny_llava()
    with attached(model, keep_ratio=0.2):
        twin = copy.deepcopy(model)
        model._original_forward = model.forward
        handle = next(hook.__self__ for hook in twin._forward_pre_hooks.values())
        assert isinstance(handle.autocast(), contextlib.nullcontext)
        del model._original_forward
    trimtab.detach(twin)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_the_trained_head_of_an_adapter_is_the_one_that_scores(mode: str) -> None:
    """LoRA on the language-model head: the gathered head must not fall back to the frozen matrix."""
    peft = pytest.importorskip("peft")
    found = []
    for settings in ({"keep_ratio": 1.0, "isolator_tokens": 0, "slow_ratio": 0.5}, None):
        model = peft.get_peft_model(
            tiny_llava(), peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"], init_lora_weights=False)
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.train()
        batch = FAMILIES["llava"].make_batch(None, ROWS)
        if settings is None:
            loss = model(**batch).loss
        else:
            with attached(model, **settings) as handle, handle.force_mode(mode):
                loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], **SUM_ORDER)
    assert any("lm_head" in name for name in found[1][1])
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], value, **SUM_ORDER)
