"""What a withdrawal saves here and now: sizes by hand, what is timed, and that the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.vtw.models import DEPTH, batch_of, fresh, model_of
from torch import Tensor

from trimtab.errors import DataError, SettingError, UnsupportedModelError, WrongOrderError
from trimtab.methods.vtw import measure_prefill, prefill, prefill_flops, read_text_shape, withdraw

IMAGES = (1, 2)
VISUAL = 36


def inputs(name: str = "llava", images: tuple[int, ...] = IMAGES) -> dict[str, Any]:
    return batch_of(name, images)


def cache_bytes(places: list[int], rows: int, config: Any) -> int:
    """Keys and values of float32, layer by layer."""
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return sum(2 * rows * length * width * 4 for length in places)


def test_sizes_are_those_counted_by_hand() -> None:
    model, batch = model_of("llava"), inputs()
    told = measure_prefill(model, batch, [0, 1, 3, DEPTH], repeats=1, warmup=0)
    seq = batch["input_ids"].shape[1]
    text = int((batch["attention_mask"].bool() & (batch["input_ids"] != model.config.image_token_id)).sum(1).max())
    assert (told["rows"], told["places"], told["left"], told["depth"]) == (2, seq, seq - text, DEPTH)
    config = model.config.text_config
    assert told["full"]["kv_bytes"] == cache_bytes([seq] * DEPTH, 2, config)
    shape = read_text_shape(model)
    for one in told["layers"]:
        layer = one["layer"]
        assert one["kv_bytes"] == cache_bytes([seq] * layer + [text] * (DEPTH - layer), 2, config)
        assert one["kv_saving"] == pytest.approx(one["kv_saving_formula"])
        whole, ours = prefill_flops(shape, seq), prefill_flops(shape, seq, ((layer, text),))
        assert one["times_formula"] == pytest.approx(whole / ours)
        assert one["times_low"] <= one["times"] <= one["times_high"]
        assert one["seconds"] > 0
    assert told["layers"][-1]["kv_saving"] == 0
    assert told["layers"][-1]["times_formula"] == 1
    assert told["vision"]["seconds"] > 0


def test_what_is_timed_is_the_prompt_that_the_model_itself_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llava_next"), inputs("llava_next")
    with torch.no_grad():
        wanted = {DEPTH: model(**batch).logits[:, -1]}
        with withdraw(model, 2):
            wanted[2] = model(**batch).logits[:, -1]
    seen: dict[int, Tensor] = {}
    run = prefill._Prefill.__call__

    def call(self: Any) -> Any:
        output = run(self)
        seen[self.stages[0].layer if self.stages else DEPTH] = output.logits
        return output

    monkeypatch.setattr(prefill._Prefill, "__call__", call)
    measure_prefill(model, batch, [2], repeats=1, warmup=0)
    for layer, logits in wanted.items():
        assert seen[layer].shape[1] == 1, "the head runs on the last place only"
        torch.testing.assert_close(seen[layer][:, 0], logits, rtol=1e-4, atol=1e-4)


def test_layers_by_default_and_layers_given_twice() -> None:
    model, batch = model_of("llava"), inputs()
    told = measure_prefill(model, batch, repeats=1, warmup=0)
    assert [one["layer"] for one in told["layers"]] == [1, 2, 3]
    told = measure_prefill(model, batch, [2, 2], repeats=1, warmup=0)
    assert [one["layer"] for one in told["layers"]] == [2]


def test_tokens_that_stay_are_counted() -> None:
    told = measure_prefill(model_of("llava"), inputs(images=(1,)), [1], sink_tokens=5, repeats=1, warmup=0)
    assert told["left"] == VISUAL - 5


def test_the_model_is_as_it_was_and_progress_is_told() -> None:
    model, rounds = fresh(), []
    with torch.no_grad():
        model(**inputs())  # transformers leaves hooks of its own at the first call
    before = {name: len(part._forward_pre_hooks) + len(part._forward_hooks) for name, part in model.named_modules()}
    measure_prefill(model, inputs(), [1], repeats=2, warmup=1, progress=lambda done, of: rounds.append((done, of)))
    after = {name: len(part._forward_pre_hooks) + len(part._forward_hooks) for name, part in model.named_modules()}
    assert after == before
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    withdraw(model, 1).detach()


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        ([5], {}, "measure_prefill.layer must be a whole number from 0 to 4"),
        ([1, -1], {}, "measure_prefill.layer must be a whole number from 0 on, but -1 came"),
        ([], {}, "measure_prefill.layers must be at least one layer from 0 to 4"),
        ([1], {"repeats": 0}, "repeats must be at least 1, but 0 came"),
        ([1], {"sink_tokens": -1}, "measure_prefill.sink_tokens must be a whole number from 0 on, but -1 came"),
        ([1], {"positions": "rest"}, "measure_prefill.positions must be 'keep' or 'reset', but 'rest' came"),
    ],
)
def test_settings_outside_their_range(layers: list[int], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        measure_prefill(model_of("llava"), inputs(), layers, **{"repeats": 1, **settings})


def test_what_cannot_be_measured() -> None:
    with pytest.raises(DataError, match="Give a batch with an image"):
        measure_prefill(model_of("llava"), inputs(images=(0,)), [1], repeats=1)
    model = fresh()
    with withdraw(model, 1), pytest.raises(WrongOrderError, match=r"detach\(\)"):
        measure_prefill(model, inputs(), [1], repeats=1)
    with pytest.raises(UnsupportedModelError, match="takes no images"):
        measure_prefill(model_of("llava").model.language_model, inputs(), [1], repeats=1)


def test_a_model_whose_weights_are_elsewhere_until_they_are_needed() -> None:
    from accelerate import cpu_offload

    model, batch = fresh(), batch_of("llava", (1,))
    expected = measure_prefill(model, batch, [2], repeats=1)
    cpu_offload(model, execution_device="cpu")
    found = measure_prefill(model, batch, [2], repeats=1)
    for name in ("kv_bytes", "kv_saving"):
        assert found["layers"][0][name] == expected["layers"][0][name]
