"""Time a few real training steps within a budget, on as much of the model as fits in it."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from trimtab.anatomy import encode_images, open_host
from trimtab.anatomy.encode import encode_stock
from trimtab.bench import StepParts, time_steps
from trimtab.bench.amdahl import MODES
from trimtab.bench.timing import wait_for_device
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.run.bench import Bench
from trimtab.run.shallow import (
    Stack,
    decoder_stack,
    least_decoder_layers,
    least_tower_layers,
    materialise,
    parameters_of,
    tower_stack,
)

MOST_REPEATS = 5
PASSES = 2
"""Rounds that must fit at least: one to warm up and one to time."""
EFFICIENCY = 0.6
"""Share of the speed of a large matrix product that a training step is expected to reach."""
ACTIVATIONS = 40
"""Numbers per place, width and block that the backward pass keeps, roughly; used to refuse, never reported."""
TOWER, STOCK_TOWER = "tower", "tower of a plain step"
SPREAD = 0.2
"""Quartiles of a timed step further apart than this share of its median: the machine does other work as well."""
UPDATED = 1 << 22
"""Weights that the optimizer updates to be timed, or all where there are fewer."""


@dataclass(frozen=True)
class Work:
    """What a step of one row costs, from plain counts; see `trimtab.bench.SpeedModel` for the rules.

    Attributes:
        decoder, tower, head: Operations of one row of plain training.
        steps: Cost of a plain, a fast and a slow step together, in plain steps.
        places: Places of a row, all visual tokens included.
        width, vocab: Sizes of the language model.
    """

    decoder: float
    tower: float
    head: float
    steps: float
    places: float
    width: int
    vocab: int


@dataclass(frozen=True)
class Plan:
    """How much is timed.

    Attributes:
        rows: Rows of the batch.
        decoder_layers, decoder_all: Blocks of the language model that are timed, and that it has.
        tower_layers, tower_all: The same of the vision tower; 0 where it has no list of blocks.
    """

    rows: int
    decoder_layers: int
    decoder_all: int
    tower_layers: int
    tower_all: int

    @property
    def scaled(self) -> bool:
        """Whether the times of some blocks stand for all."""
        return self.decoder_layers < self.decoder_all or self.tower_layers < self.tower_all


def plan(
    model: Any, work: Work, rows: int, seconds: float, speed: float, memory: float, itemsize: int
) -> tuple[Plan | None, str, float]:
    """Choose what to time: as many rows as the training's batch has, then as many blocks as fit.

    Args:
        model: The model of the run on the meta device.
        work: What a row costs.
        rows: Rows of a batch, at least 1.
        seconds: What the timing may take.
        speed: Operations per second of a large matrix product.
        memory: Free bytes.
        itemsize: Bytes of a weight.

    Returns:
        The plan, or None; the reason why there is none; and the seconds that the plan takes, or the smallest one where
        that is the reason.
    """
    decoder, tower = decoder_stack(model), tower_stack(model)
    every = (len(decoder.layers), len(tower.layers) if tower else 0)
    shallow = [(min(n * least_decoder_layers(model), every[0]), every[1]) for n in (2, 1)]
    shallowest = (shallow[-1][0], min(2 * least_tower_layers(model), every[1]))
    fixed = sum(p.numel() for p in model.parameters()) - parameters_of(decoder, tower)
    trained = any(p.requires_grad for p in decoder.layers.parameters())
    few = least_tower_layers(model) / every[1] if every[1] else 1.0
    reason, taken, need = "", 0.0, 0.0
    for count in _halves(rows):
        for layers in (every, *shallow, shallowest):
            shares = [n / every_one if every_one else 1.0 for n, every_one in zip(layers, every, strict=True)]
            weights = fixed + parameters_of(decoder) * shares[0] + parameters_of(tower) * shares[1]
            kept = work.places * (ACTIVATIONS * work.width * layers[0] + 4 * work.vocab)
            need = itemsize * (weights * (2 if trained else 1.2) + count * kept)
            passes = 5 * shares[1] + 5 * few  # of the tower: in three modes and alone twice, as it is and shallow
            operations = count * (work.steps * work.decoder * shares[0] + passes * work.tower + 2 * work.head)
            taken = PASSES * operations / (speed * EFFICIENCY)
            if need <= memory and taken <= seconds:
                return Plan(count, layers[0], every[0], layers[1], every[1]), "", taken
            reason = (
                f"timing a few blocks needs about {need / 2**30:.1f} GiB, and {memory / 2**30:.1f} may be taken"
                if need > memory
                else f"timing a few blocks takes about {taken:.0f} s here, and {seconds:.0f} s of --seconds are left"
            )
    return None, reason, 0.0 if need > memory else taken


def measure(
    model: Any,
    batch: dict[str, Any],
    settings: DualSpeedConfig,
    chosen: Plan,
    arguments: Any,
    seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time the parts of plain, fast and slow steps.

    Whole steps are timed with the planned blocks, and again without any block of the language model and with few of
    the tower; the tower is timed alone at both lengths, as DualSpeed runs it and as the stock model does (with blocks
    that no feature depends on). The differences are what the blocks take. Weights are random,
    which changes no time of a dense model.

    Args:
        model: The model of the run on the meta device; it is changed.
        batch: One batch of `chosen.rows` rows.
        settings: Those of DualSpeed.
        chosen: What to time.
        arguments: TrainingArguments: device, precision, gradient checkpointing.
        seconds: What the timing may take; at least one round is timed.
        progress: Called with rounds done and rounds in all.

    Returns:
        ``steps`` (mode -> `StepParts` of the batch, scaled to the whole model), ``device``, ``threads``, ``rows``,
        ``layers`` (timed and all), ``scaled``, ``repeats``, ``spread`` (mode -> distance of the quartiles of its whole
        step in medians, 0 with one round) and ``clamped`` (parts whose time came out below 0 and was set to 0).
    """
    began = time.perf_counter()
    device = arguments.device
    decoder, tower = decoder_stack(model), tower_stack(model)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    decoder.cut(chosen.decoder_layers)
    if tower is not None:
        tower.cut(chosen.tower_layers)
    materialise(model, device)
    steps = _Steps(model, {name: value.to(device) for name, value in batch.items()}, settings, arguments)
    few = min(least_tower_layers(model), chosen.tower_layers)
    short = {decoder: 0, tower: few} if tower is not None else {decoder: 0}
    calls: dict[str, Callable[[], object]] = {mode: partial(steps.step, mode) for mode in MODES}
    calls |= {_rest(mode): partial(_shortened, partial(steps.step, mode), short) for mode in MODES}
    for name, encode in ((TOWER, steps.encode), (STOCK_TOWER, steps.encode_plainly)):
        calls |= {name: encode, _rest(name): partial(_shortened, encode, short)}
    logger = logging.getLogger("trimtab")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what attaching has to say belongs to the training
    try:
        timed = time_steps(calls, repeats=1, warmup=0)["steps"]
        left = seconds - (time.perf_counter() - began)
        repeats = max(0, min(MOST_REPEATS, int(left / sum(one["median"] for one in timed.values()))))
        if repeats:  # else the first round, slower than those after it, must do
            timed = time_steps(calls, repeats=repeats, warmup=0, progress=progress)["steps"]
    finally:
        logger.setLevel(level)
        steps.close()
    update = _update_seconds(model, weights)
    median = {name: one["median"] for name, one in timed.items()}
    parts, clamped = _parts(median, chosen, few, update)
    return {
        "steps": parts,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "rows": chosen.rows,
        "layers": {key: value for key, value in asdict(chosen).items() if key != "rows"},
        "scaled": chosen.scaled,
        "repeats": max(1, repeats),
        "spread": {mode: (timed[mode]["high"] - timed[mode]["low"]) / timed[mode]["median"] for mode in MODES},
        "clamped": clamped,
    }


def split_trouble(measured: Mapping[str, Any]) -> str:
    """Say why the parts of a measured step cannot be trusted; empty where they can.

    Args:
        measured: What `measure` returned.
    """
    signs = [f"the time of {part} came out below 0" for part in measured["clamped"]]
    widest = max(measured["spread"].values())
    if widest > SPREAD:
        signs.append(f"the rounds spread by {widest:.0%}")
    return f"The machine is too busy or the model too small to split the step: {', '.join(signs)}." if signs else ""


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product."""
    size = 512 if device.type == "cpu" else 4096
    one = torch.ones(size, size, dtype=dtype, device=device)
    _ = one @ one
    wait_for_device()
    began, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - began < 0.1:
        _ = one @ one
        wait_for_device()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - began)


def free_memory(device: torch.device) -> float:
    """Return how many bytes can be taken without harm; two thirds of what is free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) * 2 / 3
    table = Path("/proc/meminfo")
    if not table.is_file():
        return 4.0 * 2**30
    found = dict(line.split(":", 1) for line in table.read_text(encoding="ascii").splitlines())
    return float(found["MemAvailable"].split()[0]) * 1024 * 2 / 3


class _Steps(Bench):
    """Steps without the optimizer, whose work does not depend on the mode."""

    def __init__(self, model: Any, batch: dict[str, Any], settings: DualSpeedConfig, arguments: Any) -> None:
        super().__init__(model, batch, settings, arguments)
        self.host = open_host(model)
        # Where only adapters inside the blocks are trained, the gradient still runs through everything behind them.
        self.host.model.get_input_embeddings().register_forward_hook(_with_gradient)

    def _update(self) -> None:
        self._backward()
        self.model.zero_grad(set_to_none=True)

    def encode(self) -> None:
        """Run the vision tower and the projector alone, as DualSpeed does, backward too where they are trained."""
        with self.autocast():
            blocks = encode_images(self.host, self.batch).blocks
        self._through(blocks)

    def encode_plainly(self) -> None:
        """The same as the stock model does."""
        found = []
        with self.autocast():
            for kind in self.host.modalities:
                given = {name: self.batch.get(name) for name in kind.arguments}
                if given[kind.pixels] is not None:
                    named = {to: given[name] for name, to in zip(kind.arguments, kind.parameters, strict=True)}
                    found.append(encode_stock(self.host, kind, named))
        self._through(found)

    def _through(self, found: Any) -> None:
        leaves = [one for one in _pytree.tree_leaves(found) if isinstance(one, torch.Tensor)]
        if not leaves:
            return
        total = torch.stack([one.sum() for one in leaves]).sum()
        if total.requires_grad:
            total.backward()
        self.model.zero_grad(set_to_none=True)


def _with_gradient(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else None


def _rest(name: str) -> str:
    return f"{name}, shallow"


def _shortened(call: Callable[[], object], lengths: Mapping[Stack, int]) -> None:
    with contextlib.ExitStack() as short:
        for stack, length in lengths.items():
            short.enter_context(stack.shortened(length))
        call()


def _update_seconds(model: nn.Module, weights: int) -> float:
    """Return what AdamW takes for that many weights, timed on some of the model's own."""
    some: list[nn.Parameter] = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in sorted(trained, key=torch.Tensor.numel):
        if some and sum(p.numel() for p in some) >= UPDATED:
            break
        some.append(parameter)
    optimizer = torch.optim.AdamW(some, lr=0.0)
    taken = []
    for parameter in some:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(4):
        wait_for_device()
        began = time.perf_counter()
        optimizer.step()
        wait_for_device()
        taken.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return statistics.median(taken[1:]) * weights / sum(p.numel() for p in some)


def _parts(median: dict[str, float], chosen: Plan, few: int, update: float) -> tuple[dict[str, StepParts], list[str]]:
    """Take the timed steps apart and scale them to all blocks; also name the parts that came out below 0."""
    clamped: list[str] = []

    def positive(name: str, seconds: float) -> float:
        if seconds < 0:
            clamped.append(name)
        return max(0.0, seconds)

    parts = {}
    for mode in MODES:
        name = STOCK_TOWER if mode == "plain" else TOWER
        tower, shallow, rest = median[name], median[_rest(name)], median[_rest(mode)]
        # What the blocks take that shallow steps lack; where these lack none, the two times differ by chance.
        more = positive("the tower's blocks", tower - shallow) if chosen.tower_layers > few else 0.0
        decoder = positive(f"the decoder in a {mode} step", median[mode] - rest - more)
        parts[mode] = StepParts(
            tower=tower + more * (chosen.tower_all - chosen.tower_layers) / max(1, chosen.tower_layers - few),
            decoder=decoder * chosen.decoder_all / chosen.decoder_layers,
            head=positive(f"the head in a {mode} step", rest - shallow),
            optimizer=update,
        )
    return parts, list(dict.fromkeys(clamped))


def _halves(rows: int) -> Iterator[int]:
    while rows >= 1:
        yield rows
        rows //= 2


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
