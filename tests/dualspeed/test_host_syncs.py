"""No training step makes the host wait for the device, where the batch says what the host must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.dualspeed.common import ROWS, attached
from tests.dualspeed.host_syncs import HostSyncs
from tests.pruners.cases import make_inputs
from tests.tiny import FAMILIES, Batch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trimtab.anatomy import RowLayout, RowNotes, note_rows, placeholder_rule, question_embeddings
from trimtab.ops.host import copy_to, to_device
from trimtab.ops.label_head import states_at_labels
from trimtab.pruners import build_pruner, pruner_names

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAMES = ("llava", "llava_next")
SIZED = "sizes" in RowNotes.__dataclass_fields__
"""Whether `RowNotes` hold the sizes of images, which LLaVA-NeXT reads; without them a step waits for these."""
MODES = ("fast", "slow")


def noted(model: Any, batch: Batch) -> Batch:
    """Return the batch with what a collator notes on the host."""
    return {**batch, "row_notes": note_rows(placeholder_rule(model), batch)}


def waits_of_step(name: str, mode: str, notes: bool, rows: tuple[int, ...] = ROWS, **settings: Any) -> HostSyncs:
    """Run a forward and a backward pass of a warmed-up model."""
    family = SUITE[name]
    model = family.build_model()
    batch = family.make_batch(model, rows)
    if notes:
        batch = noted(model, batch)
    stays = getattr(batch.get("row_notes"), "sizes", {})
    model.train()
    with attached(model, **{"keep_ratio": 0.2, **settings}) as handle, handle.force_mode(mode):
        model(**batch).loss.backward()
        with HostSyncs(host=list(stays.values())) as syncs:
            model(**batch).loss.backward()
    return syncs


# the counter ----------------------------------------------------------------------------------------------------------


def _read(values: Tensor) -> list[float]:
    return [float(one) for one in torch.tensor(values.tolist()).cpu()]


WAITING: list[tuple[str, Callable[[Tensor], object]]] = [
    ("item", lambda x: x.sum().item()), ("item", lambda x: bool(x.any())), ("item", lambda x: int(x[0])),
    ("tolist", lambda x: x.tolist()), ("numpy", lambda x: x.numpy()), ("cpu", lambda x: x.cpu()),
    ("to", lambda x: x.to("cpu")), ("nonzero", lambda x: x.nonzero()), ("nonzero", lambda x: torch.where(x > 1)),
    ("boolean index", lambda x: x[x > 1]), ("masked_select", lambda x: x.masked_select(x > 1)),
    ("unique", lambda x: x.unique()), ("repeat_interleave", lambda x: x.repeat_interleave(x.long())),
    ("bincount", lambda x: x.long().bincount()), ("equal", lambda x: torch.equal(x, x + 1)),
    ("tensor", lambda x: torch.tensor([1, 2], device=x.device)), ("new_tensor", lambda x: x.new_tensor([1, 2])),
    ("as_tensor", lambda x: torch.as_tensor([1, 2], device=x.device)),
    ("to", lambda x: torch.tensor([1, 2]).to(x.device)), ("host index", lambda x: x[torch.tensor([0, 1])]),
    ("host index", lambda x: x[[0, 1]]),
]  # fmt: skip
FREE: list[Callable[[Tensor], object]] = [
    lambda x: x * 2 + x.sum(), lambda x: torch.arange(4, device=x.device), lambda x: x.masked_fill(x > 1, 0.0),
    lambda x: torch.tensor([1, 2]).tolist(), lambda x: torch.ones(3).sum().item(), lambda x: _read(torch.ones(2)),
    lambda x: x.repeat_interleave(x.long(), output_size=6), lambda x: x[torch.zeros(1, device=x.device).long()],
    lambda x: to_device([1, 2], x.device), lambda x: copy_to(torch.tensor([1, 2]), x.device), lambda x: x.to(x.device),
    lambda x: x.to(torch.float64), lambda x: torch.as_tensor(x, device=x.device), lambda x: torch.zeros(2).numpy(),
    lambda x: x.sort(stable=True).indices[:2], lambda x: torch.full((2,), 3, device=x.device), lambda x: x.shape,
]  # fmt: skip


@pytest.mark.parametrize(("kind", "wait"), WAITING, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(WAITING)])
def test_the_counter_sees_what_waits(kind: str, wait: Callable[[Tensor], object]) -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    with HostSyncs() as syncs:
        wait(values)
    assert [found.kind for found in syncs.waits] == [kind]
    assert syncs.waits[0].owner == "test_host_syncs.py"


@pytest.mark.parametrize("free", FREE, ids=range(len(FREE)))
def test_the_counter_lets_pass_what_does_not(free: Callable[[Tensor], object]) -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    with HostSyncs() as syncs:
        free(values)
    assert syncs.waits == []


def test_the_counter_names_the_innermost_package() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    with HostSyncs() as syncs:
        states_at_labels(torch.zeros(*batch["labels"].shape, 2), batch["labels"])
        model(**batch)
    assert [(wait.kind, wait.place.split(":")[0]) for wait in syncs.of("trimtab")] == [("nonzero", "label_head.py")]
    assert syncs.of("transformers")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_profiler_counts_as_many_reads(name: str, mode: str) -> None:
    """The counter lies above the operators; the profiler, below them, must not know of more."""
    family = FAMILIES[name]
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    model.train()
    with attached(model, keep_ratio=0.2) as handle, handle.force_mode(mode):
        model(**batch).loss.backward()
        with HostSyncs() as syncs:
            model(**batch).loss.backward()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(**batch).loss.backward()
    found = {event.key: event.count for event in profiler.key_averages()}
    noted, backward = syncs.counts, syncs.counts["masked_scatter backward"]
    assert backward == 1, "that of the features in transformers"
    selected = noted["masked_select"] + backward  # on a CPU this reads how many there are
    expected = {
        "_local_scalar_dense": noted["item"] + selected, "masked_select": selected, "_unique2": noted["unique"],
        "nonzero": noted["nonzero"] + noted["boolean index"], "bincount": noted["bincount"],
    }  # fmt: skip
    assert {name: found.get(f"aten::{name}", 0) for name in expected} == expected


# steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_notes_waits_nowhere_in_trimtab(name: str, mode: str, packing: bool) -> None:
    found = waits_of_step(name, mode, notes=True, packing=packing).of("trimtab")
    assert [wait.kind for wait in found] == (["cpu"] if name == "llava_next" and not SIZED else [])


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_text_only_waits_nowhere_in_trimtab(mode: str) -> None:
    assert waits_of_step("llava", mode, notes=True, rows=(0, 0)).of("trimtab") == []


@pytest.mark.parametrize("pruner", [name for name in pruner_names() if name != "keep_all"])
def test_a_fast_step_with_any_pruner_waits_nowhere_in_trimtab(pruner: str) -> None:
    assert waits_of_step("llava", "fast", notes=True, pruner=pruner).of("trimtab") == []


def test_a_pruner_that_reads_the_question_waits_for_no_number_of_words() -> None:
    settings: dict[str, Any] = {"pruner": "dpp", "pruner_options": {"use_text": True}}
    found = waits_of_step("llava", "fast", notes=True, **settings).of("trimtab")
    assert [wait.kind for wait in found] == ([] if hasattr(RowLayout, "most_words") else ["item"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kinds"), [("llava", ["tolist"]), ("llava_next", ["cpu", "tolist"])])
def test_a_step_without_notes_waits_once_for_each_thing_that_it_must_know(
    name: str, kinds: list[str], mode: str
) -> None:
    assert sorted(wait.kind for wait in waits_of_step(name, mode, notes=False).of("trimtab")) == kinds


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_step_makes_the_stock_model_wait_no_more_often_than_alone(name: str) -> None:
    family = FAMILIES[name]
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    model.train()(**batch)
    with HostSyncs() as stock:
        model(**batch).loss.backward()
    ours = waits_of_step(name, "fast", notes=True)
    assert len(ours.of("transformers")) <= len(stock.of("transformers"))


def test_words_are_found_without_waiting_where_their_number_is_known() -> None:
    family = FAMILIES["llava"]
    model = family.build_model()
    batch = family.make_batch(model, ROWS)
    placeholder = batch["input_ids"] == model.config.image_token_id
    plain = question_embeddings(model, batch, placeholder, [0, 2, 2])
    with HostSyncs() as syncs:
        known = question_embeddings(model, batch, placeholder, [0, 2, 2], most=plain.counts.shape[1] + 2)
    assert syncs.of("trimtab") == []
    assert torch.equal(known.counts[:, :-2], plain.counts)
    assert not known.counts[:, -2:].any()
    assert torch.equal(known.embeddings[:, :-2], plain.embeddings)


# pruners --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("some_invalid", [False, True])
@pytest.mark.parametrize("tokens", [24, 300])
@pytest.mark.parametrize("name", pruner_names())
def test_no_selection_waits(name: str, tokens: int, some_invalid: bool) -> None:
    pruner, inputs = build_pruner(name), make_inputs(tokens=tokens, some_invalid=some_invalid)
    with HostSyncs() as syncs:
        pruner.select(inputs, 7)
    assert syncs.waits == []


@needs_cuda
@pytest.mark.parametrize("name", pruner_names())
def test_no_selection_waits_for_a_real_device(name: str) -> None:
    from dataclasses import replace

    pruner, inputs = build_pruner(name), make_inputs(tokens=300, some_invalid=True)
    inputs = replace(inputs, **{key: value.cuda() for key, value in vars(inputs).items() if isinstance(value, Tensor)})
    pruner.select(inputs, 7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pruner.select(inputs, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
