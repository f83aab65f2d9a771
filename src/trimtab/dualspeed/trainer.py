"""DualSpeed inside any Trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data import MaskPlaceholders
from trimtab.dualspeed.attach import DualSpeedHandle
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import SettingError, setting_error

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

    Args:
        trainer_class: ``transformers.Trainer`` or a class derived from it, such as ``trl.SFTTrainer``.

    Returns:
        A class derived from it.

    Raises:
        SettingError: Something else came.
    """
    from transformers import Trainer

    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise setting_error(
            "with_dualspeed", "trainer_class", "transformers.Trainer or a class derived from it", trainer_class
        )
    return type(f"DualSpeed{trainer_class.__name__}", (_DualSpeedMixin, trainer_class), {})


class _DualSpeedMixin:
    """What `with_dualspeed` puts before the Trainer class."""

    dualspeed: DualSpeedHandle | None = None

    def __init__(self, *args: Any, dualspeed: DualSpeedConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        config = _read_config(dualspeed)
        super().__init__(*args, **kwargs)
        if config is None:
            return
        me: Any = self
        _refuse_arguments(me.args)
        if not config.prunes_nothing and me.compute_loss_func is not None:
            raise SettingError("compute_loss_func has no place beside DualSpeed's own loss. Give one of the two.")
        handle = DualSpeedHandle(me.model, config, me.args.gradient_accumulation_steps)
        handle.optimizer_step = lambda: me.state.global_step
        handle.autocast = me.accelerator.autocast
        me.dualspeed = handle
        if not config.prunes_nothing:
            me.data_collator = MaskPlaceholders(me.data_collator, handle.image_token_ids)
            # Our loss takes the count of labels for every model, also for those whose own loss does not.
            me.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Take the loss that the hooks put into the output, whatever the Trainer class would compute from it."""
        me: Any = self
        handle = self.dualspeed
        if handle is None or handle.config.prunes_nothing or not model.training:
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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Tell an annealed schedule how long the run is, then go on as the Trainer does."""
        if self.dualspeed is not None:
            per_step = 1 if self.dualspeed.config.schedule_unit == "optimizer" else self.dualspeed.accumulation_steps
            self.dualspeed.spread_over(num_training_steps * per_step)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log to the Trainer's own entry of a training step."""
        if self.dualspeed is not None and "loss" in logs:
            logs = {**logs, **self.dualspeed.window_metrics()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save an ordinary checkpoint, and the side files in ``dualspeed/`` beside it."""
        me: Any = self
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self.dualspeed is not None and me.args.should_save:
            self.dualspeed.save_pretrained(Path(output_dir or me.args.output_dir) / SIDE_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        me: Any = self
        if not _load_converted(me.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.dualspeed is not None:
            self.dualspeed.load_pretrained(Path(resume_from_checkpoint) / SIDE_FOLDER)

    def _load_best_model(self) -> None:
        me: Any = self
        best = Path(me.state.best_model_checkpoint)
        if not _load_converted(me.model, best):
            super()._load_best_model()  # type: ignore[misc]
        if self.dualspeed is not None and self.dualspeed.isolator is not None:
            self.dualspeed.isolator.load(best / SIDE_FOLDER)


def _read_config(dualspeed: DualSpeedConfig | Mapping[str, Any] | None) -> DualSpeedConfig | None:
    if dualspeed is None or isinstance(dualspeed, DualSpeedConfig):
        return dualspeed
    if isinstance(dualspeed, Mapping):
        return DualSpeedConfig.from_dict(dualspeed)
    raise setting_error("with_dualspeed", "dualspeed", "a DualSpeedConfig, a mapping of its fields, or None", dualspeed)


def _refuse_arguments(args: Any) -> None:
    for name in ("label_smoothing_factor",):
        if getattr(args, name, 0):
            raise SettingError(f"{name}={getattr(args, name)!r} has no meaning in DualSpeed's own loss. Set it to 0.")
    if args.n_gpu > 1:
        raise SettingError(
            f"One process sees {args.n_gpu} GPUs and would copy the model to each (DataParallel), which DualSpeed does "
            "not support. Start one process per GPU (accelerate launch ...), or set CUDA_VISIBLE_DEVICES to one."
        )
    for name in ("packing", "padding_free", "torch_compile"):
        if getattr(args, name, False):
            raise SettingError(f"{name}=True is not supported with DualSpeed yet. Set it to False.")


def _load_converted(model: Any, folder: Path) -> bool:
    """Load the weights of a checkpoint under the names that the live model has, if it is a whole model on this rank.

    Some models (LLaVA among them) are saved under older names; transformers up to 5.23 converts these in
    ``from_pretrained`` but not where a Trainer resumes, which then goes on from the initial weights.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not any(folder.glob("model*.safetensors*")):
        return False
    stored = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(stored.state_dict(), strict=False)
    return True
