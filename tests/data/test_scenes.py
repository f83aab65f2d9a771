"""Scenes: a pure function of seed, split and index, whose questions need eyes and whose splits share no stroke."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trimtab.data.question_sets import language_only_accuracy, majority_accuracy
from trimtab.data.scenes import (
    COLOURS,
    DIGITS,
    FAMILIES,
    QUADRANTS,
    SceneSettings,
    conversation,
    make_scenes,
    vocabulary,
)
from trimtab.errors import SettingError
from trimtab.quickstart.model import split_words

PAIRS, SINGLES = SceneSettings(pairs=1.0), SceneSettings(pairs=0.0)


def answer_by_looking(row, place):
    """Work out the answer of a question from the object list alone."""
    words, objects = split_words(row["questions"][place]), row["objects"]
    if row["families"][place] != "compare":
        (shown,) = objects
        key = {"digit": "digit", "either": "digit", "colour": "colour", "where": "quadrant"}[row["families"][place]]
        assert row["families"][place] != "either" or shown[key] in words
        return shown[key]
    assert {entry["colour"] for entry in objects} <= set(words)
    edge = 0 if "left" in words else 1
    return min(objects, key=lambda entry: entry["box"][edge])["colour"]


@pytest.mark.parametrize("settings", [PAIRS, SINGLES])
def test_every_answer_follows_from_the_objects(settings):
    for row in make_scenes("train", 150, settings=settings):
        for place in range(len(row["questions"])):
            assert row["answers"][place] == answer_by_looking(row, place), row["questions"][place]


def test_all_comparisons_are_asked():
    rows = make_scenes("train", 50, settings=PAIRS).texts()
    asked = {question.split(",")[0] for row in rows for question in row["questions"]}
    assert asked == {"Which is further left", "Which is higher"}


def test_a_row_is_a_pure_function_of_seed_split_and_index():
    short, long = make_scenes("train", 5, seed=3), make_scenes("train", 50, seed=3)
    for one, other in ((short[4], long[4]), (short[-1], short[4])):
        assert np.array_equal(one.pop("image"), other.pop("image"))
        assert one == other
    first = np.asarray(long[0]["image"])
    assert not np.array_equal(first, make_scenes("train", 5, seed=4)[0]["image"])
    assert not np.array_equal(first, make_scenes("test", 5, seed=3)[0]["image"])
    assert not np.array_equal(first, long[1]["image"])


def test_texts_are_those_of_the_rows():
    scenes = make_scenes("test", 8)
    for text, row in zip(scenes.texts(), scenes, strict=True):
        assert text == {key: row[key] for key in ("questions", "answers", "families")}


def test_reading_behaves_as_a_sequence():
    scenes = make_scenes("train", 6)
    assert len(scenes) == len(list(scenes)) == 6
    assert [row["objects"] for row in scenes[4:]] == [scenes[4]["objects"], scenes[5]["objects"]]
    with pytest.raises(IndexError):
        scenes[6]


def test_splits_share_no_pen_stroke():
    strokes = {
        split: {entry["stroke"] for row in make_scenes(split, 800) for entry in row["objects"]}
        for split in ("train", "test")
    }
    assert len(strokes["train"]) > 500
    assert len(strokes["test"]) > 200
    assert not strokes["train"] & strokes["test"]


def test_strokes_are_real_digits_of_their_class():
    from sklearn.datasets import load_digits

    target = load_digits().target
    for row in make_scenes("test", 30):
        for entry in row["objects"]:
            assert DIGITS[target[entry["stroke"]]] == entry["digit"]


@pytest.mark.parametrize("settings", [PAIRS, SINGLES, SceneSettings(canvas=32, cell=4)])
def test_objects_lie_on_cells_in_their_quadrant_and_show_their_colour(settings):
    half = settings.canvas // 2
    for row in make_scenes("train", 40, settings=settings):
        assert row["image"].size == (settings.canvas, settings.canvas)
        assert row["image"].mode == "RGB"
        pixels = np.asarray(row["image"]).astype(int)
        for entry in row["objects"]:
            left, top, right, bottom = entry["box"]
            assert not any(edge % settings.cell for edge in entry["box"])
            assert QUADRANTS[2 * (top // half) + left // half] == entry["quadrant"]
            assert (right - 1) // half == left // half
            assert (bottom - 1) // half == top // half
            nearest = [min(COLOURS, key=lambda name: np.abs(pixel - COLOURS[name]).sum())
                       for pixel in pixels[top:bottom, left:right].reshape(-1, 3) if np.ptp(pixel) > 90]  # fmt: skip
            assert Counter(nearest).most_common(1)[0][0] == entry["colour"]


def test_pairs_is_the_share_of_scenes_with_two_distinct_digits():
    counts = Counter()
    for row in make_scenes("train", 400, settings=SceneSettings(pairs=0.25)):
        objects = row["objects"]
        counts[len(objects)] += 1
        for key in ("digit", "colour", "quadrant"):
            assert len({entry[key] for entry in objects}) == len(objects)
    assert set(counts) == {1, 2}
    assert counts[2] / 400 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 400) ** 0.5)


def test_answers_are_balanced_and_words_alone_do_not_help():
    chance = {"digit": 1 / 10, "colour": 1 / 6, "where": 1 / 4, "either": 1 / 2, "compare": 1 / 2}
    for family, expected in chance.items():
        settings = PAIRS if family == "compare" else SINGLES
        train, test = (
            [_only(row, family) for row in make_scenes(split, count, settings=settings).texts()]
            for split, count in (("train", 4000), ("test", 1000))
        )
        spread = (expected * (1 - expected) / 1000) ** 0.5
        assert language_only_accuracy(train, test) == pytest.approx(expected, abs=4 * spread), family
    train, test = (make_scenes(split, 1000, settings=SINGLES).texts() for split in ("train", "test"))
    assert majority_accuracy(test, train) < 0.2


def _only(row, family):
    places = [place for place, name in enumerate(row["families"]) if name == family]
    return {key: [row[key][place] for place in places] for key in ("questions", "answers")}


def test_conversation_puts_the_image_in_front_of_the_first_question():
    row = make_scenes("train", 1, settings=SINGLES)[0]
    talk = conversation(row, [2, 0])
    assert talk["images"] == [row["image"]]
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant"] * 2
    assert talk["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": row["questions"][2]}]
    assert talk["messages"][1]["content"] == [{"type": "text", "text": row["answers"][2]}]
    assert talk["messages"][2]["content"] == [{"type": "text", "text": row["questions"][0]}]
    assert len(conversation(row)["messages"]) == 8


def test_vocabulary_is_what_the_scenes_say():
    rows = make_scenes("train", 500, settings=SceneSettings(pairs=0.5)).texts()
    texts = [text for row in rows for key in ("questions", "answers") for text in row[key]]
    assert {word for text in texts for word in split_words(text)} == set(vocabulary())


def test_questions_per_scene():
    families = set()
    for count in range(1, 5):
        row = make_scenes("train", 1, questions=count, settings=SINGLES)[0]
        assert len(row["questions"]) == len(row["answers"]) == len(set(row["families"])) == count
        pair = make_scenes("train", 1, questions=count, settings=PAIRS)[0]
        assert len(set(pair["questions"])) == min(count, 2)
        families |= {*row["families"], *pair["families"]}
    assert families == set(FAMILIES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"count": 0}, "count must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"questions": 5}, "questions must be in 1..4"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(SettingError, match=words):
        make_scenes(**{"split": "train", "count": 1, **arguments})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"canvas": 120}, "canvas must be a multiple of twice cell=8"),
        ({"cell": 2}, "cell must be at least 4"),
        ({"size": 9}, "size must be in 1..8 cells"),
        ({"size": 0}, "size must be in 1..8 cells"),
        ({"pairs": 1.5}, "pairs must be a share"),
        ({"distractors": -1}, "distractors must be at least 0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(SettingError, match=words):
        SceneSettings(**settings)
