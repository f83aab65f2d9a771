"""The command that measures a step under each launcher."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trimtab.records import read_record

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "launchers.py"


@pytest.fixture(scope="module")
def launchers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_launchers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_on_the_cpu_make_a_record(tmp_path: Path, launcher: str) -> None:
    if launcher.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    out = tmp_path / "record.json"
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--launcher", launcher, "--steps", "2", "--batch", "1", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    record = read_record(out)
    assert record["kind"] == "bench_launchers"
    assert record["settings"]["launcher"] == launcher
    assert (record["settings"]["deepspeed"] is None) == (not launcher.startswith("zero"))
    modes = {one["mode"]: one for one in record["results"]["modes"]}
    assert list(modes) == ["plain", "fast", "slow"]
    assert modes["plain"]["ratio"] == 1
    assert record["results"]["timing"]["repeats"] == 2
    for one in modes.values():
        assert one["seconds"] > 0
        assert len(one["peak_mib_by_rank"]) == 2
        assert min(one["peak_mib_by_rank"]) > 0
    # 144 visual tokens become 14: the activations of a fast step are a fraction of those of a plain one.
    assert max(modes["fast"]["peak_mib_by_rank"]) < min(modes["plain"]["peak_mib_by_rank"])
    assert record["results"]["dualspeed_speedup"] == pytest.approx(
        modes["plain"]["seconds"] / (0.9 * modes["fast"]["seconds"] + 0.1 * modes["slow"]["seconds"])
    )


@pytest.mark.parametrize("launcher", ["zero2", "zero3"])
def test_zero_without_deepspeed_says_what_to_install(
    launchers: ModuleType,
    launcher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    monkeypatch.setattr(launchers, "start", lambda options: pytest.fail("nothing may be started"))
    assert launchers.main(["--launcher", launcher, "--out", str(tmp_path / "record.json")]) == 2
    assert f"`--launcher {launcher}` needs the package deepspeed" in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "real"], "--size real with --processes 2 needs as many GPUs, but 1 are here"),
        (["--processes", "1"], "launchers.processes must be at least 2, but 1 came"),
        (["--steps", "0"], "launchers.steps must be at least 1, but 0 came"),
        (["--batch", "-1"], "launchers.batch must be at least 1, but -1 came"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    launchers: ModuleType,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launchers, "start", lambda options: pytest.fail("nothing may be started"))
    assert launchers.main(["--launcher", "ddp", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "launcher"), [(2, "ddp"), (2, "zero3"), (0, "fsdp2"), (0, "zero2")])
def test_the_launcher_gets_its_file_and_the_settings(
    launchers: ModuleType, gpus: int, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        returncode = 7

    commands: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launchers, "find_spec", lambda name: object())
    monkeypatch.setattr(launchers.subprocess, "run", lambda command, **_: commands.append(command) or Ended())
    assert launchers.main(["--launcher", launcher, "--steps", "3"]) == 7
    (command,) = commands
    with_file = gpus == 2
    assert (str(ROOT / "examples" / "accelerate" / f"{launcher}.yaml") in command) == with_file
    assert ("torch.distributed.run" in command) != with_file
    worker = command[command.index("--worker") :]
    assert worker[worker.index("--steps") + 1] == "3"


def test_the_real_model_has_the_shapes_of_llava_1_5_7b(launchers: ModuleType) -> None:
    model = launchers.build_model("real", "meta")
    assert sum(one.numel() for one in model.parameters()) == 7_063_427_072
    assert model.dtype == torch.bfloat16
    assert not any(one.requires_grad for one in model.model.vision_tower.parameters())
    batch = launchers.make_batch(model, 2, 64, 32, 0)
    assert batch["input_ids"].shape == (2, 576 + 64)
