"""A frozen vision tower's work, done once and kept on disk: its states, the kept ones of them, or the choice alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from trimtab.anatomy import EncodedImages, Host
from trimtab.anatomy.tower import Observed, observe_tower
from trimtab.anatomy.tower_cache import (
    ATTENTION,
    Run,
    Tiles,
    cache_trouble,
    packed_rows,
    replace_tower,
    returned_type,
    tiles_of_images,
    tower_of,
    tower_shape,
)
from trimtab.dualspeed.cache_choice import require_storable
from trimtab.dualspeed.cache_facts import cache_facts, require_fit, require_frozen, require_unmoved, tower_version
from trimtab.dualspeed.cache_keys import ENTRY, Keys, image_keys, joint_key, tile_keys
from trimtab.dualspeed.cache_shard import Entry
from trimtab.dualspeed.cache_store import CacheStore
from trimtab.dualspeed.cache_tensors import images_in_rows, send_indices, some_images, stack_on
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.fast_view import KeptTokens
from trimtab.errors import DataError, SettingError, setting_error
from trimtab.pruners import Pruner
from trimtab.shapes import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Choose = Callable[[EncodedImages], KeptTokens]
TowerContext = Callable[[Host, frozenset[str]], contextlib.AbstractContextManager[Observed]]


@dataclass
class _Batch:
    """What is stored of the images of one batch.

    Attributes:
        keys: Of each image.
        tiles: Tiles of each image.
        entries: What is stored of each image, or None.
        whole: Of which images all states were made.
        rows: For each image which row of its tiles each token is; only where they are wanted.
        outputs: What the encoder returned, by which a batch is told from another.
    """

    keys: list[str]
    tiles: list[int]
    entries: list[Entry | None]
    whole: list[bool]
    rows: list[Tensor]
    outputs: Any = None


class TowerCache:
    """The cache of one model's tower under one config.

    Args:
        folder: The cache folder.
        host: The model, opened; its tower must be frozen.
        config: The settings.
        pruner: The pruner of these settings.
        write: Whether what is missing is stored; else it is made anew whenever it comes.
        kind: What is stored, for a new cache: ``"features"`` (all states of the selected layers), ``"kept"`` (those of
            the kept tokens and their numbers) or ``"indices"`` (the numbers alone). A reader takes it from the folder.
        dtype: Number format of stored states, for a new cache; a reader takes it from the folder.
        precision: Number format of the autocast under which the tower runs, or None for none; for a new cache.
        on_stale: See `trimtab.dualspeed.cache_store.CacheStore`.

    Attributes:
        kind: What is stored.
        hits, misses: Tiles (or images, for a kind other than features) that were found, and that were not.
        require_hits: Whether a miss is an error, as it must be where processes run the tower together.

    Raises:
        DataError: There is no cache, or it is damaged beyond use.
        SettingError: The tower trains, has no plain run, or the cache is of something else.
        OutputError: Another process writes it.
    """

    def __init__(
        self,
        folder: str | Path,
        host: Host,
        config: DualSpeedConfig,
        pruner: Pruner,
        *,
        write: bool = False,
        kind: str = "features",
        dtype: str = "bfloat16",
        precision: str | None = None,
        on_stale: Literal["error", "rebuild"] = "error",
    ) -> None:
        if trouble := cache_trouble(host):
            raise SettingError(f"The vision tower cannot be cached. {trouble} Leave cache_from out.")
        if dtype not in DTYPES:
            raise setting_error("trimtab cache", "dtype", f"one of {', '.join(DTYPES)}", dtype)
        require_frozen(host)
        self.hits = self.misses = 0
        self.require_hits = False
        self._host, self._config = host, config
        self._batch: _Batch | None = None
        self._states: Tensor | None = None
        if write:
            require_storable(kind, host, config, pruner)
            facts = cache_facts(host, config, pruner, kind, dtype, precision)
            self.store = CacheStore(folder, facts, write=True, on_stale=on_stale)
        else:
            self.store = CacheStore(folder)
            require_fit(self.store, host, config, pruner)
        self.kind: str = self.store.facts["kind"]
        self._dtype = DTYPES[self.store.facts["dtype"]]
        self._stored_needs = frozenset(self.store.facts["observed"])
        self._version = tower_version(host)

    # one batch ------------------------------------------------------------------------------------------------------

    def tower(self, batch: Mapping[str, Any], full: Sequence[int] | None = None) -> TowerContext:
        """Return what stands for `trimtab.anatomy.tower.observe_tower` while the images of a batch are encoded.

        Args:
            batch: Arguments of the model; an entry ``image_keys`` saves hashing its pixels here.
            full: Rows of which all states are needed, or None for all; with kind ``"kept"`` the images of other rows
                get zeros for tokens that are not kept.
        """
        self._require_current()
        keys = self._keys(batch)
        if self.kind == "features":
            self._batch = None
            return partial(self._serve, supply=partial(self._features, keys))
        self._batch = self._look_up(batch, keys, full)
        if self.kind == "indices":
            self._check_precision()
            return partial(_observe_unless, all(one is not None for one in self._batch.entries) and bool(keys))
        return partial(self._serve, supply=self._kept)

    def note(self, encoded: EncodedImages) -> None:
        """Remember that a batch for which `tower` was asked became these features."""
        if self._batch is not None:
            self._batch.outputs = encoded.outputs

    def choose(self, encoded: EncodedImages, choose: Choose) -> KeptTokens:
        """Return the stored choice where there is one, and let the pruner choose for the other images.

        Args:
            encoded: The images.
            choose: The pruner's work, for some or all of them.
        """
        batch = self._batch
        if batch is None or batch.outputs is not encoded.outputs or encoded.counts.get("image") != len(batch.keys):
            if batch is not None and not all(batch.whole):
                raise SettingError(
                    "A cache of kind 'kept' has states of kept tokens only, and tokens were asked for of other images "
                    "than were encoded last. Take a cache of kind 'features'."
                )
            return choose(encoded)
        entries = batch.entries + [None] * (len(encoded.blocks) - len(batch.keys))  # videos, behind the images
        missing = [number for number, entry in enumerate(entries) if entry is None]
        fresh = choose(some_images(encoded, missing)) if missing else KeptTokens([], [])
        device = encoded.blocks[0].device
        known = iter(send_indices([entry["index"] for entry in entries if entry is not None], device))
        made = iter(zip(fresh.index, fresh.tokens, strict=True))
        index: list[Tensor] = []
        tokens: list[Tensor] = []
        for number, (entry, block) in enumerate(zip(entries, encoded.blocks, strict=True)):
            if entry is None:
                picks, kept = next(made)
                self._store_choice(batch, number, picks)
            else:
                picks = next(known)
                kept = block[picks]
            index.append(picks)
            tokens.append(kept)
        return KeptTokens(index, tokens)

    def holds(self, batch: Mapping[str, Any]) -> bool:
        """Whether everything of a batch's images is stored and sound; nothing is counted."""
        keys = self._keys(batch) or ()
        names = [key for image in keys for key in image] if self.kind == "features" else self._joint(batch, keys)
        return all(self.store.get(name) is not None for name in names)

    def metrics(self) -> dict[str, int]:
        """Return ``cache_hits``, ``cache_misses`` and ``cache_broken`` so far."""
        return {"cache_hits": self.hits, "cache_misses": self.misses, "cache_broken": self.store.broken}

    def close(self) -> None:
        """Write the rest; a second call does nothing."""
        self.store.close()

    # features -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _serve(self, host: Host, needs: frozenset[str], *, supply: Callable[..., Tiles]) -> Iterator[Observed]:
        self._check_precision()
        if self.store.writes:  # every entry has the same parts
            needs = needs | self._stored_needs
        with replace_tower(host, needs, partial(supply, needs)) as observed:
            yield observed

    def _features(self, keys: Keys | None, needs: frozenset[str], pixels: Tensor, run: Run) -> Tiles:
        flat = [key for image in keys or () for key in image]
        if len(flat) != len(pixels):  # called by another way than a batch
            flat = tile_keys(pixels)
        found = {key: self.store.get(key) for key in dict.fromkeys(flat)}
        missing = [key for key, entry in found.items() if entry is None]
        self._count(sum(found[key] is not None for key in flat), sum(found[key] is None for key in flat))
        if missing:
            made = run(pixels[[flat.index(key) for key in missing]])
            parts = {name: value.to(self._dtype_of(name)) for name, value in made.items()}
            for number, key in enumerate(missing):
                found[key] = {name: value[number] for name, value in parts.items()}
                if self.store.writes:
                    self.store.put(key, found[key] or {})
        wanted = ["states", *sorted(needs & ATTENTION)]
        dtype = returned_type(self._host, pixels.device)
        entries = [found[key] for key in flat]
        return {
            name: stack_on([entry[name] for entry in entries if entry is not None], pixels.device).to(
                dtype if name == "states" else torch.float32
            )
            for name in wanted
        }

    def _dtype_of(self, part: str) -> torch.dtype:
        return torch.float32 if part == "cls_attention" else self._dtype

    # choices --------------------------------------------------------------------------------------------------------

    def _keys(self, batch: Mapping[str, Any]) -> Keys | None:
        """Return the keys of the tiles that the tower will see, image by image."""
        keys: Keys | None = image_keys(batch) if batch.get(ENTRY) is None else batch[ENTRY]
        if not keys:
            return keys
        counts = tiles_of_images(self._host, batch, keys)
        return tuple(image[:count] for image, count in zip(keys, counts, strict=True))

    def _joint(self, batch: Mapping[str, Any], images: Sequence[Sequence[str]]) -> list[str]:
        packed = self._host.family.tiles == "packed"
        sizes = torch.as_tensor(batch["image_sizes"]).tolist() if packed and images else [()] * len(images)
        return [joint_key(image, size) for image, size in zip(images, sizes, strict=True)]

    def _look_up(self, batch: Mapping[str, Any], keys: Keys | None, full: Sequence[int] | None) -> _Batch:
        images = list(keys or ())
        names = self._joint(batch, images)
        entries = [self.store.get(name) for name in names]
        tiles = [len(image) for image in images]
        self._count(sum(one is not None for one in entries), sum(one is None for one in entries))
        rows: list[Tensor] = []
        if self.kind == "kept" and images and (self.store.writes or full):
            rows = packed_rows(self._host, batch.get("image_sizes"), tiles)
        whole = [True] * len(images) if full is None else [False] * len(images)
        if full and rows:
            whole = images_in_rows(batch, self._host.image_token_ids, full, [len(one) for one in rows])
        return _Batch(
            names, tiles, entries, [w or entry is None for w, entry in zip(whole, entries, strict=True)], rows
        )

    def _kept(self, needs: frozenset[str], pixels: Tensor, run: Run) -> Tiles:
        batch, shape = self._batch, tower_shape(self._host)
        assert batch is not None
        if sum(batch.tiles) != len(pixels):
            batch.entries, batch.whole = [None] * len(batch.keys), [True] * len(batch.keys)
            return run(pixels)
        wanted = [whole for whole, count in zip(batch.whole, batch.tiles, strict=True) for _ in range(count)]
        full = [tile for tile, whole in enumerate(wanted) if whole]
        made = run(pixels[full]) if full else None
        dtype = returned_type(self._host, pixels.device)
        states = torch.zeros(len(pixels), shape.tokens, shape.layers, shape.channels, dtype=dtype, device=pixels.device)
        first = 0
        for entry, count, whole in zip(batch.entries, batch.tiles, batch.whole, strict=True):
            if entry is not None and not whole:
                rows = entry["rows"].to(pixels.device, torch.long) + first * shape.tokens
                states.view(-1, shape.layers, shape.channels)[rows] = entry["states"].to(pixels.device, dtype)
            first += count
        result = {"states": states}
        if made is not None:
            states[full] = made["states"].to(dtype)
        self._states = states if self.store.writes else None
        for name in needs & ATTENTION:
            like = made[name] if made is not None else torch.zeros(0, shape.tokens, *([shape.key] * (name == "keys")))
            result[name] = torch.zeros(len(pixels), *like.shape[1:], dtype=torch.float32, device=pixels.device)
            if made is not None:
                result[name][full] = made[name].float()
        return result

    def _store_choice(self, batch: _Batch, number: int, picks: Tensor) -> None:
        if not self.store.writes or number >= len(batch.keys):
            return
        entry: Entry = {"index": picks.to(torch.int32)}
        if self.kind == "kept":
            assert self._states is not None
            shape, first = tower_shape(self._host), sum(batch.tiles[:number])
            rows = batch.rows[number][picks.cpu()]
            rows = rows[rows >= 0]  # a newline has no state
            places = (rows + first * shape.tokens).to(self._states.device)
            flat = self._states.reshape(-1, shape.layers, shape.channels)
            entry |= {"rows": rows.to(torch.int32), "states": flat[places].to(self._dtype)}
        self.store.put(batch.keys[number], entry)

    # checks ---------------------------------------------------------------------------------------------------------

    def _require_current(self) -> None:
        """Refuse a tower that trains, or whose weights were changed since it was compared with the cache."""
        require_frozen(self._host)
        if self.require_hits:  # weights may be in pieces here, which cannot be compared
            if self.kind == "kept":
                raise SettingError(
                    "A cache of kind 'kept' cannot serve FSDP and ZeRO: a process whose rows are all fast does not run "
                    "the tower, and one with slow rows or without images would wait for it. Take kind 'features'."
                )
            return
        version = tower_version(self._host)
        if version != self._version:
            require_unmoved(self.store, self._host)
            self._version = version

    def _count(self, hits: int, misses: int) -> None:
        self.hits += hits
        self.misses += misses
        if misses and self.require_hits:
            raise DataError(
                f"{misses} tiles of a batch are not in the cache {self.store.folder}. With FSDP and ZeRO all processes "
                "run the tower together or not at all, so every image must be there. Complete the cache with trimtab "
                "cache, switch random augmentation off, or leave cache_from out."
            )

    def _check_precision(self) -> None:
        device = tower_of(self._host).device.type
        here = (
            str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else None
        )
        there = self.store.facts["precision"]
        if here != there:
            raise SettingError(
                f"The cache in {self.store.folder} was made with the tower under autocast {there!r}, but here it runs "
                f"under {here!r} (bf16 and fp16 of the training arguments). Make the cache anew with these settings."
            )


def _observe_unless(known: bool, host: Host, needs: frozenset[str]) -> contextlib.AbstractContextManager[Observed]:
    """Observe the tower, unless the choice is known already."""
    return contextlib.nullcontext({}) if known or not needs else observe_tower(host, needs)
