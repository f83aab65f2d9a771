"""Pausing gradient checkpointing changes no number, only how often a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from tests.dualspeed.common import attached
from tests.tiny import FAMILIES, gradients, tiny_llava

from trimtab.anatomy import open_host
from trimtab.anatomy.recompute import pause_recompute, recomputes, without_recompute, wraps_recompute


def recompute_in(model: Any, **options: Any) -> Any:
    """Switch gradient checkpointing on by its name in this release, and return the model."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": options.pop("use_reentrant", False)}, **options)
    return model


@contextlib.contextmanager
def counted_blocks(model: Any) -> Iterator[list[int]]:
    """Count the runs of the attention of every decoder block, recomputed ones as well."""
    blocks = open_host(model).model.get_decoder().layers
    calls = [0] * len(blocks)

    def count(place: int) -> Any:
        def hook(*call: Any) -> None:
            calls[place] += 1

        return hook

    hooks = [block.self_attn.register_forward_hook(count(place)) for place, block in enumerate(blocks)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def flags(model: Any) -> dict[str, Any]:
    return {name: vars(module).get("gradient_checkpointing") for name, module in model.named_modules()}


def learn(model: Any, batch: dict[str, Any], paused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int]]:
    """Return the loss, the gradients, and the runs of each block of one step."""
    model.zero_grad(set_to_none=True)
    with counted_blocks(model) as calls:
        with without_recompute(model) if paused else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
    return loss.detach(), gradients(model), calls


def test_without_checkpointing_nothing_is_touched() -> None:
    model = tiny_llava()
    before = flags(model)
    with mock.patch.object(torch.nn.Module, "__setattr__", side_effect=AssertionError):
        paused = pause_recompute(model)
        assert paused.modules == []
        paused.remove()
    assert flags(model) == before
    assert not recomputes(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_loss_and_gradients_stay_and_no_block_runs_twice(name: str, use_reentrant: bool) -> None:
    family = FAMILIES[name]
    model = family.build_model()
    batch = family.make_batch(model, (1, 2))
    recompute_in(model.train(), use_reentrant=use_reentrant)
    loss, expected, twice = learn(model, batch, paused=False)
    ours, found, once = learn(model, batch, paused=True)
    assert twice == [2, 2]
    assert once == [1, 1]
    assert torch.equal(ours, loss)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_tower_that_trains_is_not_recomputed_either() -> None:
    model = recompute_in(tiny_llava())
    tower = [block for block in model.model.vision_tower.modules() if type(block).__name__ == "CLIPAttention"]
    runs = []
    tower[0].register_forward_hook(lambda *call: runs.append(1))
    batch = FAMILIES["llava"].make_batch(model, (1,))
    learn(model, batch, paused=True)
    assert len(runs) == 1
    learn(model, batch, paused=False)
    assert len(runs) == 3


def test_a_checkpointed_step_is_recomputed_though_a_paused_one_follows_before_its_backward() -> None:
    model = recompute_in(tiny_llava())
    family = FAMILIES["llava"]
    slow, fast = (family.make_batch(model, (1, 2), seed=seed) for seed in (0, 1))
    wanted = []
    for batch in (slow, fast):
        wanted.append(learn(model, batch, paused=False)[1])
    model.zero_grad(set_to_none=True)
    with counted_blocks(model) as calls:
        first = model(**slow).loss
        with without_recompute(model):
            second = model(**fast).loss
            first.backward()  # while it is paused
        second.backward()
    assert calls == [3, 3]
    for key, found in gradients(model).items():
        torch.testing.assert_close(found, wanted[0][key] + wanted[1][key], atol=1e-6, rtol=1e-5)


def test_flags_come_back_exactly_also_after_an_exception() -> None:
    model = recompute_in(tiny_llava(), every_n_layers=2)
    before = flags(model)
    assert any(before.values())
    assert False in before.values()
    with without_recompute(model):
        assert not any(flags(model).values())
        assert not recomputes(model)
    assert flags(model) == before
    with pytest.raises(IndexError), without_recompute(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert flags(model) == before
    paused = pause_recompute(model)
    paused.remove()
    model.activation_checkpointing_disable()
    paused.remove()
    assert not any(flags(model).values()), "a second removal must not undo what the user did since"


def test_a_pause_within_a_pause_ends_with_the_outer_one() -> None:
    model = recompute_in(tiny_llava())
    before = flags(model)
    with without_recompute(model):
        with without_recompute(model):
            pass
        assert not recomputes(model)
    assert flags(model) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks by this name
def test_adapters_of_peft_train_the_same() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llava(), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.enable_input_require_grads()
    recompute_in(model.get_base_model())
    batch = FAMILIES["llava"].make_batch(None, (1, 2))
    loss, expected, twice = learn(model.train(), batch, paused=False)
    ours, found, once = learn(model, batch, paused=True)
    assert (twice, once) == ([2, 2], [1, 1])
    assert torch.equal(ours, loss)
    assert found
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_blocks_in_torchs_own_wrapper_are_named_and_left_alone() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny_llava()
    assert not wraps_recompute(model)
    batch = FAMILIES["llava"].make_batch(None, (1,))
    layers = model.model.language_model.layers
    runs: list[int] = []
    layers[0].self_attn.register_forward_hook(lambda *call: runs.append(1))
    layers[0] = checkpoint_wrapper(layers[0])
    assert wraps_recompute(model)
    assert not recomputes(model)
    with without_recompute(model):
        model(**batch).loss.backward()
    assert len(runs) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what enters a graph
def test_a_compiled_model_follows_the_flags() -> None:
    model = recompute_in(tiny_llava())
    batch = FAMILIES["llava"].make_batch(None, (1,))
    plain = learn(model, batch, paused=False)[1]
    torch._dynamo.reset()
    model.model.language_model.compile(backend="aot_eager")
    for paused in (False, True, False):
        model.zero_grad(set_to_none=True)
        with without_recompute(model) if paused else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
        for key, found in gradients(model).items():
            torch.testing.assert_close(found, plain[key], atol=1e-6, rtol=1e-4)


# DualSpeed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_with_recompute_slow_only_the_full_view_of_slow_steps_is_recomputed(packing: bool) -> None:
    runs, losses, grads = {}, {}, {}
    for recompute in ("model", "slow"):
        for mode in ("fast", "slow"):
            model = recompute_in(tiny_llava())
            before = flags(model)
            batch = FAMILIES["llava"].make_batch(None, (1, 2))
            settings = {"keep_ratio": 0.2, "isolator_tokens": 4, "packing": packing, "recompute": recompute}
            with attached(model, **settings) as handle, handle.force_mode(mode), counted_blocks(model) as calls:
                loss = model(**batch).loss
                assert {**flags(model), "dualspeed_isolator": None} == {**before, "dualspeed_isolator": None}
                loss.backward()
            runs[recompute, mode] = calls
            losses[recompute, mode], grads[recompute, mode] = loss.detach(), gradients(model)
    assert runs["model", "fast"] == [2, 2]
    assert runs["slow", "fast"] == [1, 1]
    assert runs["slow", "slow"] == runs["model", "slow"] == [3, 3], "the student twice, the teacher once"
    for mode in ("fast", "slow"):
        assert torch.equal(losses["model", mode], losses["slow", mode])
        one, other = grads["model", mode], grads["slow", mode]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_fast_step_that_fails_leaves_no_flag_lowered() -> None:
    model = recompute_in(tiny_llava())
    before = flags(model)
    batch = FAMILIES["llava"].make_batch(None, (1,))
    with attached(model, keep_ratio=0.2, recompute="slow") as handle, handle.force_mode("fast"):
        with (
            mock.patch.object(type(model.lm_head), "forward", side_effect=RuntimeError("stop here")),
            pytest.raises(RuntimeError, match="stop here"),
        ):
            model(**batch)
        with handle.force_mode("slow"), counted_blocks(model) as calls:
            model(**batch).loss.backward()
        assert calls == [3, 3]
    assert flags(model) == before
