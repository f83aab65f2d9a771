"""Model, processor and rows of a run, with words for what commonly goes wrong while loading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from trimtab.anatomy.host_library import torchvision_trouble
from trimtab.errors import HostLibraryError, SettingError, UnsupportedModelError, near_miss, setting_error
from trimtab.run.config import RunConfig
from trimtab.run.extras import require

ADAPTER_FILE = "adapter_config.json"
"""File that tells a directory of PEFT adapters from one of a whole model."""


def load_processor(name: str | Path) -> Any:
    """Load the processor of a model.

    Args:
        name: Directory or hub name.

    Returns:
        What ``AutoProcessor.from_pretrained`` returns.

    Raises:
        SettingError: There is no such model here or, offline, in the cache.
        HostLibraryError: The processor needs torchvision, which is missing or built for another torch.
    """
    with _explained(str(name)):
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(str(name))


def load_model(config: RunConfig, name: str | Path | None = None) -> Any:
    """Load the model of a run, with its adapters and frozen parts.

    Args:
        config: The settings; `dtype`, `attn_implementation`, `lora` and `freeze` are applied.
        name: Directory or hub name; `config.model_name_or_path` by default.

    Returns:
        The model, in training mode.

    Raises:
        SettingError: There is no such model, or a name of `freeze` fits nothing.
        UnsupportedModelError: It is no vision-language model of transformers.
        MissingExtraError: `lora` is set and peft is not installed.
    """
    source = str(name or config.model_name_or_path)
    with _explained(source):
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=config.dtype, attn_implementation=config.attn_implementation
        )
    freeze(model, config.freeze)
    return with_lora(model, config.lora).train()


def outline_model(config: RunConfig) -> Any:
    """Build the model of a run from its configuration, without weights and without memory for them.

    Args:
        config: The settings.

    Returns:
        The model on the "meta" device.

    Raises:
        SettingError: There is no such model.
        UnsupportedModelError: It is no vision-language model of transformers.
    """
    import torch

    with _explained(config.model_name_or_path), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForImageTextToText

        settings = AutoConfig.from_pretrained(config.model_name_or_path)
        chosen: dict[str, Any] = {} if config.dtype == "auto" else {"dtype": config.dtype}
        return AutoModelForImageTextToText.from_config(
            settings, attn_implementation=config.attn_implementation, **chosen
        )


def freeze(model: Any, names: Sequence[str]) -> int:
    """Switch the training of parts of a model off.

    Args:
        model: The model.
        names: Dotted names, or whole pieces of them: ``"vision_tower"`` fits ``model.vision_tower.encoder...``.

    Returns:
        How many parameters were frozen, counted once.

    Raises:
        SettingError: A name fits no parameter; the nearest piece is named.
    """
    frozen: dict[str, int] = {}
    for name in names:
        fitting = {path: p for path, p in model.named_parameters() if f".{name}." in f".{path}."}
        if not fitting:
            pieces = {piece for path, _ in model.named_parameters() for piece in path.split(".") if not piece.isdigit()}
            raise SettingError(f"freeze: {name!r} fits no parameter of the model. {near_miss(name, pieces)}")
        for path, parameter in fitting.items():
            parameter.requires_grad_(False)
            frozen[path] = parameter.numel()
    return sum(frozen.values())


def with_lora(model: Any, settings: dict[str, Any] | None) -> Any:
    """Put LoRA adapters into a model.

    Args:
        model: The model.
        settings: Fields of ``peft.LoraConfig``, or None for no adapters.

    Returns:
        The model, wrapped by PEFT where there are settings.

    Raises:
        SettingError: An unknown field, or target modules that fit nothing.
    """
    if settings is None:
        return model
    peft = require("peft", "lora: ...")
    known = set(peft.LoraConfig.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise SettingError(f"Unknown setting {name!r} of lora. {near_miss(name, known)}")
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**settings))
    except (ValueError, TypeError) as error:
        raise SettingError(f"lora: peft cannot use these settings: {error}") from error


def load_rows_of(files: Sequence[str], config: RunConfig) -> Any:
    """Read the rows of data files, one file after the other.

    Args:
        files: `data_files` or `eval_files`.
        config: Gives `image_folder` and `on_bad`.

    Returns:
        The rows of the one file, or of all joined.

    Raises:
        DataError: A file is missing, truncated or of no known layout, or a row is bad and not to be skipped.
    """
    from torch.utils.data import ConcatDataset

    from trimtab.data import load_rows

    parts = [load_rows(file, image_folder=config.image_folder, on_bad=config.on_bad) for file in files]
    return parts[0] if len(parts) == 1 else ConcatDataset(cast(Any, parts))


def image_counts(rows: Any, limit: int | None = None) -> Iterator[tuple[int, int]]:
    """Count the images of each row without opening any.

    Args:
        rows: What `load_rows_of` returned.
        limit: Count in the first rows of each file only.

    Yields:
        Place among the rows, and images of that row.
    """
    from trimtab.data import to_messages

    first = 0
    for part in getattr(rows, "datasets", [rows]):
        for number, place in enumerate(part.places):
            if limit is not None and place >= limit:
                break
            outline = part.source.outline(place)
            yield first + number, len(to_messages(outline, where=part.source.where(place))["images"])
        first += len(part)


def row_name(rows: Any, place: int) -> str:
    """Name a row of what `load_rows_of` returned as errors of the data do: file and line, or file and row."""
    for part in getattr(rows, "datasets", [rows]):
        if place < len(part):
            return str(part.source.where(part.places[place]))
        place -= len(part)
    raise IndexError(place)


def skipped_rows(rows: Any) -> int:
    """Count the bad rows that were left out of what `load_rows_of` returned."""
    return sum(len(part.skipped) for part in getattr(rows, "datasets", [rows]))


def load_trained(directory: str | Path, config: RunConfig) -> tuple[Any, Any]:
    """Load what a run saved, whole model or adapters, with its processor.

    Args:
        directory: The output directory, or a checkpoint in it.
        config: Gives `dtype` and `attn_implementation`.

    Returns:
        Model in evaluation mode, and processor.

    Raises:
        SettingError: There is no model in the directory.
    """
    path = Path(directory)
    if not path.is_dir():
        raise SettingError(f"There is no directory {str(path)!r} with a model. Train first, or name another directory.")
    bare = replace(config, lora=None, freeze=[])
    if not (path / ADAPTER_FILE).is_file():
        return load_model(bare, path).eval(), load_processor(path)
    peft = require("peft", f"{ADAPTER_FILE} in {path}")
    base = peft.PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    return peft.PeftModel.from_pretrained(load_model(bare, base), str(path)).eval(), load_processor(path)


def load_to_use(
    name: str | Path, *, dtype: str = "auto", attn_implementation: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """Load a model to be asked, without a run file: what a run saved, whole model or adapters, or one of the hub.

    Args:
        name: Directory or hub name.
        dtype: As in `RunConfig`.
        attn_implementation: As in `RunConfig`.
        device: Where the model goes, as torch names it; None leaves it where it was loaded, on the CPU.

    Returns:
        Model in evaluation mode, and processor.

    Raises:
        SettingError: There is no such model, or no such device.
        UnsupportedModelError: It is no vision-language model of transformers.
        HostLibraryError: The processor needs torchvision, which is missing or built for another torch.
    """
    given = str(name)
    config = RunConfig(  # which names data; none is read here
        model_name_or_path=given, data_files=["none"], output_dir=given, dtype=dtype,
        attn_implementation=attn_implementation,
    )  # fmt: skip
    if device is not None:
        check_device(device)
    if Path(given).is_dir():
        model, processor = load_trained(given, config)
    else:
        model, processor = load_model(config).eval(), load_processor(given)
    return (model if device is None else model.to(device)), processor


def default_device() -> str:
    """Return the accelerator of this machine as torch names it, or ``"cpu"``."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(found)


def check_device(device: str) -> None:
    """Raise where a device cannot be used.

    Raises:
        SettingError: torch does not know it, or it is not on this machine.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = f"a device of torch that is on this machine, such as {default_device()!r}"
        raise setting_error("load", "device", allowed, device, _first_line(error)) from error


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Say in our words why loading failed."""
    if Path(source).is_dir() and not any(Path(source).glob("*config.json")):
        raise SettingError(f"The directory {source!r} holds no model: there is no config.json in it.")
    try:
        yield
    except OSError as error:
        raise SettingError(_not_found(source, error)) from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise HostLibraryError(_host_trouble(source, error)) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"{source!r} cannot be loaded as a vision-language model of transformers: {error}"
        ) from error


def _not_found(source: str, error: OSError) -> str:
    if Path(source).is_dir():
        return f"The directory {source!r} does not hold all that transformers needs: {error}"
    if Path(source).exists():
        return f"model_name_or_path must be a directory or a hub name, but {source!r} is a file."
    return (
        f"There is no model {source!r}: it is no directory here, and the hub could not give it ({_first_line(error)}). "
        "Name a directory with config.json, or go online once so that the model comes into the cache."
    )


def _host_trouble(source: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {_first_line(error)}"
    if trouble := torchvision_trouble(error):
        return f"{source!r} cannot be loaded ({text}). {trouble}"
    return f"{source!r} cannot be loaded with the transformers that is installed ({text}). Try a newer transformers."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
