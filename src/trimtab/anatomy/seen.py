"""From a processor's tensors back to the picture that the vision tower sees, with the cells of its visual tokens.

Processors cut, tile and flatten pictures in many ways, and tell few of them. What the batch says (rows and columns of
patches, sizes of images) is taken from it; what it does not say (in which order patches stand, where tiles lie) is
told by the image itself: of all orders that would fit, the one is right whose picture is the image that went in. Where
none is, the picture is shown without cells, never with wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from trimtab.anatomy.encode import EncodedImages
from trimtab.anatomy.families import open_host
from trimtab.anatomy.seen_patches import patch_views, shape_entry
from trimtab.anatomy.seen_tiles import crop_views, packed_views, tile_views
from trimtab.anatomy.seen_views import Cells, NoRasterError, Source, View, to_picture
from trimtab.shapes import Tensor

__all__ = ["Cells", "SeenImage", "see_image"]

_OF_OTHER_FORM = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""What tensors of an unexpected form lead to; a family that nobody has tried is then shown without cells."""
GAP = 4
"""Pixels between views that stand side by side."""


@dataclass(frozen=True)
class SeenImage:
    """One image as the tower sees it.

    Attributes:
        picture: The picture; several views of the image stand side by side.
        cells: Its rectangles of tokens; none where it is not known where they lie. Tokens that end a line are in none.
        reason: Why there are none, or "".
    """

    picture: Image.Image
    cells: tuple[Cells, ...] = ()
    reason: str = ""


def see_image(
    model: Any,
    batch: Mapping[str, Any],
    encoded: EncodedImages,
    image_processor: Any = None,
    image: Image.Image | None = None,
) -> SeenImage:
    """Return the picture of the one image of a batch, and where its visual tokens lie in it.

    Args:
        model: The model, or what `trimtab.anatomy.open_host` made of it.
        batch: Arguments of its forward, one row with one image.
        encoded: What `trimtab.anatomy.encode_images` made of it.
        image_processor: What normalised the pixels; None for values of unknown scale, which are spread over the
            range from black to white.
        image: The image that went in. Without it patches whose order the batch does not tell have no cells, and
            tiles stand side by side.

    Returns:
        The picture and its cells.
    """
    host = open_host(model)
    given = {name: batch[name] for name in host.encoder_names if batch.get(name) is not None}
    entries = {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in given.items()}
    source = Source(host, entries, encoded, image_processor, image)
    try:
        return _side_by_side(_views(source))
    except NoRasterError as missing:
        reason = str(missing)
    except _OF_OTHER_FORM as error:
        reason = f"The pixels of {type(host.model).__name__} have a form that is not known ({type(error).__name__})."
    return SeenImage(image or Image.new("RGB", (64, 64), (128, 128, 128)), reason=reason)


def _views(source: Source) -> list[View]:
    if source.encoded.counts.get("video"):
        raise NoRasterError("Videos are not drawn.")
    if source.host.family.tiles == "packed":
        return packed_views(source)
    if (shape := shape_entry(source.entries)) is not None:
        return patch_views(source, shape)
    values = source.entries["pixel_values"]
    if values.dim() < 4 or values.shape[-3] != 3:
        raise NoRasterError("The batch does not say how many rows and columns of patches the image has.")
    return crop_views(source) if source.host.family.tiles == "views" else tile_views(source)


def _side_by_side(views: list[View]) -> SeenImage:
    """Put views beside one another, at their own sizes."""
    width = sum(view.pixels.shape[2] for view in views) + GAP * (len(views) - 1)
    canvas = Image.new("RGB", (width, max(view.pixels.shape[1] for view in views)), (255, 255, 255))
    cells: list[Cells] = []
    shift = 0
    for view in views:
        canvas.paste(to_picture(view.pixels), (shift, 0))
        for one in view.cells:
            left, top, right, bottom = one.box
            cells.append(replace(one, box=(left + shift, top, right + shift, bottom)))
        shift += view.pixels.shape[2] + GAP
    reason = "" if cells else "The visual tokens of this model stand in no raster."
    return SeenImage(canvas, tuple(cells), reason)
