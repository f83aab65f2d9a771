"""Attention within the rows of a pack equals attention row by row, and never reaches over a border."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, tiny_llava
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sliding_window_causal_mask_function

from trimtab.anatomy import open_host
from trimtab.anatomy.pack import Pack, Rectangle, lay_out
from trimtab.anatomy.packed_attention import (
    NAME,
    attend_within_rows,
    backend_of,
    inside_pack,
    mask_of_rows,
    packed_arguments,
    use_packed_attention,
)
from trimtab.errors import SettingError

LENGTHS = (3, 1, 5, 2)
TOTAL = sum(LENGTHS)
HEADS, SIZE = 4, 6
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def layer(groups: int = 1, causal: bool = True) -> nn.Module:
    """Return what an attention function looks at of its layer."""
    module = nn.Module()
    module.num_key_value_groups = groups
    module.is_causal = causal
    return module


def states(groups: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, HEADS // groups, HEADS // groups)
    query, key, value = (torch.randn(1, count, TOTAL, SIZE, generator=generator) for count in heads)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def borders(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[int, int]]:
    return list(itertools.pairwise((0, *itertools.accumulate(lengths))))


def by_hand(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scaling: float | None = None) -> Tensor:
    """Attention place by place in double precision: [1, length, head, size].

    Args:
        query: [1, head, length, size]; `key` and `value` with perhaps fewer heads.
        key: See `query`.
        value: See `query`.
        sees: Which places a place sees, [length, length].
        scaling: Of the products.
    """
    groups = query.shape[1] // key.shape[1]
    found = torch.zeros(1, query.shape[2], query.shape[1], value.shape[3], dtype=torch.float64)
    for head in range(query.shape[1]):
        for place in range(query.shape[2]):
            seen = sees[place].nonzero()[:, 0]
            scores = key[0, head // groups, seen].double() @ query[0, head, place].double()
            weights = (scores * (1 / math.sqrt(SIZE) if scaling is None else scaling)).softmax(0)
            found[0, place, head] = weights @ value[0, head // groups, seen].double()
    return found


def causal_blocks(window: int = TOTAL) -> Tensor:
    """Which places see which: those of their own row that are not behind them nor `window` or more before them."""
    sees = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
    for start, end in borders():
        for place in range(start, end):
            sees[place, max(start, place - window + 1) : place + 1] = True
    return sees


# without a pack it is the attention of transformers -----------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_without_lengths_it_is_sdpa(masked: bool) -> None:
    query, key, value = states()
    mask = torch.ones(1, 1, TOTAL, TOTAL).tril().bool() if masked else None
    expected, _ = sdpa_attention_forward(layer(), query, key, value, mask, scaling=0.3)
    found, none = attend_within_rows(layer(), query, key, value, mask, scaling=0.3)
    assert torch.equal(found, expected)
    assert none is None


def test_inside_a_pack_it_will_not_go_without_lengths() -> None:
    """A model that does not hand the lengths on would let the rows see each other."""
    with inside_pack(), pytest.raises(SettingError, match=r"packing=False"):
        attend_within_rows(layer(), *states(), None)
    attend_within_rows(layer(), *states(), None)


# brute force --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_rows_attend_to_themselves(groups: int, scaling: float | None) -> None:
    query, key, value = states(groups)
    found, none = attend_within_rows(layer(groups), query, key, value, None, packed_lengths=LENGTHS, scaling=scaling)
    assert none is None
    assert found.shape == (1, TOTAL, HEADS, SIZE)
    torch.testing.assert_close(found.double(), by_hand(query, key, value, causal_blocks(), scaling), **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_rows(groups: int) -> None:
    query, key, value = states(groups)
    weight = torch.randn(1, TOTAL, HEADS, SIZE, generator=torch.Generator().manual_seed(9))
    found, _ = attend_within_rows(layer(groups), query, key, value, None, packed_lengths=LENGTHS)
    packed = torch.autograd.grad((found * weight).sum(), (query, key, value))
    expected = by_hand(query, key, value, causal_blocks())
    alone = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_of_the_model_counts_within_rows_only(boolean: bool) -> None:
    """Sliding windows, and whatever else the model masks; what the mask has between rows is not looked at."""
    query, key, value = states()
    sees = causal_blocks(window=2)
    mask = sees | ~causal_blocks().logical_or(causal_blocks().T)  # lets rows see each other
    assert mask[:3, 3:].all()
    given = mask[None, None] if boolean else torch.zeros(1, 1, TOTAL, TOTAL).masked_fill(~mask, -torch.inf)
    found, _ = attend_within_rows(layer(), query, key, value, given, packed_lengths=LENGTHS)
    torch.testing.assert_close(found.double(), by_hand(query, key, value, sees), **CLOSE)
    assert (found - by_hand(query, key, value, causal_blocks()).float()).abs().max() > 1e-2


def test_values_may_be_narrower_than_keys() -> None:
    query, key, value = states()
    narrow = value[..., :4]
    found, _ = attend_within_rows(layer(), query, key, narrow, None, packed_lengths=LENGTHS)
    torch.testing.assert_close(found.double(), by_hand(query, key, narrow, causal_blocks()), **CLOSE)


def test_a_layer_without_causality_sees_its_whole_row() -> None:
    query, key, value = states()
    sees = causal_blocks() | causal_blocks().T
    for module, said in ((layer(causal=False), None), (layer(), False)):
        found, _ = attend_within_rows(module, query, key, value, None, packed_lengths=LENGTHS, is_causal=said)
        torch.testing.assert_close(found.double(), by_hand(query, key, value, sees), **CLOSE)


# invariants -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_what_one_row_holds_is_nothing_to_another(masked: bool) -> None:
    mask = torch.ones(1, 1, TOTAL, TOTAL).tril().bool() if masked else None
    for start, end in borders():
        query, key, value = states()
        found, _ = attend_within_rows(layer(), query, key, value, mask, packed_lengths=LENGTHS)
        for gradient in torch.autograd.grad(found[:, start:end].square().sum(), (query, key, value)):
            outside = torch.ones(TOTAL, dtype=torch.bool)
            outside[start:end] = False
            assert not gradient[:, :, outside].any()
            assert gradient.any() or end - start == 1  # a place that sees only itself has no say in its weight


def test_a_pack_of_one_row_is_that_row() -> None:
    query, key, value = states()
    found, _ = attend_within_rows(layer(), query, key, value, None, packed_lengths=(TOTAL,))
    expected, _ = sdpa_attention_forward(layer(), query, key, value, None)
    assert torch.equal(found, expected)


def test_the_order_of_rows_is_that_of_the_result() -> None:
    query, key, value = (one.detach() for one in states())
    found, _ = attend_within_rows(layer(), query, key, value, None, packed_lengths=LENGTHS)
    order = torch.cat([torch.arange(start, end) for start, end in reversed(borders())])
    turned = [one[:, :, order] for one in (query, key, value)]
    other, _ = attend_within_rows(layer(), *turned, None, packed_lengths=LENGTHS[::-1])
    torch.testing.assert_close(other, found[:, order], **CLOSE)


# masks ----------------------------------------------------------------------------------------------------------------


def mask_for(**changes: Any) -> Tensor | None:
    ones = torch.ones(1, TOTAL, dtype=torch.bool)
    settings = {"batch_size": 1, "q_length": TOTAL, "kv_length": TOTAL, "attention_mask": ones, **changes}
    return mask_of_rows(**settings)


def test_a_pack_needs_a_mask_only_for_more_than_causality() -> None:
    with inside_pack():
        assert mask_for(allow_is_causal_skip=False) is None
        window = mask_for(mask_function=sliding_window_causal_mask_function(2), local_size=2)
    assert window is not None
    assert torch.equal(window[0, 0] & causal_blocks(), causal_blocks(window=2))


def test_without_a_pack_masks_are_those_of_sdpa() -> None:
    made = mask_for(allow_is_causal_skip=False)
    assert made is not None
    assert torch.equal(made[0, 0], torch.ones(TOTAL, TOTAL).tril().bool())


def test_a_pack_ends_with_its_context() -> None:
    with pytest.raises(ArithmeticError), inside_pack():
        raise ArithmeticError
    assert mask_for(allow_is_causal_skip=False) is not None


# a model's attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_model_gets_its_attention_back(name: str) -> None:
    host = open_host(FAMILIES[name].build_model())
    text = host.model.config.get_text_config()
    tower = host.model.config.vision_config._attn_implementation
    before, saved = text._attn_implementation, host.model.config.to_json_string()
    restore = use_packed_attention(host)
    assert text._attn_implementation == NAME
    assert host.model.config.vision_config._attn_implementation == tower, "only the language model sees packs"
    assert host.model.config.to_json_string() == saved, "what is saved meanwhile is the stock configuration"
    assert backend_of(host) == "sdpa"
    restore()
    assert text._attn_implementation == before
    assert host.model.config.vision_config._attn_implementation == tower


def test_other_attentions_stay() -> None:
    for name in ("eager", "flex_attention", "flash_attention_2"):
        host = open_host(tiny_llava())
        text = host.model.config.get_text_config()
        text._attn_implementation_internal = name
        restore = use_packed_attention(host)
        assert text._attn_implementation == name
        restore()
        assert text._attn_implementation == name


def test_a_pack_says_where_its_rows_begin() -> None:
    host = open_host(tiny_llava())
    found = packed_arguments(host, LENGTHS, torch.device("cpu"), gaps=True)
    assert found["attention_mask"].tolist() == [[1] * TOTAL]
    assert found["packed_lengths"] == LENGTHS
    host.model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    flash = packed_arguments(host, LENGTHS, torch.device("cpu"), gaps=True)
    assert flash["attention_mask"] is None
    for arguments in (found, flash):
        for side in ("q", "k"):
            edges = arguments[f"cu_seq_lens_{side}"]
            assert edges.tolist() == [0, 3, 4, 9, 11]
            assert edges.dtype == torch.int32, "as flash attention takes them"
            assert arguments[f"max_length_{side}"] == 5


@pytest.mark.parametrize("name", ["eager", "flex_attention"])
def test_borders_found_by_positions_allow_no_gaps(name: str) -> None:
    host = open_host(tiny_llava())
    host.model.config.get_text_config()._attn_implementation_internal = name
    assert packed_arguments(host, LENGTHS, torch.device("cpu"), gaps=False) == {"attention_mask": None}
    with pytest.raises(SettingError, match=rf"(?s){name}.*sdpa"):
        packed_arguments(host, LENGTHS, torch.device("cpu"), gaps=True)


def test_an_attention_of_which_nothing_is_known_is_refused() -> None:
    host = open_host(tiny_llava())
    host.model.config.get_text_config()._attn_implementation_internal = "home_made"
    for call in (lambda: use_packed_attention(host), lambda: backend_of(host)):
        with pytest.raises(SettingError, match=r"(?s)home_made.*sdpa, flash_attention_2"):
            call()
    assert host.model.config.get_text_config()._attn_implementation == "home_made"


# layouts --------------------------------------------------------------------------------------------------------------

KEEP = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
VALUES = torch.arange(100, 118).view(3, 6)


def kept_values(rows: list[int] | None) -> list[list[int]]:
    return [VALUES[row][KEEP[row]].tolist() for row in (range(3) if rows is None else rows)]


@pytest.mark.parametrize("rows", [None, [0, 2], [1]], ids=str)
def test_a_pack_holds_the_kept_places_in_order(rows: list[int] | None) -> None:
    pack = lay_out(KEEP, KEEP.sum(1).tolist(), pad_left=False, rows=rows, packed=True)
    assert isinstance(pack, Pack)
    expected = kept_values(rows)
    flat = [value for row in expected for value in row]
    assert pack.take(VALUES, -1).tolist() == [flat]
    assert pack.take(torch.stack((VALUES, -VALUES)), -1).tolist() == [[flat], [[-value for value in flat]]]
    assert pack.lengths == [len(row) for row in expected]
    assert pack.real.tolist() == [[True] * len(flat)]
    assert not pack.padded


@pytest.mark.parametrize("rows", [None, [0, 2], [1]], ids=str)
@pytest.mark.parametrize("left", [False, True])
def test_a_rectangle_holds_the_kept_places_beside_padding(rows: list[int] | None, left: bool) -> None:
    rectangle = lay_out(KEEP, KEEP.sum(1).tolist(), pad_left=left, rows=rows)
    assert isinstance(rectangle, Rectangle)
    expected = kept_values(rows)
    longest = max(map(len, expected))
    padded = [[-1] * (longest - len(row)) * left + row + [-1] * (longest - len(row)) * (not left) for row in expected]
    assert rectangle.take(VALUES, -1).tolist() == padded
    assert rectangle.take(torch.stack((VALUES, VALUES + 50)), -1)[1].tolist() == [
        [value if value < 0 else value + 50 for value in row] for row in padded
    ]
    assert rectangle.real.tolist() == [[value > 0 for value in row] for row in padded]
    assert rectangle.padded == (len({len(row) for row in expected}) > 1)


def test_a_layer_may_be_anything_with_groups() -> None:
    """Attention layers of transformers without `num_key_value_groups` have one head of keys per query."""
    query, key, value = states()
    found, _ = attend_within_rows(SimpleNamespace(), query, key, value, None, packed_lengths=LENGTHS)
    torch.testing.assert_close(found.double(), by_hand(query, key, value, causal_blocks()), **CLOSE)
