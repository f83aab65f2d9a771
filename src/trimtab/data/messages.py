"""One form for every layout of conversations with images, and the rule that says which layout a row has.

====================== ==================================================================================
layout                 columns
====================== ==================================================================================
messages               ``messages`` of ``role``/``content`` (a string or parts), ``images`` or ``image`` (TRL)
prompt_completion      ``prompt`` and ``completion`` (strings or messages), ``images`` or ``image`` (TRL)
llava                  ``conversations`` of ``from``/``value`` with ``<image>``, ``image`` (one or a list)
sharegpt               ``messages`` or ``conversations`` with ``<image>`` in strings, ``images`` (LLaMA-Factory)
openai                 ``messages`` with parts ``{"type": "image_url", "image_url": {"url": ...}}``
====================== ==================================================================================

Other columns are ignored. Nothing is downloaded: an http(s) address is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeGuard

from trimtab.errors import DataError

IMAGE_MARK = "<image>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

Message = dict[str, Any]


class Layout(str, Enum):
    """The layouts of rows that are understood; see the table of the module."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    LLAVA = "llava"
    SHAREGPT = "sharegpt"
    OPENAI = "openai"


def detect_layout(row: Mapping[str, Any], where: str | int | None = None) -> Layout:
    """Say which layout a row has, from its columns and the form of its turns.

    Args:
        row: One row of the user's data; columns that are None count as absent.
        where: Row number or place for the error message.

    Returns:
        The layout.

    Raises:
        DataError: No layout fits; the message lists the columns found and those accepted.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{_place(where)} is a {type(row).__name__}, not a mapping from column to value.")
    if row.get("messages") is not None:
        return _layout_of_messages(row["messages"])
    if row.get("conversations") is not None:
        return Layout.SHAREGPT if row.get("images") is not None else Layout.LLAVA
    if row.get("prompt") is not None and row.get("completion") is not None:
        return Layout.PROMPT_COMPLETION
    raise DataError(
        f"{_place(where)} has no known layout: its columns are {sorted(map(str, row))}. Accepted are 'messages', "
        "'prompt' with 'completion', or 'conversations', each with 'images' or 'image' where images belong to it."
    )


def _layout_of_messages(turns: Any) -> Layout:
    mappings = [turn for turn in turns if isinstance(turn, Mapping)] if _is_list(turns) else []
    contents = [turn.get("content") for turn in mappings]
    parts = [part for content in contents if _is_list(content) for part in content]
    if any(isinstance(part, Mapping) and part.get("type") == "image_url" for part in parts):
        return Layout.OPENAI
    tagged = any(turn.get("from") is not None for turn in mappings)
    if tagged or any(isinstance(content, str) and IMAGE_MARK in content for content in contents):
        return Layout.SHAREGPT
    return Layout.MESSAGES


def to_messages(row: Mapping[str, Any], *, where: str | int | None = None, answered: bool = True) -> dict[str, Any]:
    """Bring one row of any known layout into the form that chat templates take.

    ``<image>`` in a string becomes an image part; line breaks beside it go, because templates write their own.
    Where ``messages`` or ``prompt`` name no image but the row carries some, the images come first in the first
    user turn, as in TRL. An image given inside a part takes its place in the order of the parts.

    Args:
        row: One row; see the table of the module. Images may be anything `trimtab.data.open_image` takes.
        where: Row number or place, for error messages.
        answered: Whether the last turn must be the assistant's.

    Returns:
        ``{"messages": [{"role": ..., "content": [parts]}], "images": [...]}`` with parts ``{"type": "image"}`` and
        ``{"type": "text", "text": ...}``; images are as they came, not opened.

    Raises:
        DataError: Unknown layout, wrong order of roles, no answer, empty content, an address on the web, or image
            marks and images that differ in number (both are named).
    """
    layout = detect_layout(row, where)
    turns = _turns(row, layout, where)
    listed = _listed_images(row, where)
    messages, found = _with_parts(turns, where)
    if listed and not found and layout in (Layout.MESSAGES, Layout.PROMPT_COMPLETION):
        first_user = next((turn for turn in messages if turn["role"] == "user"), messages[0])
        first_user["content"][:0] = [{"type": "image"} for _ in listed]
        found = [None] * len(listed)
    images = _match_images(found, listed, where)
    _check_turns(messages, where, answered)
    return {"messages": messages, "images": images}


def _turns(row: Mapping[str, Any], layout: Layout, where: str | int | None) -> list[tuple[str, Any]]:
    """Every turn as (role, content), with a ``system`` column in front."""
    if layout is Layout.PROMPT_COMPLETION:
        raw = [*_as_turns(row["prompt"], "user"), *_as_turns(row["completion"], "assistant")]
    else:
        raw = row["messages"] if row.get("messages") is not None else row["conversations"]
    if not _is_list(raw) or not len(raw):
        raise DataError(f"{_place(where)} has no turns; a list with at least a question and an answer is needed.")
    turns = [_turn(number, turn, where) for number, turn in enumerate(raw)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return turns


def _as_turns(value: Any, role: str) -> Sequence[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value if _is_list(value) else [value]


def _turn(number: int, turn: Any, where: str | int | None) -> tuple[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{_place(where)}, turn {number}: a {type(turn).__name__} came, a mapping is needed.")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if role not in ROLES:
        raise DataError(f"{_place(where)}, turn {number}: role {role!r} is not one of {', '.join(ROLES)}.")
    return ROLES[role], content


def _with_parts(turns: list[tuple[str, Any]], where: str | int | None) -> tuple[list[Message], list[Any]]:
    """Turn contents into parts; also return, per image part, the image given inside it or None."""
    messages: list[Message] = []
    found: list[Any] = []
    for number, (role, content) in enumerate(turns):
        place = f"{_place(where)}, turn {number} ({role})"
        parts: list[dict[str, str]] = []
        for part in content if _is_list(content) else [content]:
            parts += _parts_of(part, found, place)
        if not parts:
            raise DataError(f"{place}: the content is empty. Fill it in or leave the row out.")
        messages.append({"role": role, "content": parts})
    return messages, found


def _parts_of(part: Any, found: list[Any], place: str) -> list[dict[str, str]]:
    if isinstance(part, str) or part is None:
        return _split_marks(part or "", found)
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text":
        return _split_marks(part.get("text") or "", found)
    if kind in ("image", "image_url"):
        found.append(_inline_image(part, place))
        return [{"type": "image"}]
    raise DataError(f"{place}: a part of type {kind!r} came; 'text', 'image' and 'image_url' are understood.")


def _split_marks(text: str, found: list[Any]) -> list[dict[str, str]]:
    pieces = text.split(IMAGE_MARK)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            found.append(None)
            parts.append({"type": "image"})
            piece = piece.lstrip("\r\n")
        if number < len(pieces) - 1:
            piece = piece.rstrip("\r\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _inline_image(part: Mapping[str, Any], place: str) -> Any:
    image = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None)
    if isinstance(image, Mapping) and "url" in image:
        image = image["url"]
    if image is None and part.get("type") == "image_url":
        raise DataError(f"{place}: an image_url part carries no address.")
    return _refuse_web(image, place)


def _listed_images(row: Mapping[str, Any], where: str | int | None) -> list[Any]:
    listed = row.get("images") if row.get("images") is not None else row.get("image")
    if listed is None:
        return []
    images = list(listed) if _is_list(listed) else [listed]
    return [_refuse_web(image, _place(where)) for image in images]


def _refuse_web(image: Any, place: str) -> Any:
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        raise DataError(
            f"{place}: the image is the web address {image!r}, and nothing is downloaded. "
            "Save the image and give the path of the file."
        )
    return image


def _match_images(found: list[Any], listed: list[Any], where: str | int | None) -> list[Any]:
    open_marks = sum(image is None for image in found)
    if open_marks != len(listed):
        raise DataError(
            f"{_place(where)}: the turns mark {open_marks} image(s) ({IMAGE_MARK} or image parts), but the row brings "
            f"{len(listed)} image(s). Make the two numbers equal."
        )
    rest = iter(listed)
    return [next(rest) if image is None else image for image in found]


def _check_turns(messages: list[Message], where: str | int | None, answered: bool) -> None:
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    first = len(messages) - len(spoken)
    for number, turn in enumerate(spoken):
        wanted = ("user", "assistant")[number % 2]
        if turn["role"] != wanted:
            raise DataError(
                f"{_place(where)}, turn {number + first}: role {turn['role']!r} came where {wanted!r} is due. "
                "An optional system turn comes first, then user and assistant take turns."
            )
    if answered and (not spoken or spoken[-1]["role"] != "assistant"):
        raise DataError(f"{_place(where)}: the last turn is not the assistant's, so there is no answer to learn from.")


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _place(where: str | int | None) -> str:
    return "The row" if where is None else f"Row {where}" if isinstance(where, int) else where
