"""The check that the rows of a batch can stand in one sequence, or that a family is refused for a reason that holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from tests.conformance.families.gemma import paligemma
from tests.conformance.families.molmo import llama4
from tests.conformance.families.newest import minimax_m3_vl
from tests.conformance.family_tools import ROWS, batches, logits_of, model_of, settings
from tests.tiny import Batch, TinyFamily, gradients

import trimtab
from trimtab.anatomy import FAMILIES
from trimtab.errors import SettingError

PACKED = 1e-5
"""Largest difference of packed and padded gradients, as a share of the largest of them.

In float32 the largest seen was 4e-6, of attention without scaling (Gemma 4), and 1e-6 else; in float64 3e-8.
"""

BUDGETS: dict[str, Callable[[], Any]] = {
    "llama4": partial(llama4, attention_chunk_size=16),
    "minimax_m3_vl": partial(minimax_m3_vl, index_block_size=4, index_topk_blocks=3),
}
"""Models whose chunk or budget is shorter than the batch, as those of released ones are in long packs."""

WITH_SDPA: dict[str, Callable[[], Any]] = {"paligemma": partial(paligemma, model_type="gemma", sliding_window=None)}
"""Models of a family whose tiny model has a language model that knows eager attention only."""

NOT_BY_POSITIONS = ("gemma3", "gemma4", "gemma4_unified", "hunyuan_vl", "molmo2", "paligemma")
"""Families whose masks transformers gets wrong where it finds the rows of a pack by their positions: blocks of images
are laid over the borders, or there is no position that begins anew with a row."""


def packed(family: TinyFamily) -> None:
    """Rows in one sequence without padding give the losses and gradients of the padded batch, fast and slow."""
    family = replace(family, build=WITH_SDPA.get(family.name, family.build))
    model = family.build_model()
    if FAMILIES[family.name].unpackable:
        refused(family, model)
        return
    for batch in batches(family, model, "left"):
        for mode in ("fast", "slow"):
            assert packed_gap(model, batch, mode) < PACKED
    before = logits_of(model.eval(), batch)
    handle = trimtab.attach(model, settings(packing=True))
    assert torch.equal(logits_of(model, batch), before), "between steps it attends as it did"
    handle.detach()


def refused(family: TinyFamily, model: Any) -> None:
    """Hold that attaching is refused and leaves no trace, and that packing would not have worked."""
    batch = family.make_batch(model, ROWS)
    before = logits_of(model, batch)
    with pytest.raises(SettingError, match=r"(?s)packing.*like length"):
        trimtab.attach(model, settings(packing=True))
    assert torch.equal(logits_of(model, batch), before)
    reason = FAMILIES[family.name].unpackable
    tight = replace(family, build=BUDGETS.get(family.name, family.build)).build_model()
    known = mock.patch("trimtab.anatomy.packed_attention._unknown_layers", return_value="")
    with known, mock.patch.dict(FAMILIES, {family.name: replace(FAMILIES[family.name], unpackable="")}):
        try:
            gap = packed_gap(tight, batch, "slow")
        except SettingError:
            raise
        except (RuntimeError, TypeError, ValueError):  # transformers itself fails
            return
    assert gap > 100 * PACKED, f"declared not to be packed ({reason}), but it can be"


def packed_by_positions(family: TinyFamily) -> None:
    """Under eager attention, too, packed is padded, or refused where transformers lets the rows see each other."""
    if FAMILIES[family.name].unpackable:
        return
    model = model_of(family, fresh=True)
    attend_eagerly(model)
    batch = family.make_batch(model, ROWS, padding_side="left")
    if family.name not in NOT_BY_POSITIONS:
        assert packed_gap(model, batch, "fast", positions="renumber") < PACKED
        return
    with pytest.raises(SettingError, match=r"(?s)eager.*sdpa"):
        packed_gap(model, batch, "fast", positions="renumber")


def packed_gap(model: Any, batch: Batch, mode: str, **changes: Any) -> float:
    """Return how far loss and gradients of a packed step are from those of a padded one, by the largest gradient."""
    losses, found = [], []
    for packing in (False, True):
        handle = trimtab.attach(model.train(), settings(packing=packing, **changes))
        try:
            with handle.force_mode(mode):
                loss = model(**batch).loss
            loss.backward()
            losses.append(loss.detach())
            found.append(gradients(model))
        finally:
            handle.detach()
            model.zero_grad(set_to_none=True)
    assert losses[0].isfinite()
    zero = torch.zeros(())
    gaps = [found[0].get(name, zero) - found[1].get(name, zero) for name in found[0].keys() | found[1].keys()]
    largest = max(float(one.abs().max()) for one in found[0].values())
    return max(abs(float(losses[0] - losses[1])), *(float(gap.abs().max()) / largest for gap in gaps))


def attend_eagerly(model: Any) -> None:
    """Set the language model to eager attention, also where transformers prefers another for the whole model."""
    for module in model.get_decoder().modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation_internal = "eager"
    model.config.get_text_config()._attn_implementation_internal = "eager"
