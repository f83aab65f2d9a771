"""What the processes of one run must agree on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import attached, training_arguments
from tests.dualspeed.ranks import on_ranks
from tests.tiny import FAMILIES, TinyRows, collate, tiny_llava
from torch import distributed

import trimtab
from trimtab import DualSpeedConfig
from trimtab.dualspeed.ranks import require_agreement, touch
from trimtab.dualspeed.schedule import mode_of_step
from trimtab.errors import RankDisagreementError, WrongOrderError
from trimtab.ops.label_head import label_losses

SETTINGS: dict[str, Any] = {"keep_ratio": 0.2, "slow_ratio": 0.3, "seed": 2}


@pytest.mark.parametrize("schedule", ["stratified", "bernoulli", "annealed"])
def test_four_ranks_draw_equal_modes_for_ten_thousand_steps(schedule: str) -> None:
    """Four handles on four models, each with random states of torch and Python of its own."""
    import random

    config = DualSpeedConfig(slow_ratio=0.1, seed=5, schedule=schedule, total_steps=10_000)
    drawn = []
    for rank in range(4):
        random.seed(rank)
        torch.manual_seed(rank)
        with attached(tiny_llava(rank), **config.to_dict()) as handle:
            modes = []
            for step in range(10_000):
                handle.micro_step = step
                modes.append(handle.next_mode())
                random.random()
        drawn.append(modes)
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    assert drawn[0] == [
        mode_of_step(step, kind=schedule, slow_ratio=0.1, seed=5, total_steps=10_000) for step in range(10_000)
    ]
    # Bernoulli: 1000 +- 4 standard deviations of 30; the others are exact but for the last block.
    assert abs(drawn[0].count("slow") - 1000) <= (120 if schedule == "bernoulli" else 1)


def test_a_single_process_agrees_with_itself() -> None:
    require_agreement({"seed": 1})


def test_touch_changes_no_value_and_gives_zero_gradients() -> None:
    used, unused, frozen = (torch.nn.Parameter(torch.full((2, 3), float("inf"))) for _ in range(3))
    frozen.requires_grad_(False)
    value = torch.tensor(2.0, requires_grad=True)
    result = touch(value * 3, [used, unused, frozen])
    result.backward()
    assert result.item() == 6.0
    assert value.grad is not None
    assert value.grad.item() == 3.0
    for parameter in (used, unused):
        assert torch.equal(parameter.grad, torch.zeros(2, 3)), "zero, also where the parameter is not finite"
    assert frozen.grad is None


@pytest.mark.parametrize("labels", [0, 3, 7])
def test_the_number_of_chunks_alone_decides_how_often_the_head_is_called(labels: int) -> None:
    head = torch.nn.Linear(4, 5)
    calls = []
    head.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    states = torch.randn(labels, 4, requires_grad=True)
    targets = torch.arange(labels) % 5
    for teacher in (None, torch.randn(labels, 4)):
        plain = label_losses(states, teacher, targets, head)
        calls.clear()
        chunked = label_losses(states, teacher, targets, head, chunk=3, least_chunks=4)
        assert len(calls) == (4 if teacher is None else 8)
        # The same float32 sums in another order.
        torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
        head.zero_grad()
        chunked[0].backward()
        assert head.weight.grad is not None, "also where nothing is supervised"
        assert bool(head.weight.grad.any()) == (labels > 0)


def disagree(settings: list[dict[str, Any]], rows: list[int], folder: Path) -> Any:
    from transformers import Trainer

    rank = int(os.environ["RANK"])
    trainer = trimtab.with_dualspeed(Trainer)(
        model=tiny_llava(), args=training_arguments(folder, max_steps=2, ddp_backend="gloo"),
        train_dataset=TinyRows(rows[rank]), data_collator=collate, dualspeed=DualSpeedConfig(**settings[rank]),
    )  # fmt: skip
    # The isolator is drawn from the seed, and data parallel training gives every rank that of rank 0.
    before = {name: one.clone() for name, one in trainer.model.state_dict().items() if "isolator" not in name}
    try:
        trainer.train()
    except RankDisagreementError as error:
        same = all(torch.equal(one, before[name]) for name, one in trainer.model.state_dict().items() if name in before)
        return {"told": str(error), "untouched": same, "step": trainer.state.global_step}
    return {"told": "", "untouched": False, "step": trainer.state.global_step}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "rows", "told"),
    [
        ([SETTINGS, {**SETTINGS, "seed": 3}], [64, 64], ["seed: 2 on rank 0, 3 on rank 1."]),
        ([SETTINGS, {**SETTINGS, "keep_ratio": 0.3}], [64, 64], ["keep_ratio: 0.2 on rank 0, 0.3 on rank 1."]),
        (
            [SETTINGS, SETTINGS],
            [64, 32],
            ["rows of train_dataset: 64 on rank 0, 32 on rank 1.", "batches per epoch: 16 on rank 0, 8 on rank 1."],
        ),
    ],
    ids=["seed", "keep_ratio", "data"],
)
def test_ranks_that_disagree_stop_before_the_first_step_and_say_where(
    tmp_path: Path, settings: list[dict[str, Any]], rows: list[int], told: list[str]
) -> None:
    for rank in on_ranks(tmp_path, disagree, settings, rows, tmp_path / "out", group=False):
        assert "trace" not in rank, rank["trace"]
        for sentence in told:
            assert sentence in rank["told"]
        assert "slow_ratio" not in rank["told"], "what is equal is not told"
        assert rank["step"] == 0
        assert rank["untouched"]


def resume_at_different_steps() -> Any:
    with attached(tiny_llava(), **SETTINGS) as handle:
        handle.micro_step = 10 * distributed.get_rank()
        with pytest.raises(RankDisagreementError, match=r"step: 0 on rank 0, 10 on rank 1\."):
            handle._model(**FAMILIES["llava"].make_batch(handle._model, (1,)))
    return "stopped"


def mixed_kinds() -> Any:
    """One rank has images, the other videos, and the model is sharded; rank 1 alone has a slow row."""
    from trimtab.dualspeed.ranks import share_step

    rank = distributed.get_rank()
    labels = torch.tensor([3 + rank, 2])
    shared = share_step([rank == 0, False], labels, [0] if rank else [])
    with pytest.raises(RankDisagreementError, match="videos"):
        share_step([rank == 0, rank == 1], labels, [])
    return shared.visual, shared.labels, shared.slow_labels, shared.slow


def refuse_a_sharded_model() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(tiny_llava(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(WrongOrderError, match="before fully_shard"):
        trimtab.attach(model, DualSpeedConfig(**SETTINGS))
    return "refused"


def use_parts_outside_of_the_forward() -> Any:
    """`chosen_tokens`, `prune_inputs` and the side files of a sharded model, before and after its first step."""
    import tempfile

    from tests.dualspeed.ranks import Case, _wrap

    model = tiny_llava()
    batch = FAMILIES["llava"].make_batch(model, (1, 1), seed=3)
    with attached(tiny_llava(), **SETTINGS) as handle:
        expected, rows = handle.chosen_tokens(batch), handle.isolator.rows.detach().clone()
    with attached(model, **SETTINGS) as handle:
        wrapped = _wrap(Case("fsdp2"), model)
        for _ in range(2):
            for one, other in zip(handle.chosen_tokens(batch), expected, strict=True):
                assert torch.equal(one, other)
            with torch.no_grad():
                assert handle.prune_inputs(batch)["input_ids"].shape[1] < batch["input_ids"].shape[1]
            with tempfile.TemporaryDirectory() as folder:
                handle.save_pretrained(folder, write=distributed.get_rank() == 0)
                if distributed.get_rank() == 0:
                    from safetensors.torch import load_file

                    assert torch.equal(load_file(Path(folder) / "isolator.safetensors")["rows"], rows)
            handle.micro_step = 0
            wrapped(**batch).loss.backward()
    return sorted(name for name in vars(model) if "trimtab" in name)


def several() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {
        "resume": resume_at_different_steps(),
        "kinds": mixed_kinds(),
        "sharded": refuse_a_sharded_model(),
        "outside": use_parts_outside_of_the_forward(),
    }


@pytest.mark.slow
def test_what_two_ranks_refuse_and_share(tmp_path: Path) -> None:
    for rank in on_ranks(tmp_path, several):
        assert "trace" not in rank, rank["trace"]
        assert rank == {"resume": "stopped", "kinds": (True, 5, 4, True), "sharded": "refused", "outside": []}
