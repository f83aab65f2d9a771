"""Time per step by mode, tokens and peak memory of a run's own model and data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from typing import Any

from trimtab.bench import peak_memory, time_steps
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import DataError
from trimtab.records import make_record
from trimtab.run.config import RunConfig, training_arguments
from trimtab.run.load import image_counts, load_model, load_processor, load_rows_of

MODES = ("plain", "fast", "slow")


class Bench:
    """A model, one batch and an optimizer that does not move it; each mode is one training step.

    Steps run as the training's arguments say: under autocast with bf16 or fp16, and with activation checkpointing. The
    loss is not scaled for fp16.

    Attributes:
        sizes: Mode -> tokens of the batch in all and visual tokens among them.
        autocast: Makes the context in which a forward pass runs.
    """

    def __init__(self, model: Any, batch: dict[str, Any], settings: DualSpeedConfig, arguments: Any) -> None:
        import torch

        self.model = model
        self.batch = batch
        self.settings = settings
        self.autocast = _autocast(arguments)
        if arguments.gradient_checkpointing:
            # Its name since transformers 5.23, and the one before.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(arguments.gradient_checkpointing_kwargs)
        self.handle: Any = None
        self.sizes: dict[str, tuple[int, int]] = {}
        # With a learning rate of 0 every step does the optimizer's work and every step sees the same weights.
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step(self, mode: str) -> None:
        """Run forward, backward and optimizer once.

        Args:
            mode: ``"plain"`` for the model without trimtab, ``"fast"`` or ``"slow"``.
        """
        if mode == "plain":
            self.close()
            self._update()
            return
        if self.handle is None:
            self._open()
        with self.handle.force_mode(mode):
            self._update()
        self._note(mode)

    def _open(self) -> None:
        from trimtab.dualspeed import attach

        logger = logging.getLogger("trimtab")
        level = logger.level
        if self.sizes:  # attached anew in every round: what there is to say was said the first time
            logger.setLevel(logging.ERROR)
        try:
            # Modes are forced here, and an annealed schedule would ask for the length of the run.
            self.handle = attach(self.model, replace(self.settings, schedule="stratified"))
        finally:
            logger.setLevel(level)

    def close(self) -> None:
        """Take trimtab off the model again."""
        if self.handle is not None:
            self.handle.detach()
            self.handle = None

    def _backward(self) -> None:
        with self.autocast():
            loss = self.model(**self.batch).loss
        loss.backward()

    def _update(self) -> None:
        self._backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def _note(self, mode: str) -> None:
        if mode in self.sizes:
            return
        metrics = self.handle.metrics()
        full, kept = int(metrics["visual_tokens_full"]), int(metrics["visual_tokens_kept"])
        places = int(self.batch["attention_mask"].sum())
        self.sizes.setdefault("plain", (places, full))
        self.sizes[mode] = (places - full + kept, kept) if mode == "fast" else (places, full)


def bench(config: RunConfig, steps: int = 20, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Measure a run's training steps on its first rows with images, on the device that training would use.

    The modes take turns and are compared round by round (`trimtab.bench.time_steps`). A step is forward, backward and
    AdamW, in the precision and with the checkpointing of the run; data loading is left out. Changing from plain to
    fast includes attaching, which takes about a millisecond.

    Args:
        config: The settings; without a `dualspeed:` block its defaults are measured.
        steps: Timed steps per mode.
        progress: Called with rounds done and rounds in all.

    Returns:
        The record, kind "bench": ``modes`` (per mode ``mode``, ``seconds`` (median), ``ratio`` to plain, ``tokens``
        and ``visual_tokens`` of the batch, ``peak_mib``), ``dualspeed_speedup`` (plain time over the mean of
        fast and slow at the slow ratio), ``rows`` and ``timing`` in full.

    Raises:
        SettingError: A setting does not fit.
        DataError: The data cannot be read, or no row holds an image.
        UnsupportedModelError: The model cannot train on pruned visual tokens.
    """
    started = datetime.now(timezone.utc)
    arguments = training_arguments(config)
    settings = config.dualspeed or DualSpeedConfig()
    parts, rows = _prepare(config, arguments, settings)
    try:
        timing = time_steps({mode: _stepper(parts, mode) for mode in MODES}, repeats=steps, progress=progress)
        peaks = {mode: peak_memory(_stepper(parts, mode), arguments.device)["mib"] for mode in MODES}
    finally:
        parts.close()
    results = _results(timing, peaks, parts.sizes, settings.slow_ratio)
    identity = replace(config, dualspeed=settings).identity()
    seconds = (datetime.now(timezone.utc) - started).total_seconds()
    results = {**results, "rows": rows, "timing": timing}
    return make_record("bench", {**identity, "steps": steps}, results, seed=0, started=started, seconds=seconds)


def _prepare(config: RunConfig, arguments: Any, settings: DualSpeedConfig) -> tuple[Bench, int]:
    from trimtab.data import SupervisedCollator

    given = load_rows_of(config.data_files, config)
    places = islice((place for place, images in image_counts(given) if images), arguments.train_batch_size)
    rows = [given[place] for place in places]
    if not rows:
        raise DataError(
            f"No row of {', '.join(config.data_files)} holds an image, so every mode would be plain training and there "
            "is nothing to measure. Are the images given?"
        )
    collate = SupervisedCollator(load_processor(config.model_name_or_path), max_length=config.max_length)
    batch = {name: value.to(arguments.device) for name, value in collate(rows).items()}
    return Bench(load_model(config).to(arguments.device), batch, settings, arguments), len(rows)


def _autocast(arguments: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    import torch

    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(arguments.device.type, dtype)


def _stepper(parts: Bench, mode: str) -> Callable[[], None]:
    return lambda: parts.step(mode)


def _results(
    timing: dict[str, Any], peaks: dict[str, float], sizes: dict[str, tuple[int, int]], slow_ratio: float
) -> dict[str, Any]:
    seconds = {mode: timing["steps"][mode]["median"] for mode in MODES}
    modes = [
        {
            "mode": mode,
            "seconds": seconds[mode],
            "ratio": timing["ratios"][mode]["median"],
            "tokens": sizes[mode][0],
            "visual_tokens": sizes[mode][1],
            "peak_mib": peaks[mode],
        }
        for mode in MODES
    ]
    mean = (1 - slow_ratio) * seconds["fast"] + slow_ratio * seconds["slow"]
    return {"modes": modes, "dualspeed_speedup": seconds["plain"] / mean}
