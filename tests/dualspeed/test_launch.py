"""The launchers: example configurations, a run of two processes, and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.dualspeed.ranks import free_port
from transformers import LlavaForConditionalGeneration

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

DYING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, ".")
import tests.conftest
from transformers import Trainer
from tests.dualspeed.common import training_arguments
from tests.tiny import TinyRows, collate, tiny_llava
import trimtab

class Dying(Trainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2 and os.environ["RANK"] == "1":  # dies between forward and backward
            self.accelerator.backward = lambda loss, **_: os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

trimtab.with_dualspeed(Dying)(
    model=tiny_llava(), args=training_arguments(Path(sys.argv[1]), ddp_backend="gloo"), train_dataset=TinyRows(),
    data_collator=collate, dualspeed={"keep_ratio": 0.2, "slow_ratio": 0.5},
).train()
print("finished", os.environ["RANK"])
"""


def test_there_is_a_configuration_for_every_launcher() -> None:
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert config.mixed_precision == "bf16"
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[path.stem]
    assert config.distributed_type.value == kind
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_the_plugin_that_accelerate_makes_of_fsdp2_is_what_the_tests_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher hands its settings over in the environment; read them back as a launched process does."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(path), str(ROOT / "examples" / "two_gpus.py")])
    settings = load_config_from_file(str(path))
    for name, value in {**settings.fsdp_config, "use_fsdp": True, "num_machines": 1, "num_processes": 2}.items():
        setattr(args, name, value)
    args.mixed_precision, args.dynamo_backend, args.main_process_port = "no", "no", free_port()
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer", "CLIPEncoderLayer"]


@pytest.mark.slow
def test_two_processes_run_the_example(tmp_path: Path) -> None:
    port = str(free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    ended = subprocess.run(
        [*command, str(ROOT / "examples" / "two_gpus.py"), str(tmp_path / "out")],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "trained by 2 processes" in ended.stdout
    _, info = LlavaForConditionalGeneration.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {file.name for file in (tmp_path / "out" / "dualspeed").iterdir()} == {
        "dualspeed.json", "isolator.safetensors",
    }  # fmt: skip


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_with_an_error(tmp_path: Path) -> None:
    """Without any launcher that would end it: what waits for the dead rank must raise by itself."""
    common = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(tmp_path)], env={**common, "RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        assert started[1].wait(timeout=200) == -signal.SIGKILL
        death = time.monotonic()
        told, errors = started[0].communicate(timeout=60)
        assert time.monotonic() - death < 60
        assert started[0].returncode not in (0, None)
        assert "finished" not in told
        assert "Connection" in errors or "connection" in errors, errors[-2000:]
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_when_one_process_is_killed_the_launcher_ends_with_an_error(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    ended = subprocess.run(
        [*command, str(free_port()), str(script), str(tmp_path / "out")],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "finished" not in ended.stdout
    assert "SIGKILL" in ended.stderr, "the launcher names the process that was killed"
