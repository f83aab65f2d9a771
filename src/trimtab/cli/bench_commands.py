"""What the command bench does: measure a run file's steps, whole ways to train, or the pruners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import typer

from trimtab.cli import show
from trimtab.cli.run_files import load
from trimtab.errors import SettingError


def run_bench(context: typer.Context, config: Path | None, steps: int | None, out: Path | None, as_json: bool) -> None:
    """Measure what the command line asks for and print it; see the command."""
    kind = context.args[0] if config is None and context.args else None
    if kind == "training":
        _bench_training(context.args[1:], steps, out, as_json)
    elif kind == "pruners":
        _bench_pruners(context.args[1:], out, as_json)
    else:
        _bench_steps(context, config, steps, out, as_json)


def _refuse_out(out: Path | None) -> None:
    if out is not None:
        raise SettingError("--out takes the record of `trimtab bench training`. Elsewhere, use --json > record.json.")


def _bench_steps(
    context: typer.Context, config: Path | None, steps: int | None, out: Path | None, as_json: bool
) -> None:
    from trimtab.bench import times_faster
    from trimtab.run.bench import bench as run

    with show.only_json(as_json), show.progress_bar("rounds of steps") as progress:
        _refuse_out(out)
        record = run(load(context, config), steps=steps or 20, progress=progress)
    if as_json:
        show.print_json(record)
        return
    columns = ("mode", "seconds per step", "speed (plain is 1)", "tokens", "visual tokens", "peak MiB")
    rows = [tuple(mode.values()) for mode in record["results"]["modes"]]
    show.print_table("Time per step", columns, rows)
    print(f"DualSpeed as set: {times_faster(record['results']['dualspeed_speedup'])} per step than plain training.")


def _bench_training(arguments: list[str], steps: int | None, out: Path | None, as_json: bool) -> None:
    from trimtab.records import write_record
    from trimtab.report.speed import training_tables
    from trimtab.run.bench_training import bench_training

    with show.only_json(as_json), show.progress_bar("rounds") as progress:
        given = _arguments("bench training", bench_training, arguments, without=("progress",))
        if steps is not None and "repeats" in given:
            raise SettingError(
                "--steps and --repeats are two names for the timed rounds of `bench training`. Give one."
            )
        if steps is not None:
            given["repeats"] = steps
        record = bench_training(**given, progress=progress)
    if as_json:
        show.print_json(record)
    else:
        for table in training_tables(record):
            show.print_table(table.title, table.columns, table.rows)
            for line in table.notes:
                print(line)
    if out is not None:  # last, so that a place that cannot be written costs the file only
        write_record(out, record)


def _arguments(
    owner: str, function: Callable[..., Any], arguments: Sequence[str], without: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a function that stand on the command line, in the types that it declares."""
    from trimtab.run.config import parse_overrides
    from trimtab.run.convert import convert_all

    hints = {name: hint for name, hint in get_type_hints(function).items() if name not in ("return", *without)}
    return convert_all(owner, parse_overrides(arguments), hints)


def _bench_pruners(arguments: list[str], out: Path | None, as_json: bool) -> None:
    from trimtab.bench.pruners import bench_pruners
    from trimtab.records import make_record

    with show.only_json(as_json), show.progress_bar("pruners") as progress:
        _refuse_out(out)
        given = _arguments("bench pruners", bench_pruners, arguments, without=("progress",))
        results = bench_pruners(**given, progress=progress)
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
