"""Rows of padding only, and batches without rows: trained past where there is something beside them, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.dualspeed.common import attached
from tests.dualspeed.packing_tools import SETTINGS, same_step, take_step
from tests.dualspeed.test_packed_modes import PER_SAMPLE, samples
from tests.tiny import FAMILIES, PAD, Batch, TinyFamily, tiny_llava

from trimtab.dualspeed.samples import Samples
from trimtab.errors import SettingError, TrimtabWarning
from trimtab.ops.label_head import IGNORED

LLAVA = FAMILIES["llava"]
EMPTY = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORED}
"""What stands at every place of an empty row."""

packed_or_not = pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])


@pytest.fixture(params=["llava", "llava_next"])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def with_empty_row(batch: Batch, place: int) -> Batch:
    """Return a batch with one more row, which is padding only; whatever it knows of ids is for the caller to give."""
    found = {name: value for name, value in batch.items() if name != "samples"}
    for name, value in batch.items():
        if name in EMPTY or name.endswith("type_ids"):
            row = torch.full_like(value[:1], EMPTY.get(name, 0))
            found[name] = torch.cat([value[:place], row, value[place:]])
    return found


def padding_only(rows: int) -> Batch:
    return {name: torch.full((rows, 5), value) for name, value in EMPTY.items()}


# beside good rows -----------------------------------------------------------------------------------------------------


@packed_or_not
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_an_empty_row_adds_nothing(family: TinyFamily, mode: str, place: int, packing: bool) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, (1, 0, 2))
    expected = take_step(model, batch, mode, packing=packing)
    same_step(take_step(model, with_empty_row(batch, place), mode, packing=packing), expected)


@packed_or_not
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_an_empty_row_adds_nothing_where_modes_are_mixed(mode: str, side: str, packing: bool) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, (1, 0, 2), padding_side=side)
    settings = {"packing": packing, **PER_SAMPLE}
    expected = take_step(model, {**batch, "samples": samples(("slow", "fast", "fast"))}, **settings)
    empty = {**with_empty_row(batch, 1), "samples": samples(("slow", mode, "fast", "fast"))}
    same_step(take_step(model, empty, **settings), expected)


@packed_or_not
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_an_empty_row_among_text_adds_nothing(mode: str, packing: bool) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, (0, 0))
    expected = take_step(model, batch, mode, packing=packing)
    for place in range(3):
        same_step(take_step(model, with_empty_row(batch, place), mode, packing=packing), expected)


@packed_or_not
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_where_positions_are_those_of_pictures_an_empty_row_is_refused_in_words(name: str, packing: bool) -> None:
    """transformers cannot count the positions of a row without tokens."""
    model = FAMILIES[name].build_model().train()
    batch = with_empty_row(FAMILIES[name].make_batch(model, (1, 0, 2)), 1)
    with (
        attached(model, packing=packing, **SETTINGS) as handle,
        handle.force_mode("fast"),
        pytest.raises(SettingError, match=r"(?s)[Rr]ow 1 .*attention_mask"),
    ):
        model(**batch)


# nothing beside them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("settings", [{}, PER_SAMPLE], ids=["one mode", "modes by sample"])
def test_a_pack_of_padding_only_is_refused_in_words(settings: dict[str, Any], rows: int) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, (1, 0))
    named = {"samples": Samples(tuple(range(rows)))} if settings else {}
    with attached(model, packing=True, **SETTINGS, **settings) as handle:
        with pytest.raises(SettingError, match=r"(?s)holds no token \(attention_mask is 0 everywhere\).*collator"):
            model(**padding_only(rows), **named)
        with handle.force_mode("fast"):
            assert model(**batch).loss > 0, "the next batch trains"


def test_a_padded_batch_of_padding_only_teaches_nothing() -> None:
    model = tiny_llava()
    with attached(model, **SETTINGS) as handle, handle.force_mode("fast"):
        with pytest.warns(TrimtabWarning, match="no supervised label"):
            loss = model(**padding_only(2)).loss
        assert loss == 0
        assert handle.metrics()["unlabelled_batches"] == 1


@pytest.mark.parametrize("settings", [{}, PER_SAMPLE], ids=["one mode", "modes by sample"])
@packed_or_not
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no rows", "no places"])
def test_an_empty_batch_is_refused_in_words(shape: tuple[int, int], packing: bool, settings: dict[str, Any]) -> None:
    model = tiny_llava()
    batch = {name: torch.full(shape, value) for name, value in EMPTY.items()}
    named = {"samples": Samples(tuple(range(shape[0])))} if settings else {}
    told = rf"(?s)The batch is empty: input_ids has the shape \({shape[0]}, {shape[1]}\).*sampler"
    with attached(model, packing=packing, **SETTINGS, **settings), pytest.raises(SettingError, match=told):
        model(**batch, **named)
