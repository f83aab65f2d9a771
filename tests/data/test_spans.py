"""Where answers lie in rendered text, and how a mask moves to a batch that holds more tokens per image."""

import pytest
from tests.data.tiny_processors import PLAIN, VICUNA, tiny_llava

from trimtab.data.messages import to_messages
from trimtab.data.spans import answer_spans, lay_over
from trimtab.errors import DataError

IMG = 99


def _spans(template, pairs):
    turns = [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    processor = tiny_llava(template)
    messages = to_messages({"messages": turns})["messages"]
    text = processor.apply_chat_template(messages, tokenize=False)
    return [text[start:end] for start, end in answer_spans(processor, messages, text)]


def test_blank_after_the_generation_prompt_belongs_to_the_answer():
    assert _spans(VICUNA, [("what?", "a cat."), ("a cat.", "no")]) == [" a cat.</s>", " no</s>"]


def test_end_of_turn_is_taken_without_the_line_break_after_it():
    assert _spans(PLAIN, [("what?", "a\n\ncat"), ("a", "a")]) == [" a\n\ncat<end>", " a<end>"]


def test_template_that_refuses_half_a_conversation():
    strict = "{% if messages | length < 4 %}{{ raise_exception('four turns') }}{% endif %}" + PLAIN
    spans = _spans(strict, [("what?", "a cat."), ("a cat.", "a cat.")])
    assert [span.strip() for span in spans] == ["a cat.<end>", "a cat.<end>"]


def test_words_of_the_processor_that_equal_the_answer_are_passed_over():
    text, mask = [1, IMG, 7, 8], [False, False, True, True]
    assert lay_over([1, IMG, 7, 8, IMG, 7, 8], text, mask, {IMG}, "Row 0") == [False] * 5 + [True] * 2


def test_piece_between_images_is_found_behind_the_first():
    text, mask = [3, 5, IMG, 3, 5, IMG, 4], [False] * 3 + [False, True, False, False]
    batch = [3, 5, IMG, IMG, 3, 5, IMG, IMG, 4]
    assert lay_over(batch, text, mask, {IMG}, "Row 0").index(True) == 5


def test_tokens_merged_beside_an_image_do_not_matter():
    text, mask = [1, 2, IMG, 3, 4, 5], [False] * 4 + [True, True]
    assert lay_over([12, IMG, IMG, 33, 4, 5], text, mask, {IMG}, "Row 0") == [False] * 4 + [True, True]


def test_absent_answer_is_an_error():
    with pytest.raises(DataError, match="Row 6: the tokens of an answer are not where"):
        lay_over([1, 2, 3], [1, 2, 4], [False, False, True], {IMG}, "Row 6")


def test_placeholders_are_never_supervised():
    assert lay_over([IMG, IMG, 2], [IMG, 2], [True, True], {IMG}, "Row 0") == [False, False, True]
