"""A plug-in for axolotl: two entries in its YAML file.

::

    plugins: [trimtab.integrations.axolotl.DualSpeedPlugin]
    dualspeed: {keep_ratio: 0.1, slow_ratio: 0.1}

Written against the plug-in interface of axolotl 0.19.0 (10 September 2026): `BasePlugin.get_input_args` names a
pydantic class whose fields join axolotl's own, and `BasePlugin.get_trainer_cls` may return the class of the Trainer.
That release pins transformers 5.16.1; trimtab needs 5.18, so install a newer transformers over it.

The classes are made when they are asked for, so that nothing here needs axolotl to be installed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from trimtab.dualspeed import DualSpeedConfig, with_dualspeed
from trimtab.errors import MissingExtraError, SettingError

PLUGIN, ARGUMENTS = "DualSpeedPlugin", "DualSpeedArgs"

CLASHES = {
    "sample_packing": "packs several rows into one sequence",
    "rl": "trains by preference, with a loss of its own",
    "orpo_alpha": "adds a loss of its own",
    "kd_trainer": "distils from another model with a Trainer of its own",
    "reward_model": "trains a reward model",
    "process_reward_model": "trains a reward model",
}
"""Settings of axolotl that cannot stand beside ``dualspeed``, and what each does."""


def __getattr__(name: str) -> Any:
    """Make a class when it is asked for (PEP 562)."""
    makers = {PLUGIN: _plugin_class, ARGUMENTS: _arguments_class}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return makers[name]()


@cache
def _arguments_class() -> type:
    from pydantic import BaseModel

    return type(
        ARGUMENTS,
        (BaseModel,),
        {"__doc__": "What trimtab adds to axolotl's settings.", "__module__": __name__, "dualspeed": None}
        | {"__annotations__": {"dualspeed": dict[str, Any] | None}},
    )


@cache
def _plugin_class() -> type:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError as error:
        raise MissingExtraError(
            f"{PLUGIN} needs axolotl ({error}). Install it in the environment that trains: pip install axolotl"
        ) from error

    methods = {"get_input_args": _get_input_args, "get_trainer_cls": _get_trainer_cls}
    return type(PLUGIN, (BasePlugin,), {"__doc__": "DualSpeed in axolotl.", "__module__": __name__, **methods})


def _get_input_args(self: Any) -> str:
    """Name the class of our settings."""
    return f"{__name__}.{ARGUMENTS}"


def _get_trainer_cls(self: Any, cfg: Any) -> type | None:
    """Return axolotl's own Trainer with DualSpeed, or None where the file has no ``dualspeed`` block.

    Raises:
        SettingError: An unknown or wrong field in the block, or a setting of axolotl that clashes with it.
    """
    if cfg.get("dualspeed") is None:
        return None
    settings = DualSpeedConfig.from_dict(dict(cfg["dualspeed"]))
    for name, what in CLASHES.items():
        if cfg.get(name):
            raise SettingError(
                f"{name}={cfg[name]!r} has no place beside `dualspeed`: it {what}. Take one of the two out of the file."
            )
    from axolotl.core.trainers import AxolotlTrainer

    base = with_dualspeed(AxolotlTrainer)

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, dualspeed=settings, **kwargs)  # type: ignore[misc]  # the class above this one

    return type(base.__name__, (base,), {"__init__": start, "__module__": __name__})
