"""What families with several coordinates per token get as positions of pruned tokens.

The stock model's ``get_rope_index`` on the full sequence is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import (
    SIDES,
    batches,
    close,
    full_positions,
    keep_some,
    logits_of,
    model_of,
    survivors,
)
from tests.tiny import WIDTH, Batch, TinyFamily
from torch import Tensor

from trimtab.anatomy import assemble, encode_images, read_rows

FAMILIES = sorted(name for name, family in SUITE.items() if family.mrope)
EVERY = pytest.mark.parametrize("name", FAMILIES)
PREFIX = 2


def opened(name: str, side: str = "right") -> Iterator[tuple[TinyFamily, Any, Batch, Any, list[Tensor]]]:
    """Give every batch of a family with its features and a choice of them."""
    family = SUITE[name]
    model = model_of(family)
    for batch in batches(family, model, side):
        with torch.no_grad():
            encoded = encode_images(model, batch)
        yield family, model, batch, encoded, keep_some(encoded.blocks)


@EVERY
@pytest.mark.parametrize("side", SIDES)
def test_original_positions_are_those_of_the_full_sequence(name: str, side: str) -> None:
    for family, model, batch, encoded, kept in opened(name, side):
        inputs = assemble(model, batch, encoded, kept, positions="original")
        mask = survivors(model, batch, kept, encoded.blocks)
        expected = full_positions(family, model, batch)[:, mask]
        assert torch.equal(inputs["position_ids"][:, inputs["attention_mask"].bool()], expected)
        assert "mm_token_type_ids" not in inputs, "types would let the model number the pruned row anew"


@EVERY
@pytest.mark.parametrize("side", SIDES)
def test_renumbered_positions_run_from_zero_without_gaps_in_the_same_order(name: str, side: str) -> None:
    for family, model, batch, encoded, kept in opened(name, side):
        inputs = assemble(model, batch, encoded, kept, positions="renumber")
        mask = survivors(model, batch, kept, encoded.blocks)
        stock = full_positions(family, model, batch)
        for row in range(len(mask)):
            found = inputs["position_ids"][:, row, inputs["attention_mask"][row].bool()]
            before = stock[:, row, mask[row]]
            old, new = before.unique(), found.unique()
            assert torch.equal(new, torch.arange(len(new)).to(new))
            assert torch.equal(new[torch.searchsorted(old, before)], found), "order and ties are those of the stock"


@EVERY
def test_a_prefix_takes_the_position_of_its_images_first_token(name: str) -> None:
    for family, model, batch, encoded, kept in opened(name):
        inputs = assemble(model, batch, encoded, kept, prefix=torch.zeros(PREFIX, WIDTH), positions="original")
        stock = full_positions(family, model, batch).flatten(1)
        layout = read_rows(model, batch, encoded)
        handed = replace(encoded, blocks=[torch.zeros(PREFIX + len(index), WIDTH) for index in kept])
        pruned = read_rows(model, inputs, handed).place
        at = {"full": 0, "pruned": 0}
        for block, index in zip(encoded.blocks, kept, strict=True):
            first = stock[:, layout.place[at["full"]]]
            places = pruned[at["pruned"] : at["pruned"] + PREFIX]
            found = inputs["position_ids"].flatten(1)[:, places]
            assert torch.equal(found, first[:, None].expand(-1, PREFIX))
            at["full"] += len(block)
            at["pruned"] += PREFIX + len(index)
        assert at["pruned"] == len(pruned)


@EVERY
@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_positions_that_the_user_gives_are_those_that_count(name: str, positions: Any) -> None:
    for family, model, batch, encoded, kept in opened(name):
        given = {**batch, "position_ids": full_positions(family, model, batch)}
        found = assemble(model, given, encoded, kept, positions=positions)
        expected = assemble(model, batch, encoded, kept, positions=positions)
        assert torch.equal(found["position_ids"], expected["position_ids"])


@EVERY
def test_a_batch_without_attention_mask_has_the_positions_that_the_stock_model_gives_it(name: str) -> None:
    family = SUITE[name]
    model = model_of(family)
    batch = family.make_batch(model, (1,))
    del batch["attention_mask"]
    with torch.no_grad():
        encoded = encode_images(model, batch)
    every = [torch.arange(len(block)) for block in encoded.blocks]
    inputs = assemble(model, batch, encoded, every, positions="original")
    close(logits_of(model, inputs), logits_of(model, batch), 0)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "omni" in name and "thinker" in name])
def test_sound_has_its_place_among_the_positions(name: str) -> None:
    family = SUITE[name]
    model = model_of(family)
    batch = family.make_batch(model, (1,))
    config = model.config
    # Both audio encoders make two tokens of nine frames.
    sound = [config.audio_start_token_id, config.audio_token_id, config.audio_token_id, config.audio_end_token_id]
    batch["input_ids"] = torch.cat((torch.tensor([sound]), batch["input_ids"]), 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    del batch["labels"]
    heard = torch.tensor([[1] * 9 + [0]])
    with torch.no_grad():
        encoded = encode_images(model, batch)
    kept = keep_some(encoded.blocks)
    inputs = assemble(model, {**batch, "feature_attention_mask": heard}, encoded, kept, positions="original")
    stock = model.model.get_rope_index(
        batch["input_ids"], batch["image_grid_thw"], None, batch["attention_mask"], audio_seqlens=heard.sum(1)
    )[0]
    assert torch.equal(inputs["position_ids"][:, 0], stock[:, survivors(model, batch, kept, encoded.blocks)])
    assert torch.equal(inputs["feature_attention_mask"], heard)
