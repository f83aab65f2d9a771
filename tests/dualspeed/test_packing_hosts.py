"""Packing beside other things: recomputation, half precision, adapters, flash attention; and what cannot be packed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.dualspeed.common import ROWS, attached, portrait, same_model
from tests.dualspeed.packing_tools import (
    SETTINGS,
    Taken,
    implementations,
    row_lengths,
    same_loss,
    same_step,
    take_step,
)
from tests.tiny import FAMILIES, Batch, TinyFamily, tiny_llava, weights
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from trimtab.anatomy import FAMILIES as TABLE
from trimtab.errors import SettingError

LLAVA = FAMILIES["llava"]


@pytest.fixture(params=["llava", "llava_next", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def attend_by(model: Any, implementation: str) -> Any:
    model.get_decoder().set_attn_implementation(implementation)
    return model


# recomputation and precision ----------------------------------------------------------------------------------------


def steps_with(family: TinyFamily, mode: str, checkpointing: bool, **settings: Any) -> tuple[Taken, int]:
    """Take a packed step and count how often the forward of the first layer's MLP ran."""
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    runs: list[int] = []
    model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    taken = take_step(model, batch, mode, packing=True, **settings)
    assert model.is_activation_checkpointing == checkpointing
    return taken, len(runs)


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_recomputing_changes_nothing_but_the_work(family: TinyFamily, mode: str) -> None:
    plain, once = steps_with(family, mode, checkpointing=False)
    all_again, twice = steps_with(family, mode, checkpointing=True)
    slow_again, some = steps_with(family, mode, checkpointing=True, recompute="slow")
    same_step(all_again, plain)
    same_step(slow_again, plain)
    assert twice == once + 1
    assert some == (once if mode == "fast" else twice)


def test_after_a_step_without_recomputation_the_model_recomputes_again() -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    model.activation_checkpointing_enable({"use_reentrant": False})
    flags = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    assert any(flags)
    for packing in (False, True):
        with attached(model, recompute="slow", packing=packing, **SETTINGS) as handle, handle.force_mode("fast"):
            model(**batch).loss.backward()
            hook = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**batch)
            hook.remove()
        assert [getattr(module, "gradient_checkpointing", None) for module in model.modules()] == flags


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_packed_is_padded_under_autocast(mode: str) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded, packed = (take_step(model, batch, mode, packing=packing) for packing in (False, True))
    # Eight bits: the same numbers rounded in other places.
    same_loss(packed.loss, padded.loss, 2e-2)
    assert packed.gradients.keys() == padded.gradients.keys()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by PEFT itself
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_packed_is_padded_inside_peft(mode: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_llava(), peft.LoraConfig(r=2, target_modules=["lm_head", "v_proj"], init_lora_weights=False)
    )
    model.train()
    batch = LLAVA.make_batch(None, ROWS)
    padded, packed = (take_step(model, batch, mode, packing=packing) for packing in (False, True))
    same_step(packed, padded)


# flash: what is handed over -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def flash_that_records(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Put attention in float32, sequence by sequence as ``cu_seq_lens_q`` has them, in the place of flash attention."""
    calls: list[dict[str, Any]] = []

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **rest: Any
    ) -> tuple[torch.Tensor, None]:
        calls.append({"mask": attention_mask, "shape": tuple(query.shape), "dropout": None, **rest})
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        parts = []
        edges = rest["cu_seq_lens_q"].tolist()
        for start, end in itertools.pairwise(edges):
            mine = [one[:, :, start:end] for one in (query, key, value)]
            parts.append(torch.nn.functional.scaled_dot_product_attention(*mine, is_causal=True, scale=scaling))
        return torch.cat(parts, 2).transpose(1, 2), None

    known = {**AttentionInterface._global_mapping, "flash_attention_2": attend}
    monkeypatch.setattr(AttentionInterface, "_global_mapping", known)
    yield calls


def set_flash(model: Any) -> Any:
    """Set the language model to flash attention past the check that it is installed."""
    for module in model.get_decoder().modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize("mode", ["fast", "slow"])
@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_flash_is_told_where_rows_begin(
    family: TinyFamily, mode: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    padded = take_step(model, batch, mode, positions=positions)
    lengths = row_lengths(model, batch, "full" if mode == "slow" else "pruned")
    set_flash(model)
    with flash_that_records(monkeypatch) as calls:
        packed = take_step(model, batch, mode, positions=positions, packing=True)
    same_step(packed, padded)
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    assert calls
    for call in calls[-2:]:
        assert call["mask"] is None
        for side in ("q", "k"):
            assert call[f"cu_seq_lens_{side}"].dtype == torch.int32
            assert torch.equal(call[f"cu_seq_lens_{side}"].cpu(), edges)
            assert call[f"max_length_{side}"] == max(lengths)
            assert isinstance(call[f"max_length_{side}"], int), "a tensor here would wait for the device"


# what cannot be packed ----------------------------------------------------------------------------------------------


def refused(model: Any, batch: Batch, match: str, **settings: Any) -> None:
    """Hold that a first packed step, or attaching, is refused in words, and that nothing stays on the model."""
    model(**batch)
    before, attention = (portrait(model), weights(model)), implementations(model)
    with pytest.raises(SettingError, match=match), attached(model, packing=True, **{**SETTINGS, **settings}):
        model(**batch)
    same_model(model, before)
    assert implementations(model) == attention


def test_an_unknown_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*args: Any, **kwargs: Any) -> Any:
        return AttentionInterface._global_mapping["sdpa"](*args, **kwargs)

    known = {**AttentionInterface._global_mapping, "home_made": attend}
    monkeypatch.setattr(AttentionInterface, "_global_mapping", known)
    masks = {**AttentionMaskInterface._global_mapping, "home_made": sdpa_mask}
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)
    model = attend_by(tiny_llava(), "home_made")
    refused(model, LLAVA.make_batch(model, ROWS), r"(?s)home_made.*sdpa|sdpa.*home_made")


def test_eager_attention_with_original_positions_names_sdpa() -> None:
    model = attend_by(tiny_llava(), "eager")
    refused(model, LLAVA.make_batch(model, ROWS), r"(?s)eager.*sdpa", positions="original")


@pytest.mark.parametrize("kind", ["anew", "offset", "running on"])
def test_positions_of_the_user_are_kept_or_refused(kind: str) -> None:
    """Eager attention finds rows by positions that begin anew, which those of a user need not do."""
    batch = LLAVA.make_batch(None, ROWS)
    lengths = batch["attention_mask"].sum(1)
    starts = {"anew": 0 * lengths, "offset": 7 * torch.arange(3), "running on": lengths.cumsum(0) - lengths}[kind]
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + starts[:, None]
    model = tiny_llava()
    padded, packed = (take_step(model, batch, "fast", packing=packing) for packing in (False, True))
    same_step(packed, padded)
    refused(attend_by(model, "eager"), batch, r"(?s)position_ids.*eager.*sdpa")


def test_rows_that_are_packed_already_are_refused() -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, (1,))
    edges = torch.tensor([0, 10, batch["input_ids"].shape[1]], dtype=torch.int32)
    with (
        attached(model, packing=True, **SETTINGS),
        pytest.raises(SettingError, match="cu_seq_lens_q"),
    ):
        model(**batch, cu_seq_lens_q=edges)


def test_a_family_with_recurrent_layers_is_advised_to_use_buckets() -> None:
    from tests.conformance.families import SUITE

    recurrent = [name for name in sorted(SUITE) if TABLE[name].recurrent]
    assert "qwen3_5" in recurrent
    family = SUITE["qwen3_5"]
    model = family.build_model().train()
    refused(model, family.make_batch(model, ROWS), r"(?is)pack.*(length|bucket)")
