"""What a training tells while it runs: figures after every step, a table of facts before the first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from trimtab.errors import TrimtabError
from trimtab.pruners import kept_count
from trimtab.run.config import RunConfig
from trimtab.run.load import skipped_rows
from trimtab.run.progress import Pace, end_text, rate_text

LOSSES = ("ce_fast", "ce_slow", "kl", "learning_rate", "eval_loss")
"""Entries of the Trainer's log that are figures under the same name."""


@dataclass(frozen=True)
class Figures:
    """Where a training stands.

    Attributes:
        step: Optimizer steps done, those of an interrupted run included.
        steps: Optimizer steps in all.
        phase: What is being done: training, evaluating, saving a checkpoint.
        steps_per_second: Over the recent past; None where nothing is known yet, as everywhere below.
        samples_per_second: The same of samples.
        seconds_left: Until the last step, at that pace.
        slow_share: Share of slow steps so far, or of slow samples where each has its mode.
        ce: Cross-entropy in nats per label since the last log, where there is one mode only.
        ce_fast: That of fast steps.
        ce_slow: That of slow steps.
        kl: The KL term of slow steps, in nats per label.
        learning_rate: As logged last.
        eval_loss: The last one on the rows of `eval_files`.
    """

    step: int
    steps: int
    phase: str = "training"
    steps_per_second: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    slow_share: float | None = None
    ce: float | None = None
    ce_fast: float | None = None
    ce_slow: float | None = None
    kl: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None

    def words(self) -> list[str]:
        """Return every figure that is known as text, the most important first."""
        texts = [
            _when(self.steps_per_second, lambda value: rate_text(value, "step")),
            _when(self.seconds_left if self.step < self.steps else None, end_text),
            _when(self.slow_share, lambda value: f"{1 - value:.0%} fast, {value:.0%} slow"),
            *(_when(value, f"{name} {{:.4g}}".format) for name, value in self._losses()),
            _when(self.samples_per_second, lambda value: rate_text(value, "sample")),
            _when(self.learning_rate, "lr {:.3g}".format),
        ]
        return [text for text in texts if text]

    def _losses(self) -> list[tuple[str, float | None]]:
        named = (("CE", self.ce), ("CE fast", self.ce_fast), ("CE slow", self.ce_slow), ("KL", self.kl))
        return [*named, ("eval loss", self.eval_loss)]


def _when(value: float | None, words: Callable[[float], str]) -> str:
    return "" if value is None else words(value)


class TrainView:
    """Is told of a training, and shows what it likes; this one shows nothing."""

    def phase(self, name: str) -> None:
        """Take what is being done before and after the steps: reading the data, loading the model, saving."""

    def begin(self, facts: Mapping[str, Any], figures: Figures, *, bar: bool) -> None:
        """Take what is going to be trained, right before the first step.

        Args:
            facts: See `run_facts`.
            figures: Where it stands, at a later step in a resumed run.
            bar: Whether the user lets a bar be drawn (``disable_tqdm`` forbids it).
        """

    def step(self, figures: Figures) -> None:
        """Take the figures after a step."""

    def log(self, figures: Figures) -> None:
        """Take the figures after the Trainer has logged."""


def watch_training(
    trainer: Any, view: TrainView, samples: Callable[[], int], facts: Callable[[Any], Mapping[str, Any]]
) -> None:
    """Let a view be told of a training, in place of the bar or the lines that the Trainer itself would print.

    Args:
        trainer: A Trainer of transformers, with or without DualSpeed.
        view: What is told.
        samples: Returns how many samples the training has seen, all processes together.
        facts: Returns what stands in the table before the first step; given the Trainer's state.
    """
    for printer in (DEFAULT_PROGRESS_CALLBACK, ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_Watch(view, getattr(trainer, "dualspeed", None), samples, facts))


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Gathers the figures on the host alone; what the device holds is read when the Trainer itself reads it to log."""

    def __init__(
        self, view: TrainView, handle: Any, samples: Callable[[], int], facts: Callable[[Any], Mapping[str, Any]]
    ) -> None:
        self._view, self._handle, self._samples, self._facts = view, handle, samples, facts
        if handle is not None and handle.config.prunes_nothing:
            self._handle = None
        self._pace = Pace()
        self._figures = Figures(0, 0)
        self._begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the facts; only once, also where the Trainer begins anew with smaller batches."""
        self._figures = replace(self._figures, step=state.global_step, steps=state.max_steps)
        self._pace = Pace()
        self._pace.mark(state.global_step, self._samples())
        if not self._begun:
            self._view.begin(self._facts(state), self._figures, bar=not args.disable_tqdm)
        self._begun = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that what came between two steps is over."""
        if self._figures.phase != "training":
            self._tell("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the pace, and what comes between this step and the next."""
        self._pace.mark(state.global_step, self._samples())
        self._figures = replace(
            self._figures,
            step=state.global_step,
            steps_per_second=self._pace.per_second(),
            samples_per_second=self._pace.per_second(1),
            seconds_left=self._pace.seconds_left(state.max_steps),
            slow_share=self._slow_share(),
        )
        self._tell("evaluating" if control.should_evaluate else "saving" if control.should_save else "training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Tell the losses."""
        if not logs or "train_runtime" in logs:  # the last entry has means of the whole run
            return
        found: dict[str, Any] = {name: float(logs[name]) for name in LOSSES if name in logs}
        if self._handle is None and "loss" in logs:
            found["ce"] = float(logs["loss"])
        self._figures = replace(self._figures, slow_share=self._slow_share(), **found)
        self._view.log(self._figures)

    def _tell(self, phase: str) -> None:
        self._figures = replace(self._figures, phase=phase)
        self._view.step(self._figures)

    def _slow_share(self) -> float | None:
        """Return the share of slow steps, or samples, by the counts that DualSpeed keeps on the host."""
        if self._handle is None:
            return None
        counted = self._handle.state_dict()
        for unit in ("samples", "steps"):
            every = sum(counted[unit].values())
            if every:
                return float(counted[unit]["slow"] / every)
        return None


# the table before the first step ------------------------------------------------------------------------------------


def run_facts(config: RunConfig, trainer: Any, rows: Any, state: Any) -> dict[str, Any]:
    """Gather what is going to be trained, for a table.

    Args:
        config: The settings.
        trainer: The Trainer.
        rows: What `trimtab.run.load.load_rows_of` returned.
        state: The Trainer's state at the start of the training.

    Returns:
        Name -> value, in the order of the table; what does not apply is left out.
    """
    model, args = trainer.model, trainer.args
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    every, trained = sum(size for size, _ in sizes), sum(size for size, wanted in sizes if wanted)
    skipped = skipped_rows(rows)
    facts = {
        "model": config.model_name_or_path,
        "family": f"{model.config.model_type} ({_inner(model).__class__.__name__})",
        "parameters": f"{_short(every)} in all, {_short(trained)} trained ({trained / max(every, 1):.1%})",
        "frozen": ", ".join(config.freeze),
        "adapters": "LoRA, r {}".format(config.lora.get("r", 8)) if config.lora else "",
        "device": _device(args),
        "dtype": _dtype(model, args),
        "data": f"{len(rows):,} rows" + (f" ({skipped:,} bad ones skipped)" if skipped else ""),
        "steps": _steps(state),
        "batch": _batch(config, args),
        **_dualspeed_facts(config, trainer),
        "output": config.output_dir,
    }
    return {name: value for name, value in facts.items() if value != ""}


def _inner(model: Any) -> Any:
    """Return the model inside adapters of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _device(args: Any) -> str:
    import torch

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device)
    return f"{args.world_size} x {name}" if args.world_size > 1 else name


def _dtype(model: Any, args: Any) -> str:
    stored = str(model.dtype).removeprefix("torch.")
    mixed = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), None)
    return stored if mixed is None else f"{stored}, computing in {mixed}"


def _steps(state: Any) -> str:
    done = f", going on behind step {state.global_step:,}" if state.global_step else ""
    return f"{state.max_steps:,}{done}"


def _batch(config: RunConfig, args: Any) -> str:
    packed = config.dualspeed is not None and config.dualspeed.pack_tokens is not None
    one, unit = (1, "pack") if packed else (args.train_batch_size, "row")
    factors = ((one, "per device"), (args.gradient_accumulation_steps, "accumulated"), (args.world_size, "processes"))
    every = math.prod(count for count, _ in factors)
    told = [f"{count:,} {what}" for count, what in factors if count > 1 or what == "per device"]
    return f"{every:,} {unit}{'s' * (every > 1)} per step" + (f" ({' x '.join(told)})" if len(told) > 1 else "")


def _dualspeed_facts(config: RunConfig, trainer: Any) -> dict[str, str]:
    chosen = config.dualspeed
    if chosen is None:
        return {"DualSpeed": "off: every step sees all visual tokens"}
    spread = "" if chosen.keep_spread == "fixed" else f", spread {chosen.keep_spread}"
    units = {"optimizer": "optimizer step", "micro": "forward call", "sample": "sample"}
    packs = f"rows joined up to {chosen.pack_tokens:,} tokens" if chosen.pack_tokens else "rows of a batch joined"
    tokens = chosen.isolator_tokens
    return {
        "pruner": chosen.pruner,
        "keep ratio": f"{chosen.keep_ratio:g} of the visual tokens in fast mode{spread}",
        "slow ratio": f"{chosen.slow_ratio:g} of the {units[chosen.schedule_unit].removeprefix('optimizer ')}s",
        "schedule": f"{chosen.schedule}, one mode per {units[chosen.schedule_unit]}",
        "packing": packs if chosen.packing else "off",
        "isolator": f"{tokens} learned tokens before pruned images" if tokens else "off",
        "cache": chosen.cache_from or "",
        "visual tokens": _visual_tokens(trainer, chosen.keep_ratio),
    }


def _visual_tokens(trainer: Any, keep_ratio: float) -> str:
    """Say how many visual tokens the first row has, before and after pruning; nothing where that takes more to know."""
    handle, rows = getattr(trainer, "dualspeed", None), trainer.train_dataset
    if handle is None or not hasattr(rows, "__getitem__"):
        return ""
    try:
        ids = trainer.data_collator([rows[0]])["input_ids"]
        count = sum(int((ids == one).sum()) for one in handle.image_token_ids)
        return f"{count:,} -> about {kept_count(count, keep_ratio):,} in the first row" if count else ""
    except TrimtabError:  # training will say so, if it ever comes to this row
        return ""
