"""Ask a trained model the questions of a run's `eval_files`, on full visual tokens and, if asked, on pruned ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.errors import SettingError
from trimtab.evaluate import exact_match
from trimtab.records import make_record, read_record, write_record
from trimtab.run.config import RunConfig
from trimtab.run.load import load_rows_of, load_trained
from trimtab.run.pictures import draw_pictures
from trimtab.run.train import RECORD_FILE as TRAIN_RECORD

if TYPE_CHECKING:
    from trimtab.dualspeed import PrunedInference

RECORD_FILE = "records/eval.json"
ARM_FILE = "records/arm.json"
"""Training and evaluation of one run together, as `trimtab report` shows them."""


def evaluate(
    config: RunConfig,
    checkpoint: str | Path | None = None,
    *,
    pruned: bool = False,
    explicit: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate by generation and exact match.

    Args:
        config: The settings; `eval_files` must be there.
        checkpoint: Directory of the model; `output_dir` by default.
        pruned: Ask a second time on the tokens that the fast mode sees: with the settings that the model was trained
            with and behind its isolator, where the directory holds them; else with those of `config` and no isolator.
        explicit: Fields of `config.dualspeed` that beat those of the training.
        limit: Ask the questions of the first rows only.
        batch_size: Questions per batch.
        max_new_tokens: Tokens per answer at most.
        progress: Called with rows done and in all; starts again for the second pass.

    Returns:
        The record, kind "eval", also written below the directory: ``full`` and, if asked, ``pruned``, each as
        `trimtab.exact_match` returns it. After a pruned pass ``settings`` hold the settings of DualSpeed it really had
        and ``isolator``, whether there was one. Where the directory holds the record of a training, a record of kind
        "arm" joins both, without the pruned pass where `explicit` changed it.

    Raises:
        SettingError: There are no `eval_files`, or no model in the directory.
        DataError: The rows cannot be read.
    """
    if not config.eval_files:
        raise SettingError("eval needs eval_files, but the run file has none. Add `eval_files: test.jsonl`.")
    directory = Path(checkpoint or config.output_dir)
    found = load_rows_of(config.eval_files, config)
    rows = _first(found, limit)
    model, processor = load_trained(directory, config)
    started = datetime.now(timezone.utc)
    ask: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": progress}
    results = {"full": exact_match(model, processor, rows, **ask)}
    used: dict[str, Any] = {}
    if pruned:
        with _pruned(model, config, directory, explicit) as handle:
            results["pruned"] = exact_match(model, processor, rows, prepare=handle.prune_inputs, **ask)
            used = {"dualspeed": handle.config.to_dict(), "isolator": handle.isolator is not None}
    asked = {"checkpoint": directory, "limit": limit, "max_new_tokens": max_new_tokens}
    settings = {**config.identity(), **used, **asked}
    seconds = sum(result["seconds"] for result in results.values())
    record = make_record("eval", settings, results, started=started, seconds=seconds)
    write_record(directory / RECORD_FILE, record)
    # Tokens pruned otherwise than in the training say nothing about the arm.
    _write_arm(directory, config, {"full": results["full"]} if explicit else results)
    trained = _trained_settings(config, directory)
    if trained is not None:
        draw_pictures(directory, model, processor, trained, lambda: found, config.eval_files)
    return record


def _trained_settings(config: RunConfig, directory: Path) -> DualSpeedConfig | None:
    """Settings that the model was trained with, or those of the run file; None for plain training."""
    from trimtab.dualspeed.inference import saved_settings, settings_folder

    if settings_folder(directory) is not None:
        return saved_settings(directory)[0]
    trained = directory / TRAIN_RECORD
    if trained.is_file() and not read_record(trained)["settings"].get("dualspeed"):
        return None  # whatever the run file says, the command line said otherwise
    return config.dualspeed


def _first(rows: Any, limit: int | None) -> Any:
    """Return the first rows without reading any of them."""
    from torch.utils.data import Subset

    return rows if limit is None else Subset(rows, range(min(limit, len(rows))))


def _pruned(model: Any, config: RunConfig, directory: Path, explicit: Sequence[str] = ()) -> PrunedInference:
    """Prune as in the training of the model, but for `explicit` fields; or as the run file says, without isolator."""
    from trimtab.dualspeed import prune_for_inference
    from trimtab.dualspeed.inference import saved_settings, settings_folder

    given = config.dualspeed or DualSpeedConfig()
    if settings_folder(directory) is None:
        return prune_for_inference(model, replace(given, isolator_tokens=0, isolator_from=None))
    trained, folder = saved_settings(directory)
    # Options belong to what they are options of.
    fields = {*explicit, *(f"{name}_options" for name in ("pruner", "inside") if name in explicit)}
    chosen = replace(trained, **{name: getattr(given, name) for name in fields})
    place = chosen.isolator_from or folder
    return prune_for_inference(model, replace(chosen, isolator_from=None), place if chosen.isolator_tokens else None)


def _write_arm(directory: Path, config: RunConfig, results: dict[str, Any]) -> None:
    if not (directory / TRAIN_RECORD).is_file():
        return
    trained = read_record(directory / TRAIN_RECORD)
    told = {name: trained["results"][name] for name in ("arm", "seconds_train", "samples", "steps", "log")}
    told["log"] = [entry for entry in told["log"] if "step" in entry]
    told["dataset"] = ", ".join(Path(file).stem for file in config.eval_files)
    told["accuracy_full"] = results["full"]
    if "pruned" in results:
        told["accuracy_pruned"] = results["pruned"]
    arm = make_record("arm", trained["settings"], told, seed=trained["seed"], seconds=trained["seconds"])
    write_record(directory / ARM_FILE, arm)
