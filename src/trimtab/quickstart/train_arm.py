"""Train one arm from the common start, judge it on all visual tokens, and write its record."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trimtab.dualspeed import attach, prune_for_inference, with_dualspeed
from trimtab.errors import TrimtabWarning
from trimtab.evaluate import exact_match
from trimtab.files import JsonLines, read_json_lines, write_text_atomic
from trimtab.quickstart.arms import Arm
from trimtab.quickstart.step_memory import step_memory
from trimtab.quickstart.task import Conversations, PadConversations, Progress, StepTold, Task, clear_folder, open_start
from trimtab.records import make_record, read_record, write_record
from trimtab.run.checkpoints import last_checkpoint, step_of, train_from

STEP_LOG = "steps.jsonl"


def train_arm(
    task: Task,
    arm: Arm,
    seed: int,
    *,
    start: Path,
    folder: Path,
    record_path: Path,
    data: Callable[[], Conversations],
    progress: Progress,
    steps: int | None = None,
    save_every: int = 50,
    keep_model: bool = True,
    told: StepTold | None = None,
) -> dict[str, Any]:
    """Train and judge one arm, or return its record where that was done before.

    An interrupted call is continued from its last checkpoint; steps of the log after that checkpoint are dropped.

    Args:
        task: The task.
        arm: The arm.
        seed: Seed of the order of the data, of the schedule and of the isolator.
        start: Folder of `make_start`.
        folder: Where checkpoints and the final model go.
        record_path: Where the record goes.
        data: Returns the tokenised training data; called only where training is to be done.
        progress: Called with what is being done, how much is done and how much there is.
        steps: Steps other than the task's.
        save_every: Steps between checkpoints.
        keep_model: Whether to keep the final model.
        told: Called with the arm and the line of the log after every step.

    Returns:
        The record, of kind "arm".
    """
    if record_path.exists():
        return read_record(record_path)
    steps = steps or task.steps
    began = time.perf_counter()
    trainer = _make_trainer(task, arm, seed, start, folder, steps, save_every, data(), progress, told)
    last = _resume_point(folder, last_checkpoint(folder))
    with JsonLines(folder / STEP_LOG) as trainer.log_lines:
        train_from(trainer, last)
    trainer.save_model(str(folder / "model"))
    log = read_json_lines(folder / STEP_LOG)
    seconds = sum(entry["seconds"] for entry in log)
    config = arm.config(seed, **task.dualspeed)
    results = {
        "arm": arm.name,
        "dataset": task.name,
        "steps": steps,
        "samples": steps * task.batch_size,
        "seconds_train": seconds,
        "log": log,
        **step_memory(trainer, task.batch_size),
        **judge_arm(task, trainer, folder, progress),
    }
    settings = {**task.settings(), "dualspeed": config.to_dict() if config else None, "arm": arm.name, "steps": steps}
    record = make_record("arm", settings, results, seed=seed, seconds=time.perf_counter() - began)
    write_record(record_path, record)
    for checkpoint in folder.glob("checkpoint-*"):
        clear_folder(checkpoint)  # the record is written, so nothing will resume from it
    if not keep_model:
        clear_folder(folder)
    return record


def judge_arm(task: Task, trainer: Any, folder: Path, progress: Progress) -> dict[str, Any]:
    """Ask all test questions: with all visual tokens, as a user of the checkpoint would, and with pruned ones.

    Returns:
        ``accuracy_full`` and ``accuracy_pruned`` (None for an arm that never saw pruned tokens; of every image the same
        share is kept, whatever the training did).
    """
    model, processor = open_start(folder / "model")
    common: dict[str, Any] = {"batch_size": 64, "max_new_tokens": 2, "wrong_examples": 8}
    full = exact_match(model, processor, task.test, progress=lambda d, n: progress("answers", d, n), **common)
    pruned = None
    if trainer.dualspeed is not None and not trainer.dualspeed.config.drops_nothing:
        config = replace(trainer.dualspeed.config, keep_spread="fixed")
        with without_advice():
            handle = attach(model, config)
        if handle.isolator is not None:
            handle.isolator.load(folder / "model")
        common["progress"] = lambda d, n: progress("answers, pruned", d, n)
        if config.inside is None:
            pruned = exact_match(model, processor, task.test, prepare=handle.prune_inputs, **common)
        else:  # tokens leave in generate() itself
            with prune_for_inference(model, handle):
                pruned = exact_match(model, processor, task.test, **common)
        handle.detach()
    return {"accuracy_full": full, "accuracy_pruned": pruned}


def _make_trainer(
    task: Task,
    arm: Arm,
    seed: int,
    start: Path,
    folder: Path,
    steps: int,
    save_every: int,
    data: Conversations,
    progress: Progress,
    told: StepTold | None,
) -> Any:
    model, processor = open_start(start)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=1,
        seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )
    log = StepLog(arm.name, progress, told)
    with without_advice():
        trainer = with_dualspeed(_Measured)(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=PadConversations(processor.tokenizer.pad_token_id),
            processing_class=processor,
            callbacks=[log],
            dualspeed=arm.config(seed, **task.dualspeed),
        )
    trainer.remove_callback(PrinterCallback)
    log.trainer = trainer
    return trainer


@contextmanager
def without_advice() -> Iterator[None]:
    """Attach without the advice on slow_ratio=0 and fresh isolators: the arms are there to show what they cost."""
    logger = logging.getLogger("trimtab")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="slow_ratio=0", category=TrimtabWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


class _Measured(Trainer):  # type: ignore[misc]
    """A Trainer that keeps the loss of its last forward call."""

    last_loss: Any = None
    log_lines: JsonLines | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Has the trainer write one line per step: mode, losses, visual tokens and seconds.

    The seconds span everything between two ends of a step, data included, without the writing of checkpoints. Where
    every sample has its mode, that of the step is "mixed", and the line has the losses of both and how many were slow.

    Args:
        arm: Name of the arm, for the progress.
        progress: Called with the arm, the step and the number of steps.
        told: Called with the arm and the line, with how many ``samples`` there were.
    """

    def __init__(self, arm: str, progress: Progress, told: StepTold | None = None) -> None:
        self.arm, self.progress, self.told = arm, progress, told
        self.trainer: Any = None
        self.mark = 0.0
        self.slow_samples = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        if self.trainer.dualspeed is not None:
            self.slow_samples = self.trainer.dualspeed.metrics().get("samples_slow", 0)
        self.mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the line of a step."""
        seconds = time.perf_counter() - self.mark
        entry = {"step": state.global_step, "seconds": round(seconds, 5), **self._losses()}
        self.trainer.log_lines.append(entry)
        if self.told is not None:
            self.told(self.arm, {**entry, "samples": args.per_device_train_batch_size})
        self.progress(self.arm, state.global_step, state.max_steps)
        self.mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the writing of a checkpoint out of the next step's seconds."""
        self.mark = time.perf_counter()

    def _losses(self) -> dict[str, Any]:
        loss = round(self.trainer.last_loss.item(), 5)
        if self.trainer.dualspeed is None:
            return {"mode": "full", "loss": loss, "ce": loss}
        found = self.trainer.dualspeed.metrics()
        slow = found.get("samples_slow", 0) - self.slow_samples
        self.slow_samples += slow
        # What a step did not measure is in the metrics as the last one that did left it.
        kl = found["kl"] if found["mode"] == "slow" or slow else None
        parts = {}
        if found["mode"] == "mixed":
            by_mode = {"ce_fast": slow < self.trainer.args.per_device_train_batch_size, "ce_slow": slow > 0}
            parts = {n: round(found[n], 5) if now else None for n, now in by_mode.items()} | {"slow_samples": slow}
        names = ("visual_tokens_full", "visual_tokens_kept", "visual_tokens_deep")
        return {
            "mode": "full" if self.trainer.dualspeed.config.drops_nothing else found["mode"],
            "loss": loss,
            "ce": round(found["ce"], 5),
            "kl": kl,
            **parts,
            **{n: found[n] for n in names if n in found},
        }


def _resume_point(folder: Path, last: Path | None) -> Path | None:
    """Drop the lines of steps that a run resumed from a checkpoint takes again, and return that checkpoint.

    Where the log lacks steps before it, their times stand nowhere else: the arm begins anew.
    """
    path = folder / STEP_LOG
    reached = 0 if last is None else step_of(last) or 0
    entries = read_json_lines(path) if path.exists() else []
    kept = [entry for entry in entries if entry["step"] <= reached]
    if len(kept) != reached:
        kept, last = [], None
        for checkpoint in folder.glob("checkpoint-*"):
            clear_folder(checkpoint)
    if path.exists():
        # Whole or not at all, for the same reason.
        write_text_atomic(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
    return last
