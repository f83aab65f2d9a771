"""What the model sees of one image, and what pruners keep of it: the vision tower runs once, pruners as often as asked.

`ImageLook` looks through a model, `PixelLook` without one. Both give `Seen`: the picture as the tower gets it, with
the cells of its visual tokens, for reports and for the live view.
"""

from __future__ import annotations

import base64
import contextlib
import io
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from trimtab.anatomy import EncodedImages, Words, encode_images, open_host, question_embeddings, read_rows
from trimtab.anatomy.encode import OBSERVED, supplied_needs
from trimtab.anatomy.seen import Cells, SeenImage, see_image
from trimtab.data.images import open_image
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.fast_view import choose_tokens
from trimtab.errors import DataError, SettingError, setting_error
from trimtab.ops.similarity import full_float32
from trimtab.pruners import build_pruner, pruner_names
from trimtab.shapes import Float, Tensor

LONGEST = 448
"""Longest side of the pictures that records hold, in pixels."""

_WORDS = {
    "cls_attention": "class-token attention",
    "hidden": "states of a vision tower",
    "keys": "keys of a vision tower",
    "text": "the words of a question",
}


@dataclass(frozen=True)
class SeenPart:
    """One rectangle of visual tokens: the image, or a tile or view of it.

    Attributes:
        box: Left, top, right and bottom in pixels of the picture.
        grid: Rows and columns of cells.
        kept: Cells that stay, raster order.
        distance: Of each cell one minus the cosine similarity of its feature to the nearest kept one of the image;
            0 for kept ones.
        attention: Of each cell the class-token attention (or the mean over queries), or None where the model
            supplies none.
    """

    box: tuple[int, int, int, int]
    grid: tuple[int, int]
    kept: tuple[int, ...]
    distance: tuple[float, ...]
    attention: tuple[float, ...] | None


@dataclass(frozen=True)
class Seen:
    """What one pruner keeps of one image.

    Attributes:
        picture: What the tower sees, without the processor's normalisation.
        parts: The rectangles of tokens in it; none where it is not known where the tokens lie.
        tokens: Visual tokens of the image, with those that end lines and belong to no part.
        kept_count: How many of them stay.
        seconds: Time of the pruner alone.
        pruner: Its name.
        keep_ratio: The share that it was asked for; 1 where it keeps all whatever is asked.
        reason: Why there are no parts, or "".
    """

    picture: Image.Image
    parts: tuple[SeenPart, ...]
    tokens: int
    kept_count: int
    seconds: float
    pruner: str
    keep_ratio: float
    reason: str = ""

    def to_entry(self, caption: str, longest: int = LONGEST) -> dict[str, Any]:
        """Return the picture and its kept tokens in the form that records of kind "pictures" hold.

        Args:
            caption: What to write under it; plain text.
            longest: Longest side of the picture in pixels; a larger one is scaled down, and the boxes with it.
        """
        factor = min(1.0, longest / max(self.picture.size))
        width, height = (max(1, round(side * factor)) for side in self.picture.size)
        small = self.picture if factor == 1 else self.picture.resize((width, height), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        small.save(stream, format="JPEG", quality=85)
        return {
            "image": base64.b64encode(stream.getvalue()).decode(),
            "media_type": "image/jpeg",
            "width": width,
            "height": height,
            "caption": caption,
            "pruner": self.pruner,
            "keep_ratio": self.keep_ratio,
            "tokens": self.tokens,
            "kept_count": self.kept_count,
            "parts": [
                {
                    "box": [round(edge * factor) for edge in part.box],
                    "grid": list(part.grid),
                    "kept": list(part.kept),
                }
                for part in self.parts
            ],
        }


class _Look(ABC):
    """Features of one image, and pruners over them.

    Attributes:
        image: The image as it came.
        tokens: Its visual tokens.
    """

    def __init__(self, image: Image.Image, seen: SeenImage, encoded: EncodedImages) -> None:
        self.image = image
        self._seen = seen
        self._encoded = encoded
        features = torch.cat(encoded.blocks).detach().float()
        self._directions = torch.nn.functional.normalize(features, dim=-1)
        self._attention = None if encoded.cls_attention is None else torch.cat(encoded.cls_attention).float().tolist()
        self.tokens = len(features)

    @property
    def picture(self) -> Image.Image:
        """What the tower sees, without the processor's normalisation."""
        return self._seen.picture

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each part of the picture; none where it is not known where the tokens lie."""
        return tuple(cells.grid for cells in self._seen.cells)

    def pruners(self) -> dict[str, str | None]:
        """Return every registered pruner with None where it can be used here, else the reason why not."""
        found = {}
        for name in pruner_names():
            missing = sorted(build_pruner(name).needs - self._supplied())
            found[name] = self._lacks(missing) if missing else None
        return found

    def select(
        self, pruner: str, keep_ratio: float = 0.1, options: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Seen:
        """Let a pruner choose; the tower does not run again.

        Args:
            pruner: Its name, see `pruners`.
            keep_ratio: Share of the visual tokens that it keeps, in (0, 1].
            options: Its keyword arguments.
            seed: Seed of pruners that draw.

        Returns:
            What stays. No place is left for an isolator; `choose` takes all settings of a training.

        Raises:
            SettingError: A value outside its range, an unknown name or option, or a pruner that cannot be used here.
        """
        return self.choose(
            DualSpeedConfig(
                pruner=pruner, keep_ratio=keep_ratio, pruner_options=dict(options or {}), seed=seed, isolator_tokens=0
            )
        )

    def choose(self, config: DualSpeedConfig) -> Seen:
        """Let the pruner of a training choose, exactly as the first step of the training would for this image alone.

        Args:
            config: The settings of the training; those of schedule, loss and cache are not used.

        Raises:
            SettingError: As `select`, or the ratio leaves no place for the isolator.
        """
        pruner = build_pruner(config.pruner, config.pruner_options)
        missing = sorted(pruner.needs - self._supplied())
        if missing:
            raise SettingError(f"The pruner {config.pruner!r} cannot be used here: {self._lacks(missing)}")
        unasked = {name: None for name in OBSERVED if name not in pruner.needs}
        encoded = replace(self._encoded, **unasked)  # type: ignore[arg-type]
        words = self._words() if "text" in pruner.needs else None
        began = time.perf_counter()
        with torch.no_grad():
            index = [one.tolist() for one in choose_tokens(pruner, config, encoded, (config.seed, 0), words).index]
        seconds = time.perf_counter() - began
        starts = _starts(encoded)
        kept = [start + place for start, places in zip(starts, index, strict=True) for place in places]
        distance = _distances(self._directions, kept)
        return Seen(
            picture=self._seen.picture,
            parts=tuple(_part(cells, kept, distance, self._attention) for cells in self._seen.cells),
            tokens=self.tokens,
            kept_count=len(kept),
            seconds=seconds,
            pruner=config.pruner,
            keep_ratio=1.0 if config.keeps_all else config.keep_ratio,
            reason=self._seen.reason,
        )

    @abstractmethod
    def _supplied(self) -> frozenset[str]: ...

    @abstractmethod
    def _lacks(self, missing: list[str]) -> str: ...

    def _words(self) -> Words | None:
        return None


class ImageLook(_Look):
    """One image through the eyes of a model.

    The vision tower runs once, without gradients and in evaluation mode; the model stays as it was.

    Args:
        model: A vision-language model of transformers (``trimtab.check_model`` says which), also inside PEFT, and
            with DualSpeed attached or not.
        processor: Its processor.
        image: Anything that `trimtab.data.images.open_image` takes.
        question: What is asked of the image; pruners that read the question see it.

    Raises:
        UnsupportedModelError: The model lacks what it takes.
        DataError: The image cannot be opened or processed.
    """

    def __init__(self, model: Any, processor: Any, image: Any, question: str = "") -> None:
        opened = open_image(image)
        batch = _inputs(processor, opened, question)
        self._open(model, batch, opened, getattr(processor, "image_processor", None))

    @classmethod
    def of_batch(
        cls, model: Any, batch: Mapping[str, Any], image: Image.Image | None = None, image_processor: Any = None
    ) -> ImageLook:
        """Look at a batch of one row with one image, made before.

        Args:
            model: As for the class.
            batch: Arguments of the model's forward.
            image: The image, by which the order of patches and tiles is told; None where it is not at hand.
            image_processor: The image processor, for its normalisation; None for values of unknown scale.
        """
        look = cls.__new__(cls)
        look._open(model, batch, image, image_processor)
        return look

    def _open(self, model: Any, batch: Mapping[str, Any], image: Image.Image | None, image_processor: Any) -> None:
        host = open_host(model)
        needs = supplied_needs(host)
        device = host.model.device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with _evaluating(host.model), torch.no_grad():
            encoded = encode_images(host, batch, needs)
            layout = read_rows(host, batch, encoded)
            self._question = None
            if "text" in needs:
                self._question = question_embeddings(host, batch, layout.placeholder, layout.block_rows)
        seen = see_image(host, batch, encoded, image_processor, image)
        self._needs, self._name = needs, type(host.model).__name__
        super().__init__(seen.picture if image is None else image, seen, encoded)

    def _supplied(self) -> frozenset[str]:
        return self._needs

    def _lacks(self, missing: list[str]) -> str:
        return f"it needs {_listed(missing)}, which {self._name} cannot supply. Choose one such as 'divprune'."

    def _words(self) -> Words | None:
        return self._question


class PixelLook(_Look):
    """One image without any model: the features of a token are the pixels of its patch.

    The image is scaled to the side and cut at the middle, as the processor of CLIP does.

    Args:
        image: Anything that `trimtab.data.images.open_image` takes.
        patch: Width and height of a patch in pixels.
        side: Width and height that the tower would see, a multiple of `patch`.

    Raises:
        SettingError: A side that patches do not divide.
        DataError: The image cannot be opened.
    """

    def __init__(self, image: Any, patch: int = 14, side: int = 336) -> None:
        if patch < 1:
            raise setting_error("PixelLook", "patch", "at least 1", patch)
        if side < patch or side % patch:
            raise setting_error("PixelLook", "side", f"a multiple of patch={patch}", side)
        opened = open_image(image)
        picture = _cut_square(opened, side)
        rows = side // patch
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(rows, patch, rows, patch, 3)
        features = values.permute(0, 2, 1, 3, 4).reshape(rows * rows, -1).float() / 127.5 - 1
        encoded = EncodedImages(
            outputs={}, counts={"image": 1}, blocks=[features], tiles=[[rows * rows]], grid=(rows, rows), filler=[None]
        )
        cells = Cells((0, 0, side, side), (rows, rows), tuple(range(rows * rows)))
        super().__init__(opened, SeenImage(picture, (cells,)), encoded)

    def _supplied(self) -> frozenset[str]:
        return frozenset()

    def _lacks(self, missing: list[str]) -> str:
        return f"it needs {_listed(missing)}, and pixels alone have none. Give a model."


def _listed(missing: list[str]) -> str:
    return " and ".join(_WORDS.get(name, name) for name in missing)


def _inputs(processor: Any, image: Image.Image, question: str) -> dict[str, Any]:
    """The batch of one row: the image, then the question."""
    parts = [{"type": "image"}, *([{"type": "text", "text": question}] if question else [])]
    if getattr(processor, "chat_template", None):
        conversation = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{getattr(processor, 'image_token', '<image>')} {question}".strip()
    try:
        return dict(processor(text=[text], images=[[image]], padding=True, return_tensors="pt"))
    except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as cause:
        raise DataError(
            f"{type(processor).__name__} cannot process the image of {image.width}x{image.height} pixels ({cause})."
        ) from cause


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Hold the model in evaluation mode, and give every part its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _starts(encoded: EncodedImages) -> list[int]:
    """Number of the first token of each block."""
    starts = [0]
    for block in encoded.blocks[:-1]:
        starts.append(starts[-1] + block.shape[0])
    return starts


def _distances(directions: Float[Tensor, "token width"], kept: list[int]) -> list[float]:
    """One minus the cosine similarity of each token to the nearest kept one, from features of length 1."""
    with torch.no_grad(), full_float32(directions.device):
        distance = (1 - directions @ directions[kept].T).amin(-1).clamp_min(0)
    distance[kept] = 0
    found: list[float] = distance.tolist()
    return found


def _part(cells: Cells, kept: list[int], distance: list[float], attention: list[float] | None) -> SeenPart:
    stays = set(kept)
    return SeenPart(
        box=cells.box,
        grid=cells.grid,
        kept=tuple(cell for cell, token in enumerate(cells.tokens) if token in stays),
        distance=tuple(distance[token] for token in cells.tokens),
        attention=None if attention is None else tuple(attention[token] for token in cells.tokens),
    )


def _cut_square(image: Image.Image, side: int) -> Image.Image:
    factor = side / min(image.size)
    width, height = (max(side, round(length * factor)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
