"""The page in a real browser: what is drawn, what is asked for, what a keyboard and a phone can do."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser.session import running_chromium
from tests.run.small_run import write_model
from tests.view.conftest import HOSTILE, Served, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by the extra 'browser'")
pytestmark = pytest.mark.browser
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
ANSWER = "<img src=x onerror=alert(1)><script>alert(2)</script> **bold** $$x$$\n# head"


@dataclass
class Watched:
    """A page, and all that it did beside what it should."""

    page: Any
    faults: list[str] = field(default_factory=list)

    def panel(self, name: str) -> Any:
        heading = self.page.get_by_role("heading", name=name, exact=True)
        return self.page.locator(".tt-panel").filter(has=heading)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser; it ends with this file, see `running_chromium`."""
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def open_page(chromium: Any, request: pytest.FixtureRequest) -> Any:
    def open_page(served: Served, size: dict[str, int] = DESK, scheme: str = "light", **more: Any) -> Watched:
        context = chromium.new_context(viewport=size, color_scheme=scheme, **more)
        request.addfinalizer(context.close)
        page = context.new_page()
        watched = Watched(page)
        page.on("console", lambda message: note(watched, message))
        page.on("pageerror", lambda error: watched.faults.append(str(error)))
        page.on("dialog", lambda dialog: (watched.faults.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda one: own(one.url, served) or watched.faults.append(one.url))
        page.goto(served.url)
        page.locator(".tt-picture").first.wait_for()
        return watched

    return open_page


def note(watched: Watched, message: Any) -> None:
    # Gradio's page says so at every upload; it is about a stream that its upload does without.
    if message.text != "Method not implemented.":
        watched.faults.append(f"{message.type}: {message.text}")


def own(url: str, served: Served) -> bool:
    return url.startswith((served.url, "data:", f"blob:http://{served.address}"))


def widths(page: Any) -> tuple[int, int]:
    return page.evaluate("document.documentElement.scrollWidth"), page.evaluate("innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_overlays_appear_without_faults(served: Served, open_page: Any, size: dict[str, int], scheme: str) -> None:
    watched = open_page(served, size, scheme)
    for name in ("divprune", "random"):
        pictures = watched.panel(name).locator("img")
        assert pictures.count() == 2
        assert all(picture.get_attribute("alt") for picture in pictures.all())
        assert pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") >= 336
    scrolled, seen = widths(watched.page)
    assert scrolled <= seen
    assert watched.faults == []


def test_quick_clicks_end_at_what_is_chosen(served: Served, open_page: Any) -> None:
    """The answers to many changes at once must not leave an older one standing."""
    watched = open_page(served)
    boxes = watched.page.get_by_role("checkbox").all()
    names = [box.get_attribute("name") for box in boxes]
    draw = random.Random(0)
    for _ in range(25):
        for _ in range(draw.randint(2, 9)):
            boxes[draw.randrange(len(boxes))].click()
            watched.page.wait_for_timeout(draw.choice((0, 0, 30, 60, 90, 120)))
        chosen = {name for name, box in zip(names, boxes, strict=True) if box.is_checked()}
        headings = watched.page.locator(".tt-panel h2")
        sync_api.expect(headings).to_have_count(len(chosen), timeout=10_000)
        for name in chosen:
            watched.panel(name).wait_for(timeout=10_000)
    assert watched.faults == []


def test_a_pruner_is_added_by_keyboard(served: Served, open_page: Any) -> None:
    watched = open_page(served)
    box = watched.page.get_by_role("checkbox", name="grid_pool", exact=True)
    box.focus()
    watched.page.keyboard.press("Space")
    watched.panel("grid_pool").wait_for()
    slider = watched.page.get_by_role("slider")
    slider.focus()
    slider.press("ArrowRight")
    watched.page.get_by_text("63 of 576 tokens kept").first.wait_for()
    assert watched.faults == []


def test_an_image_is_uploaded_under_a_hostile_name(served: Served, open_page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / HOSTILE)
    watched = open_page(served)
    before = watched.panel("divprune").locator("img").first.get_attribute("src")
    watched.page.locator("input[type=file]").set_input_files(tmp_path / HOSTILE)
    for _ in range(100):
        if watched.panel("divprune").locator("img").first.get_attribute("src") != before:
            break
        watched.page.wait_for_timeout(100)
    else:
        pytest.fail("the picture did not change")
    assert watched.faults == []


def test_a_given_image_with_a_hostile_name_is_chosen_by_it(served: Served, open_page: Any) -> None:
    watched = open_page(served)
    assert watched.page.get_by_role("radio", name=HOSTILE).count() == 1
    watched.page.get_by_role("radio", name="plain.jpg").check()
    watched.panel("random").wait_for()
    assert watched.faults == []


def test_a_script_in_a_picture_is_refused_in_words(served: Served, open_page: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    watched = open_page(served)
    watched.page.locator("input[type=file]").set_input_files(tmp_path / "a.png")
    watched.page.get_by_text("no image that the view takes").first.wait_for()
    # The browser itself notes a refused request.
    assert all("415" in fault for fault in watched.faults)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A view with a model that answers HTML."""
    folder = tmp_path_factory.mktemp("talking")
    model = write_model(folder / "model")
    with serving(folder, "--model", str(model), WATCHED_ANSWER=ANSWER) as one:
        yield one


def test_a_hostile_answer_is_text(talking: Served, open_page: Any) -> None:
    watched = open_page(talking, PHONE)
    watched.page.get_by_role("textbox", name="Question").fill("which digit is red ?")
    watched.page.get_by_role("button", name="Ask the model").click()
    cells = watched.page.locator(".tt-answer")
    cells.first.wait_for()
    assert [cell.inner_text() for cell in cells.all()] == [ANSWER] * 3
    assert cells.locator(":not(br)").count() == 0
    scrolled, seen = widths(watched.page)
    assert scrolled <= seen
    assert watched.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_rules_of_accessibility_hold(talking: Served, open_page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    # The tool is a script of its own, which the page's policy would not let run.
    watched = open_page(talking, DESK, scheme, bypass_csp=True)
    watched.page.get_by_role("textbox", name="Question").fill("which digit is red ?")
    watched.page.get_by_role("button", name="Ask the model").click()
    watched.page.locator(".tt-answer").first.wait_for()
    found = axe.Axe().run(watched.page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
