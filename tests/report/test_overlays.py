"""Kept tokens over pictures: the cells of the record, for fast and slow steps, of one part or several."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image
from tests.report.test_page import Page

from trimtab.records import make_record
from trimtab.report import overlays, picture_entry, render_report
from trimtab.report.overlays import overlays_of


def entry(parts, size=(40, 20), **changes):
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 90, 40)).save(stream, format="JPEG")
    kept = sum(len(part["kept"]) for part in parts)
    tokens = sum(part["grid"][0] * part["grid"][1] for part in parts)
    return {
        "image": base64.b64encode(stream.getvalue()).decode(), "media_type": "image/jpeg", "width": size[0],
        "height": size[1], "caption": "What is it?", "pruner": "divprune", "keep_ratio": 0.1, "tokens": tokens,
        "kept_count": kept, "parts": parts, **changes,
    }  # fmt: skip


def record(*entries):
    return make_record("pictures", {}, {"pictures": list(entries)})


def inside(path: str, x: float, y: float) -> bool:
    """Whether a point lies inside a path of upright rectangles, by the even-odd rule."""
    count = 0
    for corner in re.finditer(
        r"M([\d.-]+) ([\d.-]+)(?:h([\d.-]+)v([\d.-]+)h[\d.-]+z|H([\d.-]+)V([\d.-]+)H[\d.-]+Z)", path
    ):
        left, top, wide, high, right, bottom = (None if part is None else float(part) for part in corner.groups())
        right = left + wide if right is None else right
        bottom = top + high if bottom is None else bottom
        count += left < x < right and top < y < bottom
    return count % 2 == 1


@pytest.mark.parametrize(
    "parts",
    [
        [{"box": [0, 0, 40, 20], "grid": [2, 4], "kept": [0, 1, 6]}],
        [{"box": [0, 0, 20, 20], "grid": [2, 2], "kept": [3]},
         {"box": [20, 0, 40, 20], "grid": [4, 4], "kept": [0, 3, 4]}],
        [{"box": [0, 0, 40, 20], "grid": [2, 4], "kept": []}],
    ],
    ids=["one", "tiles", "none kept"],
)  # fmt: skip
def test_dropped_cells_are_veiled_and_kept_ones_framed(parts):
    shown, left_out = overlays_of([record(entry(parts))])
    assert left_out == 0
    for part in parts:
        (left, top, right, bottom), (rows, columns) = part["box"], part["grid"]
        for place in range(rows * columns):
            row, column = divmod(place, columns)
            x = left + (column + 0.5) * (right - left) / columns
            y = top + (row + 0.5) * (bottom - top) / rows
            assert inside(shown[0].veil, x, y) == (place not in part["kept"]), (part, place)
            assert inside(shown[0].frames, x, y) == (place in part["kept"])
    lines = sum(part["grid"][0] + part["grid"][1] + 2 for part in parts)
    assert shown[0].cells.count("M") == lines, "slow steps see every cell"


def test_words_say_what_the_picture_shows():
    parts = [{"box": [0, 0, 40, 20], "grid": [2, 4], "kept": [0, 1, 7]}]
    shown, _ = overlays_of([record(entry(parts))])
    assert shown[0].facts == "divprune keeps 3 of 8 visual tokens (37.5\N{NO-BREAK SPACE}%)"
    assert "2 upper left, 0 upper right, 0 lower left, 1 lower right" in shown[0].spoken
    unplaced, _ = overlays_of([record(entry([], tokens=9, kept_count=2))])
    assert unplaced[0].facts.endswith("where they lie is not known")
    assert unplaced[0].veil == ""


def test_one_switch_for_fast_and_slow_without_a_script(tmp_path):
    parts = [{"box": [0, 0, 40, 20], "grid": [2, 4], "kept": [0]}]
    old = picture_entry(Image.new("RGB", (8, 8)), "an older one")
    page = Page(render_report([record(entry(parts), entry(parts), old)], tmp_path / "a.html").read_text("utf-8"))
    assert page.tags.count("input") == 2
    assert page.tags.count("img") == 3
    assert "an older one" in page.text
    for name in ("show-fast", "show-slow"):
        assert f'id="{name}"' in page.source
        assert f'<label for="{name}">' in page.source
    only_old = render_report([record(old)], tmp_path / "b.html").read_text("utf-8")
    assert "<input" not in only_old, "older pictures have nothing to switch"


@pytest.mark.parametrize(
    "changes",
    [
        {"media_type": "image/svg+xml"}, {"media_type": "image/png"}, {"image": "%%%"}, {"width": 0}, {"height": None},
        {"parts": [{"box": [0, 0, 40, 20], "grid": [2, 2], "kept": [4]}]},
        {"parts": [{"box": [0, 0, 40, 20], "grid": [0, 2], "kept": []}]},
        {"parts": [{"box": [0, 0, 40], "grid": [2, 2], "kept": []}]}, {"parts": [None]},
    ],
)  # fmt: skip
def test_broken_pictures_are_left_out_and_counted(changes):
    parts = [{"box": [0, 0, 40, 20], "grid": [2, 4], "kept": [0]}]
    shown, left_out = overlays_of([record({**entry(parts), **changes}, entry(parts))])
    assert (len(shown), left_out) == (1, 1)


def test_pictures_beyond_the_size_of_a_page_are_counted(monkeypatch, tmp_path):
    parts = [{"box": [0, 0, 40, 20], "grid": [2, 4], "kept": [0]}]
    one = entry(parts)
    monkeypatch.setattr(overlays, "MOST_BYTES", 2 * len(one["image"]) + 100)
    page = Page(render_report([record(one, one, one)], tmp_path / "a.html").read_text("utf-8"))
    assert page.tags.count("img") == 2
    assert "1 more pictures are in the records" in page.text
