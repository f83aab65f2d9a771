"""What a cache is of: the tower, the layer, the number format, and the pruning where that matters."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from trimtab.anatomy import Host
from trimtab.anatomy.tower_cache import ATTENTION, tower_of
from trimtab.dualspeed.cache_choice import PRUNE_SETTINGS, require_storable
from trimtab.dualspeed.cache_store import CacheStore, require_same
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import SettingError
from trimtab.pruners import Pruner

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset")
"""Entries of a configuration that change nothing about what a tower computes."""


def require_frozen(host: Host) -> None:
    """Refuse a tower of which anything trains.

    Raises:
        SettingError: A parameter of it requires gradients.
    """
    for name, parameter in tower_of(host).named_parameters():
        if parameter.requires_grad:
            raise SettingError(
                f"The vision tower trains ({name} requires gradients), so what is stored of it would be out of date "
                "after one step. Freeze it (freeze: [vision_tower] in a run file), or leave cache_from out."
            )


def cache_facts(
    host: Host, config: DualSpeedConfig, pruner: Pruner, kind: str, dtype: str, precision: str | None, weights: str = ""
) -> dict[str, Any]:
    """Return what a cache must be of to be of use here, as JSON values.

    Args:
        host: The model, opened.
        config: The settings.
        pruner: Their pruner.
        kind: What is stored.
        dtype: Number format of stored states.
        precision: Number format of the autocast under which the tower runs, or None.
        weights: Digest of the tower's weights; they are read where it is empty.
    """
    facts: dict[str, Any] = {
        "kind": kind,
        "dtype": dtype,
        "precision": precision,
        "tower": _tower_facts(host, weights),
        "observed": sorted(pruner.needs & ATTENTION) if kind == "features" else [],
    }
    if kind != "features":
        facts["pruning"] = {name: config.to_dict()[name] for name in PRUNE_SETTINGS}
        facts["pruning"]["class"] = f"{type(pruner).__module__}.{type(pruner).__qualname__}"
    result: dict[str, Any] = json.loads(json.dumps(facts))
    return result


def require_fit(store: CacheStore, host: Host, config: DualSpeedConfig, pruner: Pruner) -> None:
    """Refuse a cache that was made for something else.

    Raises:
        SettingError: It was.
    """
    stored = store.facts
    require_storable(stored["kind"], host, config, pruner)
    wanted = cache_facts(host, config, pruner, stored["kind"], stored["dtype"], stored["precision"])
    lacking = set(wanted["observed"]) - set(stored["observed"])
    if lacking:
        raise SettingError(
            f"The cache in {store.folder} lacks {', '.join(sorted(lacking))}, which the pruner {config.pruner!r} "
            "needs: it was made for another pruner. Make it anew with the settings of this run."
        )
    require_same(store.folder, stored, {**wanted, "observed": stored["observed"]}, writes=False)


def require_unmoved(store: CacheStore, host: Host) -> None:
    """Refuse a tower that is no longer the one a cache was opened for.

    Raises:
        SettingError: Its weights or its configuration differ from the cache's.
    """
    tower = json.loads(json.dumps(_tower_facts(host, "")))
    require_same(store.folder, store.facts, {**store.facts, "tower": tower}, writes=store.writes)


def tower_version(host: Host) -> int:
    """Return a number that grows when a weight of the tower is written to, as by `load_state_dict`."""
    return sum(0 if one.is_inference() else one._version for one in tower_of(host).parameters())


def _tower_facts(host: Host, weights: str) -> dict[str, Any]:
    tower, config = tower_of(host), host.model.config
    told = {name: value for name, value in config.vision_config.to_dict().items() if name not in VOLATILE}
    return {
        "class": type(tower).__name__,
        "config": hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=8).hexdigest(),
        "weights": weights or _weights_digest(tower),
        "layer": config.vision_feature_layer,
        "select": config.vision_feature_select_strategy,
    }


def _weights_digest(tower: Any) -> str:
    """Hash all weights of a tower; reads them back from the device once."""
    state = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(tower.named_parameters()):
        if parameter.is_meta or (hasattr(parameter, "ds_id") and not parameter.numel()):
            raise SettingError(
                "The vision tower's weights are not here to be compared with the cache's (ZeRO-3 keeps them in "
                "pieces). Load the model before the DeepSpeed configuration is made, or leave cache_from out."
            )
        state.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        state.update(memoryview(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return state.hexdigest()
