"""A task to compare arms on: rows of questions, a small model fitted to them, and the common start of all arms."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trimtab.data.scenes import conversation
from trimtab.errors import setting_error
from trimtab.files import prepare_output
from trimtab.quickstart.language import (
    LanguageFit,
    PatchWords,
    ToldObjects,
    fit_language,
    fit_projector,
    tell_scene,
)
from trimtab.quickstart.model import SmallLlava, build_model, build_processor, collect_words
from trimtab.quickstart.tower import Labels, TowerFit, fit_tower

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

Row = Mapping[str, Any]
Progress = Callable[[str, int, int], None]
StepTold = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the arms train and are judged on.

    Attributes:
        name: Name in records and tables.
        train: Rows to train on (``image``, ``questions``, ``answers``, ``families``).
        test: Rows to judge on.
        patch_labels: Classes of every patch of a row, for fitting the vision tower; takes row and patches per side.
        majority: Share of the commonest answer, in [0, 1].
        language_only: Accuracy of the best answer per question text, without seeing, in [0, 1].
        sizes: Sizes of the model.
        tower: How the vision tower is fitted.
        steps: Optimizer steps of an arm.
        batch_size: Conversations per step.
        learning_rate: Peak learning rate (AdamW, cosine, warm-up over the first tenth).
        turns: Questions per conversation at most; an image with more gives several conversations.
        dualspeed: Settings of DualSpeed that differ from its defaults, for all arms of the task.
        language: How the language model is taught before it sees images, or None where it starts from scratch.
        told_objects: Words for every object of a row without its image; needed for `language`.
        patch_words: The word of every class of every kind of `patch_labels`; needed for `language`.

    Raises:
        SettingError: `language` without `told_objects` or without `patch_words`.
    """

    name: str
    train: Sequence[Row]
    test: Sequence[Row]
    patch_labels: Callable[[Row, int], Labels]
    majority: float
    language_only: float
    sizes: SmallLlava
    tower: TowerFit
    steps: int
    batch_size: int
    learning_rate: float
    turns: int
    dualspeed: dict[str, Any] = field(default_factory=dict)
    language: LanguageFit | None = None
    told_objects: ToldObjects | None = None
    patch_words: PatchWords = ()

    def __post_init__(self) -> None:
        """Check that what `language` needs is there."""
        for name in ("told_objects", "patch_words"):
            value = getattr(self, name)
            if self.language is not None and not value:
                remedy = f"Give {name}, or set language=None."
                raise setting_error("Task", name, "given where language is set", value, remedy)

    def settings(self) -> dict[str, Any]:
        """Return what must be known to run the task again, as plain values."""
        plain = ("name", "steps", "batch_size", "learning_rate", "turns", "dualspeed")
        return {
            **{name: getattr(self, name) for name in plain},
            "sizes": asdict(self.sizes),
            "tower": asdict(self.tower),
            **({"language": asdict(self.language)} if self.language else {}),
            "train_images": len(self.train),
            "test_images": len(self.test),
        }


class Conversations:
    """Tokenised conversations over a task's training images, prepared once; a torch data set.

    Args:
        rows: Rows with questions about one image each.
        processor: The processor of the model.
        turns: Questions per conversation at most.
        progress: Called with images done and images in all.
    """

    def __init__(
        self, rows: Sequence[Row], processor: LlavaProcessor, turns: int, progress: Callable[[int, int], None]
    ) -> None:
        from trimtab.data import SupervisedCollator

        collate = SupervisedCollator(processor)
        self.pixels: list[torch.Tensor] = []
        self.examples: list[tuple[int, dict[str, torch.Tensor]]] = []
        for number, row in enumerate(rows):
            for start in range(0, len(row["questions"]), turns):
                chosen = range(start, min(start + turns, len(row["questions"])))
                batch = collate([conversation(row, chosen)])
                if start == 0:
                    self.pixels.append(batch["pixel_values"][0])
                self.examples.append((number, {name: batch[name][0] for name in ("input_ids", "labels")}))
            progress(number + 1, len(rows))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, example = self.examples[index]
        return {**example, "pixel_values": self.pixels[image]}


@dataclass(frozen=True)
class PadConversations:
    """Collator of `Conversations`: pads on the right.

    Attributes:
        pad_token_id: Token of padding.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``labels``, ``attention_mask`` [row, seq] and ``pixel_values`` of a batch."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        }


def make_start(task: Task, seed: int, folder: Path, progress: Progress) -> None:
    """Build the model that all arms of a seed start from, with a fitted and frozen vision tower, and save it.

    Does nothing where an earlier call has finished.

    Args:
        task: The task.
        seed: Seed of the first weights and of the fit.
        folder: Where model and processor go.
        progress: Called with what is being done, how much is done and how much there is.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving a few megabytes, over and over
    place = prepare_output(folder, resume=True, settings={"seed": seed, **task.settings()})
    if place.finished:
        return
    words = collect_words(_texts(task.train)) + collect_words(_texts(task.test))
    processor = build_processor(task.sizes, words + [word for kind in task.patch_words for word in kind])
    model = build_model(task.sizes, processor.tokenizer, seed=seed)
    side = task.sizes.image_size // task.sizes.patch_size
    rows = _shown(task, progress)
    labels = np.stack([task.patch_labels(row, side) for row in rows])
    # Where only some kinds of an image's objects are known, the others would be fitted as background.
    known = (labels > 0).any(1)
    whole = np.asarray(known.all(-1) | ~known.any(-1))
    pixels = processor.image_processor(
        [r["image"] for r, ok in zip(rows, whole, strict=True) if ok], return_tensors="pt"
    )
    fit = replace(task.tower, seed=seed)
    fit_tower(
        model, pixels["pixel_values"], labels[whole], fit, lambda step, _: progress("vision tower", step, fit.steps)
    )
    if task.language is not None:
        _teach(task, model, processor.tokenizer, pixels["pixel_values"], labels[whole], seed, progress)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    place.finish()


def _teach(
    task: Task, model: Any, tokenizer: Any, pixels: torch.Tensor, labels: Labels, seed: int, progress: Progress
) -> None:
    """Teach the language model on scenes in words, and align the projector to its words."""
    assert task.language is not None
    assert task.told_objects is not None
    fit = replace(task.language, seed=seed)
    scenes = [tell_scene(row, task.told_objects(row), tokenizer) for row in _texts(task.train)]
    fit_language(model, tokenizer, scenes, fit, lambda step, _: progress("language model", step, fit.steps))
    fit_projector(
        model,
        tokenizer,
        pixels,
        labels,
        task.patch_words,
        fit,
        lambda step, _: progress("projector", step, fit.projector_steps),
    )


def open_start(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load what `make_start` saved, with the stock classes; the vision tower is frozen."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.model.vision_tower.requires_grad_(False)
    return model.train(), cast("LlavaProcessor", AutoProcessor.from_pretrained(folder))


def clear_folder(folder: Path) -> None:
    """Delete a folder that this package made, where it stands."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _shown(task: Task, progress: Progress) -> list[Row]:
    """Return the rows that the tower is fitted on: as many as it can see in its steps, at most all."""
    count = min(len(task.train), task.tower.steps * task.tower.batch_size)
    rows = []
    for number in range(count):
        rows.append(task.train[number])
        progress("pictures", number + 1, count)
    return rows


def _texts(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield rows without their images where they can do that, so that none is decoded."""
    texts = getattr(rows, "texts", None)
    return iter(rows) if texts is None else texts()
