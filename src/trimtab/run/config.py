"""The settings of a run: names of transformers' TrainingArguments, a few of ours, and one ``dualspeed:`` block."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import SettingError, setting_error
from trimtab.files import write_text_atomic
from trimtab.run.convert import convert
from trimtab.run.run_file import parse_value, read_run_file

RESOLVED_FILE = "resolved.yaml"
"""Name of the file in the output directory that holds the settings the run really had."""

LOGGING_STEPS = 10
"""Optimizer steps from log to log where the settings name none; 500, as transformers has it, shows losses too late."""

TRAINERS = ("trainer", "sft")
ON_BAD = ("error", "skip")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_NOT_OF_THE_RUN = ("resume", "overwrite", "report_every")
_TAKEN = {
    "do_train": "the command says what is done",
    "do_eval": "the command says what is done",
    "do_predict": "the command says what is done",
    "resume_from_checkpoint": "write `resume: true`, which continues from the last checkpoint in output_dir",
    "local_rank": "the launcher sets it",
    "remove_unused_columns": "trimtab's collator needs all columns and sets it to false",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a run, from a run file and the command line.

    Attributes:
        model_name_or_path: Directory or hub name of a vision-language model of transformers.
        data_files: Files to train on, JSON or JSON lines in any layout that `trimtab.load_rows` reads.
        output_dir: Where model, record and resolved settings go.
        eval_files: Files to evaluate on, same layouts.
        image_folder: Folder that relative image paths start from; None for the folder of the data file.
        on_bad: What to do with a bad row: ``"error"`` stops, ``"skip"`` leaves it out and counts it in the record.
        max_length: Longest sequence in tokens, visual ones included; None for no limit.
        attn_implementation: Attention of transformers, for example ``"sdpa"``; None lets transformers choose.
        dtype: Number format of the weights: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        freeze: Parts that are not trained, by dotted name or a piece of one, for example ``["vision_tower"]``.
        lora: Fields of ``peft.LoraConfig`` (extra ``peft``), for example ``{"r": 16}``; None trains whole weights.
        trainer: ``"trainer"`` for transformers' Trainer, ``"sft"`` for TRL's SFTTrainer (extra ``trl``).
        resume: Continue the run that is in `output_dir`.
        overwrite: Start anew in an `output_dir` that holds a run.
        report_every: Optimizer steps after which ``report.html`` in `output_dir` is written anew while the training
            runs, so that it can be watched; None or 0 for no report.
        training: Fields of TrainingArguments (SFTConfig for ``sft``) that were given.
        dualspeed: Settings of DualSpeed, or None for plain training on full tokens.
    """

    model_name_or_path: str
    data_files: list[str]
    output_dir: str
    eval_files: list[str] = field(default_factory=list)
    image_folder: str | None = None
    on_bad: str = "error"
    max_length: int | None = None
    attn_implementation: str | None = None
    dtype: str = "auto"
    freeze: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    trainer: str = "trainer"
    resume: bool = False
    overwrite: bool = False
    report_every: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    dualspeed: DualSpeedConfig | None = None

    def __post_init__(self) -> None:
        """Check what a type alone does not say."""
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name).strip():
                raise setting_error("RunConfig", name, "a name or path", getattr(self, name))
        if not self.data_files:
            raise setting_error("RunConfig", "data_files", "at least one file", self.data_files)
        if self.max_length is not None and self.max_length < 1:
            raise setting_error("RunConfig", "max_length", "at least 1, or null", self.max_length)
        if self.report_every is not None and self.report_every < 0:
            raise setting_error("RunConfig", "report_every", "at least 1, or 0 or null for none", self.report_every)
        for name, allowed in (("trainer", TRAINERS), ("dtype", DTYPES), ("on_bad", ON_BAD)):
            if getattr(self, name) not in allowed:
                raise setting_error("RunConfig", name, f"one of {', '.join(allowed)}", getattr(self, name))
        if self.resume and self.overwrite:
            raise SettingError("RunConfig.resume and RunConfig.overwrite exclude each other, but both are true.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in the flat form of a run file; `load_config` reads it back to an equal object."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("training", "dualspeed")}
        block = self.dualspeed.to_dict() if self.dualspeed else False
        return {**own, **self.training, "dualspeed": block}

    def identity(self) -> dict[str, Any]:
        """Return what makes two runs the same run: everything but `resume`, `overwrite` and `report_every`."""
        return {name: value for name, value in self.to_dict().items() if name not in _NOT_OF_THE_RUN}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file; what the command line says beats it.

    Args:
        path: The run file, see `trimtab.run.run_file`.
        overrides: Arguments such as ``["--learning_rate", "1e-5", "--dualspeed.keep_ratio", "0.2"]``.

    Returns:
        The checked settings.

    Raises:
        SettingError: The file cannot be read, a key is unknown (the nearest is named), or a value does not fit.
    """
    settings = merge(read_run_file(path), parse_overrides(overrides))
    return build_config(settings, str(path))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``--name value``, ``--name=value``, ``--name a b`` (a list) and ``--name`` (true).

    Args:
        arguments: What stood on the command line behind the command's own options.

    Returns:
        Name -> value; dotted names stay dotted, dashes become underscores.

    Raises:
        SettingError: A value without a name before it, or a name given twice.
    """
    found: dict[str, list[str]] = {}
    current = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            current = name.replace("-", "_")
            if current in found:
                raise SettingError(f"--{name} stands twice on the command line. Give it once.")
            found[current] = [value] if equals else []
        elif current:
            found[current].append(argument)
        else:
            raise SettingError(f"{argument!r} has no setting before it. Write --name value, for example --seed 1.")
    return {name: _value(values) for name, values in found.items()}


def _value(values: list[str]) -> Any:
    parsed = [parse_value(value) for value in values]
    return True if not parsed else parsed[0] if len(parsed) == 1 else parsed


def merge(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay overrides over settings; a dotted name reaches into its block.

    Args:
        settings: The run file's.
        overrides: The command line's, see `parse_overrides`.

    Returns:
        The merged settings; neither argument is changed.
    """
    merged = dict(settings)
    for name, value in overrides.items():
        block, dot, inner = name.partition(".")
        if dot:
            under = merged.get(block)
            merged[block] = merge(under if isinstance(under, Mapping) else {}, {inner: value})
        else:
            merged[name] = value
    return merged


def build_config(settings: Mapping[str, Any], source: str = "the run file") -> RunConfig:
    """Check and convert flat settings.

    Args:
        settings: Key -> value, as in a run file.
        source: What to call them in messages.

    Returns:
        The settings.

    Raises:
        SettingError: A key is missing or unknown, or a value does not fit its field.
    """
    own = {
        name: hint for name, hint in typing.get_type_hints(RunConfig).items() if name not in ("training", "dualspeed")
    }
    given = {name: convert(source, name, settings[name], hint) for name, hint in own.items() if name in settings}
    for name in ("model_name_or_path", "data_files", "output_dir"):
        if given.get(name) is None:
            raise SettingError(f"{source} lacks {name}. Add a line `{name}: ...`.")
    rest = {name: value for name, value in settings.items() if name not in own and name != "dualspeed"}
    hints = training_hints(given.get("trainer", "trainer"))
    training = {name: _training_value(source, name, value, hints, {*own, "dualspeed"}) for name, value in rest.items()}
    return RunConfig(**given, training=training, dualspeed=_dualspeed(source, settings.get("dualspeed")))


def training_hints(trainer: str) -> dict[str, Any]:
    """Return the fields that a trainer's arguments take, with their types.

    Args:
        trainer: A name of `TRAINERS`; another one gets the fields of ``"trainer"``.
    """
    if trainer == "sft":
        from trimtab.run.extras import require

        arguments = require("trl", "trainer: sft").SFTConfig
    else:
        arguments = _stock_arguments()
    return {name: hint for name, hint in typing.get_type_hints(arguments).items() if name in _init_names(arguments)}


def _stock_arguments() -> Any:
    from trimtab.anatomy.host_library import explain_import_errors

    with explain_import_errors("TrainingArguments of transformers"):
        from transformers import TrainingArguments

    return TrainingArguments


def _init_names(arguments: Any) -> set[str]:
    return {f.name for f in fields(arguments) if f.init}


def _training_value(source: str, name: str, value: Any, hints: Mapping[str, Any], own: set[str]) -> Any:
    if name in _TAKEN:
        raise SettingError(f"{source}: {name} is not for run files: {_TAKEN[name]}.")
    if name not in hints:
        raise SettingError(f"Unknown setting {name!r} in {source}.{_nearest(name, {*hints, *own})}")
    return convert(source, name, value, hints[name])


def _nearest(name: str, known: set[str]) -> str:
    inner = [f.name for f in fields(DualSpeedConfig)]
    if name in inner:
        return f" It belongs into the block `dualspeed:` (on the command line --dualspeed.{name})."
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known are the fields of TrainingArguments, of trimtab.run.config.RunConfig, and `dualspeed:`."


def _dualspeed(source: str, block: Any) -> DualSpeedConfig | None:
    if block is None or block is False:
        return None
    if block is True:
        return DualSpeedConfig()
    if not isinstance(block, Mapping):
        raise setting_error(source, "dualspeed", "a block of settings, true or false", block)
    hints = typing.get_type_hints(DualSpeedConfig)
    plain = {**hints, "pruner_options": dict[str, Any], "inside_options": dict[str, Any]}
    values = {n: convert(f"{source}: dualspeed", n, v, plain[n]) if n in plain else v for n, v in block.items()}
    return DualSpeedConfig.from_dict(values)


def write_resolved(config: RunConfig, directory: str | Path) -> Path:
    """Write the settings as they are, whole or not at all, so that ``trimtab train --config`` repeats the run.

    Args:
        config: The settings.
        directory: The output directory.

    Returns:
        The path of the file.

    Raises:
        OutputError: The file cannot be written.
    """
    path = Path(directory) / RESOLVED_FILE
    settings = replace(config, resume=False, overwrite=False).to_dict()
    write_text_atomic(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return path


def training_arguments(config: RunConfig) -> Any:
    """Build the arguments of the trainer.

    Args:
        config: The settings.

    Returns:
        TrainingArguments, or SFTConfig with ``trainer: sft``.

    Raises:
        SettingError: A batch of less than one row; or transformers refuses a value or a combination, and its words
            are passed on.
    """
    rows = config.training.get("per_device_train_batch_size")
    if rows is not None and rows < 1:
        raise setting_error("RunConfig", "per_device_train_batch_size", "at least 1", rows)
    settings = {**config.training, "output_dir": config.output_dir, "remove_unused_columns": False}
    settings.setdefault("logging_steps", LOGGING_STEPS)
    if config.trainer == "sft":
        from trimtab.run.extras import require

        arguments = require("trl", "trainer: sft").SFTConfig
        # Rows reach trimtab's collator as they are; TRL would tokenise them before.
        settings["dataset_kwargs"] = {**(settings.get("dataset_kwargs") or {}), "skip_prepare_dataset": True}
        settings["max_length"] = config.max_length
    else:
        arguments = _stock_arguments()
    try:
        return arguments(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise SettingError(f"transformers refuses these settings: {error}") from error
