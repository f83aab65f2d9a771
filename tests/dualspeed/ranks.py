"""Run a function on two processes (gloo on the CPU), and compare gradients with those of one process."""

from __future__ import annotations

import datetime
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.tiny import FAMILIES, gradients
from torch import Tensor, distributed

import trimtab
from trimtab import DualSpeedConfig

HANG = 60
"""Seconds after which a collective that waits for another rank gives up."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_ranks(folder: Path, work: Callable[..., Any], *arguments: Any, world: int = 2, group: bool = True) -> list[Any]:
    """Call ``work(*arguments)`` in several processes at once.

    Args:
        folder: Where answers are handed over; made where it is missing.
        work: A function of a module.
        *arguments: Its arguments.
        world: Number of processes.
        group: Whether to start the process group; a Trainer starts its own.

    Returns:
        What each rank returned, or ``{"error", "kind", "trace"}`` where it raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = torch.multiprocessing.spawn(
        _one_rank, (world, port, folder, group, work, arguments), nprocs=world, join=False
    )
    end = time.monotonic() + 5 * HANG
    while not running.join(timeout=1):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            raise AssertionError(f"the ranks still run after {5 * HANG} seconds")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _one_rank(
    rank: int, world: int, port: int, folder: Path, group: bool, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        HF_HUB_OFFLINE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    if group:
        distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANG))
    try:
        found = work(*arguments)
    except Exception as error:
        found = {
            "error": error.args, "kind": [c.__name__ for c in type(error).__mro__], "trace": traceback.format_exc(),
        }  # fmt: skip
    torch.save(found, folder / f"rank{rank}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Case:
    """One comparison of gradients.

    Attributes:
        wrap: ``"ddp"``, ``"ddp_find"`` (with a search for unused parameters) or ``"fsdp2"``.
        modes: Mode of each step; the gradients of all steps are summed.
        images: For each rank the images of each of its rows.
        family: Key in `FAMILIES`.
        settings: Of DualSpeed.
        frozen: Prefixes of parameters that do not train.
        checkpointing: Whether activations are recomputed in the backward pass.
        unlabelled: A rank none of whose places is supervised, or None.
    """

    wrap: str
    modes: tuple[str, ...] = ("fast", "slow")
    images: tuple[Sequence[int], Sequence[int]] = ((1, 0, 2), (1, 1))
    family: str = "llava"
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    checkpointing: bool = False
    unlabelled: int | None = None


def compare(cases: dict[str, Case]) -> dict[str, Any]:
    """Return for each case how far the gradients of this rank are from those of one process, and their names."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found[name] = _compare(case)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            break  # the other rank may wait for this one in vain
    return found


def _compare(case: Case) -> dict[str, Any]:
    alone, batches = _make(case)
    expected = _mean_of_ranks(alone, case, batches)
    model, _ = _make(case)
    with _handle(model, case) as handle:
        wrapped = _wrap(case, model)
        for mode in case.modes:
            with handle.force_mode(mode):
                wrapped(**batches[distributed.get_rank()]).loss.backward()
        found = {name: _whole(gradient) for name, gradient in gradients(model).items()}
    return {
        "difference": max(float((found[name] - expected[name]).abs().max()) for name in expected),
        "largest": max(float(gradient.abs().max()) for gradient in expected.values()),
        "missing": sorted(expected.keys() - found.keys()),
        "more": sorted(name for name in found.keys() - expected.keys() if found[name].any()),
        "isolator": float(expected["dualspeed_isolator.rows"].abs().max()),
    }


def _make(case: Case) -> tuple[Any, list[dict[str, Any]]]:
    family = FAMILIES[case.family]
    model = family.build_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(case.frozen) if case.frozen else True)
    batches = [family.make_batch(model, images, seed=rank) for rank, images in enumerate(case.images)]
    if case.unlabelled is not None:
        batches[case.unlabelled]["labels"].fill_(-100)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, batches


class _handle:  # noqa: N801, reads like the function it stands for
    def __init__(self, model: Any, case: Case) -> None:
        self.handle = trimtab.attach(model, DualSpeedConfig(**{"keep_ratio": 0.2, "seed": 2, **case.settings}))

    def __enter__(self) -> Any:
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.filterwarnings("ignore", message="A batch has no supervised label")
        return self.handle

    def __exit__(self, *_: Any) -> None:
        self.caught.__exit__(*_)
        self.handle.detach()


def _mean_of_ranks(model: Any, case: Case, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients of the mean over ranks, taken in one process without a group of processes in sight."""
    import unittest.mock

    with unittest.mock.patch.object(distributed, "is_initialized", return_value=False), _handle(model, case) as handle:
        for step, mode in enumerate(case.modes):
            for batch in batches:
                handle.micro_step = step
                with handle.force_mode(mode):
                    (model(**batch).loss / len(batches)).backward()
        return gradients(model)


def _wrap(case: Case, model: Any) -> Any:
    if case.wrap.startswith("ddp"):
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, find_unused_parameters=case.wrap == "ddp_find")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    kinds = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        fully_shard(model.get_input_embeddings(), mesh=mesh)
        fully_shard(model.get_output_embeddings(), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
