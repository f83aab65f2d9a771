"""Public question sets: published counts, baselines and the errors of broken folders."""

import builtins
import io
import pickle
from pathlib import Path

import pytest
from PIL import Image

from trimtab.data.question_sets import (
    easy_vqa_rows,
    language_only_accuracy,
    majority_accuracy,
    nlvr_one_box_rows,
)
from trimtab.errors import DataError, MissingExtraError, SettingError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def _shared(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is absent")
    return SHARED / name


def _png(size, colour):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def _tiny_nlvr(folder):
    picture = Image.new("RGB", (400, 100), "grey")
    for box, colour in enumerate(["red", "green", "blue"]):
        picture.paste(Image.new("RGB", (100, 100), colour), (150 * box, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    other = _png((400, 100), "black")
    _write(
        folder / "images_train.parquet",
        {
            "split": ["train"] * 2,
            "identifier": ["1-0"] * 2,
            "permutation": [1, 0],
            "png": [other, buffer.getvalue()],
            "objects": ["[[], [], []]", '[[], [], [["black", "circle", 30, 1, 2]]]'],
        },
    )
    asked = [
        ("size", "what size is the right item in the right box ?", "large"),
        ("compare", "which box has the most black items ?", "right"),
        ("tower_height", "how many blocks are in the left tower ?", "two"),
        ("count", "how many items are in the right box ?", "one"),
    ]
    _write(
        folder / "qa_train.parquet",
        {
            "image_split": ["train"] * 4,
            "identifier": ["1-0"] * 4,
            "family": [a[0] for a in asked],
            "question": [a[1] for a in asked],
            "answer": [a[2] for a in asked],
        },
    )


def test_one_box_crops_the_named_box_and_drops_its_word(tmp_path):
    _tiny_nlvr(tmp_path)
    rows = nlvr_one_box_rows(tmp_path, "train")
    assert len(rows) == 2
    assert rows.question_count == 3
    left, right = rows
    assert left["image"].size == (100, 100)
    assert left["image"].getcolors() == [(10000, (255, 0, 0))]
    assert right["image"].getcolors() == [(10000, (0, 0, 255))]
    assert left["questions"] == ["how many blocks are in the tower ?"]
    assert right["questions"] == ["what size is the right item in the box ?", "how many items are in the box ?"]
    assert right["answers"] == ["large", "one"]
    assert right["families"] == ["size", "count"]


def test_slices_and_pickles_keep_rows(tmp_path):
    _tiny_nlvr(tmp_path)
    rows = nlvr_one_box_rows(tmp_path, "train")
    assert rows[1:][0]["questions"] == rows[1]["questions"]
    copy = pickle.loads(pickle.dumps(rows))
    assert copy[0]["image"].tobytes() == rows[0]["image"].tobytes()
    with pytest.raises(IndexError):
        rows[2]


def test_question_about_an_absent_image_is_named(tmp_path):
    _tiny_nlvr(tmp_path)
    png = _png((400, 100), "red")
    columns = {"split": ["train"], "identifier": ["9-9"], "permutation": [0], "png": [png], "objects": ["[[], [], []]"]}
    _write(tmp_path / "images_train.parquet", columns)
    with pytest.raises(DataError, match=r"asks about image '1-0'"):
        nlvr_one_box_rows(tmp_path, "train")


def test_question_without_a_box_is_named(tmp_path):
    _tiny_nlvr(tmp_path)
    columns = {key: ["train"] for key in ("image_split", "identifier", "family", "question", "answer")}
    _write(tmp_path / "qa_train.parquet", columns)
    with pytest.raises(DataError, match="names none of the boxes"):
        nlvr_one_box_rows(tmp_path, "train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_bytes(b"no parquet"), "cannot be read as parquet"),
        (lambda f: f.write_bytes(f.read_bytes()[:40]), "cannot be read as parquet"),
        (lambda f: _write(f, {"image_id": [0]}), r"lacks the columns \['png'\]"),
    ],
)
def test_broken_folder_names_the_file(tmp_path, spoil, message):
    _write(tmp_path / "questions_train.parquet", {"image_id": [0], "question": ["q"], "answer": ["a"]})
    _write(tmp_path / "images_train.parquet", {"image_id": [0], "png": [_png((4, 4), "red")]})
    spoil(tmp_path / "images_train.parquet")
    with pytest.raises(DataError, match=message) as caught:
        easy_vqa_rows(tmp_path, "train")
    assert "images_train.parquet" in str(caught.value)


@pytest.mark.parametrize("reader", [easy_vqa_rows, nlvr_one_box_rows])
def test_unknown_split_lists_the_splits(reader, tmp_path):
    with pytest.raises(SettingError, match=r"split must be one of train, val.*'dev' came"):
        reader(tmp_path, "dev")


def test_absent_pyarrow_is_explained(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(MissingExtraError, match="pip install pyarrow"):
        easy_vqa_rows(tmp_path, "train")


def test_accuracies_on_a_hand_made_set():
    train = [{"questions": ["a", "a", "b"], "answers": ["x", "y", "z"]}, {"questions": ["a"], "answers": ["y"]}]
    test = [{"questions": ["a", "a", "b", "new"], "answers": ["y", "x", "z", "y"]}]
    assert language_only_accuracy(train, test) == pytest.approx(3 / 4)
    assert majority_accuracy(test) == pytest.approx(2 / 4)
    assert majority_accuracy(test, [{"questions": ["q"], "answers": ["z"]}]) == pytest.approx(1 / 4)


def test_accuracies_refuse_empty_rows():
    with pytest.raises(DataError, match="none"):
        majority_accuracy([])
    with pytest.raises(DataError, match="none"):
        language_only_accuracy([], [{"questions": ["a"], "answers": ["b"]}])


def test_easy_vqa_has_its_published_counts_and_baselines():
    folder = _shared("easy_vqa")
    train, val = easy_vqa_rows(folder, "train"), easy_vqa_rows(folder, "val")
    both, test = easy_vqa_rows(folder, "train+val"), easy_vqa_rows(folder, "test")
    assert [len(rows) for rows in (train, val, both, test)] == [3800, 200, 4000, 1000]
    assert train.question_count + val.question_count == both.question_count == 38575
    assert test.question_count == 9673
    assert test[0]["image"].size == (64, 64)
    assert majority_accuracy(test) == pytest.approx(0.373, abs=5e-4)
    assert language_only_accuracy(both, test) == pytest.approx(0.670, abs=5e-3)
    assert sum(row["families"].count("open") for row in test.texts()) == 2537


@pytest.mark.parametrize(("split", "boxes", "asked"), [("val", 1359, 8518), ("test", 2619, 16942)])
def test_nlvr_one_box_has_its_published_counts(split, boxes, asked):
    rows = nlvr_one_box_rows(_shared("nlvr"), split)
    assert (len(rows), rows.question_count) == (boxes, asked)
    assert all("left box" not in question for row in rows.texts() for question in row["questions"])


def test_nlvr_training_counts_and_language_only_accuracy():
    train = nlvr_one_box_rows(_shared("nlvr"), "train")
    assert (len(train), train.question_count) == (31026, 277326)
    assert language_only_accuracy(train, nlvr_one_box_rows(_shared("nlvr"), "test")) == pytest.approx(0.36, abs=0.02)
