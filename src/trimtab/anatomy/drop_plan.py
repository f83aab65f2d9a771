"""One forward call from which tokens leave: what stays behind each stage, and the layers' arguments cut to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

from trimtab.anatomy.drop_record import Columns, DropRecord, join, open_cache
from trimtab.anatomy.packed_attention import LENGTHS
from trimtab.anatomy.positions import PACKED
from trimtab.errors import NotSupportedError, setting_error
from trimtab.ops.repack import close_gaps, repack_index
from trimtab.shapes import Bool, Int, Tensor

if TYPE_CHECKING:
    from trimtab.anatomy.decoder import Decoder
    from trimtab.anatomy.drop_inside import Expected, InsideDrop, Stage

_PACKED = (*PACKED, LENGTHS)
"""What tells attention functions where the sequences of a packed row begin."""


@dataclass(eq=False)
class Call:
    """One forward call of a language model.

    Attributes:
        decoder: The model, opened.
        owner: Name of the method, for messages.
        positions: ``"keep"`` or ``"reset"``.
        shape: Rows and places.
        visual: Visual tokens of the call, [row, seq], or None where it has none.
        real: Which places are not padding.
        cache: The cache that came, or None.
        past: Places of the conversation before this call.
        record: What left of them, or None for nothing.
        mask: The two-dimensional mask that came, over all places of the conversation, or None.
        full_positions: A copy of the ``position_ids`` that came where they are renumbered, or None.
        embeddings: What enters the first layer, or None where the language model embeds itself.
        expected: What the host knows of the rows, or None.
        positions_given: ``position_ids`` to use instead of those that the model would count, or None.
        plans: One per stage, as far as the call has come.
        ends_visual: Whether a row ends with a visual token that left.
    """

    decoder: Decoder
    owner: str
    positions: str
    shape: tuple[int, int]
    visual: Bool[Tensor, "row seq"] | None
    real: Bool[Tensor, "row seq"]
    cache: Any
    past: int
    record: DropRecord | None
    mask: Tensor | None
    full_positions: Tensor | None
    embeddings: Tensor | None
    expected: Expected | None
    positions_given: Tensor | None = None
    plans: list[Plan] = field(default_factory=list)
    ends_visual: bool = False

    @classmethod
    def open(
        cls,
        drop: InsideDrop,
        inputs: Mapping[str, Any],
        shape: tuple[int, int],
        device: torch.device,
        visual: Tensor | None,
        expected: Expected | None,
    ) -> Call | None:
        """Look at the arguments of the language model; None where nothing leaves and nothing has left before."""
        cache = inputs.get("past_key_values")
        past, record = 0, None
        if cache is not None:
            past, record = open_cache(cache, drop.stages, drop.positions, shape[0], drop.owner)
        if visual is None and record is None:
            return None
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        real = torch.ones(shape, dtype=torch.bool, device=device)
        if mask is not None:
            real = mask[:, -shape[1] :].to(device) != 0
        if visual is not None:
            visual = visual.to(device) & real
        given = None
        if drop.stages[0].layer == 0 and record is not None:
            if shape[1] > 1:
                raise NotSupportedError(
                    f"{drop.owner} with layer=0 cannot go on with several places at once from a filled cache, since "
                    "transformers counts the conversation by its first layer. Give the whole conversation without a "
                    "cache, or a layer of at least 1."
                )
            if inputs.get("position_ids") is None:
                given = torch.full(shape, past, device=device)
        return cls(
            decoder=drop.decoder, owner=drop.owner, positions=drop.positions, shape=shape, visual=visual, real=real,
            cache=cache, past=past, record=record, mask=mask, expected=expected, positions_given=given,
            full_positions=_own(inputs.get("position_ids") if given is None else given, drop.positions),
            embeddings=inputs.get("inputs_embeds"),
        )  # fmt: skip

    @property
    def is_known_to_end_visual(self) -> bool:
        """Whether a prompt ended with a visual token that left.

        With a cache a call may be a chunk of a prompt that goes on, so that only the first step behind it tells.
        """
        if self.visual is not None:
            return self.ends_visual and self.cache is None
        return self.shape[1] == 1 and self.record is not None and self.record.ends_visual

    def past_columns(self, layer: int, number: int) -> Columns:
        """Entries behind a stage from before this call."""
        if self.record is not None:
            return self.record.columns[number]
        place = torch.arange(self.past, device=self.real.device).expand(self.shape[0], -1)
        real = torch.ones_like(place, dtype=torch.bool)
        if self.mask is not None and self.mask.shape[1] >= self.past:
            real = self.mask[:, : self.past].to(real.device) != 0
        position = real.long().cumsum(1) - 1 if self.positions == "reset" else None
        return Columns(place, real, position, False)

    def query_rows(self, queries: Tensor | None, owner: str) -> Bool[Tensor, "row seq"]:
        """The places that the user named, or the last real one of each row."""
        if queries is not None:
            if tuple(queries.shape) != self.shape or queries.dtype != torch.bool:
                came = f"{tuple(queries.shape)} of {queries.dtype}"
                raise setting_error(owner, "queries", f"a bool tensor of shape {self.shape}", came)
            return queries.to(self.real.device) & self.real
        places = torch.arange(self.shape[1], device=self.real.device)
        last = (self.real * (places + 1)).argmax(1, keepdim=True)
        return (places == last) & self.real

    def axes(self) -> Tensor:
        """Positions of the whole call, [axis, row, seq]."""
        rows, places = self.shape
        given = self.full_positions
        if given is None:
            given = torch.arange(places, device=self.real.device)[None] + self.past
        axes = given if given.dim() == 3 else given[None]
        if self.decoder.host is not None and self.decoder.host.rotary == "multimodal":
            rope = getattr(self.decoder.text.config, "rope_parameters", None) or {}
            count = 4 if len(rope.get("mrope_section") or ()) == 4 else 3
            axes = axes.expand(count, *axes.shape[1:]) if axes.shape[0] == 1 else axes[-count:]
        return axes.expand(axes.shape[0], rows, places)


def _own(positions: Tensor | None, policy: str) -> Tensor | None:
    return None if positions is None or policy == "keep" else positions.clone()


@dataclass(eq=False)
class Plan:
    """What stays of a call behind one stage.

    Attributes:
        within: The call, held weakly: it holds its plans, and a circle would keep caches and masks until the garbage
            collector comes by.
        layer: The stage's layer.
        step: For each place that stays where it stands among those before the stage; None where nothing leaves.
        source: The same in the whole call.
        real: Which places that stay are not padding.
        padded: Whether there is padding among them that the model's own mask may not know.
        pad_left: Whether it stands before the rows.
        past: Entries of the cache behind the stage from before the call.
        position: Renumbered positions, [axis, row, place], or None.
    """

    within: ref[Call]
    layer: int
    step: Int[Tensor, "row place"] | None
    source: Int[Tensor, "row place"]
    real: Bool[Tensor, "row place"]
    padded: bool
    pad_left: bool
    past: Columns
    position: Tensor | None = None
    _cut: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _columns: Columns | None = None

    @property
    def call(self) -> Call:
        """The call."""
        call = self.within()
        assert call is not None, "whoever uses a plan holds its call"
        return call

    @property
    def width(self) -> int:
        """Places per row."""
        return self.source.shape[1]

    @property
    def untouched(self) -> bool:
        """Whether rows and cache are as the model has them itself."""
        padded = self.padded or self.past.padded  # rows that lost places beside a row that lost none
        return self.width == self.call.shape[1] and self.past.count == self.call.past and not padded

    @classmethod
    def whole(cls, call: Call, stage: Stage, before: Plan | None, past: Columns) -> Plan:
        """Let everything stay that is still there."""
        if before is not None:
            source, real, padded, left = before.source, before.real, before.padded, before.pad_left
        else:
            source = torch.arange(call.shape[1], device=call.real.device).expand(call.shape)
            real, padded, left = call.real, False, False
        plan = cls(ref(call), stage.layer, None, source, real, padded, left, past)
        plan._renumber()
        return plan

    @classmethod
    def choose(cls, call: Call, stage: Stage, before: Plan | None, past: Columns, stays: Tensor) -> Plan:
        """Let the chosen places stay; waits for the device once unless the host knows the counts."""
        width = call.shape[1] if before is None else before.width
        stays = stays & (call.real if before is None else before.real)
        expected = call.expected
        if expected is not None and stage.kept is not None:
            pairs = zip(expected.lengths, expected.visual, strict=True)
            counts = [length - count + stage.kept(count) for length, count in pairs]
            pad_left = expected.pad_left
        else:
            assert call.visual is not None
            places = torch.arange(call.shape[1], device=stays.device) + 1
            source = places.expand(call.shape) if before is None else before.source + 1
            last = (call.real * places).amax(1)
            ends = ((call.visual * places).amax(1) == last) & ((source * stays).amax(1) < last)
            told = torch.stack((stays.sum(1), call.real[:, 0].long(), ends.long())).tolist()
            counts, pad_left = told[0], not all(told[1])
            call.ends_visual = call.ends_visual or any(told[2])
        longest = max(1, *counts)  # layers do not take rows without any place, so padding stands for them
        if min(counts) == width:
            return cls.whole(call, stage, before, past)
        step, real = repack_index(stays, longest, pad_left)
        source = step if before is None else before.source.gather(1, step)
        plan = cls(ref(call), stage.layer, step, source, real, min(counts) < longest, pad_left, past)
        plan._renumber()
        return plan

    def _renumber(self) -> None:
        if self.call.positions != "reset":
            return
        axes = self.call.axes()
        taken = axes.gather(2, self.source.expand(axes.shape[0], -1, -1))
        start = torch.zeros_like(taken[0, :, 0])
        if self.past.position is not None and self.past.count:
            start = self.past.position.masked_fill(~self.past.real, -1).amax(1) + 1
        self.position = close_gaps(taken, self.real) + start[None, :, None]

    def columns(self) -> Columns:
        """Entries of the cache behind the stage when the call is over."""
        if self._columns is not None:
            return self._columns
        position = None if self.position is None else self.position.amax(0)
        place = (self.source + self.call.past).masked_fill(~self.real, 0)
        self._columns = join(self.past, Columns(place, self.real, position, self.padded))
        return self._columns

    # arguments of the layers ------------------------------------------------------------------------------------

    def cut_arguments(self, kwargs: Mapping[str, Any], states: Tensor) -> dict[str, Any]:
        """Cut what a layer is given beside the states to what stays.

        Args:
            kwargs: Its keyword arguments for the whole call.
            states: The states that it will get, for their device and type.

        Returns:
            The same for the places that stay.
        """
        if self.untouched and self.position is None:
            return dict(kwargs)
        return {name: self._once(name, value, states) for name, value in kwargs.items()}

    def _once(self, name: str, value: Any, states: Tensor) -> Any:
        key = (name, id(value), states.device)
        if key not in self._cut:
            cut = self._cut_one(name, value, states)
            if cut is value:  # a call that held on to what came would never be let go
                return value
            self._cut[key] = cut
        return self._cut[key]

    def _cut_one(self, name: str, value: Any, states: Tensor) -> Any:
        if name in _PACKED and value is not None:
            raise NotSupportedError(
                f"{self.call.owner} does not cut the borders of packed rows ({name}). Give rows without packing, or "
                "their position_ids without attention_mask and borders, which eager and sdpa attention find them by."
            )
        if name == "attention_mask":
            return self._cut_mask(value, states)
        if name == "position_embeddings" and value is not None:
            if self.position is not None:
                return self._new_angles(states)
            taken = tuple(self._take(one, -2) for one in value)
            return value if all(new is old for new, old in zip(taken, value, strict=True)) else taken
        if name == "position_ids":
            # Flash attention takes jumps in the positions of a single row for the borders of packed sequences.
            flash = "flash" in str(self.call.decoder.text.config._attn_implementation)
            return None if flash or value is None else self._take(value, -1)
        rows, places = self.call.shape
        if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (rows, places):
            return self._take(value, 1)
        return value

    def _new_angles(self, states: Tensor) -> Any:
        assert self.position is not None
        position = self.position if self.position.shape[0] > 1 else self.position[0]
        return self.call.decoder.text.rotary_emb(states, position.to(states.device))

    def _take(self, value: Tensor, axis: int) -> Tensor:
        """Take the places that stay along an axis; the one before it is that of the rows, or of length 1."""
        if self.step is None and self.width == self.call.shape[1]:
            return value
        axis %= value.dim()
        index = self.source.to(value.device)
        before, after = value.shape[: axis - 1], value.shape[axis + 1 :]
        value = value.expand(*before, index.shape[0], *value.shape[axis:])
        spread = index.view(*[1] * len(before), *index.shape, *[1] * len(after)).expand(*before, *index.shape, *after)
        return value.gather(axis, spread)

    def _cut_mask(self, mask: Any, states: Tensor) -> Any:
        if mask is None and not (self.padded or self.past.padded):
            return None
        columns = self.columns()
        whole = self.call.past + self.call.shape[1]
        if mask is None or (self.layer == 0 and self.call.past):
            return self._new_mask(columns, states)
        if not isinstance(mask, torch.Tensor):
            raise NotSupportedError(
                f"{self.call.owner} does not know attention masks of the kind {type(mask).__name__}. Load the model "
                "with attn_implementation='sdpa', 'eager' or a flash attention."
            )
        place, real = columns.place.to(mask.device), columns.real.to(mask.device)
        if mask.shape[-1] != whole or mask.dim() not in (2, 4):
            raise NotSupportedError(
                f"{self.call.owner} needs attention masks over the {whole} places of the conversation, but one of "
                f"shape {tuple(mask.shape)} came. Give the two-dimensional mask of the processor."
            )
        if mask.dim() == 2:
            return mask.expand(place.shape[0], -1).gather(1, place) * real.to(mask.dtype)
        mask = mask.expand(place.shape[0], -1, -1, -1)
        rows = self.source.to(mask.device)[:, None, :, None].expand(-1, mask.shape[1], -1, whole)
        mask = mask.gather(2, rows)
        cut = mask.gather(3, place[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
        if not columns.padded:
            return cut
        # Padding sees all that is real, so that no row of the softmax is empty.
        pads = ~self.real.to(mask.device)[:, None, :, None]
        seen = real[:, None, None, :]
        if mask.dtype == torch.bool:
            return (cut | pads) & seen
        return cut.masked_fill(pads, 0.0).masked_fill(~seen, torch.finfo(mask.dtype).min)

    def _new_mask(self, columns: Columns, states: Tensor) -> Any:
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(
            config=self.call.decoder.text.config,
            inputs_embeds=states,
            attention_mask=columns.real.to(states.device).long(),
            past_key_values=self.call.cache,
            layer_idx=self.layer,
        )

    # the way back -----------------------------------------------------------------------------------------------

    def fill(self, states: Tensor) -> Tensor:
        """Give every place of the call the state of the nearest place before it that stayed.

        Args:
            states: [row, place, width], of the places that stayed.

        Returns:
            [row, seq, width].
        """
        here = torch.zeros(self.call.shape, dtype=torch.long, device=self.source.device)
        here = here.scatter_add(1, self.source, self.real.long())
        column = (here.cumsum(1) - 1).clamp_min(0)
        if self.pad_left:
            column = column + (self.width - self.real.sum(1, keepdim=True)).clamp_max(self.width - 1)
        index = column.to(states.device)[..., None].expand(-1, -1, states.shape[2])
        return states.gather(1, index)
