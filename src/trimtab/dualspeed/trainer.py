"""DualSpeed inside any Trainer of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from trimtab.data import MaskPlaceholders
from trimtab.dualspeed.attach import DualSpeedHandle
from trimtab.dualspeed.checks import require_in_optimizer
from trimtab.dualspeed.config import DualSpeedConfig, read_config
from trimtab.dualspeed.packs import SampleLength
from trimtab.dualspeed.ranks import is_sharded
from trimtab.dualspeed.samples import ENTRIES
from trimtab.dualspeed.trainer_data import (
    chosen_by,
    loading_facts,
    notes_of_training,
    numbers_samples,
    refuse_loading,
    training_loader,
)
from trimtab.errors import SettingError, TrimtabWarning, WrongOrderError, setting_error

if TYPE_CHECKING:
    from trimtab.shapes import Tensor

SIDE_FOLDER = "dualspeed"


@cache
def with_dualspeed(trainer_class: type[Any]) -> type[Any]:
    """Make a Trainer class train with DualSpeed.

    The class takes one more argument, ``dualspeed`` (a `DualSpeedConfig`, a mapping of its fields, or None for plain
    training), and has the handle as ``trainer.dualspeed``. Logs gain the means of losses and token counts since the
    last log; checkpoints gain the folder ``dualspeed/``; what ``save_model`` writes is otherwise an ordinary
    checkpoint. Labels are counted without image placeholders.

    With `pack_tokens` or `bucket_pool` rows come together by length. Every row of the training data is measured before
    the first step, and the lengths are kept in ``output_dir``; a second argument, ``dualspeed_lengths`` (one
    `SampleLength` for each row), skips that. The Trainer's ``seed`` then has no say in the order of the rows, that of
    DualSpeed has.

    Training steps take DualSpeed's loss and call no ``compute_loss`` of the Trainer class; evaluation does. After
    ``trainer.dualspeed.detach()`` the Trainer saves and evaluates as without DualSpeed, and trains no more.

    Args:
        trainer_class: ``transformers.Trainer`` or a class derived from it, such as ``trl.SFTTrainer``.

    Returns:
        A class derived from it; the class itself where it is one already.

    Raises:
        SettingError: Something else came.
    """
    from transformers import Trainer

    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise setting_error(
            "with_dualspeed", "trainer_class", "transformers.Trainer or a class derived from it", trainer_class
        )
    if issubclass(trainer_class, _DualSpeedMixin):
        return trainer_class
    return type(f"DualSpeed{trainer_class.__name__}", (_DualSpeedMixin, trainer_class), {})


class _DualSpeedMixin:
    """What `with_dualspeed` puts before the Trainer class."""

    dualspeed: DualSpeedHandle | None = None

    def __init__(
        self,
        *args: Any,
        dualspeed: DualSpeedConfig | Mapping[str, Any] | None = None,
        dualspeed_lengths: Sequence[SampleLength] | None = None,
        **kwargs: Any,
    ) -> None:
        config = read_config(dualspeed, "with_dualspeed", "dualspeed")
        if dualspeed_lengths is not None and (config is None or chosen_by(config) is None):
            raise SettingError(
                "dualspeed_lengths has no use without pack_tokens or bucket_pool. Set one of them, or leave it out."
            )
        super().__init__(*args, **kwargs)
        if config is None:
            return
        me: Any = self
        refuse_arguments(me.args)
        if numbers_samples(config):
            refuse_loading(me, config)
        if not config.prunes_nothing and me.compute_loss_func is not None:
            raise SettingError("compute_loss_func has no place beside DualSpeed's own loss. Give one of the two.")
        if me.model_init is not None:
            raise SettingError(
                "model_init makes the Trainer build a new model in train(), after DualSpeed was attached. Give the "
                "model itself."
            )
        if not config.prunes_nothing:
            _warn_of_own_loss(type(self))
        handle = DualSpeedHandle(me.model, config, me.args.gradient_accumulation_steps)
        handle.optimizer_step = lambda: me.state.global_step
        handle.autocast = me.accelerator.autocast
        handle.rank_facts = lambda: {
            **rank_facts(me.args, me.state, me.train_dataset, me.callback_handler.train_dataloader),
            **loading_facts(me._dualspeed_packs),
        }
        me.dualspeed = handle
        me._dualspeed_lengths, me._dualspeed_packs = dualspeed_lengths, None
        if not config.prunes_nothing:
            me.data_collator = MaskPlaceholders(me.data_collator, handle.image_token_ids)
            # Our loss takes the count of labels for every model, also for those whose own loss does not.
            me.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's own loader, or with `pack_tokens` one of packs; batches say their samples where needed.

        Raises:
            SettingError: The training data have no rows by number, or a row is longer than `pack_tokens`.
        """
        me: Any = self
        with notes_of_training(me, self.dualspeed):
            return self._training_loader()

    def _training_loader(self) -> Any:
        me: Any = self
        if self.dualspeed is None or me.train_dataset is None or not numbers_samples(self.dualspeed.config):
            return super().get_train_dataloader()  # type: ignore[misc]
        loader, packs = training_loader(me, self.dualspeed.config, me._dualspeed_lengths)
        me._dualspeed_packs = packs
        me._dualspeed_lengths = me._dualspeed_lengths if packs is None else packs.lengths
        return loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Take the loss that the hooks put into the output, whatever the Trainer class would compute from it."""
        me: Any = self
        handle = self.dualspeed
        if handle is None or handle.config.prunes_nothing or not (handle.attached and model.training):
            loss: Tensor | tuple[Tensor, Any] = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            return loss
        if num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs)
        total: Tensor = outputs["loss"]
        if me.args.average_tokens_across_devices and num_items_in_batch is not None:
            total = total * (me.accelerator.num_processes if me.args.n_gpu <= 1 else me.args.n_gpu)
        return (total, outputs) if return_outputs else total

    def _prepare_inputs(self, inputs: dict[str, Any]) -> Any:
        """Take out what only a step of DualSpeed understands, in evaluation and once it is detached."""
        me: Any = self
        if self.dualspeed is not None and not (self.dualspeed.attached and me.model.training):
            inputs = {name: value for name, value in inputs.items() if name not in ENTRIES}
        return super()._prepare_inputs(inputs)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make sure that the isolator is trained, tell an annealed schedule how long the run is, then go on."""
        me: Any = self
        if self.dualspeed is not None:
            require_attached(self.dualspeed)
            require_in_optimizer(self.dualspeed.isolator, me.model, me.optimizer if optimizer is None else optimizer)
            spread_over_updates(self.dualspeed, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to the Trainer's own entry of a training step."""
        if self.dualspeed is not None and self.dualspeed.attached and "loss" in logs:
            logs = {**logs, **self.dualspeed.window_metrics()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save an ordinary checkpoint, and the side files in ``dualspeed/`` beside it."""
        me: Any = self
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self.dualspeed is not None and self.dualspeed.attached:
            folder = Path(output_dir or me.args.output_dir) / SIDE_FOLDER
            self.dualspeed.save_pretrained(folder, write=me.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        me: Any = self
        if not load_converted(me.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.dualspeed is not None:
            self.dualspeed.load_pretrained(Path(resume_from_checkpoint) / SIDE_FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        me: Any = self
        if checkpoint is not None and _is_sharded_elsewhere(me, Path(checkpoint)):
            _load_named_optimizer(me, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self.dualspeed is not None and me.is_deepspeed_enabled:
            # DeepSpeed loads its checkpoints without _load_from_checkpoint.
            self.dualspeed.load_pretrained(Path(checkpoint) / SIDE_FOLDER)

    def _load_best_model(self) -> None:
        me: Any = self
        best = Path(me.state.best_model_checkpoint)
        if not load_converted(me.model, best):
            super()._load_best_model()  # type: ignore[misc]
        if self.dualspeed is not None and self.dualspeed.isolator is not None:
            self.dualspeed.isolator.load(best / SIDE_FOLDER)


def rank_facts(args: Any, state: Any, rows: Any, loader: Any) -> dict[str, Any]:
    """What a Trainer must have in common with those of the other processes: the length of the data and the place in it.

    A process with fewer batches would stop while the others wait for it.
    """
    return {
        "rows of train_dataset": len(rows) if hasattr(rows, "__len__") else None,
        "batches per epoch": _count_of(loader),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_steps": state.max_steps,
        "global_step": state.global_step,
    }


def _count_of(loader: Any) -> int | None:
    """How many batches a loader has, or None where its data do not tell."""
    try:
        return len(loader)
    except TypeError:
        return None


def spread_over_updates(handle: DualSpeedHandle, updates: int) -> None:
    """Tell an annealed schedule how many optimizer steps the run has."""
    per_update = 1 if handle.config.schedule_unit == "optimizer" else handle.accumulation_steps
    handle.spread_over(updates * per_update)


def refuse_arguments(args: Any) -> None:
    """Refuse the TrainingArguments under which DualSpeed would not do what they say.

    Raises:
        SettingError: Names the argument and what to set.
    """
    if args.label_smoothing_factor:
        raise SettingError(
            f"label_smoothing_factor={args.label_smoothing_factor!r} has no meaning in DualSpeed's own loss. Set it to "
            "0."
        )
    if getattr(args, "loss_type", None) not in (None, "nll"):
        raise SettingError(
            f"loss_type={args.loss_type!r} has no place beside DualSpeed's own loss, the cross-entropy ('nll') and the "
            "KL term. Set it to 'nll', or train without DualSpeed."
        )
    if args.n_gpu > 1:
        raise SettingError(
            f"One process sees {args.n_gpu} GPUs and would copy the model to each (DataParallel), which DualSpeed does "
            "not support. Start one process per GPU (accelerate launch ...), or set CUDA_VISIBLE_DEVICES to one."
        )
    for name in ("packing", "padding_free"):
        if getattr(args, name, False):
            raise SettingError(
                f"{name}=True of the Trainer joins rows before DualSpeed could prune them. Set it to False; "
                "DualSpeedConfig(packing=True, pack_tokens=...), in a run file `dualspeed: packing: true`, packs the "
                "pruned rows."
            )


def load_converted(model: Any, folder: Path) -> bool:
    """Load the weights of a checkpoint that has other names for them than the live model, whole on this rank.

    Some models (LLaVA among them) are saved under older names; transformers up to 5.23 converts these in
    ``from_pretrained`` but not where a Trainer resumes, which then goes on from the initial weights.

    Returns:
        Whether it did; not where the names are those of the model, which a Trainer loads by itself.
    """
    from transformers import PreTrainedModel

    if (
        not isinstance(model, PreTrainedModel)
        or is_sharded(model)
        or _stored_names(folder) <= model.state_dict().keys()
    ):
        return False
    # One type for all tensors, wide enough that each comes to its own type in the model unrounded.
    dtypes = {one.dtype for one in model.state_dict().values() if one.is_floating_point()}
    stored = type(model).from_pretrained(folder, dtype=reduce(torch.promote_types, dtypes))
    model.load_state_dict(stored.state_dict(), strict=False)
    return True


def _stored_names(folder: Path) -> set[str]:
    """Return the names of the tensors in the weight files of a checkpoint."""
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def require_attached(handle: DualSpeedHandle) -> None:
    """Make sure that a Trainer which was built with DualSpeed still has it when it trains.

    Raises:
        WrongOrderError: The handle was detached.
    """
    if not handle.attached:
        raise WrongOrderError(
            "DualSpeed was detached from the model of this Trainer, so it can train no more. Make a new Trainer: with "
            "DualSpeed, or a plain one to train without."
        )


def _warn_of_own_loss(kind: type[Any]) -> None:
    """Warn of a user's Trainer class whose `compute_loss` the training steps do not call."""
    below = kind.__mro__[kind.__mro__.index(_DualSpeedMixin) + 1 :]
    owner = next(one for one in below if "compute_loss" in vars(one))
    if not owner.__module__.startswith(("transformers.", "trl.", "axolotl.")):
        warnings.warn(
            f"{owner.__name__}.compute_loss is not called in training steps, which take DualSpeed's loss; evaluation "
            "calls it. If it changes the loss, train without DualSpeed; if it only logs, override training_step.",
            TrimtabWarning,
            stacklevel=3,
        )


def _is_sharded_elsewhere(trainer: Any, folder: Path) -> bool:
    """Whether a checkpoint has the whole optimizer state as FSDP writes it, but this run does not use FSDP."""
    plain = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or (folder / "optimizer.pt").is_file()
    return not plain and (folder / "optimizer.bin").is_file()


def _load_named_optimizer(trainer: Any, folder: Path) -> None:
    """Load the optimizer state of an FSDP run, which goes by names of parameters, and the scheduler beside it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    # A parameter that never had a gradient (the end of a LLaVA tower) has no state in the checkpoint.
    options = StateDictOptions(strict=False)
    set_optimizer_state_dict(trainer.model, optimizer, state, options=options)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True))
