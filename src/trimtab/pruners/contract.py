"""What a pruner sees and returns. A pruner never sees a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from trimtab.errors import SettingError
from trimtab.shapes import Bool, Float, Int, Tensor

NEEDS = frozenset({"cls_attention", "hidden", "keys", "text"})
"""What a pruner may ask for beyond the projected features, as names of fields of `PrunerInput`."""


@dataclass(frozen=True)
class PrunerInput:
    """Visual tokens of several images of equal length, and what the pruner declared to need.

    Attributes:
        features: Visual tokens once projected to the width of the language model, raster order. Gradients may be
            attached; selection itself runs without gradients in float32.
        valid: Which tokens are real; None means all. Invalid tokens are never kept and never count as neighbours.
        grid: Rows and columns of the raster, or None where the tokens form no single rectangle.
        cls_attention: Attention of the class token (or the mean over queries where a tower has none) to every
            token, mean over heads, at the layer that feeds the features.
        hidden: States of the vision tower before the projector, same tokens.
        keys: Key vectors of that layer, mean over heads, same tokens.
        text: Embeddings of the words of the question that belongs to the image, never of the answer.
        text_valid: Which words are real; None means all.
        draw: Integers that name this draw (seed, step, number of the first image); a random choice is a pure
            function of them and of the position of the image in this input.
    """

    features: Float[Tensor, "image token width"]
    valid: Bool[Tensor, "image token"] | None = None
    grid: tuple[int, int] | None = None
    cls_attention: Float[Tensor, "image token"] | None = None
    hidden: Float[Tensor, "image token channel"] | None = None
    keys: Float[Tensor, "image token key"] | None = None
    text: Float[Tensor, "image word width"] | None = None
    text_valid: Bool[Tensor, "image word"] | None = None
    draw: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Selection:
    """Which tokens of each image stay.

    Attributes:
        index: Kept indices, ascending in each image, distinct among the valid ones.
        valid: Which of them count; False only where an image has fewer valid tokens than were asked for (these
            stand at the end and repeat no promise about their value).
        tokens: For merging pruners the merged tokens that replace the gathered ones, with gradients; else None.
        weight: For merging pruners how many tokens each one stands for; else None.
    """

    index: Int[Tensor, "image kept"]
    valid: Bool[Tensor, "image kept"]
    tokens: Float[Tensor, "image kept width"] | None = None
    weight: Float[Tensor, "image kept"] | None = None


class Pruner(ABC):
    """Chooses which visual tokens of an image stay.

    A subclass is entered with ``@register_pruner("name")``, declares what it needs, and takes its options as
    keyword arguments of ``__init__`` (checked there, with `SettingError`).
    """

    needs: frozenset[str] = frozenset()
    """Fields of `PrunerInput` that must be given; a subset of `NEEDS`. An option may change them on the instance."""

    @abstractmethod
    def select(self, inputs: PrunerInput, num_keep: int) -> Selection:
        """Choose `num_keep` tokens of every image.

        Runs without gradients in float32, batched over images, without reading anything back to the host.

        Args:
            inputs: The tokens and what `needs` names.
            num_keep: How many tokens to keep per image, at least 1.

        Returns:
            The kept indices; see `Selection`.

        Raises:
            SettingError: `num_keep` is outside 1..token, or a needed input is missing.
        """

    def check(self, inputs: PrunerInput, num_keep: int) -> None:
        """Raise a clear error where `select` cannot work; every `select` calls this first.

        Raises:
            SettingError: `num_keep` is outside 1..token, or a needed input is missing.
        """
        name = type(self).__name__
        tokens = inputs.features.shape[1]
        if not 1 <= num_keep <= tokens:
            raise SettingError(f"{name}: num_keep must be in 1..{tokens} (the tokens per image), but {num_keep} came.")
        for need in sorted(self.needs):
            if getattr(inputs, need) is None:
                raise SettingError(
                    f"{name} needs {need!r}, which was not given. Choose a pruner that needs features only, such as "
                    "'divprune', or a model that supplies it."
                )
