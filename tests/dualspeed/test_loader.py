"""Samplers, rows that know their number, and the collator that notes them in the batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from tests.dualspeed.common import training_arguments
from tests.tiny import TinyRows, collate, tiny_llava
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer

from trimtab.dualspeed.loader import (
    BucketSampler,
    Drawn,
    NumberedRow,
    NumberedRows,
    NumberedSampler,
    PackSampler,
    collate_numbered,
)
from trimtab.dualspeed.packs import SampleLength, Samples, bucket_batches, plan_packs
from trimtab.errors import DataError, SettingError

LENGTHS = [SampleLength(60 + 7 * (n % 5), 30 + 7 * (n % 5)) for n in range(64)]
SETTINGS: dict[str, Any] = {"budget": 200, "slow_ratio": 0.3, "seed": 4}


def packs(**changes: Any) -> PackSampler:
    return PackSampler(LENGTHS, **{**SETTINGS, **changes})


def buckets(**changes: Any) -> BucketSampler:
    return BucketSampler(LENGTHS, **{"batch_size": 3, "slow_ratio": 0.3, "seed": 4, **changes})


samplers = pytest.mark.parametrize("make", [packs, buckets])


def numbers(batches: Any) -> list[tuple[tuple[int, ...], int]]:
    return [(tuple(int(one) for one in batch), batch[0].epoch) for batch in batches]


# off is identity ------------------------------------------------------------------------------------------------------


def test_a_drawn_number_is_a_number() -> None:
    drawn = Drawn(7, 3)
    assert drawn == 7
    assert [*"abcdefgh"][drawn] == "h"
    for other in (pickle.loads(pickle.dumps(drawn)), copy.deepcopy(drawn)):
        assert (other, other.epoch, type(other)) == (7, 3, Drawn)


def test_rows_asked_for_by_plain_numbers_are_those_of_the_data_set() -> None:
    rows = [{"a": 1}, {"a": 2}, "words"]
    numbered = NumberedRows(rows)
    assert len(numbered) == 3
    assert [numbered[n] for n in range(3)] == rows
    assert numbered.__getitems__([2, 0]) == ["words", {"a": 1}]
    assert numbered[0] is rows[0]


def test_a_collator_sees_the_rows_as_they_were() -> None:
    rows = [{"a": 1}, "words"]
    seen: list[Any] = []

    def remember(items: Any) -> dict[str, Any]:
        seen.extend(items)
        return {"count": len(items)}

    numbered = NumberedRows(rows)
    batch = collate_numbered(remember)([numbered[Drawn(n, 5)] for n in (1, 0)])
    assert [one is other for one, other in zip(seen, reversed(rows), strict=True)] == [True, True]
    assert batch == {"count": 2, "samples": Samples((1, 0), 5)}
    assert collate_numbered(remember)([numbered[0], numbered[1]]) == {"count": 2}, "without numbers the user's batch"


def test_rows_that_are_mappings_stay_mappings() -> None:
    row = NumberedRows([{"a": 1, "b": 2}])[Drawn(0, 2)]
    assert isinstance(row, Mapping)
    assert isinstance(row, NumberedRow)
    assert (dict(row), len(row), row.drawn, row.drawn.epoch) == ({"a": 1, "b": 2}, 2, 0, 2)


# what a sampler gives ---------------------------------------------------------------------------------------------


def test_samplers_follow_their_plans() -> None:
    for epoch in (0, 2, 1):
        sampler, padded = packs(), buckets()
        sampler.set_epoch(epoch)
        padded.set_epoch(epoch)
        assert numbers(sampler) == [(tuple(p), epoch) for p in plan_packs(LENGTHS, epoch=epoch, **SETTINGS)]
        expected = bucket_batches(LENGTHS, batch_size=3, slow_ratio=0.3, seed=4, epoch=epoch)
        assert numbers(padded) == [(tuple(p), epoch) for p in expected]
        assert len(sampler) == len(list(sampler))


@samplers
def test_every_epoch_is_another_order_of_all_samples(make: Any) -> None:
    sampler, seen = make(), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen.append([sample for batch, _ in numbers(sampler) for sample in batch])
        assert sorted(seen[-1]) == list(range(64))
    assert seen[0] != seen[1]
    assert seen[1] != seen[2]


def test_epochs_are_evened_out_to_the_fullest() -> None:
    natural = []
    for epoch in range(12):
        sampler = packs(seed=5)
        sampler.set_epoch(epoch)
        natural.append(len(sampler))
    assert natural[0] < max(natural), "or nothing is evened out"
    for multiple in (1, 4):
        sampler = packs(seed=5, multiple=multiple)
        sampler.even_out(12)
        lengths = set()
        for epoch in range(12):
            sampler.set_epoch(epoch)
            assert sorted(sample for batch, _ in numbers(sampler) for sample in batch) == list(range(64))
            lengths.add(len(sampler))
        assert lengths == {-(-max(natural) // multiple) * multiple}


@samplers
@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_resumed_sampler_gives_exactly_the_rest(make: Any, done: int) -> None:
    first = make()
    first.set_epoch(1)
    whole, walk = numbers(first), iter(first)
    for _ in range(done):
        next(walk)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(state)
    second.set_epoch(1)  # as accelerate does once more
    assert numbers(second) == whole[done:]
    assert numbers(second) == whole, "the next walk begins at the beginning"
    second.load_state_dict(first.state_dict(done=2))
    assert numbers(second) == whole[2:], "what a loader has read ahead is not done"
    second.load_state_dict(state)
    second.set_epoch(2)
    assert sorted(sample for batch, _ in numbers(second) for sample in batch) == list(range(64))


@pytest.mark.parametrize("other", [{"budget": 300}, {"seed": 5}, {"slow_ratio": 0.9}])
def test_a_state_of_another_plan_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="another than that of the interrupted run"):
        packs(**other).load_state_dict(packs().state_dict())


def test_the_fill_is_that_of_the_packs() -> None:
    sampler = packs()
    sampler.set_epoch(3)
    size = {sample: LENGTHS[sample].fast for sample in range(64)}
    from trimtab.dualspeed.schedule import mode_of_sample

    for sample in size:
        if mode_of_sample(sample, epoch=3, slow_ratio=0.3, seed=4) == "slow":
            size[sample] = LENGTHS[sample].full
    loads = [sum(size[sample] for sample in batch) / 200 for batch, _ in numbers(sampler)]
    assert sampler.fill() == pytest.approx(sum(loads) / len(loads))
    assert max(loads) <= 1


# loaders and processes ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("context", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_batches_know_their_samples_whoever_makes_them(context: str | None) -> None:
    sampler = packs()
    loader: Any = DataLoader(
        NumberedRows(TinyRows(), sampler), batch_sampler=sampler, collate_fn=collate_numbered(collate),
        num_workers={None: 0, "fork": 2, "spawn": 1}[context], multiprocessing_context=context,
        persistent_workers=context is not None,
    )  # fmt: skip
    for epoch in range(2):  # the workers of the first epoch serve the second
        sampler.set_epoch(epoch)
        expected = [Samples(batch, epoch) for batch, epoch in numbers(sampler)]
        found = list(loader)
        assert [batch["samples"] for batch in found] == expected
        batch = found[3]
        plain = collate([TinyRows()[sample] for sample in batch["samples"].ids])
        assert {*batch} == {*plain, "samples"}
        for name, value in plain.items():
            assert torch.equal(batch[name], value)
        if context == "spawn":
            break  # slow to start


def test_a_data_set_of_the_datasets_library_is_read_in_one_call() -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"a": list(range(10))})
    got = NumberedRows(rows).__getitems__([Drawn(3, 1), Drawn(5, 1)])
    assert [(row["a"], row.drawn, row.drawn.epoch) for row in got] == [(3, 3, 1), (5, 5, 1)]
    plain = NumberedRows([{"a": n} for n in range(10)]).__getitems__([Drawn(3, 1), 5])
    assert [type(one).__name__ for one in plain] == ["NumberedMapping", "dict"]


def test_samples_survive_the_way_to_the_device(tmp_path: Path) -> None:
    samples = Samples((3, 1), 2)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "samples": samples}
    assert send_to_device(batch, torch.device("cpu"))["samples"] == samples
    trainer: Any = Trainer(model=tiny_llava(), args=training_arguments(tmp_path), train_dataset=TinyRows())
    assert trainer._prepare_inputs(batch)["samples"] == samples
    from torch.utils.data._utils.pin_memory import pin_memory

    assert pin_memory({"samples": samples}, "cpu")["samples"] == samples
    assert pickle.loads(pickle.dumps(samples)) == samples


def sharded(sampler: Any, process: int, processes: int, rows: Any = None) -> Any:
    """A loader as accelerate prepares it for one of several processes."""
    numbered = NumberedRows(TinyRows() if rows is None else rows, sampler)
    loader: Any = DataLoader(numbered, batch_sampler=sampler, collate_fn=lambda rows: [row.drawn for row in rows])
    return prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("skipped", [0, 2])
def test_processes_share_the_packs_out_and_hear_of_the_epoch(processes: int, skipped: int) -> None:
    """Through accelerate's own samplers, also where it skips what a resumed run has done."""
    expected = packs(multiple=processes)
    for epoch in (2, 1):
        expected.set_epoch(epoch)
        every = numbers(expected)
        for process in range(processes):
            loader = sharded(packs(multiple=processes), process, processes)
            loader = skip_first_batches(loader, skipped) if skipped else loader
            loader.set_epoch(epoch)
            assert numbers(loader) == every[process::processes][skipped:]
        assert len(every) % processes == 0, "every process has equally many"


def test_fewer_samples_than_processes_are_repeated() -> None:
    for process in range(3):
        sampler = PackSampler([SampleLength(5, 5)] * 2, budget=9, slow_ratio=0, seed=0, multiple=3)
        loader = sharded(sampler, process, 3, TinyRows(2))
        assert len(numbers(loader)) == len(loader) == 1


class ToldRows(TinyRows):
    """A user's data set that wants to know the epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_data_set_hears_of_the_epoch_too(processes: int) -> None:
    rows = ToldRows()
    sharded(packs(), 0, processes, rows).set_epoch(5)
    assert rows.epoch == 5


def test_workers_are_sent_rows_and_collator_but_no_sampler() -> None:
    rows = NumberedRows([1, 2], packs())
    sent = pickle.loads(pickle.dumps(rows))
    assert (sent.sampler, sent.dataset) == (None, [1, 2])
    assert pickle.loads(pickle.dumps(collate_numbered(collate))).collator is collate
    assert rows.sampler is not None


def test_another_sampler_is_numbered_as_it_is() -> None:
    class Telling(SequentialSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    inner = Telling(range(4))
    sampler = NumberedSampler(inner)
    sampler.set_epoch(3)
    assert inner.epoch == 3
    assert [(one, one.epoch) for one in sampler] == [(n, 3) for n in range(4)]
    assert len(sampler) == 4


# bad input ----------------------------------------------------------------------------------------------------------


class Streamed(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


def test_rows_one_after_another_are_refused() -> None:
    from datasets import Dataset

    streamed = Dataset.from_dict({"a": [1, 2]}).to_iterable_dataset()
    for rows in (Streamed(), streamed, (n for n in range(3)), {1, 2}):
        with pytest.raises(SettingError, match=r"(?s)one after another.*map-style"):
            NumberedRows(rows)


def test_a_batch_of_several_epochs_or_of_half_numbered_rows_is_refused() -> None:
    rows = NumberedRows([{"a": 1}, {"a": 2}])
    make = collate_numbered(lambda items: {})
    with pytest.raises(DataError, match="of the epochs"):
        make([rows[Drawn(0, 0)], rows[Drawn(1, 1)]])
    with pytest.raises(DataError, match="1 of 2 rows"):
        make([rows[Drawn(0, 0)], rows[1]])


@samplers
def test_epochs_below_zero_are_refused(make: Any) -> None:
    with pytest.raises(SettingError, match="epoch"):
        make().set_epoch(-1)
    with pytest.raises(SettingError, match="even_out"):
        packs().even_out(0)
