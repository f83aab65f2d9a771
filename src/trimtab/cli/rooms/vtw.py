"""What ``trimtab vtw`` does: find the layer of a task, answer with tokens withdrawn there, measure what that saves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import typer

from trimtab.cli import show
from trimtab.cli.rooms import room
from trimtab.errors import OutputError, SettingError, setting_error
from trimtab.records import make_record

HELP = "Let all visual tokens leave the language model at one layer (VTW)."

MODEL = typer.Option(..., metavar="DIR|NAME", help="Model: a directory, adapters too, or a name of the hub.")
FOLDER = typer.Option(None, help="Folder that relative image paths start from.")
DEVICE = typer.Option(None, help="Where the model runs, as torch names it; an accelerator where there is one.")
DTYPE = typer.Option("auto", help="Number format of the weights: auto (as stored), float32, bfloat16 or float16.")
POSITIONS = typer.Option("keep", help="Positions of text behind the layer: keep, or reset (no gaps).")
JSON = typer.Option(False, "--json", help="Print the record as JSON.")


def add_to(group: typer.Typer) -> None:
    """Enter the verbs."""
    group.command(epilog="Example: trimtab vtw search train.jsonl --model out --to vtw.json")(search)
    group.command(epilog="Example: trimtab vtw generate --model out --image a.png --prompt Why? --layer 9")(generate)
    group.command(epilog="Example: trimtab vtw bench train.jsonl --model out --layers 8,16,24")(bench)


def search(
    data: str = typer.Argument(help="Rows with images and answers, in any known layout."),
    model: str = MODEL,
    image_folder: Path = FOLDER,
    samples: int = typer.Option(20, min=1, help="Rows to look at, the first that hold an image."),
    threshold: float = typer.Option(0.003, help="Most mean divergence of the next word, in nats."),
    criterion: str = typer.Option("last_token", help="What is compared: last_token (the first word) or answer (each)."),
    start_layer: int = typer.Option(None, help="First layer that may be chosen; by the model's depth by default."),
    margin: float = typer.Option(0.0, help="Standard errors that are added to the mean."),
    positions: str = POSITIONS,
    sink_tokens: int = typer.Option(0, help="First visual tokens of each row that stay."),
    keep_newlines: bool = typer.Option(False, "--keep-newlines", help="Let rows stay that end a line of an image."),
    batch_size: int = typer.Option(1, min=1, help="Rows that run together."),
    stacked: bool = typer.Option(False, "--stacked", help="Run the layers to compare side by side; for GPUs."),
    task: str = typer.Option(None, help="Name of the task, kept with the settings; the data's name by default."),
    to: Path = typer.Option(None, help="File for the layer that was found; status 2 where there is none."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace that file."),
    device: str = DEVICE,
    dtype: str = DTYPE,
    as_json: bool = JSON,
) -> None:
    """Find the first layer at which visual tokens may leave without changing what the model says next."""
    from trimtab.run.ask import rows_with_images, supervised_batches
    from trimtab.run.load import default_device, load_to_use

    began = datetime.now(timezone.utc)
    settings: dict[str, Any] = {
        "threshold": threshold, "start_layer": start_layer, "criterion": criterion, "positions": positions,
        "sink_tokens": sink_tokens, "keep_newlines": keep_newlines, "stacked": stacked, "margin": margin,
        "task": Path(data).stem if task is None else task,
    }  # fmt: skip
    with show.only_json(as_json), show.progress_bar("batches") as progress:
        vtw = room("vtw")
        told_early = ("threshold", "margin", "criterion", "positions")
        vtw.search.check_search(**{name: settings[name] for name in told_early})
        if to is not None:
            _check_place(to, overwrite)
        rows = rows_with_images(data, samples, image_folder)
        place = device or default_device()
        loaded, processor = load_to_use(model, dtype=dtype, device=place)
        batches = supervised_batches(processor, rows, batch_size)
        report = vtw.search_withdrawal_layer(loaded, batches, **settings, progress=progress)
        if to is not None and report.layer is not None:
            report.save(to, overwrite=overwrite)
    if as_json:
        given = {
            "model": model, "data": data, "samples": samples, "batch_size": batch_size, "device": place,
            "dtype": dtype, **settings,
        }  # fmt: skip
        show.print_json(make_record("vtw_search", given, report.to_dict(), started=began, seconds=_since(began)))
    else:
        _print_search(report, to)
    if to is not None and report.layer is None:
        raise typer.Exit(2)


def _check_place(to: Path, overwrite: bool) -> None:
    """Raise where a file cannot be written, before long work whose outcome would be lost."""
    if to.is_dir():
        raise OutputError(f"{to} is a directory. Give a file with --to.")
    if to.exists() and not overwrite:
        raise OutputError(f"{to} is there already. Give another file with --to, or replace it with --overwrite.")
    there = next(one for one in to.absolute().parents if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError(f"{to} cannot be written: {there} is no directory that may be written. Give another --to.")


def _print_search(report: Any, to: Path | None) -> None:
    columns = ("layer", "divergence", "standard error", "same word", "prefill saved", "cache saved")
    rows = [
        (one.layer, one.mean, one.stderr, one.same_token, _percent(one.flops_saving), _percent(one.kv_saving))
        for one in report.curve
    ]
    show.print_table(f"Divergence from the whole model, {report.samples} samples", columns, rows)
    found = {
        "layer": "none" if report.layer is None else f"{report.layer} of {report.depth}",
        "threshold": report.threshold,
        "criterion": report.criterion,
        "looked from layer": report.start_layer,
        "prefill saved": _percent(report.flops_saving),
        "cache saved": _percent(report.kv_saving),
    }
    if to is not None:
        found["settings"] = "not written, since there is no layer" if report.layer is None else str(to)
    show.print_settings("Found", found)


def generate(
    model: str = MODEL,
    image: list[Path] = typer.Option(..., help="Image to show; may be given several times."),
    prompt: str = typer.Option(..., help="What is asked about it."),
    layer: int = typer.Option(None, help="Layers before this one see the image."),
    settings: Path = typer.Option(None, help="File of `trimtab vtw search --to`, in place of --layer."),
    max_new_tokens: int = typer.Option(64, min=1, help="Tokens of the answer at most."),
    compare: bool = typer.Option(False, "--compare", help="Ask the whole model, too, and time both prefills."),
    device: str = DEVICE,
    dtype: str = DTYPE,
    as_json: bool = JSON,
) -> None:
    """Answer a question about images with a model that loses its visual tokens at one layer."""
    from trimtab.run.ask import answer, prompt_batch, question_row
    from trimtab.run.load import default_device, load_to_use

    began = datetime.now(timezone.utc)
    with show.only_json(as_json), show.progress_bar("rounds") as progress:
        if (layer is None) == (settings is None):
            came = "neither" if layer is None else "both"
            raise SettingError(f"vtw generate takes --layer or --settings, but {came} came. Give one of them.")
        vtw = room("vtw")
        config = vtw.VTWConfig(layer=layer) if settings is None else vtw.VTWConfig.load(settings)
        row = question_row(image, prompt)
        place = device or default_device()
        loaded, processor = load_to_use(model, dtype=dtype, device=place)
        with vtw.withdraw(loaded, settings=config):
            results: dict[str, Any] = {"answer": answer(loaded, processor, row, max_new_tokens)}
        if compare:
            results["answer_full"] = answer(loaded, processor, row, max_new_tokens)
            kept = {name: getattr(config, name) for name in ("positions", "sink_tokens", "keep_newlines")}
            batch = prompt_batch(processor, [row])
            results["prefill"] = vtw.measure_prefill(
                loaded, batch, [config.layer], repeats=3, progress=progress, **kept
            )
    if as_json:
        given = {
            "model": model, "images": image, "prompt": prompt, "max_new_tokens": max_new_tokens,
            "withdrawal": config.to_dict(), "device": place, "dtype": dtype,
        }  # fmt: skip
        show.print_json(make_record("vtw_generate", given, results, started=began, seconds=_since(began)))
    elif compare:
        _print_comparison(results)
    else:
        print(results["answer"])


def _print_comparison(results: dict[str, Any]) -> None:
    told = results["prefill"]
    (ours,) = told["layers"]
    columns = ("visual tokens", "answer", "prefill ms", "cache MiB")
    rows = [
        ("in all layers", results["answer_full"], 1000 * told["full"]["seconds"], told["full"]["kv_bytes"] / 2**20),
        (f"to layer {ours['layer']}", results["answer"], 1000 * ours["seconds"], ours["kv_bytes"] / 2**20),
    ]
    show.print_table(f"{told['places']:,} places, {told['left']:,} leave", columns, rows)
    _print_vision(told)


def bench(
    data: str = typer.Argument(None, help="Rows with images, in any known layout; or give --image."),
    model: str = MODEL,
    image: list[Path] = typer.Option(None, help="Image to ask about, in place of data; may be given several times."),
    prompt: str = typer.Option("What is in the image?", help="What is asked about it."),
    layers: str = typer.Option(None, metavar="K,K,...", help="Layers to withdraw at; three of them by default."),
    image_folder: Path = FOLDER,
    batch_size: int = typer.Option(1, min=1, help="Rows of the batch."),
    repeats: int = typer.Option(5, min=1, help="Timed rounds."),
    positions: str = POSITIONS,
    device: str = DEVICE,
    dtype: str = DTYPE,
    as_json: bool = JSON,
) -> None:
    """Time the prefill with and without a withdrawal, side by side, and measure the memory of the cache."""
    from trimtab.run.ask import prompt_batch, question_row, rows_with_images
    from trimtab.run.load import default_device, load_to_use

    began = datetime.now(timezone.utc)
    with show.only_json(as_json), show.progress_bar("rounds") as progress:
        if (data is None) == (not image):
            came = "both" if image else "neither"
            raise SettingError(f"vtw bench takes a data file or --image, but {came} came. Give one of them.")
        wanted = None if layers is None else _whole_numbers("--layers", layers)
        rows: Sequence[Any] = (
            [question_row(image, prompt)] * batch_size if image else rows_with_images(data, batch_size, image_folder)
        )
        place = device or default_device()
        loaded, processor = load_to_use(model, dtype=dtype, device=place)
        batch = prompt_batch(processor, [rows[number] for number in range(len(rows))])
        results = room("vtw").measure_prefill(
            loaded, batch, wanted, positions=positions, repeats=repeats, progress=progress
        )
    if as_json:
        given = {
            "model": model, "data": data, "images": image or [], "prompt": prompt if image else None,
            "batch_size": len(rows), "repeats": repeats, "positions": positions, "device": place, "dtype": dtype,
        }  # fmt: skip
        show.print_json(make_record("vtw_prefill", given, results, started=began, seconds=_since(began)))
    else:
        _print_bench(results)


def _print_bench(told: dict[str, Any]) -> None:
    columns = ("visual tokens", "prefill ms", "times faster", "middle half", "by formula", "cache MiB", "cache saved")
    full = told["full"]
    rows: list[tuple[object, ...]] = [
        ("in all layers", 1000 * full["seconds"], 1.0, None, None, full["kv_bytes"] / 2**20, None)
    ]
    rows += [
        (
            f"to layer {one['layer']}", 1000 * one["seconds"], one["times"],
            f"{one['times_low']:.3g} to {one['times_high']:.3g}", one["times_formula"], one["kv_bytes"] / 2**20,
            _percent(one["kv_saving"]),
        )
        for one in told["layers"]
    ]  # fmt: skip
    title = "{rows} x {places:,} places, {left:,} leave, {depth} layers".format(**told)
    show.print_table(title, columns, rows)
    _print_vision(told)


def _print_vision(told: dict[str, Any]) -> None:
    print(f"Beside it the images take {1000 * told['vision']['seconds']:.4g} ms in the vision tower, either way.")


def _whole_numbers(option: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise setting_error("vtw bench", option, "whole numbers with commas between them, such as 8,16,24", text)
    return [int(word) for word in words]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _since(began: datetime) -> float:
    return (datetime.now(timezone.utc) - began).total_seconds()
