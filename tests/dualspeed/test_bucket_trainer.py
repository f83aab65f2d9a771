"""Batches of rows of like length inside a Trainer: which come, on every process, and after an interruption."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.dualspeed.common import KillAt, KilledError
from tests.dualspeed.ranks import on_ranks
from tests.dualspeed.test_packed_trainer import PADDED, ROWS, Streamed, loader_of, same_run, samples_of
from tests.dualspeed.test_packed_trainer import make_trainer as make_any_trainer
from tests.tiny import TinyRows, collate, tiny_llava, weights

import trimtab
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.loader import BucketSampler
from trimtab.dualspeed.packs import SampleLength, bucket_batches
from trimtab.dualspeed.sample_lengths import load_lengths, measure_lengths
from trimtab.dualspeed.schedule import mode_of_sample
from trimtab.dualspeed.trainer_data import LENGTHS_FILE, bucket_sampler
from trimtab.errors import SettingError

POOLED: dict[str, Any] = {**PADDED, "bucket_pool": 4}
BY_STEP: dict[str, Any] = {**POOLED, "schedule_unit": "optimizer"}
PLAIN: dict[str, Any] = {
    "pruner": "keep_all", "isolator_tokens": 0, "slow_ratio": 0.0, "bucket_pool": 4, "seed": 11,
}  # fmt: skip
SPREAD = [SampleLength(20 + 7 * (n % 11) + 15 * (n % 3), 20 + 7 * (n % 11)) for n in range(ROWS)]
WHOLE = {
    "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def make_trainer(out: Path, callbacks: Any = None, **changes: Any) -> Any:
    return make_any_trainer(out, callbacks, **{"dualspeed": POOLED, "per_device_train_batch_size": 6, **changes})


def sizes(plan: list[list[int]]) -> list[int]:
    return [len(batch) for batch in plan]


def padded_places(found: Any, length: Any) -> int:
    return sum(len(one.ids) * max(map(length, one.ids)) for one in found)


# off is identity ------------------------------------------------------------------------------------------------------


def test_without_the_setting_the_trainers_own_order_stays(tmp_path: Path) -> None:
    own = {**BY_STEP, "bucket_pool": None}
    ours = [batch["input_ids"] for batch in loader_of(make_trainer(tmp_path / "off", dualspeed=own))]
    plain = [batch["input_ids"] for batch in loader_of(make_trainer(tmp_path / "plain", dualspeed=None))]
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
    assert not (tmp_path / "off" / LENGTHS_FILE).exists()


def test_one_process_has_the_buckets_as_they_are() -> None:
    for rows in (1, 5, 6, 64):
        sampler = BucketSampler(SPREAD[:rows], batch_size=6, slow_ratio=0.3, seed=4, pool=3)
        assert sampler.plan(2) == bucket_batches(SPREAD[:rows], batch_size=6, slow_ratio=0.3, seed=4, epoch=2, pool=3)


# which batches come -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "ratio"), [(POOLED, 0.3), (BY_STEP, 0.0)], ids=["by mode", "by fast length"])
def test_batches_are_of_the_lengths_that_the_settings_say(
    tmp_path: Path, settings: dict[str, Any], ratio: float
) -> None:
    loader = loader_of(make_trainer(tmp_path, dualspeed=settings, dualspeed_lengths=SPREAD))
    for epoch in range(2):
        loader.set_epoch(epoch)
        plan = bucket_batches(SPREAD, batch_size=6, slow_ratio=ratio, seed=11, epoch=epoch, pool=4)
        assert [(list(one.ids), one.epoch) for one in samples_of(loader)] == [(batch, epoch) for batch in plan]
    assert not (tmp_path / LENGTHS_FILE).exists(), "given lengths skip measuring"


@pytest.mark.filterwarnings("ignore:slow_ratio=0 trains the language model on pruned images only")
def test_a_frozen_language_model_is_sorted_by_its_fast_lengths(tmp_path: Path) -> None:
    model = tiny_llava()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    frozen = samples_of(loader_of(make_trainer(tmp_path / "frozen", model=model, dualspeed_lengths=SPREAD)))
    fast = {**POOLED, "slow_ratio": 0.0}
    assert frozen == samples_of(loader_of(make_trainer(tmp_path / "fast", dualspeed=fast, dualspeed_lengths=SPREAD)))
    assert frozen != samples_of(loader_of(make_trainer(tmp_path / "trained", dualspeed_lengths=SPREAD)))


def test_padding_falls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trimtab"):
        trainer = make_trainer(tmp_path / "pooled", dualspeed=BY_STEP)
        pooled = samples_of(loader_of(trainer))
    own = samples_of(loader_of(make_trainer(tmp_path / "own", dualspeed=PADDED)))
    lengths = load_lengths(tmp_path / "pooled" / LENGTHS_FILE)
    assert lengths == measure_lengths(TinyRows(ROWS), collate, tiny_llava(), trainer.dualspeed.config)
    assert sorted(row for one in pooled for row in one.ids) == list(range(ROWS))
    fast = [one.fast for one in lengths]
    padding = [padded_places(found, fast.__getitem__) - sum(fast) for found in (pooled, own)]
    assert 3 * padding[0] < padding[1]
    share = padding[0] / (padding[0] + sum(fast))
    assert f"{len(pooled)} batches of rows of like length in each epoch, {100 * share:.1f} % padding" in caplog.text


def test_plain_training_has_the_same_batches(tmp_path: Path) -> None:
    """For a fair baseline: rows are sorted by what a model without pruning has."""
    trainer = make_trainer(tmp_path, dualspeed=PLAIN, max_steps=3)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    lengths = load_lengths(tmp_path / LENGTHS_FILE)
    assert all(one.fast == one.full for one in lengths)
    plan = bucket_batches(lengths, batch_size=6, slow_ratio=0, seed=11, epoch=0, pool=4)
    assert [list(samples.ids) for samples, *_ in trainer.seen] == plan[:3]


def test_lengths_are_kept_and_taken_up_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trimtab"):
        first = samples_of(loader_of(make_trainer(tmp_path)))
        assert f"Measured the lengths of {ROWS} rows in" in caplog.text
        caplog.clear()
        assert samples_of(loader_of(make_trainer(tmp_path))) == first
        assert "Measured" not in caplog.text


def test_dropping_the_last_batch_leaves_out_other_rows_in_each_epoch(tmp_path: Path) -> None:
    loader = loader_of(make_trainer(tmp_path, dataloader_drop_last=True, dualspeed_lengths=SPREAD))
    left = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found = samples_of(loader)
        assert sizes([list(one.ids) for one in found]) == [6] * (ROWS // 6)
        left.append({*range(ROWS)}.difference(*(one.ids for one in found)))
    assert len(loader) == ROWS // 6
    assert len(left[0]) == len(left[1]) == ROWS % 6
    assert left[0] != left[1]


# for several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [2, 4, 7])
def test_any_rows_make_whole_groups(group: int, batch_size: int) -> None:
    for rows in range(group, ROWS + 1):
        sampler = BucketSampler(SPREAD[:rows], batch_size=batch_size, slow_ratio=0.3, seed=4, pool=2, group=group)
        counts = set()
        for epoch in range(2):
            plan = sampler.plan(epoch)
            assert sorted(row for batch in plan for row in batch) == list(range(rows)), "every row once"
            assert min(sizes(plan)) >= 1
            assert max(sizes(plan)) <= batch_size
            for start in range(0, len(plan), group):
                step = sizes(plan[start : start + group])
                assert len(step) == group
                assert max(step) - min(step) <= 1, "no process waits for another"
            counts.add(len(plan))
        assert len(counts) == 1, "a Trainer takes it for granted"


@pytest.mark.parametrize("rows", [33, 34])
def test_rows_that_are_left_over_stand_beside_rows_of_like_length(rows: int) -> None:
    lengths = [SampleLength(10 + n, 10 + n) for n in range(rows)]
    sampler = BucketSampler(lengths, batch_size=4, slow_ratio=0, seed=4, pool=8, group=4)
    last = sampler.plan(0)[4:]
    assert len(last) == 8, "one or two rows have no place of their own beside whole batches for four processes"
    flat = [row for batch in last for row in batch]
    assert flat == sorted(flat, reverse=True)
    assert all(max(batch) - min(batch) < rows / 2 for batch in sampler.plan(0)[:4])


def test_whole_groups_alone_remain_where_the_rest_is_left_out() -> None:
    sampler = BucketSampler(SPREAD[:50], batch_size=4, slow_ratio=0.3, seed=4, group=3, drop_last=True)
    for epoch in range(2):
        whole = bucket_batches(SPREAD[:50], batch_size=4, slow_ratio=0.3, seed=4, epoch=epoch, group=3)[:12]
        assert sampler.plan(epoch) == whole
        assert sizes(whole) == [4] * 12


# training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[POOLED, BY_STEP], ids=["sample", "optimizer"])
def whole_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), dualspeed=request.param, **WHOLE)
    trainer.train()
    return trainer


def test_training_sees_every_row_once_in_each_epoch(whole_run: Any) -> None:
    seen: dict[int, list[int]] = {}
    for samples, fast, slow in whole_run.seen:
        seen.setdefault(samples.epoch, []).extend(samples.ids)
        drawn = [mode_of_sample(n, epoch=samples.epoch, slow_ratio=0.3, seed=11) == "slow" for n in samples.ids]
        slow_images = sum(is_slow and n % 7 != 6 for n, is_slow in zip(samples.ids, drawn, strict=True))
        if whole_run.dualspeed.config.schedule_unit == "sample":
            assert (fast, slow) == (len(drawn) - slow_images, slow_images)
    assert {epoch: sorted(ids) for epoch, ids in seen.items()} == {epoch: list(range(ROWS)) for epoch in range(3)}


@pytest.mark.parametrize("step", [3, 15], ids=["first epoch", "last epoch"])
def test_killed_and_resumed_is_never_killed(whole_run: Any, tmp_path: Path, step: int) -> None:
    how = {**WHOLE, "dualspeed": whole_run.dualspeed.config}
    broken = make_trainer(tmp_path, [KillAt(step)], **how)
    with pytest.raises(KilledError):
        broken.train()
    resumed = make_trainer(tmp_path, **how)
    resumed.train(resume_from_checkpoint=True)
    same_run(resumed, whole_run)
    ours, whole = ([samples for samples, *_ in one.seen] for one in (resumed, whole_run))
    assert 0 < len(ours) < len(whole)
    assert ours == whole[-len(ours) :]


def run_on_rank(folder: Path, killed: int | None) -> Any:
    warnings.simplefilter("ignore")
    how = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "ddp_backend": "gloo"}
    if killed is not None:
        with pytest.raises(KilledError):
            make_trainer(folder, [_KillAtStep(killed)], **how).train()
    trainer = make_trainer(folder, **how)
    trainer.train(resume_from_checkpoint=killed is not None)
    return {"seen": trainer.seen, "weights": weights(trainer.model), "length": len(loader_of(trainer))}


class _KillAtStep(KillAt):
    """Ends the run between two steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)


@pytest.mark.slow
def test_two_processes_share_every_epoch_and_resume(tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path / "a", run_on_rank, tmp_path / "whole", None, group=False)
    again = on_ranks(tmp_path / "b", run_on_rank, tmp_path / "broken", 10, group=False)
    for one in (*ranks, *again):
        assert "trace" not in one, one["trace"]
    assert ranks[0]["length"] == ranks[1]["length"] == 6
    lengths = load_lengths(tmp_path / "whole" / LENGTHS_FILE)
    plan = BucketSampler(lengths, batch_size=6, slow_ratio=0.3, seed=11, pool=4, group=2)
    for number, rank in enumerate(ranks):
        batches = [(list(one.ids), one.epoch) for one, *_ in rank["seen"]]
        assert batches == [(batch, epoch) for epoch in range(2) for batch in plan.plan(epoch)[number::2]]
    for rank, resumed in zip(ranks, again, strict=True):
        assert resumed["seen"] == rank["seen"][8:]
        for key, value in rank["weights"].items():
            assert torch.equal(resumed["weights"][key], value), key


def disagree(folder: Path) -> Any:
    warnings.simplefilter("ignore")
    lengths = [SampleLength(200, 40 + (number if os.environ["RANK"] == "1" else 0)) for number in range(ROWS)]
    make_trainer(folder, dualspeed_lengths=lengths, max_steps=2, ddp_backend="gloo").train()


@pytest.mark.slow
def test_processes_with_other_plans_stop_before_the_first_step(tmp_path: Path) -> None:
    for rank in on_ranks(tmp_path, disagree, tmp_path / "out", group=False):
        assert "RankDisagreementError" in rank["kind"], rank
        assert "plan of the batches" in rank["error"][0]


# bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bucket_pool": 1}, "bucket_pool must be a whole number, at least 2, or None.*1"),
        ({"bucket_pool": 2.5}, "bucket_pool must be a whole number, at least 2"),
        ({"bucket_pool": True}, "bucket_pool must be a whole number, at least 2"),
        ({"packing": True, "pack_tokens": 200, "bucket_pool": 50}, "bucket_pool must be None with pack_tokens"),
    ],
)
def test_the_setting_outside_its_range_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError, match=told):
        DualSpeedConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length.*bucket_pool"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance.*bucket_pool"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches.*bucket_pool"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches.*bucket_pool"),
        (
            {"dualspeed": {**BY_STEP, "bucket_pool": None}, "dualspeed_lengths": []},
            "dualspeed_lengths.*pack_tokens or bucket_pool",
        ),
    ],
)
def test_arguments_that_would_change_the_batches_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(SettingError, match=f"(?s){told}"):
        make_trainer(tmp_path, **changes)


def test_a_smaller_batch_size_may_be_looked_for(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, auto_find_batch_size=True, dualspeed_lengths=SPREAD)
    trainer._train_batch_size = 3
    assert {len(one.ids) for one in samples_of(loader_of(trainer))} == {3, 1}


@pytest.mark.parametrize(
    ("changes", "processes", "told"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": ROWS + 1}, 1, "leaves out all 64 rows.*lower"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 33}, 2, "leaves out all 64 rows.*of 2 proc"),
        ({"per_device_train_batch_size": 1}, 3, "64 rows in batches of 1.*each of 3 processes.*to 2 or more"),
        ({}, ROWS + 1, "64 rows in batches of 6.*each of 65 processes.*at least as many rows"),
    ],
)
def test_rows_that_cannot_be_shared_out_are_refused(
    tmp_path: Path, changes: dict[str, Any], processes: int, told: str
) -> None:
    trainer = make_trainer(tmp_path, **changes)
    trainer.accelerator = SimpleNamespace(num_processes=processes)
    with pytest.raises(SettingError, match=told):
        bucket_sampler(trainer, trainer.dualspeed.config, SPREAD)


def test_rows_one_after_another_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_dataset=Streamed())
    with pytest.raises(SettingError, match="one after another"):
        trainer.train()


def test_lengths_for_other_rows_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dualspeed_lengths=[SampleLength(9, 9)] * 3)
    with pytest.raises(SettingError, match=f"each of the {ROWS} rows"):
        trainer.train()


def test_a_callback_refuses_it(tmp_path: Path) -> None:
    from tests.dualspeed.common import training_arguments
    from transformers import Trainer

    callback = trimtab.DualSpeedCallback(DualSpeedConfig(**BY_STEP))
    with pytest.raises(SettingError, match="need DualSpeed's own batches, which a callback cannot make"):
        Trainer(
            model=tiny_llava(), args=training_arguments(tmp_path), train_dataset=TinyRows(8), data_collator=collate,
            callbacks=[callback],
        ).train()  # fmt: skip
