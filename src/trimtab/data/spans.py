"""Which characters and tokens of a rendered conversation the assistant wrote.

The processor writes many tokens for each image, so the tokens of the text alone and those of the batch differ in
length. Where a template marks its answers with ``{% generation %}`` that mark is used; otherwise answers are found by
rendering the conversation once more with a mark in the place of each. Both give a mask over the tokens of the text
alone, which is then laid over the tokens of the batch: pieces of text between images are looked up in order, and
every supervised piece must be found as it is, or the row is an error. No image is looked at for any of this.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from trimtab.errors import DataError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "\u27e6answer\u27e7"
REFUSALS = (jinja2.TemplateError, IndexError, TypeError, KeyError)
"""What a template may raise on half a conversation."""
CONTEXTS = (None, 8, 2, 0)
"""How many tokens beside a supervised run must agree too; None for the whole piece. Tried from strict to loose,
because tokens right beside an image may merge with the text that a processor writes around it."""


def template_of(processor: Any) -> str:
    """Return the chat template of a processor, or of its tokenizer.

    Args:
        processor: A transformers processor.

    Returns:
        The Jinja text.

    Raises:
        DataError: There is none.
    """
    for owner in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return str(template)
    raise DataError(
        f"{type(processor).__name__} has no chat template. Set processor.chat_template to the template of your model."
    )


def rendered_tokens(
    processor: Any, messages: list[dict[str, Any]], text: str, train_on: str, where: str
) -> tuple[list[int], list[bool]]:
    """Tokenise a rendered conversation without its images and mark the supervised tokens.

    Args:
        processor: A transformers processor with a fast tokenizer and a chat template.
        messages: The conversation, as from `trimtab.data.to_messages`.
        text: The conversation as the template renders it.
        train_on: ``"assistant"``, ``"last"`` or ``"all"``.
        where: Name of the row for error messages.

    Returns:
        Token ids of the text, and one truth value per token.

    Raises:
        DataError: An answer does not appear in the rendered text.
    """
    tokenizer, template = processor.tokenizer, template_of(processor)
    if train_on != "all" and GENERATION_MARK.search(template):
        marked = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [bool(value) for value in marked["assistant_masks"]]
        return list(marked["input_ids"]), _last_run(mask) if train_on == "last" else mask
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if train_on == "all":
        return ids, [True] * len(ids)
    spans = answer_spans(processor, messages, text, where)
    chosen = spans[-1:] if train_on == "last" else spans
    return ids, [_inside(start, end, chosen) for start, end in encoded["offset_mapping"]]


def _inside(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    return end > start and any(start < stop and end > first for first, stop in spans)


def _last_run(mask: list[bool]) -> list[bool]:
    end = max((place for place, value in enumerate(mask) if value), default=-1)
    start = end
    while start > 0 and mask[start - 1]:
        start -= 1
    return [start <= place <= end for place in range(len(mask))]


def answer_spans(
    processor: Any, messages: list[dict[str, Any]], text: str, where: str = "The row"
) -> list[tuple[int, int]]:
    """Find the characters of every answer in a rendered conversation, with its end-of-turn token.

    Args:
        processor: A transformers processor with a chat template.
        messages: The conversation.
        text: The conversation as the template renders it.
        where: Name of the row for error messages.

    Returns:
        One (start, end) per assistant turn, in order; end is exclusive.

    Raises:
        DataError: An answer does not appear in `text`.
    """
    spans: list[tuple[int, int]] = []
    cursor = 0
    for number, turn in enumerate(messages):
        said = "".join(part["text"] for part in turn["content"] if part["type"] == "text").strip()
        if turn["role"] == "assistant":
            start, stop = _answer(processor, messages, number, text, said, cursor, f"{where}, turn {number}")
            turn_end = _prefix(processor, messages[: number + 1], text, prompt=False)
            cursor = _end_of_turn(processor, text, stop, turn_end)
            spans.append((start, cursor))
        else:
            found = text.find(said, cursor)
            cursor = found + len(said) if found >= 0 else cursor
    return spans


def _answer(
    processor: Any, messages: list[dict[str, Any]], number: int, text: str, said: str, cursor: int, place: str
) -> tuple[int, int]:
    """Start and end of an answer's own words; blanks that follow the generation prompt belong to the answer."""
    prompt = _prefix(processor, messages[:number], text, prompt=True)
    begin = _probe(processor, messages, number, text, said)
    if begin is None:
        begin = text.find(said, max(cursor, prompt or 0))
    if begin < 0:
        raise DataError(
            f"{place}: the chat template does not render this answer word for word, so its tokens cannot be found. "
            "Mark answers in the template with {% generation %} ... {% endgeneration %}."
        )
    if prompt is not None and cursor <= prompt < begin and not text[prompt:begin].strip():
        return prompt, begin + len(said)
    return begin, begin + len(said)


def _probe(processor: Any, messages: list[dict[str, Any]], number: int, text: str, said: str) -> int | None:
    """Where an answer begins, found with a mark in its place, so that equal words elsewhere do not matter."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
    try:
        other = _render(processor, [*messages[:number], turn, *messages[number + 1 :]])
    except REFUSALS:
        return None
    begin = other.find(PROBE)
    if begin < 0 or text[:begin] != other[:begin]:
        return None
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    return begin if text.startswith(said, begin) else None


def _render(processor: Any, turns: list[dict[str, Any]], prompt: bool = False) -> str:
    return str(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))


def _prefix(processor: Any, turns: list[dict[str, Any]], text: str, prompt: bool) -> int | None:
    """Length of the rendered first turns where the whole text begins with them, else None."""
    try:
        head = _render(processor, turns, prompt)
    except REFUSALS:
        return None
    return len(head) if text.startswith(head) else None


def _end_of_turn(processor: Any, text: str, stop: int, turn_end: int | None) -> int:
    """Extend an answer by its end-of-turn token: the first special token of its tail, or the tail without blanks."""
    tail = text[stop:turn_end] if turn_end is not None and turn_end >= stop else None
    specials = sorted(set(processor.tokenizer.all_special_tokens), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(token) for token in specials)) if specials else None
    found = pattern.search(text if tail is None else tail, stop if tail is None else 0) if pattern else None
    if tail is None:
        return found.end() if found and not text[stop : found.start()].strip() else stop
    return stop + (found.end() if found else len(tail.rstrip()))


def lay_over(
    batch_ids: Sequence[int], text_ids: Sequence[int], mask: Sequence[bool], image_ids: set[int], where: str
) -> list[bool]:
    """Carry a mask over the text's tokens to the tokens of the batch, which hold more of them per image.

    Args:
        batch_ids: Tokens of the row in the batch, without padding.
        text_ids: Tokens of the text alone, one token per image mark.
        mask: One truth value per token of the text.
        image_ids: Placeholder ids.
        where: Name of the row for error messages.

    Returns:
        One truth value per token of the batch; never true at a placeholder.

    Raises:
        DataError: A supervised piece of the text is not in the batch.
    """
    batch_ids, text_ids = list(batch_ids), list(text_ids)
    if all(mask):
        return [token not in image_ids for token in batch_ids]
    result = [False] * len(batch_ids)
    pieces = _pieces(text_ids, image_ids)
    cursor = 0
    for number, (start, end) in enumerate(pieces):
        last = number == len(pieces) - 1
        cursor = max(cursor, _after_images(batch_ids, text_ids[:start], image_ids))
        for first, stop in _runs(mask, start, end):
            place = _locate(batch_ids, text_ids, (start, end), (first, stop), cursor, last)
            if place is None:
                raise DataError(
                    f"{where}: the tokens of an answer are not where the processor's text has them; "
                    "the processor rewrites the text of answers, which supervision of answers only does not allow."
                )
            result[place : place + stop - first] = [True] * (stop - first)
            cursor = place + stop - first
    return [value and token not in image_ids for value, token in zip(result, batch_ids, strict=True)]


def _pieces(ids: list[int], image_ids: set[int]) -> list[tuple[int, int]]:
    """Stretches of text between image marks, as (start, end)."""
    marks = [place for place, token in enumerate(ids) if token in image_ids]
    edges = [-1, *marks, len(ids)]
    return [(left + 1, right) for left, right in itertools.pairwise(edges)]


def _after_images(batch_ids: list[int], before: list[int], image_ids: set[int]) -> int:
    """First place in the batch behind as many runs of placeholders as the text has runs of image marks."""
    wanted = len(_runs([token in image_ids for token in before], 0, len(before)))
    found = _runs([token in image_ids for token in batch_ids], 0, len(batch_ids))
    return found[wanted - 1][1] if 0 < wanted <= len(found) else 0


def _runs(mask: Sequence[bool], start: int, end: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for place in range(start, end):
        if mask[place]:
            grown = runs and runs[-1][1] == place
            runs[-1:] = [(runs[-1][0], place + 1)] if grown else [*runs[-1:], (place, place + 1)]
    return runs


def _locate(
    batch_ids: list[int],
    text_ids: list[int],
    piece: tuple[int, int],
    run: tuple[int, int],
    cursor: int,
    last: bool,
) -> int | None:
    """Where a supervised run starts in the batch: the first fit after `cursor`, in the last piece from its end."""
    for context in CONTEXTS:
        before = run[0] - piece[0] if context is None else min(context, run[0] - piece[0])
        after = piece[1] - run[1] if context is None else min(context, piece[1] - run[1])
        needle = text_ids[run[0] - before : run[1] + after]
        if last:
            offset = len(batch_ids) - (piece[1] - run[0])  # the ends of both sequences agree
            begin = offset - before
            if begin >= 0 and batch_ids[begin : begin + len(needle)] == needle and offset >= cursor:
                return offset
        found = _find(batch_ids, needle, max(0, cursor - before))
        while found is not None and found + before < cursor:
            found = _find(batch_ids, needle, found + 1)
        if found is not None:
            return found + before
    return None


def _find(haystack: list[int], needle: list[int], start: int) -> int | None:
    stop = len(haystack) - len(needle) + 1
    for place in range(start, stop):
        if haystack[place] == needle[0] and haystack[place : place + len(needle)] == needle:
            return place
    return None
