"""Find and start the browser that the tests and the pictures of the documents use."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Commands under which distributions install it."""

MISSING = "no Chromium: install it (Debian: apt-get install chromium) or set TRIMTAB_CHROMIUM to its path"

REBOUND = "rebound.test"
"""A name that leads to this machine, as another site may make its own name do."""

FLAGS = (
    # Names of other hosts lead nowhere, so that a page that asks for one fails here as it would without a network.
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    # The same letters on every machine: neither subpixel colours nor hinting of the desktop.
    "--font-render-hinting=none",
    "--disable-lcd-text",
)


def find_chromium() -> str | None:
    """Return the path of Chromium: TRIMTAB_CHROMIUM if set, else the first of `NAMES` on the path; None without."""
    named = os.environ.get("TRIMTAB_CHROMIUM")
    if named:
        return shutil.which(named)
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def launch(playwright: Any, path: str) -> Any:
    """Start Chromium without a window and without other hosts.

    Args:
        playwright: What ``sync_playwright()`` gives.
        path: The program.

    Returns:
        The browser of Playwright.
    """
    return playwright.chromium.launch(executable_path=path, args=list(FLAGS))


def main() -> int:
    """Print where Chromium is; 1 where there is none."""
    path = find_chromium()
    print(path or MISSING)
    return int(path is None)


if __name__ == "__main__":
    sys.exit(main())
