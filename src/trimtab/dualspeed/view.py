"""The pruned view of a batch, from the user's arguments to the shorter ones: what training and inference share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from trimtab.anatomy import Host, assemble, encode_images, question_embeddings, read_rows, supplied_needs
from trimtab.anatomy.assemble import Positions, RowLayout
from trimtab.anatomy.encode import EncodedImages
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.fast_view import KeptTokens, choose_tokens
from trimtab.errors import SettingError, setting_error
from trimtab.pruners import build_pruner
from trimtab.shapes import Float, Tensor


class FastView:
    """Pruner, positions and isolator places of one model under one config.

    Args:
        host: The model, opened.
        config: The settings; those of schedule and loss are not used here.

    Raises:
        SettingError: The pruner needs what the model cannot supply, or nothing is pruned and the isolator has no
            place.
    """

    def __init__(self, host: Host, config: DualSpeedConfig) -> None:
        _require_room_for_isolator(config)
        self.host = host
        self.config = config
        self.pruner = build_pruner(config.pruner, config.pruner_options)
        missing = self.pruner.needs - supplied_needs(host)
        if missing:
            raise SettingError(
                f"The pruner {config.pruner!r} needs {', '.join(sorted(missing))}, which "
                f"{type(host.model).__name__} cannot supply. Choose one that needs features "
                "only, such as 'divprune'."
            )

    def encode(self, batch: Mapping[str, Any]) -> tuple[EncodedImages, RowLayout]:
        """Encode the images of a batch and find their places."""
        encoded = encode_images(self.host, batch, self.pruner.needs)
        return encoded, read_rows(self.host, batch, encoded)

    def choose(self, batch: Mapping[str, Any], encoded: EncodedImages, layout: RowLayout, step: int) -> KeptTokens:
        """Let the pruner choose; `step` goes into the draw of pruners that draw."""
        text = None
        if "text" in self.pruner.needs:
            text = question_embeddings(self.host, batch, layout.placeholder, layout.block_rows)
        return choose_tokens(self.pruner, self.config, encoded, (self.config.seed, step), text)

    def shorten(
        self,
        batch: Mapping[str, Any],
        encoded: EncodedImages,
        layout: RowLayout,
        kept: KeptTokens,
        prefix: Float[Tensor, "prefix width"] | None,
    ) -> dict[str, Any]:
        """Return the arguments of the model for the kept tokens, with the isolator's rows in front."""
        positions = self.config.positions
        if positions == "auto":
            positions = "original" if self.host.rotary == "multimodal" else "renumber"
        return assemble(
            self.host,
            batch,
            encoded,
            kept.index,
            prefix=prefix,
            tokens=kept.tokens,
            positions=cast("Positions", positions),
            layout=layout,
        )

    def prune(
        self, batch: Mapping[str, Any], prefix: Float[Tensor, "prefix width"] | None, step: int
    ) -> dict[str, Any]:
        """Encode, choose and shorten."""
        encoded, layout = self.encode(batch)
        return self.shorten(batch, encoded, layout, self.choose(batch, encoded, layout, step), prefix)


def by_name(host: Host, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call, those given by place under their names."""
    names = list(inspect.signature(type(host.model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _require_room_for_isolator(config: DualSpeedConfig) -> None:
    if config.isolator_tokens and (config.pruner == "keep_all" or config.keep_ratio == 1):
        kept = "pruner='keep_all'" if config.pruner == "keep_all" else "keep_ratio=1"
        raise setting_error(
            "DualSpeedConfig", "isolator_tokens", f"0 with {kept}, which drops no token whose place the isolator could "
            "take", config.isolator_tokens,
        )  # fmt: skip
