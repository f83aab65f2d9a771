"""What the page shows: every word as text, every picture with words for it."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from trimtab.dualspeed.look import PixelLook, Seen, SeenPart
from trimtab.report.pictures import EDGE, VEIL
from trimtab.view import panels
from trimtab.view.desk import Answer, Choice
from trimtab.view.drawing import colours, heat_picture, kept_picture

HOSTILE = (
    '<script>alert(1)</script><img src=x onerror="alert(1)"> **bold** $$x$$ &lt; `c`\n\n# head\n\t[l](javascript:x)'
)


class Reader(HTMLParser):
    """Tags and text as a browser has them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "br":
            self.text += "\n"

    def handle_data(self, data: str) -> None:
        self.text += data


def noise() -> Image.Image:
    return Image.effect_noise((60, 40), 60).convert("RGB")


def seen(name: str = "divprune", ratio: float = 0.1) -> Seen:
    return PixelLook(noise()).select(name, ratio)


@pytest.mark.parametrize("words", [HOSTILE, "plain words 12", "", "é 数 ا", "a\u2028b", "]]>-->", "{{x}} ${x}"])
def test_words_are_shown_as_they_are(words: str) -> None:
    for page in (panels.text(words), panels.notice(words), panels.answers([Answer(words, words)])):
        assert words in Reader(page).text
        assert "\n" not in page
        assert not {tag for tag, _ in Reader(page).tags} & {"script", "a", "code", "h1", "img", "strong"}


@pytest.mark.parametrize("letter", ["\0", "\r", "\x85", "\ud800"])
def test_what_html_cannot_hold_is_shown_as_unknown(letter: str) -> None:
    assert Reader(panels.text(f"a{letter}b")).text == "a�b"


def test_hostile_names_reach_no_place_of_the_page_as_html() -> None:
    found: dict[str, Seen | str] = {HOSTILE: seen(), f"{HOSTILE}2": HOSTILE}
    page = Reader(panels.panels(found, panels.DISTANCE) + panels.unusable([Choice(HOSTILE, "x", reason=HOSTILE)]))
    assert page.text.count(HOSTILE) >= 6
    assert "script" not in {tag for tag, _ in page.tags}
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:image/") for source in sources)


def test_panels_stand_side_by_side_with_numbers_and_words() -> None:
    found = {name: seen(name) for name in ("divprune", "random")}
    html = panels.panels(dict(found), panels.DISTANCE)
    page = Reader(html)
    alternatives = [attributes.get("alt") or "" for tag, attributes in page.tags if tag == "img"]
    for name, one in found.items():
        assert any(f"Kept by {name}: {one.kept_count} of 576 tokens kept" in words for words in alternatives)
        assert any(words.startswith(f"Heat map of the {panels.DISTANCE} for {name}: mean") for words in alternatives)
        assert f"{1000 * one.seconds:.1f}" in page.text
    assert [tag for tag, _ in page.tags].count("h2") == 2
    largest = max(value for one in found.values() for value in one.parts[0].distance)
    assert f"{largest:.3g}" in page.text
    assert "\n\n" not in html


def test_what_a_pruner_cannot_do_stands_beside_the_others() -> None:
    page = Reader(panels.panels({"divprune": seen(), "scope": "it needs attention"}, panels.DISTANCE))
    assert "it needs attention" in page.text
    assert ("role", "alert") in {item for _, attributes in page.tags for item in attributes.items()}


def test_without_attention_the_kept_cells_are_shown_alone() -> None:
    page = Reader(panels.panels({"divprune": seen()}, panels.ATTENTION))
    assert "There is no class-token attention here." in page.text
    assert [tag for tag, _ in page.tags].count("img") == 1


def test_without_places_the_reason_is_told() -> None:
    whole = seen()
    nowhere = Seen(whole.picture, (), 576, 57, 0.1, "divprune", 0.1, reason="The order is not known.")
    page = Reader(panels.panels({"divprune": nowhere}, panels.DISTANCE))
    assert "The order is not known." in page.text
    assert "img" not in [tag for tag, _ in page.tags]


def test_heat_maps_of_several_pruners_share_their_limits() -> None:
    near, far = seen("keep_all"), seen("random", 0.01)
    html = panels.panels({"keep_all": near, "random": far}, panels.DISTANCE)
    sources = [str(attributes["src"]) for tag, attributes in Reader(html).tags if tag == "img"]
    heats = [source.partition(",")[2] for source in sources if source.startswith("data:image/png")]
    assert len(heats) == 3  # the legend first
    whole = Image.open(io.BytesIO(base64.b64decode(heats[1])))
    darkest = tuple(map(int, colours(np.zeros(1), 0, 1)[0]))
    assert whole.getcolors() == [(whole.width * whole.height, darkest)]


def test_kept_cells_are_framed_and_others_veiled_in_every_part() -> None:
    picture = Image.new("RGB", (400, 200), "white")
    parts = tuple(
        SeenPart((left, 0, left + 200, 200), (2, 2), kept, (0.0, 1.0, 2.0, 3.0), None)
        for left, kept in ((0, (0,)), (200, (3,)))
    )
    drawn = kept_picture(Seen(picture, parts, 8, 2, 0.0, "x", 0.25))
    factor = drawn.width // 400
    veiled = Image.blend(picture, Image.new("RGB", picture.size, VEIL), 0.72).getpixel((0, 0))
    for column, row, stays in ((50, 50, True), (150, 50, False), (250, 50, False), (350, 150, True), (50, 150, False)):
        inside = drawn.getpixel((column * factor, row * factor))
        assert inside == ((255, 255, 255) if stays else veiled)
    assert drawn.getpixel((0, 0)) == EDGE
    assert drawn.getpixel((300 * factor, 100 * factor)) == EDGE


def test_heat_maps_have_the_colours_of_their_numbers() -> None:
    part = SeenPart((0, 0, 40, 40), (2, 2), (0,), (0.0, 0.5, 1.0, 9.0), None)
    one = Seen(Image.new("RGB", (60, 40)), (part,), 4, 1, 0.0, "x", 0.25)
    drawn = heat_picture(one, [part.distance], 0, 1)
    factor = drawn.width / 60
    wanted = colours(np.array([0.0, 0.5, 1.0, 1.0]), 0, 1)
    for number, (column, row) in enumerate([(10, 10), (30, 10), (10, 30), (30, 30)]):
        assert drawn.getpixel((int(column * factor), int(row * factor))) == tuple(wanted[number])
    assert drawn.getpixel((drawn.width - 2, 5)) == VEIL


def test_colours_grow_evenly_brighter() -> None:
    ramp = colours(np.linspace(0, 1, 32), 0, 1) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(ramp) > 0).all()


def test_equal_numbers_have_one_colour() -> None:
    assert len(np.unique(colours(np.full((3, 3), 0.7), 0.7, 0.7).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize(("size", "longest"), [((20, 10), 768), ((4000, 1000), 768), ((336, 336), 336)])
def test_pictures_are_of_a_size_to_look_at(size: tuple[int, int], longest: int) -> None:
    one = Seen(Image.new("RGB", size), (), 1, 1, 0.0, "x", 1.0)
    assert 336 <= max(kept_picture(one).size) <= longest
