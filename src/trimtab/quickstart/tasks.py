"""The tasks that quickstart and the experiment compare arms on, with the sizes that calibration chose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trimtab.data.question_sets import easy_vqa_rows, language_only_accuracy, majority_accuracy, nlvr_one_box_rows
from trimtab.data.scenes import make_scenes
from trimtab.errors import SettingError, near_miss
from trimtab.quickstart.language import LanguageFit
from trimtab.quickstart.model import SmallLlava
from trimtab.quickstart.proxy_labels import NLVR_WORDS, easy_vqa_labels, nlvr_labels, nlvr_told, scene_labels
from trimtab.quickstart.task import Task
from trimtab.quickstart.tower import TowerFit

SCENES_TRAIN, SCENES_TEST = 3000, 400
EASY_VQA_TEST = 500
"""Test images that are asked about: the first so many, with 4,800 questions, to bound the time of the experiment."""
NLVR_TRAIN, NLVR_TEST = 12_000, 500


def scenes_task(seed: int = 0) -> Task:
    """Return the scenes: 128x128 pixels, 256 visual tokens; drawn anew for every seed.

    Args:
        seed: Seed of the scenes, at least 0.
    """
    train, test = make_scenes("train", SCENES_TRAIN, seed), make_scenes("test", SCENES_TEST, seed)
    return Task(
        name="scenes",
        train=train,
        test=test,
        patch_labels=scene_labels,
        majority=majority_accuracy(list(test.texts()), list(train.texts())),
        language_only=language_only_accuracy(list(train.texts()), list(test.texts())),
        sizes=SmallLlava(tower_layers=3, layers=3, width=128),
        tower=TowerFit(steps=300),
        steps=300,
        batch_size=16,
        learning_rate=2e-3,
        turns=4,
    )


def easy_vqa_task(folder: str | Path) -> Task:
    """Return easy-VQA at 256 visual tokens (64x64 pixels in patches of 4).

    Args:
        folder: Directory of the set, see `easy_vqa_rows`.
    """
    train, test = easy_vqa_rows(folder, "train+val"), easy_vqa_rows(folder, "test")[:EASY_VQA_TEST]
    return Task(
        name="easy-VQA",
        train=train,
        test=test,
        patch_labels=easy_vqa_labels,
        majority=majority_accuracy(test, train),
        language_only=language_only_accuracy(train, test),
        sizes=SmallLlava(image_size=64, patch_size=4, tower_layers=3, layers=3, width=128),
        tower=TowerFit(steps=400),
        steps=400,
        batch_size=16,
        learning_rate=3e-3,
        turns=5,
    )


def nlvr_task(folder: str | Path) -> Task:
    """Return NLVR at its one-box level: 100 visual tokens (60x60 pixels in patches of 6).

    Args:
        folder: Directory of the set, see `nlvr_one_box_rows`.
    """
    train, test = nlvr_one_box_rows(folder, "train")[:NLVR_TRAIN], nlvr_one_box_rows(folder, "test")[:NLVR_TEST]
    return Task(
        name="NLVR, one box",
        train=train,
        test=test,
        patch_labels=nlvr_labels,
        majority=majority_accuracy(test, train),
        language_only=language_only_accuracy(train, test),
        sizes=SmallLlava(image_size=60, patch_size=6, tower_layers=3, layers=3, width=128),
        tower=TowerFit(steps=1200, batch_size=32),
        steps=600,
        batch_size=32,
        learning_rate=1e-3,
        turns=6,
        language=LanguageFit(steps=1200),
        told_objects=nlvr_told,
        patch_words=NLVR_WORDS,
    )


TASKS: dict[str, Callable[..., Task]] = {"scenes": scenes_task, "easy_vqa": easy_vqa_task, "nlvr": nlvr_task}
"""Tasks by the name of their folder under the directory of data sets (`scenes` needs none)."""


def open_task(name: str, data: Path, seed: int) -> Task:
    """Return a task by name.

    Args:
        name: A key of `TASKS`.
        data: Directory that holds the public sets, each in a folder of that name.
        seed: Seed of the scenes; the public sets are what they are.

    Raises:
        SettingError: No such task; the nearest is named.
    """
    if name not in TASKS:
        raise SettingError(f"Unknown task {name!r}. {near_miss(name, TASKS)}")
    return scenes_task(seed) if name == "scenes" else TASKS[name](data / name)
