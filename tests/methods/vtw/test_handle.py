"""The handle: a model is changed while it is attached, and as before afterwards, whatever happened between."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import portrait, same_model
from tests.methods.vtw.models import (
    DEPTH,
    batch_of,
    close,
    deeper,
    far,
    fresh,
    logits_of,
    model_of,
    reference_row,
    visual_of,
    words,
    write,
)
from tests.tiny import weights
from torch import Tensor

from trimtab.anatomy.drop_plan import Call, Plan
from trimtab.errors import WrongOrderError
from trimtab.methods.vtw import VTWConfig, fastv, pyramid_drop, withdraw


class StopError(RuntimeError):
    """Stands for whatever goes wrong."""


def before(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `same_model` compares with."""
    return portrait(model), weights(model)


def test_detach_leaves_the_model_as_it_was(name: str) -> None:
    model, batch = fresh(name), batch_of(name)
    stock, text = logits_of(model, batch), write(model, batch)
    state = before(model)
    handle = withdraw(model, 2)
    far(logits_of(model, batch), stock)
    write(model, batch)
    handle.detach()
    same_model(model, state)
    assert torch.equal(logits_of(model, batch), stock)
    assert torch.equal(write(model, batch), text)
    handle.detach()
    same_model(model, state)


def test_the_keys_of_the_weights_stay_while_attached() -> None:
    model = fresh()
    state = weights(model)
    with withdraw(model, 2):
        logits_of(model, batch_of("llava"))
        assert list(model.state_dict()) == list(state)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh().named_modules()]


def test_what_is_saved_while_attached_loads_as_the_stock_model(tmp_path: Path) -> None:
    model, batch = fresh(), batch_of("llava")
    stock = logits_of(model, batch)
    with withdraw(model, 2):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, batch), stock)
    assert "trimtab" not in json.dumps(again.config.to_dict())


def test_an_exception_inside_the_context_detaches(name: str) -> None:
    model, batch = fresh(name), batch_of(name)
    stock, state = logits_of(model, batch), before(model)

    def use() -> None:
        with withdraw(model, 2):
            logits_of(model, batch)
            raise StopError

    with pytest.raises(StopError):
        use()
    same_model(model, state)
    assert torch.equal(logits_of(model, batch), stock)


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_an_exception_inside_a_layer_leaves_nothing_behind(where: int) -> None:
    model, batch, other = fresh(), batch_of("llava"), batch_of("llava", (1,), seed=3)
    stock, state = logits_of(model, batch), before(model)
    with withdraw(model, 2):
        expected = logits_of(model, other), write(model, other)

    def stop(*given: Any) -> None:
        raise StopError

    handle = withdraw(model, 2)
    hook = model.model.language_model.layers[where].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        logits_of(model, batch)
    hook.remove()
    assert torch.equal(logits_of(model, other), expected[0]), "the next call is not disturbed"
    assert torch.equal(write(model, other), expected[1])
    handle.detach()
    same_model(model, state)
    assert torch.equal(logits_of(model, batch), stock)


def test_an_interrupted_forward_inside_the_context_detaches() -> None:
    model, batch = fresh(), batch_of("llava")
    stock = logits_of(model, batch)

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.language_model.layers[3].mlp.register_forward_pre_hook(stop)
    state = before(model)
    with pytest.raises(KeyboardInterrupt), withdraw(model, 2):
        logits_of(model, batch)
    same_model(model, state)
    hook.remove()
    assert torch.equal(logits_of(model, batch), stock)


@pytest.mark.parametrize("layer", [2, DEPTH])
def test_attaching_twice_is_an_error_and_changes_nothing(layer: int) -> None:
    model, batch = fresh(), batch_of("llava")
    with withdraw(model, layer) as handle:
        expected, state = logits_of(model, batch), before(model)
        with pytest.raises(WrongOrderError, match="detach") as caught:
            withdraw(model, 1)
        assert isinstance(caught.value, RuntimeError)
        assert "LlavaForConditionalGeneration" in str(caught.value)
        same_model(model, state)
        assert torch.equal(logits_of(model, batch), expected)
        handle.detach()
        with withdraw(model, 1):
            pass


def test_two_models_do_not_share_anything() -> None:
    one, two, batch = fresh(), fresh(), batch_of("llava")
    expected = [reference_row(one, batch_of("llava", (1,)), layer) for layer in (1, 3)]
    single = batch_of("llava", (1,))
    with withdraw(one, 1) as first, withdraw(two, 3) as second:
        for model, (logits, stays) in ((one, expected[0]), (two, expected[1]), (one, expected[0])):
            close(logits_of(model, single)[0, stays], logits)
            logits_of(model, batch)
        logits_of(one, single)
        assert first.counts != second.counts


def test_a_call_that_failed_before_the_language_model_leaves_nothing_behind() -> None:
    model, batch = fresh(), batch_of("llava")

    def stop(*given: Any) -> None:
        raise StopError

    states = model.get_input_embeddings()(words(batch["input_ids"].shape[1], rows=len(batch["input_ids"])))
    text = model.get_decoder()
    with torch.no_grad(), withdraw(model, 2) as handle:
        expected = text(inputs_embeds=states, use_cache=False).last_hidden_state
        hook = model.model.multi_modal_projector.register_forward_hook(stop)
        handle.expect([1] * 3, [0] * 3, pad_left=False)
        with pytest.raises(StopError):
            model(**batch)
        hook.remove()
        assert torch.equal(text(inputs_embeds=states, use_cache=False).last_hidden_state, expected)
        found = logits_of(model, batch)
    with withdraw(model, 2):
        assert torch.equal(found, logits_of(model, batch))


def test_two_threads_may_run_one_model() -> None:
    model, batches = fresh(), [batch_of("llava"), batch_of("llava", (2, 1), seed=3)]
    started, go, found = threading.Event(), threading.Event(), list[Tensor]()

    def wait_between_layers(*given: Any) -> None:
        if threading.current_thread() is other:
            started.set()
            assert go.wait(60)

    with withdraw(model, 2):
        expected = [logits_of(model, batch) for batch in batches]
        other = threading.Thread(target=lambda: found.append(logits_of(model, batches[0])))
        hook = model.model.language_model.layers[1].register_forward_hook(wait_between_layers)
        other.start()
        assert started.wait(60)
        here = logits_of(model, batches[1])
        go.set()
        other.join()
        hook.remove()
    assert torch.equal(here, expected[1])
    assert torch.equal(found[0], expected[0])


def test_a_copy_of_an_attached_model_works_on_its_own() -> None:
    model, batch = fresh(), batch_of("llava")
    stock = logits_of(model, batch)
    with withdraw(model, 2):
        expected, text = logits_of(model, batch), write(model, batch)
        twin = copy.deepcopy(model)
        assert torch.equal(logits_of(twin, batch), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(logits_of(twin, batch), expected), "it has weights of its own"
        assert not logits_of(model, batch).any()
    assert torch.equal(logits_of(twin, batch), expected), "detaching one does not touch the other"
    assert torch.equal(write(twin, batch), text)
    far(expected, stock)


def test_a_copy_taken_before_is_untouched() -> None:
    model, batch = fresh(), batch_of("llava")
    twin, stock = copy.deepcopy(model), logits_of(model, batch)
    with withdraw(model, 2):
        assert torch.equal(logits_of(twin, batch), stock)


def test_nothing_holds_a_detached_model() -> None:
    model = fresh()
    with withdraw(model, 2) as handle:
        write(model, batch_of("llava"))
    seen = weakref.ref(model)
    del model, handle
    gc.collect()
    assert seen() is None


def test_nothing_holds_the_tensors_of_a_call() -> None:
    model, batch = fresh(), batch_of("llava", (1,))
    with withdraw(model, 2):
        output = model(**batch)
        seen = weakref.ref(output.logits)
        del output
        gc.collect()
        assert seen() is None


@pytest.mark.parametrize("use", [partial(withdraw, layer=2), fastv, pyramid_drop])
@pytest.mark.parametrize("training", [False, True])
def test_a_cache_goes_with_its_last_user(use: Any, training: bool) -> None:
    """Without waiting for the garbage collector, of which a device short of memory knows nothing."""
    model, batch = fresh().train(training), batch_of("llava")
    with use(model):
        model(**batch)
        gc.collect()
        gc.disable()
        try:
            output = model(**batch, use_cache=True)
            seen = [weakref.ref(layer.keys) for layer in output.past_key_values.layers]
            calls = [weakref.ref(one) for one in gc.get_objects() if type(one) in (Call, Plan)]
            del output
            assert [one() for one in seen] == [None] * DEPTH
            assert all(one() is None for one in calls)
        finally:
            gc.enable()


def test_a_detached_handle_cannot_be_entered() -> None:
    model, batch = fresh(), batch_of("llava")
    handle = withdraw(model, 2)
    with handle:
        expected = logits_of(model, batch)
    with pytest.raises(WrongOrderError, match=r"detached.*Attach anew"), handle:
        pass
    with withdraw(model, 2):
        assert torch.equal(logits_of(model, batch), expected)


def test_a_pickled_model_is_as_a_copy_of_it() -> None:
    model, batch = deeper("llava").build_model(), batch_of("llava")
    with withdraw(model, 2):
        told = pickle.dumps(model)  # transformers' own hooks cannot be pickled, once a model was run
        expected = logits_of(model, batch)
    twin = pickle.loads(told)
    assert torch.equal(logits_of(twin, batch), expected)
    far(logits_of(model, batch), expected)
    with pytest.raises(WrongOrderError):
        withdraw(twin, 2)


def test_the_handle_tells_what_happened(name: str) -> None:
    model, batch = model_of(name), batch_of(name, (1,))
    full, text = batch["input_ids"].shape[1], int((~visual_of(batch)).sum())
    with withdraw(model, 2, positions="reset") as handle:
        assert handle.positions == "reset"
        assert [stage.layer for stage in handle.stages] == [2]
        assert handle.decoder.depth == DEPTH
        logits_of(model, batch)
        assert handle.counts == [full, text]


class TestSettings:
    """Settings from an object or a file mean what the arguments mean."""

    @pytest.mark.parametrize("form", ["object", "path", "string"])
    def test_settings_equal_arguments(self, form: str, tmp_path: Path) -> None:
        model, batch = model_of("llava"), batch_of("llava")
        settings = VTWConfig(layer=1, positions="reset", sink_tokens=2)
        settings.save(tmp_path / "vtw.json")
        given = {"object": settings, "path": tmp_path / "vtw.json", "string": str(tmp_path / "vtw.json")}[form]
        with withdraw(model, 1, positions="reset", sink_tokens=2):
            expected = logits_of(model, batch)
        with withdraw(model, settings=given):
            assert torch.equal(logits_of(model, batch), expected)

    def test_settings_are_not_changed(self) -> None:
        settings = VTWConfig(layer=1)
        twin = pickle.loads(pickle.dumps(settings))
        with withdraw(model_of("llava"), settings=settings):
            pass
        assert settings == twin


def test_other_hooks_of_the_user_stay() -> None:
    model, batch = fresh(), batch_of("llava")
    calls: list[int] = []
    hook = model.model.language_model.layers[2].register_forward_hook(lambda *given: calls.append(1))
    with withdraw(model, 2):
        logits_of(model, batch)
    logits_of(model, batch)
    assert calls == [1, 1]
    hook.remove()
    logits_of(model, batch)
    assert calls == [1, 1]


def test_detaching_inside_the_context_is_fine() -> None:
    model, batch = fresh(), batch_of("llava")
    stock, state = logits_of(model, batch), before(model)
    with withdraw(model, 2) as handle:
        handle.detach()
        assert torch.equal(logits_of(model, batch), stock)
    same_model(model, state)


def test_a_batch_after_another_shape() -> None:
    model = model_of("llava")
    small, large = batch_of("llava", (1,)), batch_of("llava", (2, 1, 0), seed=2)
    with withdraw(model, 2):
        first = logits_of(model, small)
        logits_of(model, large)
        write(model, large)
        assert torch.equal(logits_of(model, small), first)
