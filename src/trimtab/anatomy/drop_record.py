"""What a cache remembers of tokens that left between layers.

Layers before a stage hold an entry of every place, those behind it only of places that stayed. The record says which
place of the whole conversation each of those entries is. It is an attribute of the cache: a copy of the cache takes it
along, and a cache without one has lost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from trimtab.errors import NotSupportedError, WrongOrderError
from trimtab.shapes import Bool, Int, Tensor

if TYPE_CHECKING:
    from trimtab.anatomy.drop_inside import Stage
    from trimtab.anatomy.drop_plan import Call

_RECORD = "_trimtab_dropped"


@dataclass(frozen=True)
class Columns:
    """The entries of a cache's layers behind a stage.

    Attributes:
        place: Place of each entry in the whole conversation; 0 for padding.
        real: Which entries are not padding.
        position: Rotary position of each entry where positions were renumbered, or None.
        padded: Whether any entry is padding that the model's own mask may not know.
    """

    place: Int[Tensor, "row column"]
    real: Bool[Tensor, "row column"]
    position: Tensor | None
    padded: bool

    @property
    def count(self) -> int:
        """How many there are."""
        return self.place.shape[1]

    def take(self, rows: Int[Tensor, "taken"]) -> Columns:
        """Take rows by number, in this order."""
        index = rows.to(self.place.device)
        position = None if self.position is None else self.position[index]
        return replace(self, place=self.place[index], real=self.real[index], position=position)


@dataclass(frozen=True)
class DropRecord:
    """What left in all calls that filled a cache.

    Attributes:
        layers: The stages' layers.
        width: Places of the whole conversation so far.
        columns: Entries behind each stage.
        positions: Policy of the positions.
        visual: Visual tokens of each row so far, also those that left.
        ends_visual: Whether the last call had several places and ended with a visual token.
    """

    layers: tuple[int, ...]
    width: int
    columns: tuple[Columns, ...]
    positions: str
    visual: Int[Tensor, "row"]
    ends_visual: bool = False

    def take(self, rows: Int[Tensor, "taken"]) -> DropRecord:
        """Take rows by number, in this order."""
        columns = tuple(columns.take(rows) for columns in self.columns)
        return replace(self, columns=columns, visual=self.visual[rows.to(self.visual.device)])

    def repeat(self, times: int) -> DropRecord:
        """Repeat every row, copies side by side."""
        return self.take(torch.arange(len(self.visual)).repeat_interleave(times))

    def crop(self, width: int, cache: Any) -> DropRecord:
        """Go back to fewer places, as speculative decoding does; layers that the cache cut too little are cut here."""
        found = []
        for number, (layer, columns) in enumerate(zip(self.layers, self.columns, strict=True)):
            counts = {int(one) for one in ((columns.place < width) | ~columns.real).sum(1)}
            count = min(counts)
            stop = self.layers[number + 1] if number + 1 < len(self.layers) else len(cache.layers)
            held = {cache.layers[one].get_seq_length() for one in range(layer, stop)}
            if len(counts) > 1 or min(held) < count:
                raise WrongOrderError(
                    f"past_key_values was cropped to {width} of {self.width} places, inside a part where rows lost "
                    f"different tokens (layers from {layer} on hold {sorted(held)} places, {sorted(counts)} were "
                    "expected). Crop only generated text, or start from the whole prompt without a cache."
                )
            for one in cache.layers[layer:stop]:
                one.keys, one.values = one.keys[..., :count, :], one.values[..., :count, :]
            position = None if columns.position is None else columns.position[:, :count]
            found.append(Columns(columns.place[:, :count], columns.real[:, :count], position, columns.padded))
        return replace(self, width=width, columns=tuple(found), ends_visual=False)


class DropCache(DynamicCache):
    """A `DynamicCache` with a record, which follows its rows; a plain one becomes this when tokens first leave."""

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows only."""
        super().batch_select_indices(indices)
        self._take(torch.arange(len(vars(self)[_RECORD].visual))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        setattr(self, _RECORD, vars(self)[_RECORD].repeat(repeats))

    def _take(self, rows: Tensor) -> None:
        setattr(self, _RECORD, vars(self)[_RECORD].take(rows))


def record_of(cache: Any) -> DropRecord | None:
    """What left of the places that a cache holds; None for nothing, or for an empty cache."""
    found: DropRecord | None = getattr(cache, _RECORD, None)
    return found if found is not None and cache.get_seq_length() else None


def open_cache(cache: Any, stages: Sequence[Stage], positions: str, rows: int, owner: str) -> tuple[int, Any]:
    """Return how many places of the conversation a cache has seen, and its record.

    Raises:
        NotSupportedError: It is not a plain `DynamicCache`.
        WrongOrderError: It was filled under other stages or for other rows, or has grown without the hooks.
    """
    if cache is None:
        return 0, None
    _require_dynamic(cache, owner)
    record = record_of(cache)
    held = int(cache.get_seq_length())
    if record is None:
        return held, None
    layers = tuple(stage.layer for stage in stages)
    if record.layers != layers or record.positions != positions:
        raise WrongOrderError(
            f"past_key_values was filled while tokens left at layers {list(record.layers)} (positions="
            f"{record.positions!r}), and now {owner} lets them leave at {list(layers)} ({positions!r}). Go on with the "
            "same settings, or start from the whole prompt without a cache."
        )
    before = record.columns[0].place.shape[0]
    if rows % before:
        raise WrongOrderError(
            f"past_key_values was filled for {before} rows, but {rows} came. Give as many rows as the prompt had, or "
            "that many times as often (cache.batch_repeat_interleave)."
        )
    if rows != before:
        record = record.repeat(rows // before)
    if layers[0] == 0:  # even the first layer holds only what stayed
        held += record.width - record.columns[0].count
    if held > record.width:
        raise WrongOrderError(
            f"past_key_values holds {held} places, but {record.width} of them came while {owner} was attached. A cache "
            "that was filled without the hooks in between cannot be gone on with: start from the whole prompt."
        )
    return held, record if held == record.width else record.crop(held, cache)


def _require_dynamic(cache: Any, owner: str) -> None:
    kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ()) if type(layer) is not DynamicLayer})
    if isinstance(cache, DynamicCache) and not kinds:
        return
    what = f"{type(cache).__name__} with layers of {', '.join(kinds)}" if kinds else type(cache).__name__
    raise NotSupportedError(
        f"{owner} needs a DynamicCache, whose layers may differ in length, but {what} came. Leave cache_implementation "
        "out, or give past_key_values=DynamicCache()."
    )


def remember(call: Call, stages: Sequence[Stage], output: Any) -> None:
    """Note on the cache what left in a call."""
    cache = call.cache if call.cache is not None else getattr(output, "past_key_values", None)
    if cache is None or len(call.plans) < len(stages):
        return
    if call.cache is None:  # the model has made it itself
        _require_dynamic(cache, call.owner)
    columns = tuple(plan.columns() for plan in call.plans)
    layers = tuple(stage.layer for stage in stages)
    count = torch.zeros(call.shape[0], dtype=torch.long, device=call.real.device)
    if call.visual is not None:
        count = call.visual.sum(1)
    if call.record is not None:
        count = count + call.record.visual.to(count.device)
    record = DropRecord(
        layers, call.past + call.shape[1], columns, call.positions, count, call.ends_visual and call.shape[1] > 1
    )
    if type(cache) is DynamicCache:
        cache.__class__ = DropCache
    setattr(cache, _RECORD, record)


def join(first: Columns, second: Columns) -> Columns:
    """Put the entries of a call behind those of the calls before it."""
    position = second.position
    if position is not None and first.position is not None:
        position = torch.cat((first.position, position), 1)
    return Columns(
        torch.cat((first.place, second.place), 1),
        torch.cat((first.real, second.real), 1),
        position,
        first.padded or second.padded,
    )
