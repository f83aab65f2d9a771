"""Memory of a training by itself: what is held all the time, and what a step of each mode adds at its peak."""

from __future__ import annotations

import contextlib
from typing import Any

from trimtab.bench import peak_memory


def step_memory(trainer: Any, rows: int) -> dict[str, Any]:
    """Measure one forward and backward pass per mode on the first rows of the data, after training.

    The arms of a quickstart share a process, whose resident memory keeps what earlier arms have left behind. Tensors
    are counted instead: the same rows for every arm, and of DualSpeed the mode that takes more, which is the slow one.

    Args:
        trainer: The Trainer, with or without DualSpeed; its weights stay, its gradients are dropped.
        rows: Rows of the batch.

    Returns:
        ``peak_memory_mib``: weights, two moments for what trains, and the step that adds most, gradients included; and
        ``memory``: ``held_mib``, ``step_mib`` by mode, and ``method``.
    """
    model, handle = trainer.model, trainer.dualspeed
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(rows)])
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    model.train()
    steps: dict[str, float] = {}
    method = ""
    for mode in _modes(handle):
        model.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if mode == "full" or handle is None else handle.force_mode(mode):
            found = peak_memory(lambda: model(**inputs).loss.backward(), model.device)
        steps[mode], method = round(found["mib"], 2), found["method"]
    model.zero_grad(set_to_none=True)
    sizes = ((3 if one.requires_grad else 1) * one.numel() * one.element_size() for one in model.parameters())
    held = round(sum(sizes) / 2**20, 2)
    return {
        "peak_memory_mib": round(held + max(steps.values()), 2),
        "memory": {"held_mib": held, "step_mib": steps, "method": method},
    }


def _modes(handle: Any) -> list[str]:
    if handle is None or handle.config.drops_nothing:
        return ["full"]
    return ["fast", "slow"] if handle.config.slow_ratio else ["fast"]
