"""Host numbers reach the device unchanged, and on CUDA from pinned memory, without waiting."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from trimtab.ops.host import copy_to, to_device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, 2, 3], None, torch.int64), ([0.5, 1.0], None, torch.float32), ([1, 0], torch.bool, torch.bool),
        ([], torch.int64, torch.int64), ([2, 3], torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_the_numbers_and_their_type(values: Any, dtype: Any, expected: torch.dtype) -> None:
    found = to_device(values, CPU, dtype)
    assert found.dtype == expected
    assert found.tolist() == torch.tensor(values, dtype=dtype).tolist()


def test_on_the_cpu_a_tensor_comes_back_as_it_is() -> None:
    values = torch.ones(3)
    assert copy_to(values, CPU) is values


@pytest.mark.parametrize("make", [to_device, lambda values, device: copy_to(torch.tensor(values), device)])
def test_on_cuda_the_copy_is_asynchronous_from_pinned_memory(make: Any) -> None:
    calls: list[Any] = []

    def pin(self: Tensor) -> Tensor:
        calls.append(("pin", self.tolist()))
        return self

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(("to", args, kwargs))
        return self

    cuda = torch.device("cuda", 0)
    with mock.patch.object(Tensor, "pin_memory", pin), mock.patch.object(Tensor, "to", to):
        make([4, 5], cuda)
    assert calls == [("pin", [4, 5]), ("to", (cuda,), {"non_blocking": True})]


@needs_cuda
def test_a_real_copy_arrives_and_is_not_made_again() -> None:
    cuda = torch.device("cuda")
    found = to_device([1, 2, 3], cuda)
    assert found.tolist() == [1, 2, 3]
    assert copy_to(found, cuda) is found
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            to_device([4, 5], cuda)
        finally:
            torch.cuda.set_sync_debug_mode("default")
