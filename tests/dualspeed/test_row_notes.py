"""Notes of the host: right for their own batch, refused for another, and only in batches that a step will have."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import concatenate
from tests.dualspeed.common import ROWS, attached, training_arguments
from tests.dualspeed.packing_tools import SETTINGS, STOCK, same_step, take_step
from tests.dualspeed.test_packed_modes import PER_SAMPLE
from tests.dualspeed.test_packed_trainer import Streamed
from tests.tiny import FAMILIES, Batch, TinyFamily, TinyRows, collate, tiny_llava
from transformers import Trainer

import trimtab
from trimtab import DualSpeedCallback, DualSpeedConfig
from trimtab.anatomy import RowLayout, encode_images, note_rows, placeholder_rule, read_rows
from trimtab.data import MaskPlaceholders
from trimtab.dualspeed.sample_lengths import lengths_fingerprint
from trimtab.dualspeed.samples import ENTRIES, Samples
from trimtab.errors import SettingError
from trimtab.ops.label_head import IGNORED

LLAVA = FAMILIES["llava"]
NOTES = "row_notes"

by_trainer_or_callback = pytest.mark.parametrize("by", ["trainer", "callback"])


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def noted(model: Any, batch: Batch) -> Batch:
    notes = note_rows(placeholder_rule(model), batch)
    assert notes is not None
    return {**batch, NOTES: notes}


def same_layout(model: Any, batch: Batch) -> RowLayout:
    """Read a batch with notes and without, compare, and return what was read."""
    with torch.no_grad():
        encoded = encode_images(model, batch) if "pixel_values" in batch else None
    with_notes = read_rows(model, noted(model, batch), encoded)
    without = read_rows(model, batch, encoded)
    for name, value in vars(without).items():
        found = getattr(with_notes, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
    return without


class Cutting:
    """A collator with a setting of its own, as users have them."""

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length

    def __call__(self, rows: Any) -> Any:
        return collate(rows)


class Stream(Streamed):
    """Rows one after another, of which it is known how many they are."""

    def __len__(self) -> int:
        return 8


# right for their own batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [ROWS, (0, 2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_notes_are_what_is_read_without_them(family: TinyFamily, side: str, images: tuple[int, ...]) -> None:
    model = family.build_model()
    batch = family.make_batch(model, images, padding_side=side)
    layout = same_layout(model, batch)
    assert layout.pad_left == (side == "left")
    assert layout.lengths == batch["attention_mask"].sum(1).tolist()
    assert [bool(count) for count in layout.placeholders] == [bool(count) for count in images]


@pytest.mark.parametrize("side", ["right", "left"])
def test_notes_pass_over_labels_that_no_step_trains(family: TinyFamily, side: str) -> None:
    model = family.build_model()
    batch = family.make_batch(model, ROWS, padding_side=side)
    labels = same_layout(model, batch).labels
    everywhere = {**batch, "labels": batch["input_ids"].clone()}  # on placeholders, padding and first places too
    layout = same_layout(model, everywhere)
    assert layout.labelled == sum(layout.placeholders) > 0
    words = zip(layout.lengths, layout.placeholders, strict=True)
    assert layout.labels == [length - visual - 1 for length, visual in words]
    beside = batch["labels"].clone()
    beside[batch["attention_mask"] == 0] = 7
    assert same_layout(model, {**batch, "labels": beside}).labels == labels


def test_notes_count_videos_too(family: TinyFamily) -> None:
    if family.videos is None:
        pytest.skip("takes no videos")
    model = family.build_model()
    batch = family.make_batch(model, ROWS, videos_per_row=(0, 1, 1))
    assert sum(same_layout(model, batch).placeholders) > 0
    assert noted(model, batch)[NOTES].placeholders.keys() == {"image", "video"}


def test_notes_need_no_mask(family: TinyFamily) -> None:
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    del batch["attention_mask"]
    assert same_layout(model, batch).lengths == [batch["input_ids"].shape[1]]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_steps_with_notes_are_those_without(family: TinyFamily, mode: str, packing: bool) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    expected = take_step(model, batch, mode, packing=packing)
    same_step(take_step(model, noted(model, batch), mode, packing=packing), expected)


def test_a_collator_with_notes_travels_to_other_processes(family: TinyFamily) -> None:
    model = family.build_model()
    with attached(model, **SETTINGS) as handle:
        inner = MaskPlaceholders(Cutting(9), handle.image_token_ids)
        sent = pickle.dumps(handle.collator(inner))
    assert len(sent) < 4000, "the model does not travel along"
    again = pickle.loads(sent)
    assert again.collate.collator.max_length == 9
    if family.name == "llava":
        rows = [TinyRows()[number] for number in (5, 6, 7)]
        assert again(rows)[NOTES] == noted(model, collate(rows))[NOTES]
        assert pickle.loads(pickle.dumps(again(rows)))[NOTES] == again(rows)[NOTES], "as worker processes send it"


# another batch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_notes_of_another_batch_are_refused(family: TinyFamily, packing: bool) -> None:
    model = family.build_model().train()
    batch = family.make_batch(model, ROWS)
    others = [
        family.make_batch(model, (1, 0)),
        family.make_batch(model, ROWS, text_lengths=(9, 9, 9)),
        {name: torch.cat([value, value]) for name, value in batch.items() if name in ("input_ids", "labels")},
    ]
    for other in others:
        notes = noted(model, other)[NOTES]
        told = rf"(?s)row_notes are those of a batch of {notes.shape[0]} rows of {notes.shape[1]} places.*leave row_"
        with attached(model, packing=packing, **SETTINGS), pytest.raises(SettingError, match=told):
            model(**{**batch, NOTES: notes})


# only where a step will have them -------------------------------------------------------------------------------------


def trainer_of(by: str, out: Path, data: Any = None, config: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Return a Trainer with DualSpeed, by one of the two ways."""
    settings = SETTINGS if config is None else config
    given = {
        "model": tiny_llava(), "args": training_arguments(out, **changes), "data_collator": collate,
        "train_dataset": TinyRows(16) if data is None else data, "eval_dataset": TinyRows(4, seed=1),
    }  # fmt: skip
    if by == "trainer":
        return trimtab.with_dualspeed(Trainer)(**given, dualspeed=settings)
    return Trainer(**given, callbacks=[DualSpeedCallback(DualSpeedConfig(**settings))])


def entries_of_steps(trainer: Any) -> list[set[str]]:
    """Train, and return which of our entries every batch had that the model got."""
    found: list[set[str]] = []
    original = trainer.training_step

    def watch(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(ENTRIES & inputs.keys())
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = watch
    trainer.train()
    return found


@by_trainer_or_callback
def test_training_batches_carry_notes_and_those_of_the_evaluation_none(by: str, tmp_path: Path) -> None:
    trainer = trainer_of(by, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=2)
    assert entries_of_steps(trainer) == [{NOTES}] * 3
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 3]
    loaders = {
        "evaluation": trainer.get_eval_dataloader(), "prediction": trainer.get_test_dataloader(TinyRows(4)),
    }  # fmt: skip
    trainer.model.eval()
    for name, loader in loaders.items():
        batch = next(iter(loader))
        assert not ENTRIES & batch.keys(), name
        asked = {key: value for key, value in batch.items() if key != "labels"}
        assert trainer.model.generate(**asked, max_new_tokens=2, pad_token_id=0).shape[0] == 4, name
    assert trainer.predict(TinyRows(4)).metrics["test_loss"] > 0


@pytest.mark.parametrize("config", [SETTINGS, {**SETTINGS, **PER_SAMPLE}], ids=["one mode", "modes by sample"])
def test_the_collator_of_a_trainer_is_the_users_again_behind_the_loader(config: Any, tmp_path: Path) -> None:
    trainer = trainer_of("trainer", tmp_path, config=config)
    before = trainer.data_collator
    assert NOTES in next(iter(trainer.get_train_dataloader()))
    assert trainer.data_collator is before
    assert not ENTRIES & trainer.data_collator([TinyRows()[0]]).keys()
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.get_train_dataloader()
    assert trainer.data_collator is before, "also where there is no loader"


@pytest.mark.filterwarnings("ignore:slow_ratio=0 trains the language model on pruned images only")
def test_a_trainer_that_prunes_nothing_notes_nothing(tmp_path: Path) -> None:
    trainer = trainer_of("trainer", tmp_path, config=STOCK, max_steps=2)
    assert entries_of_steps(trainer) == [set()] * 2


def test_evaluation_takes_a_collator_of_the_users_that_notes(tmp_path: Path) -> None:
    trainer = trainer_of("trainer", tmp_path)
    trainer.data_collator = trainer.dualspeed.collator(trainer.data_collator)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert NOTES in batch
    trainer.model.eval()
    assert trainer._prepare_inputs(batch).keys() == batch.keys() - {NOTES}
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.model.train()
    assert trainer._prepare_inputs(batch).keys() == batch.keys()


@by_trainer_or_callback
def test_batches_that_accelerate_joins_get_no_notes(by: str, tmp_path: Path) -> None:
    """The batches of iterable data go through `concatenate`, which takes tensors only."""
    trainer = trainer_of(by, tmp_path, Stream(), max_steps=3)
    assert entries_of_steps(trainer) == [set()] * 3
    batch = next(iter(trainer.get_train_dataloader()))
    joined = concatenate([batch, batch])
    assert joined["input_ids"].shape[0] == 2 * batch["input_ids"].shape[0]
    with pytest.raises(TypeError, match="RowNotes"):  # or there is no reason to leave notes out
        concatenate([noted(trainer.model, collate([TinyRows()[0]]))] * 2)


@by_trainer_or_callback
def test_batches_that_accelerate_cuts_get_no_notes(by: str, tmp_path: Path) -> None:
    trainer = trainer_of(by, tmp_path, max_steps=2, accelerator_config={"dispatch_batches": True})
    assert entries_of_steps(trainer) == [set()] * 2


@by_trainer_or_callback
def test_iterable_data_that_is_not_dispatched_keeps_its_notes(by: str, tmp_path: Path) -> None:
    trainer = trainer_of(by, tmp_path, Stream(), max_steps=2, accelerator_config={"dispatch_batches": False})
    assert entries_of_steps(trainer) == [{NOTES}] * 2


@by_trainer_or_callback
def test_data_that_do_not_tell_how_many_they_are_can_be_trained_on(by: str, tmp_path: Path) -> None:
    trainer = trainer_of(by, tmp_path, Streamed(), max_steps=3)
    assert entries_of_steps(trainer) == [set()] * 3


def test_the_callback_masks_the_labels_of_joined_batches_once(tmp_path: Path) -> None:
    trainer = trainer_of("callback", tmp_path, Stream(), max_steps=1)
    trainer.train()
    collator = trainer.callback_handler.train_dataloader.base_dataloader.collate_fn
    assert isinstance(collator, MaskPlaceholders)
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, DualSpeedCallback))
    loader = trainer.callback_handler.train_dataloader
    trainer.state.global_step = 0
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, trainer.model, loader)
    assert loader.base_dataloader.collate_fn is collator, "nor a second time"


# pruned batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [(1, 1), (0, 0)], ids=["images", "text"])
def test_pruned_inputs_can_be_generated_from(images: tuple[int, ...]) -> None:
    model = tiny_llava()
    batch = LLAVA.make_batch(model, images, padding_side="left")
    del batch["labels"]
    told = noted(model, {**batch, "labels": torch.full_like(batch["input_ids"], IGNORED)})[NOTES]
    with attached(model, **SETTINGS, **PER_SAMPLE) as handle:
        model.eval()
        expected = handle.prune_inputs(batch)
        pruned = handle.prune_inputs({**batch, NOTES: told, "samples": Samples((0, 1))})
        assert pruned.keys() == expected.keys()
        assert torch.equal(pruned["input_ids"], expected["input_ids"])
        answers = [model.generate(**one, max_new_tokens=3, pad_token_id=0) for one in (pruned, expected)]
    assert torch.equal(*answers)


# what lengths depend on -----------------------------------------------------------------------------------------------


def test_the_users_collator_counts_behind_the_one_with_notes() -> None:
    model = tiny_llava()
    config = DualSpeedConfig(**SETTINGS)
    found = {}
    with attached(model, **SETTINGS) as handle:
        for longest in (None, 10, 20):
            collator = Cutting(longest)
            masking = MaskPlaceholders(collator, handle.image_token_ids)
            ways = {"alone": collator, "masked": masking, "noted": handle.collator(masking)}
            ways["noted alone"] = handle.collator(collator)
            found |= {
                (name, longest): lengths_fingerprint(8, model, one, config) for name, one in ways.items()
            }  # fmt: skip
        again = lengths_fingerprint(8, model, handle.collator(Cutting(10)), config)
    assert again == found["noted alone", 10]
    assert len(set(found.values())) == len(found)
