"""Commands that take a run file: train, eval, check, bench; and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

from trimtab.cli import show
from trimtab.errors import SettingError

if TYPE_CHECKING:
    from trimtab.run.config import RunConfig

JSON = typer.Option(False, "--json", help="Print the record as JSON.")
CONFIG = typer.Option(None, "--config", "-c", help="The run file (YAML); may also stand as the first argument.")
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


def _load(context: typer.Context, config: Path | None) -> RunConfig:
    from trimtab.run.config import load_config

    return load_config(*_run_file(context, config))


def _run_file(context: typer.Context, config: Path | None) -> tuple[Path, list[str]]:
    """Return the run file, and what stands on the command line behind it."""
    rest = list(context.args)
    if config is None:
        if not rest or rest[0].startswith("-"):
            raise SettingError(f"{context.command_path} needs a run file: {context.command_path} --config run.yaml")
        config = Path(rest.pop(0))
    return config, rest


def train(context: typer.Context, config: Path = CONFIG, as_json: bool = JSON) -> None:
    """Train a model on the data of a run file, with DualSpeed where the file has a `dualspeed:` block.

    On several GPUs: accelerate launch -m trimtab train --config run.yaml
    """
    from trimtab.run.train import train as run

    with show.only_json(as_json):
        record = run(_load(context, config))
    if not show.first_process():
        return
    if as_json:
        show.print_json(record)
    else:
        show.print_settings("Trained", {name: value for name, value in record["results"].items() if name != "log"})


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

    file, rest = _run_file(context, config)
    settings = load_config(file, rest)
    explicit = [name.split(".")[1] for name in parse_overrides(rest) if name.startswith("dualspeed.")]
    with show.only_json(as_json), show.progress_bar("rows") as progress:
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

    settings = _load(context, config)
    with show.only_json(as_json), show.progress_bar("rows, then steps") as progress:
        record = run(settings, limit=limit, progress=progress, seconds=seconds)
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
    steps: int = typer.Option(20, min=1, help="Timed steps per mode."),
    as_json: bool = JSON,
) -> None:
    """Measure: time per step by mode, tokens and peak memory of a run file; or the pruners.

    `trimtab bench pruners` times every pruner in a batch and image by image; the arguments of
    trimtab.bench.pruners.bench_pruners may follow: --names divprune --images 16 --tokens 576.
    """
    if config is None and context.args[:1] == ["pruners"]:
        _bench_pruners(context.args[1:], as_json)
        return
    from trimtab.bench import times_faster
    from trimtab.run.bench import bench as run

    settings = _load(context, config)
    with show.only_json(as_json), show.progress_bar("steps") as progress:
        record = run(settings, steps=steps, progress=progress)
    if as_json:
        show.print_json(record)
        return
    columns = ("mode", "seconds per step", "speed (plain is 1)", "tokens", "visual tokens", "peak MiB")
    rows = [tuple(mode.values()) for mode in record["results"]["modes"]]
    show.print_table("Time per step", columns, rows)
    print(f"DualSpeed as set: {times_faster(record['results']['dualspeed_speedup'])} per step than plain training.")


def _bench_pruners(arguments: list[str], as_json: bool) -> None:
    from trimtab.bench.pruners import bench_pruners
    from trimtab.records import make_record
    from trimtab.run.config import parse_overrides
    from trimtab.run.convert import convert_all

    hints = {name: hint for name, hint in get_type_hints(bench_pruners).items() if name != "return"}
    given = convert_all("bench pruners", parse_overrides(arguments), hints)
    results = bench_pruners(**given)
    if as_json:
        show.print_json(make_record("bench_pruners", given, results, seed=results["seed"]))
        return
    title = "{images} images of {tokens} tokens, {kept} kept, {device}, {threads} threads".format(**results)
    columns = ("pruner", "batched ms", "loop ms", "loop / batched", "same picks")
    rows = [
        (name, 1000 * row["batched_s"], 1000 * row["loop_s"], row["ratio"], row["same_picks"])
        for name, row in results["pruners"].items()
    ]
    plain = results["pruners"].get("divprune")
    if plain:
        told = (1000 * plain["plain_loop_s"], plain["plain_loop_ratio"], plain["plain_loop_same_picks"])
        rows.append(("divprune, picks read back", 1000 * plain["batched_s"], *told))
    show.print_table(title, columns, rows)


def export(
    checkpoint: Path = typer.Argument(help="Directory that a run saved."),
    out: Path = typer.Argument(help="New or empty directory for the ordinary checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Write the ordinary checkpoint: no side files, adapters merged, checked with stock transformers."""
    from trimtab.run.export import export as run

    with show.only_json(as_json):
        record = run(checkpoint, out)
    if as_json:
        show.print_json(record)
    else:
        show.print_settings("Exported", record["results"])
