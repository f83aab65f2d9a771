"""Two public question sets, read as rows of one image with all its questions.

A row is ``{"image": PIL image, "questions": [...], "answers": [...], "families": [...]}``, the three lists of one
length. Images stay encoded until a row is asked for, and are not kept afterwards.

Sets:
    easy-VQA (github.com/vzhou842/easy-VQA, MIT): one coloured shape on 64x64 pixels, 13 answers.
    NLVR, one box (Suhr, Lewis, Yeh, Artzi, ACL 2017; CC BY 4.0): a 100x100 crop of one box of an NLVR image, with
    template questions that the box answers by itself.

Both are expected as parquet files in a folder that the caller names; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image

from trimtab.errors import DataError, MissingExtraError, setting_error

EASY_VQA_SPLITS = ("train", "val", "train+val", "test")
NLVR_SPLITS = ("train", "val", "test")
EASY_VQA_VAL_IMAGES = 200
BOX_PLACES = ("left", "middle", "right")
BOX_STEP, BOX_SIDE = 150, 100

_BOX_WORD = re.compile(r"\b(left|middle|right) (?=(?:box|tower)\b)")


@dataclass(frozen=True)
class _Entry:
    png: bytes
    crop: tuple[int, int, int, int] | None
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    families: tuple[str, ...]
    objects: str | None = None


class QuestionRows(Sequence[dict[str, Any]]):
    """Rows of one image with several questions; the image is decoded when its row is asked for.

    Indexing gives ``{"image", "questions", "answers", "families"}``, and ``objects`` where the set lists what its
    images show; a slice gives another `QuestionRows`.
    """

    def __init__(self, entries: Sequence[_Entry]):
        self._entries = tuple(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> QuestionRows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | QuestionRows:
        if isinstance(index, slice):
            return QuestionRows(self._entries[index])
        entry = self._entries[index]
        with Image.open(io.BytesIO(entry.png)) as opened:
            image = opened.convert("RGB")
        return {"image": image.crop(entry.crop) if entry.crop else image, **_texts(entry)}

    def texts(self) -> Iterator[dict[str, Any]]:
        """Yield every row without its image, so that nothing is decoded."""
        return (_texts(entry) for entry in self._entries)

    @property
    def question_count(self) -> int:
        """Number of questions over all rows."""
        return sum(len(entry.questions) for entry in self._entries)


def _texts(entry: _Entry) -> dict[str, Any]:
    texts = {"questions": list(entry.questions), "answers": list(entry.answers), "families": list(entry.families)}
    return texts if entry.objects is None else {**texts, "objects": json.loads(entry.objects)}


def easy_vqa_rows(folder: str | Path, split: str) -> QuestionRows:
    """Read easy-VQA, one row per image.

    Args:
        folder: Directory with ``images_{train,test}.parquet`` (``image_id``, ``png``) and
            ``questions_{train,test}.parquet`` (``image_id``, ``question``, ``answer``).
        split: ``"train"`` (3,800 images), ``"val"`` (the last 200 training images, which ``"train"`` leaves out),
            ``"train+val"`` (all 4,000) or ``"test"`` (1,000).

    Returns:
        Rows in the order of ``image_id``; ``families`` says ``"yes_no"`` or ``"open"`` for every question.

    Raises:
        SettingError: Unknown split.
        DataError: A file is missing, is not parquet, or lacks a column.
        MissingExtraError: pyarrow is not installed.
    """
    if split not in EASY_VQA_SPLITS:
        raise setting_error("easy_vqa_rows", "split", f"one of {', '.join(EASY_VQA_SPLITS)}", split)
    name = "test" if split == "test" else "train"
    images = _columns(folder, f"images_{name}.parquet", ("image_id", "png"))
    table = _columns(folder, f"questions_{name}.parquet", ("image_id", "question", "answer"))
    grouped: dict[int, list[tuple[str, str, str]]] = defaultdict(list)
    for number, question, answer in zip(*table, strict=True):
        grouped[number].append((question, answer, "yes_no" if answer in ("yes", "no") else "open"))
    entries = [_entry(png, None, grouped[number]) for number, png in sorted(zip(*images, strict=True))]
    if split in ("train", "val"):
        entries = entries[:-EASY_VQA_VAL_IMAGES] if split == "train" else entries[-EASY_VQA_VAL_IMAGES:]
    return QuestionRows(entries)


def nlvr_one_box_rows(folder: str | Path, split: str) -> QuestionRows:
    """Read NLVR at its one-box level, one row per box that has questions.

    Box b covers the columns 150 b .. 150 b + 100 of the 400x100 image. The word that names the box is taken out of
    its questions, and questions that compare boxes are left out.

    Args:
        folder: Directory with ``images_train.parquet``, ``images_eval.parquet`` and
            ``qa_{train,val,test}.parquet``.
        split: ``"train"`` (31,026 boxes, 277,326 questions), ``"val"`` (1,359, 8,518) or ``"test"`` (2,619, 16,942).

    Returns:
        Rows in the order of the question file, boxes left to right; ``families`` is the kind of each question,
        for example ``"count"`` or ``"touch"``, and ``objects`` lists ``[colour, shape, size, x, y]`` of what the box
        holds, in pixels from its top left corner.

    Raises:
        SettingError: Unknown split.
        DataError: A file is missing, is not parquet, lacks a column, or a question names no box or no image.
        MissingExtraError: pyarrow is not installed.
    """
    if split not in NLVR_SPLITS:
        raise setting_error("nlvr_one_box_rows", "split", f"one of {', '.join(NLVR_SPLITS)}", split)
    questions = _columns(folder, f"qa_{split}.parquet", ("image_split", "identifier", "family", "question", "answer"))
    boxes: dict[tuple[str, str], dict[int, list[tuple[str, str, str]]]] = {}
    for part, identifier, family, question, answer in zip(*questions, strict=True):
        if family == "compare":
            continue
        box, text = _without_box_word(question)
        boxes.setdefault((part, identifier), defaultdict(list))[box].append((text, answer, family))
    pictures = _nlvr_pictures(folder, "images_train.parquet" if split == "train" else "images_eval.parquet")
    missing = next((key for key in boxes if key not in pictures), None)
    if missing:
        raise DataError(
            f"qa_{split}.parquet asks about image {missing[1]!r} of split {missing[0]!r}, which the image file in "
            f"{folder} does not hold. Fetch both files from the same source."
        )
    return QuestionRows(
        [
            _entry(
                pictures[key][0],
                (BOX_STEP * box, 0, BOX_STEP * box + BOX_SIDE, BOX_SIDE),
                by_box[box],
                json.dumps(json.loads(pictures[key][1])[box]),
            )
            for key, by_box in boxes.items()
            for box in sorted(by_box)
        ]
    )


def _nlvr_pictures(folder: str | Path, name: str) -> dict[tuple[str, str], tuple[bytes, str]]:
    """Image bytes and object lists by split and identifier; permutations other than 0 only reorder the boxes."""
    columns = _columns(folder, name, ("split", "identifier", "permutation", "png", "objects"))
    return {(part, key): (png, shown) for part, key, order, png, shown in zip(*columns, strict=True) if order == 0}


def _without_box_word(question: str) -> tuple[int, str]:
    found = _BOX_WORD.search(question)
    if found is None:
        raise DataError(f"The NLVR question {question!r} names none of the boxes left, middle, right.")
    return BOX_PLACES.index(found.group(1)), question[: found.start()] + question[found.end() :]


def _entry(
    png: bytes,
    crop: tuple[int, int, int, int] | None,
    asked: Sequence[tuple[str, str, str]],
    objects: str | None = None,
) -> _Entry:
    questions, answers, families = zip(*asked, strict=True) if asked else ((), (), ())
    return _Entry(png, crop, tuple(questions), tuple(answers), tuple(families), objects)


def _columns(folder: str | Path, name: str, wanted: Sequence[str]) -> list[list[Any]]:
    """Read the named columns of one parquet file as Python lists."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as cause:
        raise MissingExtraError("Reading parquet files needs pyarrow: pip install pyarrow.") from cause
    path = Path(folder) / name
    if not path.is_file():
        raise DataError(f"{path} is missing. Give the folder that holds {name}.")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as cause:
        raise DataError(f"{path} cannot be read as parquet ({cause}). Fetch the file again.") from cause
    lacking = [column for column in wanted if column not in table.column_names]
    if lacking:
        raise DataError(f"{path} lacks the columns {lacking}; it has {table.column_names}.")
    return [table.column(column).to_pylist() for column in wanted]


def majority_accuracy(test_rows: Iterable[Mapping[str, Any]], train_rows: Iterable[Mapping[str, Any]] = ()) -> float:
    """Accuracy of always giving the most frequent answer.

    Args:
        test_rows: Rows with ``answers``; `QuestionRows` are read without decoding images.
        train_rows: Where the most frequent answer is counted; the test rows themselves where empty.

    Returns:
        Share of right answers in [0, 1]. Ties go to the answer that sorts first.

    Raises:
        DataError: The rows hold no answer.
    """
    answers = [answer for _, answer in _pairs(test_rows)]
    counted = [answer for _, answer in _pairs(train_rows)] or answers
    if not answers:
        raise DataError("majority_accuracy needs at least one answer, but the rows hold none.")
    return answers.count(_most_frequent(Counter(counted))) / len(answers)


def language_only_accuracy(train_rows: Iterable[Mapping[str, Any]], test_rows: Iterable[Mapping[str, Any]]) -> float:
    """Accuracy of the best answer per question string, learnt without any image.

    Args:
        train_rows: Rows with ``questions`` and ``answers``, to learn from.
        test_rows: Rows to judge on. A question that training never asked gets training's most frequent answer.

    Returns:
        Share of right answers in [0, 1]: what a model reaches that does not see. Ties go to the answer that sorts
        first.

    Raises:
        DataError: One of the two holds no question.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question, answer in _pairs(train_rows):
        by_question[question][answer] += 1
        overall[answer] += 1
    asked = _pairs(test_rows)
    if not overall or not asked:
        raise DataError("language_only_accuracy needs questions in train_rows and test_rows, but one holds none.")
    best = {question: _most_frequent(counts) for question, counts in by_question.items()}
    fallback = _most_frequent(overall)
    return sum(best.get(question, fallback) == answer for question, answer in asked) / len(asked)


def _pairs(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    texts: Iterable[Mapping[str, Any]] = rows.texts() if isinstance(rows, QuestionRows) else rows
    return [pair for row in texts for pair in zip(row["questions"], row["answers"], strict=True)]


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
