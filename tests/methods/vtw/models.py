"""Tiny models of several layers, and withdrawal once more as a plain loop over them, written from its definition."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import full_positions
from tests.tiny import FIRST_WORD, IMAGE, LAST_WORD, TILE_END, TILE_START, VIDEO, Batch, TinyFamily
from torch import Tensor
from torch.nn import functional

NAMES = ("llava", "llava_next", "qwen2_5_vl", "internvl", "smolvlm")
DEPTH = 4
ROWS = (1, 0, 2)
"""Images per row of the usual batch: one, none, two."""
TIGHT = 1e-5
QUIET = (TILE_START, TILE_END, VIDEO, IMAGE)
"""Tokens that a real model has learned not to write."""


def deeper(name: str, layers: int = DEPTH) -> TinyFamily:
    """Return a family of the suite whose language model has more layers."""
    family = SUITE[name]

    def build() -> Any:
        shallow = family.build()
        config = copy.deepcopy(shallow.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = ["full_attention"] * layers
        return type(shallow)(config)

    return dataclasses.replace(family, build=build)


@functools.cache
def model_of(name: str, layers: int = DEPTH) -> Any:
    """Return a model in eval mode; who changes it takes a copy."""
    return deeper(name, layers).build_model()


def fresh(name: str = "llava", layers: int = DEPTH) -> Any:
    """Return a model of one's own."""
    return copy.deepcopy(model_of(name, layers))


def batch_of(
    name: str,
    images: Sequence[int] = ROWS,
    side: str = "left",
    text_lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Batch:
    """Return a padded batch without labels."""
    batch = deeper(name).make_batch(model_of(name), images, text_lengths, padding_side=side, seed=seed)
    del batch["labels"]
    return batch


def row_of(name: str, batch: Batch, images: Sequence[int], row: int) -> Batch:
    """Return one row of `batch_of` without padding."""
    shaped = {"labels": torch.full_like(batch["input_ids"], -100), **batch}
    alone = deeper(name).take_row(shaped, images, row)
    del alone["labels"]
    return alone


def rows_of(name: str, batch: Batch, images: Sequence[int]) -> list[Batch]:
    """Return all rows of `batch_of`, each without padding."""
    return [row_of(name, batch, images, row) for row in range(len(images))]


def from_ids(name: str, ids: Sequence[int], images: int, seed: int = 0) -> Batch:
    """Return a batch of one given row with random images."""
    visual: Batch = {}
    if images:
        visual, _ = SUITE[name].images(model_of(name), [images], torch.Generator().manual_seed(seed))
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **visual}
    if SUITE[name].mrope and images:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return batch


def words(count: int, seed: int = 0, rows: int = 1) -> Tensor:
    """Return random words as [row, word]."""
    return torch.randint(FIRST_WORD, LAST_WORD + 1, (rows, count), generator=torch.Generator().manual_seed(seed))


def visual_of(batch: Batch) -> Tensor:
    """Return which places hold an image token."""
    return batch["input_ids"] == IMAGE


def positions_of(name: str, batch: Batch) -> Tensor:
    """Return the positions that the stock model gives a batch."""
    family = SUITE[name]
    if family.mrope and "mm_token_type_ids" not in batch:
        return torch.arange(batch["input_ids"].shape[1]).expand(3, *batch["input_ids"].shape)
    return full_positions(family, model_of(name), batch)


def grown(batch: Batch, more: Tensor) -> Batch:
    """Return a batch with more words in every row."""
    rows, count = more.shape
    filler = {"input_ids": more, "attention_mask": torch.ones(rows, count, dtype=torch.long)}
    if "mm_token_type_ids" in batch:
        filler["mm_token_type_ids"] = batch["mm_token_type_ids"].new_zeros(rows, count)
    return {**batch, **{name: torch.cat((batch[name], value), 1) for name, value in filler.items()}}


def logits_of(model: Any, batch: Batch, **more: Any) -> Tensor:
    """Return the logits of a forward."""
    with torch.no_grad():
        logits: Tensor = model(**{**batch, **more}).logits
    return logits


def write(model: Any, batch: Batch, tokens: int = 8, **settings: Any) -> Tensor:
    """Return what the model writes, [row, token], without sampling."""
    limits = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "suppress_tokens": list(QUIET)}
    found: Tensor = model.generate(**batch, **{**limits, **settings})
    return found[:, batch["input_ids"].shape[1] :]


def close(found: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    """Compare absolutely."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def far(found: Tensor, expected: Tensor) -> None:
    """Hold that two results differ by much more than rounding."""
    assert (found - expected).abs().max() > 1e-2


def lengths(cache: Any) -> list[int]:
    """Return the entries that each layer of a cache has."""
    return [layer.get_seq_length() for layer in cache.layers]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the decoder gets for one row without padding.

    Attributes:
        states: [1, place, width].
        positions: [1, place] or [3, 1, place].
        visual: [place].
        added: Layer -> what the model adds to the visual rows behind that layer.
    """

    states: Tensor
    positions: Tensor
    visual: Tensor
    added: dict[int, Tensor]


def read_prompt(model: Any, alone: Batch) -> Prompt:
    """Catch what the model hands to its decoder, as a part of the graph."""
    caught: list[dict[str, Any]] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda _, args, given: caught.append(given), with_kwargs=True)
    try:
        model(**alone)
    finally:
        hook.remove()
    states, positions = caught[0]["inputs_embeds"], caught[0].get("position_ids")
    if positions is None:
        positions = torch.arange(states.shape[1])[None]
    if positions.dim() == 3 and len(positions) == 4:
        positions = positions[1:]
    return Prompt(
        states, positions, visual_of(alone)[0], dict(enumerate(caught[0].get("deepstack_visual_embeds") or ()))
    )


def reference_states(
    model: Any,
    prompt: Prompt,
    layer: int,
    positions: str = "keep",
    also: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the decoder with the visual tokens leaving at the input of `layer`, one layer after the other.

    Args:
        model: A model without any withdrawal attached.
        prompt: One row.
        layer: Layers 0..layer-1 see the image.
        positions: Whether text keeps its positions or is numbered anew from there on.
        also: [place], visual tokens that stay.
        mask: [place, place], True where attention may look; causal by default.

    Returns:
        The last states [1, kept, width] and the kept places; all of them where nothing leaves.
    """
    text = model.get_decoder()
    states, count = prompt.states, prompt.states.shape[1]
    stays = torch.arange(count)
    seen = torch.ones(count, count, dtype=torch.bool).tril() if mask is None else mask
    cos, sin = text.rotary_emb(states, prompt.positions)
    for number, block in enumerate(text.layers):
        if number == layer:
            text_rows = ~prompt.visual if also is None else ~prompt.visual | also
            stays = text_rows.nonzero()[:, 0]
            states, seen = states[:, stays], seen[stays][:, stays]
            if positions == "reset":
                cos, sin = text.rotary_emb(states, numbered_anew(prompt.positions[..., stays]))
            else:
                cos, sin = cos[..., stays, :], sin[..., stays, :]
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        states = block(states, attention_mask=bias[None, None], position_embeddings=(cos, sin), use_cache=False)
        if number in prompt.added:
            rows = torch.zeros_like(states[0]).masked_scatter(prompt.visual[:, None], prompt.added[number])
            states = states + rows[None]
    return text.norm(states), stays


def numbered_anew(positions: Tensor) -> Tensor:
    """Number the places of a row from 0 without gaps; where they have several coordinates, equal ones stay equal."""
    used = sorted(set(positions.flatten().tolist()))
    return torch.tensor([used.index(one) for one in positions.flatten().tolist()]).view(positions.shape)


def reference(model: Any, prompt: Prompt, layer: int, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Return logits [kept, vocab] and kept places of `reference_states`."""
    states, stays = reference_states(model, prompt, layer, *args, **named)
    return model.lm_head(states)[0], stays


def reference_row(model: Any, alone: Batch, layer: int, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Return what `reference` returns, for one row without padding."""
    with torch.no_grad():
        return reference(model, read_prompt(model, alone), layer, *args, **named)


def reference_loss(model: Any, rows: Sequence[tuple[Batch, Tensor]], layer: int) -> Tensor:
    """Return the mean cross entropy of rows with the labels cut as the sequence is, as a part of the graph.

    Args:
        model: A model without any withdrawal attached.
        rows: Each row without padding, and its labels [place].
        layer: Layers 0..layer-1 see the image.
    """
    total, count = torch.zeros(()), 0
    for alone, labels in rows:
        logits, stays = reference(model, read_prompt(model, alone), layer)
        target = labels[stays][1:]
        total = total + functional.cross_entropy(logits[:-1], target, ignore_index=-100, reduction="sum")
        count += int((target != -100).sum())
    return total / count


def spread(kept: Tensor, stays: Tensor, count: int) -> Tensor:
    """Give every place what the nearest kept place up to it has; [kept, ...] -> [count, ...]."""
    return kept[(torch.arange(count)[:, None] >= stays).sum(1) - 1]
