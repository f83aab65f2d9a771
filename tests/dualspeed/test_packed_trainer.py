"""Packs and modes per sample inside a Trainer: which batches come, on every process, and after an interruption."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.dualspeed.common import KillAt, KilledError, training_arguments
from tests.dualspeed.ranks import on_ranks
from tests.tiny import TinyRows, collate, tiny_llava, weights
from torch.utils.data import IterableDataset
from transformers import Trainer

import trimtab
from trimtab.dualspeed.loader import PackSampler
from trimtab.dualspeed.packs import SampleLength, Samples, lengths_of_modes
from trimtab.dualspeed.sample_lengths import load_lengths, measure_lengths, save_lengths
from trimtab.dualspeed.schedule import mode_of_sample
from trimtab.dualspeed.trainer_data import LENGTHS_FILE
from trimtab.errors import SettingError

ROWS = 64
PACKED: dict[str, Any] = {
    "keep_ratio": 0.2, "slow_ratio": 0.3, "seed": 11, "isolator_tokens": 2, "schedule_unit": "sample",
    "packing": True, "pack_tokens": 200,
}  # fmt: skip
PADDED = {**PACKED, "packing": False, "pack_tokens": None}


class Watched(Trainer):
    """A Trainer that keeps which samples every training step had, and how they were taught."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "seen"):
            self.seen: list[Any] = []
        samples, before = inputs["samples"], self._counts()
        loss = super().training_step(model, inputs, *args, **kwargs)
        fast, slow = (now - then for now, then in zip(self._counts(), before, strict=True))
        self.seen.append((samples, fast, slow))
        return loss

    def _counts(self) -> tuple[int, int]:
        metrics = self.dualspeed.metrics()
        return metrics.get("samples_fast", 0), metrics.get("samples_slow", 0)


def make_trainer(out: Path, callbacks: Any = None, kind: type[Any] = Watched, **changes: Any) -> Any:
    own = {name: changes.pop(name) for name in ("train_dataset", "dualspeed_lengths") if name in changes}
    settings = changes.pop("dualspeed", PACKED)
    model = changes.pop("model", None)
    return trimtab.with_dualspeed(kind)(
        model=tiny_llava() if model is None else model, args=training_arguments(out, **changes),
        data_collator=collate, callbacks=callbacks, dualspeed=settings, **{"train_dataset": TinyRows(ROWS), **own},
    )  # fmt: skip


def loader_of(trainer: Any) -> Any:
    return trainer.get_train_dataloader()


def samples_of(loader: Any) -> list[Samples]:
    return [batch["samples"] for batch in loader]


def same_run(ours: Any, theirs: Any) -> None:
    expected = weights(theirs.model)
    for key, value in weights(ours.model).items():
        assert torch.equal(value, expected[key]), key
    assert [e["loss"] for e in ours.state.log_history if "loss" in e] == [
        e["loss"] for e in theirs.state.log_history if "loss" in e
    ]


# which batches come -------------------------------------------------------------------------------------------------


def test_batches_are_the_packs_of_the_plan(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=3, max_steps=-1, dualspeed={**PACKED, "seed": 9})
    loader = loader_of(trainer)
    lengths = measure_lengths(TinyRows(ROWS), collate, trainer.model, trainer.dualspeed.config)
    plan = PackSampler(lengths, budget=200, slow_ratio=0.3, seed=9)
    natural = len(plan)
    plan.even_out(3)
    assert len(plan) > natural, "the first epoch is not the fullest"
    counts = set()
    for epoch in range(3):
        loader.set_epoch(epoch)
        plan.set_epoch(epoch)
        found = samples_of(loader)
        assert found == [Samples(tuple(pack), epoch) for pack in plan.plan(epoch)]
        size = [count for _, count in lengths_of_modes(lengths, slow_ratio=0.3, seed=9, epoch=epoch)]
        assert max(sum(size[one] for one in samples.ids) for samples in found) <= 200
        counts.add(len(loader))
    assert len(counts) == 1, "a Trainer takes it for granted"


def test_the_seed_of_the_trainer_has_no_say(tmp_path: Path) -> None:
    found = [
        samples_of(loader_of(make_trainer(tmp_path / str(n), dualspeed={**PACKED, "seed": ours}, seed=theirs)))
        for n, (ours, theirs) in enumerate([(11, 3), (11, 4), (12, 3)])
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.filterwarnings("ignore:slow_ratio=0 trains the language model on pruned images only")
def test_a_frozen_language_model_is_packed_by_its_fast_lengths(tmp_path: Path) -> None:
    model = tiny_llava()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    frozen = loader_of(make_trainer(tmp_path / "frozen", model=model))
    fast = loader_of(make_trainer(tmp_path / "fast", dualspeed={**PACKED, "slow_ratio": 0.0}, model=tiny_llava()))
    assert samples_of(frozen) == samples_of(fast)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    alone = loader_of(make_trainer(tmp_path / "alone"))
    helped = loader_of(make_trainer(tmp_path / "helped", dataloader_num_workers=2, dataloader_persistent_workers=True))
    for epoch in range(2):
        for loader in (alone, helped):
            loader.set_epoch(epoch)
        for ours, theirs in zip(alone, helped, strict=True):
            assert ours["samples"] == theirs["samples"]
            assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_without_packs_the_trainers_own_order_stays(tmp_path: Path) -> None:
    ours = loader_of(make_trainer(tmp_path / "ours", dualspeed=PADDED, per_device_train_batch_size=4))
    plain = loader_of(
        make_trainer(tmp_path / "plain", dualspeed={**PADDED, "schedule_unit": "micro"}, per_device_train_batch_size=4)
    )
    rows = TinyRows(ROWS)
    for epoch in range(2):
        ours.set_epoch(epoch)
        plain.set_epoch(epoch)
        seen = []
        for batch, expected in zip(ours, plain, strict=True):
            samples = batch["samples"]
            assert samples.epoch == epoch
            assert torch.equal(batch["input_ids"], expected["input_ids"])
            assert torch.equal(collate([rows[one] for one in samples.ids])["input_ids"], expected["input_ids"])
            seen += samples.ids
        assert sorted(seen) == list(range(ROWS))


def test_other_settings_leave_the_loader_alone(tmp_path: Path) -> None:
    loader = loader_of(make_trainer(tmp_path, dualspeed={**PADDED, "schedule_unit": "optimizer"}))
    assert "samples" not in next(iter(loader))
    assert not (tmp_path / LENGTHS_FILE).exists()


def test_unused_columns_are_left_out_as_the_trainer_does(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2], "name": "x"}] * 8)
    seen: list[set[str]] = []

    def keep(items: Any) -> Any:
        seen.append({*items[0]})
        return {name: torch.tensor([item[name] for item in items]) for name in ("input_ids", "labels")}

    for data in (rows, rows.to_list()):
        trainer = make_trainer(tmp_path / type(data).__name__, remove_unused_columns=True, train_dataset=data)
        trainer.data_collator = keep
        assert sorted(one for samples in samples_of(loader_of(trainer)) for one in samples.ids) == list(range(8))
    assert all(one == {"input_ids", "labels"} for one in seen)


# lengths ------------------------------------------------------------------------------------------------------------


def test_lengths_are_measured_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trimtab"):
        first = samples_of(loader_of(make_trainer(tmp_path)))
        assert f"Measured the lengths of {ROWS} rows in" in caplog.text
        caplog.clear()
        assert samples_of(loader_of(make_trainer(tmp_path))) == first
        assert "Measured" not in caplog.text
        other = {**PACKED, "keep_ratio": 0.3}
        loader_of(make_trainer(tmp_path, dualspeed=other))
        assert "other data, another model, or other settings" in caplog.text
        assert "Measured" in caplog.text


def test_kept_lengths_of_other_rows_are_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader_of(make_trainer(tmp_path))
    right = load_lengths(tmp_path / LENGTHS_FILE)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trimtab"):
        loader_of(make_trainer(tmp_path, train_dataset=TinyRows(ROWS, seed=1)))  # equally long, row by row
        assert "Measured" not in caplog.text

        class Longer(TinyRows):
            def __getitem__(self, number: int) -> Any:
                return super().__getitem__(number + 1)

        loader_of(make_trainer(tmp_path, train_dataset=Longer(ROWS)))
    assert "holds the lengths of other rows" in caplog.text
    assert load_lengths(tmp_path / LENGTHS_FILE) != right


def test_a_broken_file_of_lengths_is_made_anew(tmp_path: Path) -> None:
    first = samples_of(loader_of(make_trainer(tmp_path)))
    (tmp_path / LENGTHS_FILE).write_bytes(b"broken")
    assert samples_of(loader_of(make_trainer(tmp_path))) == first
    assert len(load_lengths(tmp_path / LENGTHS_FILE)) == ROWS


def test_given_lengths_skip_measuring(tmp_path: Path) -> None:
    given = [SampleLength(100, 50)] * ROWS
    loader = loader_of(make_trainer(tmp_path, dualspeed_lengths=given))
    assert not (tmp_path / LENGTHS_FILE).exists()
    for samples in samples_of(loader):
        slow = sum(mode_of_sample(one, epoch=0, slow_ratio=0.3, seed=11) == "slow" for one in samples.ids)
        assert 100 * slow + 50 * (len(samples.ids) - slow) <= 200


# training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = make_trainer(
        tmp_path_factory.mktemp("whole"), max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_training_sees_every_sample_once_in_each_epoch_in_its_mode(whole_run: Any) -> None:
    seen: dict[int, list[int]] = {}
    for samples, fast, slow in whole_run.seen:
        seen.setdefault(samples.epoch, []).extend(samples.ids)
        drawn = [
            mode_of_sample(one, epoch=samples.epoch, slow_ratio=0.3, seed=11) == "slow" and one % 7 != 6
            for one in samples.ids
        ]
        assert (fast, slow) == (drawn.count(False), drawn.count(True))
    assert {epoch: sorted(ids) for epoch, ids in seen.items()} == {epoch: list(range(ROWS)) for epoch in range(3)}


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_killed_and_resumed_is_never_killed(whole_run: Any, tmp_path: Path, place: float) -> None:
    step = round(place * whole_run.state.max_steps)
    how = {
        "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps",
        "save_steps": 2,
    }  # fmt: skip
    broken = make_trainer(tmp_path, [KillAt(step)], **how)
    with pytest.raises(KilledError):
        broken.train()
    resumed = make_trainer(tmp_path, **how)
    resumed.train(resume_from_checkpoint=True)
    same_run(resumed, whole_run)
    assert resumed.seen == whole_run.seen[-len(resumed.seen) :]
    assert len(resumed.seen) < len(whole_run.seen)


@pytest.mark.parametrize("packing", [False, True])
def test_modes_per_sample_resume_without_packs(tmp_path: Path, packing: bool) -> None:
    how = {
        "dualspeed": {**PADDED, "packing": packing}, "max_steps": 24, "per_device_train_batch_size": 4,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **how)
    whole.train()
    assert {samples.epoch for samples, *_ in whole.seen} == {0, 1}
    with pytest.raises(KilledError):
        make_trainer(tmp_path / "broken", [_KillAtStep(20)], **how).train()
    resumed = make_trainer(tmp_path / "broken", **how)
    resumed.train(resume_from_checkpoint=True)
    same_run(resumed, whole)
    assert resumed.seen == whole.seen[18:]


class _KillAtStep(KillAt):
    """Ends the run between two steps, since there are no smaller ones."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)


def test_evaluation_has_its_own_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.eval_dataset = TinyRows(4)
    assert trainer.evaluate()["eval_loss"] > 0
    assert "samples" not in next(iter(trainer.get_eval_dataloader()))


# several processes ----------------------------------------------------------------------------------------------------


def run_on_rank(folder: Path, settings: list[dict[str, Any]], killed: int | None) -> Any:
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    how = {
        "max_steps": 12, "save_strategy": "steps", "save_steps": 4, "ddp_backend": "gloo",
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    found: dict[str, Any] = {}
    if killed is not None:
        broken = make_trainer(folder, [_KillAtStep(killed)], dualspeed=settings[rank], **how)
        try:
            broken.train()
        except KilledError:
            found["broken"] = broken.seen
    trainer = make_trainer(folder, dualspeed=settings[rank], **how)
    trainer.train(resume_from_checkpoint=killed is not None)
    return {**found, "seen": trainer.seen, "weights": weights(trainer.model), "length": len(loader_of(trainer))}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PACKED, PADDED], ids=["packs", "padded"])
def test_two_processes_share_every_epoch_and_resume(tmp_path: Path, settings: dict[str, Any]) -> None:
    ranks = on_ranks(tmp_path / "a", run_on_rank, tmp_path / "whole", [settings] * 2, None, group=False)
    again = on_ranks(tmp_path / "b", run_on_rank, tmp_path / "broken", [settings] * 2, 10, group=False)
    for one in (*ranks, *again):
        assert "trace" not in one, one["trace"]
    assert ranks[0]["length"] == ranks[1]["length"]
    of_epoch: dict[int, list[int]] = {}
    for rank in ranks:
        for samples, *_ in rank["seen"]:
            of_epoch.setdefault(samples.epoch, []).extend(samples.ids)
    assert len(of_epoch) > 1, "or resuming in a later epoch is not shown"
    assert sorted(of_epoch[0]) == list(range(ROWS)), "no sample twice, none left out"
    for rank, resumed in zip(ranks, again, strict=True):
        assert resumed["seen"] == rank["seen"][8:]
        for key, value in rank["weights"].items():
            assert torch.equal(resumed["weights"][key], value), key


def disagree(folder: Path) -> Any:
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    lengths = [SampleLength(100 + rank, 50)] * ROWS
    make_trainer(folder, dualspeed_lengths=lengths, max_steps=2, ddp_backend="gloo").train()


@pytest.mark.slow
def test_processes_with_other_plans_stop_before_the_first_step(tmp_path: Path) -> None:
    for rank in on_ranks(tmp_path, disagree, tmp_path / "out", group=False):
        assert "RankDisagreementError" in rank["kind"], rank
        assert "plan of the packs" in rank["error"][0]


# bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length.*pack_tokens"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance.*pack_tokens"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size.*pack_tokens"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        (
            {"dualspeed": {**PADDED, "schedule": "annealed"}},
            r"DualSpeedConfig\.schedule must be .*schedule_unit='sample'.*'annealed' came",
        ),
        (
            {"dualspeed": PADDED, "train_sampling_strategy": "batch_rebalance"},
            "batch_rebalance.*schedule_unit='sample'",
        ),
        ({"dualspeed": PADDED, "dualspeed_lengths": []}, "dualspeed_lengths.*pack_tokens"),
        ({"dualspeed": None, "dualspeed_lengths": []}, "dualspeed_lengths.*pack_tokens"),
    ],
)
def test_arguments_that_would_change_the_batches_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(SettingError, match=f"(?s){told}"):
        make_trainer(tmp_path, **changes)


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()


def test_a_loader_of_the_users_own_is_refused_where_it_would_not_be_called(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"OwnLoader\.get_train_dataloader would not be called"):
        make_trainer(tmp_path, kind=OwnLoader)
    make_trainer(tmp_path, kind=OwnLoader, dualspeed={**PADDED, "schedule_unit": "optimizer"})

    class Above(trimtab.with_dualspeed(Trainer)):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    assert "samples" in next(iter(loader_of(make_trainer(tmp_path, kind=Above))))


def test_a_row_that_is_too_long_is_named_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dualspeed={**PACKED, "pack_tokens": 50})
    with pytest.raises(
        SettingError, match=r"Sample \d+ has \d+ tokens \(\d+ after pruning\), more than pack_tokens=50"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    own = make_trainer(tmp_path, dualspeed={**PACKED, "pack_tokens": 50, "oversize": "own"}, max_steps=3)
    own.train()
    assert own.state.global_step == 3


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        rows = TinyRows(8)
        return (rows[n] for n in range(8))


@pytest.mark.parametrize("settings", [PACKED, PADDED], ids=["packs", "modes"])
def test_rows_one_after_another_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, dualspeed=settings, train_dataset=Streamed())
    with pytest.raises(SettingError, match=r"(?s)one after another.*pack_tokens=None"):
        trainer.train()


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packing_of_another_trainer_is_refused_and_ours_is_named(name: str) -> None:
    from types import SimpleNamespace

    from trimtab.dualspeed.trainer import refuse_arguments

    args = SimpleNamespace(label_smoothing_factor=0, n_gpu=1, **{name: True})
    with pytest.raises(SettingError, match=rf"(?s){name}=True.*dualspeed: packing: true"):
        refuse_arguments(args)


def test_lengths_for_other_rows_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dualspeed_lengths=[SampleLength(9, 9)] * 3)
    with pytest.raises(SettingError, match=f"each of the {ROWS} rows"):
        trainer.train()


def test_side_files_stay_readable(whole_run: Any) -> None:
    out = Path(whole_run.args.output_dir)
    last = out / f"checkpoint-{whole_run.state.max_steps - whole_run.state.max_steps % 2}"
    assert json.loads((last / "dualspeed" / "dualspeed.json").read_text())["config"]["pack_tokens"] == 200
    save_lengths(out / "again", load_lengths(out / LENGTHS_FILE), "x")
    assert load_lengths(out / "again") == load_lengths(out / LENGTHS_FILE)
