"""One Chromium for the tests of this folder; a page of its own for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.commands import run
from tests.browser.harness import DESKTOP, Look, Visit
from tests.browser.session import running_chromium
from tests.run.small_run import write_run


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """The browser. It ends with this folder, because Playwright's event loop would meet that of other tests."""
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    """Open an address in a context of its own; whatever the pages complained of fails the test at its end."""
    opened: list[Visit] = []

    def open_page(address: str | Path, look: Look = DESKTOP, **options: Any) -> Visit:
        opened.append(Visit(chromium, address, look, **options))
        return opened[-1]

    yield open_page
    complaints = [complaint for one in opened for complaint in one.close()]
    assert not complaints, "\n".join(complaints)


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of six steps leaves."""
    folder = tmp_path_factory.mktemp("trained")
    run("train", "--config", write_run(folder, max_steps=6))
    return folder / "out"
