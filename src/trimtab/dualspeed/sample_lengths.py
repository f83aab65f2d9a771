"""How many tokens each row of a data set has, full and pruned: what packs are planned by.

Rows pass one by one through the user's own collator, in worker processes where asked for, and their placeholders are
counted. How many visual tokens the fast view keeps follows from how the model's family cuts its images into tiles: for
most families from the placeholders alone (`_COUNTED`), for the others from one pass of the model's own encoder for each
combination of image sizes. Both give exactly what a training step has, as long as the collator draws nothing at random
and `keep_spread` is ``"fixed"``; with another spread a row's fast length is its mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader

from trimtab.anatomy import EncodedImages, Host, open_host
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.fast_view import choose_tokens
from trimtab.dualspeed.packs import SampleLength
from trimtab.dualspeed.view import FastView
from trimtab.errors import DataError, setting_error
from trimtab.files import write_bytes_atomic
from trimtab.pruners import build_pruner
from trimtab.shapes import Tensor

_COUNTED = frozenset(
    f"{name}ForConditionalGeneration"
    for name in (
        "Idefics3", "Llava", "LlavaNext", "LlavaOnevision", "PaliGemma", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL",
        "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe", "SmolVLM", "VipLlava",
    )
)  # fmt: skip
"""Classes whose placeholders tell how images are cut, as the tests hold."""
_NAMES = ("keep_ratio", "keep_rule", "isolator_tokens", "keep_spread")


@dataclass(frozen=True)
class RowShape:
    """What one row says of its length.

    Attributes:
        tokens: Real tokens, visual ones included.
        runs: Placeholders that stand side by side, run by run.
        images: How many images the row has, or None where its visual inputs do not tell, or are videos too.
        key: Equal for rows whose visual inputs have equal shapes.
    """

    tokens: int
    runs: tuple[int, ...]
    images: int | None
    key: str


class ReadShape:
    """Collates one row and returns its `RowShape`; picklable where the collator is.

    Args:
        collator: The collator of the training.
        image_token_ids: Ids that stand for one visual token each.
        visual_names: Entries of a batch that are visual inputs.
    """

    def __init__(
        self, collator: Callable[[Any], Any], image_token_ids: Iterable[int], visual_names: Iterable[str]
    ) -> None:
        self.collator = collator
        self.image_token_ids = tuple(image_token_ids)
        self.visual_names = tuple(sorted(visual_names))

    def __call__(self, rows: Sequence[Any]) -> RowShape:
        """Collate, and count.

        Args:
            rows: One row.

        Raises:
            DataError: The collator makes no ``input_ids`` of one row.
        """
        batch = self.collator(rows)
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1:
            came = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise DataError(
                f"The collator must make input_ids [1, seq] of one row, so that its length can be counted, but {came} "
                "came. Give the lengths yourself (dualspeed_lengths), or a collator that does not join rows."
            )
        mask = batch.get("attention_mask")
        real = ids[0] if mask is None else ids[0][mask[0] != 0]
        holds = torch.isin(real, real.new_tensor(self.image_token_ids))
        visual = {name: batch[name] for name in self.visual_names if batch.get(name) is not None}
        runs = _runs(holds)
        return RowShape(len(real), runs, _image_count(visual), _key(visual, runs))


def measure_lengths(
    dataset: Any,
    collator: Callable[[Any], Any],
    model: Any,
    config: DualSpeedConfig,
    *,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[SampleLength]:
    """Count the tokens of every row, full and pruned.

    Args:
        dataset: Rows by number.
        collator: The collator of the training.
        model: The model, or what `open_host` made of it.
        config: What is pruned.
        rows: Numbers of the rows to measure; None for all.
        num_workers: Worker processes that collate.
        autocast: The context under which the model encodes images.

    Returns:
        The length of each of these rows.

    Raises:
        DataError: The collator makes no sequence of one row.
    """
    host = open_host(model)
    numbers = range(len(dataset)) if rows is None else rows
    read = ReadShape(collator, host.image_token_ids, host.encoder_names)
    loader: Any = DataLoader(
        dataset,
        batch_size=1,
        sampler=numbers,
        collate_fn=read,
        num_workers=num_workers,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    count = _DroppedCount(host, config, autocast)
    lengths = []
    for number, shape in zip(numbers, loader, strict=True):
        dropped = count(shape, partial(_collated, dataset, collator, number))
        lengths.append(SampleLength(shape.tokens, shape.tokens - dropped))
    return lengths


def _collated(dataset: Any, collator: Callable[[Any], Any], number: int) -> Any:
    return collator([dataset[number]])


class _DroppedCount:
    """Counts the tokens that a row loses in the fast view, once for every combination of image sizes."""

    def __init__(
        self, host: Host, config: DualSpeedConfig, autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        # All pruners keep as many tokens as they are told, and this one asks nothing of the tower.
        plain = replace(config, keep_spread="fixed", check_features=False)
        self.config = plain if plain.pruner == "keep_all" else replace(plain, pruner="random", pruner_options={})
        self.host, self.autocast = host, autocast
        self.known: dict[str, int] = {}

    def __call__(self, shape: RowShape, batch: Callable[[], Mapping[str, Any]]) -> int:
        if not shape.runs or self.config.keeps_all:
            return 0
        if shape.key not in self.known:
            tiles = tiles_by_runs(self.host, shape, self.config)
            self.known[shape.key] = self._by_tiles(tiles) if tiles else self._by_encoder(batch())
        return self.known[shape.key]

    def _by_tiles(self, tiles: list[list[int]]) -> int:
        blocks = [torch.zeros(sum(sizes), 1) for sizes in tiles]
        # Whether the isolator finds a place in any image is for the training step to say.
        bare = EncodedImages({}, {"image": len(tiles)}, blocks, tiles, None, [None] * len(tiles), any_size=True)
        return self._dropped(bare, [len(i) for i in choose_tokens(self._pruner, self.config, bare, (0, 0)).index])

    def _by_encoder(self, batch: Mapping[str, Any]) -> int:
        view = FastView(self.host, self.config)
        device = self.host.model.get_input_embeddings().weight.device
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.no_grad(), self.autocast():
            encoded, layout = view.encode(inputs)
            return self._dropped(encoded, [len(one) for one in view.choose(inputs, encoded, layout, 0).index])

    @property
    def _pruner(self) -> Any:
        return build_pruner(self.config.pruner)

    def _dropped(self, encoded: EncodedImages, kept: list[int]) -> int:
        sizes = [block.shape[0] for block in encoded.blocks]
        fronts = [self.config.isolator_tokens * (count < size) for size, count in zip(sizes, kept, strict=True)]
        return sum(sizes) - sum(kept) - sum(fronts)


def tiles_by_runs(host: Host, shape: RowShape, config: DualSpeedConfig) -> list[list[int]] | None:
    """Return the tiles of each block of a row where its placeholders tell them, or None where they do not."""
    if host.family.name not in _COUNTED or shape.images is None:
        return None
    if host.family.tiles == "square":  # all images of a row are one block, and each run of placeholders is a tile
        return [list(shape.runs)] if len(set(shape.runs)) == 1 else None
    if host.family.tiles == "packed" and config.keep_ratio > 0.5:
        return None  # newline rows, which are dropped first, then limit what is kept
    return [[run] for run in shape.runs] if len(shape.runs) == shape.images else None


def _runs(holds: Tensor) -> tuple[int, ...]:
    values, counts = torch.unique_consecutive(holds, return_counts=True)
    return tuple(counts[values].tolist())


def _image_count(visual: Mapping[str, Any]) -> int | None:
    if any("video" in name for name in visual):
        return None
    for name in ("image_grid_thw", "image_sizes"):
        if name in visual:
            return len(visual[name])
    values = visual.get("pixel_values")
    if not isinstance(values, Tensor) or values.dim() not in (4, 5):
        return None
    return values.shape[0] if values.dim() == 4 else values.shape[0] * values.shape[1]


def _key(visual: Mapping[str, Any], runs: tuple[int, ...]) -> str:
    """Name the shapes of visual inputs; of whole numbers, which say what shape an image had, also the values."""
    digest = hashlib.blake2b(repr(runs).encode(), digest_size=16)
    for name, value in visual.items():
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        told = value.tolist() if whole else getattr(value, "shape", None) or repr(value)
        digest.update(f"{name} {getattr(value, 'shape', '')} {told}".encode())
    return digest.hexdigest()


# keeping ------------------------------------------------------------------------------------------------------------


def lengths_fingerprint(rows: int, model: Any, collator: Any, config: DualSpeedConfig) -> str:
    """Name what lengths depend on, as far as it can be seen without reading rows.

    Args:
        rows: Rows of the data set.
        model: The model, or what `open_host` made of it.
        collator: The collator; its class and ``max_length`` count, also of one inside it.
        config: What is pruned.
    """
    host = open_host(model)
    facts = {
        "rows": rows,
        "model": [host.family.name, host.model.config.to_dict()],
        "collator": _collator_facts(collator),
        "settings": [config.keeps_all, *(getattr(config, name) for name in _NAMES)],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _collator_facts(collator: Any) -> list[str]:
    facts = []
    while collator is not None:
        facts.append(f"{type(collator).__module__}.{type(collator).__qualname__} {getattr(collator, 'max_length', '')}")
        inside = (getattr(collator, name, None) for name in ("collator", "collate", "data_collator"))
        collator = next((one for one in inside if one is not None), None)
    return facts


def save_lengths(path: str | Path, lengths: Sequence[SampleLength], fingerprint: str) -> None:
    """Write lengths to one small file, whole or not at all.

    Args:
        path: The file.
        lengths: Of every row.
        fingerprint: What they depend on, from `lengths_fingerprint`.

    Raises:
        OutputError: The file cannot be written.
    """
    table = torch.tensor([tuple(one) for one in lengths], dtype=torch.int64).view(-1, 2)
    write_bytes_atomic(path, save({"lengths": table}, {"fingerprint": fingerprint}))


def load_lengths(path: str | Path, fingerprint: str | None = None) -> list[SampleLength]:
    """Read what `save_lengths` wrote.

    Args:
        path: The file.
        fingerprint: What the lengths must depend on; None takes them as they are.

    Raises:
        DataError: The file is missing, broken, or of other data or settings.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            found = (stored.metadata() or {}).get("fingerprint")
            table = stored.get_tensor("lengths")
    except (OSError, SafetensorError) as error:
        raise DataError(f"Cannot read lengths from {path}: {error}. Delete the file and measure anew.") from error
    if fingerprint is not None and found != fingerprint:
        raise DataError(
            f"{path} holds the lengths of other data, another model, or other settings (its fingerprint is {found}, "
            f"that of this run {fingerprint}). Delete the file and measure anew."
        )
    return [SampleLength(full, fast) for full, fast in table.tolist()]


def require_lengths(lengths: Sequence[Any], rows: int, owner: str) -> list[SampleLength]:
    """Return lengths that a user gave, one per row.

    Raises:
        SettingError: There are more or fewer, or something else came.
    """
    if isinstance(lengths, str) or not isinstance(lengths, Sequence) or len(lengths) != rows:
        came = f"{len(lengths)} of them" if isinstance(lengths, Sequence) else type(lengths).__name__
        raise setting_error(owner, "dualspeed_lengths", f"one SampleLength for each of the {rows} rows", came)
    return [SampleLength(*one) for one in lengths]
