"""A plug-in for ms-swift: a file of three lines, and two options of its command.

::

    # dualspeed_plugin.py
    from trimtab.integrations.ms_swift import register
    register({"keep_ratio": 0.1, "slow_ratio": 0.1})

    swift sft --external_plugins dualspeed_plugin.py --callbacks dualspeed ...

Written against ms-swift 4.6.0: ``swift.callbacks.callbacks_map`` maps a name to what makes a callback from the training
arguments and the Trainer, before the Trainer's own initialisation.

ms-swift turns ids and images of multimodal models into embeddings in a hook of its own before the forward. DualSpeed
does that work itself, so the callback takes the hook away when training begins; models that are not transformers' own
have no public way in and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.dualspeed import DualSpeedConfig
from trimtab.dualspeed.callback import DualSpeedCallback
from trimtab.dualspeed.config import read_config
from trimtab.errors import MissingExtraError, SettingError, setting_error

NAME = "dualspeed"

CLASHES = {
    "enable_dft_loss": "computes its own loss from the logits",
    "enable_channel_loss": "computes its own loss from the logits",
    "loss_type": "computes its own loss from the logits",
    "padding_free": "puts several rows into one sequence",
    "packing": "packs several rows into one sequence",
}
"""Arguments of ms-swift that cannot stand beside DualSpeed, and what each does."""


def register(config: DualSpeedConfig | Mapping[str, Any] | None = None, name: str = NAME) -> None:
    """Enter DualSpeed among the callbacks of ms-swift, for ``--callbacks``.

    Args:
        config: The settings, also as a mapping of the fields; the defaults where None.
        name: The name to give to ``--callbacks``.

    Raises:
        MissingExtraError: ms-swift is not installed.
        SettingError: A field is wrong, or the name is taken by another callback.
    """
    settings = read_config(config, "register", "config") or DualSpeedConfig()
    try:
        from swift.callbacks import callbacks_map
    except ImportError as error:
        raise MissingExtraError(
            f"trimtab.integrations.ms_swift needs ms-swift 4 or newer ({error}). Install it in the environment that "
            "trains: pip install -U ms-swift"
        ) from error
    taken = callbacks_map.get(name)
    if taken is not None and not isinstance(taken, _Maker):
        raise setting_error(
            "register", "name", f"one that no callback of ms-swift has ({', '.join(callbacks_map)})", name
        )
    callbacks_map[name] = _Maker(settings)


class _Maker:
    """Makes the callback of one Trainer, as `callbacks_map` asks for it."""

    def __init__(self, config: DualSpeedConfig) -> None:
        self.config = config

    def __call__(self, args: Any, trainer: Any) -> DualSpeedCallback:
        return SwiftDualSpeedCallback(self.config, trainer)


class SwiftDualSpeedCallback(DualSpeedCallback):
    """DualSpeed in a Trainer of ms-swift.

    Args:
        config: The settings.
        trainer: The Trainer, not yet initialised.
    """

    def __init__(self, config: DualSpeedConfig, trainer: Any) -> None:
        super().__init__(config)
        self._trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse what clashes, then attach.

        Raises:
            SettingError: An argument of ms-swift that cannot stand beside DualSpeed.
            UnsupportedModelError: The model lacks what it takes.
        """
        template = self._trainer.template
        for name, what in CLASHES.items():
            value = getattr(args, name, None) or getattr(template, name, None)
            if value:
                raise SettingError(f"{name}={value!r} has no place beside DualSpeed: it {what}. Leave the option out.")
        if getattr(template, "sequence_parallel_size", 1) > 1:
            raise SettingError(
                f"sequence_parallel_size={template.sequence_parallel_size} splits rows over processes, which DualSpeed "
                "does not support. Set it to 1."
            )
        # The loss is computed at the labels only anyway; this option would cut labels and ids to different lengths.
        args.use_logits_to_keep = False
        super().on_init_end(args, state, control, model=model, **kwargs)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Take ms-swift's own hook off the model, then go on."""
        self._trainer.template.remove_post_encode_hook()
        super().on_train_begin(args, state, control, model=model, train_dataloader=train_dataloader, **kwargs)
