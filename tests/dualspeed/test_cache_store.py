"""The folder of a cache: what is written is whole, what is damaged is noticed, and one process writes at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.dualspeed import cache_store
from trimtab.dualspeed.cache_shard import size_on_disk
from trimtab.dualspeed.cache_store import MANIFEST, CacheStore
from trimtab.errors import DataError, OutputError, SettingError, TrimtabWarning

FACTS = {"kind": "features", "tower": {"weights": "a", "layer": -2}, "observed": ["keys"]}


def key(number: int) -> str:
    return f"{number:032x}"


def entry(number: int, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    states = torch.randn(rows, 2, 8, generator=generator).bfloat16()
    return {"states": states, "index": torch.arange(number, number + rows, dtype=torch.int32)}


def write(folder: Path, numbers: range, **settings: Any) -> None:
    with CacheStore(folder, FACTS, write=True, **settings) as store:
        for number in numbers:
            store.put(key(number), entry(number, 1 + number % 3))


def sound(folder: Path, numbers: range) -> list[int]:
    """Return which entries are there, and check that they are what was stored."""
    store, found = CacheStore(folder, FACTS), []
    for number in numbers:
        stored = store.get(key(number))
        if stored is not None:
            found.append(number)
            for name, value in entry(number, 1 + number % 3).items():
                assert stored[name].dtype == value.dtype
                assert torch.equal(stored[name], value)
    return found


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    write(tmp_path, range(10), shard_bytes=200)
    assert len(shards(tmp_path)) > 2
    assert sound(tmp_path, range(12)) == list(range(10))
    assert len(CacheStore(tmp_path)) == 10


def test_a_writer_sees_what_it_has_not_written_yet_and_stores_nothing_twice(tmp_path: Path) -> None:
    with CacheStore(tmp_path, FACTS, write=True) as store:
        store.put(key(1), entry(1))
        store.put(key(1), entry(2))
        stored = store.get(key(1))
        assert stored is not None
        assert torch.equal(stored["states"], entry(1)["states"])
        assert len(store) == 1
        assert shards(tmp_path) == []
    assert len(shards(tmp_path)) == 1


def test_a_second_writing_goes_on(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    before = shards(tmp_path)[0].read_bytes()
    write(tmp_path, range(5, 9))
    assert sound(tmp_path, range(9)) == list(range(9))
    assert before in [path.read_bytes() for path in shards(tmp_path)]


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    write(tmp_path, range(300))
    empty = {"states": torch.empty(0, 2, 8, dtype=torch.bfloat16), "index": torch.empty(0, dtype=torch.int32)}
    rows = sum(1 + number % 3 for number in range(300))
    told = size_on_disk(300, {"states": rows, "index": rows}, empty, FACTS)
    assert told == pytest.approx(CacheStore(tmp_path).bytes_on_disk, rel=0.005)
    assert told == pytest.approx(sum(path.stat().st_size for path in tmp_path.iterdir()), rel=0.005)


# damage ---------------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    path = shards(tmp_path)[0]
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.warns(TrimtabWarning, match="is damaged"):
            assert len(sound(tmp_path, range(3))) < 3, place
    path.write_bytes(content)
    assert sound(tmp_path, range(3)) == [0, 1, 2]


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_shard_is_noticed_and_made_anew(left: int, tmp_path: Path) -> None:
    write(tmp_path, range(3))
    path = shards(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:left])
    with pytest.warns(TrimtabWarning, match=rf"{path.name} cannot be read.*trimtab cache mends"):
        assert sound(tmp_path, range(3)) == []
    assert path.exists()  # a reader changes nothing
    with pytest.warns(TrimtabWarning, match="written anew"):
        write(tmp_path, range(3))
    assert sound(tmp_path, range(3)) == [0, 1, 2]


def test_a_damaged_entry_is_told_once_and_can_be_stored_again(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    path = shards(tmp_path)[0]
    content = path.read_bytes()
    place = content.index(entry(2, 3)["states"].view(torch.uint8).numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with CacheStore(tmp_path, FACTS, write=True) as store:
        with pytest.warns(TrimtabWarning, match=f"failed its checksum .key {key(2)}"):
            assert store.get(key(2)) is None
        assert store.broken == 1
        assert store.get(key(1)) is not None
        store.put(key(2), entry(2, 3))
    assert not path.exists()  # what was sound of it has moved
    assert sound(tmp_path, range(3)) == [0, 1, 2]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": 1}'])
def test_a_lost_manifest_is_told_to_a_reader_and_mended_by_a_writer(content: str | None, tmp_path: Path) -> None:
    write(tmp_path, range(3))
    before = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).unlink()
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="no cache" if content is None else "manifest.json is damaged"):
        CacheStore(tmp_path, FACTS)
    CacheStore(tmp_path, FACTS, write=True).close()
    assert (tmp_path / MANIFEST).read_text() == before
    assert sound(tmp_path, range(3)) == [0, 1, 2]


def test_a_lost_manifest_over_shards_of_something_else_is_not_guessed(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    (tmp_path / MANIFEST).unlink()
    other = {**FACTS, "kind": "kept"}
    with pytest.raises(DataError, match="on-stale rebuild"):
        CacheStore(tmp_path, other, write=True)
    assert len(shards(tmp_path)) == 1
    CacheStore(tmp_path, other, write=True, on_stale="rebuild").close()
    assert shards(tmp_path) == []


def test_what_differs_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    other = {"kind": "features", "tower": {"weights": "b", "layer": -2}, "observed": ["keys"]}
    for settings in ({}, {"write": True}):
        with pytest.raises(SettingError, match=r"of something else: tower.weights: 'a' there, 'b' here") as told:
            CacheStore(tmp_path, other, **settings)
        assert "layer" not in str(told.value)
    CacheStore(tmp_path, other, write=True, on_stale="rebuild").close()
    assert shards(tmp_path) == []
    assert json.loads((tmp_path / MANIFEST).read_text())["facts"] == other


def test_another_format_is_told(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    content = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(SettingError, match="has format 99, and this trimtab knows 1"):
        CacheStore(tmp_path, FACTS)
    with pytest.raises(SettingError, match="'error' or 'rebuild', but 'ask' came"):
        CacheStore(tmp_path, FACTS, on_stale="ask")  # type: ignore[arg-type]


# several processes, and the end of one ------------------------------------------------------------------------------

WRITER = """
import sys, time, torch
from pathlib import Path
from tests.dualspeed.test_cache_store import FACTS, entry, key
from trimtab.dualspeed.cache_store import CacheStore
store = CacheStore(sys.argv[1], FACTS, write=True, shard_bytes=300)
for number in range(int(sys.argv[2])):
    store.put(key(number), entry(number, 1 + number % 3))
print("written", flush=True)
time.sleep(float(sys.argv[3]))
store.close()
"""


def start(folder: Path, count: int, wait: float, stderr: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(count), str(wait)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_two_processes_may_not_write_at_once_and_one_may_read_meanwhile(tmp_path: Path) -> None:
    first = start(tmp_path, 20, 30)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "written\n"
        first.stdout.close()
        found = sound(tmp_path, range(20))
        assert 0 < len(found) < 20  # the last shard is still in the other process
        second = start(tmp_path, 5, 0, subprocess.PIPE)
        _, told = second.communicate(timeout=60)
        assert second.returncode != 0
        assert f"Another process (number {first.pid}) is writing the cache" in told
        with pytest.raises(OutputError, match=f"number {first.pid}"):
            CacheStore(tmp_path, FACTS, write=True)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=60)
    # A process that was killed keeps no lock, and what it had written is whole.
    assert sound(tmp_path, range(20)) == found
    write(tmp_path, range(20))
    assert sound(tmp_path, range(20)) == list(range(20))


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    part = tmp_path / ".shard-0123.safetensors.ab12.part"
    part.write_bytes(b"half")
    assert sound(tmp_path, range(3)) == [0, 1, 2]
    CacheStore(tmp_path, FACTS, write=True).close()
    assert not part.exists()


LIMITED = """
import resource, signal, sys
from tests.dualspeed.test_cache_store import FACTS, entry, key
from trimtab.dualspeed.cache_store import CacheStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = CacheStore(sys.argv[1], FACTS, write=True, shard_bytes=10**9)
for number in range(3):
    store.put(key(number), entry(number, 1 + number % 3))
store.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with store:
    for number in range(3, 400):
        store.put(key(number), entry(number, 1 + number % 3))
"""


def test_a_disk_that_fills_up_costs_only_what_was_not_written(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode != 0
    assert "OutputError: Cannot write" in run.stderr
    assert "The 3 entries that were written before stay usable" in run.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
    assert sound(tmp_path, range(10)) == [0, 1, 2]
    write(tmp_path, range(10))
    assert sound(tmp_path, range(10)) == list(range(10))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot write .*Choose another folder"):
        CacheStore(tmp_path / "file", FACTS, write=True)


def store_then_fail(folder: Path, number: int, error: BaseException | None) -> None:
    with CacheStore(folder, FACTS, write=True) as store:
        store.put(key(number), entry(number, 1 + number % 3))
        if error is not None:
            raise error


def test_an_error_inside_keeps_what_is_sound_and_gives_the_lock_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        store_then_fail(tmp_path, 1, KeyboardInterrupt())
    assert sound(tmp_path, range(3)) == [1]

    def full(path: Path, content: bytes) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(cache_store, "write_bytes_atomic", full)
    with pytest.raises(OutputError, match="no space The 1 entries"):
        store_then_fail(tmp_path, 2, None)
    monkeypatch.undo()
    CacheStore(tmp_path, FACTS, write=True).close()


@pytest.mark.parametrize("entries", [1, 3])
def test_a_shard_of_which_nothing_is_sound_is_mended_under_its_own_name(entries: int, tmp_path: Path) -> None:
    write(tmp_path, range(entries))
    (path,) = shards(tmp_path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8:start])["states"]["data_offsets"]
    content[start + first : start + last] = bytes(255 - one for one in content[start + first : start + last])
    path.write_bytes(bytes(content))
    with CacheStore(tmp_path, FACTS, write=True) as store:
        with pytest.warns(TrimtabWarning, match="failed its checksum"):
            assert not any(store.get(key(number)) for number in range(entries))
        for number in range(entries):
            store.put(key(number), entry(number, 1 + number % 3))
    assert shards(tmp_path) == [path]
    assert sound(tmp_path, range(entries)) == list(range(entries))
