"""A page in a real browser, what it said and asked for, and what every page of the house must hold."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

SIZES = {"desktop": (1280, 900), "phone": (360, 740)}
PAGE_ONLY = {"file", "data", "blob", "about"}
"""Schemes of addresses that need no host."""


@dataclass(frozen=True)
class Look:
    """How a page is looked at: the size of the window and the colours that the reader asks for."""

    size: str = "desktop"
    colours: str = "light"

    def __str__(self) -> str:
        return f"{self.size}-{self.colours}"


LOOKS = [Look(size, colours) for size in SIZES for colours in ("light", "dark")]
DESKTOP, PHONE = Look(), Look("phone")


class Visit:
    """One page in a context of its own, with everything it complained of.

    Complaints are warnings and errors of the console, errors of scripts, dialogs, answers with an error status and
    requests to any other place than the one that was opened.
    """

    def __init__(self, browser: Any, address: str | Path, look: Look, **options: Any) -> None:
        self.address = address.resolve().as_uri() if isinstance(address, Path) else address
        self.complaints: list[str] = []
        self.expected: list[str] = []
        self.tolerated: list[str] = []
        width, height = SIZES[look.size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=look.colours, reduced_motion="reduce", **options
        )
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self._listen()
        self.page.goto(self.address)

    def _listen(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(f"script error: {error}"))
        self.page.on("dialog", self._asked)
        self.page.on("response", self._answered)
        self.page.on("requestfailed", self._failed)
        self.context.on("request", lambda request: self._requested(request.url))
        self.page.on("websocket", lambda socket: self._requested(socket.url))

    def _heard(self, message: Any) -> None:
        if message.type in {"warning", "error", "assert"}:
            self.complaints.append(f"console {message.type}: {message.text}")

    def _asked(self, dialog: Any) -> None:
        self.complaints.append(f"dialog {dialog.type}: {dialog.message}")
        dialog.dismiss()

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.complaints.append(f"status {response.status}: {response.url}")

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # that is what the page itself gave up, as it does on leaving
            self.complaints.append(f"failed: {request.url} {request.failure}")

    def _requested(self, address: str) -> None:
        asked, own = urlsplit(address), urlsplit(self.address)
        if asked.scheme in PAGE_ONLY - {"file"} or (asked.scheme, asked.netloc) == (own.scheme, own.netloc):
            return
        self.complaints.append(f"outside: {address}")

    def expect(self, part: str) -> None:
        """Say that a complaint that contains this is what the test is about; without one the test fails."""
        self.expected.append(part)

    def tolerate(self, part: str) -> None:
        """Say that a complaint that contains this may come and means nothing here."""
        self.tolerated.append(part)

    def close(self) -> list[str]:
        """End the visit and return what it complained of, and what was expected and did not come."""
        self.context.close()
        missing = [f"expected but not heard: {e}" for e in self.expected if not any(e in c for c in self.complaints)]
        known = [*self.expected, *self.tolerated]
        return [complaint for complaint in self.complaints if not any(part in complaint for part in known)] + missing


def check_no_sideways_scroll(page: Any) -> None:
    """Fail where the page is wider than its window, and name what sticks out."""
    found = page.evaluate(
        """() => {
        const root = document.documentElement, width = root.clientWidth;
        const held = element => {
            for (let up = element.parentElement; up && up !== root; up = up.parentElement)
                if (!['visible', 'clip'].includes(getComputedStyle(up).overflowX) && up !== document.body) return true;
            return false;
        };
        const wide = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 1);
        const names = wide.filter(e => !held(e)).map(e => e.tagName + '.' + (e.getAttribute('class') || ''));
        return {scroll: root.scrollWidth, width, names: names.slice(0, 5)};
    }"""
    )
    assert found["scroll"] <= found["width"], found


def check_accessible(page: Any, allowed: dict[str, str] | None = None) -> None:
    """Fail on what axe-core finds.

    Args:
        page: The page.
        allowed: Rules that may be broken, each with the reason.
    """
    # Preloading would read style sheets by requests that pages from the disk may not make.
    found = Axe().run(page, options={"preload": False}).response["violations"]
    told = [
        f"{one['id']}: {one['help']}\n    {node['html'][:200]}\n    {node['failureSummary'][:300]}"
        for one in found
        if one["id"] not in (allowed or {})
        for node in one["nodes"][:3]
    ]
    assert not told, "\n".join(told)


def tab_stops(page: Any, limit: int = 60) -> list[dict[str, Any]]:
    """Walk through the page with the tab key.

    Returns:
        One entry per stop until the page is left, or comes round: ``tag``, ``name`` (its text or label), and
        ``seen``, how many pixels in and around it (and its labels) the focus changed.
    """
    page.evaluate("() => { document.activeElement?.blur(); window.scrollTo(0, 0); window.stops = new Set(); }")
    stops: list[dict[str, Any]] = []
    while len(stops) < limit:
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
            const e = document.activeElement;
            if (!e || e === document.body || window.stops.has(e)) return null;
            window.stops.add(e);
            e.scrollIntoView({block: 'nearest', behavior: 'instant'});
            for (const moving of document.getAnimations()) try { moving.finish(); } catch { /* an endless one */ }
            const boxes = [e, ...(e.labels || [])].map(one => one.getBoundingClientRect());
            const name = e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || '';
            return {tag: e.tagName.toLowerCase(), name: name.trim().slice(0, 80), kind: e.type || '',
                    left: Math.min(...boxes.map(b => b.left)), top: Math.min(...boxes.map(b => b.top)),
                    right: Math.max(...boxes.map(b => b.right)), bottom: Math.max(...boxes.map(b => b.bottom))};
        }"""
        )
        if stop is None:
            break
        stops.append({**stop, "seen": _changed_by_focus(page, stop)})
    return stops


def _changed_by_focus(page: Any, stop: dict[str, Any]) -> int:
    size = page.viewport_size
    left, top = max(0, stop["left"] - 8), max(0, stop["top"] - 8)
    right, bottom = min(size["width"], stop["right"] + 8), min(size["height"], stop["bottom"] + 8)
    if right - left < 1 or bottom - top < 1:
        return 0
    clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    with_focus = pixels(page, clip=clip)
    element = page.evaluate_handle("document.activeElement")
    element.evaluate("e => e.blur()")
    without = pixels(page, clip=clip)
    element.evaluate("e => e.focus({preventScroll: true, focusVisible: true})")
    return int((with_focus != without).any(axis=-1).sum())


def check_keyboard(page: Any) -> list[dict[str, Any]]:
    """Fail where a stop of the tab key cannot be seen; return the stops."""
    stops = tab_stops(page)
    hidden = [(stop["tag"], stop["name"]) for stop in stops if stop["seen"] < 16]
    assert not hidden, f"the focus cannot be seen on {hidden}"
    return stops


def pixels(page: Any, **options: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a screenshot as [row, column, colour]."""
    shot = page.screenshot(animations="disabled", **options)
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))


def check_nothing_was_run(page: Any) -> None:
    """Fail where a hostile text became an element or a handler of events."""
    found = page.evaluate(
        """() => [...document.querySelectorAll('*')].filter(e =>
            e.hasAttribute('data-hostile') || [...e.attributes].some(a => /^on/i.test(a.name))
        ).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert not found, found
    assert page.evaluate("window.hostile === undefined")
