"""Rows and questions for commands that take a model and some data by name, without a run file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from trimtab.data import SupervisedCollator, load_rows, open_image
from trimtab.errors import DataError
from trimtab.evaluate import exact_match, prompts_of_row
from trimtab.evaluate.prompts import prompt_inputs
from trimtab.run.load import image_counts

Row = Mapping[str, Any]


def rows_with_images(data: str, count: int, image_folder: str | Path | None = None) -> Any:
    """Return the first rows of a data set that hold an image; images are opened when a row is asked for.

    Args:
        data: Whatever `trimtab.load_rows` reads.
        count: How many rows; fewer where there are no more.
        image_folder: Folder that relative image paths start from.

    Raises:
        DataError: The data cannot be read, or no row holds an image.
    """
    from torch.utils.data import Subset

    rows = load_rows(data, image_folder=image_folder)
    places = list(islice((place for place, images in image_counts(rows) if images), count))
    if not places:
        raise DataError(f"None of the {len(rows)} rows of {data} holds an image. Give rows with images.")
    return Subset(cast(Any, rows), places)


def supervised_batches(processor: Any, rows: Any, batch_size: int = 1) -> Any:
    """Return rows as batches with labels on the answers, made one by one as they are asked for.

    Args:
        processor: The processor of the model.
        rows: A sequence of rows.
        batch_size: Rows of a batch.
    """
    from torch.utils.data import DataLoader

    return DataLoader(rows, batch_size=batch_size, collate_fn=SupervisedCollator(processor))


def question_row(images: Sequence[str | Path], prompt: str) -> dict[str, Any]:
    """Return a row that asks about images; its answer is empty.

    Args:
        images: Files, shown before the question.
        prompt: The question.

    Raises:
        DataError: An image cannot be opened.
    """
    parts = [{"type": "image"} for _ in images]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    messages = [question, {"role": "assistant", "content": ""}]
    return {"messages": messages, "images": [open_image(image) for image in images]}


def prompt_batch(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the conversations of rows up to their first answer as one batch.

    Args:
        processor: The processor of the model.
        rows: At least one.

    Raises:
        DataError: The processor cannot read them.
    """
    return dict(prompt_inputs(processor, [prompts_of_row(row, number)[0] for number, row in enumerate(rows)]))


def answer(model: Any, processor: Any, row: Row, max_new_tokens: int) -> str:
    """Return what a model answers to a row, by greedy generation.

    Args:
        model: The model.
        processor: Its processor.
        row: The row; its last answer is not looked at.
        max_new_tokens: Tokens of the answer at most.
    """
    told = exact_match(model, processor, [row], max_new_tokens=max_new_tokens, predictions=True)
    return str(told["predictions"][-1])
