"""The wiring: hooks on the user's own model that make its training steps fast or slow.

The model keeps its class and its forward. A hook before its forward replaces the images by features, pruned or not;
a hook after it computes the loss where labels are. In evaluation mode the hooks do nothing.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from trimtab.anatomy import has_images, open_host, placeholder_rule
from trimtab.anatomy.packed_attention import enter_pack, require_packed_attention, use_packed_attention
from trimtab.anatomy.recompute import pause_recompute, recomputes, wraps_recompute
from trimtab.dualspeed.cache import TowerCache
from trimtab.dualspeed.checks import advise, changed_settings, refuse_device_map, refuse_inputs
from trimtab.dualspeed.config import DualSpeedConfig, require_config
from trimtab.dualspeed.inside import DropsInside, refuse_compiled, refuse_step
from trimtab.dualspeed.isolator import ModeIsolator, fresh_isolator
from trimtab.dualspeed.losses import losses_of_step
from trimtab.dualspeed.metrics import StepMetrics
from trimtab.dualspeed.prepare import StepMaker
from trimtab.dualspeed.ranks import (
    inside_forward,
    needs_lockstep,
    process_count,
    refuse_sharded,
    require_agreement,
    touch,
)
from trimtab.dualspeed.samples import ENTRIES, SAMPLES, NoteRows, require_samples
from trimtab.dualspeed.schedule import Mode, mode_of_sample, mode_of_step
from trimtab.dualspeed.step import Step, at_least_one, loss_per_label
from trimtab.dualspeed.view import FastView, by_name
from trimtab.errors import DataError, SettingError, TrimtabWarning, WrongOrderError, setting_error
from trimtab.files import read_json, write_json_atomic
from trimtab.shapes import Tensor

SIDE_FILE = "dualspeed.json"
ISOLATOR = "dualspeed_isolator"


def attach(model: Any, config: DualSpeedConfig | Mapping[str, Any], *, accumulation_steps: int = 1) -> DualSpeedHandle:
    """Make the training steps of a model fast or slow; everything else about it stays.

    From now on ``model(**batch)`` in training mode, with images and labels, returns the DualSpeed loss: cross-entropy
    on pruned tokens in fast steps; on all tokens, plus the KL divergence from the pruned view, in slow ones. A
    frozen language model (the alignment stage) takes fast steps only. The isolator becomes a parameter of the model,
    so build the optimizer afterwards. Steps are counted in forward calls with gradients; without them (``no_grad``)
    the model does in training mode what it does without DualSpeed, on full images. With `inside` tokens also leave
    inside the language model, in fast steps and in the view that teaches slow ones.

    Args:
        model: A vision-language model of transformers (``trimtab.check_model`` says which), also inside PEFT, and
            before or after ``torch.compile``.
        config: The settings, also as a mapping of the fields.
        accumulation_steps: Forward calls per optimizer step, at least 1, so that all of one update share a mode
            (``schedule_unit="optimizer"``). Inside ``accelerator.accumulate`` with as many steps and a prepared loader,
            the shorter update at the end of an epoch counts as one too.

    Returns:
        The handle: metrics, side files, and the way back (`DualSpeedHandle.detach`).

    Raises:
        UnsupportedModelError: The model lacks what it takes.
        SettingError: A setting that this model or this call cannot meet.
        NotSupportedError: With `inside`, layers that tokens cannot leave between, or a compiled model.
        WrongOrderError: DualSpeed is attached to the model already, or with `inside` tokens leave inside it already.
    """
    config = require_config(config, "attach", "config")
    if config.schedule == "annealed" and config.total_steps is None:
        raise setting_error(
            "DualSpeedConfig", "total_steps", "the number of steps of the run with schedule='annealed'", None,
            "A Trainer fills it in; a plain loop must give it.",
        )  # fmt: skip
    if accumulation_steps < 1:
        raise setting_error("attach", "accumulation_steps", "at least 1", accumulation_steps)
    refuse_compiled(config, model)
    # What torch.compile returns calls the model itself, with its hooks.
    return DualSpeedHandle(getattr(model, "_orig_mod", model), config, accumulation_steps)


def detach(model: Any) -> None:
    """Take DualSpeed off a model whose handle is lost, or off a deep copy of a model that has it.

    The same as `DualSpeedHandle.detach`; does nothing where DualSpeed is not attached.

    Args:
        model: The model, or one around it.
    """
    handle = _handle_of(model)
    if handle is not None:
        handle.detach()


def _handle_of(model: Any) -> DualSpeedHandle | None:
    """Return the handle whose hooks a model or a part of it has; in a deep copy they are those of a copied handle."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, DualSpeedHandle):
                return owner
    return None


class DualSpeedHandle:
    """DualSpeed on one model; made by `attach`.

    Attributes:
        config: The settings.
        isolator: The learned prefix, a submodule of the model, or None with ``isolator_tokens=0``.
        micro_step: Training forward calls so far.
        accumulation_steps: Forward calls per optimizer step.
        optimizer_step: Returns the number of the optimizer step, where somebody else counts (a Trainer); or None.
        autocast: Returns the context under which images are encoded and losses computed, that of the forward; finds
            out by itself whether accelerate has prepared the model for mixed precision.
        rank_facts: Returns what else must be equal on all processes before the first step, by name.
    """

    def __init__(self, model: Any, config: DualSpeedConfig, accumulation_steps: int = 1) -> None:
        if _handle_of(model) is not None:
            raise WrongOrderError(
                f"DualSpeed is attached to this {type(model).__name__} already, perhaps as a copy of a model that had "
                "it. Call detach() on the handle first (trainer.dualspeed of a Trainer), or trimtab.detach(model)."
            )
        self._host = open_host(model)
        refuse_device_map(self._host.model)
        refuse_sharded(model)
        self._view = FastView(self._host, config)
        if config.cache_from is not None:
            self._view.cache = TowerCache(config.cache_from, self._host, config, self._view.pruner)
        self._model = model
        self.config = config
        self._length_open = config.total_steps is None
        self.accumulation_steps = accumulation_steps
        self.optimizer_step: Callable[[], int] | None = None
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = self._forward_autocast
        self.micro_step = 0
        self._skipped = 0
        """Forward calls that were left out of updates which ended early."""
        self.isolator = self._make_isolator()
        self._metrics = StepMetrics()
        self._step: Step | None = None
        self._forced: Mode | None = None
        self.rank_facts: Callable[[], Mapping[str, Any]] = dict
        self._ranks_agree = False
        self._lockstep = False
        self._maker = StepMaker(self._view, self._isolator_rows, self.isolator is not None)
        self._leave_packs: Callable[[], None] = lambda: None
        self._hooks: list[Any] = []
        self._ignored: Any = None
        advise(config, self._host.decoder_trains, self.isolator)
        self._install()

    @property
    def attached(self) -> bool:
        """Whether the model still has the hooks."""
        return bool(self._hooks)

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids of the image placeholders."""
        return self._host.image_token_ids

    # the public side --------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """Return what the last step measured, as plain numbers; waits for the device.

        Returns:
            ``mode``, ``ce`` (also ``ce_fast``, ``ce_slow`` of the last step of each mode) and ``kl`` in nats per
            label, ``visual_tokens_full`` and ``visual_tokens_kept`` of the batch, ``steps_fast``, ``steps_slow``
            and ``unlabelled_batches``. What was not measured yet is None.
        """
        cache = self._view.cache
        return {**self._metrics.last(), **({} if cache is None else cache.metrics())}

    def window_metrics(self) -> dict[str, float]:
        """Return means of the same since the last call of this method, and ``slow_share``; waits for the device."""
        return self._metrics.means()

    @contextlib.contextmanager
    def force_mode(self, mode: Mode | None) -> Iterator[None]:
        """While active, every step has this mode whatever the schedule says; None leaves it to the schedule."""
        if mode is not None and mode not in get_args(Mode):
            raise setting_error("force_mode", "mode", "'fast', 'slow' or None", mode)
        before, self._forced = self._forced, mode
        try:
            yield
        finally:
            self._forced = before

    def next_mode(self) -> Mode:
        """Return the mode of the coming step; of no use with ``schedule_unit="sample"``, where each row has its own."""
        if self._forced is not None:
            return self._forced
        if not self._host.decoder_trains:
            return "fast"
        unit = self.micro_step
        if self.config.schedule_unit != "micro":
            counted = (self.micro_step + self._skipped) // self.accumulation_steps
            unit = self.optimizer_step() if self.optimizer_step else counted
        return mode_of_step(
            unit,
            kind=self.config.schedule,
            slow_ratio=self.config.slow_ratio,
            seed=self.config.seed,
            total_steps=self.config.total_steps,
        )

    def spread_over(self, total_steps: int) -> None:
        """Set the number of steps that an annealed schedule spreads over, where the settings leave it open.

        A second call, as a second training makes it, sets it anew.
        """
        self._ranks_agree = False
        if self.config.schedule == "annealed" and self._length_open:
            self.config = replace(self.config, total_steps=total_steps)

    def collator(self, collate: Callable[..., Any]) -> NoteRows:
        """Let a collator of this model's batches count their rows, so that steps need not ask the device.

        Args:
            collate: The user's collator; also inside worker processes.

        Returns:
            One that does the same and adds the entry ``row_notes``.
        """
        return NoteRows(collate, placeholder_rule(self._host))

    def prune_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fast view of a batch: pruned features behind the isolator.

        Args:
            batch: Arguments of the model, with or without labels.

        Returns:
            Arguments of the model (and of its ``generate``), to be used in evaluation mode.
        """
        if not has_images(batch):
            return {name: value for name, value in batch.items() if name not in ENTRIES}
        with self.autocast():
            pruned, _ = inside_forward(
                self._model, lambda: self._view.prune(batch, self._isolator_rows(), self.micro_step)
            )
        return {name: value for name, value in pruned.items() if name not in ENTRIES}

    def chosen_tokens(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return which tokens of every image the pruner keeps; for pictures and checks."""
        with torch.no_grad(), self.autocast():
            encoded, layout = inside_forward(self._model, lambda: self._view.encode(batch))
            return self._view.choose(batch, encoded, layout, self.micro_step).index

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimizer; plain numbers and strings."""
        counts = {"micro_step": self.micro_step, "skipped": self._skipped}
        done = {"steps": dict(self._metrics.steps), "samples": dict(self._metrics.samples)}
        return {**counts, **done, "config": self.config.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._ranks_agree = False
        self.micro_step, self._skipped = int(state["micro_step"]), int(state.get("skipped", 0))
        self._metrics.steps.update(state["steps"])
        self._metrics.samples.update(state.get("samples", {}))

    def save_pretrained(self, folder: str | Path, *, write: bool = True) -> None:
        """Write the side files ``dualspeed.json`` and ``isolator.safetensors``, each whole or not at all.

        Args:
            folder: Where to.
            write: Whether this process writes. With a sharded model (FSDP, ZeRO-3) every process must call this, since
                the isolator is gathered from all; let one of them write.

        Raises:
            OutputError: A file cannot be written.
        """
        target = Path(folder)
        if self.isolator is not None:
            self.isolator.save(target, write=write)
        if write:
            write_json_atomic(target / SIDE_FILE, self.state_dict())

    def load_pretrained(self, folder: str | Path) -> None:
        """Continue from the side files of an earlier `save_pretrained`.

        Raises:
            DataError: There is no ``dualspeed.json``.
            OutputError: There is no isolator.
            SettingError: The isolator has another shape.

        Warns:
            TrimtabWarning: Other settings differ from those of the side files.
        """
        source = Path(folder)
        if not (source / SIDE_FILE).is_file():
            raise DataError(
                f"There is no {SIDE_FILE} in {source}: the checkpoint is of a run without DualSpeed, or the folder was "
                "lost. To go on from its weights, load the model from the checkpoint (from_pretrained) and start a new "
                "training without resume_from_checkpoint."
            )
        state = read_json(source / SIDE_FILE)
        stored = DualSpeedConfig.from_dict(state["config"])
        if stored.isolator_tokens != self.config.isolator_tokens:
            raise SettingError(
                f"{source} was written with isolator_tokens={stored.isolator_tokens}, but this run has "
                f"isolator_tokens={self.config.isolator_tokens}. Resume with the settings of the first run."
            )
        changed = changed_settings(stored, self.config)
        if changed:
            warnings.warn(
                f"{source} was written with other settings: {', '.join(changed)}. The run goes on with the new "
                "ones, so it will not be the run that was interrupted.",
                TrimtabWarning,
                stacklevel=2,
            )
        if self.isolator is not None:
            self.isolator.load(source)
        self.load_state_dict(state)

    def detach(self) -> None:
        """Remove hooks and isolator; the model is then as before. Calling it again does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._end_step()
        self._leave_packs()
        if self._view.inside is not None:
            self._view.inside.detach()
        if self.isolator is None:
            return
        self._model._modules.pop(ISOLATOR, None)
        if self._ignored is _Absent:
            vars(self._model).pop("_keys_to_ignore_on_save", None)
        elif hasattr(self._model, "_keys_to_ignore_on_save"):
            self._model._keys_to_ignore_on_save = self._ignored

    # hooks ------------------------------------------------------------------------------------------------------

    # Of a compiled model the hooks stay ordinary Python, and with them the encoder and the teacher that they call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._end_step()
        if not module.training:
            return self._without_entries(args, kwargs)
        inputs = by_name(self._host, args, kwargs)
        if self.config.prunes_nothing and self._forced != "slow":
            if torch.is_grad_enabled() and inputs.get("labels") is not None:
                self._step = Step("fast", labels=inputs["labels"], items=inputs.get("num_items_in_batch"))
            return self._without_entries(args, kwargs)
        refuse_inputs(inputs, self.isolator)
        if not torch.is_grad_enabled():
            return self._without_entries(args, kwargs)
        if self.config.packing:
            require_packed_attention(self._host)
        if self._view.inside is not None:
            refuse_step(self._view.inside, inputs, module)
        modes = self._modes(inputs)
        self._check_ranks(modes)
        # Processes that must keep in step recompute alike, whatever rows they have.
        paused = self._pause_recompute("slow" not in modes and not (self._lockstep and self._by_sample))
        try:
            with self.autocast():
                inputs = self._maker.make(modes, inputs, self.micro_step, mixed=self._by_sample)
        except BaseException:
            paused()
            raise
        step: Step = inputs.pop("step")
        step.catching = True
        step.leave += [paused, self._pause_recompute(not step.has_slow)]
        self._step = step
        if self.config.packing:
            step.leave.append(enter_pack())
        if self._view.inside is not None and step.inside is not None:
            self._view.inside.enter(step.inside, step.labels)
            step.leave.append(self._view.inside.leave)
        return (), inputs

    def _pause_recompute(self, wanted: bool) -> Callable[[], None]:
        """Let the coming forward keep its activations where that is wanted and asked for; returns the way back."""
        if not wanted or self.config.recompute != "slow":
            return lambda: None
        return pause_recompute(self._model).remove

    def _without_entries(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take out what only a DualSpeed step understands, where this is none; None where there is nothing of it."""
        if not ENTRIES & kwargs.keys():
            return None
        return args, {name: value for name, value in kwargs.items() if name not in ENTRIES}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _catch(self, module: Any, args: Any, output: Any) -> None:
        if self._step is not None and self._step.catching:
            self._step.student = output.last_hidden_state

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        step = self._end_step()
        if step is None or output is None:  # None after an exception
            return None
        self._count_call()
        if step.student is None or step.labels is None:
            self._metrics.note_plain(loss_per_label(step, output))
            return None
        if self._view.inside is not None and step.inside is not None:
            self._view.inside.require_done()
        loss = self._loss(step, self._router_loss(output))
        rest = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        result = type(output)(loss=loss, **rest)
        return result.to_tuple() if step.as_tuple else result

    def _count_call(self) -> None:
        """Count a forward call, and those that an update lacks which accelerate ends early with the epoch."""
        self.micro_step += 1
        # In a loop without accelerate it is not imported, or no loader of its is at its end.
        accelerate = sys.modules.get("accelerate.state")
        if accelerate is None:
            return
        state = accelerate.GradientState()
        if state.end_of_dataloader and state.sync_gradients and state.num_steps == self.accumulation_steps:
            self._skipped += -(self.micro_step + self._skipped) % self.accumulation_steps

    def _end_step(self) -> Step | None:
        """Forget the step between the two hooks, also one whose forward did not come to its end, and return it."""
        step, self._step = self._step, None
        if step is not None and step.pace is not None:
            step.pace.remove()
        if step is not None:
            while step.leave:
                step.leave.pop()()
        return step

    def _router_loss(self, output: Any) -> Tensor | None:
        """Return the balancing loss of a mixture of experts with its weight, or None where it is not asked for."""
        weight = getattr(self._host.model.config.get_text_config(), "router_aux_loss_coef", None)
        found: Tensor | None = output.get("aux_loss")
        return None if found is None or weight is None else weight * found

    def _loss(self, step: Step, router: Tensor | None) -> Tensor:
        assert step.labels is not None and step.student is not None  # noqa: PT018, set by _before and _catch
        with self.autocast():
            losses = losses_of_step(step, self._host.head, self.config)
        if not losses.ce.requires_grad and self._host.decoder_trains:
            raise SettingError(
                "No gradient reaches the trainable parameters of the language model. This happens with reentrant "
                "gradient checkpointing (use_reentrant=True) over frozen embeddings, as with LoRA: set use_reentrant "
                "to False, or call model.enable_input_require_grads()."
            )
        count = sum(step.label_counts)
        if count == 0:
            self._metrics.unlabelled_batches += 1
            warnings.warn(
                "A batch has no supervised label (all are -100), so its loss is 0 and it teaches nothing. Look at the "
                "collator and at max_length; metrics()['unlabelled_batches'] counts such batches.",
                TrimtabWarning,
                stacklevel=2,
            )
        total = losses.ce
        if losses.kl is not None:
            total = total + self.config.kl_weight * self.config.temperature**2 * losses.kl
        if router is not None:
            # Of an update each micro-batch gives the share that it has in the labels.
            total = total + count * router.to(total.device)
        loss = total / at_least_one(count if step.items is None else step.items)
        loss = self._reach_every_part(loss)
        self._metrics.note_step(step, losses)
        return loss.sum()  # one number, and no view: a Trainer scales it in place, which would cut off hooks on it

    def _reach_every_part(self, loss: Tensor) -> Tensor:
        """Give all that trains a gradient on every process, so that none waits for another in the backward pass."""
        if self.isolator is not None:
            loss = loss + 0 * self.isolator().sum()
        if process_count() > 1 and not self._lockstep:
            # Batches without images, and layers of a vision tower behind the one that gives the features.
            decoder = {id(one) for one in self._host.model.get_decoder().parameters()}
            loss = touch(loss, (one for one in self._host.base.parameters() if id(one) not in decoder))
        return loss

    # parts --------------------------------------------------------------------------------------------------------

    def _isolator_rows(self) -> Tensor | None:
        return None if self.isolator is None else self.isolator()

    def _modes(self, inputs: dict[str, Any]) -> list[Mode]:
        """Return the mode of each row of a batch."""
        samples, rows = inputs.pop(SAMPLES, None), inputs["input_ids"].shape[0]
        if not self._by_sample:
            return [self.next_mode()] * rows
        samples = require_samples(samples, rows)
        ratio, seed = self.config.slow_ratio, self.config.seed
        return [mode_of_sample(one, epoch=samples.epoch, slow_ratio=ratio, seed=seed) for one in samples.ids]

    @property
    def _by_sample(self) -> bool:
        """Whether each row has a mode of its own."""
        return self.config.schedule_unit == "sample" and self._forced is None and self._host.decoder_trains

    def _check_ranks(self, modes: list[Mode]) -> None:
        """Before the first step, make sure that every process would do the same."""
        if self._ranks_agree:
            return
        settings = {**self.config.to_dict(), "isolator_from": None, "cache_from": None}
        mode = "by sample" if self._by_sample else modes[0]
        require_agreement({**settings, "step": self.micro_step, "mode": mode, **self.rank_facts()})
        self._lockstep = self._maker.lockstep = needs_lockstep(self._model)
        if self._view.cache is not None:
            self._view.cache.require_hits = self._lockstep
        if self._lockstep and self.config.distillation == "two_way":
            raise setting_error(
                "DualSpeedConfig", "distillation", "'one_way' with FSDP and ZeRO: gradients through both views were "
                "not tried where parameters are sharded", self.config.distillation,
            )  # fmt: skip
        self._ranks_agree = True
        if self.config.recompute == "slow" and not recomputes(self._model):
            warnings.warn(
                "recompute='slow' has nothing to suspend: gradient checkpointing of the model is off. Switch it on "
                "(gradient_checkpointing of the Trainer), or leave recompute at 'model'.",
                TrimtabWarning,
                stacklevel=2,
            )

    # coming and going -----------------------------------------------------------------------------------------------

    def _make_isolator(self) -> ModeIsolator | None:
        config = self.config
        if config.isolator_tokens == 0:
            return None
        isolator = fresh_isolator(self._host, config.isolator_tokens, config.seed)
        if config.isolator_from is not None:
            isolator.load(Path(config.isolator_from))
        return isolator

    def _install(self) -> None:
        model = self._model
        if self.config.recompute == "slow" and wraps_recompute(model):
            warnings.warn(
                "recompute='slow' has no effect on blocks inside torch's checkpoint_wrapper, which always recompute. "
                "Use gradient_checkpointing of the Trainer or of the model instead.",
                TrimtabWarning,
                stacklevel=4,
            )
        if self.config.packing:
            self._leave_packs = use_packed_attention(self._host)
        if self.config.inside is not None:
            self._view.inside = DropsInside(self._host, self.config)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            self._host.body.register_forward_hook(self._catch),
        ]
        if self.isolator is None:
            return
        model.add_module(ISOLATOR, self.isolator)
        if hasattr(model, "_keys_to_ignore_on_save"):
            # save_pretrained then writes the keys of the stock model only.
            self._ignored = vars(model).get("_keys_to_ignore_on_save", _Absent)
            model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), f"{ISOLATOR}.rows"}

    def _forward_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast that accelerate puts around the forward of a model it prepares; hooks run outside."""
        if "_original_forward" not in vars(self._model):
            return contextlib.nullcontext()
        from accelerate.utils import get_mixed_precision_context_manager

        context: contextlib.AbstractContextManager[Any] = get_mixed_precision_context_manager(native_amp=True)
        return context


class _Absent:
    """Stands for an attribute that an instance does not have itself."""
