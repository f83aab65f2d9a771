"""What several tests of DualSpeed share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

import trimtab
from trimtab import DualSpeedConfig

ROWS = (1, 0, 2)
"""Images per row of the usual batch: one, none, two."""

SUM_ORDER = {"atol": 2e-5, "rtol": 1e-4}
"""Same float32 numbers summed in another order (gathered rows, chunks, micro-batches) over losses of order one."""


@contextmanager
def attached(model: Any, **settings: Any) -> Iterator[Any]:
    handle = trimtab.attach(model, DualSpeedConfig(**settings))
    try:
        yield handle
    finally:
        handle.detach()


def portrait(model: Any) -> dict[str, Any]:
    """Everything about a model that attaching could change, apart from tensor values."""
    hooks = [name for name in vars(torch.nn.Module()) if name.endswith("hooks") or "hooks_" in name]
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": {
            f"{name}.{kind}": len(getattr(module, kind) or ())
            for name, module in model.named_modules()
            for kind in hooks
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "ignored on save": copy.copy(getattr(model, "_keys_to_ignore_on_save", None)),
        "ignored set on": "_keys_to_ignore_on_save" in vars(model),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "training": [module.training for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
    }


def same_model(model: Any, before: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    assert portrait(model) == before[0]
    assert model.state_dict().keys() == before[1].keys()
    for key, value in before[1].items():
        assert torch.equal(model.state_dict()[key], value), key


def training_arguments(out: Path, **changes: Any) -> TrainingArguments:
    """Return arguments of a short, silent run on the CPU."""
    settings = {
        "output_dir": str(out), "max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "remove_unused_columns": False, "seed": 3, **changes,
    }  # fmt: skip
    return TrainingArguments(**settings)


class KilledError(RuntimeError):
    """Stands for whatever ends a run."""


class KillAt(TrainerCallback):
    """Ends the run inside a step, after some of its micro-batches."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KilledError
