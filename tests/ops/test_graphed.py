"""A replayed selection equals the call it stands for; without CUDA a stand-in records and replays the operations."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from tests.pruners.cases import make_inputs
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab.bench.pruners import bench_pruners
from trimtab.errors import SettingError, TrimtabWarning
from trimtab.ops import graphed
from trimtab.ops.graphed import GraphedCall
from trimtab.ops.similarity import cosine_matrix
from trimtab.pruners import build_pruner, pruner_names
from trimtab.pruners.divprune import spread_out

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recorder(TorchDispatchMode):
    """Note every operation with its arguments and results, as a capture does."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run the same operations on the same memory."""
        for func, args, kwargs, before in self.steps:
            after = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeGraph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.replays = 0
        FakeGraph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.recorder.replay()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeGraph]]:
    """Let CPU tensors pass for CUDA ones, and record in place of capturing."""

    class Stream:
        def __init__(self, device: Any) -> None: ...

        def wait_stream(self, other: Any) -> None: ...

    state = types.SimpleNamespace(capturing=False)

    @contextlib.contextmanager
    def graph(made: FakeGraph, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        state.capturing = True
        try:
            with made.recorder:
                yield
        finally:
            state.capturing = False

    cuda = {
        "CUDAGraph": FakeGraph, "graph": graph, "Stream": Stream, "current_stream": Stream,
        "graph_pool_handle": lambda: (0, 1), "stream": lambda side: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(), "is_current_stream_capturing": lambda: state.capturing,
    }  # fmt: skip
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphed, "_on_cuda", lambda value: True)
    monkeypatch.setattr(FakeGraph, "made", [])
    return FakeGraph


def similarity(images: int, tokens: int = 30, seed: int = 0) -> Tensor:
    return cosine_matrix(torch.randn(images, tokens, 8, generator=torch.Generator().manual_seed(seed)))


def test_on_the_cpu_it_is_the_function_itself() -> None:
    calls = []

    def function(values: Tensor, factor: int) -> Tensor:
        calls.append(values)
        return values * factor

    call, values = GraphedCall(function), torch.ones(2, 3)
    for _ in range(5):
        assert torch.equal(call(values, factor=3), values * 3)
    assert all(one is values for one in calls)
    assert len(calls) == 5
    assert not call.graphs


def test_picks_are_those_of_the_plain_call_whatever_the_number_of_images(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(spread_out)
    for seed, images in enumerate([3, 5, 8, 1, 7, 8, 2]):
        valid = torch.rand(images, 30, generator=torch.Generator().manual_seed(seed)) > 0.2
        worth = torch.rand(images, 30, generator=torch.Generator().manual_seed(seed + 9))
        found = call(similarity(images, seed=seed), 6, valid, worth)
        assert torch.equal(found, spread_out(similarity(images, seed=seed), 6, valid, worth))
    assert [graph.replays for graph in fake_cuda.made] == [5], "one graph for up to eight images, from call three on"


def test_a_result_outlives_the_next_replay(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(spread_out, patience=0)
    first = call(similarity(4, seed=0), 6)
    kept = first.clone()
    call(similarity(4, seed=1), 6)
    assert torch.equal(first, kept)
    assert not torch.equal(spread_out(similarity(4, seed=1), 6), kept)


def test_other_shapes_types_and_counts_get_graphs_of_their_own_up_to_the_limit(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(spread_out, most=3, patience=0)
    inputs = [(similarity(4), 6), (similarity(4), 7), (similarity(9), 6), (similarity(4, 20), 6), (similarity(4), 6)]
    for values, count in inputs:
        assert torch.equal(call(values.clone(), count), spread_out(values.clone(), count))
        assert len(call.graphs) <= 3
    assert len(fake_cuda.made) == 5, "the first one went when the fourth came, and was captured again"
    call(similarity(4).double(), 6)
    assert len(fake_cuda.made) == 6


def test_patience_is_counted_for_each_shape(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(spread_out, patience=2)
    for images, graphs in [(4, 0), (12, 0), (4, 0), (12, 0), (4, 1), (12, 2)]:
        call(similarity(images), 6)
        assert len(fake_cuda.made) == graphs


def test_while_something_is_captured_it_is_the_plain_call(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(spread_out, patience=0)
    outer = FakeGraph()
    with torch.cuda.graph(outer, pool=None, capture_error_mode="thread_local"):
        found = call(similarity(4), 6)
    assert torch.equal(found, spread_out(similarity(4), 6))
    assert not call.graphs
    with graphed._capturing:  # another thread is at it
        found = call(similarity(4), 6)
    assert torch.equal(found, spread_out(similarity(4), 6))
    assert not call.graphs
    call(similarity(4), 6)
    assert len(call.graphs) == 1


def test_with_gradients_it_is_the_plain_call(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(lambda values: values * 2, patience=0)
    values = torch.ones(2, 3, requires_grad=True)
    assert call(values).requires_grad
    assert not call.graphs
    with torch.no_grad():
        call(values)
    assert len(call.graphs) == 1


def test_a_graph_of_inference_serves_training_too(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(spread_out, patience=0)
    with torch.inference_mode():
        call(similarity(4), 6)
    assert torch.equal(call(similarity(5), 6), spread_out(similarity(5), 6))
    assert len(fake_cuda.made) == 1


@pytest.mark.parametrize("values", [torch.ones(0, 3), torch.tensor(1.0)])
def test_without_rows_it_is_the_plain_call(values: Tensor, fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(lambda one: one * 2, patience=0)
    assert torch.equal(call(values), values * 2)
    assert not call.graphs


def test_tensors_with_different_rows_are_not_buffered(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(lambda one, other: one + other, patience=0)
    assert torch.equal(call(torch.ones(4, 2), torch.ones(1, 2)), torch.full((4, 2), 2.0))
    assert not call.graphs


def test_a_failed_capture_warns_once_and_leaves_the_plain_call(fake_cuda: type[FakeGraph]) -> None:
    def reads_back(values: Tensor) -> Tensor:
        return values * float(values.sum())

    call = GraphedCall(reads_back, patience=0)
    with pytest.warns(TrimtabWarning, match=r"reads_back could not be captured.*not permitted"):
        found = call(torch.ones(2, 3))
    assert torch.equal(found, torch.full((2, 3), 6.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(torch.ones(2, 3)), found)
    assert len(fake_cuda.made) == 1
    assert not graphed._capturing.locked()


def test_a_mistake_of_the_caller_is_no_capture_error(fake_cuda: type[FakeGraph]) -> None:
    def broken(values: Tensor) -> Tensor:
        raise SettingError("wrong setting")

    call = GraphedCall(broken, patience=0)
    for _ in range(2):
        with pytest.raises(SettingError, match="wrong setting"):
            call(torch.ones(2, 3))
    assert not graphed._capturing.locked()


def test_copies_and_pickles_have_no_graphs(fake_cuda: type[FakeGraph]) -> None:
    call = GraphedCall(spread_out, most=5, patience=0)
    call(similarity(4), 6)
    for other in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert (other.most, len(other.graphs), len(call.graphs)) == (5, 0, 1)
        assert torch.equal(other(similarity(4), 6), spread_out(similarity(4), 6))


def test_divprune_picks_the_same_with_graphs(fake_cuda: type[FakeGraph]) -> None:
    for options in ({}, {"centered": True}, {"pre_projector": True}):
        plain, pruner = build_pruner("divprune", options), build_pruner("divprune", {**options, "graphed": True})
        for seed in range(8):
            inputs = make_inputs(seed=seed, some_invalid=seed % 2 == 1)
            for count in (5, 9):
                one, other = pruner.select(inputs, count), plain.select(inputs, count)
                assert torch.equal(one.index, other.index)
                assert torch.equal(one.valid, other.valid)
    assert [graph.replays for graph in fake_cuda.made] == [2] * 12  # two counts, with and without unreal tokens


def test_divprune_refuses_another_value() -> None:
    with pytest.raises(SettingError, match="graphed"):
        build_pruner("divprune", {"graphed": "yes"})


def test_a_thread_that_pins_memory_meanwhile_does_not_end_the_capture() -> None:
    """The lock is the process's, so that a second thread calls plainly; it never waits."""
    done = threading.Event()

    def other() -> None:
        assert not graphed._capturing.acquire(blocking=False)
        done.set()

    with graphed._capturing:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(5)
    assert done.is_set()


@pytest.mark.parametrize("some_invalid", [False, True])
@pytest.mark.parametrize("tokens", [24, 300])  # from 256 on the cosines are computed in blocks on a CPU
@pytest.mark.parametrize("name", pruner_names())
def test_the_selection_of_every_pruner_is_one_graph(name: str, tokens: int, some_invalid: bool) -> None:
    """Tensors without values go through it, so nothing is read back and no shape depends on a number."""
    pruner, inputs = build_pruner(name), make_inputs(tokens=tokens, some_invalid=some_invalid)
    other = make_inputs(tokens=tokens, some_invalid=some_invalid, seed=1)
    names = [field for field, value in vars(inputs).items() if isinstance(value, Tensor)]

    def select(*values: Tensor) -> tuple[Tensor, Tensor]:
        found = pruner.select(replace(inputs, **dict(zip(names, values, strict=True))), 7)
        return found.index, found.valid

    graph = make_fx(select, tracing_mode="fake")(*(getattr(inputs, field) for field in names))
    assert any(node.op == "call_function" for node in graph.graph.nodes)
    for given in (inputs, other):
        found = graph(*(getattr(given, field) for field in names))
        expected = select(*(getattr(given, field) for field in names))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_reads_back_is_no_graph() -> None:
    with pytest.raises(Exception, match=r"(?i)data.dependent|_local_scalar_dense"):
        make_fx(lambda values: values[: int(values.argmax())], tracing_mode="fake")(torch.ones(4))


@needs_cuda
def test_a_real_graph_picks_the_same() -> None:
    call = GraphedCall(spread_out)
    for seed, images in enumerate([3, 5, 8, 1, 7, 8, 2]):
        values = similarity(images, 100, seed).cuda()
        assert torch.equal(call(values.clone(), 12), spread_out(values.clone(), 12))
    assert len(call.graphs) == 1


@needs_cuda
def test_a_real_capture_that_fails_leaves_the_plain_call() -> None:
    call = GraphedCall(lambda values: values * float(values.sum()), patience=0)
    with pytest.warns(TrimtabWarning, match="could not be captured"):
        found = call(torch.ones(2, 3, device="cuda"))
    assert torch.equal(found, torch.full((2, 3), 6.0, device="cuda"))


@needs_cuda
def test_the_bench_times_both() -> None:
    row = bench_pruners(["divprune"], images=4, tokens=64, width=32, repeats=1, device="cuda")["pruners"]["divprune"]
    assert row["graphed_same_picks"]
    assert row["graphed_s"] > 0


def test_the_bench_times_graphs_where_there_are_any(fake_cuda: type[FakeGraph], monkeypatch: Any) -> None:
    from trimtab.bench import pruners

    found = pruners._bench_graphed(
        build_pruner("divprune"), pruners.random_inputs(3, 30, 8, 0, torch.device("cpu")), 6, 2
    )
    assert found["graphed_same_picks"]
    assert found["graphed_s"] > 0
    assert [graph.replays for graph in fake_cuda.made] == [1 + 1 + 2]  # captured and replayed, warmed up, timed
    assert (
        "graphed_s" not in bench_pruners(["divprune"], images=2, tokens=16, width=8, repeats=1)["pruners"]["divprune"]
    )
