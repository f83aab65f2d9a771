"""What the processes of one run must have in common: settings before the first step, collectives in every step.

Sharded parameters (FSDP2, ZeRO-3) are gathered by collectives inside the modules that own them, so every process must
call the same modules equally often, whatever its batch holds. With ZeRO-1 and ZeRO-2 gradients must come in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from trimtab.errors import RankDisagreementError, WrongOrderError
from trimtab.ops.host import to_device
from trimtab.shapes import Tensor

Result = TypeVar("Result")
_CALL = "_trimtab_call"


def process_count() -> int:
    """Return how many processes train together, 1 outside of any process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether parts of a model live on several processes (FSDP2, FSDP1 or ZeRO-3)."""
    if not distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def needs_lockstep(model: torch.nn.Module) -> bool:
    """Whether all processes must call the same modules in the same order, in the forward and the backward pass.

    Sharded models gather parameters in that order. ZeRO-1 and ZeRO-2 reduce gradients in the order in which they come,
    without looking whose they are: in another order they would add up gradients of different parameters.
    """
    if process_count() == 1:
        return False
    return is_sharded(model) or any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters())


def refuse_sharded(model: torch.nn.Module) -> None:
    """Refuse a model that FSDP2 has sharded already: a parameter added now would belong to no shard.

    Raises:
        WrongOrderError: It is.
    """
    if not distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise WrongOrderError(
                f"{name} is sharded already, so the isolator could not become part of the model on every process. Call "
                "attach before fully_shard or accelerator.prepare (with_dualspeed does), and load the model unsharded."
            )


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Compare facts of all processes; does nothing in a single one.

    Args:
        facts: What must be equal, by name; plain values.

    Raises:
        RankDisagreementError: Something differs; the message has its name and the value of every rank.
    """
    count = process_count()
    if count == 1:
        return
    everyone: list[Any] = [None] * count
    distributed.all_gather_object(everyone, dict(facts))
    names = list(dict.fromkeys(name for one in everyone for name in one))
    told = [_by_value(name, [one.get(name) for one in everyone]) for name in names]
    differing = [one for one in told if one]
    if differing:
        raise RankDisagreementError(
            f"The processes disagree before the first step. {' '.join(differing)} Give every process the same "
            "settings and the same data, and resume all of them from one checkpoint."
        )


def _by_value(name: str, values: list[Any]) -> str:
    """Say which ranks have which value, or nothing where all have one."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(rank)
    if len(ranks) == 1:
        return ""
    return f"{name}: " + ", ".join(f"{value} on rank {' '.join(map(str, on))}" for value, on in ranks.items()) + "."


@dataclass(frozen=True)
class SharedStep:
    """What the batches of all processes hold in one step.

    Attributes:
        visual: Whether the batch of any process has images or videos.
        labels: Most supervised labels that the fast rows of any process have.
        slow_labels: Most supervised labels that the slow rows of any process have.
        slow: Whether any process has slow rows.
    """

    visual: bool
    labels: int
    slow_labels: int
    slow: bool


def share_step(kinds: Iterable[bool], labels: Tensor, slow: Sequence[int]) -> SharedStep:
    """Tell all processes what the others' batches hold; one small collective, waits for the device.

    Args:
        kinds: For each modality of the model whether this batch has it.
        labels: How many labels of each row of this batch are supervised, [row].
        slow: Its slow rows.

    Returns:
        The step as all processes see it.

    Raises:
        RankDisagreementError: Batches of two processes have images and videos in different combinations. Each
            modality is one pass through the encoder, so that these processes would not be in step.
    """
    chosen = torch.zeros_like(labels).index_fill_(0, to_device(list(slow), labels.device, torch.long), 1)
    counts = [(labels * (1 - chosen)).sum(), (labels * chosen).sum(), chosen.sum()]
    mine = torch.stack([*(torch.full_like(counts[0], int(kind)) for kind in kinds), *counts])
    everyone = [torch.empty_like(mine) for _ in range(process_count())]
    distributed.all_gather(everyone, mine)
    rows = [one.tolist() for one in everyone]
    combinations = sorted({tuple(row[:-3]) for row in rows if any(row[:-3])})
    if len(combinations) > 1:
        raise RankDisagreementError(
            "In one step some processes hold images and others videos, or both; with FSDP and ZeRO they would "
            "wait for each other for ever, or mix up gradients. Give every batch the same kinds, or train with DDP."
        )
    fast, late, any_slow = (max(row[place] for row in rows) for place in (-3, -2, -1))
    return SharedStep(bool(combinations), fast, late, any_slow > 0)


class _Touch(torch.autograd.Function):
    """The identity on its first argument, with a gradient of zero for all others."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(one.shape, one.dtype, one.device) for one in parameters]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters]
        return gradient, *zeros


def touch(value: Tensor, parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Return a value as it is, but with a gradient of zero for parameters that it may not depend on.

    DistributedDataParallel waits in every step for the gradient of every parameter that is being trained.

    Args:
        value: A scalar with gradient.
        parameters: The parameters; those that are not being trained are left out.
    """
    trained = [one for one in parameters if one.requires_grad]
    touched: Tensor = _Touch.apply(value, *trained) if trained else value
    return touched


def whole(parameter: Tensor) -> Tensor:
    """Return all of a parameter that may be sharded, without gradient; every process must call it."""
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero  # type: ignore[import-not-found]

        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach().clone()


def fill(parameter: Tensor, values: Tensor) -> None:
    """Write values into a parameter that may be sharded; every process must call it with the same values."""
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            from deepspeed import zero  # type: ignore[import-not-found]

            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values)
        elif hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(parameter, DTensor)
            there = values.to(device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(distribute_tensor(there, parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(values)


def inside_forward(model: torch.nn.Module, call: Callable[[], Result]) -> Result:
    """Return what a call returns, with the parameters that FSDP2 gathers for the forward of the model.

    Args:
        model: The outermost module; unless FSDP2 sharded it the call is made as it is.
        call: Uses parts of the model outside of its forward.
    """
    if not distributed.is_available():
        return call()
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(model, FSDPModule):
        return call()
    try:
        vars(model)[_CALL] = call
        register_fsdp_forward_method(model, _CALL)
        found: Result = getattr(model, _CALL)()
        return found
    finally:
        vars(model).pop(_CALL, None)
