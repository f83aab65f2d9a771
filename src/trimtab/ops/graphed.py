"""Many small CUDA kernels as one graph, for functions that run the same kernels whatever the numbers are.

Greedy selection is hundreds of kernels of a few microseconds each, and the host needs longer to launch them than the
device to run them. A captured graph is launched once.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from trimtab.errors import TrimtabWarning
from trimtab.shapes import Tensor

Name = int | str
Form = tuple[tuple[Name, Hashable], ...]
PATIENCE = 2
"""Plain calls with the same shapes before a graph is captured."""

_capturing = threading.Lock()


class GraphedCall:
    """A function whose calls CUDA replays as one graph, from the third call with the same shapes on.

    The function must be pure apart from its own inputs: no random numbers, nothing read back, and a result that
    depends on tensors and on the other arguments only. The first axis of all tensors must be the same, and what the
    function does with one row must not depend on the others: buffers have room for a multiple of `rows`, so that
    batches with some more or fewer images share a graph.

    Where it cannot replay it calls the function: on the CPU, while anything is being captured or compiled, with
    gradients, and for good after a capture that failed. A copy or a pickle has no graphs.

    Memory: for each graph a copy of the inputs; working memory is shared by all graphs.

    Args:
        function: Tensors and other hashable arguments in, one tensor with the same first axis out.
        most: Graphs kept; beyond that the one that was used longest ago goes.
        rows: Rows that buffers are rounded up to.
        patience: Plain calls with the same shapes before a graph is captured, which takes as long as many calls.
    """

    def __init__(
        self, function: Callable[..., Tensor], *, most: int = 8, rows: int = 8, patience: int = PATIENCE
    ) -> None:
        self.function = function
        self.most, self.rows, self.patience = most, rows, patience
        self._forget()

    def _forget(self) -> None:
        self.graphs: OrderedDict[Form, _Graph] = OrderedDict()
        self._calls: dict[Form, int] = {}
        self._failed = False
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy keeps: everything but the graphs."""
        return {name: getattr(self, name) for name in ("function", "most", "rows", "patience")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Begin anew with the same function."""
        vars(self).update(state)
        self._forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function, or replay a call of it; the result is a tensor of its own either way."""
        given: dict[Name, Any] = dict(enumerate(args))
        given.update(kwargs)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if self._failed or not _can_replay(tensors):
            return self.function(*args, **kwargs)
        form = self._form(given)
        if form not in self.graphs and not self._try_capture(form, given, tensors):
            return self.function(*args, **kwargs)
        self.graphs.move_to_end(form)
        return self.graphs[form].replay(tensors)

    def _form(self, given: Mapping[Name, Any]) -> Form:
        def of(value: Tensor) -> Hashable:
            return (self._rounded(value.shape[0]), *value.shape[1:], value.dtype, value.device)

        return tuple((name, of(value) if isinstance(value, Tensor) else value) for name, value in given.items())

    def _rounded(self, count: int) -> int:
        return -(-count // self.rows) * self.rows

    def _try_capture(self, form: Form, given: Mapping[Name, Any], tensors: Mapping[Name, Tensor]) -> bool:
        if len(self._calls) > 100 * self.most:  # shapes that never come again
            self._calls.clear()
        self._calls[form] = self._calls.get(form, 0) + 1
        if self._calls[form] <= self.patience or not _capturing.acquire(blocking=False):
            return False
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.inference_mode(False), torch.no_grad():  # buffers that any later call may write to
                self.graphs[form] = _Graph(self.function, given, tensors, self._rounded, self._pool)
        except RuntimeError as error:
            self._failed = True
            self.graphs.clear()
            name = getattr(self.function, "__name__", "The function")
            warnings.warn(
                f"{name} could not be captured as a CUDA graph and runs without one, only slower: {error}",
                TrimtabWarning,
                stacklevel=3,
            )
            return False
        finally:
            _capturing.release()
        if len(self.graphs) > self.most:
            self.graphs.popitem(last=False)
        return True


class _Graph:
    """One captured call, with the buffers that it reads and writes."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        given: Mapping[Name, Any],
        tensors: Mapping[Name, Tensor],
        rounded: Callable[[int], int],
        pool: Any,
    ) -> None:
        self.inputs = {
            name: torch.zeros(rounded(one.shape[0]), *one.shape[1:], dtype=one.dtype, device=one.device)
            for name, one in tensors.items()
        }
        buffered = {**given, **self.inputs}
        args = [value for name, value in buffered.items() if isinstance(name, int)]
        kwargs = {name: value for name, value in buffered.items() if isinstance(name, str)}
        device = next(iter(self.inputs.values())).device
        # Libraries set themselves up in a first call, which must not be captured.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function(*args, **kwargs)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, as the one that pins memory for a data loader, may go on.
        with torch.cuda.device(device), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function(*args, **kwargs)

    def replay(self, tensors: Mapping[Name, Tensor]) -> Tensor:
        count = 0
        for name, value in tensors.items():
            count = value.shape[0]
            self.inputs[name][:count].copy_(value)
        self.graph.replay()
        return self.output[:count].clone()


def _can_replay(tensors: Mapping[Name, Tensor]) -> bool:
    values = list(tensors.values())
    if not values or torch.compiler.is_compiling() or not all(_on_cuda(value) for value in values):
        return False
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        return False
    same = len({(value.shape[:1], value.device) for value in values}) == 1 and values[0].dim() > 0
    return same and values[0].shape[0] > 0 and not torch.cuda.is_current_stream_capturing()


def _on_cuda(value: Tensor) -> bool:
    return value.is_cuda and type(value) is Tensor
