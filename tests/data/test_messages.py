"""The normaliser: every layout gives one form, and every fault is named."""

import pytest

from trimtab.data.messages import Layout, detect_layout, to_messages
from trimtab.errors import DataError

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "what?"}
TWO = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "cat"}]
MARKED = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "cat"}]
PARTS = [{"role": "user", "content": [IMAGE, TEXT]}, {"role": "assistant", "content": "cat"}]
TAGGED = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "cat"}]
OPENAI = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT]},
    {"role": "assistant", "content": [{"type": "text", "text": "cat"}]},
]
WANTED = {
    "messages": [
        {"role": "user", "content": [IMAGE, TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "cat"}]},
    ],
    "images": ["a.png"],
}
LAYOUTS = [
    (Layout.MESSAGES, {"messages": PARTS, "images": ["a.png"]}),
    (Layout.MESSAGES, {"messages": PARTS, "image": "a.png"}),
    (Layout.MESSAGES, {"messages": TWO, "images": ["a.png"]}),
    (Layout.PROMPT_COMPLETION, {"prompt": PARTS[:1], "completion": PARTS[1:], "images": ["a.png"]}),
    (Layout.PROMPT_COMPLETION, {"prompt": "what?", "completion": "cat", "image": "a.png"}),
    (Layout.LLAVA, {"conversations": TAGGED, "image": "a.png", "id": 7}),
    (Layout.LLAVA, {"conversations": TAGGED, "image": ["a.png"]}),
    (Layout.SHAREGPT, {"messages": MARKED, "images": ["a.png"]}),
    (Layout.SHAREGPT, {"conversations": TAGGED, "images": ["a.png"]}),
    (Layout.OPENAI, {"messages": OPENAI}),
]


@pytest.mark.parametrize(("layout", "row"), LAYOUTS)
def test_every_layout_gives_one_form(layout, row):
    assert detect_layout(row) is layout
    assert to_messages(row) == WANTED
    assert to_messages(to_messages(row)) == WANTED


def test_none_columns_and_arrow_parts_count_as_absent():
    part = {"type": "text", "text": "what?", "image_url": None}
    row = {"messages": [{"role": "user", "content": [part]}, TWO[1]], "images": None, "conversations": None}
    assert to_messages(row)["images"] == []


def test_images_keep_the_order_of_their_marks():
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image", "image": "inside.png"}, {"type": "image"}]},
        TWO[1],
    ]
    assert to_messages({"messages": turns, "images": ["1.png", "2.png"]})["images"] == ["1.png", "inside.png", "2.png"]


def test_marks_split_text_where_they_stand():
    row = {"conversations": [{"from": "human", "value": "first <image> then\n<image>"}, TAGGED[1]], "image": ["a", "b"]}
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    assert to_messages(row)["messages"][0]["content"] == [text("first "), IMAGE, text(" then"), IMAGE]


def test_system_turns_and_columns_are_kept():
    system = {"role": "system", "content": "be brief"}
    wanted = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    assert to_messages({"messages": [system, *TWO]})["messages"][0] == wanted
    assert to_messages({"messages": TWO, "system": "be brief"})["messages"][0] == wanted


def test_prompts_without_an_answer_pass_where_allowed():
    assert len(to_messages({"messages": TWO[:1]}, answered=False)["messages"]) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 1}, r"Row 4 has no known layout: its columns are \['label', 'text'\].*'conversations'"),
        ("text", "Row 4 is a str"),
        ({"messages": []}, "Row 4 has no turns"),
        ({"messages": "hello"}, "Row 4 has no turns"),
        ({"messages": ["hello"]}, "turn 0: a str came"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"role 'robot' is not one of system, user"),
        ({"messages": TWO[:1]}, "the last turn is not the assistant's"),
        ({"messages": TWO[1:]}, "turn 0: role 'assistant' came where 'user' is due"),
        ({"messages": [TWO[0], TWO[0], TWO[1]]}, "turn 1: role 'user' came where 'assistant' is due"),
        ({"messages": [*TWO, {"role": "system", "content": "x"}]}, "turn 2: role 'system' came"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the last turn is not the assistant's"),
        ({"messages": [TWO[0], {"role": "assistant", "content": "  "}]}, r"turn 1 \(assistant\): the content is empty"),
        ({"messages": [{"role": "user", "content": None}, TWO[1]]}, r"turn 0 \(user\): the content is empty"),
        ({"conversations": TAGGED, "image": ["a", "b"]}, r"mark 1 image\(s\).*brings 2 image"),
        ({"conversations": TAGGED}, r"mark 1 image\(s\).*brings 0 image"),
        ({"conversations": [{"from": "human", "value": "x"}, TAGGED[1]], "image": "a"}, r"mark 0 .*brings 1 image"),
        ({"messages": PARTS, "images": ["a", "b", "c"]}, r"mark 1 image\(s\).*brings 3 image"),
        ({"messages": PARTS, "images": ["http://x.org/a.png"]}, "nothing is downloaded.*Save the image"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, TWO[1]]}, "a part of type 'video' came"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TWO[1]]}, "carries no address"),
    ],
)
def test_faults_are_named_with_their_row(row, message):
    with pytest.raises(DataError, match=message) as caught:
        to_messages(row, where=4)
    assert str(caught.value).startswith("Row 4")


def test_web_addresses_in_parts_are_refused():
    part = {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}
    with pytest.raises(DataError, match=r"web address 'https://x\.org/a\.png'"):
        to_messages({"messages": [{"role": "user", "content": [part]}, TWO[1]]})
