"""Encode the images of a run once and keep what the frozen tower made of them on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Subset

from trimtab.anatomy import encode_images, open_host
from trimtab.anatomy.blank import encode_blank
from trimtab.anatomy.tower_cache import cache_trouble
from trimtab.dualspeed.cache import DTYPES, TowerCache
from trimtab.dualspeed.cache_choice import require_storable
from trimtab.dualspeed.cache_facts import cache_facts
from trimtab.dualspeed.cache_keys import ENTRY, KeyImages
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.fast_view import choose_tokens
from trimtab.dualspeed.view import FastView
from trimtab.errors import OutputError, SettingError, setting_error
from trimtab.records import make_record
from trimtab.run.bench import _autocast
from trimtab.run.cache_size import CacheSize, Pictures, estimate, find_pictures
from trimtab.run.config import RunConfig, training_arguments
from trimtab.run.load import load_model, load_processor, load_rows_of, outline_model

UNKNOWN = "0" * 32
"""Stands for the digest of weights that are not loaded; as long as one."""


def cache(
    config: RunConfig,
    out: str | Path,
    *,
    kind: str = "features",
    dtype: str = "bfloat16",
    on_stale: Literal["error", "rebuild"] = "error",
    dry_run: bool = False,
    announce: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make a cache of a run's images, or complete one.

    What is stored already and sound is not made again, so a second call goes on where the first one was ended, and
    mends what is damaged.

    Args:
        config: The settings of the run; without a `dualspeed:` block its defaults count.
        out: The cache folder.
        kind: ``"features"`` for all states that the model takes of the tower, ``"kept"`` for those of the kept tokens
            (fast steps; slow ones still run the tower), ``"indices"`` for the choice alone.
        dtype: Number format of stored states; ``"float32"`` loses nothing.
        on_stale: What to do with a cache of something else in `out`: ``"error"`` or ``"rebuild"``.
        dry_run: Only say how large it would be.
        announce: Called before anything is made, with the numbers of `trimtab.run.cache_size.CacheSize`, ``present``
            (bytes of the cache that are there) and ``free`` (bytes on the disk).
        progress: Called with rows done and rows in all.

    Returns:
        The record, kind "cache": the numbers of `announce`, and once made ``images_found``, ``made`` (tiles, or images
        for another kind than features), ``broken`` (damage that was mended), ``written`` (bytes on the disk).

    Raises:
        SettingError: The tower trains, its states or the pruner's choice cannot be stored, or `out` holds a cache of
            something else.
        DataError: The data cannot be read, or hold no image.
        OutputError: It would not fit on the disk, the disk is full, or another process writes the cache.
    """
    if dtype not in DTYPES:
        raise setting_error("trimtab cache", "dtype", f"one of {', '.join(DTYPES)}", dtype)
    if on_stale not in ("error", "rebuild"):
        raise setting_error("trimtab cache", "on_stale", "'error' or 'rebuild'", on_stale)
    started = datetime.now(timezone.utc)
    job = _Job(config, config.dualspeed or DualSpeedConfig(), training_arguments(config), kind, dtype, on_stale)
    rows, folder = load_rows_of(config.data_files, config), Path(out)
    size, pictures = _plan(job, rows)
    told = {"kind": kind, "dtype": dtype, **size.to_dict(), "present": _present(folder), "free": _free(folder)}
    if announce is not None:
        announce(told)
    _require_space(told, folder, on_stale)
    results = told if dry_run else {**told, **_make(job, rows, pictures, folder, progress)}
    seconds = (datetime.now(timezone.utc) - started).total_seconds()
    asked = {**config.identity(), "out": str(out), "kind": kind, "dtype": dtype, "dry_run": dry_run}
    return make_record("cache", asked, results, seed=job.settings.seed, started=started, seconds=seconds)


def _require_space(told: Mapping[str, Any], folder: Path, on_stale: str) -> None:
    """Refuse a cache that would not fit.

    Raises:
        OutputError: It would not.
    """
    free = told["free"] + (told["present"] if on_stale == "rebuild" else 0)
    missing = told["bytes"] - (0 if on_stale == "rebuild" else told["present"])
    if missing > free:
        raise OutputError(
            f"The cache needs {missing:,} bytes, but {free:,} are free for {folder}. Free some space, choose another "
            "disk, fewer bits (dtype bfloat16), or a smaller kind (kept, indices)."
        )


def _plan(job: _Job, rows: Any) -> tuple[CacheSize, Pictures]:
    """Say how large the cache will be, from the model's configuration alone."""
    host = open_host(outline_model(job.config))
    if trouble := cache_trouble(host):
        raise SettingError(f"The vision tower cannot be cached. {trouble}")
    pruner = FastView(host, job.settings).pruner
    require_storable(job.kind, host, job.settings, pruner)
    facts = cache_facts(host, job.settings, pruner, job.kind, job.dtype, job.precision, UNKNOWN)
    pictures = find_pictures(rows, measured=host.family.tiles == "packed")
    return estimate(host, job.settings, facts, pictures.sizes), pictures


@dataclass(frozen=True)
class _Job:
    """What is to be done."""

    config: RunConfig
    settings: DualSpeedConfig
    arguments: Any
    kind: str
    dtype: str
    on_stale: Literal["error", "rebuild"]

    @property
    def precision(self) -> str | None:
        """Number format of the autocast of the training."""
        return "bfloat16" if self.arguments.bf16 else "float16" if self.arguments.fp16 else None


def _make(
    job: _Job, rows: Any, pictures: Pictures, folder: Path, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    view = FastView(open_host(load_model(job.config).to(job.arguments.device)), job.settings)
    found = TowerCache(
        folder, view.host, job.settings, view.pruner, write=True, kind=job.kind, dtype=job.dtype,
        precision=job.precision, on_stale=job.on_stale,
    )  # fmt: skip
    autocast = _autocast(job.arguments)
    done = stored = 0
    with found.store, torch.no_grad():
        for batch in _batches(job, rows, pictures):
            if found.holds(batch):
                stored += len(batch[ENTRY])
            else:
                with autocast():
                    _encode(view, found, _on_device(batch, view, job.arguments.device))
            done += batch["input_ids"].shape[0]
            if progress is not None:
                progress(done, len(pictures.places))
        if job.kind == "features":
            # With FSDP and ZeRO a batch without images takes part with a blank one, and must not miss either.
            with autocast(), found.tower({})(view.host, frozenset()):
                encode_blank(view.host, job.arguments.device)
    return {
        "images_found": stored,
        "made": found.misses,
        "broken": found.store.broken,
        "written": found.store.bytes_on_disk,
    }


def _batches(job: _Job, rows: Any, pictures: Pictures) -> Iterable[dict[str, Any]]:
    """Batches of the training's own collator, so that pixels are those of the training, bit for bit."""
    from trimtab.data import SupervisedCollator

    processor = load_processor(job.config.model_name_or_path)
    collator = SupervisedCollator(processor, max_length=job.config.max_length, empty_labels="count")
    loader: Any = DataLoader(
        Subset(rows, pictures.places),
        batch_size=job.arguments.per_device_train_batch_size,
        collate_fn=KeyImages(collator),
        num_workers=job.arguments.dataloader_num_workers,
    )
    return loader  # type: ignore[no-any-return]  # of batches


def _encode(view: FastView, found: TowerCache, batch: dict[str, Any]) -> None:
    """Send what is missing of a batch through the tower, and the choice through the pruner where it is stored."""
    encoded = encode_images(view.host, batch, view.pruner.needs, found.tower(batch))
    found.note(encoded)
    if found.kind != "features":
        draw = (view.config.seed, 0)
        found.choose(encoded, lambda some: choose_tokens(view.pruner, view.config, some, draw))


def _on_device(batch: dict[str, Any], view: FastView, device: torch.device) -> dict[str, Any]:
    """Take what the image encoder takes, and the keys."""
    names = {*view.host.encoder_names, "input_ids", ENTRY}
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name in names
    }


def _present(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))


def _free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder that may not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
