"""Train a model as a run file says, and leave an ordinary checkpoint, a record and the resolved settings behind."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.errors import OutputError, TrimtabError
from trimtab.files import RUN_FILE, OutputDirectory, prepare_output, read_json
from trimtab.records import make_record, read_record, write_record
from trimtab.run.checkpoints import last_checkpoint, train_from
from trimtab.run.config import RunConfig, training_arguments, write_resolved
from trimtab.run.extras import require
from trimtab.run.load import load_model, load_processor, load_rows_of, skipped_rows
from trimtab.run.pictures import draw_pictures
from trimtab.run.report_every import ReportEvery
from trimtab.run.step_times import StepTimes
from trimtab.run.train_progress import TrainView, run_facts, watch_training

RECORD_FILE = "records/train.json"
"""Where the record goes, below the output directory."""


def train(config: RunConfig, view: TrainView | None = None) -> dict[str, Any]:
    """Train, save, and record.

    Everything that can be checked without the model is checked before it is loaded.

    Args:
        config: The settings.
        view: Is told how far the training is, in place of the bar or the lines that the Trainer prints; give it in the
            first process only. None leaves the Trainer its own.

    Returns:
        The record, kind "train": ``arm`` ("dualspeed" or "full"), ``seconds_train``, ``steps``, ``samples``,
        ``rows``, ``rows_skipped``, ``loss``, ``log`` and, with DualSpeed, ``metrics``. In a resumed run the seconds
        are those of the last part. A run that had finished already is not repeated; its record is returned.

    Raises:
        SettingError: A setting does not fit.
        DataError: The data cannot be read.
        UnsupportedModelError: The model cannot train on pruned visual tokens.
        OutputError: The output directory holds another run, or the disk is full.
    """
    told = view or TrainView()
    arguments = training_arguments(config)
    told.phase("reading the data")
    rows = load_rows_of(config.data_files, config)
    eval_rows = load_rows_of(config.eval_files, config) if _evaluates(arguments) else None
    output = _prepare(config, arguments)
    if output.finished:
        return read_record(output.path / RECORD_FILE)
    checkpoint = last_checkpoint(output.path) if output.resumed else None
    told.phase("loading the model")
    model, processor = _model_to_train(config, checkpoint), load_processor(config.model_name_or_path)
    trainer = build_trainer(config, arguments, model, processor, rows, eval_rows)
    trainer.add_callback(StepTimes(getattr(trainer, "dualspeed", None)))
    if view is not None:
        samples, facts = partial(_samples, config, trainer, rows), partial(run_facts, config, trainer, rows)
        watch_training(trainer, view, samples, facts)
    report = _report_while_training(config, trainer, rows, output.path)
    started, began = datetime.now(timezone.utc), time.perf_counter()
    with _disk_errors(output.path):
        train_from(trainer, checkpoint)
        seconds = time.perf_counter() - began
        told.phase("saving the checkpoint")
        trainer.save_model(str(output.path))
        record = _record(config, trainer, rows, started, seconds)
        if trainer.is_world_process_zero():
            processor.save_pretrained(str(output.path))
            write_record(output.path / RECORD_FILE, record)
            output.finish()
    if trainer.is_world_process_zero():
        _draw_pictures(config, trainer, processor, rows, eval_rows)
        report.finish()
    return record


def _report_while_training(config: RunConfig, trainer: Any, rows: Any, directory: Path) -> ReportEvery:
    """Let a report be written every so many steps, where that is asked for."""

    def facts() -> dict[str, Any]:
        """What is known on the host."""
        found = {"arm": "dualspeed" if config.dualspeed else "full", "samples": _samples(config, trainer, rows)}
        if config.dualspeed is None:
            return found
        done = trainer.dualspeed.state_dict()
        counts = {f"{what}_{mode}": n for what in ("steps", "samples") for mode, n in done[what].items()}
        return {**found, "metrics": counts}

    report = ReportEvery(config.report_every or 0, directory, config.identity(), facts)
    if report.every:
        trainer.add_callback(report)
    return report


def _draw_pictures(config: RunConfig, trainer: Any, processor: Any, rows: Any, eval_rows: Any) -> None:
    """Draw what fast steps keep of the first images of `eval_files`, or of `data_files` where there are none."""
    if config.dualspeed is None:
        return
    # Reading with on_bad="skip" opens every image, which six pictures are not worth.
    judged = eval_rows is not None or (config.eval_files and config.on_bad == "error")
    files = config.eval_files if judged else config.data_files

    def chosen() -> Any:
        if not judged:
            return rows
        return load_rows_of(files, config) if eval_rows is None else eval_rows

    draw_pictures(Path(config.output_dir), trainer.model, processor, trainer.dualspeed.config, chosen, files)


def build_trainer(
    config: RunConfig, arguments: Any, model: Any, processor: Any, rows: Any, eval_rows: Any = None
) -> Any:
    """Build the trainer that a run file asks for.

    Args:
        config: The settings.
        arguments: What `trimtab.run.config.training_arguments` made of them.
        model: The model.
        processor: Its processor.
        rows: Rows to train on.
        eval_rows: Rows whose loss is followed, or None.

    Returns:
        A Trainer or SFTTrainer, with DualSpeed where the settings have its block.
    """
    from trimtab.data import SupervisedCollator
    from trimtab.dualspeed.cache_keys import KeyImages

    collator: Any = SupervisedCollator(processor, max_length=config.max_length)
    if config.dualspeed is not None and config.dualspeed.cache_from is not None:
        collator = KeyImages(collator)
    extra: dict[str, Any] = {}
    if config.trainer == "sft":
        rows, eval_rows = _as_dataset(rows), None if eval_rows is None else _as_dataset(eval_rows)
    base: Any = _trainer_class(config.trainer)
    if config.dualspeed is not None:
        from trimtab.dualspeed import with_dualspeed

        base, extra = with_dualspeed(base), {"dualspeed": config.dualspeed}
    return base(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
        **extra,
    )


def _trainer_class(name: str) -> Any:
    if name == "sft":
        return require("trl", "trainer: sft").SFTTrainer
    from transformers import Trainer

    return Trainer


def _as_dataset(rows: Any) -> Any:
    """Wrap rows in the class that TRL insists on; images are still opened when a row is asked for."""
    from datasets import Dataset

    def open_rows(chosen: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [rows[place] for place in chosen["place"]]
        return {name: [row[name] for row in found] for name in found[0]}

    return Dataset.from_dict({"place": list(range(len(rows)))}).with_transform(open_rows)


def _prepare(config: RunConfig, arguments: Any) -> OutputDirectory:
    """Let the first process make the output directory ready; the others wait and take it as it is."""
    with arguments.main_process_first(desc="output directory"):
        if arguments.process_index:
            path = Path(config.output_dir)
            finished = read_json(path / RUN_FILE)["status"] == "finished"  # or the first process would leave alone
            return OutputDirectory(path, resumed=config.resume, finished=finished)
        try:
            output = prepare_output(
                config.output_dir, overwrite=config.overwrite, resume=config.resume, settings=config.identity()
            )
        except OutputError as error:
            raise OutputError(f"{error} In a run file: `resume: true` or `overwrite: true`.") from error
        write_resolved(config, output.path)
    return output


def _evaluates(arguments: Any) -> bool:
    return str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no"


def _model_to_train(config: RunConfig, checkpoint: Path | None) -> Any:
    """Load the model, in a resumed run from its checkpoint.

    The Trainer loads a checkpoint by the names of the tensors as they stand in the file. transformers 5.23 writes
    those of some models that came from `from_pretrained` (LLaVA is one) under the older names of the hub, which then
    fit nothing and are passed over with a warning: the run would go on from the first weights. `from_pretrained`
    knows both names.
    """
    whole = checkpoint is not None and any(checkpoint.glob("model*.safetensors"))
    return load_model(config, checkpoint if whole else None)


def _record(config: RunConfig, trainer: Any, rows: Any, started: datetime, seconds: float) -> dict[str, Any]:
    log = [dict(entry) for entry in trainer.state.log_history]
    ends = [entry["train_loss"] for entry in log if "train_loss" in entry]
    results: dict[str, Any] = {
        "arm": "dualspeed" if config.dualspeed else "full",
        "seconds_train": round(seconds, 3),
        "steps": trainer.state.global_step,
        "samples": _samples(config, trainer, rows),
        "rows": len(rows),
        "rows_skipped": skipped_rows(rows),
        "loss": ends[-1] if ends else None,
        "log": log,
    }
    if config.dualspeed is not None:
        results["metrics"] = dict(trainer.dualspeed.metrics())
    seed = config.training.get("seed", trainer.args.seed)
    return make_record("train", config.identity(), _numbers(results), seed=seed, started=started, seconds=seconds)


def _samples(config: RunConfig, trainer: Any, rows: Any) -> int:
    """How many samples were trained on, all processes together; packs hold as many as fit."""
    if config.dualspeed is not None and config.dualspeed.pack_tokens is not None:
        epochs: float = trainer.state.epoch
        return round(epochs * len(rows))
    arguments = trainer.args
    per_step = arguments.gradient_accumulation_steps * arguments.train_batch_size * arguments.world_size
    return int(trainer.state.global_step * per_step)


def _numbers(value: Any) -> Any:
    """Replace tensors of one number by the number."""
    if isinstance(value, Mapping):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Say in our words that the disk is full, whichever library met it; what was saved before stays."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise OutputError(
                f"The disk is full while writing to {path}: {error}. Earlier checkpoints there are whole. Free some "
                "space and run the same command with --resume true."
            ) from error
        raise
