"""Before a run: does the model work, is the data sound, how much is there to gain? Without loading weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

from trimtab.anatomy import check_model, open_host
from trimtab.bench import SpeedModel, advice, advice_on_counts, expected_gain
from trimtab.data import SupervisedCollator, validate_rows
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.dualspeed.inside import DropsInside
from trimtab.errors import DataError, setting_error
from trimtab.records import make_record
from trimtab.run.check_words import Findings, describe
from trimtab.run.config import RunConfig, training_arguments
from trimtab.run.load import image_counts, load_processor, load_rows_of, row_name
from trimtab.run.shallow import outline_to_train

SECONDS = 40.0
"""What timing may take, where nothing else is said."""
FIRST_PARTS = 0.15
"""Share of that for reading rows, and again for counting tokens."""
LEAST_READING = 2.0
"""Seconds in which rows are read even where less is said."""
REMEDY = "Correct the bad rows, or write `on_bad: skip` to train without them."


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
        The record, kind "check": ``supported``, ``summary`` (one line per finding), ``problems`` (``row``, ``kind``
        and ``message``; kind "length" for a row that training would refuse; without a row "images" where none has an
        image, and "load" where a row that was not looked at is bad), ``skipped`` (the same of rows that training leaves
        out, with ``on_bad: skip``), ``advice`` (sentences on what to correct and what keeps DualSpeed from helping),
        ``text_only`` (share of rows without image) and ``lengths_tried`` (rows that were processed). And, None where
        the model is not supported or there is a problem: ``tokens_per_image`` (least, mean and most before and after
        pruning), ``tokens_per_row``, ``prediction`` (arithmetic alone, see `trimtab.bench.SpeedPrediction`),
        ``measured`` (seconds of the parts of a step, ``speedup`` with and ``speedup_compute`` without waiting for data,
        and on what; None where no step was timed, with the reason in ``not_measured``) and ``shares`` (of a plain
        step).

    Raises:
        SettingError: A setting does not fit, or there is no such model.
        UnsupportedModelError: With `inside`, layers that are not understood.
        NotSupportedError: With `inside`, layers that tokens cannot leave between.
        DataError: A data file cannot be read at all.
    """
    if not 0 <= seconds < math.inf:
        raise setting_error("check", "seconds", "a finite number, at least 0", seconds)
    started, began = datetime.now(timezone.utc), time.perf_counter()
    arguments = training_arguments(config)
    model = outline_to_train(config)
    support = check_model(model)
    look = _look_at_data(config, limit, progress)
    summary = {"model": support.model_class, "supported": support.supported, "why": support.reason}
    if support.notes:
        summary["notes"] = " ".join(support.notes)
    if config.dualspeed is None:
        summary["settings"] = "the run file trains without DualSpeed; judged are the default settings of DualSpeed"
    found = None
    if support.supported and not look.problems:
        found = _look_at_rows(config, look, model, arguments, seconds, limit, progress)
    summary |= look.summary | {"problems": len(look.problems)} | (describe(found) if found else {})
    results = {"supported": support.supported, "summary": summary, **look.results(), **_results(found)}
    results["advice"] = [*look.advice, *results["advice"]]
    whole = time.perf_counter() - began
    settings = {**config.identity(), "limit": limit, "seconds": seconds}
    return make_record("check", settings, results, started=started, seconds=whole)


@dataclass
class _Look:
    """What was seen of the rows.

    Attributes:
        summary: Lines of the table.
        problems: What training would stop at.
        skipped: What it would leave out.
        advice: What to do about the problems.
        text_only: Share of rows without image; None where that was not counted.
        tried: Rows that were processed.
    """

    summary: dict[str, Any]
    problems: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    advice: list[str]
    text_only: float | None = None
    tried: int = 0

    def results(self) -> dict[str, Any]:
        """Return the fields of the record."""
        names = ("problems", "skipped", "text_only")
        return {**{name: getattr(self, name) for name in names}, "lengths_tried": self.tried}


def _look_at_data(config: RunConfig, limit: int, progress: Callable[[int, int], None] | None) -> _Look:
    reports = [
        validate_rows(file, image_folder=config.image_folder, limit=limit, progress=progress)
        for file in config.data_files
    ]
    bad = [[vars(p) for p in report.problems if p.kind != "aspect"] for report in reports]
    problems = [problem for found in bad for problem in found]
    layouts: dict[str, int] = {}
    for report in reports:
        for name, count in report.layouts.items():
            layouts[name] = layouts.get(name, 0) + count
    summary = {
        "rows looked at": sum(report.rows for report in reports),
        "layouts": ", ".join(f"{name} ({count})" for name, count in layouts.items()) or "none",
        "images": sum(report.images for report in reports),
        "rows that repeat": sum(report.duplicates for report in reports),
    }
    if config.on_bad == "skip":
        rows = sum(len({problem["row"] for problem in found}) for found in bad)
        return _Look({**summary, "rows that will be skipped": rows}, [], problems, [])
    return _Look(summary, problems, [], [REMEDY] if problems else [])


def _look_at_rows(
    config: RunConfig, look: _Look, model: Any, arguments: Any, seconds: float, limit: int,
    progress: Callable[[int, int], None] | None,
) -> Findings | None:  # fmt: skip
    """Process some rows and time steps on them; completes `look`. None where a row is bad or none has an image."""
    from trimtab.run.row_tokens import choose_places, count_kept, read_timed

    began = time.perf_counter()
    settings = config.dualspeed or DualSpeedConfig()
    if settings.inside is not None:
        settings = _without_inside(settings, model, look)
    collate = SupervisedCollator(
        load_processor(config.model_name_or_path), max_length=config.max_length, empty_labels="count"
    )
    try:
        rows = load_rows_of(config.data_files, config)
    except DataError as cause:  # a bad row behind those looked at, or nothing but bad rows
        look.problems.append({"row": None, "kind": "load", "message": str(cause)})
        look.advice += [REMEDY] if config.on_bad == "error" else []
        return None
    images = dict(image_counts(rows, limit)) or dict(image_counts(rows))
    look.text_only = sum(not count for count in images.values()) / len(images)
    look.summary["rows without image"] = f"{look.text_only:.0%}"
    if not any(images.values()):
        look.problems.append(_no_image(f"None of the {len(images)} rows looked at has an image"))
        return None
    tokens, batches, refused = read_timed(
        collate, rows, choose_places(images), max(LEAST_READING, FIRST_PARTS * seconds)
    )
    tokens.text_only = look.text_only
    look.tried = len(batches.keys() | refused.keys())
    look.summary["lengths tried"] = f"on {look.tried} row{'s' * (look.tried > 1)}"
    for place, reason in sorted(refused.items()):
        look.problems.append(_refusal(row_name(rows, place), rows[place]["row"], reason))
    if refused:
        return None
    if not any(row["visual"] for row in tokens.rows):
        look.problems.append(_no_image("The processor makes no visual token of the images of these rows"))
        return None
    count_kept(
        outline_to_train(config), settings, tokens, list(batches.values()), arguments.device, FIRST_PARTS * seconds
    )
    speed = _speed_model(model, tokens.per_row(), settings, bool(arguments.gradient_checkpointing))
    found = Findings(tokens, speed.predict(), not_measured="no time was given (--seconds 0)")
    if seconds:
        shown = [rows[place] for place in batches if images[place]]
        count = min(arguments.train_batch_size, len(rows))
        batch = [shown[number % len(shown)] for number in range(count)]
        used = time.perf_counter() - began
        measured, found.not_measured = _time_steps(
            model, collate, batch, speed, settings, arguments, seconds, used, progress
        )
        if measured is not None:
            found.measured, found.advice = _gain(measured, model, speed, tokens, arguments)
            return found
    found.advice = advice_on_counts(found.prediction.speedup, **_counts(speed))
    return found


def _without_inside(settings: DualSpeedConfig, model: Any, look: _Look) -> DualSpeedConfig:
    """Make sure that tokens can leave inside the model, and leave that out of what is timed and predicted."""
    DropsInside(open_host(model), settings).detach()
    look.summary["not in the estimate"] = f"tokens that leave inside the language model (inside={settings.inside!r})"
    return replace(settings, inside=None, inside_options={})


def _refusal(name: str, number: int, reason: str) -> dict[str, Any]:
    """Name the row once: the collator's own words begin with its number, but without the file."""
    own = f"Row {number}"
    message = f"{name}{reason.removeprefix(own)}" if reason.startswith(own) else f"{name}: {reason}"
    return {"row": number, "kind": "length", "message": message}


def _no_image(finding: str) -> dict[str, Any]:
    message = f"{finding}, so there is no visual token to prune. Are the images given?"
    return {"row": None, "kind": "images", "message": message}


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
    model: Any, collate: Any, rows: list[Any], speed: SpeedModel, settings: DualSpeedConfig, arguments: Any,
    seconds: float, used: float, progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Any] | None, str]:  # fmt: skip
    """Time steps on these rows where that fits into what is left of the seconds; else say why not."""
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
    chosen, reason, taken = probe.plan(
        model, work, len(rows), max(0.0, seconds - used), probe.matmul_speed(arguments.device, dtype),
        probe.free_memory(arguments.device), dtype.itemsize,
    )  # fmt: skip
    if chosen is None:
        # What came before takes its share of more seconds, too.
        enough = math.ceil(1.1 * (taken + used) / (1 - 2 * FIRST_PARTS))
        return None, f"{reason}; --seconds {enough} would do" if taken else reason
    began = time.perf_counter()
    batch = collate(rows[: chosen.rows])
    left = seconds - used - (time.perf_counter() - began)
    return probe.measure(model, batch, settings, chosen, arguments, left, progress), ""


def _gain(
    measured: dict[str, Any], model: Any, speed: SpeedModel, tokens: Any, arguments: Any
) -> tuple[dict[str, Any], list[str]]:
    """Set the measured steps against the time that their rows take to read."""
    from trimtab.run.probe import split_trouble

    steps, workers = measured["steps"], arguments.dataloader_num_workers
    data_seconds = tokens.seconds_per_row * measured["rows"]
    gain = expected_gain(steps, speed.slow_ratio, data_seconds, workers)
    sentences = advice(
        gain,
        steps,
        data_seconds=data_seconds,
        workers=workers,
        tower_trained=_tower_trained(_visual_parameters(model)),
        **_counts(speed),
    )
    trouble = split_trouble(measured)
    data = {"seconds_per_row": tokens.seconds_per_row, "seconds_per_step": data_seconds, "workers": workers}
    named = {mode: asdict(parts) for mode, parts in steps.items()}
    return {**measured, **asdict(gain), "steps": named, "data": data}, [*([trouble] if trouble else []), *sentences]


def _counts(speed: SpeedModel) -> dict[str, float]:
    return {
        "visual_share": speed.visual_tokens / (speed.visual_tokens + speed.text_tokens),
        "reduction": (speed.kept_tokens + speed.isolator_tokens) / speed.visual_tokens,
    }


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


def _results(found: Findings | None) -> dict[str, Any]:
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
