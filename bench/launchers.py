"""Time fast, slow and plain training steps under DDP, FSDP2, ZeRO-2 or ZeRO-3, with random weights.

    python bench/launchers.py --launcher ddp --processes 2
    python bench/launchers.py --launcher fsdp2 --processes 8 --size real --out bench/records/fsdp2_8_gpus.json

The command starts the processes itself: on GPUs with ``accelerate launch`` and the file of `examples/accelerate`, on
the CPU with ``torchrun``. ``real`` has the shapes of LLaVA-1.5-7B and
needs a GPU for each process. The vision tower is frozen. A plain step is the model's own loss on all tokens. The
optimizer does its work at a learning rate of 0, so that every step sees the same weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.errors import MissingExtraError, SettingError, TrimtabError, setting_error

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ("ddp", "fsdp2", "zero2", "zero3")
MODES = ("plain", "fast", "slow")
KEEP_RATIO, SLOW_RATIO, SEED = 0.1, 0.1, 0
TEXT, ANSWER = {"toy": 12, "real": 64}, {"toy": 6, "real": 32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.worker:
            measure(options)
            return 0
        refuse(options)
        return start(options)
    except TrimtabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=LAUNCHERS, required=True)
    parser.add_argument("--processes", type=int, default=2, help="how many, one per GPU")
    parser.add_argument("--size", choices=tuple(TEXT), default="toy")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each mode")
    parser.add_argument("--batch", type=int, default=2, help="rows of each process, one image each")
    parser.add_argument("--out", type=Path, help="where the record goes; printed only where left out")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def refuse(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured here.

    Raises:
        SettingError: A number is out of its range, or there are too few GPUs.
        MissingExtraError: ZeRO without deepspeed.
    """
    for name, least in (("processes", 2), ("steps", 1), ("batch", 1)):
        if getattr(options, name) < least:
            raise setting_error("launchers", name, f"at least {least}", getattr(options, name))
    if options.launcher.startswith("zero") and find_spec("deepspeed") is None:
        raise MissingExtraError(
            f"`--launcher {options.launcher}` needs the package deepspeed. Install it: pip install deepspeed."
        )
    if options.size == "real" and _gpus() < options.processes:
        raise SettingError(
            f"--size real with --processes {options.processes} needs as many GPUs, but {_gpus()} are here. Give a "
            "smaller --processes, or --size toy, which also runs on the CPU."
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def start(options: argparse.Namespace) -> int:
    """Start the processes, wait for them and return their exit status."""
    on_gpus = _gpus() >= options.processes
    given = ["--launcher", options.launcher, "--processes", options.processes, "--size", options.size]
    given += ["--steps", options.steps, "--batch", options.batch, *(("--out", options.out) if options.out else ())]
    if on_gpus:
        config = ROOT / "examples" / "accelerate" / f"{options.launcher}.yaml"
        launch = ["accelerate.commands.launch", "--config_file", config, "--num_processes", options.processes]
    else:
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", options.processes]
    command = [sys.executable, "-m", *map(str, launch), str(Path(__file__).resolve()), "--worker", *map(str, given)]
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # Under this name accelerate would leave deepspeed out, and under the other it would choose it.
    on_cpu["ACCELERATE_USE_DEEPSPEED" if options.launcher.startswith("zero") else "ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(command, env={**os.environ, **({} if on_gpus else on_cpu)}, check=False).returncode


def measure(options: argparse.Namespace) -> None:
    """Measure in one of the processes; the first one makes the record."""
    import torch
    from torch import distributed

    from trimtab import DualSpeedConfig, attach
    from trimtab.bench import peak_memory, time_steps
    from trimtab.records import make_record, write_record

    started = datetime.now(timezone.utc)
    accelerator = _accelerator(options)
    torch.manual_seed(SEED)
    model = build_model(options.size, accelerator.device)
    batch = make_batch(model, options.batch, TEXT[options.size], ANSWER[options.size], distributed.get_rank())
    handle = attach(model, DualSpeedConfig(keep_ratio=KEEP_RATIO, slow_ratio=SLOW_RATIO, seed=SEED))
    # In a plain step the isolator has no part; give it the zero gradient for which the other processes wait.
    model.register_forward_hook(partial(_reach_isolator, handle))
    wrapped, optimizer = _prepare(accelerator, model, options)
    step = Stepper(accelerator, handle, wrapped, optimizer, batch)
    timing = time_steps({mode: partial(step, mode) for mode in MODES}, repeats=options.steps)
    peaks = {mode: peak_memory(partial(step, mode), accelerator.device) for mode in MODES}
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, {"timing": timing, "peaks": peaks})
    if distributed.get_rank() == 0:
        settings = {
            "launcher": options.launcher, "processes": options.processes, "size": options.size, "steps": options.steps,
            "batch": options.batch, "device": accelerator.device.type, "dtype": str(model.dtype),
            "mixed_precision": accelerator.mixed_precision, "dualspeed": handle.config.to_dict(),
            "deepspeed": metadata.version("deepspeed") if options.launcher.startswith("zero") else None,
        }  # fmt: skip
        seconds = (datetime.now(timezone.utc) - started).total_seconds()
        results = summarise(everyone)
        record = make_record("bench_launchers", settings, results, seed=SEED, started=started, seconds=seconds)
        for one in results["modes"]:
            peak = max(one["peak_mib_by_rank"])
            told = f"{one['seconds']:.4f} s, {one['ratio']:.2f} times as fast as plain, peak {peak:.0f} MiB"
            sys.stdout.write(f"{one['mode']}: {told}\n")
        if options.out is not None:
            write_record(options.out, record)
    distributed.destroy_process_group()


def summarise(everyone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put together what the processes measured; the times are those of the first, which waits for the others."""
    timing = everyone[0]["timing"]
    seconds = {mode: timing["steps"][mode]["median"] for mode in MODES}
    modes = [
        {
            "mode": mode,
            "seconds": seconds[mode],
            "ratio": timing["ratios"][mode]["median"],
            "peak_mib_by_rank": [one["peaks"][mode]["mib"] for one in everyone],
            "held_before_mib_by_rank": [one["peaks"][mode]["held_before_mib"] for one in everyone],
        }
        for mode in MODES
    ]
    mean = (1 - SLOW_RATIO) * seconds["fast"] + SLOW_RATIO * seconds["slow"]
    return {"modes": modes, "dualspeed_speedup": seconds["plain"] / mean, "timing": timing}


def _accelerator(options: argparse.Namespace) -> Any:
    # Every process builds the same weights itself; there is no checkpoint that one would read for all.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    given: dict[str, Any] = {"cpu": os.environ.get("ACCELERATE_USE_CPU") == "true"}
    if options.launcher.startswith("zero") and os.environ.get("DS_ACCELERATOR") == "cpu":
        import deepspeed
        from accelerate.utils import DeepSpeedPlugin

        given["deepspeed_plugin"] = DeepSpeedPlugin(zero_stage=int(options.launcher[-1]))

        # Its own collective for CPUs would be compiled first, by all processes at once; gloo's do the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from accelerate import Accelerator

    accelerator = Accelerator(**given)
    kinds = {"ddp": ("MULTI_GPU", "MULTI_CPU"), "fsdp2": ("FSDP", "MULTI_CPU")}.get(options.launcher, ("DEEPSPEED",))
    if accelerator.distributed_type.value not in kinds:
        raise SettingError(
            f"--launcher {options.launcher} was asked for, but accelerate runs {accelerator.distributed_type.value} "
            f"with {accelerator.num_processes} processes. Start this command itself, without --worker, with 2 or more "
            "--processes."
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        rows = {"train_micro_batch_size_per_gpu": options.batch, "train_batch_size": options.batch * options.processes}
        plugin.deepspeed_config.update(**rows, **own)
    return accelerator


def _prepare(accelerator: Any, model: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Wrap model and optimizer for the launcher."""
    import torch

    if accelerator.device.type == "cpu" and options.launcher == "fsdp2":  # accelerate uses FSDP on accelerators only
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for module in list(model.modules()):
            if type(module).__name__ in ("LlamaDecoderLayer", "CLIPEncoderLayer"):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(_trained(model), lr=0.0)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(_trained(model), lr=0.0))
    return wrapped, optimizer


def _trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _reach_isolator(handle: Any, module: Any, args: Any, output: Any) -> Any:
    if handle.config.prunes_nothing:
        output["loss"] = output["loss"] + 0 * handle.isolator().sum()
    return output


class Stepper:
    """Forward, backward and optimizer once, in a mode."""

    def __init__(self, accelerator: Any, handle: Any, model: Any, optimizer: Any, batch: dict[str, Any]) -> None:
        from trimtab import DualSpeedConfig

        self.accelerator, self.handle, self.model = accelerator, handle, model
        self.optimizer, self.batch = optimizer, batch
        self.dualspeed = handle.config
        self.plain = DualSpeedConfig(keep_ratio=1.0, slow_ratio=0.0, isolator_tokens=0)

    def __call__(self, mode: str) -> None:
        """Take a step.

        Args:
            mode: ``"plain"`` for the model's own loss on all tokens, ``"fast"`` or ``"slow"``.
        """
        self.handle.config = self.plain if mode == "plain" else self.dualspeed
        try:
            with self.handle.force_mode(None if mode == "plain" else mode):
                loss = self.model(**self.batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        finally:
            self.handle.config = self.dualspeed


def build_model(size: str, device: Any) -> Any:
    """Return a LLaVA with random weights and a frozen vision tower, in training mode.

    Args:
        size: ``"toy"``, or ``"real"`` for the shapes of LLaVA-1.5-7B, in bfloat16 and with activation checkpointing.
        device: Where it is built.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision, text = {
        "toy": (
            {"hidden_size": 64, "intermediate_size": 128, "image_size": 96, "patch_size": 8, **small},
            {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, **small},
        ),
        "real": (
            {
                "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336, "patch_size": 14,
                "num_hidden_layers": 24, "num_attention_heads": 16,
            },
            {
                "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32064, "num_hidden_layers": 32,
                "num_attention_heads": 32, "max_position_embeddings": 4096,
            },
        ),
    }[size]  # fmt: skip
    image = text["vocab_size"] - 1
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_index=image
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if size == "toy" else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).train()
    finally:
        torch.set_default_dtype(before)
    model.model.vision_tower.requires_grad_(False)
    if size == "real":
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(model: Any, rows: int, text: int, answer: int, rank: int) -> dict[str, Any]:
    """Return rows of one image, `text` random words behind it and labels on the last `answer` of them."""
    import torch

    config = model.config
    side = config.vision_config.image_size
    visual = (side // config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(1000 * SEED + rank)
    words = torch.randint(3, config.image_token_id - 1, (rows, text), generator=generator)
    ids = torch.cat([torch.full((rows, visual), config.image_token_id), words], 1)
    labels = ids.clone()
    labels[:, :-answer] = -100
    pixels = torch.randn(rows, 3, side, side, generator=generator).to(model.dtype)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in batch.items()}


if __name__ == "__main__":
    sys.exit(main())
