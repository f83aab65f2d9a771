"""Images in lines (HunYuan-VL): newlines, the first and the last token carry no picture, so no pruner chooses them."""

from __future__ import annotations

import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import ROWS, model_of, settings

import trimtab
from trimtab.anatomy import encode_images

NAME = "hunyuan_vl"


def test_what_carries_no_picture_is_what_other_pixels_do_not_change() -> None:
    family = SUITE[NAME]
    model = model_of(family)
    batch = family.make_batch(model, ROWS)
    with torch.no_grad():
        one = encode_images(model, batch)
        other = encode_images(model, {**batch, "pixel_values": batch["pixel_values"].flip(0)})
    for block, twin, filler in zip(one.blocks, other.blocks, one.filler, strict=True):
        assert filler is not None
        same = (block == twin).all(1)
        assert torch.equal(filler[0], same)
        assert filler[1] == int(same.sum())


def test_no_pruner_chooses_what_carries_no_picture() -> None:
    family = SUITE[NAME]
    model = model_of(family, fresh=True).train()
    batch = family.make_batch(model, ROWS)
    with torch.no_grad():
        filler = encode_images(model, batch).filler
    for pruner in ("random", "divprune"):
        handle = trimtab.attach(model, settings(pruner=pruner, keep_ratio=0.7))
        for index, marks in zip(handle.chosen_tokens(batch), filler, strict=True):
            assert marks is not None
            assert len(index)
            assert not marks[0][index].any()
        handle.detach()
