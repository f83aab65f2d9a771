"""Every picture of the documents is made by a command, and is small."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
OTHERS = {"terminal"}
"""Made by docs/make_terminal_picture.py."""


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, imported as it is when it runs as a script."""
    pytest.importorskip("playwright", reason="the extra `browser` is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_pictures")


def test_these_are_the_pictures_and_they_are_small(pictures: ModuleType) -> None:
    files = {path.stem: path for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert set(files) - OTHERS == set(pictures.PICTURES)
    assert max(path.stat().st_size for path in files.values()) <= pictures.LARGEST


def test_a_picture_that_stays_too_large_is_not_written(pictures: ModuleType, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    with pytest.raises(SystemExit, match=r"noise\.png has \d+ bytes"):
        pictures.write_small(Image.fromarray(noise), tmp_path / "noise.png")
    assert not (tmp_path / "noise.png").exists()
    plain = Image.new("RGB", (1280, 900), "teal")
    assert pictures.write_small(plain, tmp_path / "plain.png") == (tmp_path / "plain.png").stat().st_size
    assert Image.open(tmp_path / "plain.png").convert("RGB").getpixel((5, 5)) == (0, 128, 128)
