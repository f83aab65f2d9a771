"""`trimtab cache`: says the size first, makes or completes the cache, and training runs on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.test_cli import run
from tests.run.small_run import TOKENS, settings, write_run

from trimtab.dualspeed.cache_store import CacheStore
from trimtab.run import cache as verb

IMAGES = 8
PICKY = {"pruner": "divprune", "pruner_options": {"pre_projector": True}, "keep_ratio": 0.25, "isolator_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    write_run(place)
    return place


@pytest.fixture
def make(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a cache with changed settings and returns its results."""

    def made(*options: str, **changes: Any) -> dict[str, Any]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**settings(folder), "output_dir": str(tmp_path / "out"), **changes}))
        assert run("cache", str(path), str(tmp_path / "cache"), "--json", *options) == 0, capsys.readouterr().err
        record = json.loads(capsys.readouterr().out)
        assert record["kind"] == "cache"
        return dict(record["results"])

    return made


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "dualspeed"),
    [("features", {}), ("features", {"pruner": "visionzip"}), ("kept", PICKY), ("indices", PICKY)],
)
def test_the_size_that_is_said_is_the_size_on_the_disk(
    kind: str, dualspeed: dict[str, Any], dtype: str, make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    told = make("--dry-run", "--kind", kind, "--dtype", dtype, dualspeed=dualspeed)
    assert not (tmp_path / "cache").exists()
    done = make("--kind", kind, "--dtype", dtype, dualspeed=dualspeed)
    assert done["bytes"] == told["bytes"]
    assert done["bytes"] == pytest.approx(done["written"], rel=0.02)
    assert done["bytes"] == pytest.approx(on_disk(tmp_path / "cache"), rel=0.02)
    assert done["bytes_per_image"] == done["bytes"] / IMAGES
    assert (done["images"], done["tiles"]) == (IMAGES, IMAGES)
    assert done["tokens_per_image"] == (TOKENS if kind == "features" else TOKENS // 4)
    assert done["made"] == IMAGES + (kind == "features")  # and a blank image


def test_the_size_comes_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_make", stop)
    assert run("cache", str(folder / "run.yaml"), str(tmp_path / "cache")) == 130
    told = capsys.readouterr().out
    for word in ("images", "bytes_per_image", "tokens_per_image", "free", "KiB"):
        assert word in told


@pytest.mark.filterwarnings("default::trimtab.errors.TrimtabWarning")
def test_it_goes_on_where_it_was_stopped_and_mends_what_is_damaged(
    make: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after = 2
    batches = verb._batches

    def few(*args: Any) -> Any:
        for number, batch in enumerate(batches(*args)):
            if number == stop_after:
                raise KeyboardInterrupt
            yield batch

    verb._batches, rows = few, 2
    try:
        with pytest.raises(AssertionError):
            make()
    finally:
        verb._batches = batches
    assert len(CacheStore(tmp_path / "cache")) == stop_after * rows
    capsys.readouterr()
    done = make()
    assert (done["images_found"], done["made"]) == (stop_after * rows, IMAGES - stop_after * rows + 1)
    assert make()["made"] == 0
    for path in (tmp_path / "cache").glob("shard-*"):
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)
    mended = make()
    assert mended["broken"] >= 1
    assert mended["made"] >= 1
    assert make()["broken"] == 0


def test_training_reads_what_was_made(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    from trimtab.run.config import load_config
    from trimtab.run.train import train

    make("--dtype", "float32")
    losses = {}
    for name, extra in (("plain", {}), ("cached", {"cache_from": str(tmp_path / "cache")})):
        content = yaml.safe_load((tmp_path / "run.yaml").read_text())
        content |= {"output_dir": str(tmp_path / name), "dualspeed": {**content["dualspeed"], **extra}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        results = train(load_config(path))["results"]
        losses[name] = results["loss"]
    assert results["metrics"]["cache_hits"] == IMAGES
    assert results["metrics"]["cache_misses"] == 0
    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-5)


def test_an_image_in_several_rows_counts_once(make: Callable[..., dict[str, Any]], folder: Path) -> None:
    again = folder / "again.jsonl"
    again.write_text((folder / "train.jsonl").read_text() * 2)
    done = make(data_files=[str(again)])
    assert (done["images"], done["made"]) == (IMAGES, IMAGES + 1)


def test_a_cache_that_does_not_fit_is_not_begun(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run("cache", str(folder / "run.yaml"), str(tmp_path / "cache")) == 2
    told = capsys.readouterr().err
    assert "bytes, but 1,000 are free" in told
    assert "Free some space" in told
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [(["--kind", "all"], {}, "kind must be one of features, kept, indices, but 'all' came"),
     (["--dtype", "int8"], {}, "dtype must be one of float32, bfloat16, float16, but 'int8' came"),
     (["--on-stale", "ask"], {}, "'error' or 'rebuild', but 'ask' came"),
     (["--kind", "kept"], {}, "The choice of the pruner 'divprune' cannot be stored"),
     ([], {"freeze": []}, "The vision tower trains"),
     ([], {"data_files": ["text.jsonl"]}, "No row holds an image")],
)  # fmt: skip
def test_bad_input_is_one_message(
    options: list[str], changes: dict[str, Any], words: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], "images": []}
    (tmp_path / "text.jsonl").write_text(json.dumps(row) + "\n")
    if "data_files" in changes:
        changes = {"data_files": [str(tmp_path / "text.jsonl")]}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings(folder), "output_dir": str(tmp_path / "out"), **changes}))
    assert run("cache", str(path), str(tmp_path / "cache"), *options) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert words in told
    assert "Traceback" not in told


def test_a_cache_of_other_settings_is_rebuilt_on_request_only(
    make: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("--dtype", "float32")
    path = str(tmp_path / "run.yaml")
    assert run("cache", path, str(tmp_path / "cache")) == 2
    assert "dtype: 'float32' there, 'bfloat16' here" in " ".join(capsys.readouterr().err.split())
    assert make("--on-stale", "rebuild")["made"] == IMAGES + 1
