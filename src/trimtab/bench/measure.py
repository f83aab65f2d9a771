"""Peak memory and arithmetic of one call."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from trimtab.bench.timing import wait_for_device


def peak_memory(step: Callable[[], object], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Run a callable once and return the most tensor memory it held beyond what was there before.

    On CUDA this is the allocator's own peak. On the CPU the allocations that torch's profiler reports are summed in
    the order of time; that counts tensors, is the same in every run, and does not see the memory of other
    libraries. A tensor from before the call is not subtracted when the call frees it, so drop old gradients
    before. (The resident memory of the process would be no better: it keeps what earlier steps have left behind in
    the heap, and says nothing about one step. Records carry its peak separately.)

    Args:
        step: What to run.
        device: Where it runs.

    Returns:
        ``mib`` (growth at the peak, in MiB), ``held_before_mib`` (None on the CPU) and ``method``.
    """
    if torch.device(device).type == "cuda":
        return _peak_cuda(step, torch.device(device))
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_profiler(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    peak = _highest(_changes(events))
    return {"mib": peak / 2**20, "held_before_mib": None, "method": "CPU allocations seen by torch.profiler"}


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library from printing its own progress to stderr."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _peak_cuda(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    wait_for_device()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    wait_for_device()
    peak = torch.cuda.max_memory_allocated(device)
    return {
        "mib": (peak - before) / 2**20,
        "held_before_mib": before / 2**20,
        "method": "torch.cuda.max_memory_allocated",
    }


def _changes(events: Iterable[dict[str, Any]]) -> list[int]:
    """Return the bytes of allocations (above 0) and frees (below 0) on the CPU, in order of time."""
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return [int(event["args"]["Bytes"]) for event in sorted(memory, key=lambda event: float(event["ts"]))]


def _highest(changes: Iterable[int]) -> int:
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def count_flops(step: Callable[[], object]) -> int:
    """Run a callable once and return the floating-point operations of its matrix products, convolutions and attention.

    One multiplication with its addition counts as two. Attention counts as if no place were masked, and the
    kernel that torch uses on the CPU, which its own counter leaves out, counts like the others.

    Args:
        step: What to run; a backward pass inside it counts as well.
    """
    cpu: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        step()
    return int(counter.get_total_flops())


def _attention_forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, _with_heads(key, query), _with_heads(value, query)))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, _with_heads(key, query), _with_heads(value, query)))


def _with_heads(shape: Any, query: Any) -> tuple[int, ...]:
    """Return the shape [batch, heads, places, size] with as many heads as the query has (grouped heads are reused)."""
    return (*query[:2], *shape[2:])
