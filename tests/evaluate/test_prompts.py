"""Rows of both forms become one prompt per question."""

from __future__ import annotations

import pytest

from trimtab.errors import DataError
from trimtab.evaluate import prompts_of_row


def test_question_rows():
    image = object()
    row = {"image": image, "questions": ["a?", "b?"], "answers": ["1", ["2", "two"]], "families": ["x", "y"]}
    first, second = prompts_of_row(row, 7)
    assert (first.row, first.question, first.answers, first.family, first.images) == (7, "a?", ("1",), "x", (image,))
    assert second.answers == ("2", "two")
    content = [{"type": "image"}, {"type": "text", "text": "b?"}]
    assert second.messages == [{"role": "user", "content": content}]


def test_question_rows_without_image_or_families():
    (prompt,) = prompts_of_row({"image": None, "questions": ["a?"], "answers": ["1"]})
    assert (prompt.family, prompt.images) == ("all", ())
    assert prompt.messages == [{"role": "user", "content": [{"type": "text", "text": "a?"}]}]


def test_message_rows_ask_every_turn_with_the_turns_before():
    row = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "a?"}]},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
        ],
        "images": ["first", "second"],
    }
    first, second = prompts_of_row(row)
    assert (first.question, first.answers, first.images, len(first.messages)) == ("a?", ("1",), ("first",), 2)
    assert (second.question, second.answers, second.images) == ("b?", ("2",), ("first", "second"))
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[1]["content"][0] == {"type": "image"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "Row 3 has neither 'questions' nor 'messages', but text"),
        ({"questions": ["a?"], "answers": []}, "Row 3 has 1 questions, 0 answers and 1 families"),
        ({"questions": ["a?"], "answers": [5]}, "Row 3: an answer must be text .* but 5 came"),
        ({"messages": [{"role": "user", "content": "a?"}]}, "Row 3 has no assistant turn"),
        ({"messages": [{"role": "user", "content": 4}]}, "Row 3: the content of a message .* but 4 came"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
            "Row 3 has 1 image parts, but 0 images",
        ),
    ],
)
def test_unusable_rows_are_named(row, words):
    with pytest.raises(DataError, match=words):
        prompts_of_row(row, 3)
