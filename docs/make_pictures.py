"""Make the pictures of the documents from what `make quickstart` left.

    python docs/make_pictures.py quickstart-out

Needs Chromium and the extras ``browser`` and ``view``. The pictures go to docs/pictures; `--only` names some of them.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chromium import MISSING, find_chromium, launch
from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
DESKTOP, PHONE = (1280, 900), (360, 740)
LARGEST = 200_000
"""Bytes that a picture may have: the repository keeps every version."""


@dataclass(frozen=True)
class Desk:
    """What the pictures are made of: a browser, and the output of quickstart."""

    browser: Any
    run: Path

    @contextmanager
    def page(self, address: str, size: tuple[int, int], colours: str) -> Iterator[Any]:
        """Open an address in a window of that size, for a reader who asked for these colours."""
        width, height = size
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=colours, reduced_motion="reduce"
        )
        page = context.new_page()
        page.goto(address)
        yield page
        context.close()

    def report(self, size: tuple[int, int] = DESKTOP, colours: str = "light") -> Any:
        """Open the page of the run."""
        return self.page((self.run / "report.html").resolve().as_uri(), size, colours)


def shot(page: Any, **options: Any) -> Image.Image:
    """Return what the window shows."""
    return Image.open(io.BytesIO(page.screenshot(animations="disabled", **options))).convert("RGB")


def beside(pictures: list[Image.Image], gap: int = 24) -> Image.Image:
    """Put pictures of one height beside each other, on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas


def quickstart(desk: Desk) -> Image.Image:
    """The top of the report: the verdict."""
    with desk.report() as page:
        return shot(page)


def report_phone(desk: Desk) -> Image.Image:
    """The report on a phone, light and dark."""
    shots = []
    for colours in ("light", "dark"):
        with desk.report(PHONE, colours) as page:
            shots.append(shot(page))
    return beside(shots)


def report_charts(desk: Desk) -> Image.Image:
    """The charts of the report."""
    with desk.report() as page:
        page.locator("figure:has(svg)").first.evaluate("e => e.scrollIntoView({block: 'start'})")
        return shot(page)


def overlays(desk: Desk) -> Image.Image:
    """Which visual tokens the fast mode keeps, as the report shows it."""
    with desk.report() as page:
        page.get_by_role("heading", name="fast mode").evaluate("e => e.scrollIntoView({block: 'start'})")
        return shot(page)


@contextmanager
def view_of(run: Path) -> Iterator[str]:
    """Serve the live view of the trained checkpoint; give its address."""
    command = [sys.executable, "-m", "trimtab", "view", "--model", "checkpoint", "--no-open", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=run)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise SystemExit("`trimtab view` did not start; what it says stands above.")
        yield json.loads(line)["url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def view(desk: Desk) -> Image.Image:
    """The live view of the trained checkpoint, with two pruners side by side."""
    with view_of(desk.run) as address, desk.page(address, (1280, 1150), "light") as page:
        page.get_by_role("status").filter(has_text=" of ").wait_for()
        page.get_by_role("img", name="Kept by divprune").wait_for()
        page.evaluate("window.scrollTo(0, 0)")
        return shot(page)


PICTURES: dict[str, Callable[[Desk], Image.Image]] = {
    make.__name__: make for make in (quickstart, report_phone, report_charts, overlays, view)
}


def write_small(picture: Image.Image, path: Path) -> int:
    """Write a picture with a palette, with as many colours as fit into `LARGEST` bytes; return its bytes."""
    for colours in (256, 128, 64, 32, 16):
        stream = io.BytesIO()
        few = picture.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(stream, format="PNG", optimize=True)
        if stream.tell() <= LARGEST:
            path.write_bytes(stream.getvalue())
            return stream.tell()
    raise SystemExit(f"{path.name} has {stream.tell()} bytes with 16 colours; at most {LARGEST} are allowed.")


def main() -> None:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output directory of quickstart")
    parser.add_argument("--to", type=Path, default=HERE / "pictures", help="where the pictures go")
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES), help="which ones")
    asked = parser.parse_args()
    if not (asked.run / "report.html").is_file():
        sys.exit(f"{asked.run} has no report.html. Run `make quickstart` first and give its output directory.")
    path = find_chromium()
    if path is None:
        sys.exit(MISSING)
    asked.to.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = launch(playwright, path)
        for name in asked.only:
            size = write_small(PICTURES[name](Desk(browser, asked.run)), asked.to / f"{name}.png")
            print(f"{name}.png: {size:,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
