"""The harness finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.harness import (
    DESKTOP,
    PHONE,
    Visit,
    check_accessible,
    check_keyboard,
    check_no_sideways_scroll,
    check_nothing_was_run,
)

pytestmark = pytest.mark.browser
SOUND = "<h1>Title</h1><p>Words.</p><button>Press</button> <a href='#end'>end</a><p id='end'>End.</p>"


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[[str], Path]:
    def write(body: str) -> Path:
        path = tmp_path / "page.html"
        head = "<meta charset='utf-8'><title>A page</title><link rel='icon' href='data:,'>"
        path.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body><main>{body}</main></body></html>")
        return path

    return write


def test_a_sound_page_passes(visit: Callable[..., Visit], page_of: Callable[[str], Path]) -> None:
    page = visit(page_of(SOUND), PHONE).page
    check_no_sideways_scroll(page)
    check_accessible(page)
    check_nothing_was_run(page)
    assert [stop["name"] for stop in check_keyboard(page)] == ["Press", "end"]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<script>console.error('broken')</script>", "console error: broken"),
        ("<script>console.warn('old')</script>", "console warning: old"),
        ("<script>throw new Error('stop')</script>", "script error: stop"),
        ("<script>alert('hello')</script>", "dialog alert: hello"),
        ("<img alt='' src='http://example.invalid/a.png'>", "outside: http://example.invalid/a.png"),
        ("<style>@import url(https://example.invalid/a.css)</style>", "outside: https://example.invalid/a.css"),
        ("<img alt='' src='none.png'>", "failed: file:"),
        ("<script>new WebSocket('ws://example.invalid/live')</script>", "outside: ws://example.invalid/live"),
    ],
)
def test_complaints_are_heard(chromium: Any, page_of: Callable[[str], Path], body: str, complaint: str) -> None:
    seen = Visit(chromium, page_of(SOUND + body), DESKTOP)
    seen.page.wait_for_timeout(200)
    assert any(one.startswith(complaint) for one in seen.close())


def test_an_expected_complaint_must_come(chromium: Any, page_of: Callable[[str], Path]) -> None:
    seen = Visit(chromium, page_of(SOUND + "<script>console.error('broken')</script>"), DESKTOP)
    seen.expect("broken")
    seen.expect("another")
    assert seen.close() == ["expected but not heard: another"]


@pytest.mark.parametrize(
    ("check", "body", "told"),
    [
        (check_no_sideways_scroll, "<div class='wide' style='width: 500px'>wide</div>", r"DIV\.wide"),
        (check_accessible, "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>", "image-alt"),
        (check_accessible, "<p style='color: #999; background: #aaa'>pale</p>", "color-contrast"),
        (check_keyboard, "<button style='outline: none'>hidden</button>", "hidden"),
        (check_nothing_was_run, "<b data-hostile>bold</b>", "data-hostile"),
        (check_nothing_was_run, "<b onclick='x()'>bold</b>", "onclick"),
    ],
)
def test_faults_are_found(
    visit: Callable[..., Visit],
    page_of: Callable[[str], Path],
    check: Callable[[Any], Any],
    body: str,
    told: str,
) -> None:
    with pytest.raises(AssertionError, match=told):
        check(visit(page_of(SOUND + body), PHONE).page)


def test_a_wide_table_in_its_own_scroll_box_is_sound(
    visit: Callable[..., Visit], page_of: Callable[[str], Path]
) -> None:
    body = "<div style='overflow-x: auto' tabindex='0'><div style='width: 900px'>wide</div></div>"
    check_no_sideways_scroll(visit(page_of(SOUND + body), PHONE).page)
