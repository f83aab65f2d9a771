"""Records of kind "pictures" as images with their kept visual tokens drawn over them, for fast and slow steps."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.report.rows import Record
from trimtab.report.series import number_of

MOST_BYTES = 3_000_000
"""So much base64 text of pictures enters a page; the others are counted."""

_MEDIA = ("image/jpeg", "image/png")
_QUARTERS = ("upper left", "upper right", "lower left", "lower right")


@dataclass(frozen=True)
class Overlay:
    """One picture of a page.

    Attributes:
        address: The image as a data address.
        width: Its width in pixels.
        height: Its height in pixels.
        caption: Words of the record.
        facts: Pruner and numbers of tokens.
        spoken: What the picture shows, for those who cannot see it.
        veil: SVG path over the dropped tokens; empty where the picture comes with its veil drawn.
        frames: SVG path around the kept tokens.
        cells: SVG path around all tokens, as slow steps see them.
    """

    address: str
    width: float
    height: float
    caption: str
    facts: str
    spoken: str
    veil: str = ""
    frames: str = ""
    cells: str = ""


def overlays_of(records: Sequence[Record], places: Sequence[str] = ()) -> tuple[list[Overlay], int]:
    """Return the pictures of all records and how many are left out: those that are too many, broken or foreign.

    Args:
        records: Records of any kinds.
        places: Where each record was found, for the words below its pictures; empty where all are of one place.
    """
    shown: list[Overlay] = []
    left_out, size = 0, 0
    for record, place in zip(records, places or [""] * len(records), strict=True):
        pictures = record["results"].get("pictures") if record["kind"] == "pictures" else None
        for entry in pictures if isinstance(pictures, list) else []:
            overlay = _overlay(entry, place) if isinstance(entry, Mapping) else None
            if overlay is None or size + len(overlay.address) > MOST_BYTES:
                left_out += 1
                continue
            size += len(overlay.address)
            shown.append(overlay)
    return shown, left_out


def _overlay(entry: Mapping[str, Any], place: str) -> Overlay | None:
    caption = str(entry.get("caption", ""))
    if "png_base64" in entry:
        address = _address("image/png", entry["png_base64"])
        spoken = f"Kept patches are framed, others shaded. {caption}"
        return None if address is None else Overlay(address, 0, 0, caption, place, spoken)
    address = _address(entry.get("media_type"), entry.get("image"))
    width, height = number_of(entry.get("width")), number_of(entry.get("height"))
    if address is None or not width or not height or width < 0 or height < 0:
        return None
    parts = [part for part in entry.get("parts") or [] if _sound(part)]
    if len(parts) != len(entry.get("parts") or []):
        return None
    facts = f"{f'{place}: ' * bool(place)}{_facts(entry, parts)}"
    return Overlay(
        address=address, width=width, height=height, caption=caption, facts=facts,
        spoken=f"{caption}. {facts}. {_where(parts, width, height)}".strip(),
        veil="".join(_veil(part) for part in parts), frames="".join(_frames(part) for part in parts),
        cells="".join(_cells(part) for part in parts),
    )  # fmt: skip


def _address(media: Any, data: Any) -> str | None:
    """Return a data address of an image of a kind that holds no script, or None."""
    if media not in _MEDIA or not isinstance(data, str):
        return None
    try:
        begin = base64.b64decode(data, validate=True)[:8]
    except (binascii.Error, ValueError):
        return None
    told = "image/png" if begin.startswith(b"\x89PNG") else "image/jpeg" if begin.startswith(b"\xff\xd8") else ""
    return f"data:{media};base64,{data}" if told == media else None


def _sound(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    box, grid, kept = part.get("box"), part.get("grid"), part.get("kept")
    if not (isinstance(box, list) and len(box) == 4 and all(number_of(edge) is not None for edge in box)):
        return False
    if not (isinstance(grid, list) and len(grid) == 2 and all(type(many) is int and 0 < many < 1000 for many in grid)):
        return False
    return isinstance(kept, list) and all(type(place) is int and 0 <= place < grid[0] * grid[1] for place in kept)


def _facts(entry: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> str:
    tokens = number_of(entry.get("tokens")) or sum(part["grid"][0] * part["grid"][1] for part in parts)
    kept = number_of(entry.get("kept_count"))
    kept = sum(len(part["kept"]) for part in parts) if kept is None else kept
    share = f" ({100 * kept / tokens:.3g}\N{NO-BREAK SPACE}%)" if tokens else ""
    told = f"{entry.get('pruner') or 'the pruner'} keeps {kept:,.0f} of {tokens:,.0f} visual tokens{share}"
    return told if parts else f"{told}; where they lie is not known"


def _where(parts: Sequence[Mapping[str, Any]], width: float, height: float) -> str:
    """Return how many kept tokens lie in each quarter of the picture."""
    counts = [0, 0, 0, 0]
    for part in parts:
        (left, top, right, bottom), (rows, columns) = part["box"], part["grid"]
        for place in part["kept"]:
            row, column = divmod(place, columns)
            x, y = left + (column + 0.5) * (right - left) / columns, top + (row + 0.5) * (bottom - top) / rows
            counts[2 * (y >= height / 2) + (x >= width / 2)] += 1
    told = ", ".join(f"{count} {words}" for count, words in zip(counts, _QUARTERS, strict=True))
    return f"Kept by quarter: {told}." if parts else ""


def _veil(part: Mapping[str, Any]) -> str:
    """Return the box of a part without its kept cells; cells side by side in a row are cut out as one."""
    left, top, right, bottom = part["box"]
    return f"M{_n(left)} {_n(top)}H{_n(right)}V{_n(bottom)}H{_n(left)}Z{''.join(_rectangles(part, _stretches(part)))}"


def _frames(part: Mapping[str, Any]) -> str:
    return "".join(_rectangles(part, [(place, 1) for place in sorted(set(part["kept"]))]))


def _stretches(part: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return first place and length of kept cells that stand side by side in a row."""
    columns = part["grid"][1]
    found: list[tuple[int, int]] = []
    for place in sorted(set(part["kept"])):
        if found and place == sum(found[-1]) and place % columns:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found


def _rectangles(part: Mapping[str, Any], stretches: Sequence[tuple[int, int]]) -> list[str]:
    (left, top, right, bottom), (rows, columns) = part["box"], part["grid"]
    wide, high = (right - left) / columns, (bottom - top) / rows
    return [
        f"M{_n(left + place % columns * wide)} {_n(top + place // columns * high)}"
        f"h{_n(many * wide)}v{_n(high)}h{_n(-many * wide)}z"
        for place, many in stretches
    ]


def _cells(part: Mapping[str, Any]) -> str:
    (left, top, right, bottom), (rows, columns) = part["box"], part["grid"]
    across = [top + row * (bottom - top) / rows for row in range(rows + 1)]
    down = [left + column * (right - left) / columns for column in range(columns + 1)]
    lines = [f"M{_n(left)} {_n(y)}H{_n(right)}" for y in across]
    return "".join([*lines, *(f"M{_n(x)} {_n(top)}V{_n(bottom)}" for x in down)])


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
