"""A model of the run's architecture with random weights, shallow enough to be timed: no weight is ever loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trimtab.anatomy import open_host
from trimtab.run.config import RunConfig
from trimtab.run.load import freeze, outline_model, with_lora

BLOCK = 65537
"""Random numbers drawn for the weights; they repeat, in other columns from row to row since this is a prime."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The repeated blocks of the decoder or of the vision tower.

    Attributes:
        owner: Module that holds the list.
        name: Its name there.
        layers: The list as the architecture has it.
        configs: Settings that state the length of the list; transformers counts states from the end by them.
    """

    owner: nn.Module
    name: str
    layers: nn.ModuleList
    configs: tuple[Any, ...] = ()

    def cut(self, count: int) -> None:
        """Leave the first `count` blocks."""
        self.owner._modules[self.name] = self.layers[:count]
        for config in self.configs:
            config.num_hidden_layers = count

    @contextmanager
    def shortened(self, count: int) -> Iterator[None]:
        """While active, the stack has its first `count` blocks only."""
        before = len(self.owner.get_submodule(self.name))  # type: ignore[arg-type]  # a ModuleList
        self.cut(count)
        try:
            yield
        finally:
            self.cut(before)


def outline_to_train(config: RunConfig) -> Any:
    """Build the model of a run on the meta device, with its adapters and frozen parts, in training mode."""
    model = outline_model(config)
    freeze(model, config.freeze)
    return with_lora(model, config.lora).train()


def decoder_stack(model: Any) -> Stack:
    """Find the blocks of the language model."""
    found = _largest(open_host(model).model.get_decoder())
    assert found is not None, "a decoder is made of blocks"
    return found


def tower_stack(model: Any) -> Stack | None:
    """Find the blocks of the vision tower; None where it has no list of them."""
    host = open_host(model)
    found = _largest(host.base, without=host.model.get_decoder())
    if found is None:
        return None
    around = [part for part in host.base.modules() if any(found.owner is inner for inner in part.modules())]
    configs = {id(config): config for part in around if (config := getattr(part, "config", None)) is not None}
    stating = [one for one in configs.values() if getattr(one, "num_hidden_layers", None) == len(found.layers)]
    return replace(found, configs=tuple(one for one in stating if one is not host.model.config))


def least_tower_layers(model: Any) -> int:
    """Return how many blocks the tower needs so that the states it hands on exist."""
    layer = getattr(open_host(model).model.config, "vision_feature_layer", None)
    wanted = layer if isinstance(layer, (list, tuple)) else [layer]
    return max([1, *(abs(one) for one in wanted if isinstance(one, int))])


def least_decoder_layers(model: Any) -> int:
    """Return how many blocks hold one of every kind that the architecture alternates between."""
    kinds = getattr(open_host(model).model.config.get_text_config(), "layer_types", None) or []
    return max([1, *(kinds.index(kind) + 1 for kind in set(kinds))])


def materialise(model: Any, device: torch.device, without: tuple[nn.Module, ...] = ()) -> None:
    """Give a model on the meta device memory and random weights, in place.

    Matrices get small normal numbers, vectors ones; buffers (rotary frequencies, position tables) get their own values.

    Args:
        model: The model, cut as wanted.
        device: Where its weights go.
        without: Modules that stay on the meta device.
    """
    skipped = {id(module) for part in without for module in part.modules()}
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    made: dict[int, Any] = {}
    for module in model.modules():
        if id(module) in skipped:
            continue
        for tensors, make in ((module._parameters, _parameter), (module._buffers, _buffer)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:  # tied weights stay tied
                        made[id(tensor)] = (make(tensor, device, block), tensor)
                    tensors[name] = made[id(tensor)][0]
    # transformers fills what is not marked as filled: the buffers.
    open_host(model).model.initialize_weights()


def parameters_of(*stacks: Stack | None) -> int:
    """Count the parameters of stacks."""
    return sum(p.numel() for stack in stacks if stack is not None for p in stack.layers.parameters())


def _largest(module: nn.Module, without: nn.Module | None = None) -> Stack | None:
    skipped = {id(part) for part in without.modules()} if without is not None else set()
    found = [
        Stack(owner, name, child)
        for owner in module.modules()
        if id(owner) not in skipped
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and id(child) not in skipped and len(child)
    ]
    return max(found, key=lambda stack: (_attends(stack.layers), parameters_of(stack)), default=None)


def _attends(layers: nn.ModuleList) -> bool:
    """Whether these are transformer blocks, not the projectors that some towers have a list of."""
    return any("attention" in type(part).__name__.lower() for part in layers.modules())


def _parameter(tensor: nn.Parameter, device: torch.device, block: torch.Tensor) -> nn.Parameter:
    if tensor.dim() < 2:
        values = torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        values = _repeated(block.to(device, tensor.dtype), tensor.numel()).view(tensor.shape)
    made = nn.Parameter(values, requires_grad=tensor.requires_grad)
    made._is_hf_initialized = True  # type: ignore[attr-defined]  # the mark of transformers
    return made


def _repeated(block: torch.Tensor, count: int) -> torch.Tensor:
    times = -(-count // block.numel())
    return block.repeat(times)[:count].contiguous() if times > 1 else block[:count].clone()


def _buffer(tensor: torch.Tensor, device: torch.device, block: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
