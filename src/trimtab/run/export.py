"""The ordinary checkpoint of a run: what stock transformers writes, checked by loading it with stock transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, OutputError, SettingError
from trimtab.records import make_record
from trimtab.run.extras import require
from trimtab.run.load import ADAPTER_FILE, load_processor

PARTS = 4
"""Parts of an export that its progress counts."""


def export(
    checkpoint_dir: str | Path, out_dir: str | Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write the ordinary checkpoint: model, configuration and processor, nothing else.

    Side files stay behind and adapters are merged. The result takes the name `out_dir` only after it was loaded
    again and every tensor was found equal.

    Args:
        checkpoint_dir: Output directory of a run, or a checkpoint in it.
        out_dir: A new or empty directory.
        progress: Called with parts done and parts in all: loading, writing, loading again, comparing.

    Returns:
        The record, kind "export": ``model_class``, ``tensors``, ``parameters``, ``missing_keys``,
        ``unexpected_keys`` (both 0), ``merged_adapters``, ``files``.

    Raises:
        SettingError: `checkpoint_dir` holds no model.
        DataError: Its tensors do not fit its configuration.
        OutputError: `out_dir` is not empty, or cannot be written.
    """
    source, target = Path(checkpoint_dir), Path(out_dir)
    _require_model(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is not an empty directory. Export into a new one; nothing is overwritten.")
    done = progress or (lambda part, parts: None)
    model, merged = _load(source)
    done(1, PARTS)
    with _whole_directory(target) as part:
        model.save_pretrained(str(part))
        load_processor(source).save_pretrained(str(part))
        done(2, PARTS)
        again = _load_checked(part)
        done(3, PARTS)
        _require_equal(model, again)
    done(4, PARTS)
    results = {
        "model_class": type(again).__name__,
        "tensors": len(again.state_dict()),
        "parameters": sum(p.numel() for p in again.parameters()),
        "missing_keys": 0,
        "unexpected_keys": 0,
        "merged_adapters": merged,
        "files": sorted(path.name for path in target.iterdir()),
    }
    return make_record("export", {"checkpoint_dir": source, "out_dir": target}, results)


def _require_model(source: Path) -> None:
    if not source.is_dir():
        raise SettingError(f"There is no directory {str(source)!r}. Name the output directory of a run.")
    if not any((source / name).is_file() for name in ("config.json", ADAPTER_FILE)):
        inside = sorted(path.name for path in source.glob("checkpoint-*"))
        hint = f" Its checkpoints can be exported: {', '.join(inside)}." if inside else " Has the run finished?"
        raise SettingError(f"{source} holds no model (neither config.json nor {ADAPTER_FILE}).{hint}")


def _load(source: Path) -> tuple[Any, bool]:
    """Load a model as stock transformers does, with adapters merged; also return whether there were any."""
    if not (source / ADAPTER_FILE).is_file():
        return _load_checked(source), False
    peft = require("peft", f"{ADAPTER_FILE} in {source}")
    base = json.loads((source / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    merged = peft.PeftModel.from_pretrained(_load_checked(base), str(source)).merge_and_unload()
    return merged, True


def _load_checked(source: str | Path) -> Any:
    """Load with stock transformers; missing, unexpected or misshapen tensors are an error."""
    from transformers import AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText  # its types do not know output_loading_info
    try:
        model, info = loader.from_pretrained(str(source), dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of another shape
        raise DataError(f"transformers cannot load {source}: {error}") from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}" for kind, keys in wrong.items() if keys)
        raise DataError(
            f"The tensors in {source} do not fit its config.json ({told}). Is it another model's directory?"
        )
    return model


def _require_equal(model: Any, again: Any) -> None:
    import torch

    ours, theirs = model.state_dict(), again.state_dict()
    differing = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    if differing or len(ours) != len(theirs):
        raise OutputError(
            f"The exported tensors differ from the run's, for example {differing[:1]}. Is the disk sound?"
        )


@contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """Fill a directory beside the target, which takes its name at the end; after an error nothing is left."""
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if target.exists():
            target.rmdir()
        os.replace(part, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"Cannot write {target}: {error.strerror or error}. Choose another place.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
