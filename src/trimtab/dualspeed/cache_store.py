"""A folder of tensors by key that only grows, and that believes nothing it has not checked.

``manifest.json`` says what the cache is of. Entries lie in shards (safetensors files), each written whole under another
name and then renamed; a shard carries its own table of keys, offsets and checksums, so that nothing else must agree
with it. Readers need no lock and may read while one process writes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from trimtab.dualspeed.cache_shard import (
    FORMAT,
    SHARD_BYTES,
    Entry,
    Facts,
    Shard,
    bytes_of,
    identity_of,
    manifest_of,
    open_shard,
    shard_bytes,
    told_identity,
)
from trimtab.errors import DataError, OutputError, SettingError, TrimtabWarning, setting_error
from trimtab.files import read_json, write_bytes_atomic, write_json_atomic

MANIFEST = "manifest.json"
LOCK = "writer.lock"


class CacheStore:
    """One cache folder, open for reading, or for reading and writing.

    Args:
        folder: The folder; made when it is opened for writing.
        facts: What the cache must be of, as plain JSON values; None takes it as it is.
        write: Whether to write; one process at a time may.
        on_stale: What a writer does with a folder that holds a cache of something else, or a manifest that cannot be
            read: ``"error"``, or ``"rebuild"`` to delete its shards and begin anew.
        shard_bytes: When a shard is written.

    Attributes:
        facts: What the cache is of.
        broken: Entries that failed their checksum so far, and shards that could not be read.

    Raises:
        DataError: There is no cache, or its manifest cannot be read.
        SettingError: It is a cache of something else; the message names what differs.
        OutputError: Another process writes it, or it cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        facts: Facts | None = None,
        *,
        write: bool = False,
        on_stale: Literal["error", "rebuild"] = "error",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if on_stale not in ("error", "rebuild"):
            raise setting_error("CacheStore", "on_stale", "'error' or 'rebuild'", on_stale)
        self.folder = Path(folder)
        self.broken = 0
        self._warned = False
        self._shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._places: dict[bytes, list[tuple[int, int]]] = {}
        self._checked: set[tuple[int, int]] = set()
        self._damaged: set[int] = set()
        self._pending: dict[bytes, Entry] = {}
        self._pending_bytes = 0
        self._lock = _lock(self.folder) if write else None
        if write:  # what a process left that died while it wrote
            for path in self.folder.glob(".shard-*.part"):
                path.unlink(missing_ok=True)
        try:
            self.facts = self._open(facts, on_stale)
            self._read_shards()
        except BaseException:
            self._unlock()
            raise

    @property
    def writes(self) -> bool:
        """Whether the folder is open for writing."""
        return self._lock is not None

    def __len__(self) -> int:
        return len(self._places.keys() | self._pending.keys())

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all files of the cache."""
        return sum(path.stat().st_size for path in (*self._shard_files(), self.folder / MANIFEST))

    def get(self, key: str) -> Entry | None:
        """Return what is stored under a key, checked against its checksum the first time; None where nothing sound is.

        Warns:
            TrimtabWarning: Something failed its checksum; once.
        """
        name = bytes.fromhex(key)
        if name in self._pending:
            return self._pending[name]
        places = self._places.get(name, [])
        while places:
            entry = self._read(*places[-1])
            if entry is not None:
                return entry
            self._damaged.add(places.pop()[0])
            self._note_broken(f"an entry failed its checksum (key {key})")
        self._places.pop(name, None)
        return None

    def put(self, key: str, entry: Entry) -> None:
        """Store tensors under a key; they reach the disk with their shard.

        Args:
            key: Hexadecimal digits, as `trimtab.dualspeed.cache_keys` makes them.
            entry: The tensors; at least one dimension each.

        Raises:
            OutputError: The disk is full; what was written before stays usable.
        """
        assert self.writes
        name = bytes.fromhex(key)
        if name in self._pending:
            return
        self._pending[name] = {part: value.detach().cpu().contiguous() for part, value in entry.items()}
        self._pending_bytes += sum(bytes_of(value) for value in entry.values())
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is not on the disk yet.

        Raises:
            OutputError: The disk is full; what was written before stays usable.
        """
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        content, name = shard_bytes(pending, identity_of(self.facts))
        path = self.folder / name
        try:
            write_bytes_atomic(path, content)
        except OutputError as error:
            raise OutputError(f"{error} The {len(self):,} entries that were written before stay usable.") from error
        self._enter(path)

    def close(self) -> None:
        """Write the rest and let another process write; a second call does nothing."""
        try:
            if self.writes:
                self.flush()
                self._mend()
        finally:
            self._unlock()

    def __enter__(self) -> CacheStore:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self.close()
        else:  # what is pending may be what went wrong
            with suppress(OutputError):
                self.close()

    # reading ----------------------------------------------------------------------------------------------------

    def _open(self, wanted: Facts | None, on_stale: str) -> dict[str, Any]:
        try:
            stored = self._manifest()
            if wanted is not None:
                require_same(self.folder, stored, wanted, self.writes)
            return stored
        except (DataError, SettingError) as trouble:
            if not self.writes or wanted is None:
                raise
            mends = isinstance(trouble, DataError) and self._shards_are_of(wanted)
            if not mends and on_stale == "error":
                raise
        for path in () if mends else self._shard_files():
            path.unlink(missing_ok=True)
        write_json_atomic(self.folder / MANIFEST, manifest_of(wanted))
        return dict(wanted)

    def _shards_are_of(self, wanted: Facts) -> bool:
        """Whether all shards that are there say that they are of these facts; so a lost manifest can be made again."""
        return all(told_identity(path) in (None, identity_of(wanted)) for path in self._shard_files())

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.exists():
            raise DataError(
                f"There is no cache in {self.folder}: it has no {MANIFEST}. Make one: trimtab cache RUN.yaml FOLDER "
                "(--on-stale rebuild, where the folder holds what is left of one)."
            )
        try:
            content = read_json(path)
            facts = content["facts"]
            version = content["format"]
        except (DataError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({error}), so nobody knows what the cache is of. Make it anew: trimtab cache with "
                "--on-stale rebuild."
            ) from error
        if version != FORMAT:
            raise SettingError(
                f"The cache in {self.folder} has format {version!r}, and this trimtab knows {FORMAT}. Make it anew: "
                "trimtab cache with --on-stale rebuild."
            )
        return dict(facts)

    def _shard_files(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    def _read_shards(self) -> None:
        for path in self._shard_files():
            try:
                self._enter(path)
            except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
                self._note_broken(f"{path.name} cannot be read ({error})")
                if self.writes:
                    path.unlink(missing_ok=True)

    def _mend(self) -> None:
        """Write what is sound of damaged shards into new ones, and delete them."""
        while self._damaged:
            number = self._damaged.pop()
            for row, key in enumerate(self._shards[number].keys):
                if self._places.get(key, [])[-1:] == [(number, row)]:
                    entry = self._read(number, row)
                    if entry is not None:
                        self._pending[key] = entry
            self.flush()
            path = self._shards[number].path
            # Made anew with the same entries a shard has the same name, and now stands in the place of the damaged one.
            if all(later.path != path for later in self._shards[number + 1 :]):
                path.unlink(missing_ok=True)

    def _enter(self, path: Path) -> None:
        """Take a shard in, if its table is sound."""
        shard = open_shard(path, identity_of(self.facts))
        number = len(self._shards)
        self._shards.append(shard)
        for row, key in enumerate(shard.keys):
            self._places.setdefault(key, []).append((number, row))

    def _read(self, number: int, row: int) -> Entry | None:
        checked = (number, row) in self._checked
        entry = self._shards[number].read(row, check=not checked)
        if entry is not None:
            self._checked.add((number, row))
        return entry

    def _note_broken(self, what: str) -> None:
        self.broken += 1
        if self._warned:
            return
        self._warned = True
        after = "written anew" if self.writes else "computed anew in every epoch; trimtab cache mends the folder"
        warnings.warn(
            f"The cache in {self.folder} is damaged: {what}. Nothing of it is used; what is lost is {after}. Further "
            "damage is counted, not told.",
            TrimtabWarning,
            stacklevel=4,
        )

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)  # which gives the lock back


def differing(stored: Facts, wanted: Facts) -> list[str]:
    """Say in words how two caches differ, fact by fact; facts within facts are compared by themselves."""
    found = []
    for name in sorted({*stored, *wanted}):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{one}" for one in differing(old, new)]
        elif old != new:
            found.append(f"{name}: {old!r} there, {new!r} here")
    return found


def require_same(folder: Path, stored: Facts, wanted: Facts, writes: bool) -> None:
    """Refuse a cache of something else.

    Raises:
        SettingError: A fact differs; the message names each that does.
    """
    found = differing(stored, wanted)
    if found:
        remedy = "another folder, or on_stale='rebuild' (--on-stale rebuild)" if writes else "a cache made for this run"
        raise SettingError(f"The cache in {folder} is of something else: {'; '.join(found)}. Give {remedy}.")


def _lock(folder: Path) -> int:
    """Take the folder for writing."""
    import fcntl  # here, so that reading works where there is none

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror}. Choose another folder.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise OutputError(
            f"Another process (number {owner}) is writing the cache in {folder}. Wait for it, or choose another "
            "folder; a training may read the cache meanwhile."
        ) from error
    except OSError as error:
        os.close(lock)
        raise OutputError(
            f"Cannot lock {folder}: {error.strerror}. Its file system knows no locks (flock); choose another disk."
        ) from error
    with suppress(OSError):  # on a full disk; the number only serves a message
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
