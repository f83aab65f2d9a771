"""The documentation in a browser, opened from the disk: search, ways around, colours, a phone's width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.harness import (
    DESKTOP,
    LOOKS,
    PHONE,
    Look,
    Visit,
    check_accessible,
    check_keyboard,
    check_no_sideways_scroll,
    pixels,
)
from tests.documents.site import built_site

pytestmark = pytest.mark.browser
Open = Callable[..., Visit]
ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "docs").rglob("*.md"))
DENSE = ["docs/index", "docs/methods/dualspeed", "docs/reference/training", "docs/results/speed"]
"""Pages of every make: the first one, prose, signatures, tables."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, one for all test processes."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    return built_site(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_a_phone(visit: Open, site: Path, name: str) -> None:
    page = visit(site / f"{name}.html", PHONE).page
    check_no_sideways_scroll(page)
    assert page.get_by_role("heading", level=1).count() == 1


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_pages_are_sound(visit: Open, site: Path, name: str, look: Look) -> None:
    page = visit(site / f"{name}.html", look).page
    check_no_sideways_scroll(page)
    check_accessible(page)


def test_the_first_page_leads_on_by_keyboard(visit: Open, site: Path) -> None:
    stops = check_keyboard(visit(site / "docs/index.html").page)
    assert len(stops) > 10


@pytest.mark.parametrize("look", [DESKTOP, Look("desktop", "dark")], ids=str)
def test_the_page_has_the_colours_that_the_reader_asked_for(visit: Open, site: Path, look: Look) -> None:
    corner = pixels(visit(site / "docs/index.html", look).page)[-40:, -40:]
    assert (corner.mean() > 200) == (look.colours == "light")


def test_search_finds_words_without_a_network(visit: Open, site: Path) -> None:
    page = visit(site / "docs/index.html").page
    page.get_by_role("textbox", name="Search").press_sequentially("isolator")
    page.keyboard.press("Enter")
    results = page.locator("#search-results ul.search li a")
    # They come one after the other.
    page.locator("#search-results ul.search li a[href*='methods/dualspeed']").first.wait_for()
    assert results.count() >= 2
    results.first.click()
    page.get_by_role("heading", level=1).wait_for()
    assert "isolator" in page.locator("article").inner_text().lower()


def test_search_says_when_it_finds_nothing(visit: Open, site: Path) -> None:
    page = visit(site / "search.html").page
    page.get_by_role("textbox", name="Search").last.fill("xylophonequartz")
    page.keyboard.press("Enter")
    page.get_by_text("did not match any documents").wait_for()


def test_the_navigation_leads_from_page_to_page(visit: Open, site: Path) -> None:
    page = visit(site / "docs/index.html").page
    for words in ("Guides", "Methods", "Results", "Reference"):
        page.locator(".sidebar-tree").get_by_role("link", name=words, exact=True).click()
        assert page.get_by_role("heading", level=1).inner_text().startswith(words)


def test_the_navigation_opens_on_a_phone(visit: Open, site: Path) -> None:
    page = visit(site / "docs/index.html", PHONE).page
    link = page.locator(".sidebar-tree").get_by_role("link", name="Guides", exact=True)
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    page.locator("label[for=__navigation]:visible").first.click()
    link.click()
    assert page.get_by_role("heading", level=1).inner_text().startswith("Guides")
