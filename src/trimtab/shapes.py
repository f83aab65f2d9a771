"""The axis legend of the house, and the tensor types that carry it.

Public tensor functions name their axes with these words; the test run checks them (jaxtyping with beartype).

====== =============================================================
axis   meaning
====== =============================================================
image  images of a batch; tiles of one image count as images
token  visual tokens of one image, raster order
kept   visual tokens of one image that survive pruning
row    rows (samples) of a batch of text
seq    places of a row's token sequence
word   text tokens that describe what is asked of an image
label  supervised places of a batch, in reading order
width  width of the language model
channel width of the vision tower
vocab  size of the vocabulary
axis   coordinates of a position (1, or 3 for multimodal rotary)
====== =============================================================
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor"]
