"""The training data loader of a Trainer that chooses batches by length, or whose modes are drawn sample by sample."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from trimtab.anatomy import open_host
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.loader import BucketSampler, PackSampler
from trimtab.dualspeed.numbered import NumberedRows, NumberedSampler, collate_numbered, is_iterable_only
from trimtab.dualspeed.packs import SampleLength
from trimtab.dualspeed.sample_lengths import (
    lengths_fingerprint,
    load_lengths,
    measure_lengths,
    require_lengths,
    save_lengths,
)
from trimtab.errors import DataError, SettingError

if TYPE_CHECKING:
    from trimtab.dualspeed.attach import DualSpeedHandle

logger = logging.getLogger("trimtab")

LENGTHS_FILE = "dualspeed_lengths.safetensors"
PROBES = 8
"""Rows that are measured again before kept lengths are trusted."""


def numbers_samples(config: DualSpeedConfig) -> bool:
    """Whether training batches must say which samples they hold, or are chosen by length."""
    return chosen_by(config) is not None or config.schedule_unit == "sample"


def chosen_by(config: DualSpeedConfig) -> str | None:
    """Return the name of the setting by which the samples of a batch are chosen by length, None without one."""
    return next((name for name in ("pack_tokens", "bucket_pool") if getattr(config, name) is not None), None)


def refuse_loading(trainer: Any, config: DualSpeedConfig) -> None:
    """Refuse arguments of a Trainer under which batches could not be what the settings say.

    Args:
        trainer: The Trainer.
        config: Settings for which `numbers_samples`.

    Raises:
        SettingError: Names the argument and what to set.
    """
    if config.schedule == "annealed" and config.schedule_unit == "sample":
        raise SettingError(
            "schedule='annealed' makes the share of slow steps climb, but with schedule_unit='sample' modes are drawn "
            "sample by sample with one share. Set schedule='bernoulli', or schedule_unit='optimizer'."
        )
    choice = chosen_by(config)
    setting = choice or "schedule_unit='sample'"
    args = trainer.args
    if (
        config.pack_tokens is not None
        and config.schedule_unit != "sample"
        and 0 < config.slow_ratio < 1
        and not config.keeps_all
        and open_host(trainer.model).decoder_trains
    ):
        raise SettingError(
            f"pack_tokens={config.pack_tokens} with schedule_unit={config.schedule_unit!r}: in a slow step every row "
            "of a pack would be full, and the pack far longer than pack_tokens. Set schedule_unit='sample'."
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy == "batch_rebalance" or (choice and strategy == "group_by_length"):
        raise SettingError(
            f"train_sampling_strategy={strategy!r} and {setting} both choose the samples of a batch. Set "
            "train_sampling_strategy='random'; pack_tokens and bucket_pool look at lengths anyway."
        )
    if getattr(args, "group_by_length", False) and choice:
        raise SettingError(f"group_by_length=True and {choice} both choose the samples of a batch. Set one of them.")
    if args.auto_find_batch_size and config.pack_tokens is not None:
        raise SettingError(
            "auto_find_batch_size=True makes per_device_train_batch_size smaller, which pack_tokens leaves without "
            "effect. Set it to False, and lower pack_tokens where memory does not suffice."
        )
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name, None) and (name == "dispatch_batches" or choice):
            raise SettingError(
                f"accelerator_config has {name}=True, which cuts batches up after they were made; {setting} needs them "
                "whole. Leave it out."
            )
    mro = type(trainer).__mro__
    ours = max(place for place, kind in enumerate(mro) if kind.__module__ == "trimtab.dualspeed.trainer")
    owner = next(kind for kind in mro[ours + 1 :] if "get_train_dataloader" in vars(kind))
    if not owner.__module__.startswith(("transformers.", "trl.")):
        raise SettingError(
            f"{owner.__name__}.get_train_dataloader would not be called with {setting}, since DualSpeed then makes the "
            "training batches. Take it out, or leave the setting out."
        )


@contextlib.contextmanager
def notes_of_training(trainer: Any, handle: DualSpeedHandle | None) -> Iterator[None]:
    """While active, the Trainer's collator counts the rows of its batches; those of the evaluation stay as they are.

    Not where accelerate joins or cuts batches after they were made, as it does with iterable data sets.

    Args:
        trainer: The Trainer.
        handle: Its handle, or None without DualSpeed.
    """
    collate = trainer.data_collator
    told = trainer.args.accelerator_config
    dispatches = told.dispatch_batches
    if dispatches is None:
        dispatches = trainer.train_dataset is not None and is_iterable_only(trainer.train_dataset)
    if handle is not None and not (handle.config.prunes_nothing or dispatches or told.split_batches):
        trainer.data_collator = handle.collator(collate)
    try:
        yield
    finally:
        trainer.data_collator = collate


def training_loader(
    trainer: Any, config: DualSpeedConfig, lengths: Sequence[SampleLength] | None = None
) -> tuple[Any, PackSampler | BucketSampler | None]:
    """Build and prepare the loader of the training batches.

    With `pack_tokens` or `bucket_pool` process p of P takes the batches p, p + P, ... of a plan that all make alike,
    from the seed of DualSpeed and not of the Trainer. Without, the Trainer's own sampler chooses, and the batches only
    gain ``samples``.

    Args:
        trainer: The Trainer.
        config: Settings for which `numbers_samples`.
        lengths: Of every row; None measures them where they are needed.

    Returns:
        The loader, and its sampler where that is one of packs or of buckets.

    Raises:
        SettingError: The data set has no rows by number, a row is too long, or there are too few rows.
    """
    rows = NumberedRows(trainer.train_dataset)
    collator = _seen_columns(trainer, rows)
    settings = {"batch_size": trainer._train_batch_size, "drop_last": trainer.args.dataloader_drop_last}
    planned: PackSampler | BucketSampler | None = None
    if chosen_by(config) is not None:
        found = trainer_lengths(trainer, config, rows, collator) if lengths is None else lengths
        found = require_lengths(found, len(rows), type(trainer).__name__)
        make = bucket_sampler if config.pack_tokens is None else pack_sampler
        planned = make(trainer, config, found)
        settings = {"batch_sampler": planned}
        rows.sampler = planned
    else:
        settings["sampler"] = trainer._get_train_sampler(rows.dataset)
    args = trainer.args
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]
        collate_fn=collate_numbered(collator),
        **settings,
        **_worker_settings(args),
    )
    prepared = trainer.accelerator.prepare(loader)
    if planned is None:  # after accelerate has put its own, reproducible sampler in the place of a random one
        inner = getattr(prepared.batch_sampler, "batch_sampler", prepared.batch_sampler)
        inner.sampler = rows.sampler = NumberedSampler(inner.sampler)
    return prepared, planned


def _seen_columns(trainer: Any, rows: NumberedRows) -> Any:
    """Leave out the columns that the Trainer would, and return the collator that comes after."""
    try:
        from datasets import Dataset
    except ImportError:
        return trainer._get_collator_with_removed_columns(trainer.data_collator, description="Training")
    if isinstance(rows.dataset, Dataset):
        rows.dataset = trainer._remove_unused_columns(rows.dataset, description="Training")
        return trainer.data_collator
    return trainer._get_collator_with_removed_columns(trainer.data_collator, description="Training")


def _worker_settings(args: Any) -> dict[str, Any]:
    from transformers.trainer_utils import seed_worker

    settings = {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "worker_init_fn": partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    }
    for name, argument in (
        ("multiprocessing_context", "dataloader_multiprocessing_context"), ("in_order", "dataloader_in_order")
    ):  # fmt: skip
        if hasattr(args, argument):  # transformers before 5.2x lacks them
            settings[name] = getattr(args, argument)
    return settings


def pack_sampler(trainer: Any, config: DualSpeedConfig, lengths: Sequence[SampleLength]) -> PackSampler:
    """Plan the packs of a Trainer's run, with as many in every epoch and for every process.

    Args:
        trainer: The Trainer.
        config: Settings with `pack_tokens`.
        lengths: Of every row.

    Raises:
        SettingError: A row is too long.
    """
    assert config.pack_tokens is not None
    args, processes = trainer.args, trainer.accelerator.num_processes
    sampler = PackSampler(
        lengths,
        budget=config.pack_tokens,
        # A frozen language model takes fast steps only.
        slow_ratio=config.slow_ratio if open_host(trainer.model).decoder_trains else 0,
        seed=config.seed,
        oversize=config.oversize,
        multiple=processes,
    )
    epochs = ceil(args.num_train_epochs)
    if args.max_steps > 0:
        updates = max(1, ceil(ceil(len(sampler) / processes) / args.gradient_accumulation_steps))
        epochs = ceil(args.max_steps / updates)
    sampler.even_out(max(1, epochs))
    if args.process_index == 0:
        logger.info(
            "%d packs of at most %d tokens in each epoch, %.1f %% full, %.1f samples each.",
            len(sampler), config.pack_tokens, 100 * sampler.fill(), len(lengths) / len(sampler),
        )  # fmt: skip
    return sampler


def bucket_sampler(trainer: Any, config: DualSpeedConfig, lengths: Sequence[SampleLength]) -> BucketSampler:
    """Plan the batches of like length of a Trainer's run, with as many for every process.

    Args:
        trainer: The Trainer.
        config: Settings with `bucket_pool`.
        lengths: Of every row.

    Raises:
        SettingError: There are too few rows for the processes.
    """
    assert config.bucket_pool is not None
    args, processes, size = trainer.args, trainer.accelerator.num_processes, trainer._train_batch_size
    # A frozen language model takes fast steps only; where steps have modes, most are fast.
    by_mode = config.schedule_unit == "sample" and open_host(trainer.model).decoder_trains
    sampler = BucketSampler(
        lengths,
        batch_size=size,
        slow_ratio=config.slow_ratio if by_mode else 0,
        seed=config.seed,
        pool=config.bucket_pool,
        group=processes,
        drop_last=args.dataloader_drop_last,
    )
    if not len(sampler):
        raise SettingError(
            f"dataloader_drop_last=True leaves out all {len(lengths)} rows, fewer than one step takes ({size} for each "
            f"of {processes} processes). Set it to False, or lower per_device_train_batch_size."
        )
    if len(sampler) % processes:
        raise SettingError(
            f"{len(lengths)} rows in batches of {size} cannot be shared out so that each of {processes} processes has "
            "a batch in every step, each row once. Set per_device_train_batch_size to 2 or more, or "
            "dataloader_drop_last=True, and give at least as many rows as there are processes."
        )
    if args.process_index == 0:
        logger.info(
            "%d batches of rows of like length in each epoch, %.1f %% padding.",
            len(sampler), 100 * (1 - sampler.fill()),
        )  # fmt: skip
    return sampler


def trainer_lengths(trainer: Any, config: DualSpeedConfig, rows: NumberedRows, collator: Any) -> list[SampleLength]:
    """Measure the rows of a Trainer, each process its share, or take what an earlier run left in ``output_dir``.

    Kept lengths are trusted if their fingerprint fits and some rows, measured again, have them.
    """
    args, accelerator, count = trainer.args, trainer.accelerator, len(rows)
    measure = partial(
        measure_lengths, rows, collator, trainer.model, config, num_workers=args.dataloader_num_workers,
        autocast=accelerator.autocast,
    )  # fmt: skip
    path = Path(args.output_dir) / LENGTHS_FILE
    fingerprint = lengths_fingerprint(count, trainer.model, collator, config)
    kept = _kept_lengths(path, fingerprint, measure, count)
    if all(_from_all(kept is not None)):
        assert kept is not None
        return kept
    start = time.perf_counter()
    mine = measure(rows=range(args.process_index, count, args.world_size))
    shares = _from_all(mine)
    lengths = [shares[number % len(shares)][number // len(shares)] for number in range(count)]
    if args.process_index == 0:
        save_lengths(path, lengths, fingerprint)
        logger.warning(
            "Measured the lengths of %d rows in %.1f s, kept in %s. dualspeed_lengths=load_lengths(path) gives them to "
            "other runs.", count, time.perf_counter() - start, path,
        )  # fmt: skip
    return lengths


def _kept_lengths(path: Path, fingerprint: str, measure: Any, count: int) -> list[SampleLength] | None:
    if not path.is_file():
        return None
    try:
        kept = load_lengths(path, fingerprint)
    except DataError as error:
        logger.warning("%s They are measured anew.", error)
        return None
    places = sorted({round(place * (count - 1) / (PROBES - 1)) for place in range(PROBES)})
    if len(kept) == count and measure(rows=places, num_workers=0) == [kept[place] for place in places]:
        return kept
    logger.warning("%s holds the lengths of other rows. They are measured anew.", path)
    return None


def _from_all(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([value])
    return gathered


def loading_facts(planned: PackSampler | BucketSampler | None) -> Mapping[str, Any]:
    """What processes must have in common beside the length of their data."""
    if planned is None:
        return {}
    return {f"plan of the {'packs' if isinstance(planned, PackSampler) else 'batches'}": planned.fingerprint()}
