"""Commands that take a run file: train, eval, check, bench; and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from trimtab.cli import show, show_training
from trimtab.cli.bench_commands import run_bench
from trimtab.cli.run_files import CONFIG, JSON, load, run_file

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
HINT = "Any setting of the run file may follow and beats it: --learning_rate 1e-5 --dualspeed.keep_ratio 0.2."


def add_to(app: typer.Typer) -> None:
    """Enter the commands of this file."""
    run = {"context_settings": {**OVERRIDES, "help_option_names": ["-h", "--help"]}, "options_metavar": "[OPTIONS]"}
    table: list[tuple[str, Any, str]] = [
        ("train", train, "trimtab train --config run.yaml --learning_rate 1e-5"),
        ("eval", evaluate, "trimtab eval --config run.yaml --checkpoint out --pruned"),
        ("check", check, "trimtab check run.yaml"),
        ("bench", bench, "trimtab bench --config run.yaml --steps 20"),
    ]
    for name, function, example in table:
        app.command(name, epilog=f"{HINT}\n\nExample: {example}", **run)(function)  # type: ignore[arg-type]  # one table for all
    app.command(epilog="Example: trimtab export out exported")(export)


def train(context: typer.Context, config: Path = CONFIG, as_json: bool = JSON) -> None:
    """Train a model on the data of a run file, with DualSpeed where the file has a `dualspeed:` block.

    On several GPUs: accelerate launch -m trimtab train --config run.yaml
    """
    from trimtab.run.train import train as run

    with show.only_json(as_json), show_training.watch() as view:
        settings = load(context, config)
        record = run(settings, view)
    if not show.first_process():
        return
    if as_json:
        show.print_json(record)
    else:
        show_training.print_outcome(record, settings.output_dir)


def evaluate(
    context: typer.Context,
    config: Path = CONFIG,
    checkpoint: Path = typer.Option(None, help="Directory of the model; output_dir of the run file by default."),
    pruned: bool = typer.Option(False, "--pruned", help="Ask again, tokens pruned as in the training."),
    limit: int = typer.Option(None, min=1, help="Ask the first rows only."),
    batch_size: int = typer.Option(16, min=1, help="Questions per batch."),
    max_new_tokens: int = typer.Option(32, min=1, help="Tokens per answer at most."),
    as_json: bool = JSON,
) -> None:
    """Ask the questions of `eval_files` and count exact matches, on full visual tokens."""
    from trimtab.run.config import load_config, parse_overrides
    from trimtab.run.evaluate import evaluate as run

    with show.only_json(as_json), show.progress_bar("rows") as progress:
        file, rest = run_file(context, config)
        settings = load_config(file, rest)
        explicit = [name.split(".")[1] for name in parse_overrides(rest) if name.startswith("dualspeed.")]
        record = run(
            settings, checkpoint, pruned=pruned, explicit=explicit, limit=limit, batch_size=batch_size,
            max_new_tokens=max_new_tokens, progress=progress,
        )  # fmt: skip
    if as_json:
        show.print_json(record)
        return
    columns = ("visual tokens", "accuracy", "95 % from", "to", "questions")
    rows = [(name, r["accuracy"], *r["interval"], r["number"]) for name, r in record["results"].items()]
    show.print_table("Exact match", columns, rows)
    if record["settings"].get("isolator") is False:
        print("No isolator stands in front of the pruned images: the directory holds none, or isolator_tokens is 0.")


def check(
    context: typer.Context,
    config: Path = CONFIG,
    limit: int = typer.Option(200, min=1, help="Rows to look at."),
    seconds: float = typer.Option(40, min=0, help="Time for timing rows and steps; 0 times no step."),
    as_json: bool = JSON,
) -> None:
    """Say in under a minute whether the model works, the data is sound, and how much there is to gain."""
    from trimtab.run.check import check as run

    with show.only_json(as_json), show.progress_bar("rows, then steps") as progress:
        record = run(load(context, config), limit=limit, progress=progress, seconds=seconds)
    if as_json:
        show.print_json(record)
    else:
        show.print_settings("Check", record["results"]["summary"])
        for problem in record["results"]["problems"]:
            print(problem["message"])
        for problem in record["results"]["skipped"]:
            print(f"will be skipped: {problem['message']}")
        for sentence in record["results"]["advice"]:
            print(f"- {sentence}")
    if record["results"]["problems"] or not record["results"]["supported"]:
        raise typer.Exit(2)


def bench(
    context: typer.Context,
    config: Path = CONFIG,
    steps: int = typer.Option(None, min=1, help="Timed steps per mode, 20 by default; of `training` timed rounds, 5."),
    out: Path = typer.Option(None, help="File for the record of `training`."),
    as_json: bool = JSON,
) -> None:
    """Measure: time per step by mode, tokens and peak memory of a run file; ways to train; or the pruners.

    `trimtab bench training` compares the public recipe, the same with packing, DualSpeed as released and trimtab's, on
    random weights and the same random samples; the arguments of trimtab.run.bench_training.bench_training may follow:
    --size llava-1.5-7b --layers 8 --curves keep text. `trimtab bench pruners` times every pruner in a batch and image
    by image; those of trimtab.bench.pruners.bench_pruners may follow: --names divprune --images 16 --tokens 576.
    """
    run_bench(context, config, steps, out, as_json)


def export(
    checkpoint: Path = typer.Argument(help="Directory that a run saved."),
    out: Path = typer.Argument(help="New or empty directory for the ordinary checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Write the ordinary checkpoint: no side files, adapters merged, checked with stock transformers."""
    from trimtab.run.export import export as run

    with show.only_json(as_json), show.progress_bar("exporting") as progress:
        record = run(checkpoint, out, progress)
    if as_json:
        show.print_json(record)
    else:
        show.print_settings("Exported", record["results"])
