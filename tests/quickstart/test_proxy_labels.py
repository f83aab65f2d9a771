"""Proxy labels of the public sets: what lies under a patch, and nothing where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trimtab.errors import SettingError
from trimtab.quickstart.proxy_labels import EASY_COLOURS, EASY_SHAPES, NLVR_COLOURS, easy_vqa_labels, nlvr_labels
from trimtab.quickstart.tasks import open_task, scenes_task


def test_nlvr_patches_belong_to_the_object_that_covers_most() -> None:
    objects = [["yellow", "square", 20, 0, 0], ["blue", "circle", 10, 15, 0]]
    row = {"image": Image.new("RGB", (100, 100)), "objects": objects}
    labels = nlvr_labels(row, 10).reshape(10, 10, 5)
    yellow, blue = NLVR_COLOURS.index("yellow") + 1, NLVR_COLOURS.index("blue") + 1
    assert labels[0, 0].tolist() == [yellow, 2, 2, 1, 1]
    assert labels[1, 1].tolist() == [yellow, 2, 2, 2, 2], "the circle covers none of the second row"
    assert labels[0, 2].tolist() == [blue, 1, 1, 1, 3], "half covered by the circle, not at all by the square"
    assert not labels[2:].any()
    assert not labels[:, 3:].any()


def easy_row(*answers: str) -> dict[str, object]:
    image = Image.new("RGB", (64, 64), (240, 240, 240))
    ImageDraw.Draw(image).rectangle((16, 16, 31, 31), fill=(200, 0, 0))
    return {"image": image, "answers": list(answers)}


def test_easy_vqa_patches_that_differ_from_the_ground_carry_the_answers() -> None:
    labels = easy_vqa_labels(easy_row("yes", "rectangle", "red"), 16).reshape(16, 16, 2)
    shown = np.argwhere(labels[..., 0] > 0)
    assert {tuple(place) for place in shown} == {(r, c) for r in range(4, 8) for c in range(4, 8)}
    assert labels[4, 4].tolist() == [EASY_SHAPES.index("rectangle") + 1, EASY_COLOURS.index("red") + 1]


def test_what_no_question_asks_stays_unknown() -> None:
    labels = easy_vqa_labels(easy_row("no", "red"), 16)
    assert not labels[:, 0].any()
    assert labels[:, 1].any()


def test_scenes_of_a_task_follow_its_seed() -> None:
    one, same, other = (scenes_task(seed).train[0]["answers"] for seed in (0, 0, 1))
    assert one == same
    assert [scenes_task(1).train[i]["answers"] for i in range(5)] != [
        scenes_task(0).train[i]["answers"] for i in range(5)
    ]
    assert other is not one


def test_an_unknown_task_names_the_nearest(tmp_path) -> None:
    with pytest.raises(SettingError, match="Did you mean 'nlvr'"):
        open_task("nvlr", tmp_path, 0)
