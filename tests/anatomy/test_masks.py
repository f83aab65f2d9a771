"""What a pruned sequence does to attention masks: sliding windows, and positions with gaps."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.families.gemma import gemma3
from torch import Tensor

from trimtab.anatomy import assemble, encode_images, full_inputs


def test_a_sliding_window_counts_kept_tokens_only() -> None:
    # One row: 4 places, 9 image tokens, 8 places. The last place sees 10 places back: the last two image tokens of
    # the full sequence, and both of the kept ones, which stand where the others were.
    one_layer = functools.partial(gemma3, sliding_window=10, layer_types=["sliding_attention"], num_hidden_layers=1)
    family = dataclasses.replace(SUITE["gemma3"], build=one_layer)
    model = family.build_model()
    batch = family.make_batch(model, [1], text_lengths=[3], turns=1)
    encoded = encode_images(model, batch)
    features = encoded.outputs["image"].pooler_output

    def seen(inputs: dict[str, Tensor]) -> list[int]:
        logits = model(**inputs).logits
        (gradient,) = torch.autograd.grad(logits[0, -1].square().sum(), features, retain_graph=True)
        return list(gradient[0].abs().sum(-1).nonzero().flatten().tolist())

    assert batch["input_ids"].shape[1] == 4 + 9 + 8
    assert seen(full_inputs(model, batch, encoded)) == [7, 8]
    assert seen(assemble(model, batch, encoded, [torch.tensor([0, 1])])) == [0, 1]


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_gaps_in_positions_do_not_part_the_row(name: str) -> None:
    # Without a mask and a cache, transformers takes each gap in the positions for the border of a packed sequence.
    family = SUITE[name]
    model = family.build_model()
    batch = family.make_batch(model, [1])
    encoded = encode_images(model, batch)
    kept = [torch.tensor([1, 4, 8])]

    def logits(**changes: Tensor) -> Tensor:
        inputs = {name: value for name, value in {**batch, **changes}.items() if name != "labels"}
        with torch.no_grad():
            found: Tensor = model(
                **assemble(model, inputs, encoded, kept, positions="original"), use_cache=False
            ).logits
        return found

    masked = logits()
    del batch["attention_mask"]
    assert torch.equal(logits(), masked)


@pytest.mark.parametrize(("name", "counts"), [("inkling2", True), ("inkling_mm_model", True), ("llava", False)])
def test_models_that_count_distances_over_kept_tokens(name: str, counts: bool) -> None:
    family = SUITE[name]
    model = family.build_model()
    batch = family.make_batch(model, [1])
    encoded = encode_images(model, batch)
    kept = [torch.tensor([1, 4, 8])]
    with torch.no_grad():
        found = [
            model(**assemble(model, batch, encoded, kept, positions=positions)).logits
            for positions in ("original", "renumber")
        ]
    assert torch.equal(*found) == counts


def test_paligemma_counts_from_one() -> None:
    family = SUITE["paligemma"]
    model = family.build_model()
    batch = family.make_batch(model, [1])
    encoded = encode_images(model, batch)
    places = assemble(model, batch, encoded, [torch.tensor([2, 5])], positions="original")["position_ids"]
    assert places[0, :5].tolist() == [1, 2, 3, 4 + 2, 4 + 5]
