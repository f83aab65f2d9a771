"""Where the time of an update goes: a clock that hooks switch from part to part, in a pass that is not otherwise timed.

The parts are told apart by what the model does, so that all arms are split alike: the vision tower and the projector,
the pruner, the blocks of the decoder, everything between the decoder and its gradient (head and loss), the optimizer,
and the rest (making batches shorter, packing, embedding). Backward passes are cut where the gradient of the decoder's
result and that of its input arrive.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trimtab.bench.floor import Way
from trimtab.bench.timing import wait_for_device
from trimtab.pruners.divprune import DivPrunePruner
from trimtab.run import bench_baselines
from trimtab.run.bench_arms import TrainingBed

PARTS = ("tower", "pruner", "decoder", "head", "optimizer", "assembly")


class PartClock:
    """Adds up seconds by part; at every moment one part runs."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "assembly", 0.0

    def start(self) -> None:
        """Begin with the assembly."""
        wait_for_device()
        self._part, self._since = "assembly", time.perf_counter()

    def switch(self, part: str) -> str:
        """End the part that runs and begin another; return the one that ran."""
        wait_for_device()
        now, before = time.perf_counter(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same while this part runs."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(before)

        return call


def split_seconds(bed: TrainingBed, way: Way, numbers: Sequence[int]) -> dict[str, float]:
    """Return the seconds of some updates of an arm by part; their sum is the whole time of these updates.

    Args:
        bed: Model and samples.
        way: The arm.
        numbers: Which updates.
    """
    clock = PartClock()
    for number in numbers:
        bed.batches(way, number)
    with _watched(bed.arm(way).model, clock, teacher_scores=way.style == "released"):
        clock.start()
        for number in numbers:
            for loss in bed.losses(way, number):
                clock.switch("head")
                loss.backward()
                clock.switch("assembly")
            clock.switch("optimizer")
            bed.step()
            clock.switch("assembly")
    return clock.seconds


@contextlib.contextmanager
def _watched(model: Any, clock: PartClock, *, teacher_scores: bool) -> Iterator[None]:
    """While active, the modules of a LLaVA and the pruners switch the clock.

    A released-style teacher goes on to the head; trimtab's gives its states, and the student is put together next.
    """
    base = model.model
    handles = [
        *_within(base.vision_tower, clock, "tower"),
        *_within(base.multi_modal_projector, clock, "tower"),
        base.language_model.register_forward_pre_hook(lambda m, a, k: _enter_decoder(clock, k), with_kwargs=True),
        base.language_model.register_forward_hook(lambda m, a, out: _leave_decoder(clock, out, teacher_scores)),
        # Rows are put together from here on; behind a teacher the head would run on otherwise.
        model.get_input_embeddings().register_forward_pre_hook(lambda m, a: clock.switch("assembly") and None),
    ]
    with (
        _replaced(DivPrunePruner, "select", clock.timed("pruner", DivPrunePruner.select)),
        _replaced(bench_baselines, "divprune_loop", clock.timed("pruner", bench_baselines.divprune_loop)),
    ):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While active, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _within(module: nn.Module, clock: PartClock, part: str) -> list[Any]:
    """Hooks that switch to a part for the forward of a module."""
    before: list[str] = []
    return [
        module.register_forward_pre_hook(lambda m, a: before.append(clock.switch(part))),
        module.register_forward_hook(lambda m, a, out: clock.switch(before.pop()) and None),
    ]


def _enter_decoder(clock: PartClock, given: dict[str, Any]) -> None:
    embeddings = given["inputs_embeds"]
    if torch.is_grad_enabled() and embeddings.requires_grad:
        # What is left of the backward pass behind this is the projector's (and the tower's), and the embeddings'.
        embeddings.register_hook(lambda gradient: clock.switch("tower") and None)
    clock.switch("decoder")


def _leave_decoder(clock: PartClock, output: Any, teacher_scores: bool) -> None:
    states = output.last_hidden_state
    if states.requires_grad:
        states.register_hook(lambda gradient: clock.switch("decoder") and None)
    clock.switch("head" if states.requires_grad or teacher_scores else "assembly")
