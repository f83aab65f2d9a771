"""Scenes: coloured handwritten digits on a canvas, with questions that need to see.

The pen strokes are the 1,797 real digits of `sklearn.datasets.load_digits` (8x8 pixels, scaled up); everything else
is drawn with a seed. A scene holds one or two coloured digits, each in a quadrant of its own, over a soft grey ground
with grey pieces of strokes that no question asks about. Row `index` of a split is a pure function of the settings, the
seed, the split and the index; the two splits share no pen stroke.

========= ================================================ ========== ==========================
family    question                                         digits     answer (chance)
========= ================================================ ========== ==========================
digit     Which digit is shown?                            one        zero .. nine (1/10)
colour    What colour is the digit?                        one        one of the colours (1/6)
where     Where is the digit?                              one        upper-left .. (1/4)
either    Is it a three or a seven?                        one        one of the two (1/2)
compare   Which is higher, the red or the blue digit?      two        one of the two (1/2)
========= ================================================ ========== ==========================

``compare`` also asks which is further left. Given the words of a question every possible answer is equally likely, so a
model that does not look stays at chance. Within one conversation earlier turns may rule out an answer ("a three or a
seven" leaves two digits), so a test of sight asks every question on its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trimtab.errors import near_miss, setting_error

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[int, int, int]] = {  # of similar mean, so that a stroke has one contrast in any colour
    "red": (225, 50, 50),
    "green": (40, 170, 70),
    "blue": (50, 80, 225),
    "orange": (235, 120, 0),
    "purple": (150, 50, 180),
    "cyan": (0, 160, 190),
}
QUADRANTS = ("upper-left", "upper-right", "lower-left", "lower-right")
FAMILIES = ("digit", "colour", "where", "either", "compare")
SPLITS = ("train", "test")
TEST_SHARE = 0.25
"""Share of the pen strokes of every digit that only the test split uses."""

Row = dict[str, Any]
Objects = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What a scene looks like.

    Attributes:
        canvas: Width and height of the image in pixels, a multiple of twice `cell`.
        cell: Width and height of a cell in pixels, at least 4. Digits lie on whole cells; with cells as large as the
            patches of a vision tower a digit cuts no patch, which a small tower learns many times faster.
        size: Cells that a digit is wide and high, at least 1 and at most a quadrant.
        pairs: Share of scenes with two digits, in [0, 1]; the others have one.
        distractors: Grey pieces of strokes per scene, at least 0.
    """

    canvas: int = 128
    cell: int = 8
    size: int = 2
    pairs: float = 0.25
    distractors: int = 4

    def __post_init__(self) -> None:
        """Check every field; see the class for the ranges."""
        if self.cell < 4:
            raise setting_error("SceneSettings", "cell", "at least 4 pixels", self.cell)
        if self.canvas < 2 * self.cell or self.canvas % (2 * self.cell):
            raise setting_error("SceneSettings", "canvas", f"a multiple of twice cell={self.cell}", self.canvas)
        most_cells = self.canvas // (2 * self.cell)
        if not 1 <= self.size <= most_cells:
            raise setting_error("SceneSettings", "size", f"in 1..{most_cells} cells, a quadrant", self.size)
        if not 0 <= self.pairs <= 1:
            raise setting_error("SceneSettings", "pairs", "a share in [0, 1]", self.pairs)
        if self.distractors < 0:
            raise setting_error("SceneSettings", "distractors", "at least 0", self.distractors)


class Scenes(Sequence[Row]):
    """The scenes of one split, drawn when they are read; see `make_scenes`."""

    def __init__(self, split: str, count: int, seed: int, questions: int, settings: SceneSettings) -> None:
        self.split, self.length, self.seed, self.questions, self.settings = split, count, seed, questions, settings

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"Scene {index} of {self.length}.")
        rng, texts, objects = self._draw(index % self.length)
        return {"image": _paint(rng, objects, self.split, self.settings), **texts, "objects": objects}

    def texts(self) -> Iterator[Row]:
        """Yield the questions, answers and families of every row without painting its image."""
        return (self._draw(index)[1] for index in range(self.length))

    def _draw(self, index: int) -> tuple[np.random.Generator, Row, Objects]:
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        objects = _draw_objects(rng, self.split, self.settings)
        return rng, _ask(rng, objects, self.questions), objects


def make_scenes(
    split: str, count: int, seed: int = 0, questions: int = 4, settings: SceneSettings | None = None
) -> Scenes:
    """Make the scenes of one split.

    Args:
        split: ``"train"`` or ``"test"``; they share no pen stroke.
        count: Number of scenes, at least 1.
        seed: Seed of everything that is drawn, at least 0.
        questions: Questions per scene, 1..4. With one digit each is of another family; with two there are at most
            two, one about height and one about side.
        settings: What a scene looks like; None for the defaults.

    Returns:
        A sequence of rows: ``image`` (RGB, `canvas` pixels square), ``questions``, ``answers`` (one word each) and
        ``families`` of equal length, and ``objects``: per coloured digit ``digit``, ``colour``, ``quadrant``,
        ``stroke`` (number of the pen stroke in `load_digits`) and ``box`` (left, top, right, bottom of its cells in
        pixels).

    Raises:
        SettingError: A value outside its range.
    """
    if split not in SPLITS:
        raise setting_error("make_scenes", "split", "'train' or 'test'", split, near_miss(str(split), SPLITS))
    if count < 1:
        raise setting_error("make_scenes", "count", "at least 1", count)
    if seed < 0:
        raise setting_error("make_scenes", "seed", "at least 0", seed)
    if not 1 <= questions <= len(FAMILIES) - 1:
        raise setting_error("make_scenes", "questions", f"in 1..{len(FAMILIES) - 1}", questions)
    return Scenes(split, count, seed, questions, settings or SceneSettings())


def conversation(row: Mapping[str, Any], turns: Sequence[int] | None = None) -> Row:
    """Turn a row of questions about one image into a conversation that asks them one after another.

    Args:
        row: A row with ``image``, ``questions`` and ``answers``.
        turns: Which questions, in this order; None for all.

    Returns:
        ``messages``, with the image in the first user turn and one answer per assistant turn, and ``images``.
    """
    order = range(len(row["questions"])) if turns is None else turns
    messages: list[dict[str, Any]] = []
    for place in order:
        asked: list[dict[str, str]] = [{"type": "text", "text": row["questions"][place]}]
        if not messages:
            asked.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": row["answers"][place]}]})
    return {"messages": messages, "images": [row["image"]]}


def vocabulary() -> list[str]:
    """Return every word and mark that a question or an answer of a scene can hold, in lower case and sorted."""
    words = " ".join((*_TEMPLATES.values(), *_COMPARISONS.values()))
    plain = words.format(first="", second="").lower().replace("?", " ? ").replace(",", " , ")
    return sorted({*plain.split(), *DIGITS, *COLOURS, *QUADRANTS})


_TEMPLATES = {
    "digit": "Which digit is shown?",
    "colour": "What colour is the digit?",
    "where": "Where is the digit?",
    "either": "Is it a {first} or a {second}?",
}
_COMPARISONS = {
    "upper": "Which is higher, the {first} or the {second} digit?",
    "left": "Which is further left, the {first} or the {second} digit?",
}
# Pushes the greys of a scaled stroke towards ink or paper: blown-up 8x8 pixels would have no edge.
_SHARPEN = [min(255, max(0, round((grey - 70) * 2.2))) for grey in range(256)]


@functools.cache
def _strokes(split: str) -> tuple[NDArray[np.float32], list[NDArray[np.int64]]]:
    """All pen strokes [1797, 8, 8] in 0..1, and for every digit the numbers of those that the split may use."""
    from sklearn.datasets import load_digits

    found = load_digits()
    shuffled = np.random.default_rng(20_160).permutation(len(found.target))
    numbers = []
    for digit in range(10):
        own = shuffled[found.target[shuffled] == digit]
        cut = round(len(own) * TEST_SHARE)
        numbers.append(own[:cut] if split == "test" else own[cut:])
    return (found.images / 16.0).astype(np.float32), numbers


def _draw_objects(rng: np.random.Generator, split: str, settings: SceneSettings) -> Objects:
    count = 2 if rng.random() < settings.pairs else 1
    digits = rng.choice(10, count, replace=False)
    colours = rng.choice(list(COLOURS), count, replace=False)
    first = int(rng.integers(4))
    # Opposite corners, so that one of two digits is higher and one further left; which one is open.
    quadrants = (first, 3 - first)
    return [
        {
            "digit": DIGITS[digits[i]],
            "colour": str(colours[i]),
            "quadrant": QUADRANTS[quadrants[i]],
            "stroke": int(rng.choice(_strokes(split)[1][digits[i]])),
        }
        for i in range(count)
    ]


def _ink(stroke: int, split: str, side: int) -> Image.Image:
    """One pen stroke scaled to a square of `side` pixels, as a grey mask."""
    pixels = Image.fromarray((_strokes(split)[0][stroke] * 255).astype(np.uint8))
    return pixels.resize((side, side), Image.Resampling.BICUBIC).point(_SHARPEN)


def _ground(rng: np.random.Generator, canvas: int) -> Image.Image:
    """A soft, light grey ground with a little grain."""
    corners = rng.uniform(205, 245, (2, 2)).astype(np.float32)
    soft = np.asarray(Image.fromarray(corners).resize((canvas, canvas), Image.Resampling.BILINEAR))
    grain = rng.normal(0, 3, (canvas, canvas, 1))
    return Image.fromarray(np.clip(soft[:, :, None] + grain, 0, 255).repeat(3, axis=2).astype(np.uint8))


def _paint(rng: np.random.Generator, objects: Objects, split: str, settings: SceneSettings) -> Image.Image:
    """Paint the scene and enter the ``box`` of every object."""
    canvas, cell = settings.canvas, settings.cell
    image = _ground(rng, canvas)
    numbers = np.concatenate(_strokes(split)[1])
    for _ in range(settings.distractors):
        piece = _ink(int(rng.choice(numbers)), split, round(cell * rng.uniform(1, 2)))
        piece = piece.crop((0, 0, piece.width, piece.height // 2))
        place = (int(rng.integers(0, canvas - piece.width)), int(rng.integers(0, canvas - piece.height)))
        shade = int(rng.integers(120, 180))
        image.paste((shade, shade, shade), place, piece)
    half = canvas // (2 * cell)
    for entry in objects:
        cells = settings.size
        quadrant = QUADRANTS.index(entry["quadrant"])
        left = cell * (half * (quadrant % 2) + int(rng.integers(0, half - cells + 1)))
        top = cell * (half * (quadrant // 2) + int(rng.integers(0, half - cells + 1)))
        mask = _ink(entry["stroke"], split, cell * cells)
        # A colour is never twice the same, but always nearer to its own name than to another.
        tint = tuple(int(np.clip(value + rng.integers(-15, 16), 0, 255)) for value in COLOURS[entry["colour"]])
        image.paste(tint, (left, top), mask)
        entry["box"] = (left, top, left + mask.width, top + mask.height)
    return image


def _ask(rng: np.random.Generator, objects: Objects, questions: int) -> Row:
    asked = _ask_one(rng, objects[0]) if len(objects) == 1 else _ask_two(rng, objects)
    order = rng.permutation(len(asked))[:questions]
    chosen = [asked[i] for i in order]
    return {
        "questions": [question for _, question, _ in chosen],
        "answers": [answer for _, _, answer in chosen],
        "families": [family for family, _, _ in chosen],
    }


def _ask_one(rng: np.random.Generator, shown: dict[str, Any]) -> list[tuple[str, str, str]]:
    others = [digit for digit in DIGITS if digit != shown["digit"]]
    first, second = rng.permutation([shown["digit"], str(rng.choice(others))])
    answers = {"digit": "digit", "colour": "colour", "where": "quadrant", "either": "digit"}
    return [
        (family, template.format(first=first, second=second), shown[answers[family]])
        for family, template in _TEMPLATES.items()
    ]


def _ask_two(rng: np.random.Generator, objects: Objects) -> list[tuple[str, str, str]]:
    asked = []
    for word, template in _COMPARISONS.items():
        first, second = (objects[i] for i in rng.permutation(2))
        more = next(entry for entry in objects if word in entry["quadrant"])
        asked.append(("compare", template.format(first=first["colour"], second=second["colour"]), more["colour"]))
    return asked
