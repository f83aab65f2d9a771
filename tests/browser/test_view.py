"""The live view in a browser: what its controls do, and what other pages, files and texts cannot do."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from docs.chromium import REBOUND
from PIL import Image

from tests.browser.commands import serve_view
from tests.browser.harness import (
    LOOKS,
    Look,
    Visit,
    check_accessible,
    check_keyboard,
    check_no_sideways_scroll,
    check_nothing_was_run,
    pixels,
)
from tests.browser.run_records import HOSTILE
from tests.run.small_run import TOKENS, write_model

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="the extra `view` is not installed")

Open = Callable[..., Visit]
OF_GRADIO = ("Method not implemented", "upload_progress")
"""What Gradio's own script complains of while it uploads: it also asks for progress that is over by then."""
PATCHES = 576
"""Tokens of an image where no model is given."""


def png(colour: str = "teal") -> bytes:
    """Return a picture with a bright corner."""
    stream = io.BytesIO()
    picture = Image.new("RGB", (96, 96), colour)
    picture.paste("yellow", (60, 0, 96, 30))
    picture.save(stream, format="PNG")
    return stream.getvalue()


def upload(seen: Visit, name: str, data: bytes) -> None:
    """Give the page a file, in place of the image that it has."""
    for part in OF_GRADIO:
        seen.tolerate(part)
    seen.page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def kept(page: Any, label: str, count: int, tokens: int = PATCHES) -> None:
    """Wait until the page says how many tokens a pruner keeps."""
    page.get_by_role("status").filter(has_text=re.compile(rf"\b{label}: {count} of {tokens}\b")).wait_for()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The view without a model."""
    with serve_view(tmp_path_factory.mktemp("plain")) as address:
        yield address


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The view of a model every word of which wants to be more than text, with two images given."""
    folder = tmp_path_factory.mktemp("answering")
    model = write_model(folder / "model")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        word if word in special else f"{word}{HOSTILE[0]}": number for word, number in vocabulary.items()
    }
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    path = model / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["suppress_tokens"] = [token["id"] for token in tokenizer["added_tokens"]]  # so that it speaks in words
    path.write_text(json.dumps(settings), encoding="utf-8")
    images = [folder / f"{HOSTILE[2].replace('/', ' ')}.png", folder / "second.png"]
    for image in images:
        image.write_bytes(png())
    with serve_view(folder, "--model", "model", *[word for image in images for word in ("--image", image)]) as address:
        yield address


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_the_page_fits_its_window_and_is_sound(visit: Open, plain: str, look: Look) -> None:
    page = visit(plain, look).page
    kept(page, "divprune", 57)
    check_no_sideways_scroll(page)
    check_accessible(page)


def test_the_tab_key_reaches_the_controls_and_shows_where_it_is(visit: Open, plain: str) -> None:
    page = visit(plain).page
    kept(page, "divprune", 57)
    stops = check_keyboard(page)
    kinds = {stop["kind"] for stop in stops}
    assert {"checkbox", "range", "radio"} <= kinds, stops


def test_a_pruner_more_is_shown_beside_the_others(visit: Open, plain: str) -> None:
    page = visit(plain).page
    kept(page, "divprune", 57)
    assert page.get_by_role("heading", name="dpp", exact=True).count() == 0
    page.get_by_role("checkbox", name="dpp", exact=True).check()
    kept(page, "dpp", 57)
    boxes = [page.get_by_role("heading", name=name, exact=True).bounding_box() for name in ("divprune", "dpp")]
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 2, "side by side"
    assert abs(boxes[0]["x"] - boxes[1]["x"]) > 100
    room = page.locator(".tt-panels").bounding_box()
    assert room["x"] + room["width"] - max(box["x"] + box["width"] for box in boxes) < 2, "no empty column is left over"


def test_the_keep_ratio_changes_what_is_kept(visit: Open, plain: str) -> None:
    page = visit(plain).page
    kept(page, "divprune", 57)
    before = page.get_by_role("img", name="Kept by divprune").get_attribute("src")
    page.get_by_role("spinbutton").fill("0.5")
    page.keyboard.press("Enter")
    kept(page, "divprune", 288)
    assert page.get_by_role("img", name="Kept by divprune").get_attribute("src") != before


def test_kept_cells_and_heat_map_can_be_seen(visit: Open, plain: str) -> None:
    page = visit(plain).page
    kept(page, "divprune", 57)
    for name in ("Kept by divprune", "Heat map of the distance to the nearest kept token for random"):
        picture = page.get_by_role("img", name=name)
        picture.scroll_into_view_if_needed()
        box = picture.bounding_box()
        assert box["width"] > 150
        seen = pixels(page, clip=box).reshape(-1, 3).astype(int)
        assert np.ptp(seen.sum(axis=1)) > 200, name
        assert len(np.unique(seen, axis=0)) > 8, name


def test_a_heat_map_that_is_not_there_is_said_in_words(visit: Open, plain: str) -> None:
    page = visit(plain).page
    kept(page, "divprune", 57)
    page.get_by_role("radio", name="Class-token attention").check()
    page.get_by_text("There is no class-token attention here").first.wait_for()
    assert page.get_by_role("img", name="Heat map").count() == 0


@pytest.mark.parametrize("name", [*HOSTILE, "x" * 200 + ".png"], ids=[*map(str, range(len(HOSTILE))), "long"])
def test_a_hostile_file_name_is_a_text(visit: Open, plain: str, name: str) -> None:
    seen = visit(plain)
    page = seen.page
    kept(page, "divprune", 57)
    before = page.get_by_role("img", name="Kept by divprune").get_attribute("src")
    upload(seen, name, png())
    page.wait_for_function(
        "before => { const shown = document.querySelector('img.tt-picture'); return shown && shown.src !== before; }",
        arg=before,
    )
    check_nothing_was_run(page)
    check_no_sideways_scroll(page)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>window.hostile = 1</script></svg>"),
        ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' onload='window.hostile = 1'/>"),
        ("page.png", b"<!doctype html><script>window.hostile = 1</script>"),
        (HOSTILE[0] + ".png", b"no image"),
        ("cut.png", png()[:60]),
    ],
    ids=["svg", "svg-as-png", "html-as-png", "hostile-name", "cut-off"],
)
def test_what_is_no_image_is_refused_and_the_page_goes_on(visit: Open, plain: str, name: str, data: bytes) -> None:
    seen = visit(plain)
    kept(seen.page, "divprune", 57)
    with seen.page.expect_response(lambda reply: "upload" in reply.url and reply.request.method == "POST") as reply:
        upload(seen, name, data)
    assert reply.value.status == 415
    seen.expect("status 415")
    seen.expect("console error")
    seen.page.get_by_text("is no image that the view takes").or_(seen.page.get_by_text("cannot be shown")).wait_for()
    check_nothing_was_run(seen.page)
    upload(seen, "sound.png", png())
    kept(seen.page, "divprune", 57)


def test_an_endless_upload_is_refused_and_the_page_goes_on(visit: Open, plain: str, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(200 * 2**20)
    seen = visit(plain)
    kept(seen.page, "divprune", 57)
    refused: list[int] = []
    seen.page.on("response", lambda reply: refused.append(reply.status) if "upload" in reply.url else None)
    seen.page.locator("input[type=file]").first.set_input_files(large)
    seen.page.wait_for_timeout(3000)
    assert 200 not in refused
    seen.page.reload()
    kept(seen.page, "divprune", 57)
    # How the browser tells of the refused upload, and when, is its own affair; nothing else may be wrong.
    for part in (*OF_GRADIO, "gradio_api/upload", "Failed to load resource"):
        seen.tolerate(part)
    if any(status >= 400 for status in refused):  # Gradio's script then puts the whole reply on the console
        seen.tolerate("console error: Response")


def test_answers_are_shown_as_texts(visit: Open, answering: str) -> None:
    page = visit(answering).page
    kept(page, "divprune", 6, TOKENS)
    check_nothing_was_run(page)
    page.get_by_role("textbox", name="Question").fill(HOSTILE[1])
    page.get_by_role("button", name="Ask the model").click()
    table = page.get_by_role("region", name="Answers").get_by_role("table")
    table.wait_for()
    assert table.get_by_role("row").count() == 4, "the head, all tokens, and two pruners"
    assert HOSTILE[0] in table.inner_text(), "the model's words are shown as they are"
    check_nothing_was_run(page)
    check_no_sideways_scroll(page)
    check_accessible(page)


def test_the_images_given_at_the_start_can_be_chosen(visit: Open, answering: str) -> None:
    page = visit(answering).page
    kept(page, "divprune", 6, TOKENS)
    names = [f"{HOSTILE[2].replace('/', ' ')}.png", "second.png"]
    radios = page.locator("fieldset", has_text="Images given at the start").get_by_role("radio")
    assert [radio.evaluate("e => e.labels[0].innerText.trim()") for radio in radios.all()] == names
    radios.nth(1).check()
    kept(page, "divprune", 6, TOKENS)
    check_nothing_was_run(page)


def test_a_wrong_token_and_another_name_are_refused(visit: Open, plain: str) -> None:
    wrong = visit(re.sub(r"/[^/]+/$", f"/{'x' * 43}/", plain))
    wrong.expect("status 404")
    wrong.expect("console error")
    rebound = visit(plain.replace("127.0.0.1", REBOUND))
    rebound.expect("status 421")
    rebound.expect("console error")
    for seen in (wrong, rebound):
        assert "Which visual tokens stay" not in seen.page.content()


def test_another_page_can_neither_frame_nor_ask_it(visit: Open, plain: str, tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text(
        f"<!doctype html><html lang=en><title>Other</title><iframe id=frame src='{plain}'></iframe></html>"
    )
    seen = visit(tmp_path / "other.html")
    for part in ("outside", "console error", "failed"):
        seen.expect(part)
    asked = seen.page.evaluate(
        """address => fetch(address + 'gradio_api/run/predict', {method: 'POST', body: '{}'})
            .then(reply => reply.status, () => 'refused')""",
        plain,
    )
    assert asked == "refused"
    assert all("Which visual tokens" not in frame.content() for frame in seen.page.frames if frame.url != "about:blank")
