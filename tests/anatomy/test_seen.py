"""The picture that the tower sees, and the cells of its tokens: told apart by what a change of pixels changes."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conformance.families import SUITE
from torch import Tensor

from trimtab.anatomy import encode_images, open_host
from trimtab.anatomy.seen import SeenImage, see_image

PLAIN = SimpleNamespace(do_normalize=False, do_rescale=True)
"""Stands for an image processor that scales to 0..1 and no more."""

GRIDS = ("image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes")

LINE_BY_LINE = {
    "hunyuan_vl", "kimi_k25", "lfm2_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "muse_glimmer", "muse_spark",
    "nemotron_h_omni", "paddleocr_vl",
}  # fmt: skip
"""Families whose processors flatten patches in raster order; the others keep those of one token together."""

CHANNELS_LAST = {"cosmos3_edge", "inkling2", "lfm2_vl"}
"""Families whose processors put the channels of a pixel side by side."""

NO_CELLS = {"aria", "deepseek_ocr2", "fuyu", "idefics2", "inkling_mm_model", "molmo2"}
"""Learned queries, patches pooled by an index, and patches whose rows only the text tells."""

CODEBOOK = {"chameleon", "emu3"}
"""Visual tokens are words: a small change of pixels changes words elsewhere, or none."""

SHIFTED = {"got_ocr2", "pp_chart2table", "step3p7", "unlimited_ocr"}
"""Convolutions with strides behind the tower centre on the edge of a cell, so that the next one may change most."""

BLURRED = {"gemma4"}
"""In the tiny model attention spreads a change so far that the cell's own token does not always change most."""


def scene(width: int, height: int) -> Image.Image:
    """A picture whose left upper quadrant is bright, and that is unlike its mirror images."""
    across, down = np.meshgrid(np.linspace(0.1, 0.4, width), np.linspace(0.05, 0.3, height))
    values = np.stack([across, down, across * down], -1)
    values[: height // 2, : width // 2] += 0.55
    return Image.fromarray((values * 255).astype(np.uint8))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def cut(image: Tensor, rows: int, columns: int, merge: int) -> Tensor:
    """Cut a picture into patches, [patch, channel, row, column], merge x merge neighbours one after another."""
    side = image.shape[1] // rows
    parts = image.unflatten(2, (columns // merge, merge, side)).unflatten(1, (rows // merge, merge, side))
    return parts.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def with_scene(name: str, batch: dict[str, Any], tokens: int) -> tuple[dict[str, Any], Image.Image]:
    """Put a scene in the place of the random pixels of patches, in the layout of the family's processor."""
    values = batch["pixel_values"]
    rows, columns = (int(one) for one in next(batch[grid] for grid in GRIDS if grid in batch)[0][-2:])
    width = values.shape[-2] ** 2 * 3 if "target_sizes" in batch else values[-1].numel()
    width = values.shape[-1] if "spatial_shapes" in batch else width
    moments = 1 if isqrt(width // 3) ** 2 * 3 == width else 2
    side = isqrt(width // 3 // moments)
    picture = scene(columns * side, rows * side)
    patches = cut(as_tensor(picture), rows, columns, 1 if name in LINE_BY_LINE else isqrt(rows * columns // tokens))
    if "target_sizes" in batch:
        return {**batch, "pixel_values": patches.permute(1, 2, 0, 3).flatten(2)[None]}, picture
    if name in CHANNELS_LAST:
        patches = patches.permute(0, 2, 3, 1)
    else:
        patches = patches.unsqueeze(2).expand(-1, -1, moments, -1, -1)
    filled = torch.zeros_like(values)
    if "spatial_shapes" in batch:
        filled[0, : len(patches)] = patches.flatten(1)
    else:
        filled[:] = patches.reshape(values.shape)
    return {**batch, "pixel_values": filled}, picture


def patches_of(batch: dict[str, Any], values: Tensor) -> list[Tensor]:
    """Views of a tensor of pixels, one per patch or small square of a tile; what is changed in them changes it."""
    if "target_sizes" in batch:
        return list(values[0].split(values.shape[2], dim=-1))
    if values.dim() >= 4 and values.shape[-3] == 3 and not any(grid in batch for grid in GRIDS):
        squares = values.flatten(0, -4).unfold(2, 2, 2).unfold(3, 2, 2)
        return [
            tile[:, row, column] for tile in squares for row in range(tile.shape[1]) for column in range(tile.shape[2])
        ]
    return list(values[0] if values.dim() == 3 else values)


def cell_at(seen: SeenImage, row: int, column: int) -> tuple[int, dict[tuple[int, int], int]] | None:
    """The token of the cell at a pixel, and the tokens of its part by row and column."""
    for cells in seen.cells:
        left, top, right, bottom = cells.box
        if left <= column < right and top <= row < bottom:
            rows, columns = cells.grid
            places = {divmod(cell, columns): token for cell, token in enumerate(cells.tokens)}
            place = ((row - top) * rows // (bottom - top), (column - left) * columns // (right - left))
            near = {(r - place[0], c - place[1]): token for (r, c), token in places.items()}
            return near[0, 0], near
    return None


def changes(name: str, model: Any, batch: dict[str, Any], picture: Image.Image | None) -> list[bool]:
    """For some changes of a patch: whether the token that changes most is that of the cell where the picture does."""
    host = open_host(model)

    def look(pixels: Tensor) -> tuple[SeenImage, Tensor]:
        given = {**batch, "pixel_values": pixels}
        with torch.no_grad():
            encoded = encode_images(host, given)
        return see_image(host, given, encoded, PLAIN, picture), torch.cat(encoded.blocks)

    before, features = look(batch["pixel_values"])
    shown = np.asarray(before.picture).astype(int)
    count = len(patches_of(batch, batch["pixel_values"]))
    found = []
    for number in torch.randperm(count, generator=torch.Generator().manual_seed(0))[:24].tolist():
        pixels = batch["pixel_values"].clone()
        patch = patches_of(batch, pixels)[number]
        patch.copy_(torch.where(patch > 0.5, patch - 0.2, patch + 0.2))
        after, changed = look(pixels)
        difference = np.abs(np.asarray(after.picture).astype(int) - shown).sum(-1)
        place = np.unravel_index(difference.argmax(), difference.shape)
        hit = cell_at(before, int(place[0]), int(place[1])) if difference.max() else None
        if hit is not None:  # else it is in padding
            token = int((changed - features).norm(dim=-1).argmax())
            allowed = {t for (r, c), t in hit[1].items() if max(abs(r), abs(c)) <= (name in SHIFTED)}
            found.append(token in allowed)
    return found


@pytest.mark.parametrize("name", sorted(SUITE))
def test_the_cells_are_where_the_tokens_look(name: str) -> None:
    family = SUITE[name]
    model = family.build_model()
    host = open_host(model)
    batch = family.make_batch(model, (1,))
    with torch.no_grad():
        encoded = encode_images(host, batch)
    tokens = sum(len(block) for block in encoded.blocks)
    picture = None
    if any(grid in batch for grid in GRIDS):
        batch, picture = with_scene(name, batch, tokens)
    else:
        values = batch["pixel_values"]
        batch["pixel_values"] = (values - values.min()) / (values.max() - values.min())
    with torch.no_grad():
        encoded = encode_images(host, batch)
    seen = see_image(host, batch, encoded, PLAIN, picture)
    cells = [token for one in seen.cells for token in one.tokens]
    if name in NO_CELLS:
        assert cells == []
        assert seen.reason
        return
    # Newlines and separators are in no cell; all other tokens are, once each.
    fillers = sum(one[1] for one in encoded.filler if one is not None) + tokens - sum(map(sum, encoded.tiles))
    assert len(cells) == tokens - (4 if name == "emu3" else fillers)
    assert len(set(cells)) == len(cells)
    assert all(prod(one.grid) == len(one.tokens) for one in seen.cells)
    if picture is not None:
        assert np.array_equal(np.asarray(seen.picture), np.asarray(picture))
    if name in CODEBOOK:
        return
    hits = changes(name, model, batch, picture)
    assert len(hits) >= 4
    assert sum(hits) >= (0.5 if name in BLURRED else 0.9) * len(hits), hits


def test_without_the_image_patches_of_unknown_order_have_no_cells() -> None:
    model = SUITE["qwen2_5_vl"].build_model()
    batch = SUITE["qwen2_5_vl"].make_batch(model, (1,))
    with torch.no_grad():
        encoded = encode_images(model, batch)
    seen = see_image(model, batch, encoded, PLAIN)
    assert seen.cells == ()
    assert "order" in seen.reason


def test_another_image_than_that_of_the_batch_has_no_cells() -> None:
    model = SUITE["qwen2_5_vl"].build_model()
    batch, picture = with_scene("qwen2_5_vl", SUITE["qwen2_5_vl"].make_batch(model, (1,)), 24)
    with torch.no_grad():
        encoded = encode_images(model, batch)
    assert see_image(model, batch, encoded, PLAIN, picture).cells
    assert see_image(model, batch, encoded, PLAIN, picture.transpose(Image.Transpose.ROTATE_180)).cells == ()


def test_an_image_of_one_colour_tells_no_order_and_needs_none() -> None:
    model = SUITE["qwen2_5_vl"].build_model()
    batch = SUITE["qwen2_5_vl"].make_batch(model, (1,))
    batch["pixel_values"] = torch.full_like(batch["pixel_values"], 0.5)
    with torch.no_grad():
        encoded = encode_images(model, batch)
    seen = see_image(model, batch, encoded, PLAIN, Image.new("RGB", (48, 32), (128, 128, 128)))
    assert seen.cells[0].grid == (4, 6)


def _qwen(cls: str, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 1024, **changes}
        return getattr(transformers, cls)(**sizes)

    return build


PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": _qwen("Qwen2VLImageProcessorPil"),
    "glm4v": _qwen("Glm4vImageProcessorPil"),
    "ernie4_5_vl_moe": _qwen("Ernie4_5_VLMoeImageProcessorPil"),
    "paddleocr_vl": _qwen("PaddleOCRVLImageProcessorPil"),
    "hunyuan_vl": _qwen("HunYuanVLImageProcessorPil"),
    "cosmos3_edge": _qwen("Cosmos3EdgeImageProcessorPil"),
    "video_llama_3": _qwen("VideoLlama3ImageProcessorPil"),
}
"""Stock processors that need no torchvision, at the patch size of the tiny models."""


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_the_picture_of_a_stock_processor_is_the_image_that_went_in(name: str) -> None:
    model = SUITE[name].build_model()
    image = scene(48, 32)
    processor = PROCESSORS[name]()
    made = {key: torch.as_tensor(value) for key, value in processor(images=[image], return_tensors="pt").items()}
    with torch.no_grad():
        encoded = encode_images(model, made)
    seen = see_image(model, made, encoded, processor, image)
    wanted = np.asarray(image.resize(seen.picture.size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(seen.picture).astype(int) - wanted).mean() < 6
    assert prod(seen.cells[0].grid) == len(seen.cells[0].tokens) > 4


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _tiled(cls: str, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        return getattr(transformers, cls)(**settings)

    return build


PINPOINTS = [[16, 32], [32, 16], [32, 32]]
SPLIT = {"size": {"longest_edge": 72}, "max_image_size": {"longest_edge": 24}}
TILED: dict[str, Callable[[], Any]] = {
    "llava_next": _tiled(
        "LlavaNextImageProcessorPil", size={"shortest_edge": 16}, crop_size=_square(16), image_grid_pinpoints=PINPOINTS
    ),
    "llava_onevision": _tiled("LlavaOnevisionImageProcessorPil", size=_square(16), image_grid_pinpoints=PINPOINTS),
    "idefics3": _tiled("Idefics3ImageProcessorPil", **SPLIT),
    "smolvlm": _tiled("SmolVLMImageProcessorPil", **SPLIT),
    "internvl": _tiled(
        "GotOcr2ImageProcessorPil", size=_square(24), crop_to_patches=True, min_patches=2, max_patches=6
    ),
    "mistral3": _tiled("PixtralImageProcessorPil", size={"longest_edge": 32}, patch_size=4),
    "gemma3": _tiled("Gemma3ImageProcessorPil", size=_square(24)),
}


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (48, 48)])
@pytest.mark.parametrize("name", sorted(TILED))
def test_tiles_of_a_stock_processor_lie_where_the_image_was(name: str, size: tuple[int, int]) -> None:
    model = SUITE[name].build_model()
    image, processor = scene(*size), TILED[name]()
    made = {key: torch.as_tensor(np.asarray(value)) for key, value in processor([image], return_tensors="pt").items()}
    with torch.no_grad():
        encoded = encode_images(model, made)
    seen = see_image(model, made, encoded, processor, image)
    # The last view is the finest: its cells together cover the whole image.
    first = min(1, len(seen.cells) - 1)
    boxes = np.array([one.box for one in seen.cells[first:]])
    finest = seen.picture.crop((*boxes[:, :2].min(0), *boxes[:, 2:].max(0)))
    wanted = np.asarray(image.resize(finest.size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(finest).astype(int) - wanted).mean() < 10
    tokens = [token for one in seen.cells for token in one.tokens]
    assert len(set(tokens)) == len(tokens) == sum(prod(one.grid) for one in seen.cells)
    bright = [np.asarray(seen.picture.crop(_inner(one.box, one.grid, 0))).mean() for one in seen.cells]
    assert bright[0] > 120  # the first cell of the first view lies in the bright quadrant


def _inner(box: tuple[int, int, int, int], grid: tuple[int, int], cell: int) -> tuple[int, int, int, int]:
    """The pixels of one cell."""
    left, top, right, bottom = box
    row, column = divmod(cell, grid[1])
    width, height = (right - left) / grid[1], (bottom - top) / grid[0]
    edges = (left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height)
    return tuple(round(edge) for edge in edges)  # type: ignore[return-value]


def test_pixels_of_an_unknown_form_are_shown_without_cells() -> None:
    family = SUITE["internvl"]
    model = family.build_model()
    batch = family.make_batch(model, (1,))
    with torch.no_grad():
        encoded = encode_images(model, batch)
    image = scene(20, 10)
    odd = {**batch, "pixel_values": batch["pixel_values"].expand(2, 3, 24, 24)[:, :, ::2]}
    seen = see_image(model, odd, encoded, PLAIN, image)
    assert seen.cells == ()
    assert seen.picture is image
    assert seen.reason
    broken = SimpleNamespace(do_normalize=True, image_std=None, image_mean=None)
    seen = see_image(model, batch, encoded, broken, image)
    assert (seen.cells, seen.picture) == ((), image)
    assert "not known" in seen.reason
