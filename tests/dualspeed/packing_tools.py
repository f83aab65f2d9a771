"""What the tests of packing share: one training step, taken apart, and how far two of them are from each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.dualspeed.common import attached
from tests.tiny import Batch, TinyFamily
from tests.tiny import gradients as gradients_of
from torch import Tensor

from trimtab.ops.label_head import IGNORED

SETTINGS: dict[str, Any] = {"keep_ratio": 0.25, "keep_rule": "ceil", "isolator_tokens": 2, "seed": 1}
"""Settings under which every image of the tiny families loses tokens and has room for the isolator."""

STOCK: dict[str, Any] = {"pruner": "keep_all", "isolator_tokens": 0, "slow_ratio": 0}
"""Settings of plain training."""

SAME = 2e-6
"""Largest difference of two float32 gradients, as a share of the largest entry of any of them.

The same numbers are summed in another order; the largest difference seen was 1.3e-6.
"""


@dataclass(frozen=True)
class Taken:
    """One training step, taken: its loss, the gradients that it left, and what the handle measured."""

    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, Any]


def take_step(model: Any, batch: Mapping[str, Any], mode: str | None = None, **settings: Any) -> Taken:
    """Take one step of a model and leave it as it was.

    Args:
        model: In training mode.
        batch: Its arguments.
        mode: A forced mode, or None to follow the schedule.
        settings: Of DualSpeed.
    """
    with attached(model, **{**SETTINGS, **settings}) as handle, handle.force_mode(mode):
        loss = model(**batch).loss
        loss.backward()
        taken = Taken(loss.detach(), gradients_of(model), handle.metrics())
    model.zero_grad(set_to_none=True)
    return taken


def same_step(found: Taken, expected: Taken, share: float = SAME) -> None:
    """Compare losses and gradients; a gradient that one of the two lacks counts as zero."""
    same_loss(found.loss, expected.loss, share)
    same_gradients(found.gradients, expected.gradients, share)


def same_loss(found: Tensor, expected: Tensor, share: float = SAME) -> None:
    torch.testing.assert_close(found, expected, atol=share, rtol=share)


def same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], share: float = SAME) -> None:
    """Compare gradients by the largest entry of all of them."""
    scale = max(float(one.abs().max()) for one in expected.values())
    assert scale > 1e-3, "gradients this small could hide anything"
    far = {}
    for name in found.keys() | expected.keys():
        one = found.get(name)
        other = expected.get(name)
        gap = one if other is None else other if one is None else one - other
        assert gap is not None
        far[name] = float(gap.abs().max()) / scale
    worst = sorted(far, key=far.__getitem__)[-3:]
    assert far[worst[-1]] <= share, {name: far[name] for name in worst}


def row_lengths(model: Any, batch: Mapping[str, Any], view: str, **settings: Any) -> list[int]:
    """Return how many places each row has in one view of a batch.

    Args:
        model: The model.
        batch: Its arguments, with ``attention_mask``.
        view: ``"full"``, or ``"pruned"`` for what the fast mode sees.
        settings: Of DualSpeed.
    """
    if view == "full":
        return [int(count) for count in batch["attention_mask"].sum(1)]
    with attached(model, **{**SETTINGS, **settings}) as handle, torch.no_grad():
        return [int(count) for count in handle.prune_inputs(batch)["attention_mask"].sum(1)]


@contextlib.contextmanager
def seen_by_decoder(model: Any) -> Iterator[list[Tensor]]:
    """While active, collect the embeddings that every call of the language model gets."""
    calls: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embedded = kwargs["inputs_embeds"]
        if embedded.requires_grad:
            embedded.retain_grad()
        calls.append(embedded)

    hook = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def implementations(model: Any) -> dict[str, Any]:
    """Return which attention every module with a configuration is set to, with those inside the configuration."""
    found = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is None:
            continue
        parts = {"": config, **{key: getattr(config, key, None) for key in getattr(config, "sub_configs", {})}}
        for key, part in parts.items():
            found[f"{name}/{key}"] = getattr(part, "_attn_implementation", None)
    return found


def only_row(batch: Batch, row: int) -> Batch:
    """Return a batch in which no other row has labels."""
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[row] = batch["labels"][row]
    return {**batch, "labels": labels}


def label_count(batch: Mapping[str, Any], row: int | None = None) -> int:
    """Return how many labels a batch, or one row of it, teaches: all but one at a row's first token."""
    labels, real = batch["labels"], batch["attention_mask"].bool()
    first = real & (real.cumsum(1) == 1)
    taught = (labels != IGNORED) & real & ~first
    return int((taught if row is None else taught[row]).sum())


def in_words(batch: Batch, row: int, change: int) -> Batch:
    """Return a batch with other words in the unlabelled text at the end of a row's first question."""
    ids = batch["input_ids"].clone()
    real = batch["attention_mask"][row].bool()
    text = (ids[row] >= 3) & (ids[row] <= 50) & real & (batch["labels"][row] == IGNORED)
    place = text.nonzero()[-1, 0]
    ids[row, place] = 3 + (ids[row, place] - 3 + change) % 48
    assert not torch.equal(ids, batch["input_ids"])
    return {**batch, "input_ids": ids}


def alone_and_together(
    model: Any, family: TinyFamily, batch: Batch, images: Sequence[int], modes: Sequence[str], **settings: Any
) -> Taken:
    """Return loss and gradients of a batch as the sum of those of its rows, each alone in its mode.

    Args:
        model: In training mode.
        family: Its family.
        batch: Of `TinyFamily.make_batch`.
        images: Images per row.
        modes: Mode of each row.
        settings: Of DualSpeed; the rows run without packing.
    """
    total = label_count(batch)
    loss = torch.zeros(())
    with attached(model, **{**SETTINGS, **settings}) as handle:
        for row, mode in enumerate(modes):
            alone = family.take_row(batch, images, row)
            with handle.force_mode(mode):
                share = model(**alone).loss * (label_count(alone) / total)
            share.backward()
            loss = loss + share.detach()
        found = Taken(loss, gradients_of(model), {})
    model.zero_grad(set_to_none=True)
    return found
