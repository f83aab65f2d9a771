"""Peak memory and operations against numbers known beforehand."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

from trimtab.bench import count_flops, peak_memory

MIB = 2**20 // 4
"""Floats in a MiB."""


def test_peak_counts_what_is_held_at_once():
    def step() -> None:
        first = torch.empty(8 * MIB)
        second = torch.empty(4 * MIB)
        del first
        third = torch.empty(2 * MIB)
        del second, third

    assert peak_memory(step)["mib"] == pytest.approx(12, abs=0.01)


def test_what_was_there_before_does_not_count():
    held = torch.ones(64 * MIB)
    assert peak_memory(lambda: held.mul_(2))["mib"] < 1
    assert peak_memory(lambda: held[: 16 * MIB] + 1)["mib"] == pytest.approx(16, abs=0.01)


def test_what_backward_needs_counts():
    weight = torch.randn(256, 256, requires_grad=True)
    rows = torch.randn(1024, 256)

    def forward_only() -> None:
        with torch.no_grad():
            torch.tanh(torch.tanh(torch.tanh(rows @ weight))).sum()

    def training() -> None:
        torch.tanh(torch.tanh(torch.tanh(rows @ weight))).sum().backward()

    assert peak_memory(training)["mib"] > 1.4 * peak_memory(forward_only)["mib"]


def test_two_runs_give_one_result_and_leave_no_trace():
    before = dict(os.environ)

    def step() -> None:
        torch.randn(512, 512) @ torch.randn(512, 512)

    first, second = peak_memory(step), peak_memory(step)
    assert first == second
    assert first["method"] == "CPU allocations seen by torch.profiler"
    assert dict(os.environ) == before


def test_a_matrix_product_and_its_backward():
    rows, weight = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert count_flops(lambda: rows @ weight) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (rows @ weight).sum().backward()) == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_on_the_cpu_counts(heads):
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    key = torch.randn(2, heads, 12, 8, requires_grad=True)

    def attention() -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, key, enable_gqa=heads != 4)

    forward = 2 * (2 * 2 * 4 * 16 * 12 * 8)
    assert count_flops(attention) == forward
    assert count_flops(lambda: attention().sum().backward()) == forward + 2.5 * forward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda():
    def step() -> None:
        torch.empty(8 * MIB, device="cuda")

    assert peak_memory(step, "cuda")["mib"] == pytest.approx(8, abs=0.5)
