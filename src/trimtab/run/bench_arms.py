"""The arms of `bench training`: each takes the same updates of samples through one model, in its own way.

An arm is a way to train (`trimtab.bench.floor.Way`); one call of its runner is one whole update: every sample forward
and backward, then the optimizer. The learning rate is 0, so that every update does its work on the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trimtab.anatomy.recompute import pause_recompute
from trimtab.anatomy.row_layout import placeholder_rule
from trimtab.bench.floor import REMEDIES, FloorModel, Rows, Way, Work
from trimtab.bench.shapes import TrainingShape
from trimtab.dualspeed import DualSpeedConfig, DualSpeedHandle, attach
from trimtab.dualspeed.schedule import Mode
from trimtab.errors import TrimtabWarning
from trimtab.run.bench_baselines import ReleasedStep
from trimtab.run.bench_rows import Batch, Update, padded_batch, split_rows
from trimtab.shapes import Tensor

_ALL = frozenset(REMEDIES)
WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way(name="public", view="full", style="public"),
        Way(name="public_packed", view="full", style="trimtab", packing=True),
        Way(name="public_packed_kept", view="full", style="trimtab", packing=True, recompute=False),
        Way(name="released_fast", view="fast", style="released"),
        Way(name="released_slow", view="slow", style="released"),
        Way(name="batched_fast", view="fast", style="released", remedies=frozenset({"batched"})),
        Way(name="batched_slow", view="slow", style="released", remedies=frozenset({"batched"})),
        Way(name="once_slow", view="slow", style="released", remedies=frozenset({"batched", "tower_once"})),
        Way(name="head_fast", view="fast", style="released", remedies=_ALL),
        Way(name="head_slow", view="slow", style="released", remedies=_ALL),
        Way(name="padded_fast", view="fast", style="trimtab"),
        Way(name="padded_slow", view="slow", style="trimtab"),
        Way(name="packed_fast", view="fast", style="trimtab", packing=True),
        Way(name="packed_slow", view="slow", style="trimtab", packing=True),
        Way(name="fast", view="fast", style="trimtab", packing=True, recompute=False),
        Way(name="slow", view="slow", style="trimtab", packing=True, recompute=False),
        Way(name="mixed", view="mixed", style="trimtab", packing=True, recompute=False),
    )
}
"""What is timed, by name."""


@dataclass(frozen=True)
class Arm:
    """What an arm runs.

    Attributes:
        model: With the weights of all arms.
        handle: DualSpeed on it, or None.
        released: The released-style step on it, or None.
    """

    model: Any
    handle: DualSpeedHandle | None
    released: ReleasedStep | None


class TrainingBed:
    """A model, an optimizer that does not move it, and updates of samples for every arm.

    Args:
        model: From `build_llava`; activation checkpointing is switched on here. Every arm has a copy of its modules
            around the same weights, so that no arm pays for attaching, and none sees the hooks of another.
        shape: Its shape.
        updates: The samples.
        config: Keep ratio, slow ratio, isolator and seed; the arms set the rest.
    """

    def __init__(self, model: Any, shape: TrainingShape, updates: Sequence[Update], config: DualSpeedConfig) -> None:
        self.model, self.shape, self.updates, self.config = model, shape, updates, config
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # transformers lets the inputs of a frozen vision tower ask for gradients when checkpointing is switched on, so
        # that the tower has a backward pass for nothing. LLaVA's own code has not, and no arm here pays for it.
        model.disable_input_require_grads()
        self.device = next(model.parameters()).device
        rows = torch.randn(config.isolator_tokens, shape.width, generator=torch.Generator().manual_seed(config.seed))
        self.isolator = nn.Parameter((rows * shape.width**-0.5).to(self.device, model.dtype))
        trained = [one for one in model.parameters() if one.requires_grad]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW([*trained, self.isolator], lr=0.0, fused=fused)
        self.floor = _floor(shape, config)
        self._batches: dict[tuple[int, str], list[Batch]] = {}
        self._arms: dict[str, Arm] = {}

    def changed(
        self, *, shape: TrainingShape | None = None, updates: Sequence[Update] | None = None, **settings: Any
    ) -> TrainingBed:
        """Return a bed with the same model and optimizer, but other samples or settings of DualSpeed.

        Args:
            shape: Another shape of the data; that of the model must stay.
            updates: Other samples.
            settings: Fields of `DualSpeedConfig`.
        """
        other = copy.copy(self)
        other.shape, other.updates = shape or self.shape, self.updates if updates is None else updates
        other.config = replace(self.config, **settings)
        other.floor = _floor(other.shape, other.config)
        other._batches, other._arms = {}, {}
        return other

    def arm(self, way: Way) -> Arm:
        """Return the model of an arm, made once: its own modules and hooks around the weights that all share."""
        if way.name not in self._arms:
            shared = {id(one): one for one in (*self.model.parameters(), *self.model.buffers())}
            model = copy.deepcopy(self.model, shared)
            if not way.recompute:
                pause_recompute(model)
            released = ReleasedStep(
                model, self.isolator, keep_ratio=self.config.keep_ratio, max_length=self.shape.max_length,
                remedies=way.remedies,
            )  # fmt: skip
            self._arms[way.name] = Arm(
                model=model,
                handle=_attach(model, self._config_of(way)) if way.style == "trimtab" else None,
                released=released if way.style == "released" else None,
            )
        return self._arms[way.name]

    def batches(self, way: Way, number: int) -> list[Batch]:
        """Return the batches of an update as an arm sees them, put together once."""
        kind = f"{'pack ' + way.view if way.packing else 'rows'} {way.style} {way.view == 'mixed'}"
        if (number, kind) not in self._batches:
            update = self.updates[number]
            groups = split_rows(self.shape, self.floor, update, way.view, way.packing)
            self._batches[number, kind] = [self.collate(way, self.shape, update, rows) for rows in groups]
        return self._batches[number, kind]

    def collate(self, way: Way, shape: TrainingShape, update: Update, rows: Sequence[int]) -> Batch:
        """Put rows together as an arm wants them."""
        return padded_batch(
            shape, update, rows, self.device, placeholders=1 if way.style == "released" else None,
            numbered=way.view == "mixed", rule=placeholder_rule(self.model) if way.style == "trimtab" else None,
        )  # fmt: skip

    def losses(self, way: Way, number: int, batches: Sequence[Batch] | None = None) -> Iterator[Tensor]:
        """Yield the losses of an update, batch by batch; their sum is what the update minimises.

        Args:
            way: The arm.
            number: Which update.
            batches: Some of its batches; by default all.
        """
        batches = self.batches(way, number) if batches is None else batches
        update, arm = self.updates[number], self.arm(way)
        with contextlib.nullcontext() if arm.handle is None else arm.handle.force_mode(_FORCED.get(way.view)):
            for batch in batches:
                given = update.arguments(batch)
                if arm.released is not None:
                    yield arm.released.loss(given, way.view) / len(batches)
                elif arm.handle is not None:
                    yield arm.model(**given, num_items_in_batch=update.items).loss
                else:
                    yield arm.model(**given, use_cache=False).loss / len(batches)

    def update(self, way: Way, number: int, batches: Sequence[Batch] | None = None) -> None:
        """Train on an update: forward and backward of each batch, then the optimizer."""
        for loss in self.losses(way, number, batches):
            loss.backward()
        self.step()

    def step(self) -> None:
        """Run the optimizer and drop the gradients."""
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Drop the gradients of the shared weights and of every arm's isolator."""
        self.optimizer.zero_grad(set_to_none=True)
        for arm in self._arms.values():
            if arm.handle is not None and arm.handle.isolator is not None:
                arm.handle.isolator.zero_grad(set_to_none=True)

    def runner(self, way: Way) -> Callable[[], None]:
        """Return what trains on the updates in turn, one at a call."""
        turn = 0

        def run() -> None:
            nonlocal turn
            self.update(way, turn % len(self.updates))
            turn += 1

        self.arm(way)
        for number in range(len(self.updates)):
            self.batches(way, number)
        return run

    def work(self, way: Way, numbers: Sequence[int] | None = None, floor: FloorModel | None = None) -> Work:
        """Return the operations that an arm has to do on updates, by default on all of them."""
        chosen = range(len(self.updates)) if numbers is None else numbers
        counts: list[Rows] = [batch.counts for number in chosen for batch in self.batches(way, number)]
        return (floor or self.floor).work(way, counts)

    def _config_of(self, way: Way) -> DualSpeedConfig:
        if way.view == "full":
            return replace(
                self.config, pruner="keep_all", keep_ratio=1.0, isolator_tokens=0, slow_ratio=0.0, packing=way.packing
            )
        unit = "sample" if way.view == "mixed" else "optimizer"
        return replace(self.config, schedule_unit=unit, packing=way.packing)


def _floor(shape: TrainingShape, config: DualSpeedConfig) -> FloorModel:
    return FloorModel(shape, keep_ratio=config.keep_ratio, isolator_tokens=config.isolator_tokens)


_FORCED: dict[str, Mode] = {"fast": "fast", "slow": "slow", "full": "fast"}


def _attach(model: Any, config: DualSpeedConfig) -> DualSpeedHandle:
    """Attach without advice: that plain training or few slow steps were asked for is known here."""
    logger = logging.getLogger("trimtab")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrimtabWarning)
            return attach(model, config)
    finally:
        logger.setLevel(level)
