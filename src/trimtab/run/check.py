"""Before a run: does the model work, is the data sound, how much is there to gain? Without loading weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import Any

from trimtab.anatomy import check_model
from trimtab.bench import SpeedModel, SpeedPrediction, advice, expected_gain
from trimtab.data import SupervisedCollator, validate_rows
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import setting_error
from trimtab.records import make_record
from trimtab.run.config import RunConfig, training_arguments
from trimtab.run.load import load_processor, load_rows_of
from trimtab.run.shallow import outline_to_train

SECONDS = 40.0
"""What timing may take, where nothing else is said."""
FIRST_PARTS = 0.15
"""Share of that for reading rows, and again for counting tokens."""


@dataclass
class _Findings:
    """What was found about rows and steps; None where there was no time or no way."""

    tokens: Any
    prediction: SpeedPrediction
    measured: dict[str, Any] | None
    not_measured: str
    advice: list[str]


def check(
    config: RunConfig,
    limit: int = 200,
    progress: Callable[[int, int], None] | None = None,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Check a run before it starts.

    The model is built from its configuration with random weights, as many blocks of it as can be timed; no weights
    are loaded and nothing is written.

    Args:
        config: The settings.
        limit: Rows to look at per file.
        progress: Called with rows done and rows in all, per file, then with rounds of timed steps.
        seconds: What timing rows and steps may take; 0 times no step. Loading libraries and looking at rows comes on
            top.

    Returns:
        The record, kind "check": ``supported``, ``summary`` (one line per finding), ``problems`` (row and sentence),
        ``advice`` (sentences on what keeps DualSpeed from helping) and, None where the model is not supported or a
        row is bad: ``tokens_per_image`` (least, mean and most before and after pruning), ``tokens_per_row``,
        ``prediction`` (arithmetic alone, see `trimtab.bench.SpeedPrediction`), ``measured`` (seconds of the parts of
        a step, ``speedup`` with and ``speedup_compute`` without waiting for data, and on what; None where no step
        was timed, with the reason in ``not_measured``) and ``shares`` (of a plain step).

    Raises:
        SettingError: A setting does not fit, or there is no such model.
        DataError: A data file cannot be read at all.
    """
    if not 0 <= seconds < math.inf:
        raise setting_error("check", "seconds", "a finite number, at least 0", seconds)
    started, began = datetime.now(timezone.utc), time.perf_counter()
    arguments = training_arguments(config)
    model = outline_to_train(config)
    support = check_model(model)
    summary, problems = _look_at_data(config, limit, progress)
    model_words = {"model": support.model_class, "supported": support.supported, "why": support.reason}
    summary = {**model_words, **({"notes": " ".join(support.notes)} if support.notes else {}), **summary}
    found = None
    if support.supported and not problems:
        found = _look_at_steps(config, model, arguments, seconds, progress)
        summary |= _words(found)
    results = {"supported": support.supported, "summary": summary, "problems": problems, **_results(found)}
    whole = time.perf_counter() - began
    settings = {**config.identity(), "limit": limit, "seconds": seconds}
    return make_record("check", settings, results, started=started, seconds=whole)


def _look_at_data(
    config: RunConfig, limit: int, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    reports = [
        validate_rows(file, image_folder=config.image_folder, limit=limit, progress=progress)
        for file in config.data_files
    ]
    problems = [vars(p) for report in reports for p in report.problems if p.kind != "aspect"]
    layouts: dict[str, int] = {}
    for report in reports:
        for name, count in report.layouts.items():
            layouts[name] = layouts.get(name, 0) + count
    summary = {
        "rows looked at": sum(report.rows for report in reports),
        "layouts": ", ".join(f"{name} ({count})" for name, count in layouts.items()) or "none",
        "images": sum(report.images for report in reports),
        "rows that repeat": sum(report.duplicates for report in reports),
        "problems": len(problems),
    }
    return summary, problems


def _look_at_steps(
    config: RunConfig, model: Any, arguments: Any, seconds: float, progress: Callable[[int, int], None] | None
) -> _Findings:
    from trimtab.run.row_tokens import count_kept, read_timed

    began = time.perf_counter()
    settings = config.dualspeed or DualSpeedConfig()
    collate = SupervisedCollator(
        load_processor(config.model_name_or_path), max_length=config.max_length, empty_labels="count"
    )
    rows = load_rows_of(config.data_files, config)
    tokens, batches = read_timed(collate, rows, FIRST_PARTS * seconds)
    count_kept(outline_to_train(config), settings, tokens, batches, arguments.device, FIRST_PARTS * seconds)
    speed = _speed_model(model, tokens.per_row(), settings, bool(arguments.gradient_checkpointing))
    found = _Findings(tokens, speed.predict(), None, "no time was given (--seconds 0)", [])
    if seconds:
        left = seconds - (time.perf_counter() - began)
        measured, found.not_measured = _time_steps(model, collate, rows, speed, settings, arguments, left, progress)
        if measured is not None:
            found.measured, found.advice = _gain(measured, model, speed, tokens, arguments)
    return found


def _speed_model(model: Any, counts: Mapping[str, float], settings: DualSpeedConfig, recompute: bool) -> SpeedModel:
    text = model.config.get_text_config()
    visual = _visual_parameters(model)
    decoder = sum(p.numel() for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.numel()
    encoding = sum(p.numel() for p in visual)
    return SpeedModel(
        block_parameters=decoder,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocab=text.vocab_size,
        text_tokens=counts["text"],
        visual_tokens=counts["visual"],
        kept_tokens=counts["kept"],
        isolator_tokens=counts["isolator"],
        slow_ratio=settings.slow_ratio,
        tower_flops=2 * encoding * _patches(model, counts),
        tower_trained=_tower_trained(visual),
        recompute=recompute,
        teacher=settings.kl_weight > 0,
    )


def _tower_trained(visual: list[Any]) -> bool:
    """Whether more than a projector is trained, which is a small part."""
    return bool(sum(p.numel() for p in visual if p.requires_grad) > sum(p.numel() for p in visual) / 2)


def _time_steps(
    model: Any, collate: Any, rows: Any, speed: SpeedModel, settings: DualSpeedConfig, arguments: Any, seconds: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Any] | None, str]:  # fmt: skip
    """Time steps where that fits; else say why not."""
    from trimtab.run import probe

    dtype = model.dtype
    predicted, parts = speed.predict(), speed.full_parts()
    work = probe.Work(
        **parts,
        steps=1 + predicted.fast_over_full + predicted.slow_over_full,
        places=speed.text_tokens + speed.visual_tokens,
        width=speed.width,
        vocab=speed.vocab,
    )
    count = min(arguments.train_batch_size, len(rows))
    chosen, reason = probe.plan(
        model, work, count, seconds, probe.matmul_speed(arguments.device, dtype), probe.free_memory(arguments.device),
        dtype.itemsize,
    )  # fmt: skip
    if chosen is None:
        return None, reason
    began = time.perf_counter()
    batch = collate(list(islice(iter(rows), chosen.rows)))
    left = seconds - (time.perf_counter() - began)
    return probe.measure(model, batch, settings, chosen, arguments, left, progress), ""


def _gain(
    measured: dict[str, Any], model: Any, speed: SpeedModel, tokens: Any, arguments: Any
) -> tuple[dict[str, Any], list[str]]:
    """Set the measured steps against the time that their rows take to read."""
    steps, workers = measured["steps"], arguments.dataloader_num_workers
    data_seconds = tokens.seconds_per_row * measured["rows"]
    gain = expected_gain(steps, speed.slow_ratio, data_seconds, workers)
    sentences = advice(
        gain,
        steps,
        data_seconds=data_seconds,
        workers=workers,
        visual_share=speed.visual_tokens / (speed.visual_tokens + speed.text_tokens),
        reduction=(speed.kept_tokens + speed.isolator_tokens) / speed.visual_tokens,
        tower_trained=_tower_trained(_visual_parameters(model)),
    )
    data = {"seconds_per_row": tokens.seconds_per_row, "seconds_per_step": data_seconds, "workers": workers}
    named = {mode: asdict(parts) for mode, parts in steps.items()}
    return {**measured, **asdict(gain), "steps": named, "data": data}, sentences


def _patches(model: Any, counts: Mapping[str, float]) -> float:
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "patch_size", None) or 14
    side = size if isinstance(size, int) else math.sqrt(math.prod(size))
    return counts["pixels"] / (side * side * (getattr(vision, "temporal_patch_size", 1) or 1))


def _visual_parameters(model: Any) -> list[Any]:
    """Return the parameters of vision tower and projector: what belongs neither to the decoder nor to the words."""
    words = [*model.get_decoder().parameters(), model.get_input_embeddings().weight]
    known = {id(parameter) for parameter in words}
    return [parameter for parameter in model.base_model.parameters() if id(parameter) not in known]


def _results(found: _Findings | None) -> dict[str, Any]:
    if found is None:
        names = ("tokens_per_image", "tokens_per_row", "prediction", "measured", "not_measured", "shares")
        return {**dict.fromkeys(names), "advice": []}
    return {
        "tokens_per_image": found.tokens.per_image(),
        "tokens_per_row": found.tokens.per_row(),
        "prediction": vars(found.prediction),
        "measured": found.measured,
        "not_measured": found.not_measured or None,
        "shares": found.measured and found.measured["shares"],
        "advice": found.advice,
    }


def _words(found: _Findings) -> dict[str, Any]:
    counts, image, prediction = found.tokens.per_row(), found.tokens.per_image(), found.prediction
    share = counts["visual"] / (counts["visual"] + counts["text"])
    summary = {
        "text tokens per row": counts["text"],
        "visual tokens per row": counts["visual"],
        "visual share of the sequence": f"{share:.0%}",
        "visual tokens per image": _range(image["full"]),
        "kept in a fast step": f"{_range(image['kept'])}, and {image['isolator']:.3g} of the isolator",
        "reading a row": f"{1000 * found.tokens.seconds_per_row:.3g} ms in one process",
        "gain by arithmetic": f"{prediction.speedup:.2f} times faster (fast step {prediction.fast_over_full:.2f}, "
        f"slow step {prediction.slow_over_full:.2f} of a full one; matrix products alone)",
    }
    if found.measured is None:
        return {**summary, "no step was timed": found.not_measured}
    return summary | _measured_words(found.measured)


def _measured_words(measured: Mapping[str, Any]) -> dict[str, str]:
    layers, rows, steps = measured["layers"], measured["rows"], measured["steps"]
    part = (
        f"{layers['decoder_layers']} of {layers['decoder_all']} blocks of the language model and "
        f"{layers['tower_layers']} of {layers['tower_all']} of the vision tower, scaled up"
        if measured["scaled"]
        else "whole model"
    )
    ratio = {mode: sum(steps[mode].values()) / sum(steps["plain"].values()) for mode in steps}
    return {
        "timed": f"{part}, random weights, {rows} row{'s' * (rows > 1)}, {measured['device']}",
        "shares of a plain step": _percent(measured["shares"]),
        "shares of a fast step": _percent(measured["shares_fast"]),
        "measured steps": f"fast {ratio['fast']:.2f}, slow {ratio['slow']:.2f} of a plain one, which computes "
        f"{sum(steps['plain'].values()):.3g} s",
        "expected gain": f"{measured['speedup']:.2f} times faster training "
        f"({measured['speedup_compute']:.2f} without waiting for data)",
    }


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _range(spread: Mapping[str, float]) -> str:
    least, mean, most = spread["min"], spread["mean"], spread["max"]
    return f"{mean:.4g}" if least == most else f"{mean:.4g} ({least:.4g} to {most:.4g})"
