"""The wiring: hooks on the user's own model that make its training steps fast or slow.

The model keeps its class and its forward. A hook before its forward replaces the images by features, pruned or not;
a hook after it computes the loss where labels are. In evaluation mode the hooks do nothing.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from trimtab.anatomy import (
    full_inputs,
    has_images,
    open_host,
    read_rows,
)
from trimtab.anatomy.assemble import RowLayout
from trimtab.anatomy.blank import encode_blank
from trimtab.anatomy.encode import EncodedImages
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.isolator import ModeIsolator
from trimtab.dualspeed.metrics import StepMetrics
from trimtab.dualspeed.ranks import (
    SharedStep,
    inside_forward,
    needs_lockstep,
    process_count,
    refuse_sharded,
    require_agreement,
    share_step,
    touch,
)
from trimtab.dualspeed.schedule import Mode, mode_of_step
from trimtab.dualspeed.view import FastView, by_name
from trimtab.errors import (
    SettingError,
    TrimtabWarning,
    WrongOrderError,
    setting_error,
)
from trimtab.files import read_json, write_json_atomic
from trimtab.ops.label_head import IGNORED, label_losses, states_at_labels
from trimtab.shapes import Tensor

SIDE_FILE = "dualspeed.json"
ISOLATOR = "dualspeed_isolator"

logger = logging.getLogger("trimtab")
_attached: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass
class _Step:
    """What one training step carries from the hook before the forward to the hook after it."""

    mode: Mode
    labels: Tensor | None = None
    items: Tensor | int | None = None
    teacher: Tensor | None = None
    student: Tensor | None = None
    tokens_full: int | None = None
    tokens_kept: int | None = None
    shared: SharedStep | None = None
    pace: Any = None
    """Hook on the embeddings that has to go after the forward."""
    as_tuple: bool = False
    catching: bool = False


def attach(model: Any, config: DualSpeedConfig, *, accumulation_steps: int = 1) -> DualSpeedHandle:
    """Make the training steps of a model fast or slow; everything else about it stays.

    From now on ``model(**batch)`` in training mode, with images and labels, returns the DualSpeed loss: cross-entropy
    on pruned tokens in fast steps; on all tokens, plus the KL divergence from the pruned view, in slow ones. A
    frozen language model (the alignment stage) takes fast steps only. The isolator becomes a parameter of the model,
    so build the optimizer afterwards. Steps are counted in forward calls with gradients.

    Args:
        model: A vision-language model of transformers (``trimtab.check_model`` says which), also inside PEFT, and
            before or after ``torch.compile``.
        config: The settings.
        accumulation_steps: Forward calls per optimizer step, at least 1, so that all of one update share a mode
            (``schedule_unit="optimizer"``).

    Returns:
        The handle: metrics, side files, and the way back (`DualSpeedHandle.detach`).

    Raises:
        UnsupportedModelError: The model lacks what it takes.
        SettingError: A setting that this model or this call cannot meet.
        WrongOrderError: DualSpeed is attached to the model already.
    """
    if config.schedule == "annealed" and config.total_steps is None:
        raise setting_error(
            "DualSpeedConfig", "total_steps", "the number of steps of the run with schedule='annealed'", None,
            "A Trainer fills it in; a plain loop must give it.",
        )  # fmt: skip
    if accumulation_steps < 1:
        raise setting_error("attach", "accumulation_steps", "at least 1", accumulation_steps)
    # What torch.compile returns calls the model itself, with its hooks.
    return DualSpeedHandle(getattr(model, "_orig_mod", model), config, accumulation_steps)


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
        if model in _attached:
            raise WrongOrderError(
                f"DualSpeed is attached to this {type(model).__name__} already. Call detach() on its handle first."
            )
        self._host = open_host(model)
        refuse_sharded(model)
        self._view = FastView(self._host, config)
        self._model = model
        self.config = config
        self._length_open = config.total_steps is None
        self.accumulation_steps = accumulation_steps
        self.optimizer_step: Callable[[], int] | None = None
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = lambda: _forward_autocast(model)
        self.micro_step = 0
        self.isolator = self._make_isolator()
        self._metrics = StepMetrics()
        self._step: _Step | None = None
        self._forced: Mode | None = None
        self.rank_facts: Callable[[], Mapping[str, Any]] = dict
        self._ranks_agree = False
        self._lockstep = False
        self._warned_labels = False
        self._removers: list[Any] = []
        self._advise()
        self._install()

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
        return self._metrics.last()

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
        """Return the mode of the coming step."""
        if self._forced is not None:
            return self._forced
        if not self._host.decoder_trains:
            return "fast"
        unit = self.micro_step
        if self.config.schedule_unit == "optimizer":
            unit = self.optimizer_step() if self.optimizer_step else self.micro_step // self.accumulation_steps
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

    def prune_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fast view of a batch: pruned features behind the isolator.

        Args:
            batch: Arguments of the model, with or without labels.

        Returns:
            Arguments of the model (and of its ``generate``), to be used in evaluation mode.
        """
        if not has_images(batch):
            return dict(batch)
        with self.autocast():
            return inside_forward(self._model, lambda: self._view.prune(batch, self._prefix, self.micro_step))

    def chosen_tokens(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return which tokens of every image the pruner keeps; for pictures and checks."""
        with torch.no_grad(), self.autocast():
            encoded, layout = inside_forward(self._model, lambda: self._view.encode(batch))
            return self._view.choose(batch, encoded, layout, self.micro_step).index

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimizer; plain numbers and strings."""
        return {"micro_step": self.micro_step, "steps": dict(self._metrics.steps), "config": self.config.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._ranks_agree = False
        self.micro_step = int(state["micro_step"])
        self._metrics.steps.update(state["steps"])

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
            OutputError: A file is missing.
            SettingError: The isolator has another shape.

        Warns:
            TrimtabWarning: Other settings differ from those of the side files.
        """
        source = Path(folder)
        state = read_json(source / SIDE_FILE)
        stored = DualSpeedConfig.from_dict(state["config"])
        if stored.isolator_tokens != self.config.isolator_tokens:
            raise SettingError(
                f"{source} was written with isolator_tokens={stored.isolator_tokens}, but this run has "
                f"isolator_tokens={self.config.isolator_tokens}. Resume with the settings of the first run."
            )
        changed = _changed_settings(stored, self.config)
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
        for remover in self._removers:
            remover()
        self._removers.clear()
        self._end_step()
        _attached.discard(self._model)

    # hooks ------------------------------------------------------------------------------------------------------

    # Of a compiled model the hooks stay ordinary Python, and with them the encoder and the teacher that they call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._end_step()
        if not module.training:
            return None
        inputs = by_name(self._host, args, kwargs)
        if self.config.prunes_nothing and self._forced != "slow":
            if torch.is_grad_enabled() and inputs.get("labels") is not None:
                self._step = _Step("fast")
            return None
        self._refuse(inputs)
        if not torch.is_grad_enabled():
            return None
        mode = self.next_mode()
        self._check_ranks(mode)
        with self.autocast():
            step, inputs = self._prepare(mode, inputs)
        step.catching = True
        self._step = step
        return (), inputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _catch(self, module: Any, args: Any, output: Any) -> None:
        if self._step is not None and self._step.catching:
            self._step.student = output.last_hidden_state

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        step = self._end_step()
        if step is None:
            return None
        self.micro_step += 1
        if step.student is None or step.labels is None:
            self._metrics.note(step.mode, None, None, output["loss"] if isinstance(output, dict) else output[0], None)
            return None
        loss = self._loss(step)
        rest = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        result = type(output)(loss=loss, **rest)
        return result.to_tuple() if step.as_tuple else result

    def _end_step(self) -> _Step | None:
        """Forget the step between the two hooks, also one whose forward did not come to its end, and return it."""
        step, self._step = self._step, None
        if step is not None and step.pace is not None:
            step.pace.remove()
        return step

    def _prepare(self, mode: Mode, inputs: dict[str, Any]) -> tuple[_Step, dict[str, Any]]:
        """Turn the user's arguments into those of the step's student, and run the teacher of a slow step."""
        step = _Step(mode, items=inputs.pop("num_items_in_batch", None), tokens_full=0, tokens_kept=0)
        step.as_tuple = inputs.pop("return_dict", None) is False
        inputs.setdefault("use_cache", False)
        if "logits_to_keep" in self._host.forward_names:
            inputs["logits_to_keep"] = 1
        if self._lockstep:
            kinds = [inputs.get(kind.pixels) is not None for kind in self._host.modalities]
            step.shared = share_step(kinds, (inputs["labels"] != IGNORED).sum())
        if not has_images(inputs):
            layout = read_rows(self._host, inputs, None)
            step.labels = inputs["labels"] = self._clean_labels(inputs["labels"], layout)
            if step.shared is not None and step.shared.visual:
                self._keep_pace(step, inputs)
            return step, {**inputs, "labels": None}
        encoded, layout = self._view.encode(inputs)
        inputs["labels"] = self._clean_labels(inputs["labels"], layout)
        step.tokens_full = step.tokens_kept = sum(block.shape[0] for block in encoded.blocks)
        if mode == "slow":
            step.teacher = self._teach(inputs, encoded, layout)
            student = full_inputs(self._host, inputs, encoded)
        else:
            kept = self._view.choose(inputs, encoded, layout, self.micro_step)
            step.tokens_kept = kept.count
            student = self._view.shorten(inputs, encoded, layout, kept, self._prefix)
        step.labels = student["labels"]
        return step, {**student, "labels": None}

    def _keep_pace(self, step: _Step, inputs: dict[str, Any]) -> None:
        """Call the modules that other processes call for their images, though this batch has none."""
        embeddings = self._host.model.get_input_embeddings()
        blank = encode_blank(self._host, inputs["input_ids"].device)
        teaches = step.mode == "slow" and self.config.kl_weight != 0
        if "text" in self._view.pruner.needs and (step.mode == "fast" or teaches):
            with torch.no_grad():
                embeddings(inputs["input_ids"])
        if step.mode == "fast" and self.isolator is not None:
            blank = blank + self.isolator().sum()
        if teaches:
            view = {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")}
            with torch.no_grad():
                _ = self._prefix  # gathered here, as for a view with images
                hidden = self._host.last_states(view)
            step.teacher, _ = states_at_labels(hidden, inputs["labels"])
        # With weight zero the blank image enters where features do, so that the backward pass goes the same way too.
        step.pace = embeddings.register_forward_hook(lambda module, args, output: output + 0 * blank.to(output.dtype))

    def _teach(self, inputs: dict[str, Any], encoded: EncodedImages, layout: RowLayout) -> Tensor | None:
        """Return the states of the pruned view at the labels, or None where it would teach nothing."""
        if self.config.kl_weight == 0:
            return None
        with torch.no_grad():
            kept = self._view.choose(inputs, encoded, layout, self.micro_step)
            everything = kept.count == sum(block.shape[0] for block in encoded.blocks)
            if everything and self.isolator is None and not self._lockstep:
                return None
            view = self._view.shorten(inputs, encoded, layout, kept, self._prefix)
            labels = view.pop("labels")
            view.pop("logits_to_keep", None)
            states, _ = states_at_labels(self._host.last_states(view), labels)
        # Under a caller's autocast, older releases of torch keep the weights that were cast without gradients, and the
        # student would train none of them.
        torch.clear_autocast_cache()
        return states

    def _loss(self, step: _Step) -> Tensor:
        assert step.labels is not None and step.student is not None  # noqa: PT018, set by _prepare and _catch
        states, labels = states_at_labels(step.student, step.labels)
        config, count = self.config, labels.shape[0]
        with self.autocast():
            ce_sum, kl_sum = label_losses(
                states,
                step.teacher,
                labels,
                self._host.head,
                config.temperature,
                config.head_chunk,
                least_chunks=1 if step.shared is None else -(-step.shared.labels // config.head_chunk),
            )
        if not ce_sum.requires_grad and self._host.decoder_trains:
            raise SettingError(
                "No gradient reaches the trainable parameters of the language model. This happens with reentrant "
                "gradient checkpointing (use_reentrant=True) over frozen embeddings, as with LoRA: set use_reentrant "
                "to False, or call model.enable_input_require_grads()."
            )
        if count == 0:
            self._metrics.unlabelled_batches += 1
            warnings.warn(
                "A batch has no supervised label (all are -100), so its loss is 0 and it teaches nothing. Look at the "
                "collator and at max_length; metrics()['unlabelled_batches'] counts such batches.",
                TrimtabWarning,
                stacklevel=2,
            )
        total = ce_sum
        if step.teacher is not None:
            total = total + config.kl_weight * config.temperature**2 * kl_sum
        loss = total / _at_least_one(count if step.items is None else step.items)
        loss = self._reach_every_part(loss)
        mean = max(count, 1)
        kl = None if step.teacher is None else kl_sum / mean
        self._metrics.note(step.mode, step.tokens_full, step.tokens_kept, ce_sum / mean, kl)
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

    @property
    def _prefix(self) -> Tensor | None:
        return None if self.isolator is None else self.isolator()

    def _clean_labels(self, labels: Tensor, layout: RowLayout) -> Tensor:
        if layout.labelled and not self._warned_labels:
            self._warned_labels = True
            warnings.warn(
                f"{layout.labelled} labels of this batch stand on image placeholders. They are ignored (-100) in every "
                "step, since pruning would change their number; mask them in the collator so that token counts agree "
                "(trimtab.data.MaskPlaceholders does).",
                TrimtabWarning,
                stacklevel=2,
            )
        # A row's first token has no predecessor. Where padding stands before the row it would seem to have one, and the
        # two views, padded differently, would disagree on how many labels there are.
        first = layout.real & (layout.real.cumsum(1) == 1)
        return labels.masked_fill(layout.placeholder | ~layout.real | first, IGNORED)

    def _refuse(self, inputs: dict[str, Any]) -> None:
        if inputs.get("past_key_values") is not None:
            raise WrongOrderError(
                "past_key_values came in training mode, as generate() gives them. Call model.eval() before generate(): "
                "DualSpeed then leaves the model alone."
            )
        if not torch.is_grad_enabled():
            return
        if inputs.get("mm_encoder_outputs") is not None:
            raise SettingError(
                "mm_encoder_outputs came in training mode, but DualSpeed encodes the images itself. Give pixel_values."
            )
        if inputs.get("input_ids") is None:
            raise SettingError("input_ids must be given in training: DualSpeed finds the image placeholders in them.")
        if inputs.get("labels") is None:
            raise SettingError(
                "labels must be given in training: DualSpeed computes the loss at them. Give labels, or call "
                "model.eval() for a forward without loss."
            )
        if self.isolator is not None and not self.isolator.rows.requires_grad:
            raise SettingError(
                "The isolator is frozen (requires_grad is False), so the model cannot learn to tell the modes apart. "
                f"Call attach after get_peft_model or after freezing, or name {ISOLATOR!r} among the trainable modules "
                "(modules_to_save of PEFT)."
            )

    def _check_ranks(self, mode: Mode) -> None:
        """Before the first step, make sure that every process would do the same."""
        if self._ranks_agree:
            return
        settings = {**self.config.to_dict(), "isolator_from": None}
        require_agreement({**settings, "step": self.micro_step, "mode": mode, **self.rank_facts()})
        self._lockstep = needs_lockstep(self._model)
        self._ranks_agree = True

    # coming and going -----------------------------------------------------------------------------------------------

    def _make_isolator(self) -> ModeIsolator | None:
        config = self.config
        if config.isolator_tokens == 0:
            return None
        weight = self._host.model.get_input_embeddings().weight
        # Embeddings may be packed (4 or 8 bits); what comes out of them is of the type that the model computes in.
        dtype = weight.dtype if weight.is_floating_point() else self._host.model.dtype
        isolator = ModeIsolator(config.isolator_tokens, self._host.width, config.seed, weight.device, dtype)
        if config.isolator_from is not None:
            isolator.load(Path(config.isolator_from))
        return isolator

    def _advise(self) -> None:
        if self.config.prunes_nothing or not self._host.decoder_trains:
            return
        if self.config.slow_ratio == 0:
            warnings.warn(
                "slow_ratio=0 trains the language model on pruned images only: on full images the result will suffer "
                "from the mismatch. Set slow_ratio=0.1, or freeze the language model.",
                TrimtabWarning,
                stacklevel=4,
            )
        if self.isolator is not None and self.config.isolator_from is None:
            logger.warning("DualSpeed starts from a fresh isolator; isolator_from takes over that of an earlier stage.")

    def _install(self) -> None:
        model = self._model
        hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
            self._host.body.register_forward_hook(self._catch),
        ]
        self._removers = [hook.remove for hook in hooks]
        _attached.add(model)
        if self.isolator is None:
            return
        model.add_module(ISOLATOR, self.isolator)
        self._removers.append(lambda: model._modules.pop(ISOLATOR, None))
        if hasattr(model, "_keys_to_ignore_on_save"):
            # save_pretrained then writes the keys of the stock model only.
            own = vars(model).get("_keys_to_ignore_on_save", _Absent)
            model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), f"{ISOLATOR}.rows"}
            self._removers.append(lambda: _restore(model, "_keys_to_ignore_on_save", own))


def _forward_autocast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast that accelerate puts around the forward of a model that it prepares; hooks run outside."""
    if "_original_forward" not in vars(model):
        return contextlib.nullcontext()
    from accelerate.utils import get_mixed_precision_context_manager

    context: contextlib.AbstractContextManager[Any] = get_mixed_precision_context_manager(native_amp=True)
    return context


def _at_least_one(items: Tensor | int) -> Tensor | int:
    """Where nothing at all is supervised the sum is 0, and so shall the loss be."""
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


def _changed_settings(stored: DualSpeedConfig, now: DualSpeedConfig) -> list[str]:
    """Say which settings differ, but for those that only tell where a run began or how long it is."""
    before, after = stored.to_dict(), now.to_dict()
    names = [name for name in after if name not in ("isolator_from", "total_steps") and before[name] != after[name]]
    return [f"{name}={before[name]!r}, now {after[name]!r}" for name in names]


class _Absent:
    """Stands for an attribute that an instance does not have itself."""


def _restore(model: Any, name: str, value: Any) -> None:
    if value is _Absent:
        vars(model).pop(name, None)
    else:
        setattr(model, name, value)
