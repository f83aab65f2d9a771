"""Run a model once, and then only its last layers for every layer at which tokens might leave.

Which places stay does not depend on the layer in the withdrawal of visual tokens, so the states that enter layer K on
these places are those of the whole run. One whole run that keeps them for every layer is enough: layers K to L - 1, the
final norm and the head need to run on the places that stay only. That gives what `drop_inside` gives at K, from the
same states, the same cut arguments and batches of the same shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from trimtab.anatomy.decoder import Decoder, open_decoder
from trimtab.anatomy.drop_inside import Chooser, DropPositions, InsideDrop, Stage
from trimtab.anatomy.drop_plan import Call, Plan
from trimtab.errors import DataError, NotSupportedError, UnsupportedModelError
from trimtab.shapes import Bool, Int, Tensor


@dataclass(eq=False)
class Trace:
    """What one whole run left behind.

    Attributes:
        decoder: The model, opened.
        call: The whole run.
        plan: Which places stay, and the layers' arguments cut to them.
        states: What entered each layer from `Decoder.first_layer` on at the places that stay, [row, kept, width].
        last: States of the whole run behind the final norm, [row, seq, width].
        arguments: What each layer was given beside the states, cut to the places that stay.
        norm: The final norm.
    """

    decoder: Decoder
    call: Call
    plan: Plan
    states: dict[int, Tensor]
    last: Tensor
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    norm: Callable[[Tensor], Tensor]
    _columns: Tensor | None = field(default=None, init=False)

    @property
    def visual(self) -> Bool[Tensor, "row seq"]:
        """Which places of the whole run hold visual tokens."""
        visual = self.call.visual
        assert visual is not None
        return visual

    @property
    def real(self) -> Bool[Tensor, "row seq"]:
        """Which places of the whole run are not padding."""
        return self.call.real

    @property
    def stays(self) -> Bool[Tensor, "row seq"]:
        """Which places of the whole run stay."""
        stays = torch.zeros(self.call.shape, dtype=torch.long, device=self.real.device)
        return stays.scatter_add(1, self.plan.source, self.plan.real.long()) > 0

    @property
    def kept_places(self) -> Int[Tensor, "row seq"]:
        """For each place of the whole run its place among those that stay: its own, or the nearest before it.

        Where none before it stayed it is the first of the row.
        """
        if self._columns is None:
            own = torch.arange(self.plan.width, device=self.real.device).expand(self.plan.source.shape)
            self._columns = self.plan.fill(own[..., None])[..., 0]
        return self._columns

    @torch.no_grad()
    def finish(self, layer: int) -> Tensor:
        """Run the layers behind a withdrawal.

        Args:
            layer: Tokens leave at the input of this layer, from `Decoder.first_layer` to the number of layers; at the
                latter nothing is run.

        Returns:
            States behind the final norm, [row, kept place, width]; at padding arbitrary.

        Raises:
            ValueError: The layer is none of these.
        """
        self._check(layer)
        if layer == self.decoder.depth:
            return self._whole()
        states = self.states[layer]
        for number in range(layer, self.decoder.depth):
            rest, arguments = self.arguments[number]
            states = _first(self.decoder.layers[number](states, *rest, **arguments))
        return self.norm(states)

    @torch.no_grad()
    def finish_all(self, layers: Sequence[int], *, stacked: bool = False) -> dict[int, Tensor]:
        """Run the layers behind a withdrawal, for several of them.

        Args:
            layers: See `finish`.
            stacked: Run the branches side by side as rows of one batch, so that each layer runs once: at layer j the
                branches of all K up to j. Fewer and larger products, for devices that want them; sums come in another
                order, so values agree to rounding only, and memory grows with the number of branches.

        Returns:
            For each layer what `finish` returns.

        Raises:
            ValueError: A layer is out of range.
        """
        if not stacked:
            return {layer: self.finish(layer) for layer in layers}
        for layer in layers:
            self._check(layer)
        rows, depth = self.plan.source.shape[0], self.decoder.depth
        inside = sorted({layer for layer in layers if layer < depth})
        found = {depth: self._whole()} if depth in layers else {}
        if not inside:
            return found
        active: list[int] = []
        stack = self.states[inside[0]][:0]
        for number in range(inside[0], depth):
            if number in inside:
                active.append(number)
                stack = torch.cat((stack, self.states[number].to(stack.device)))
            rest, arguments = self.arguments[number]
            shape = rows, self.plan.width
            spread = {name: _repeat(name, value, shape, len(active)) for name, value in arguments.items()}
            stack = _first(self.decoder.layers[number](stack, *rest, **spread))
        return {**dict(zip(active, self.norm(stack).split(rows), strict=True)), **found}

    def _whole(self) -> Tensor:
        index = self.plan.source.to(self.last.device)
        return self.last.gather(1, index[..., None].expand(-1, -1, self.last.shape[2]))

    def _check(self, layer: int) -> None:
        least, most = self.decoder.first_layer, self.decoder.depth
        if not least <= layer <= most:
            raise ValueError(f"Trace.finish: layer must be in {least}..{most}, but {layer} came.")

    def scores(self, states: Tensor) -> Tensor:
        """Scores of the language-model head, as the model itself scales them.

        Args:
            states: Behind the final norm, [label, width].

        Returns:
            [label, vocab].
        """
        return _head(self.decoder, states)


def trace_layers(
    model: Any,
    batch: Mapping[str, Any],
    choose: Chooser,
    *,
    positions: DropPositions = "keep",
    visual_mask: Tensor | None = None,
    owner: str = "trace_layers",
) -> Trace:
    """Run the whole model once and keep what entered each layer at the places that stay.

    The run has no cache and no gradients; whether dropout is on is left to the caller. The memory that stays in use is
    that of the states of one run at the places that stay, for every layer.

    Args:
        model: See `open_decoder`; an opened one is taken as it is.
        batch: Arguments of its forward; ``labels`` are passed over.
        choose: Says which places stay; asked once, at the first layer at which tokens may leave, so it must not look at
            states, layers or arguments.
        positions: See `drop_inside`.
        visual_mask: Which places hold visual tokens, [row, seq], where ``input_ids`` do not tell.
        owner: Name of the method, for messages.

    Returns:
        What is needed to run the last layers again.

    Raises:
        DataError: The batch has no visual tokens.
        UnsupportedModelError: The layers cannot be found; or the model does more than hand the states of one layer to
            the next, norm the last ones and give them to its head.
        NotSupportedError: See `open_decoder`; or a cache came with the batch.
        WrongOrderError: Tokens of this model leave already.
    """
    decoder = model if isinstance(model, Decoder) else open_decoder(model)
    if batch.get("past_key_values") is not None:
        raise NotSupportedError(f"{owner} runs whole prompts, but past_key_values came. Leave the cache out.")
    if decoder.first_layer >= decoder.depth:
        raise UnsupportedModelError(
            f"{decoder.name} adds visual features up to its last layer, so that its visual tokens cannot leave. "
            f"It has {decoder.depth} layers, and tokens may leave from layer {decoder.first_layer} on."
        )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs["use_cache"] = False
    if "logits_to_keep" in inspect.signature(type(decoder.model).forward).parameters:
        inputs["logits_to_keep"] = 1
    tracer = _Tracer(decoder, choose, owner, positions, visual_mask)
    try:
        with torch.no_grad():
            output = decoder.model(**inputs)
    finally:
        tracer.detach()
    return tracer.trace(output)


class _Tracer(InsideDrop):
    """Chooses as `InsideDrop` does, but lets every place stay and keeps what would have stayed."""

    def __init__(
        self, decoder: Decoder, choose: Chooser, owner: str, positions: DropPositions, visual_mask: Tensor | None
    ) -> None:
        super().__init__(decoder, (Stage(decoder.first_layer, choose),), owner, positions, visual_mask)
        self.call: Call | None = None
        self.plan: Plan | None = None
        self.states: dict[int, Tensor] = {}
        self.arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.output: Tensor | None = None  # of the latest layer
        self.last: Tensor | None = None
        self.after: list[tuple[Any, Tensor]] = []  # parts of the language model that were given the last layer's output
        for layer in decoder.layers:
            self._hooks.append(layer.register_forward_hook(self._after_layer))
        for part in decoder.text.children():
            if not isinstance(part, torch.nn.ModuleList):
                self._hooks.append(part.register_forward_hook(self._after_part))

    def _before_layer(self, number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._now.call is None:
            return
        states = args[0] if args else kwargs["hidden_states"]
        if number == self.decoder.first_layer:
            self.call = self._now.call
            self.plan = self._plan(self._now.call, self.stages[0], states, module, kwargs)
        elif states is not self.output:
            raise UnsupportedModelError(
                f"{self.owner}: {type(self.decoder.text).__name__} changes the states between layers {number - 1} and "
                f"{number}, so that its layers cannot be run alone. Measure withdraw(model, layer) layer by layer."
            )
        assert self.plan is not None
        if self.plan.step is not None:
            index = self.plan.step.to(states.device)
            states = states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))
        given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.states[number] = states
        self.arguments[number] = args[1:], self.plan.cut_arguments(given, states)

    def _after_layer(self, module: Any, args: Any, output: Any) -> None:
        self.output = _first(output)

    def _after_part(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if args and args[0] is self.output and isinstance(output, torch.Tensor):
            self.after.append((module, output))

    def _after_text(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if output is not None:
            self.last = output[0] if isinstance(output, tuple) else output.last_hidden_state
        self._now.call = self._now.visual = None

    def trace(self, output: Any) -> Trace:
        """Put together what was kept, and hold it against what the model returned."""
        if self.call is None or self.plan is None or self.last is None:
            raise DataError(
                f"{self.owner}: the batch has no visual tokens, so there is nothing to withdraw. Give batches with "
                "images and their placeholders."
            )
        trace = Trace(self.decoder, self.call, self.plan, self.states, self.last, self.arguments, self._norm())
        with torch.no_grad():
            ours = trace.scores(self.last[:, -1]).float().softmax(-1)
        theirs = output.logits[:, -1].float().softmax(-1).to(ours.device)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=0.01, equal_nan=True):
            raise UnsupportedModelError(
                f"{self.owner}: the head of {self.decoder.name} does not give the scores that the model returns, so "
                "that it cannot be run alone. Measure withdraw(model, layer) layer by layer."
            )
        return trace

    def _norm(self) -> Callable[[Tensor], Tensor]:
        """What turns the last layer's output into the last states of the language model."""
        assert self.last is not None
        assert self.output is not None
        if self.last is self.output:
            return _nothing
        for part, output in self.after:
            if output is self.last and _equal(_quiet(part, self.output), self.last):
                return partial(_call, part)
        names = [name for name, part in self.decoder.text.named_children() if not isinstance(part, torch.nn.ModuleList)]
        raise UnsupportedModelError(
            f"{self.owner}: the final norm of {type(self.decoder.text).__name__} was not found. None of its parts "
            f"({', '.join(names)}) makes its last_hidden_state of the last layer's output alone. Measure "
            "withdraw(model, layer) layer by layer."
        )


def _head(decoder: Decoder, states: Tensor) -> Tensor:
    if decoder.host is not None:
        return decoder.host.head(states)
    scores: Tensor = decoder.model.get_output_embeddings()(states)
    return scores


def _nothing(states: Tensor) -> Tensor:
    return states


def _call(part: Any, states: Tensor) -> Tensor:
    found: Tensor = part(states)
    return found


def _quiet(part: Any, states: Tensor) -> Tensor:
    with torch.no_grad():
        return _call(part, states)


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _first(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return states


def _repeat(name: str, value: Any, shape: tuple[int, int], times: int) -> Any:
    """Repeat what a layer is given for as many branches; what holds for all rows alike stays as it is."""
    if times == 1:
        return value
    if name == "position_embeddings" and value is not None:
        return tuple(_repeat_axis(one, -3, shape[0], times) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name in ("attention_mask", "position_ids"):
        return _repeat_axis(value, 0 if name == "attention_mask" else -2, shape[0], times)
    return _repeat_axis(value, 0, shape[0], times) if tuple(value.shape[:2]) == shape else value


def _repeat_axis(value: Tensor, axis: int, rows: int, times: int) -> Tensor:
    counts = [1] * value.dim()
    counts[axis] = times
    return value.repeat(counts) if value.shape[axis] == rows else value
