"""Find the layer at which a model may lose its visual tokens, on a handful of prompts.

The search is exact and cheap: the whole model runs once per batch, and for every layer K only the layers behind it run,
on the places that stay, from the states that the whole run had there (`trimtab.anatomy.branches`).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from trimtab.anatomy.branches import Trace, trace_layers
from trimtab.anatomy.decoder import Decoder, open_decoder
from trimtab.anatomy.drop_inside import Chooser, DropPositions
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.errors import DataError, SettingError, TrimtabWarning, UnsupportedModelError, near_miss, setting_error
from trimtab.methods.vtw.config import VTWConfig
from trimtab.methods.vtw.cost import TextShape, layer_flops, read_text_shape, search_evaluations
from trimtab.methods.vtw.layer_choice import (
    THRESHOLD,
    CurvePoint,
    check_threshold,
    choose_layer,
    default_start,
    mean_and_error,
    same_first_choice,
    withdrawal_divergence,
)
from trimtab.records import portable_path
from trimtab.shapes import Bool, Float, Int, Tensor

Criterion = Literal["last_token", "answer"]
CRITERIA = ("last_token", "answer")
HEAD_CHUNK = 256
"""Places that pass through the head at once; bounds the memory of their scores."""
_OWNER = "search_withdrawal_layer"
_TOLD = 3
"""How many of the smallest divergences a warning lists."""


@dataclass(frozen=True)
class SearchReport:
    """What a search found.

    Attributes:
        layer: The first layer from `start_layer` on whose divergence is small enough, or None where none is.
        curve: One point for every layer from the first at which tokens may leave to the number of layers, where the
            divergence is 0.
        depth: Number of layers of the model.
        threshold: Most mean divergence, in nats.
        criterion: Where it was measured: ``"last_token"`` or ``"answer"``.
        start_layer: Where the choice began.
        margin: Standard errors that were added to the mean.
        samples: How many samples the means are of.
        places: Mean number of places of a prompt, padding left out.
        left: Mean number of places of a prompt that leave.
        flops_saving: Share of the prefill's arithmetic that the layer saves on these prompts; 0 without a layer, None
            for a model whose arithmetic is not known (see `read_text_shape`).
        kv_saving: Share of the entries of the KV cache that it saves after the prefill; 0 without a layer.
        layer_evaluations: What the search took per batch, in layers over the whole batch.
        naive_evaluations: What it would have taken with a run of the model for each of the same layers.
        positions: As in `VTWConfig`.
        sink_tokens: As in `VTWConfig`.
        keep_newlines: As in `VTWConfig`.
        model: Name of the model.
        task: What was searched on, in the user's words.
    """

    layer: int | None
    curve: tuple[CurvePoint, ...]
    depth: int
    threshold: float
    criterion: str
    start_layer: int
    margin: float
    samples: int
    places: float
    left: float
    flops_saving: float | None
    kv_saving: float
    layer_evaluations: float
    naive_evaluations: float
    positions: DropPositions = "keep"
    sink_tokens: int = 0
    keep_newlines: bool = False
    model: str = ""
    task: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a plain dict for JSON, the results of a record."""
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**told, "curve": [point.to_dict() for point in self.curve]}

    def settings(self) -> VTWConfig:
        """Return the settings that withdraw visual tokens at the layer that was found.

        Raises:
            SettingError: No layer was found.
        """
        if self.layer is None:
            raise SettingError(
                f"SearchReport.layer is None: no layer has a divergence of at most {self.threshold}. Search with a "
                "larger threshold, or choose a layer from the curve and give it as VTWConfig(layer=...)."
            )
        names = ("threshold", "criterion", "start_layer", "margin", "samples", "flops_saving", "kv_saving")
        found = {name: getattr(self, name) for name in names}
        curve = [{name: point.to_dict()[name] for name in ("layer", "mean", "stderr")} for point in self.curve]
        return VTWConfig(
            layer=self.layer,
            positions=self.positions,
            sink_tokens=self.sink_tokens,
            keep_newlines=self.keep_newlines,
            depth=self.depth,
            model=self.model,
            task=self.task,
            search={**found, "curve": curve},
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the settings with the curve to a small JSON file; see `VTWConfig.save`.

        Args:
            path: The file.
            overwrite: Whether a file that is there may be replaced.

        Raises:
            SettingError: No layer was found.
            OutputError: There is a file and `overwrite` is off, or the place cannot be written.
        """
        self.settings().save(path, overwrite=overwrite)


def search_withdrawal_layer(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    threshold: float = THRESHOLD,
    start_layer: int | None = None,
    criterion: Criterion = "last_token",
    positions: DropPositions = "keep",
    sink_tokens: int = 0,
    keep_newlines: bool = False,
    stacked: bool = False,
    margin: float = 0.0,
    task: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> SearchReport:
    """Find the first layer at which visual tokens may leave without changing what the model says (arXiv 2405.05803).

    For every layer K the next-token distribution p_K of the model that loses its visual tokens at K is held against
    that of the whole model; the layer is the first whose mean KL(p_K || p_full) over the samples is at most
    `threshold`. The paper's command takes 20 prompts of the task.

    The model runs in evaluation mode without gradients, and is given back as it was. What takes part is exactly what
    `withdraw` computes at each layer (with ``use_cache=False``), at a fraction of the work: see
    `SearchReport.layer_evaluations`. Departures from the paper's code: the curve has error bars and covers all layers,
    every sample of a padded batch counts, several images of a row leave together, and no layer is an answer, not an
    error.

    Args:
        model: See `open_decoder`; nothing else may let tokens leave from it.
        batches: Arguments of the model's forward, batch by batch, each row with at least one image. Tensors may lie on
            the CPU. ``labels`` say where answers begin. An entry ``visual_mask``, bool [row, seq], says which places
            hold visual tokens where ``input_ids`` do not.
        threshold: Most mean divergence in nats, above 0. 0.003 is the paper's for LLaVA-1.5-7B, which took 0.0005 for
            13B and 0.0001 for LLaVA-NeXT.
        start_layer: First layer that may be chosen; ``min(5, depth // 6)`` by default, at least 1 and at least the
            first at which tokens may leave. (The paper's code begins at 5, in models of 32 and 40 layers.)
        criterion: ``"last_token"`` compares the word after the prompt (the paper): at the place before the first
            supervised label where there are labels, else at the last real place. ``"answer"`` compares every word of
            the answer, given those before it, and takes the mean over them in each sample; needs labels.
        positions: As in `withdraw`.
        sink_tokens: As in `withdraw`.
        keep_newlines: As in `withdraw`.
        stacked: Run the branches of all layers side by side, so that weights are read once per batch; for GPUs. Equal
            to the default up to rounding (1e-5 in the scores in float32).
        margin: How many standard errors are added to the mean before it is held against the threshold; 0 is the paper.
        task: What is searched on, for readers of the saved settings.
        progress: Called after every batch with the batches done and the batches in all (those done where the number is
            not known).

    Returns:
        The layer, the curve and what it saves.

    Raises:
        SettingError: A setting is out of its range, or ``"answer"`` without labels.
        DataError: There are no batches; samples have no image, no supervised label or no text; or scores are NaN.
        UnsupportedModelError: The model's layers cannot be found or run alone.
        NotSupportedError: It is compiled, or not all its layers have full attention.
        WrongOrderError: Tokens of this model leave already.

    Warns:
        TrimtabWarning: No layer reaches the threshold; or prompts end with an image.
    """
    check_search(threshold=threshold, margin=margin, criterion=criterion, positions=positions)
    if isinstance(batches, (Mapping, str)) or not isinstance(batches, Iterable):
        came = type(batches).__name__
        raise setting_error(_OWNER, "batches", "an iterable of batches", came, "Put a single batch into a list.")
    (stage,) = vtw_stages(0, sink_tokens, keep_newlines, owner=_OWNER)
    decoder = open_decoder(model)
    if keep_newlines and getattr(decoder.base, "image_newline", None) is None:
        none = f"False for {decoder.name}, which has no newline rows of its own (image_newline)"
        raise setting_error(_OWNER, "keep_newlines", none, True)
    first, depth = decoder.first_layer, decoder.depth
    start = default_start(depth, first) if start_layer is None else start_layer
    if isinstance(start, bool) or not isinstance(start, int) or not first <= start <= depth:
        raise setting_error(_OWNER, "start_layer", f"a whole number from {first} to {depth}, or None", start_layer)
    tally = _Tally(list(range(first, depth + 1)))
    with _evaluating(decoder.model):
        total = len(batches) if isinstance(batches, Sized) else None
        for number, batch in enumerate(batches):
            _measure(decoder, batch, number, stage.choose, criterion, positions, stacked, tally)
            if progress is not None:
                progress(number + 1, total or number + 1)
    if not tally.samples:
        raise DataError(
            f"{_OWNER}: batches held 0 samples, at least 1 is needed. Give some prompts of the task with their images; "
            "the paper takes 20."
        )
    if tally.kept == tally.places:
        raise setting_error(
            _OWNER, "sink_tokens", "less than the visual tokens of a prompt", sink_tokens,
            "With it none leaves, so that every layer is as good as the whole model.",
        )  # fmt: skip
    if margin and tally.samples == 1:
        raise setting_error(_OWNER, "margin", "0 with 1 sample, of which no standard error is known", margin)
    if tally.endings:
        warnings.warn(
            f"{tally.endings} of {tally.samples} prompts end with an image, without any text behind it. Deep layers "
            "then know of the image only what earlier text has taken up, which is nothing. Put the question behind "
            "the image.",
            TrimtabWarning,
            stacklevel=2,
        )
    curve = tally.curve(depth, _shape_of(model))
    layer = choose_layer(curve, depth, threshold=threshold, start_layer=start, margin=margin)
    if layer is None:
        _warn_of_none(curve, depth, start, threshold, margin)
    point = next((one for one in curve if one.layer == layer), curve[-1])
    return SearchReport(
        layer=layer,
        curve=curve,
        depth=depth,
        threshold=threshold,
        criterion=criterion,
        start_layer=start,
        margin=margin,
        samples=tally.samples,
        places=tally.places / tally.samples,
        left=(tally.places - tally.kept) / tally.samples,
        flops_saving=point.flops_saving,
        kv_saving=point.kv_saving,
        layer_evaluations=tally.ours / tally.batches,
        naive_evaluations=tally.naive / tally.batches,
        positions=positions,
        sink_tokens=sink_tokens,
        keep_newlines=keep_newlines,
        model=_name_of(decoder),
        task=task,
    )


def check_search(*, threshold: float, margin: float, criterion: str, positions: str) -> None:
    """Raise where settings of a search are out of range, as far as that shows without a model.

    Args:
        threshold: As in `search_withdrawal_layer`.
        margin: As there.
        criterion: As there.
        positions: As there.

    Raises:
        SettingError: They are.
    """
    check_threshold(threshold, margin, _OWNER)
    if criterion not in CRITERIA:
        hint = near_miss(str(criterion), CRITERIA)
        raise setting_error(_OWNER, "criterion", f"one of {', '.join(CRITERIA)}", criterion, hint)
    if positions not in ("keep", "reset"):
        raise setting_error(_OWNER, "positions", "'keep' or 'reset'", positions)


@dataclass
class _Tally:
    """What the batches so far have given.

    Attributes:
        layers: The layers of the curve.
        divergences: Of each sample, one value per layer.
        same: The same for the share of places with the same first choice.
        lengths: Places of each prompt, and those that stay.
        endings: How many prompts end with an image.
        batches: How many batches.
        ours: Layers over the whole batch that were run.
        naive: Those that a run for each layer would have taken.
    """

    layers: list[int]
    divergences: list[list[float]] = field(default_factory=list)
    same: list[list[float]] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    endings: int = 0
    batches: int = 0
    ours: float = 0.0
    naive: float = 0.0

    @property
    def samples(self) -> int:
        """How many samples were seen."""
        return len(self.divergences)

    @property
    def places(self) -> int:
        """Places of all prompts."""
        return sum(places for places, _ in self.lengths)

    @property
    def kept(self) -> int:
        """Those of them that stay."""
        return sum(kept for _, kept in self.lengths)

    def curve(self, depth: int, shape: TextShape | None) -> tuple[CurvePoint, ...]:
        """One point per layer."""
        arithmetic = None if shape is None else self._share(lambda places: layer_flops(places, shape))
        entries = self._share(lambda places: places)
        points = []
        for number, layer in enumerate(self.layers):
            behind = (depth - layer) / depth
            values = [row[number] for row in self.divergences]
            points.append(
                CurvePoint(
                    layer,
                    *mean_and_error(values),
                    max(values),
                    math.fsum(row[number] for row in self.same) / self.samples,
                    None if arithmetic is None else behind * arithmetic,
                    behind * entries,
                )
            )
        return tuple(points)

    def _share(self, cost: Callable[[int], int]) -> float:
        """Share of a layer's cost that is saved behind the withdrawal, over all prompts."""
        return 1 - sum(cost(kept) for _, kept in self.lengths) / sum(cost(places) for places, _ in self.lengths)


def _measure(
    decoder: Decoder,
    batch: Mapping[str, Any],
    number: int,
    choose: Chooser,
    criterion: str,
    positions: DropPositions,
    stacked: bool,
    tally: _Tally,
) -> None:
    """Add the samples of one batch."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"{_OWNER}: batch {number} must be a mapping of the arguments of the model's forward, but a "
            f"{type(batch).__name__} came. Give what the processor or the collator returns."
        )
    inputs = decoder.place(batch)
    labels, mask = inputs.pop("labels", None), inputs.pop("visual_mask", None)
    if criterion == "answer" and labels is None:
        raise SettingError(
            f"{_OWNER}: criterion='answer' needs labels, but batch {number} has none. Give labels that are -100 but in "
            "the answers, or criterion='last_token'."
        )
    _require_images(decoder, inputs, mask, number)
    trace = trace_layers(decoder, inputs, choose, positions=positions, visual_mask=mask, owner=_OWNER)
    seq = trace.real.shape[1]
    _refuse_rows(~trace.visual.any(1), number, "have no image", "Give batches whose rows all have images.")
    ends = _supervised(labels, trace.real)
    last = _prompt_ends(ends, trace.real)
    wanted = ends
    if criterion == "last_token":
        wanted = torch.zeros_like(trace.real).scatter(1, last[:, None], True)
    else:
        remedy = "Labels must be above -100 somewhere behind the first place."
        _refuse_rows(~ends.any(1), number, "have no supervised label", remedy)
    divergences, same = _compare(trace, wanted, tally.layers, stacked)
    bad = divergences.isnan().any(1).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"{_OWNER}: scores of sample {bad[0]} of batch {number} are NaN. Check its pixels, and load a model that "
            "overflows in float16 in bfloat16 or float32."
        )
    prompt = trace.real & (torch.arange(seq, device=last.device) <= last[:, None])
    told = torch.stack((prompt.sum(1), (prompt & trace.stays).sum(1), trace.visual.gather(1, last[:, None])[:, 0])).T
    for places, kept, ending in told.tolist():
        tally.lengths.append((places, kept))
        tally.endings += ending
    tally.divergences += divergences.tolist()
    tally.same += same.tolist()
    ours, naive = search_evaluations(decoder.depth, tally.layers, trace.plan.width / seq)
    tally.ours, tally.naive, tally.batches = tally.ours + ours, tally.naive + naive, tally.batches + 1


def _require_images(decoder: Decoder, inputs: Mapping[str, Any], mask: Tensor | None, number: int) -> None:
    """Refuse rows without images before the model runs, where ``input_ids`` tell."""
    ids = inputs.get("input_ids")
    if mask is None and isinstance(ids, Tensor) and decoder.token_ids:
        mask = torch.isin(ids, torch.tensor(decoder.token_ids, device=ids.device))
    if mask is not None and mask.dim() == 2:
        _refuse_rows(~mask.bool().any(1), number, "have no image", "Give batches whose rows all have images.")


def _refuse_rows(bad: Bool[Tensor, "row"], number: int, what: str, remedy: str) -> None:
    rows = bad.nonzero().flatten().tolist()
    if rows:
        listed = ", ".join(str(row) for row in rows[:8])
        raise DataError(
            f"{_OWNER}: {len(rows)} of {len(bad)} samples in batch {number} {what} (rows {listed}). {remedy}"
        )


def _supervised(labels: Tensor | None, real: Bool[Tensor, "row seq"]) -> Bool[Tensor, "row seq"]:
    """Which places predict a supervised label: those before one."""
    found = torch.zeros_like(real)
    if labels is not None:
        if labels.shape != real.shape:
            raise setting_error(_OWNER, "labels", f"of shape {tuple(real.shape)}, one per place", tuple(labels.shape))
        found[:, :-1] = (labels[:, 1:].to(real.device) != -100) & real[:, 1:] & real[:, :-1]
    return found


def _prompt_ends(supervised: Bool[Tensor, "row seq"], real: Bool[Tensor, "row seq"]) -> Int[Tensor, "row"]:
    """The last place of each prompt: the first that predicts a supervised label, else the last real one."""
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    return torch.where(supervised.any(1), supervised.long().argmax(1), (real * places).argmax(1))


def _compare(
    trace: Trace, wanted: Bool[Tensor, "row seq"], layers: Sequence[int], stacked: bool
) -> tuple[Float[Tensor, "row layer"], Float[Tensor, "row layer"]]:
    """Mean divergence of each row at each layer, and the share of its places whose first choice is the same."""
    row, place = wanted.nonzero(as_tuple=True)
    column = trace.kept_places[row, place]
    depth = trace.decoder.depth
    inside = [layer for layer in layers if layer < depth]
    if stacked:
        finished = trace.finish_all(inside, stacked=True)
        states = [_pick(finished.pop(layer), row, column) for layer in inside]
    else:
        states = [_pick(trace.finish(layer), row, column) for layer in inside]
    whole = _pick(trace.last, row, place)
    found: list[list[Tensor]] = []
    for chunk in torch.arange(len(row)).split(HEAD_CHUNK):
        span = slice(int(chunk[0]), int(chunk[-1]) + 1)
        full = trace.scores(whole[span])
        found.append([])
        for one in states:
            scores = trace.scores(one[span].to(whole.device)).to(full.device)
            pair = withdrawal_divergence(scores, full), same_first_choice(scores, full)
            found[-1].append(torch.stack((pair[0], pair[1].to(pair[0].dtype))).cpu())
    row = row.cpu()
    counts = torch.bincount(row, minlength=len(wanted))
    values = torch.cat([torch.stack(chunk) for chunk in found], dim=2)  # [layer, kind, place]
    sums = values.new_zeros(*values.shape[:2], len(wanted)).index_add(2, row, values) / counts
    zeros = sums.new_zeros(1, len(wanted))
    divergences = torch.cat((sums[:, 0], zeros)) if depth in layers else sums[:, 0]
    same = torch.cat((sums[:, 1], zeros + 1)) if depth in layers else sums[:, 1]
    return divergences.T, same.T


def _pick(states: Tensor, row: Int[Tensor, "label"], column: Int[Tensor, "label"]) -> Tensor:
    return states[row.to(states.device), column.to(states.device)]


def _warn_of_none(curve: Sequence[CurvePoint], depth: int, start: int, threshold: float, margin: float) -> None:
    candidates = sorted((one for one in curve if start <= one.layer < depth), key=lambda one: one.mean)
    told = ", ".join(f"{one.mean:.3g} at layer {one.layer}" for one in candidates[:_TOLD])
    bound = f"mean divergence plus {margin:g} standard errors" if margin else "mean divergence"
    found = f"No layer from {start} to {depth - 1} has a {bound} of at most {threshold:g} nats. The smallest means are"
    remedy = "or search with a larger threshold and measure what that does to the answers"
    if not told:
        found, told = "There is no layer to choose:", f"the choice begins at layer {start}, and there are {depth}"
        remedy = "or search with a smaller start_layer where there is one"
    warnings.warn(f"{found} {told}. Withdraw no tokens, {remedy}.", TrimtabWarning, stacklevel=3)


def _shape_of(model: Any) -> TextShape | None:
    try:
        return read_text_shape(model)
    except UnsupportedModelError:
        return None


def _name_of(decoder: Decoder) -> str:
    return portable_path(str(getattr(decoder.model.config, "_name_or_path", "") or decoder.name))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its parts back into the mode that it had."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
