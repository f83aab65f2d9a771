"""Visual tokens that leave inside the language model, in the passes of the fast view.

The layers have hooks as long as DualSpeed is attached, and tokens leave while one of its passes runs. The rows of the
isolator mark the mode for every layer, so they are none of the tokens that may leave, though they stand on
placeholders. Where tokens are ranked by attention, the places that ask are those just before each answer: the end of a
row, which asks at inference, is the end of the answer in training and would give it away.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from trimtab.anatomy import EncodedImages, Host, RowLayout
from trimtab.anatomy.decoder import open_decoder
from trimtab.anatomy.drop_inside import InsideDrop, Stage
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.fast_view import KeptTokens
from trimtab.dualspeed.inside_options import DEFAULT_RATIOS
from trimtab.dualspeed.inside_options import INSIDE as WAYS
from trimtab.errors import NotSupportedError, setting_error
from trimtab.ops.host import to_device
from trimtab.ops.label_head import IGNORED
from trimtab.shapes import Bool, Int, Tensor

BLOCKS = "trimtab_blocks"
"""Entry of a batch with the block of each place, on its way through `trimtab.anatomy.assemble`."""
INSIDE = "trimtab_inside"
"""Entry of a shortened batch that holds its `InsideRows`."""


@dataclass(frozen=True)
class InsideRows:
    """The visual tokens of a shortened batch that may leave inside.

    Attributes:
        visual: Their places.
        counts: How many each row has.
        lengths: Real places of each row.
        answers: Most answers that any row has.
        pad_left: Whether padding stands before the rows.
    """

    visual: Bool[Tensor, "row place"]
    counts: list[int]
    lengths: list[int]
    answers: int
    pad_left: bool


class DropsInside:
    """The stages of one model under one config, at work only inside `active` or between `enter` and `leave`.

    Args:
        host: The model, opened.
        config: For `inside` and `inside_options`.

    Raises:
        SettingError: A layer that the model does not have, or at which tokens cannot leave yet; newline rows that it
            does not have.
        UnsupportedModelError: The layers of the model cannot be found, or are not understood.
        NotSupportedError: They have windows or states, or are compiled.
        WrongOrderError: Tokens leave inside this model already.
    """

    def __init__(self, host: Host, config: DualSpeedConfig) -> None:
        if config.inside is None:
            raise setting_error("DualSpeedConfig", "inside", f"one of {', '.join(WAYS)} here", None)
        decoder = open_decoder(host.model)
        self.stages = _stages(config, decoder.depth, decoder.first_layer, decoder.name)
        if config.inside_options.get("keep_newlines") and getattr(decoder.base, "image_newline", None) is None:
            raise setting_error(
                "DualSpeedConfig", "inside_options['keep_newlines']",
                f"False for {decoder.name}, which has no newline rows of its own (image_newline)", True,
                "Where a family's processor writes line ends into the text, they are text and stay.",
            )  # fmt: skip
        self.scores = config.inside != "vtw"
        """Whether tokens are ranked by attention."""
        self.owner = f"DualSpeedConfig(inside={config.inside!r})"
        self.drop = InsideDrop(decoder, self.stages, self.owner, "keep", None)
        self.drop.active = False

    def enter(self, rows: InsideRows, labels: Int[Tensor, "row place"] | None) -> None:
        """Let tokens leave in the coming pass.

        Args:
            rows: Those of the pass.
            labels: Its labels, or None where the last place of every row asks.
        """
        self.drop.visual_mask, self.drop.queries, self.drop.counts = rows.visual, None, []
        most = 1
        if self.scores and labels is not None:
            self.drop.queries, most = query_places(labels, rows), max(rows.answers, 1)
        self.drop.expect(rows.lengths, rows.counts, rows.pad_left, most)
        self.drop.active = True

    def leave(self) -> None:
        """Leave the language model as it is; calling it again does nothing."""
        self.drop.active, self.drop.visual_mask, self.drop.queries = False, None, None

    @contextlib.contextmanager
    def active(self, rows: InsideRows | None, labels: Int[Tensor, "row place"] | None) -> Iterator[None]:
        """While it lasts tokens leave, unless there are none."""
        if rows is None:
            yield
            return
        self.enter(rows, labels)
        try:
            yield
        finally:
            self.leave()
        self.require_done()

    def require_done(self) -> None:
        """Make sure that tokens left in the pass that has ended.

        Raises:
            NotSupportedError: None did: compiled code does not see hooks that came after it.
        """
        if not self.drop.counts:
            raise NotSupportedError(
                f"{self.owner} had no effect, since the layers did not call their hooks, as compiled code does not. "
                "Train without torch.compile, or with inside=None."
            )

    def deep_count(self, counts: Sequence[int]) -> int | None:
        """How many visual tokens reach the last layer; None where only the device knows.

        Args:
            counts: Visual tokens of each row.
        """
        kept = self.stages[-1].kept
        return None if kept is None else sum(kept(count) for count in counts)

    def detach(self) -> None:
        """Take the hooks off."""
        self.drop.detach()


def _stages(config: DualSpeedConfig, depth: int, least: int, name: str) -> list[Stage]:
    from trimtab.anatomy.drop_stages import fastv_stages, pyramid_stages, vtw_stages

    options = dict(config.inside_options)
    if config.inside == "pyramid_drop":
        layers = options.get("layers") or [depth * part // 4 for part in (1, 2, 3)]
        _check_layers(config.inside, "layers", layers, depth, least, name)
        return list(pyramid_stages(depth, layers, options.get("keep_ratios", DEFAULT_RATIOS)))
    layer = options.get("layer", 2 if config.inside == "fastv" else max(depth // 2, least))
    _check_layers(str(config.inside), "layer", [layer], depth, least, name)
    if config.inside == "fastv":
        return list(fastv_stages(layer, options.get("keep_ratio", 0.5)))
    return list(vtw_stages(layer, options.get("sink_tokens", 0), options.get("keep_newlines", False)))


def _check_layers(inside: str, option: str, layers: Sequence[int], depth: int, least: int, name: str) -> None:
    low = max(least, 1)
    if low >= depth:
        raise setting_error(
            "DualSpeedConfig", "inside",
            f"None for {name}, of whose {depth} layers the first {low} must see all tokens", inside,
            "Drop tokens before the language model only.",
        )  # fmt: skip
    rises = all(before < after for before, after in pairwise(layers))
    if rises and low <= layers[0] and layers[-1] < depth:
        return
    why = f", whose first {least} layers add visual features themselves" if least else ""
    raise setting_error(
        "DualSpeedConfig", f"inside_options[{option!r}]",
        f"from {low} to {depth - 1} for the {depth} layers of {name}{why}",
        layers[0] if option == "layer" else list(layers), f"Name the {option} in inside_options.",
    )  # fmt: skip


def blocks_of_places(layout: RowLayout, encoded: EncodedImages) -> Int[Tensor, "row seq"]:
    """Which block of features each place belongs to, counted from 1; 0 for text and padding."""
    sizes = [block.shape[0] for block in encoded.blocks]
    device, total = layout.types.device, sum(sizes)
    numbers = torch.arange(1, len(sizes) + 1, device=device)
    found = torch.zeros_like(layout.types, dtype=torch.long)
    found.view(-1)[layout.place] = numbers.repeat_interleave(to_device(sizes, device, torch.long), output_size=total)
    return found


def rows_inside(
    blocks: Int[Tensor, "row place"],
    encoded: EncodedImages,
    kept: KeptTokens,
    layout: RowLayout,
    *,
    prefix: int,
    rows: Sequence[int] | None,
    whole: Collection[int],
) -> InsideRows | None:
    """Find the visual tokens of a shortened batch that may leave inside; waits for nothing.

    Args:
        blocks: Block of each of its places, from `blocks_of_places` by way of `assemble`.
        encoded: The images of the whole batch.
        kept: What was handed over of them.
        layout: The rows of the whole batch.
        prefix: Rows of the isolator in front of every block that lost tokens.
        rows: The rows that were taken, or None for all.
        whole: Rows of the batch whose tokens all stay.

    Returns:
        What may leave, or None where nothing may.
    """
    taken = list(range(len(layout.lengths))) if rows is None else list(rows)
    counts, lengths = dict.fromkeys(taken, 0), {row: layout.lengths[row] for row in taken}
    runs: list[tuple[bool, int]] = []
    for row, block, index in zip(layout.block_rows, encoded.blocks, kept.index, strict=True):
        if row not in counts:
            continue
        size, count = block.shape[0], index.shape[0]
        front = prefix if count < size else 0
        leaves = row not in whole
        runs += [(False, front), (leaves, count)]
        counts[row] += count * leaves
        lengths[row] -= size - count - front
    if not any(counts.values()):
        return None
    if all(leaves for leaves, length in runs if length):
        visual = blocks != 0
    else:
        # Grouped by block, the isolator's rows are the first of each.
        last = len(encoded.blocks) + 1
        order = blocks.masked_fill(blocks == 0, last).flatten().argsort(stable=True)
        total = sum(length for _, length in runs)
        device = blocks.device
        flags = to_device([leaves for leaves, _ in runs], device).repeat_interleave(
            to_device([length for _, length in runs], device, torch.long), output_size=total
        )
        flat = torch.zeros(blocks.numel(), dtype=torch.bool, device=device)
        visual = flat.index_copy(0, order[:total], flags).view_as(blocks)
    return InsideRows(
        visual=visual,
        counts=[counts[row] for row in taken],
        lengths=[lengths[row] for row in taken],
        answers=max(layout.answers[row] for row in taken),
        pad_left=layout.pad_left,
    )


def query_places(labels: Int[Tensor, "row place"], rows: InsideRows) -> Bool[Tensor, "row place"]:
    """Places whose attention counts in training: the last text before each answer of a row.

    A row without labels teaches nothing, and its last place asks.

    Args:
        labels: Labels of the pass, -100 where there is no supervision.
        rows: Its visual tokens.
    """
    count, places = labels.shape
    answered = labels != IGNORED
    starts = answered[:, 1:] & ~answered[:, :-1]
    place = torch.arange(places, device=labels.device)
    text = torch.where(rows.visual, 0, place).cummax(1).values[:, :-1]
    # What is no start goes into a column of its own, which is left out again.
    asks = torch.zeros(count, places + 1, dtype=torch.bool, device=labels.device)
    asks = asks.scatter(1, torch.where(starts, text, places), True)[:, :places]
    ends = [places - 1] * count if rows.pad_left else [max(length - 1, 0) for length in rows.lengths]
    last = place == to_device(ends, labels.device, torch.long)[:, None]
    return asks | (last & ~asks.any(1, keepdim=True))


def refuse_step(drops: DropsInside, inputs: Mapping[str, Any], model: Any) -> None:
    """Refuse a step in which tokens that leave inside would break something else.

    Args:
        drops: The stages.
        inputs: Arguments of the step.
        model: The model, as it is trained.

    Raises:
        NotSupportedError: The model is to balance its experts over all layers, ZeRO-3 keeps the layers in pieces that
            attention is to be read from, or `torch.compile` has made the code that runs.
    """
    if _in_compiled_call():
        raise _compiled(drops.owner)
    text = drops.drop.decoder.model.config.get_text_config()
    balances = inputs.get("output_router_logits")
    if balances or (balances is None and getattr(text, "output_router_logits", False)):
        raise NotSupportedError(
            f"{drops.owner} does not go with output_router_logits=True, whose loss wants equally many tokens in every "
            "layer. Set output_router_logits to False in the text config, or inside to None."
        )
    if drops.scores and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotSupportedError(
            f"{drops.owner} reads the attention of a layer outside of its forward, which was not tried where ZeRO-3 "
            "keeps parameters in pieces. Set inside='vtw', which asks no layer, or use FSDP or ZeRO-2."
        )


def refuse_compiled(config: DualSpeedConfig, model: Any) -> None:
    """Refuse what `torch.compile` returned where tokens are to leave inside.

    Raises:
        NotSupportedError: It is that.
    """
    if config.inside is not None and hasattr(model, "_orig_mod"):
        raise _compiled(f"DualSpeedConfig(inside={config.inside!r})")


def _compiled(owner: str) -> NotSupportedError:
    return NotSupportedError(
        f"{owner} is not supported under torch.compile, which does not see what hooks change between layers. Leave out "
        "torch.compile (torch_compile of the Trainer), or set inside to None."
    )


def _in_compiled_call() -> bool:
    """Whether the code that runs was called by way of `torch.compile`, which hooks themselves are kept out of."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "compile_wrapper" and "_dynamo" in frame.f_code.co_filename:
            return True
    return False
