"""Two processes whose batches hold other mixes of modes: none waits for the other, and gradients are their mean."""

from __future__ import annotations

import traceback
import unittest.mock
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.dualspeed.packing_tools import SETTINGS
from tests.dualspeed.ranks import Case, _whole, _wrap, on_ranks
from tests.dualspeed.test_packed_modes import PER_SAMPLE, samples
from tests.tiny import FAMILIES, gradients
from torch import Tensor, distributed

import trimtab
from trimtab import DualSpeedConfig

FAST, SLOW, BOTH = ("fast",) * 3, ("slow",) * 3, ("fast", "fast", "slow")


@dataclass(frozen=True)
class Mix:
    """One comparison of gradients.

    Attributes:
        wrap: As of `Case`.
        modes: For each rank the mode of each of its rows.
        images: For each rank the images of each of its rows.
        family: Key in `FAMILIES`.
        settings: Of DualSpeed.
        frozen: Prefixes of parameters that do not train.
        checkpointing: Whether activations are recomputed in the backward pass.
    """

    wrap: str
    modes: tuple[tuple[str, ...], ...] = (BOTH, FAST)
    images: tuple[tuple[int, ...], ...] = ((1, 0, 2), (1, 1, 0))
    family: str = "llava"
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    checkpointing: bool = False


def compare_mixes(mixes: dict[str, Mix]) -> dict[str, Any]:
    """Return for each case how far the gradients of this rank are from those of one process."""
    found: dict[str, Any] = {}
    for name, mix in mixes.items():
        try:
            found[name] = _compare(mix)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            break  # the other rank may wait for this one in vain
    return found


def _compare(mix: Mix) -> dict[str, Any]:
    alone, batches = _make(mix)
    with unittest.mock.patch.object(distributed, "is_initialized", return_value=False):
        handle = trimtab.attach(alone, _config(mix))
        for batch in batches:
            (alone(**batch).loss / len(batches)).backward()
        expected = gradients(alone)
        handle.detach()
    model, _ = _make(mix)
    handle = trimtab.attach(model, _config(mix))
    wrapped = _wrap(Case(mix.wrap), model)
    wrapped(**batches[distributed.get_rank()]).loss.backward()
    metrics = handle.metrics()
    found: dict[str, Tensor] = {name: _whole(gradient) for name, gradient in gradients(model).items()}
    handle.detach()
    return {
        "difference": max(float((found[name] - expected[name]).abs().max()) for name in expected if name in found),
        "largest": max(float(gradient.abs().max()) for gradient in expected.values()),
        "missing": sorted(expected.keys() - found.keys()),
        "more": sorted(name for name in found.keys() - expected.keys() if found[name].any()),
        "slow": metrics["samples_slow"],
    }


def _config(mix: Mix) -> DualSpeedConfig:
    return DualSpeedConfig(**{**SETTINGS, **PER_SAMPLE, "packing": True, **mix.settings})


def _make(mix: Mix) -> tuple[Any, list[dict[str, Any]]]:
    family = FAMILIES[mix.family]
    model = family.build_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(mix.frozen) if mix.frozen else True)
    batches = [
        {**family.make_batch(model, images, seed=rank), "samples": samples(modes)}
        for rank, (images, modes) in enumerate(zip(mix.images, mix.modes, strict=True))
    ]
    if mix.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, batches


TEXT_ONLY = ((1, 0, 2), (0, 0, 0))
TOWER = ("model.vision_tower",)

MIXES: dict[str, Mix] = {
    "DDP, one without slow rows": Mix("ddp"),
    "DDP, fast beside slow": Mix("ddp", modes=(FAST, SLOW)),
    "DDP, text only": Mix("ddp", images=TEXT_ONLY, frozen=TOWER),
    "DDP, padded": Mix("ddp", settings={"packing": False}),
}

SLOW_MIXES: dict[str, Mix] = {
    "DDP, checkpointing of slow steps": Mix("ddp", checkpointing=True, settings={"recompute": "slow"}),
    "DDP, looking for unused parts": Mix("ddp_find", modes=(SLOW, FAST)),
    "DDP, qwen2_5_vl": Mix("ddp", family="qwen2_5_vl"),
    "FSDP2, one without slow rows": Mix("fsdp2"),
    "FSDP2, fast beside slow": Mix("fsdp2", modes=(FAST, SLOW), settings={"head_chunk": 4}),
    "FSDP2, text only": Mix("fsdp2", images=TEXT_ONLY, settings={"head_chunk": 4}),
    "FSDP2, checkpointing of slow steps": Mix("fsdp2", checkpointing=True, settings={"recompute": "slow"}),
    "FSDP2, no teacher": Mix("fsdp2", settings={"kl_weight": 0.0}),
    "FSDP2, padded": Mix("fsdp2", settings={"packing": False}),
    "FSDP2, qwen2_5_vl": Mix("fsdp2", family="qwen2_5_vl", modes=(FAST, SLOW)),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), compare_mixes, MIXES)


@pytest.fixture(scope="module")
def slowly_found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), compare_mixes, SLOW_MIXES)


def is_the_mean(ranks: list[dict[str, Any]], name: str, mix: Mix) -> None:
    for number, rank in enumerate(ranks):
        one = rank.get(name, rank)
        assert "error" not in one, one.get("trace", one)
        assert one["missing"] == [], "parameters without gradient that have one in a single process"
        assert one["more"] == [], "parameters with a gradient other than zero that have none in a single process"
        assert one["largest"] > 1e-2
        assert one["difference"] <= 1e-6 * max(1.0, one["largest"])
        drawn = [row for row, mode in enumerate(mix.modes[number]) if mode == "slow"]
        # Where all must call the same modules, rows without image go along with their teacher.
        taught = drawn if mix.wrap == "fsdp2" else [row for row in drawn if mix.images[number][row]]
        assert one["slow"] == len(taught), "the ranks hold other mixes"


@pytest.mark.parametrize("name", MIXES)
def test_gradients_are_the_mean_of_the_ranks(found: list[dict[str, Any]], name: str) -> None:
    is_the_mean(found, name, MIXES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_MIXES)
def test_gradients_are_the_mean_of_the_ranks_in_more_cases(slowly_found: list[dict[str, Any]], name: str) -> None:
    is_the_mean(slowly_found, name, SLOW_MIXES[name])
