"""Measure how long the live view takes to answer a change of the pruner, and write the record.

    python bench/view.py                                            over HTTP: bench/records/view_cpu.json
    python bench/view.py --browser /usr/bin/chromium                in a browser too, until the pictures are shown
    python bench/view.py --model out --to other.json                through a model

A view is started as `trimtab view` starts it, on an image of 576 tokens where there is no model. Every pruner that can
be used is asked for alone, in turns, so that what disturbs one disturbs all. A time over HTTP goes from the request to
the last byte of the answer, pictures included; one in the browser from the click to the last picture decoded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from html import unescape
from pathlib import Path
from typing import IO, Any

import httpx

from trimtab.bench.timing import time_steps
from trimtab.errors import SettingError, TrimtabError
from trimtab.records import make_record, write_record

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "records" / "view_cpu.json"
ALWAYS = "keep_all"
"""Pruner that stays checked in the browser while another comes and goes."""


class PageClient:
    """Ask a running view what its page asks, over HTTP.

    Args:
        url: Address of the page, with its token.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(timeout=60, trust_env=False)
        page = self.http.get(url).raise_for_status().text
        found = re.search(r"window\.gradio_config = (\{.*?\});</script>", page, re.DOTALL)
        if found is None:
            raise SettingError(f"There is no page of the view at {url}.")
        self.config = json.loads(found.group(1))
        self._parts = {part["id"]: part["props"] for part in self.config["components"]}
        self._session = f"client{time.monotonic_ns()}"

    def close(self) -> None:
        """End the connections."""
        self.http.close()

    def part(self, label: str) -> dict[str, Any]:
        """Return what the page was told of a control."""
        return next(props for props in self._parts.values() if label in (props.get("label"), props.get("value")))

    def ask(self, label: str, event: str, data: Sequence[Any]) -> list[Any]:
        """Do what an event of a control does; return the new values of the parts it changes."""
        number = next(
            function["id"]
            for function in self.config["dependencies"]
            for target, name in function["targets"]
            if name == event and label in (self._parts[target].get("label"), self._parts[target].get("value"))
        )
        body = {"data": list(data), "fn_index": number, "session_hash": self._session, "event_data": None}
        reply = self.http.post(f"{self.url}gradio_api/run/predict", json=body)
        if reply.is_error:
            raise SettingError(f"The view could not do it: {reply.text}")
        return list(reply.json()["data"])

    def show(self, image: dict[str, Any], pruners: list[str], ratio: float = 0.1, question: str = "") -> str:
        """Return the HTML that the page shows for an image."""
        return str(self.ask("Pruners", "change", [image, pruners, ratio, self.part("Heat map")["value"], question])[0])


@contextlib.contextmanager
def running(
    arguments: Sequence[str] = (), command: Sequence[str] = ("-m", "trimtab"), stderr: IO[str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `trimtab view` in a process of its own.

    Args:
        arguments: Options of the command.
        command: What stands for `trimtab`, behind the name of Python.
        stderr: Where its messages go; those of this process by default.

    Yields:
        The address of its page, and the process.
    """
    words = [sys.executable, *command, "view", "--no-open", "--json", *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise SettingError("The view did not start; its message stands above.")
            yield json.loads(line)["url"], process
        finally:
            process.terminate()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the record."""
    started, began = datetime.now(timezone.utc), time.perf_counter()
    arguments = [] if options.model is None else ["--model", options.model]
    with contextlib.ExitStack() as stack, running(arguments) as (url, _):
        client = stack.enter_context(contextlib.closing(PageClient(url)))
        image = client.part("Image")["value"]
        names = [name for name, _ in client.part("Pruners")["choices"] if "question" not in name]
        tokens = re.search(r"of (\d+)", unescape(client.show(image, [ALWAYS])))
        if tokens is None:
            raise SettingError("The view shows no visual tokens.")
        steps = {name: lambda name=name: client.show(image, [name]) for name in names}
        results: dict[str, Any] = {"tokens": int(tokens.group(1)), "http": time_steps(steps, options.repeats)}
        if options.browser is not None:
            with _browser_steps(url, options.browser, names) as (steps, settle):
                results["browser"] = _time_clicks(steps, settle, options.repeats)
    slowest = {
        way: max(step["median"] for step in results[way]["steps"].values())
        for way in ("http", "browser")
        if way in results
    }
    results["slowest_median_seconds"] = slowest
    settings = {"model": options.model, "repeats": options.repeats, "keep_ratio": 0.1}
    return make_record("view", settings, results, started=started, seconds=time.perf_counter() - began)


def _time_clicks(steps: dict[str, Callable[[], None]], settle: Callable[[str], None], repeats: int) -> dict[str, Any]:
    """Time clicks in turns; after each the page is put back, which is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            taken = time.perf_counter() - began
            settle(name)
            if number:  # the first round is not counted
                seconds[name].append(taken)
    return {
        "steps": {
            name: {
                "median": sorted(taken)[len(taken) // 2],
                "minimum": min(taken),
                "maximum": max(taken),
                "seconds": taken,
            }
            for name, taken in seconds.items()
        },
        "repeats": repeats,
        "warmup": 1,
    }


@contextlib.contextmanager
def _browser_steps(
    url: str, browser: str, names: Sequence[str]
) -> Iterator[tuple[dict[str, Callable[[], None]], Callable[[str], None]]]:
    """Yield what to click and wait for, and what puts the page back."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        panel = page.locator(".tt-panel")
        panel.first.wait_for()

        def only(wanted: str) -> None:
            for box in page.get_by_role("checkbox").all():
                box.set_checked(box.get_attribute("name") == wanted)
            while panel.count() != 1 or panel.locator("h2").inner_text() != wanted:
                time.sleep(0.01)

        def add(name: str) -> None:
            page.get_by_role("checkbox", name=name, exact=True).check()
            added = panel.filter(has=page.get_by_role("heading", name=name, exact=True)).locator("img")
            added.nth(1).wait_for()
            page.evaluate("Promise.all([...document.images].map(image => image.decode()))")

        def remove(name: str) -> None:
            page.get_by_role("checkbox", name=name, exact=True).uncheck()
            while panel.count() != 1:
                time.sleep(0.01)

        only(ALWAYS)
        yield {name: lambda name=name: add(name) for name in names if name != ALWAYS}, remove  # type: ignore[misc]
        chromium.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model to look through; pixels without one")
    parser.add_argument("--browser", help="the program of a Chromium, to measure in a browser too")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--to", type=Path, default=RECORD, help="where the record goes")
    options = parser.parse_args(arguments)
    try:
        record = measure(options)
        write_record(options.to, record)
    except TrimtabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for way, seconds in record["results"]["slowest_median_seconds"].items():
        sys.stdout.write(f"{way}: slowest pruner answers in {seconds:.3f} s (median)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
