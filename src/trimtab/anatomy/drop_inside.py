"""Let tokens leave the language model between two of its layers.

A `Stage` says at the input of which layer tokens leave and who chooses them. `drop_inside` puts forward pre-hooks on
the layers: the one at the stage's layer takes the rows that stay, those at and behind it cut what the layers are given
beside the states (rotary angles, mask). Layers before a stage run on the whole sequence; their entries of a cache are
as long as it, the others' shorter. The language model returns a state for every place all the same: a place that left
gets that of the nearest place before it that stayed. Logits, ``logits_to_keep``, labels and losses so keep their
meaning, and a loss equals that of labels cut the same way.

What left is noted on the cache itself (`trimtab.anatomy.drop_record`), so that decoding, beams, later images, chunks
and crops go on from it, and no state is shared between models or calls.

Checked with stock transformers on CPU; formulas of arXiv 2405.05803 (VTW).
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from trimtab.anatomy.decoder import Decoder, open_decoder
from trimtab.anatomy.drop_plan import Call, Plan
from trimtab.anatomy.drop_record import record_of, remember
from trimtab.errors import NotSupportedError, SettingError, TrimtabWarning, WrongOrderError, setting_error
from trimtab.shapes import Bool, Int, Tensor

DropPositions = Literal["keep", "reset"]
_MARK = "_trimtab_drop"
"""Attribute of a language model whose tokens leave; holds who put the hooks there."""


@dataclass(frozen=True)
class Rows:
    """What a chooser sees: the places that are still there at the input of a layer.

    Attributes:
        states: What enters the layer, [row, place, width].
        visual: Which places hold visual tokens of this call.
        real: Which places are not padding.
        source: Where each place stands in the whole sequence of this call.
        rank: How many visual tokens of its row stand before a place, in this call and in those that filled its cache.
        marks: Which visual tokens are newline rows: those that equal the model's ``image_newline``.
        total: Visual tokens of each row in the whole sequence of this call, [row].
        queries: Query rows: the last real place of each row, or those that `InsideDrop.queries` names.
        layer: The layer.
        arguments: The keyword arguments that it is about to get, for these places.
        most_queries: Query rows of the row that has most, where the host knows it; None where only the device does.
    """

    states: Tensor
    visual: Bool[Tensor, "row place"]
    real: Bool[Tensor, "row place"]
    source: Int[Tensor, "row place"]
    rank: Int[Tensor, "row place"]
    marks: Bool[Tensor, "row place"]
    total: Int[Tensor, "row"]
    queries: Bool[Tensor, "row place"]
    layer: Any
    arguments: Mapping[str, Any]
    most_queries: int | None = None


Chooser = Callable[[Rows], Bool[Tensor, "row place"]]
"""Says which places stay, text included; what it says of padding does not count."""


@dataclass(frozen=True)
class Stage:
    """A place between two layers where tokens leave.

    Attributes:
        layer: Tokens leave at the input of this layer: layers before it see them. At the number of layers none leave.
        choose: Who chooses.
        look: The layer at whose input `choose` is called, not before an earlier stage's layer; None for `layer`.
        kept: How many visual tokens of ``n`` of a row stay, where that is known without looking (text all stays); with
            it and `InsideDrop.expect` the host need not wait for the device.
    """

    layer: int
    choose: Chooser
    look: int | None = None
    kept: Callable[[int], int] | None = None

    @property
    def look_layer(self) -> int:
        """The layer at whose input `choose` is called."""
        return self.layer if self.look is None else self.look


@dataclass(frozen=True)
class Expected:
    """What the host knows of the next batch: lengths, visual tokens and padding, and the most query rows of a row."""

    lengths: Sequence[int]
    visual: Sequence[int]
    pad_left: bool
    queries: int | None = None


class _Now(threading.local):
    """The call under way; one per thread, since threads may run one model at the same time."""

    call: Call | None = None
    visual: Tensor | None = None
    expected: Expected | None = None


def drop_inside(
    model: Any,
    stages: Sequence[Stage],
    *,
    owner: str,
    positions: DropPositions = "keep",
    visual_mask: Tensor | None = None,
) -> InsideDrop:
    """Let tokens leave between layers, until `InsideDrop.detach`.

    Args:
        model: See `open_decoder`.
        stages: Where and which, by rising layer.
        owner: Name of the method, for messages.
        positions: ``"keep"`` leaves the positions of what stays as they are, ``"reset"`` renumbers them without gaps.
        visual_mask: Which places of the next prompt hold visual tokens, [row, seq], for calls whose ``input_ids`` do
            not tell.

    Returns:
        The handle, also a context manager.

    Raises:
        SettingError: A layer is not in the model, or comes before the model itself has added its visual features.
        UnsupportedModelError: The model's layers cannot be found, or are not understood.
        NotSupportedError: It is compiled, or not all its layers have full attention.
        WrongOrderError: Tokens of this model leave already.
    """
    return InsideDrop(open_decoder(model), stages, owner, positions, visual_mask)


class InsideDrop:
    """Tokens leave between layers of one model; made by `drop_inside`, a context manager that ends with `detach`.

    Nothing but hooks and one mark on the language model is added, and `detach` removes both. ``save_pretrained`` and
    ``state_dict`` are untouched.

    Attributes:
        decoder: The model, opened.
        stages: Where tokens leave.
        positions: What becomes of the positions.
        visual_mask: Which places of the next prompt hold visual tokens, or None where ``input_ids`` tell.
        queries: Which places of the next prompt are query rows, [row, seq], or None for the last of each row.
        active: Whether tokens leave; to be switched between calls.
        counts: Places per row in the latest call with visual tokens: all, then those behind each stage.
    """

    def __init__(
        self,
        decoder: Decoder,
        stages: Sequence[Stage],
        owner: str,
        positions: DropPositions,
        visual_mask: Tensor | None,
    ) -> None:
        _check_stages(decoder, stages, owner)
        if positions not in ("keep", "reset"):
            raise setting_error(owner, "positions", "'keep' or 'reset'", positions)
        if (other := vars(decoder.text).get(_MARK)) is not None:
            raise WrongOrderError(
                f"{owner} cannot be attached: tokens of this {decoder.name} leave inside already ({other}). Call "
                "detach() on its handle first."
            )
        self.decoder, self.positions, self.owner = decoder, positions, owner
        self.stages = tuple(stage for stage in stages if stage.layer < decoder.depth)
        self.visual_mask = visual_mask
        self.queries: Tensor | None = None
        self.active, self.counts = True, list[int]()
        self._now = _Now()
        self._calls: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._attached, self._warned, self._compiled = True, False, False
        self._hooks: list[Any] = []
        setattr(decoder.text, _MARK, owner)
        if not self.stages:
            return
        self._hooks = [
            decoder.base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            decoder.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
            decoder.text.register_forward_hook(self._after_text, with_kwargs=True, always_call=True),
            decoder.base.register_forward_hook(self._after_base, always_call=True),  # last, since both may be the same
        ]
        first = self.stages[0].look_layer
        for number in range(first, decoder.depth):
            hook = partial(self._before_layer, number)
            self._hooks.append(decoder.layers[number].register_forward_pre_hook(hook, with_kwargs=True))

    def __enter__(self) -> InsideDrop:
        if not self._attached:
            raise WrongOrderError(
                f"This handle of {self.owner} was detached, so nothing would leave. Attach anew for each with-block."
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the model back as it was before; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._attached:
            delattr(self.decoder.text, _MARK)
        self._attached = False
        self._hooks.clear()
        self._forget()

    def expect(self, lengths: Sequence[int], visual: Sequence[int], pad_left: bool, queries: int | None = None) -> None:
        """Say what the next batch holds, so that the host need not ask the device.

        Only stages with `Stage.kept` make use of it.

        Args:
            lengths: Real places of each row.
            visual: Visual tokens of each row.
            pad_left: Whether padding stands before the rows.
            queries: With `InsideDrop.queries` the most query rows that any row has, or more.
        """
        self._now.expected = Expected(list(lengths), list(visual), pad_left, queries)

    def __getstate__(self) -> dict[str, Any]:
        # A deep copy of the model and one from a pickle have hooks of their own; what is under way is not copied.
        passing = {"_now", "_calls"}
        return {name: value for name, value in vars(self).items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _now=_Now(), _calls=WeakTensorKeyDictionary())

    # hooks ------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._now.call = self._now.visual = self._now.expected = None

    def _before_base(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget_unless_expected()
        if not self.active:
            return
        # A compiler that meets an error goes back to plain calls, so it is noted here and raised where it is plain.
        self._compiled = torch.compiler.is_compiling()
        inputs = {**dict(zip(_names(type(module)), args, strict=False)), **kwargs}
        self._now.visual = self._find_visual(inputs)

    def _after_base(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._forget()  # what failed on the way to the language model must not meet the next one

    def _forget_unless_expected(self) -> None:
        expected = self._now.expected
        self._forget()
        self._now.expected = expected

    def _find_visual(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which places of a call hold visual tokens; None where it has none."""
        ids = inputs.get("input_ids")
        given = inputs.get("inputs_embeds") if ids is None else ids
        if given is None:
            return None
        shape = tuple(given.shape[:2])
        follows = record_of(inputs.get("past_key_values")) is not None
        if self.visual_mask is not None and not (follows and self.visual_mask.shape[1] != shape[1]):
            return _fit_mask(self.visual_mask, shape, self.owner)
        if follows and ids is not None and not self._carries_images(inputs):
            return None
        if ids is None or not self.decoder.token_ids:
            if follows and shape[1] == 1:
                return None
            what = "inputs_embeds came without input_ids" if ids is None else f"{self.decoder.name} has no placeholders"
            raise SettingError(
                f"{self.owner} cannot tell which places hold visual tokens: {what}. Pass visual_mask, a bool tensor "
                f"of shape {shape} that is True at visual tokens (withdraw(..., visual_mask=mask), or set it on the "
                "handle before each prompt)."
            )
        if not self._carries_images(inputs):
            return None
        found = torch.zeros_like(ids, dtype=torch.bool)
        for token in self.decoder.token_ids:
            found |= ids == token
        return found

    def _carries_images(self, inputs: Mapping[str, Any]) -> bool:
        if inputs.get("mm_encoder_outputs"):
            return True
        kinds = () if self.decoder.host is None else self.decoder.host.modalities
        return any(inputs.get(kind.pixels) is not None for kind in kinds)

    def _before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        expected, visual = self._now.expected, self._now.visual
        self._forget()
        if not self.active:
            return None
        if self._compiled:
            raise NotSupportedError(f"{self.owner} is not supported under torch.compile. Call the model as it is.")
        inputs = {**dict(zip(_names(type(module)), args, strict=False)), **kwargs}
        given = inputs.get("inputs_embeds")
        given = inputs.get("input_ids") if given is None else given
        if given is None:
            return None
        call = Call.open(self, inputs, tuple(given.shape[:2]), given.device, visual, expected)
        self._now.call = call
        if call is None or call.positions_given is None:
            return None
        return (), {**inputs, "position_ids": call.positions_given}

    def _before_layer(self, number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._now.call if self._now.call is not None else self._call_of(kwargs)
        if call is None:
            return None
        if self._now.call is not None and module.training:
            for value in _keys(kwargs):
                self._calls[value] = call  # must not hold its own key, or it would never be let go
        states = args[0] if args else kwargs["hidden_states"]
        plan: Plan | None = None
        for place, stage in enumerate(self.stages):
            if stage.look_layer == number and len(call.plans) == place:
                call.plans.append(self._plan(call, stage, states, module, kwargs))
            if stage.layer > number:
                break
            plan = call.plans[place]
            if stage.layer == number and plan.step is not None:
                index = plan.step.to(states.device)
                states = states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))
        if plan is None:
            return None
        cut = plan.cut_arguments(kwargs, states)
        if args:
            return (states, *args[1:]), cut
        return args, {**cut, "hidden_states": states}

    def _call_of(self, kwargs: Mapping[str, Any]) -> Call | None:
        """The call that a layer belongs to which recomputes its activations in a backward pass."""
        found = (self._calls.get(value) for value in _keys(kwargs))
        return next((call for call in found if call is not None), None)

    def _plan(self, call: Call, stage: Stage, states: Tensor, layer: Any, kwargs: Mapping[str, Any]) -> Plan:
        before = call.plans[-1] if call.plans else None
        past = call.past_columns(stage.layer, len(call.plans))
        if call.visual is None:
            return Plan.whole(call, stage, before, past)
        arguments = dict(kwargs) if before is None else before.cut_arguments(kwargs, states)
        with torch.no_grad():
            stays = stage.choose(self._rows(call, before, states, layer, arguments))
        return Plan.choose(call, stage, before, past, stays)

    def _rows(self, call: Call, before: Plan | None, states: Tensor, layer: Any, arguments: Mapping[str, Any]) -> Rows:
        assert call.visual is not None
        rank = call.visual.long().cumsum(1) - call.visual.long()
        if call.record is not None:
            rank = rank + call.record.visual.to(rank.device)[:, None]
        full = {
            "visual": call.visual, "real": call.real, "rank": rank,
            "marks": self._marks(call), "queries": call.query_rows(self.queries, self.owner),
        }  # fmt: skip
        if before is None:
            source = torch.arange(call.shape[1], device=call.visual.device).expand(call.shape)
            taken = full
        else:
            source = before.source
            taken = {name: value.gather(1, source) for name, value in full.items()}
            for name in ("visual", "marks", "queries"):
                taken[name] = taken[name] & before.real
            taken["real"] = before.real
        # The one query row of a prompt is its last place, which the host knows; rows named by the user it has to count.
        told = None if call.expected is None else call.expected.queries
        most = 1 if self.queries is None else told
        if most is None and self.queries is not None and not self.queries.is_cuda:
            most = int(self.queries.sum(1).max())
        return Rows(
            states=states.detach(), source=source, total=call.visual.sum(1), layer=layer, arguments=arguments,
            most_queries=most, **taken,
        )  # fmt: skip

    def _marks(self, call: Call) -> Tensor:
        assert call.visual is not None
        newline = getattr(self.decoder.base, "image_newline", None)
        if newline is None or call.embeddings is None:
            return torch.zeros_like(call.visual)
        line = newline.detach().to(call.embeddings.device, call.embeddings.dtype)
        equal: Tensor = (call.embeddings.detach() == line).all(-1)
        return equal & call.visual

    def _note_counts(self, call: Call) -> None:
        if call.visual is not None:
            self.counts = [call.shape[1], *(plan.width for plan in call.plans)]
        if call.is_known_to_end_visual and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.owner}: a prompt ends with an image, without any text behind it, and its last visual token "
                "leaves. The next word is then predicted from what stands before it, which in a withdrawal knows "
                "nothing of the image. Put the question behind the image.",
                TrimtabWarning,
                stacklevel=2,
            )

    def _after_text(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        call, self._now.call, self._now.visual = self._now.call, None, None
        if call is None or output is None or not call.plans:
            return None
        call.embeddings = None
        self._note_counts(call)
        remember(call, self.stages, output)
        last = call.plans[-1]
        if last.step is None and last.width == call.shape[1]:
            return None
        if isinstance(output, tuple):
            return (last.fill(output[0]), *output[1:])
        output.last_hidden_state = last.fill(output.last_hidden_state)
        return output


def _names(kind: type) -> list[str]:
    return [name for name in inspect.signature(kind.forward).parameters if name != "self"]  # type: ignore[attr-defined]


def _keys(kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that a forward gives to all its layers, by which a recomputed layer finds its call."""
    angles = kwargs.get("position_embeddings")
    found = [kwargs.get("position_ids"), angles[0] if isinstance(angles, (tuple, list)) else angles]
    return [one for one in found if isinstance(one, Tensor)]


def _fit_mask(mask: Tensor, shape: tuple[int, ...], owner: str) -> Tensor:
    rows, places = shape
    if not isinstance(mask, torch.Tensor):
        raise setting_error(
            owner, "visual_mask", f"a bool tensor of shape {shape}, one value per row and place of the prompt", mask
        )
    fits = mask.dim() == 2 and mask.shape[1] == places and mask.shape[0] > 0 and rows % mask.shape[0] == 0
    if not fits or mask.dtype != torch.bool:
        raise setting_error(
            owner, "visual_mask", f"a bool tensor of shape {shape}, one value per row and place of the prompt",
            f"{tuple(mask.shape)} of {mask.dtype}", "Set it on the handle anew for each prompt.",
        )  # fmt: skip
    return mask.repeat_interleave(rows // mask.shape[0], 0) if rows != mask.shape[0] else mask


def _check_stages(decoder: Decoder, stages: Sequence[Stage], owner: str) -> None:
    least, before = decoder.first_layer, 0
    for stage in stages:
        layer, look = stage.layer, stage.look_layer
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= decoder.depth:
            raise setting_error(
                owner, "layer", f"a whole number from 0 to {decoder.depth}, the layers of {decoder.name}", layer
            )
        if layer < least:
            raise setting_error(
                owner, "layer", f"at least {least} for {decoder.name}, which itself adds visual features at the input "
                f"or output of its first {least} layers", layer, f"Give a layer from {least} to {decoder.depth}.",
            )  # fmt: skip
        if not before <= look <= layer:
            raise setting_error(owner, "look", f"a layer from {before} to {layer}", look)
        before = layer


__all__ = ["Chooser", "DropPositions", "Expected", "InsideDrop", "Rows", "Stage", "drop_inside"]
