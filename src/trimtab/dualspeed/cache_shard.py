"""One file of a cache: tensors of many entries one behind the other, and the table that says where each lies."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trimtab.dualspeed.cache_keys import KEY_BYTES
from trimtab.shapes import Tensor

FORMAT = 1
SHARD_BYTES = 128 * 2**20
"""A shard is written when its entries have grown to this; so much work is lost at most when the process dies."""

Entry = dict[str, Tensor]
"""What is stored under one key: tensors by name, the same names, number formats and widths in every entry."""
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Shard:
    """An open file, mapped into memory.

    Attributes:
        path: Where it lies.
        file: The file.
        keys: Key of each entry.
        offsets: For each part where the rows of each entry begin, and where the last ends.
        sums: Checksum of each entry.
    """

    path: Path
    file: Any
    keys: list[bytes]
    offsets: dict[str, list[int]]
    sums: list[int]

    def read(self, row: int, *, check: bool) -> Entry | None:
        """Return an entry, or None where it was to be checked and fails its checksum."""
        entry = {
            part: self.file.get_slice(part)[ends[row] : ends[row + 1]] for part, ends in sorted(self.offsets.items())
        }
        return None if check and _checksum(entry) != self.sums[row] else entry


def open_shard(path: Path, identity: str) -> Shard:
    """Open a shard of a cache.

    Raises:
        SafetensorError, OSError, ValueError, KeyError: It is damaged, or belongs to another cache.
    """
    file = safe_open(str(path), "pt")
    told = file.metadata() or {}
    table = {name: file.get_tensor(name) for name in file.keys() if name.startswith("table.")}  # noqa: SIM118, no dict
    if told.get("table") != _digest(table):
        raise ValueError("its table fails its checksum")
    if told.get("identity") != identity:
        raise ValueError("it belongs to another cache")
    marked = "table.at."
    offsets = {name.removeprefix(marked): value.tolist() for name, value in table.items() if name.startswith(marked)}
    for part, ends in offsets.items():
        if file.get_slice(part).get_shape()[0] != ends[-1]:
            raise ValueError(f"{part} does not have the rows of its table")
    keys = [key.tobytes() for key in table["table.keys"].numpy()]
    return Shard(path, file, keys, offsets, table["table.sums"].tolist())


def told_identity(path: Path) -> str | None:
    """Return what a shard says it belongs to, or None where it is damaged."""
    try:
        return str((safe_open(str(path), "pt").metadata() or {}).get("identity"))
    except (SafetensorError, OSError):
        return None


def shard_bytes(entries: Mapping[bytes, Entry], identity: str) -> tuple[bytes, str]:
    """Return the bytes of a shard, and its name, which follows from its keys."""
    parts = sorted(next(iter(entries.values())))
    tensors = {part: torch.cat([entry[part] for entry in entries.values()]) for part in parts}
    table = {
        "table.keys": torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8).view(-1, KEY_BYTES),
        "table.sums": torch.tensor([_checksum(entry) for entry in entries.values()]),
    }
    for part in parts:
        lengths = [0, *(entry[part].shape[0] for entry in entries.values())]
        table[f"table.at.{part}"] = torch.tensor(lengths).cumsum(0)
    digest = _digest(table)
    content = save({**tensors, **table}, {"identity": identity, "table": digest})
    return content, f"shard-{digest}.safetensors"


def identity_of(facts: Facts) -> str:
    """Return a short name for what a cache is of."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=KEY_BYTES).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(_view(tensors[name]))
    return state.hexdigest()


def _checksum(entry: Entry) -> int:
    # CRC-32 is several times faster than a cryptographic hash, and damage is no adversary.
    value = 0
    for part in sorted(entry):
        value = zlib.crc32(_view(entry[part]), value)
    return value


def _view(tensor: Tensor) -> Any:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # has a buffer


def bytes_of(tensor: Tensor) -> int:
    """Return how many bytes the numbers of a tensor take."""
    return tensor.numel() * tensor.element_size()


def size_on_disk(entries: int, rows: Mapping[str, int], parts: Entry, facts: Facts) -> int:
    """Return how many bytes a cache will take, to within some ten bytes per shard.

    Args:
        entries: Number of entries.
        rows: Rows of each part over all entries.
        parts: An entry without rows, for widths and number formats.
        facts: What the cache is of.
    """
    content = sum(rows[part] * bytes_of(value.new_empty(1, *value.shape[1:])) for part, value in parts.items())
    tables = entries * (KEY_BYTES + 8 + 8 * len(parts))
    shards = -(-content // SHARD_BYTES)
    frame = len(shard_bytes({bytes(KEY_BYTES): parts}, identity_of(facts))[0]) - (KEY_BYTES + 8 + 8 * len(parts))
    return content + tables + shards * frame + len(json.dumps(manifest_of(facts), indent=2)) + 1


def manifest_of(facts: Facts) -> dict[str, Any]:
    """Return the content of a manifest."""
    return {"made_by": "trimtab", "format": FORMAT, "facts": dict(facts)}
