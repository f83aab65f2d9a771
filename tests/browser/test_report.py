"""The report in a browser: verdict first, charts and overlays that can be seen, and texts that stay texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser.commands import run
from tests.browser.harness import (
    DESKTOP,
    LOOKS,
    PHONE,
    Look,
    Visit,
    check_accessible,
    check_keyboard,
    check_no_sideways_scroll,
    check_nothing_was_run,
    pixels,
)
from tests.browser.run_records import GRID, HOSTILE, KEPT, LONG, write_arms, write_hostile, write_running
from tests.quickstart.small import small_task
from trimtab.quickstart import tasks
from trimtab.quickstart.run import quickstart
from trimtab.records import read_record

pytestmark = pytest.mark.browser
RELOADS = {"meta-refresh": "a page of a running training is for watching; without scripts it has no other way"}
Open = Callable[..., Visit]
Pages = Callable[[str], Path]


def report_of(*folders: Path) -> Path:
    """Make the page of runs as a user does."""
    run("report", *folders, "--to", folders[0] / "report.html")
    return folders[0] / "report.html"


@pytest.fixture(scope="module")
def quickstart_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that quickstart itself leaves, after a few steps."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "scenes_task", small_task)
        quickstart(out=out, seed=0, steps=6, threads=1)
    return out / "report.html"


@pytest.fixture(scope="module")
def pages(quickstart_page: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a page by its name, once."""
    root = tmp_path_factory.mktemp("pages")
    makers: dict[str, Callable[[], Path]] = {
        "quickstart": lambda: quickstart_page,
        "training": lambda: report_of(trained),
        "running": lambda: report_of(write_running(root / "running", read_record(trained / "records/train.json"), 3)),
        "several": lambda: report_of(
            write_arms(root / "arms"), write_arms(root / "other", seed=1, setting="changed"), trained
        ),
        "hostile": lambda: report_of(write_hostile(root / "hostile")),
    }
    return functools.cache(lambda name: makers[name]())


EVERY = [(name, look) for name in ("quickstart", "several") for look in LOOKS]
EVERY += [(name, look) for name in ("training", "running", "hostile") for look in (DESKTOP, Look("phone", "dark"))]


@pytest.mark.parametrize(("name", "look"), EVERY, ids=lambda one: str(one))
def test_every_page_fits_its_window_and_is_sound(visit: Open, pages: Pages, name: str, look: Look) -> None:
    page = visit(pages(name), look).page
    check_no_sideways_scroll(page)
    for summary in page.locator("summary").all():
        if summary.is_visible() and not summary.evaluate("e => e.parentElement.open"):
            summary.click()
    check_no_sideways_scroll(page)
    check_accessible(page, RELOADS if name == "running" else None)


@pytest.mark.parametrize("look", [DESKTOP, Look("phone", "dark")], ids=str)
@pytest.mark.parametrize("name", ["quickstart", "several"])
def test_the_tab_key_reaches_everything_and_shows_where_it_is(visit: Open, pages: Pages, name: str, look: Look) -> None:
    page = visit(pages(name), look).page
    stops = check_keyboard(page)
    assert sum(stop["tag"] == "summary" for stop in stops) == page.locator("summary:visible").count() > 0


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_the_verdict_is_the_first_thing_on_the_page(visit: Open, quickstart_page: Path, look: Look) -> None:
    page = visit(quickstart_page, look).page
    heading = page.get_by_role("heading", level=1)
    assert heading.count() == 1
    box = heading.bounding_box()
    assert box["y"] + box["height"] < 500, "it stands in the first window, on a phone too"
    records = {name: read_record(quickstart_page.parent / "records" / f"{name}.json") for name in ("full", "dualspeed")}
    full, dual = (records[name]["results"]["seconds_train"] for name in ("full", "dualspeed"))
    top = page.evaluate("() => document.body.innerText").split("Results on")[0]
    assert f"{dual / full:.2f}" in top or f"{full / dual:.2f}" in top
    first = page.locator("h1, h2, h3, svg, img, table").first
    assert first.evaluate("e => e.tagName") == "H1"


@pytest.mark.parametrize("look", [DESKTOP, PHONE], ids=str)
def test_the_charts_can_be_seen_and_read(visit: Open, quickstart_page: Path, look: Look) -> None:
    page = visit(quickstart_page, look).page
    charts = page.evaluate(
        """() => [...document.querySelectorAll('svg')].filter(s => s.querySelector('text')).map(s => ({
            width: s.getBoundingClientRect().width, height: s.getBoundingClientRect().height,
            label: s.getAttribute('aria-label') || s.getAttribute('aria-labelledby'),
            letters: Math.min(...[...s.querySelectorAll('text')].filter(t => t.textContent.trim()).map(
                t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a || 99))}))
           .filter(c => c.width > 0)"""
    )
    assert len(charts) >= 3
    for chart in charts:
        assert chart["width"] >= 250
        assert chart["height"] >= 60
        assert chart["label"]
        assert chart["letters"] >= 9, "letters of a chart in pixels"


def test_details_open_by_mouse_and_by_key(visit: Open, quickstart_page: Path) -> None:
    page = visit(quickstart_page).page
    summaries = page.locator("details:not([open]) > summary")
    assert summaries.count() >= 1
    summary = page.locator("details > summary").first
    details = summary.locator("xpath=..")
    before = details.evaluate("e => e.open")
    summary.click()
    assert details.evaluate("e => e.open") is not before
    summary.press("Enter")
    assert details.evaluate("e => e.open") is before
    summary.press("Space")
    assert details.evaluate("e => e.open") is not before


def cells_of(page: Any, picture: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return how bright the middle of each cell of a picture of `GRID` is, from 0 to 1."""
    picture.scroll_into_view_if_needed()
    seen = pixels(page, clip=picture.bounding_box()).mean(axis=-1) / 255
    rows, columns = (
        np.round((np.arange(count) + 0.5) * side / count).astype(int)
        for count, side in zip(GRID, seen.shape, strict=True)
    )
    return seen[np.ix_(rows, columns)].reshape(-1)


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_overlays_show_what_fast_and_slow_steps_see(visit: Open, pages: Pages, look: Look) -> None:
    page = visit(pages("several"), look).page
    picture = page.locator("figure", has_text="What is shown?").first.locator("img")
    fast, slow = (page.get_by_role("radio", name=re.compile(mode, re.I)).first for mode in ("fast", "slow"))
    assert fast.is_checked()
    bright = cells_of(page, picture)
    dropped = [cell for cell in range(len(bright)) if cell not in KEPT]
    assert bright[list(KEPT)].min() > 0.95, "kept cells are as they were: white"
    assert bright[dropped].max() < 0.75, "dropped cells are veiled"
    slow.check(force=True)
    assert cells_of(page, picture).min() > 0.95, "slow steps see all"
    fast.focus()
    page.keyboard.press("ArrowRight")
    assert slow.is_checked()
    page.keyboard.press("ArrowLeft")
    assert fast.is_checked()
    assert cells_of(page, picture)[dropped].max() < 0.75, "and back, by keyboard"


def test_a_picture_of_several_parts_shows_the_kept_cells_of_each(visit: Open, pages: Pages) -> None:
    page = visit(pages("several")).page
    picture = page.locator("figure", has_text="What is shown?").nth(1).locator("img")
    box = picture.bounding_box()
    assert box["width"] > 1.8 * box["height"]
    picture.scroll_into_view_if_needed()
    seen = pixels(page, clip=picture.bounding_box()).mean(axis=-1) / 255
    for half in (seen[:, : seen.shape[1] // 2], seen[:, seen.shape[1] // 2 :]):
        middle = half[half.shape[0] // 8 :: half.shape[0] // 4, half.shape[1] // 8 :: half.shape[1] // 4][:4, :4]
        assert {int(cell) for cell in np.flatnonzero(middle.reshape(-1) > 0.95)} == set(KEPT)


def test_several_runs_stand_beside_each_other(visit: Open, pages: Pages) -> None:
    text = visit(pages("several")).page.evaluate("() => document.body.innerText")
    for name in ("arms", "other", "out"):
        assert re.search(rf"\b{name}\b", text), name
    for value in ("plain", "changed"):
        assert value in text, "settings that differ are shown with their values"


def test_a_running_page_loads_itself_again_and_a_finished_one_does_not(visit: Open, pages: Pages) -> None:
    running, finished = visit(pages("running")).page, visit(pages("training")).page
    seconds = running.locator("meta[http-equiv=refresh i]").get_attribute("content")
    assert 5 <= int(seconds) <= 60
    assert re.search(r"3\s*(of|/)\s*6", running.evaluate("() => document.body.innerText"))
    assert finished.locator("meta[http-equiv=refresh i]").count() == 0


@pytest.mark.slow
def test_a_running_page_becomes_the_finished_one(visit: Open, pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(pages("running").read_bytes())
    reload = visit(path).page.locator("meta[http-equiv=refresh i]")
    assert reload.count() == 1
    path.write_bytes(pages("training").read_bytes())
    reload.wait_for(state="detached", timeout=70_000)


def test_the_page_says_the_same_without_scripts(visit: Open, quickstart_page: Path) -> None:
    texts = [
        visit(quickstart_page, java_script_enabled=enabled).page.locator("body").inner_text()
        for enabled in (True, False)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 500


def test_hostile_texts_are_texts(visit: Open, pages: Pages) -> None:
    page = visit(pages("hostile")).page
    for element in page.locator("summary").all():
        element.evaluate("e => e.parentElement.open = true")
    page.evaluate("() => document.querySelectorAll('*').forEach(e => e.dispatchEvent(new MouseEvent('mouseover')))")
    check_nothing_was_run(page)
    assert page.locator("img:not([src^='data:image/'])").count() == 0
    assert page.evaluate("() => document.querySelectorAll('a[href]:not([href^=\"#\"])').length") == 0
    flat = re.sub(r"\s+", " ", page.evaluate("() => document.documentElement.textContent"))
    turned = "\N{RIGHT-TO-LEFT OVERRIDE}"
    assert turned not in flat, "it would turn the words behind it round"
    for text in HOSTILE:
        assert re.sub(r"\s+", " ", text.replace(turned, "")) in flat.replace("\N{REPLACEMENT CHARACTER}", "")


def test_an_endless_word_does_not_widen_the_page(visit: Open, pages: Pages) -> None:
    page = visit(pages("hostile"), PHONE).page
    assert LONG[:40] in page.evaluate("() => document.documentElement.textContent")
    check_no_sideways_scroll(page)


def test_the_page_prints_in_the_colours_of_paper(visit: Open, quickstart_page: Path) -> None:
    seen = visit(quickstart_page, Look("desktop", "dark"))
    seen.page.emulate_media(media="print", color_scheme="light")
    check_no_sideways_scroll(seen.page)
    check_accessible(seen.page)
    assert np.median(pixels(seen.page)) > 240, "dark ink on white paper"
    assert seen.page.pdf(format="A4").startswith(b"%PDF-")
