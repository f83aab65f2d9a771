"""A view that runs in a process of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from bench.view import PageClient, running
from PIL import Image

pytest.importorskip("gradio", reason="the view needs the extra 'view'")

WATCHED = Path(__file__).with_name("watched.py")
HOSTILE = "<img src=x onerror=alert(1)>.png"


@dataclass
class Served:
    """A running view."""

    url: str
    process: Any
    notes: Path
    """Every try to reach another machine, one a line."""

    @cached_property
    def client(self) -> PageClient:
        return PageClient(self.url)

    @property
    def address(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def port(self) -> int:
        return int(urlsplit(self.url).port or 0)

    @property
    def folder(self) -> Path:
        """Where the view keeps images."""
        return Path(self.client.part("Image")["value"]["path"]).parents[1]


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[Served]:
    notes = folder / "notes.txt"
    notes.touch()
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WATCHED_NOTES", str(notes))
        patch.setenv("PYTHONPATH", os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")]))
        for name, value in environment.items():
            patch.setenv(name, value)
        told = stack.enter_context((folder / "told.txt").open("w", encoding="utf-8"))
        with running(arguments, command=(str(WATCHED),), stderr=told) as (url, process):
            one = Served(url, process, notes)
            yield one
            one.client.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("view")
    names = []
    for name in (HOSTILE, "plain.jpg"):
        Image.effect_noise((90, 60), 40).convert("RGB").save(folder / name)
        names += ["--image", str(folder / name)]
    # Settings for other apps of Gradio, which must not count.
    with serving(folder, *names, GRADIO_ALLOWED_PATHS="/", GRADIO_SHARE="True", GRADIO_SERVER_NAME="0.0.0.0") as one:
        yield one
