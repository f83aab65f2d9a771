"""Gradient checkpointing paused for one forward: a short sequence keeps its activations instead of recomputing them.

transformers decides in the forward of each block, by a flag on the module, whether its activations are kept or made
again in the backward pass. So a forward under lowered flags needs no recompute, and what was run before with them
raised is recomputed all the same: the backward pass does not look at the flags.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

FLAG = "gradient_checkpointing"
"""Name of the flag in transformers, also in releases that call the feature activation checkpointing."""


class PausedRecompute:
    """Gradient checkpointing of a model while it is switched off; made by `pause_recompute`.

    Attributes:
        modules: The modules that would recompute.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def remove(self) -> None:
        """Switch it on again where it was on; a second call does nothing."""
        for module in self.modules:
            vars(module)[FLAG] = True
        self.modules = []


def pause_recompute(model: Any) -> PausedRecompute:
    """Switch gradient checkpointing off in every part of a model that has it on, until `PausedRecompute.remove`.

    Only the flags of transformers are touched, also inside PEFT, DDP and FSDP wrappers; which blocks have it on
    (``every_n_layers``), how they recompute, and whether embeddings require gradients stays. Modules that
    `wraps_recompute` finds recompute as before. A model under ``torch.compile`` is compiled once for each state.

    Args:
        model: The model, also a wrapped one.

    Returns:
        The way back, to be called when the forward has ended, also by an exception.
    """
    raised = [module for module in model.modules() if vars(module).get(FLAG) is True]
    for module in raised:
        vars(module)[FLAG] = False
    return PausedRecompute(raised)


@contextlib.contextmanager
def without_recompute(model: Any) -> Iterator[None]:
    """While active, forward calls of a model keep their activations; see `pause_recompute`.

    Args:
        model: The model, also a wrapped one.
    """
    paused = pause_recompute(model)
    try:
        yield
    finally:
        paused.remove()


def recomputes(model: Any) -> bool:
    """Whether any part of a model has gradient checkpointing on that `pause_recompute` can switch off.

    Args:
        model: The model, also a wrapped one.
    """
    return any(vars(module).get(FLAG) is True for module in model.modules())


def wraps_recompute(model: Any) -> bool:
    """Whether a model has blocks inside torch's ``checkpoint_wrapper``, which always recompute.

    accelerate puts them there with FSDP's own ``activation_checkpointing``. Their forward is the wrapper's, which has
    no switch; use the ``activation_checkpointing`` of the model or the Trainer instead.

    Args:
        model: The model, also a wrapped one.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    return any(isinstance(module, CheckpointWrapper) for module in model.modules())
