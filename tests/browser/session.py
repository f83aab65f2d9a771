"""Chromium for a folder of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from docs.chromium import MISSING, find_chromium, launch


@contextmanager
def running_chromium() -> Iterator[Any]:
    """Run the browser; without one tests are skipped, or fail where `TRIMTAB_BROWSER=required`.

    To be left before another folder enters it, because Playwright's event loop would meet that of other tests.
    """
    path = find_chromium()
    if path is None:
        if os.environ.get("TRIMTAB_BROWSER") == "required":
            pytest.fail(f"TRIMTAB_BROWSER=required, but {MISSING}")
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch(playwright, path)
        yield browser
        browser.close()
