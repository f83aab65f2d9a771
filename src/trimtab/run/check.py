"""Before a run: does the model work, is the data sound, how much is there to gain? Without loading weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from itertools import islice
from typing import Any

from trimtab.anatomy import check_model
from trimtab.bench import SpeedModel
from trimtab.data import SupervisedCollator, validate_rows
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import DataError
from trimtab.pruners import kept_count
from trimtab.records import make_record
from trimtab.run.config import RunConfig, training_arguments
from trimtab.run.load import freeze, load_processor, load_rows_of, outline_model

SAMPLE = 8
"""Rows that are turned into a batch to count tokens."""


def check(config: RunConfig, limit: int = 200, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Check a run before it starts.

    The model is built from its configuration without weights, so this takes seconds for any size.

    Args:
        config: The settings.
        limit: Rows to look at per file.
        progress: Called with rows done and rows in all, per file.

    Returns:
        The record, kind "check": ``supported``, ``summary`` (one line per finding: model, data, tokens per row,
        predicted gain), ``problems`` (row and sentence) and ``prediction`` (see `trimtab.bench.SpeedPrediction`; None
        where the model is not supported or a row is bad).

    Raises:
        SettingError: A setting does not fit, or there is no such model.
        DataError: A data file cannot be read at all.
    """
    started, began = datetime.now(timezone.utc), time.perf_counter()
    arguments = training_arguments(config)
    model = outline_model(config)
    support = check_model(model)
    freeze(model, config.freeze)
    summary, problems = _look_at_data(config, limit, progress)
    summary = {"model": support.model_class, "supported": support.supported, "why": support.reason, **summary}
    prediction = None
    if support.supported and not problems:
        counts = _count_tokens(config)
        prediction = _predict(config, model, counts, bool(arguments.gradient_checkpointing))
        summary |= _words(counts, prediction)
    results = {
        "supported": support.supported,
        "summary": summary,
        "problems": problems,
        "prediction": None if prediction is None else vars(prediction),
    }
    seconds = time.perf_counter() - began
    return make_record("check", {**config.identity(), "limit": limit}, results, started=started, seconds=seconds)


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


def _count_tokens(config: RunConfig) -> dict[str, float]:
    """Turn the first rows into a batch; means per row of text, visual and supervised tokens, images and patches."""
    import torch

    processor = load_processor(config.model_name_or_path)
    collate = SupervisedCollator(processor, max_length=config.max_length, empty_labels="count")
    rows = list(islice(iter(load_rows_of(config.data_files, config)), SAMPLE))
    batch = collate(rows)
    real = int(batch["attention_mask"].sum())
    visual = int(torch.isin(batch["input_ids"], torch.tensor(collate.image_token_ids)).sum())
    totals = {
        "text": real - visual,
        "visual": visual,
        "labels": int((batch["labels"] != collate.ignore_index).sum()),
        "images": sum(len(row["images"]) for row in rows),
        "pixels": _pixels(batch.get("pixel_values")),
    }
    return {name: value / len(rows) for name, value in totals.items()}


def _pixels(values: Any) -> float:
    """Count the pixels that enter the tower; flat patches (Qwen) count as rows of three channels."""
    return 0.0 if values is None else float(values.numel() / 3)


def _predict(config: RunConfig, model: Any, counts: Mapping[str, float], recompute: bool) -> Any:
    if not counts["visual"]:
        raise DataError("The rows looked at hold no visual token, so there is nothing to prune. Are the images given?")
    settings = config.dualspeed or DualSpeedConfig()
    text = model.config.get_text_config()
    visual = _visual_parameters(model)
    decoder = sum(p.numel() for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.numel()
    trained = sum(p.numel() for p in visual if p.requires_grad)
    encoding = sum(p.numel() for p in visual)
    return SpeedModel(
        block_parameters=decoder,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocab=text.vocab_size,
        text_tokens=counts["text"],
        visual_tokens=counts["visual"],
        kept_tokens=_kept(counts, settings),
        isolator_tokens=settings.isolator_tokens * counts["images"],
        slow_ratio=settings.slow_ratio,
        tower_flops=2 * encoding * _patches(model, counts),
        tower_trained=trained > encoding / 2,  # a trained projector alone is a small part
        recompute=recompute,
        teacher=settings.kl_weight > 0,
    ).predict()


def _kept(counts: Mapping[str, float], settings: DualSpeedConfig) -> float:
    images = max(1.0, counts["images"])
    tokens = max(1, round(counts["visual"] / images))
    kept = tokens if settings.pruner == "keep_all" else kept_count(tokens, settings.keep_ratio, settings.keep_rule)
    return min(counts["visual"], kept * images)


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


def _words(counts: Mapping[str, float], prediction: Any) -> dict[str, Any]:
    share = counts["visual"] / (counts["visual"] + counts["text"])
    summary = {
        "text tokens per row": counts["text"],
        "visual tokens per row": counts["visual"],
        "visual share of the sequence": f"{share:.0%}",
        "cost of a fast step": f"{prediction.fast_over_full:.2f} of a full one",
        "cost of a slow step": f"{prediction.slow_over_full:.2f} of a full one",
        "predicted gain": f"{prediction.speedup:.2f} times faster training (at most; arithmetic alone)",
    }
    if prediction.speedup < 1.2:
        summary["advice"] = "little to gain: vision tower or text take most of the time. Is the tower frozen?"
    return summary
