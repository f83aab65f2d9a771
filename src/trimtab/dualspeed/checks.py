"""What DualSpeed refuses: models it cannot be put on, and inputs it cannot train on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.isolator import ModeIsolator
from trimtab.errors import SettingError, TrimtabWarning, WrongOrderError

logger = logging.getLogger("trimtab")


def refuse_device_map(model: Any) -> None:
    """Refuse a model whose layers one process keeps in several places: the loss is computed in one.

    Raises:
        SettingError: It is such a model.
    """
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise SettingError(
            f"device_map has spread this {type(model).__name__} over {', '.join(sorted(places))}, which DualSpeed does "
            "not support. Load it without device_map; where it does not fit on one device, start one process per "
            "device and shard it (FSDP or ZeRO)."
        )


def refuse_inputs(inputs: Mapping[str, Any], isolator: ModeIsolator | None) -> None:
    """Refuse arguments of a forward in training mode that DualSpeed cannot train on.

    Raises:
        SettingError: Something is missing, was encoded before, or the isolator is frozen.
        WrongOrderError: `generate` was called in training mode.
    """
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
    if not inputs["input_ids"].numel():
        raise SettingError(
            f"The batch is empty: input_ids has the shape {tuple(inputs['input_ids'].shape)}. Leave such batches out, "
            "or look at the sampler and the collator."
        )
    if inputs.get("labels") is None:
        raise SettingError(
            "labels must be given in training: DualSpeed computes the loss at them. Give labels, or call "
            "model.eval() for a forward without loss."
        )
    if isolator is not None and not isolator.rows.requires_grad:
        raise SettingError(
            "The isolator is frozen (requires_grad is False), so the model cannot learn to tell the modes apart. "
            "Call attach after get_peft_model or after freezing."
        )


def advise(config: DualSpeedConfig, decoder_trains: bool, isolator: ModeIsolator | None) -> None:
    """Warn of settings that work, but probably not as the user thinks; called while a handle is made."""
    if config.prunes_nothing or not decoder_trains:
        return
    if config.slow_ratio == 0:
        warnings.warn(
            "slow_ratio=0 trains the language model on pruned images only: on full images the result will suffer from "
            "the mismatch. Set slow_ratio=0.1, or freeze the language model.",
            TrimtabWarning,
            stacklevel=4,
        )
    if config.schedule_unit == "sample" and not config.packing and 0 < config.slow_ratio < 1:
        logger.warning(
            "schedule_unit='sample' without packing pads the fast rows of a batch to the length of its slow ones, "
            "which costs what pruning saves. Set packing=True, or schedule_unit='optimizer'."
        )
    if isolator is not None and config.isolator_from is None:
        logger.warning("DualSpeed starts from a fresh isolator; isolator_from takes over that of an earlier stage.")


def changed_settings(stored: DualSpeedConfig, now: DualSpeedConfig) -> list[str]:
    """Say which settings differ, but for those that only tell where a run began or how long it is."""
    before, after = stored.to_dict(), now.to_dict()
    names = [
        name
        for name in after
        if name not in ("isolator_from", "total_steps", "cache_from") and before[name] != after[name]
    ]
    return [f"{name}={before[name]!r}, now {after[name]!r}" for name in names]


def require_in_optimizer(isolator: ModeIsolator | None, model: Any, optimizer: Any) -> None:
    """Make sure that an optimizer which trains the model trains the isolator too.

    Args:
        isolator: The isolator, or None.
        model: The model that it belongs to.
        optimizer: The optimizer; what does not hold the model's own parameters (ZeRO's flat ones) is not looked at.

    Raises:
        SettingError: It does not.
    """
    if isolator is None or not isolator.rows.requires_grad:
        return
    held = {id(one) for group in getattr(optimizer, "param_groups", ()) for one in group["params"]}
    if id(isolator.rows) not in held and any(id(one) in held for one in model.parameters()):
        raise SettingError(
            "The optimizer does not hold the isolator, which would stay untrained: it was built before DualSpeed was "
            "attached, or chooses parameters by name. Give the Trainer optimizer_cls_and_kwargs=(class, settings) in "
            "place of optimizers, or set trainer.optimizer to one built from trainer.model; an optimizer that chooses "
            "must take dualspeed_isolator.rows."
        )
