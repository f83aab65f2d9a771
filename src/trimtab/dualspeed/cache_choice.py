"""Whether a pruner's choice may be stored: only where it follows from the frozen tower and the settings alone."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Host
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import SettingError, setting_error
from trimtab.pruners import Pruner

KINDS = ("features", "kept", "indices")
PRUNE_SETTINGS = ("pruner", "pruner_options", "keep_ratio", "keep_rule", "isolator_tokens")
"""Settings that steer which tokens stay."""

_MOVES = "it measures likeness on the projected features, which move as the projector learns"
_MERGES = "it merges tokens, so that its tokens are not rows of the features"


def choice_trouble(name: str, pruner: Pruner) -> str:
    """Say why a pruner's choice cannot be stored; empty where it can.

    Args:
        name: Name of the pruner.
        pruner: The pruner. One from another package says so itself, with an attribute
            ``chooses_by_tower = True``: its indices are a function of ``hidden``, ``cls_attention``, ``keys``,
            ``valid`` and ``grid`` only, and it merges nothing.
    """
    if getattr(pruner, "chooses_by_tower", False):
        return ""
    option: Any = lambda setting: getattr(pruner, setting)  # noqa: E731
    if name == "cls_topk":
        return ""
    if name == "divprune":
        return "" if option("pre_projector") else f"{_MOVES}; with pruner_options={{'pre_projector': True}} it can"
    if name == "vispruner":
        return "" if option("saliency_share") == 1 else f"{_MOVES}; with saliency_share=1 it can"
    if name == "visionzip":
        return "" if option("contextual_share") == 0 else f"{_MERGES}; with contextual_share=0 it can"
    if name == "grid_pool":
        return f"{_MERGES}; with merge=False it can" if option("merge") else ""
    if name in ("scope", "dpp"):
        return _MOVES
    if name == "random":
        return "it draws anew in every step"
    if name == "keep_all":
        return "it keeps everything, so there is no choice to store"
    return "nothing says that it follows from the tower alone (a class attribute chooses_by_tower = True would)"


def require_storable(kind: str, host: Host, config: DualSpeedConfig, pruner: Pruner) -> None:
    """Refuse a kind of cache that these settings cannot have.

    Raises:
        SettingError: The choice depends on more than the frozen tower, or tokens are mixed after the tower.
    """
    if kind not in KINDS:
        raise setting_error("trimtab cache", "kind", f"one of {', '.join(KINDS)}", kind)
    if kind == "features":
        return
    able = "'divprune' with pre_projector, 'cls_topk', or a cache of kind 'features', which serves every pruner"
    if trouble := choice_trouble(config.pruner, pruner):
        raise SettingError(
            f"The choice of the pruner {config.pruner!r} cannot be stored (kind {kind!r}): {trouble}. Take {able}."
        )
    if config.keep_spread != "fixed":
        raise SettingError(
            f"With keep_spread={config.keep_spread!r} the number of kept tokens changes from step to step and cannot "
            f"be stored (kind {kind!r}). Take keep_spread='fixed', or a cache of kind 'features'."
        )
    if kind == "kept" and host.model.config.model_type == "llava_onevision":
        raise SettingError(
            "The kept tokens of LLaVA-OneVision cannot be stored (kind 'kept'): the model shrinks large images by "
            "mixing neighbours after the tower. Take kind 'features' or 'indices'."
        )
