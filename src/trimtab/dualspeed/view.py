"""The pruned view of a batch, from the user's arguments to the shorter ones: what training and inference share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from trimtab.anatomy import Host, RowLayout, assemble, encode_images, question_embeddings, read_rows, supplied_needs
from trimtab.anatomy.assemble import Positions
from trimtab.anatomy.encode import EncodedImages
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.fast_view import KeptTokens, choose_tokens
from trimtab.dualspeed.inside import BLOCKS, INSIDE, DropsInside, InsideRows, blocks_of_places, rows_inside
from trimtab.errors import SettingError, setting_error
from trimtab.pruners import build_pruner
from trimtab.shapes import Float, Tensor

if TYPE_CHECKING:
    from trimtab.dualspeed.cache import TowerCache


class FastView:
    """Pruner, positions and isolator places of one model under one config.

    Args:
        host: The model, opened.
        config: The settings; those of schedule, loss and cache are not used here.

    Attributes:
        cache: What stands for the vision tower, or None for the tower itself.
        inside: What drops tokens inside the language model, or None; whoever runs the view sets it.

    Raises:
        SettingError: The pruner needs what the model cannot supply, or nothing is pruned and the isolator has no
            place.
    """

    def __init__(self, host: Host, config: DualSpeedConfig) -> None:
        _require_room_for_isolator(config)
        self.host = host
        self.config = config
        self.cache: TowerCache | None = None
        self.inside: DropsInside | None = None
        self.pruner = build_pruner(config.pruner, config.pruner_options)
        missing = self.pruner.needs - supplied_needs(host)
        if missing:
            raise SettingError(
                f"The pruner {config.pruner!r} needs {', '.join(sorted(missing))}, which "
                f"{type(host.model).__name__} cannot supply. Choose one that needs features "
                "only, such as 'divprune'."
            )

    def encode(self, batch: Mapping[str, Any], full: Sequence[int] | None = None) -> tuple[EncodedImages, RowLayout]:
        """Encode the images of a batch and find their places.

        Args:
            batch: Arguments of the model.
            full: Rows whose visual tokens are all wanted, None for all rows; of the others a cache of kept tokens
                gives those that `choose` returns.
        """
        tower = None if self.cache is None else self.cache.tower(batch, full)
        encoded = encode_images(self.host, batch, self.pruner.needs, tower)
        if self.cache is not None:
            self.cache.note(encoded)
        return encoded, read_rows(self.host, batch, encoded)

    def serving(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context under which an image encoder that is called by itself takes its tower from the cache."""
        return contextlib.nullcontext() if self.cache is None else self.cache.tower({})(self.host, frozenset())

    def choose(
        self,
        batch: Mapping[str, Any],
        encoded: EncodedImages,
        layout: RowLayout,
        step: int,
        *,
        alone: bool = False,
    ) -> KeptTokens:
        """Let the pruner choose; `step` goes into the draw of pruners that draw.

        With `alone` every image keeps the same share, so that none depends on a draw or on the others of its batch.
        """
        config = replace(self.config, keep_spread="fixed") if alone else self.config
        text = None
        if "text" in self.pruner.needs:
            text = question_embeddings(self.host, batch, layout.placeholder, layout.block_rows, layout.most_words)
        if self.cache is not None:
            # A stored choice never depends on the words; see `trimtab.dualspeed.cache_choice`.
            return self.cache.choose(
                encoded, lambda some: choose_tokens(self.pruner, config, some, (self.config.seed, step), text)
            )
        return choose_tokens(self.pruner, config, encoded, (self.config.seed, step), text)

    def shorten(
        self,
        batch: Mapping[str, Any],
        encoded: EncodedImages,
        layout: RowLayout,
        kept: KeptTokens,
        prefix: Float[Tensor, "prefix width"] | None,
        *,
        rows: list[int] | None = None,
        packed: bool | None = None,
        whole: Collection[int] = (),
    ) -> dict[str, Any]:
        """Return the arguments of the model for the kept tokens, with the isolator's rows in front.

        Where tokens leave inside, the entry `INSIDE` says which may (`InsideRows`), or is None; it is to be taken out.

        Args:
            batch: The user's arguments.
            encoded: Their images.
            layout: Their rows.
            kept: What stays.
            prefix: Rows of the isolator, or None.
            rows: The rows of the batch to take, or None for all.
            packed: Whether to make one row of them; None for what the settings say.
            whole: Rows of the batch whose tokens do not leave inside.
        """
        positions = self.config.positions
        if positions == "auto":
            positions = "original" if self.host.rotary == "multimodal" else "renumber"
        blocks = {} if self.inside is None else {BLOCKS: blocks_of_places(layout, encoded)}
        short = assemble(
            self.host,
            {**batch, **blocks},
            encoded,
            kept.index,
            prefix=prefix,
            tokens=kept.tokens,
            positions=cast("Positions", positions),
            layout=layout,
            rows=rows,
            packed=self.config.packing if packed is None else packed,
        )
        if self.inside is not None:
            front, found = 0 if prefix is None else prefix.shape[0], short.pop(BLOCKS)
            short[INSIDE] = rows_inside(found, encoded, kept, layout, prefix=front, rows=rows, whole=whole)
        return short

    def prune(
        self, batch: Mapping[str, Any], prefix: Float[Tensor, "prefix width"] | None, step: int
    ) -> tuple[dict[str, Any], InsideRows | None]:
        """Encode, choose and shorten, row beside row, as `generate` takes them; and say what may leave inside."""
        encoded, layout = self.encode(batch)
        kept = self.choose(batch, encoded, layout, step, alone=True)
        short = self.shorten(batch, encoded, layout, kept, prefix, packed=False)
        return short, short.pop(INSIDE, None)


def by_name(host: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call, those given by place under their names."""
    names = list(inspect.signature(type(host.model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _require_room_for_isolator(config: DualSpeedConfig) -> None:
    if config.isolator_tokens and config.keeps_all:
        kept = "pruner='keep_all'" if config.pruner == "keep_all" else "keep_ratio=1"
        raise setting_error(
            "DualSpeedConfig", "isolator_tokens", f"0 with {kept}, which drops no token whose place the isolator could "
            "take", config.isolator_tokens,
        )  # fmt: skip
