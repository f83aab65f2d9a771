"""What a withdrawal saves here and now: time of the prefill and memory of the cache, beside what the formula says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from trimtab.anatomy import encode_images, full_inputs
from trimtab.anatomy.decoder import Decoder, open_decoder
from trimtab.anatomy.drop_inside import DropPositions, InsideDrop, Stage
from trimtab.anatomy.drop_stages import vtw_stages
from trimtab.bench import time_steps
from trimtab.errors import DataError, UnsupportedModelError, setting_error
from trimtab.methods.vtw.cost import kv_saving, prefill_saving, read_text_shape, withdrawal

_OWNER = "measure_prefill"
FULL = "full"
VISION = "vision"


def measure_prefill(
    model: Any,
    batch: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    *,
    positions: DropPositions = "keep",
    sink_tokens: int = 0,
    keep_newlines: bool = False,
    repeats: int = 5,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time the prefill of one batch without a withdrawal and with one at each of several layers, side by side.

    What is timed is the language model with its head on the last place, from visual features to a filled cache: a
    withdrawal leaves the vision tower alone, which is timed by itself. Every round runs each once, and ratios are taken
    within rounds (`trimtab.bench.time_steps`). Gradients are off.

    Args:
        model: A vision-language model, see `withdraw`; give it in evaluation mode.
        batch: Arguments of its forward with at least one image, tensors on any device; labels are left out.
        layers: Layers to withdraw at; a quarter, a half and three quarters of the model's by default.
        positions: As in `withdraw`.
        sink_tokens: As in `withdraw`.
        keep_newlines: As in `withdraw`.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before them.
        progress: Called after every round with the rounds done and in all.

    Returns:
        ``rows``, ``places`` (width of the batch), ``left`` (places that leave of the longest row, padding counted),
        ``depth``; ``vision`` and ``full`` with ``seconds`` (median), ``low`` and ``high`` (quartiles), ``full`` also
        with ``kv_bytes``; and ``layers``, a list with one entry for each layer: ``layer``, ``seconds``, ``low``,
        ``high``, ``times`` (how many times faster than the whole model, with ``times_low`` and ``times_high``),
        ``times_formula`` (what the arithmetic of `prefill_saving` says; None where it is not known), ``kv_bytes``,
        ``kv_saving`` (the share of the cache that was saved) and ``kv_saving_formula``.

    Raises:
        SettingError: A layer or another setting is outside its range.
        DataError: The batch has no visual tokens.
        UnsupportedModelError: The model's layers cannot be found or are not understood.
        NotSupportedError: It is compiled, or not all its layers have full attention.
        WrongOrderError: Tokens of this model leave already.
    """
    decoder = open_decoder(model)
    chosen = _default_layers(decoder) if layers is None else list(dict.fromkeys(layers))
    if not chosen:
        raise setting_error(_OWNER, "layers", f"at least one layer from {decoder.first_layer} to {decoder.depth}", [])
    if decoder.host is None:
        raise UnsupportedModelError(f"{decoder.name} takes no images, so that there is nothing to withdraw.")
    given = decoder.place(batch)
    given.pop("labels", None)
    stages = {layer: vtw_stages(layer, sink_tokens, keep_newlines, owner=_OWNER) for layer in chosen}
    with torch.no_grad():
        inputs = {**full_inputs(decoder.host, given, encode_images(decoder.host, given)), "use_cache": True}
        if "logits_to_keep" in decoder.host.forward_names:
            inputs["logits_to_keep"] = 1
        runs = {FULL: _Prefill(decoder, inputs)}
        runs |= {f"layer {layer}": _Prefill(decoder, inputs, stages[layer], positions) for layer in chosen}
        for run in runs.values():  # what is wrong with a layer is said before anything is timed
            run.note()
        callables: dict[str, Callable[[], object]] = {**runs, VISION: partial(encode_images, decoder.host, given)}
        told = time_steps(callables, repeats, warmup, progress)
    places, left = runs[FULL].counts[0], max(run.counts[0] - run.counts[-1] for run in runs.values())
    if not left and any(layer < decoder.depth for layer in chosen):
        raise DataError(f"{_OWNER}: no visual token of the batch leaves. Give a batch with an image.")
    entries = [_entry(layer, f"layer {layer}", told, runs, places, left, model) for layer in chosen]
    return {
        "rows": runs[FULL].rows,
        "places": places,
        "left": left,
        "depth": decoder.depth,
        "vision": _times(told, VISION),
        "full": {**_times(told, FULL), "kv_bytes": runs[FULL].kv_bytes},
        "layers": entries,
    }


@dataclass
class _Prefill:
    """One run over the prompt; calling it does nothing but that.

    Attributes:
        decoder: The model, opened, so that no run has to.
        inputs: Arguments of its forward.
        stages: Where tokens leave; none for the whole model.
        positions: As in `withdraw`.
        counts: After `note`, places before and behind the stages.
        rows: After `note`, rows of the batch.
        kv_bytes: After `note`, bytes of the filled cache.
    """

    decoder: Decoder
    inputs: Mapping[str, Any]
    stages: Sequence[Stage] = ()
    positions: DropPositions = "keep"
    counts: list[int] = field(default_factory=list)
    rows: int = 0
    kv_bytes: int = 0

    def __call__(self) -> Any:
        """Run the prompt."""
        with InsideDrop(self.decoder, self.stages, _OWNER, self.positions, None) as handle:
            output = self.decoder.model(**self.inputs)
            self.counts = handle.counts or self.counts
            return output

    def note(self) -> None:
        """Run the prompt and note what a run leaves behind."""
        ids = self.inputs["input_ids"]
        self.rows, self.counts = ids.shape[0], [ids.shape[1]]
        cache = self()["past_key_values"]
        self.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _default_layers(decoder: Decoder) -> list[int]:
    quarters = {decoder.depth * part // 4 for part in (1, 2, 3)}
    return sorted({max(layer, decoder.first_layer, 1) for layer in quarters})


def _times(told: Mapping[str, Any], name: str) -> dict[str, float]:
    times = told["steps"][name]
    return {"seconds": times["median"], "low": times["low"], "high": times["high"]}


def _entry(
    layer: int, name: str, told: Mapping[str, Any], runs: Mapping[str, _Prefill], places: int, left: int, model: Any
) -> dict[str, Any]:
    ratio, drops = told["ratios"][name], withdrawal(layer, places, left)
    try:
        shape = read_text_shape(model)
        formula = 1 / (1 - prefill_saving(shape, places, drops))
    except UnsupportedModelError:
        formula = None
    return {
        "layer": layer,
        **_times(told, name),
        "times": ratio["median"],
        "times_low": ratio["low"],
        "times_high": ratio["high"],
        "times_formula": formula,
        "kv_bytes": runs[name].kv_bytes,
        "kv_saving": 1 - runs[name].kv_bytes / runs[FULL].kv_bytes,
        "kv_saving_formula": kv_saving(len(runs[name].decoder.layers), places, drops),
    }
