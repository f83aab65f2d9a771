"""From rows to prompts: one question each, in the form that chat templates take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import DataError

ALL = "all"
"""Family of questions whose row names none."""


@dataclass(frozen=True)
class Prompt:
    """One question as its own conversation.

    Attributes:
        row: Number of the row it came from.
        question: The words of the last turn before the answer.
        answers: What counts as right, at least one.
        family: Kind of question.
        messages: The conversation up to the answer, in the form of chat templates.
        images: Its images in the order of its image parts.
    """

    row: int
    question: str
    answers: tuple[str, ...]
    family: str
    messages: list[dict[str, Any]]
    images: tuple[Any, ...]


def prompts_of_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Prompt]:
    """Yield the prompts of all rows, in order, reading each row when its turn comes.

    Raises:
        DataError: A row has no usable form; the message names its number.
    """
    for number, row in enumerate(rows):
        yield from prompts_of_row(row, number)


def prompts_of_row(row: Mapping[str, Any], number: int = 0) -> list[Prompt]:
    """Return the prompts of one row.

    A question row ``{"image", "questions", "answers", "families"}`` gives one prompt per question, each with the
    image alone before it; ``families`` may be missing and ``image`` may be None. A message row ``{"messages",
    "images"}`` gives one prompt per assistant turn, with the turns before it, true answers included, as context.

    Args:
        row: The row.
        number: Its number, for messages and results.

    Raises:
        DataError: The row has neither form, its lists differ in length, or images and image parts do not fit.
    """
    if "questions" in row:
        return _from_questions(row, number)
    if "messages" in row:
        return _from_messages(row, number)
    raise DataError(
        f"Row {number} has neither 'questions' nor 'messages', but {', '.join(map(str, row)) or 'nothing'}. "
        "Give question rows or message rows."
    )


def prompt_inputs(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """Return what a model is asked with: conversations up to the answer and their images, padded to one length.

    Args:
        processor: A processor of transformers with a chat template; its tokenizer decides the side of the padding.
        prompts: At least one; all with images, or none.

    Returns:
        What the processor makes of them, on the CPU.

    Raises:
        DataError: It cannot read them; the message names the rows.
    """
    texts = [
        processor.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False) for prompt in prompts
    ]
    images = {"images": [list(prompt.images) for prompt in prompts]} if prompts[0].images else {}
    try:
        return processor(text=texts, **images, padding=True, return_tensors="pt")
    except (ValueError, TypeError, OSError) as error:
        rows = sorted({prompt.row for prompt in prompts})
        raise DataError(
            f"The processor cannot read rows {rows[0]} to {rows[-1]}: {error} Check their images and the chat template."
        ) from error


def _from_questions(row: Mapping[str, Any], number: int) -> list[Prompt]:
    questions, answers = list(row["questions"]), list(row.get("answers") or [])
    families = list(row.get("families") or [ALL] * len(questions))
    if not len(questions) == len(answers) == len(families):
        raise DataError(
            f"Row {number} has {len(questions)} questions, {len(answers)} answers and {len(families)} families. "
            "Give one answer, and one family or none, per question."
        )
    images = () if row.get("image") is None else (row["image"],)
    return [
        Prompt(number, question, _accepted(answer, number), str(family), _conversation(question, len(images)), images)
        for question, answer, family in zip(questions, answers, families, strict=True)
    ]


def _conversation(question: str, images: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _from_messages(row: Mapping[str, Any], number: int) -> list[Prompt]:
    messages = [{**message, "content": _parts(message.get("content"), number)} for message in row["messages"]]
    images = tuple(row.get("images") or ())
    needed = _image_parts(messages)
    if needed != len(images):
        raise DataError(f"Row {number} has {needed} image parts, but {len(images)} images. Give one image per part.")
    turns = [turn for turn, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise DataError(f"Row {number} has no assistant turn, so there is no answer to compare with. Add one.")
    family = str(row.get("family", ALL))
    return [_turn(messages, turn, images, family, number) for turn in turns]


def _turn(messages: list[dict[str, Any]], turn: int, images: tuple[Any, ...], family: str, number: int) -> Prompt:
    before = messages[:turn]
    question = _text(before[-1]) if before else ""
    accepted = _accepted(_text(messages[turn]), number)
    return Prompt(number, question, accepted, family, before, images[: _image_parts(before)])


def _parts(content: Any, number: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "type" in part for part in content):
        return [{"type": "image"} if part["type"] == "image" else dict(part) for part in content]
    raise DataError(f"Row {number}: the content of a message must be text or a list of parts, but {content!r} came.")


def _text(message: Mapping[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _image_parts(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _accepted(answer: Any, number: int) -> tuple[str, ...]:
    """Return the accepted answers; one string, or several that are equally right."""
    accepted = (answer,) if isinstance(answer, str) else tuple(answer) if isinstance(answer, (list, tuple)) else ()
    if not accepted or not all(isinstance(one, str) for one in accepted):
        raise DataError(f"Row {number}: an answer must be text or a list of texts, but {answer!r} came.")
    return accepted
