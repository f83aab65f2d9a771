"""Find what would make the host wait for a GPU, on a machine without one.

Every tensor counts as one of the device, apart from those that Python makes without naming a device and those that
were fetched with ``.cpu()``; what comes of host tensors alone is on the host too. The two sides answer ``.device`` with
two objects that are equal but not the same, so that a copy from one to the other shows. So a test on the CPU sees where
a training step reads a number back, lets a number decide a shape, or copies host numbers while the host looks on.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import trimtab

ROOT = Path(trimtab.__file__).parent
HARMLESS = str(ROOT / "ops" / "host.py")
"""The file whose one function copies host numbers without waiting; a test of its own holds that."""

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default: "item", aten.equal.default: "equal", aten.is_nonzero.default: "item",
    aten.nonzero.default: "nonzero", aten.masked_select.default: "masked_select", aten._unique2.default: "unique",
    aten.unique_dim.default: "unique", aten.unique_consecutive.default: "unique", aten.bincount.default: "bincount",
    aten.masked_scatter_backward.default: "masked_scatter backward",
}  # fmt: skip
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FETCHES = {"tolist", "numpy", "cpu"}
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
FACTORIES = {torch.ones, torch.zeros, torch.full, torch.empty, torch.arange, torch.rand, torch.randn, torch.eye}


PLACES = (torch.device, str, Tensor)
DEVICE, HOST = torch.device("cpu"), torch.device("cpu")
DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]
assert DEVICE is not HOST


@dataclass(frozen=True)
class Wait:
    """One place where the host would wait.

    Attributes:
        kind: What is done there.
        owner: The innermost package outside torch: ``"trimtab"``, ``"transformers"``, or the name of another file.
        place: File and line there.
    """

    kind: str
    owner: str
    place: str


class HostSyncs:
    """Within, every wait is noted in `waits`, and in `counts` each operation whether or not its tensors are device's.

    Args:
        host: Tensors that are on the host although nothing here has made them.
    """

    def __init__(self, host: list[Tensor] | None = None) -> None:
        self.waits: list[Wait] = []
        self.counts: Counter[str] = Counter()
        self.host = WeakTensorKeyDictionary()
        for tensor in host or ():
            self.host[tensor] = True
        self._modes = (_Operations(self), _Calls(self))

    def __enter__(self) -> HostSyncs:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def of(self, owner: str) -> list[Wait]:
        """Return the waits of one package."""
        return [wait for wait in self.waits if wait.owner == owner]

    def note(self, kind: str) -> None:
        """Note a wait at the place that runs now."""
        file, line = _place()
        if file == HARMLESS:
            return
        self.waits.append(Wait(kind, _owner(file), f"{Path(file).name}:{line}"))

    def on_host(self, *tensors: Any) -> bool:
        """Whether there are tensors among the values, all of them on the host."""
        found = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
        return bool(found) and all(tensor in self.host for tensor in found)

    def mark(self, result: Any) -> None:
        """Count what came out as on the host."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.host[leaf] = True


class _Operations(TorchDispatchMode):
    """Reads and shapes that depend on values."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_host = self.syncs.on_host(args, kwargs)
        kind = self._kind(func, args, kwargs)
        if kind is not None:
            self.syncs.counts[kind] += 1
            if not on_host:
                self.syncs.note(kind)
        result = func(*args, **kwargs)
        if on_host:
            self.syncs.mark(result)
        return result

    def _kind(self, func: Any, args: Any, kwargs: Any) -> str | None:
        if func in READS:
            return READS[func]
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            return "repeat_interleave"
        if func in INDEXES:
            given = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in given):
                return "boolean index"
            if any(index.dim() and index in self.syncs.host for index in given) and args[0] not in self.syncs.host:
                return "host index"
        return None


class _Calls(TorchFunctionMode):
    """Fetches, and copies of host numbers to the device."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == DEVICE_OF:
            return self._side_of(args[0])
        if name in FETCHES and isinstance(args[0], Tensor):
            if not self.syncs.on_host(args[0]):
                self.syncs.note(name)
            result = func(*args, **kwargs)
            result = result.clone() if name == "cpu" else result
            self.syncs.mark(result)
            return result
        if func in MAKERS or name == "new_tensor":
            return self._make(func, name, args, kwargs)
        listed = name == "__getitem__" and any(isinstance(leaf, list) for leaf in _parts(args[1]))
        if listed and not self.syncs.on_host(args[0]):
            self.syncs.note("host index")
        result = func(*args, **kwargs)
        if func in FACTORIES and kwargs.get("device") is not DEVICE:
            self.syncs.mark(result)
        if name == "to":
            return self._move(args, kwargs, result)
        return result

    def _make(self, func: Callable[..., Tensor], name: str, args: Any, kwargs: Any) -> Tensor:
        """Make a tensor of host numbers, or of a tensor; with the device named they are copied there at once."""
        source = args[1 if name == "new_tensor" else 0]
        from_device = isinstance(source, Tensor) and not self.syncs.on_host(source)
        named = kwargs.get("device")
        if named is None and name == "new_tensor":
            named = self._side_of(args[0])
        on_device = named is DEVICE or (named is None and from_device)
        result = func(*args, **kwargs)
        if on_device == from_device:
            if not on_device:
                self.syncs.mark(result)
            return result
        self.syncs.note(name)
        return self._other_side(result, on_device)

    def _move(self, args: Any, kwargs: Any, result: Tensor) -> Tensor:
        named = next((one for one in (kwargs.get("device"), *args[1:]) if isinstance(one, PLACES)), None)
        if isinstance(named, Tensor):
            named = self._side_of(named)
        from_device = not self.syncs.on_host(args[0])
        on_device = from_device if named is None else named is DEVICE
        if on_device == from_device:
            return result
        if from_device or not kwargs.get("non_blocking"):
            self.syncs.note("to")
        return self._other_side(result, on_device)

    def _side_of(self, value: Tensor) -> torch.device:
        return HOST if self.syncs.on_host(value) else DEVICE

    def _other_side(self, value: Tensor, on_device: bool) -> Tensor:
        """Return a copy that counts as on the given side."""
        copied = torch.empty_like(value).copy_(value)
        self.syncs.host.pop(copied, None)
        if not on_device:
            self.syncs.mark(copied)
        return copied


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _place() -> tuple[str, int]:
    frame = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_code.co_filename, frame.f_lineno


def _owner(file: str) -> str:
    if Path(file).is_relative_to(ROOT):
        return "trimtab"
    return "transformers" if "/transformers/" in file else Path(file).name
