"""Training through a withdrawal: losses, labels and gradients are those of the cut sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from tests.conformance.family_tools import caught_embeddings
from tests.methods.vtw.models import (
    DEPTH,
    NAMES,
    ROWS,
    close,
    deeper,
    fresh,
    logits_of,
    model_of,
    read_prompt,
    reference_loss,
    reference_states,
    visual_of,
)
from tests.tiny import BOS, IMAGE, PAD, Batch, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.errors import TrimtabWarning
from trimtab.methods.vtw import withdraw

SUM_ORDER = {"atol": 2e-5, "rtol": 1e-4}
"""Same float32 numbers summed in another order."""
TRAINED = ("llava", "qwen2_5_vl")
TOWERS = ("model.vision", "model.visual")


def training_batch(name: str, seed: int = 0, side: str = "right", everywhere: bool = False) -> Batch:
    """Return a batch with labels of the answers, or of all text."""
    batch = deeper(name).make_batch(model_of(name), ROWS, padding_side=side, seed=seed)
    if everywhere:
        ids = batch["input_ids"]
        # What stands before the first token is padding or nothing, so nothing may be asked of it.
        batch["labels"] = ids.masked_fill((ids == IMAGE) | (ids == PAD) | (ids == BOS), -100)
    return batch


def rows_with_labels(name: str, batch: Batch) -> list[tuple[Batch, Tensor]]:
    """Return each row without padding, and its labels."""
    rows = [deeper(name).take_row(batch, ROWS, row) for row in range(len(ROWS))]
    return [({k: v for k, v in row.items() if k != "labels"}, row["labels"][0]) for row in rows]


def reference_gradients(model: Any, name: str, batch: Batch, layer: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the cut labels and its gradients."""
    model.zero_grad()
    loss = reference_loss(model, rows_with_labels(name, batch), layer)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.detach(), found


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients by name; one that is missing on one side is zero on the other."""
    assert any(value.abs().max() > 1e-4 for value in expected.values())
    for name in found.keys() | expected.keys():
        value = found.get(name, expected.get(name))
        zero = torch.zeros_like(value)
        pair = found.get(name, zero), expected.get(name, zero)
        torch.testing.assert_close(*pair, **SUM_ORDER, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["answers", "all text"])
def test_the_loss_is_that_of_labels_cut_as_the_sequence_is(name: str, side: str, everywhere: bool) -> None:
    model, batch = model_of(name), training_batch(name, side=side, everywhere=everywhere)
    with torch.no_grad():
        stock = model(**batch).loss
        for layer in (1, 3):
            expected = reference_loss(model, rows_with_labels(name, batch), layer)
            with withdraw(model, layer):
                found = model(**batch).loss
            torch.testing.assert_close(found, expected, **SUM_ORDER)
            assert abs(found - stock) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [1, 2])
def test_gradients_are_those_of_the_loop_over_the_layers(name: str, layer: int) -> None:
    model = fresh(name).train()
    batch = training_batch(name, everywhere=True)
    loss, expected = reference_gradients(model, name, batch, layer)
    with withdraw(model, layer):
        found = model(**batch).loss
        found.backward()
    torch.testing.assert_close(found.detach(), loss, **SUM_ORDER)
    same_gradients(gradients(model), expected)
    towers = [key for key, value in expected.items() if key.startswith(TOWERS) and value.abs().max() > 0]
    assert towers, "visual embeddings learn through the layers that see them"


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_visual_rows_learn_through_the_layers_that_see_them_only(layer: int) -> None:
    model = fresh()
    alone, labels = rows_with_labels("llava", training_batch("llava"))[2]
    visual = visual_of(alone)[0]
    entered: list[Tensor] = []

    def watch(block: Any, args: tuple[Tensor, ...], given: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad and output.shape[1] == len(visual):
            output.retain_grad()
            entered.append(output)

    hooks = [block.register_forward_hook(watch, with_kwargs=True) for block in model.model.language_model.layers]
    with withdraw(model, layer):
        model(**alone, labels=labels[None]).loss.backward()
    for hook in hooks:
        hook.remove()
    assert len(entered) == layer, "only the layers below see all places"
    for number, states in enumerate(entered, 1):
        assert states.grad is not None
        mine = states.grad[0, visual].abs().max()
        assert (mine == 0) == (number == layer), "what the last of them says of visual places goes nowhere"
        assert states.grad[0, ~visual].abs().max() > 0


def test_at_layer_0_nothing_of_the_tower_learns() -> None:
    model, batch = fresh().train(), training_batch("llava")
    with pytest.warns(TrimtabWarning, match="never seen"), withdraw(model, 0):
        model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        visual = "vision_tower" in name or "projector" in name
        learns = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert not (visual and learns), name
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("layer", [1, 2])
def test_embeddings_have_the_gradient_of_the_loop(layer: int) -> None:
    model, batch = fresh(), training_batch("llava")
    alone, _ = rows_with_labels("llava", batch)[2]
    stays = (~visual_of(alone)[0]).nonzero()[:, 0]
    weight = torch.randn(len(stays), 32, generator=torch.Generator().manual_seed(0))
    leaf = caught_embeddings(model, alone).detach().requires_grad_()
    prompt = read_prompt(model, alone)
    states, kept = reference_states(model, type(prompt)(leaf, prompt.positions, prompt.visual, {}), layer)
    assert torch.equal(kept, stays)
    (expected,) = torch.autograd.grad((states[0] * weight).sum(), leaf)
    with withdraw(model, layer, visual_mask=visual_of(alone)):
        output = model.model(inputs_embeds=leaf).last_hidden_state
    (found,) = torch.autograd.grad((output[0, stays] * weight).sum(), leaf)
    torch.testing.assert_close(found, expected, **SUM_ORDER)
    assert found[0, visual_of(alone)[0]].abs().max() > 1e-4


# Releases differ in how they call it.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
class TestCheckpointing:
    """Layers that run again in the backward pass cut as they did in the forward."""

    def test_gradients_are_the_same(self, name: str, reentrant: bool) -> None:
        model, batch = fresh(name).train(), training_batch(name)
        loss, expected = reference_gradients(model, name, batch, 2)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with withdraw(model, 2):
            found = model(**batch).loss
            found.backward()
        torch.testing.assert_close(found.detach(), loss, **SUM_ORDER)
        same_gradients(gradients(model), expected)

    def test_two_forwards_before_the_backwards(self, name: str, reentrant: bool) -> None:
        model = fresh(name).train()
        batches = [training_batch(name), training_batch(name, 1, "left")]
        sums: dict[str, Tensor] = {}
        for batch in batches:
            for key, value in reference_gradients(model, name, batch, 2)[1].items():
                sums[key] = sums.get(key, 0) + value
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with withdraw(model, 2):
            losses = [model(**batch).loss for batch in batches]
            for loss in losses:
                loss.backward()
        same_gradients(gradients(model), sums)

    def test_the_backward_may_come_after_the_detach(self, name: str, reentrant: bool) -> None:
        model, batch = fresh(name).train(), training_batch(name)
        _, expected = reference_gradients(model, name, batch, 2)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with withdraw(model, 2):
            loss = model(**batch).loss
        loss.backward()
        same_gradients(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_hooks_that_run_again_in_the_backward_pass(reentrant: bool) -> None:
    """Earlier releases of transformers recompute a layer together with its hooks."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = fresh().train()
    batches = [training_batch("llava"), training_batch("llava", 1, "left")]
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for key, value in reference_gradients(model, "llava", batch, 2)[1].items():
            sums[key] = sums.get(key, 0) + value
    calls: list[int] = []

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*states: Tensor) -> Any:
            calls.append(1)
            return nn.Module.__call__(layer, *states, **kwargs)

        return checkpoint(run, *args, use_reentrant=reentrant)

    with mock.patch.object(LlamaDecoderLayer, "__call__", call, create=True):
        with withdraw(model, 2):
            losses = [model(**batch, use_cache=False).loss for batch in batches]
            for loss in losses:
                loss.backward()
        assert len(calls) == 4 * DEPTH, "two forwards, each run twice"
        same_gradients(gradients(model), sums)


def test_training_steps_follow_the_reference() -> None:
    ours, theirs = fresh().train(), fresh().train()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, theirs)]
    with withdraw(ours, 2):
        for step in range(3):
            batch = training_batch("llava", seed=step)
            found, expected = ours(**batch).loss, reference_loss(theirs, rows_with_labels("llava", batch), 2)
            torch.testing.assert_close(found, expected, **SUM_ORDER)
            for optimizer, loss in zip(optimizers, (found, expected), strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def adapted(base: Any) -> Any:
    """Return the model with an adapter in its language model that is already far from zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": r".*language_model.*\.(q_proj|v_proj)"}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


# peft 0.21 asks for names that transformers 5.23 has deprecated.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
class TestAdapters:
    """A model inside PEFT."""

    @pytest.mark.parametrize("attach_inside", [False, True], ids=["wrapper", "inside"])
    def test_losses_and_gradients(self, attach_inside: bool) -> None:
        model, batch = adapted(fresh()), training_batch("llava")
        inner = model.get_base_model()
        loss, expected = reference_gradients(inner, "llava", batch, 2)
        assert expected
        assert all("lora" in key for key in expected)
        with withdraw(inner if attach_inside else model, 2):
            found = model(**batch).loss
            found.backward()
        torch.testing.assert_close(found.detach(), loss, **SUM_ORDER)
        same_gradients(gradients(inner), expected)

    def test_writing(self) -> None:
        model, batch = adapted(fresh()).eval(), training_batch("llava", side="left")
        del batch["labels"]
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with withdraw(model, 2):
            cached = model.generate(**batch, **settings)
            assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))

    def test_a_wrapper_around_an_attached_model(self) -> None:
        base = fresh()
        batch = training_batch("llava")
        with withdraw(base, 2):
            wrapped = adapted(base).eval()
            found = logits_of(wrapped, batch)
        again = adapted(fresh()).eval()
        with withdraw(again, 2):
            close(found, logits_of(again, batch), 1e-6)

    def test_checkpointing_with_adapters_alone(self) -> None:
        model, batch = adapted(fresh()).train(), training_batch("llava")
        _, expected = reference_gradients(model.get_base_model(), "llava", batch, 2)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with withdraw(model, 2):
            model(**batch).loss.backward()
        same_gradients(gradients(model.get_base_model()), expected)


def test_the_trainer_of_transformers_trains_through_it(tmp_path: Any) -> None:
    from tests.dualspeed.common import training_arguments
    from tests.tiny import TinyRows, collate
    from transformers import Trainer

    def run(prepare: Callable[[Any], Any]) -> dict[str, Tensor]:
        model = fresh().train()
        handle = prepare(model)
        arguments = training_arguments(tmp_path, max_steps=2)
        Trainer(model, arguments, train_dataset=TinyRows(8), data_collator=collate).train()
        if handle is not None:
            handle.detach()
        return copy.deepcopy(model.state_dict())

    plain, whole, cut = run(lambda _: None), run(lambda m: withdraw(m, DEPTH)), run(lambda m: withdraw(m, 1))
    assert all(torch.equal(plain[key], whole[key]) for key in plain)
    assert any(not torch.equal(plain[key], cut[key]) for key in plain)
