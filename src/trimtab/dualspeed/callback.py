"""DualSpeed as a callback, for Trainers whose class cannot be changed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from transformers import TrainerCallback

from trimtab.data import MaskPlaceholders
from trimtab.dualspeed.attach import DualSpeedHandle
from trimtab.dualspeed.checks import require_in_optimizer
from trimtab.dualspeed.config import DualSpeedConfig, require_config
from trimtab.dualspeed.samples import NoteRows
from trimtab.dualspeed.trainer import (
    SIDE_FOLDER,
    load_converted,
    rank_facts,
    refuse_arguments,
    require_attached,
    spread_over_updates,
)
from trimtab.dualspeed.trainer_data import numbers_samples
from trimtab.errors import OutputError, SettingError, TrimtabWarning, WrongOrderError, setting_error
from trimtab.files import read_json
from trimtab.shapes import Tensor

STATE_FILE = "trainer_state.json"
_FINGERPRINT = ("global_step", "epoch", "total_flos", "log_history")


class DualSpeedCallback(TrainerCallback):
    """Train with DualSpeed inside a Trainer that cannot be subclassed.

    Give it in ``callbacks=[...]`` when the Trainer is built: it attaches at the end of the Trainer's ``__init__``,
    after PEFT and before the optimizer. The run is that of `with_dualspeed`, as long as the Trainer takes
    ``outputs.loss``; TRL's do not and are refused. What a callback cannot reach stays the Trainer's own:

    - The collator of the evaluation. Labels on image placeholders are masked in the training batches only.
    - Trackers (``report_to``) log before other callbacks and so miss the metrics, which are in
      ``state.log_history``, in the progress bar and in callbacks after this one. To put it first:
      ``trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(DualSpeedCallback))``.
    - Where a model does not take the label count of the whole update, each micro-batch weighs the same.

    Attributes:
        handle: The handle that `attach` would return, once the Trainer is built; None before.
    """

    def __init__(self, config: DualSpeedConfig | Mapping[str, Any], *, resume_from: str | None = None) -> None:
        """Keep the settings.

        Args:
            config: The settings, also as a mapping of the fields.
            resume_from: The checkpoint that ``trainer.train(resume_from_checkpoint=...)`` gets, if it lies neither in
                ``output_dir`` nor in ``args.resume_from_checkpoint``: a Trainer does not tell its callbacks.

        Raises:
            SettingError: A field is wrong.
        """
        settings = require_config(config, "DualSpeedCallback", "config")
        self.handle: DualSpeedHandle | None = None
        self._config = settings
        self._resume_from = resume_from
        self._model: Any = None
        self._state: Any = None
        self._watch: _LossWatch | None = None

    # the events, in their order ---------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach to the model.

        Raises:
            SettingError: Arguments under which DualSpeed would not do what they say, or a Trainer of TRL.
            UnsupportedModelError: The model lacks what it takes.
            WrongOrderError: The callback serves another Trainer already.
        """
        if self.handle is not None:
            raise WrongOrderError("This DualSpeedCallback serves another Trainer already. Make a new one for each.")
        refuse_arguments(args)
        _refuse_trl(args)
        if numbers_samples(self._config):
            raise SettingError(
                "pack_tokens, bucket_pool and schedule_unit='sample' need DualSpeed's own batches, which a callback "
                "cannot make. Use with_dualspeed(<class of the Trainer>) instead of DualSpeedCallback."
            )
        self.handle = DualSpeedHandle(model, self._config, args.gradient_accumulation_steps)
        self.handle.optimizer_step = lambda: int(self._state.global_step)
        self._model, self._state = model, state

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Restore a resumed run, and prepare the first step.

        Raises:
            SettingError: The Trainer has made itself a new model, its optimizer lacks the isolator, or `resume_from`
                is another checkpoint.
            WrongOrderError: The callback came after the Trainer was built, or DualSpeed was detached.
            OutputError: The checkpoint of a resumed run is not found.
        """
        handle = self._attached()
        require_attached(handle)
        if not any(part is self._model for part in model.modules()):
            raise SettingError(
                "The Trainer made a new model (model_init) after DualSpeed was attached. Give it the model itself."
            )
        require_in_optimizer(handle.isolator, self._model, kwargs.get("optimizer"))
        self._state = state
        rows = getattr(train_dataloader, "dataset", None)
        handle.rank_facts = lambda: rank_facts(args, state, rows, train_dataloader)
        spread_over_updates(handle, state.max_steps)
        if state.global_step > 0:
            folder = self._find_checkpoint(args, state)
            load_converted(self._model, folder)
            handle.load_pretrained(folder / SIDE_FOLDER)
        if not self._config.prunes_nothing:
            _mask_labels_of(train_dataloader, handle)
            self._watch = _LossWatch(self._model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first update, make sure that it comes from DualSpeed's loss.

        Raises:
            SettingError: The Trainer has computed a loss of its own.
        """
        if self._watch is not None:
            self._watch.close()
            if self._watch.ignored:
                raise SettingError(
                    "This Trainer computes a loss of its own from the outputs of the model and ignores outputs.loss, "
                    "so DualSpeed's loss would be lost. Use with_dualspeed(<class of the Trainer>) instead of the "
                    "callback, or let compute_loss return outputs.loss."
                )
            self._watch = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the means since the last log to the Trainer's own entry of a training step."""
        if self.handle is None or logs is None or "loss" not in logs:
            return
        means = self.handle.window_metrics()
        logs.update(means)
        if state.log_history:
            state.log_history[-1].update(means)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the side files into the checkpoint that was just saved.

        Warns:
            TrimtabWarning: There is no checkpoint where a Trainer writes it.
        """
        folder = _checkpoint_of(args, state)
        found = folder.is_dir()
        self._attached().save_pretrained(folder / SIDE_FOLDER, write=args.should_save and found)
        if args.should_save and not found:
            warnings.warn(
                f"The Trainer saved, but not to {folder}, so the isolator and the state of DualSpeed are not in that "
                "checkpoint and it cannot be resumed from. Write them there yourself: "
                "callback.handle.save_pretrained(checkpoint + '/dualspeed').",
                TrimtabWarning,
                stacklevel=2,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the Trainer to the best checkpoint if asked for, and write the side files to ``output_dir``."""
        handle = self._attached()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint)
            load_converted(self._model, best)
            if handle.isolator is not None:
                handle.isolator.load(best / SIDE_FOLDER)
        handle.save_pretrained(Path(args.output_dir) / SIDE_FOLDER, write=args.should_save)

    # parts --------------------------------------------------------------------------------------------------------

    def _attached(self) -> DualSpeedHandle:
        if self.handle is None:
            raise WrongOrderError(
                "DualSpeedCallback came after the Trainer was built, when the optimizer may exist already. "
                "Give it in callbacks=[...] of the Trainer."
            )
        return self.handle

    def _find_checkpoint(self, args: Any, state: Any) -> Path:
        """Return the checkpoint that a Trainer in this state has resumed from; events do not tell."""
        if self._resume_from is not None:
            folder = Path(self._resume_from)
            if not _holds(folder, state):
                raise setting_error(
                    "DualSpeedCallback", "resume_from", f"the checkpoint of step {state.global_step} that the Trainer "
                    "resumes from", self._resume_from,
                )  # fmt: skip
            return folder
        named = getattr(args, "resume_from_checkpoint", None)
        places = [*([Path(named)] if isinstance(named, str) else []), _checkpoint_of(args, state)]
        for folder in places:
            if _holds(folder, state):
                return folder
        raise OutputError(
            f"The Trainer resumes at step {state.global_step} from a checkpoint that is not in "
            f"{' or '.join(str(place) for place in places)}, so the isolator cannot be restored. Name it: "
            "DualSpeedCallback(config, resume_from=...)."
        )


class _LossWatch:
    """Watches whether the losses that a model returns are the ones that are differentiated."""

    def __init__(self, model: Any) -> None:
        self._returned = self._used = 0
        self._remover = model.register_forward_hook(self._look)

    @property
    def ignored(self) -> bool:
        """Whether losses came out and no gradient went back in."""
        return self._returned > 0 and self._used == 0

    def close(self) -> None:
        """Stop watching."""
        self._remover.remove()

    def _look(self, module: Any, args: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if module.training and isinstance(loss, Tensor) and loss.requires_grad:
            self._returned += 1
            loss.register_hook(self._count)

    def _count(self, gradient: Tensor) -> None:
        self._used += 1


def _refuse_trl(args: Any) -> None:
    if any(kind.__module__.partition(".")[0] == "trl" for kind in type(args).__mro__):
        trainer = type(args).__name__.replace("Config", "Trainer")
        raise SettingError(
            f"{type(args).__name__} belongs to a Trainer of TRL, which computes its own loss and ignores outputs.loss. "
            f"Use with_dualspeed({trainer})(..., dualspeed=config) instead of DualSpeedCallback."
        )


def _mask_labels_of(dataloader: Any, handle: DualSpeedHandle) -> None:
    """Mask labels on placeholders before the Trainer counts them, where the collator can be reached."""
    inner = getattr(dataloader, "base_dataloader", dataloader)
    collate = getattr(inner, "collate_fn", None)
    if collate is None or isinstance(collate, NoteRows | MaskPlaceholders):
        return
    masking = MaskPlaceholders(collate, handle.image_token_ids)
    # accelerate joins or cuts the batches of a dispatcher after they were made, and their notes would not fit.
    whole = not isinstance(dataloader, DataLoaderDispatcher) and not getattr(dataloader, "split_batches", False)
    inner.collate_fn = handle.collator(masking) if whole else masking


def _checkpoint_of(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _holds(folder: Path, state: Any) -> bool:
    """Whether a folder is the checkpoint that a state was read from, by step, logs and operations."""
    if not (folder / STATE_FILE).is_file():
        return False
    stored = read_json(folder / STATE_FILE)
    # As text, since a NaN in a log does not equal itself.
    return all(json.dumps(stored.get(name)) == json.dumps(getattr(state, name)) for name in _FINGERPRINT)
