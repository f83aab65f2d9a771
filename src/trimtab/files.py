"""Writing that leaves nothing half-written: whole files, lines that survive a kill, output directories."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, OutputError, SettingError

RUN_FILE = "run.json"
"""Marker of an output directory: who made it, since when, with which settings, and whether the run finished."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all.

    The bytes go to a temporary file in the same directory, are flushed to the disk, and only then take the name.
    A reader sees the old content or the new, never a part; after an error nothing of the attempt is left.

    Args:
        path: The file; its directory is made when it is missing.
        content: The bytes.

    Raises:
        OutputError: The disk is full or the place cannot be written; names path, size and remedy.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with _clear_errors(target, len(content)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def write_text_atomic(path: str | os.PathLike[str], content: str) -> None:
    """Write a UTF-8 text file whole or not at all; see `write_bytes_atomic`.

    Raises:
        OutputError: The disk is full or the place cannot be written.
    """
    write_bytes_atomic(path, content.encode())


def write_json_atomic(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file, indented and ending in a line break, whole or not at all; see `write_bytes_atomic`.

    Raises:
        OutputError: The disk is full or the place cannot be written.
        ValueError: The content holds NaN or infinity, which JSON does not know.
        TypeError: The content holds something that JSON does not know.
    """
    write_text_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file is missing, unreadable, truncated or not JSON; the message names place and remedy.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. Check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file ({error.reason}). Give a JSON file.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not whole JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "It may have been cut off while it was written; delete it or make it again."
        ) from error


class JsonLines:
    """A file that grows by one JSON object per line and survives a kill.

    Each line is handed to the operating system at once. A last line that an earlier process left unfinished is
    cut off when the file is opened, so that the next line starts clean.

    Args:
        path: The file; made with its directory when it is missing.

    Raises:
        OutputError: The file cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _clear_errors(self.path, 0):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("a+b", buffering=0)
            self._stream.seek(0)
            self._stream.truncate(_whole_length(self._stream.read()))

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            OutputError: The disk is full; the lines before stay readable.
            ValueError: The row holds NaN or infinity.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with _clear_errors(self.path, len(line)):
            start = self._stream.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._stream.write(line) :]
            except OSError:
                self._stream.truncate(start)
                raise

    def close(self) -> None:
        """Flush to the disk and close; a second call does nothing."""
        if not self._stream.closed:
            with _clear_errors(self.path, 0), self._stream:
                os.fsync(self._stream.fileno())

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a file of `JsonLines`; an unfinished last line is ignored, a missing file reads as empty.

    Raises:
        DataError: A finished line is not a JSON object; the message names its number.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. Check its permissions.") from error
    rows = []
    for number, line in enumerate(content[: _whole_length(content)].splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}. Mend or delete that line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} must be an object, but a {type(row).__name__} came.")
        rows.append(row)
    return rows


def _whole_length(content: bytes) -> int:
    """Return how many bytes belong to lines that were finished."""
    return content.rfind(b"\n") + 1


@dataclass(frozen=True)
class OutputDirectory:
    """An output directory that is ready to be written.

    Attributes:
        path: The directory.
        resumed: Whether an earlier run was found there and is to be continued.
        finished: Whether that earlier run had come to its end.
    """

    path: Path
    resumed: bool = False
    finished: bool = False

    def finish(self) -> None:
        """Note in ``run.json`` that the run came to its end.

        Raises:
            OutputError: The note cannot be written.
        """
        state = read_json(self.path / RUN_FILE)
        write_json_atomic(self.path / RUN_FILE, {**state, "status": "finished", "ended": _now()})


def prepare_output(
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> OutputDirectory:
    """Make an output directory ready, without losing what somebody else put there.

    An empty or missing directory gets ``run.json`` with the status "running". With several processes only the
    first one calls this.

    Args:
        directory: Where a run is to write.
        overwrite: Start anew. What an earlier run left there is deleted, except entries that were there before
            that run; in a directory that is not ours nothing is deleted and files of the same name are replaced.
        resume: Continue the run that is there, or start where none is.
        settings: What makes two runs the same run, as JSON values; kept in ``run.json``. A run is resumed only
            with equal settings.

    Returns:
        The directory and the state it was found in; call its `finish` at the end.

    Raises:
        SettingError: `overwrite` and `resume` together.
        OutputError: The directory holds a run, or other files, and nothing was said about it; or its settings
            differ; or it cannot be written.
    """
    if overwrite and resume:
        raise SettingError("overwrite and resume exclude each other, but both came. Give one of them.")
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise OutputError(f"The output directory {path} is a file. Choose another directory.")
    with _clear_errors(path, 0):
        path.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry.name for entry in path.iterdir())
    fresh = {"made_by": "trimtab", "status": "running", "started": _now(), "settings": _as_json(settings or {})}
    if RUN_FILE in entries:
        return _reopen(path, fresh, overwrite, resume)
    if entries and not overwrite:
        raise OutputError(
            f"{path} is not empty ({len(entries)} entries, for example {entries[0]!r}) and holds no run of trimtab. "
            "Choose another directory, or allow overwriting: nothing is deleted, files of the same name are replaced."
        )
    write_json_atomic(path / RUN_FILE, {**fresh, "before": entries})
    return OutputDirectory(path)


def _reopen(path: Path, fresh: dict[str, Any], overwrite: bool, resume: bool) -> OutputDirectory:
    """Decide about a directory that has a ``run.json``."""
    state = _run_state(path)
    if overwrite:
        before = state.get("before", [])
        _clear(path, {*before, RUN_FILE})
        write_json_atomic(path / RUN_FILE, {**fresh, "before": before})
        return OutputDirectory(path)
    finished = state["status"] == "finished"
    if not resume:
        what = "a finished run" if finished else "a run that did not finish"
        raise OutputError(
            f"{path} holds {what} of {state.get('started', 'unknown date')}. "
            f"{'Look at it again' if finished else 'Continue it'} with resume, start anew with overwrite, "
            "or choose another directory."
        )
    _same_settings(path, state.get("settings", {}), fresh["settings"])
    return OutputDirectory(path, resumed=True, finished=finished)


def _run_state(path: Path) -> dict[str, Any]:
    state = read_json(path / RUN_FILE)
    if not (isinstance(state, dict) and state.get("made_by") == "trimtab" and "status" in state):
        raise OutputError(f"{path / RUN_FILE} was not written by trimtab. Choose another output directory.")
    return state


def _same_settings(path: Path, kept: Mapping[str, Any], came: Mapping[str, Any]) -> None:
    for name in sorted({*kept, *came}):
        if kept.get(name) != came.get(name):
            raise OutputError(
                f"The run in {path} has {name}={kept.get(name)!r}, but {came.get(name)!r} came. Resume with the same "
                "settings, start anew with overwrite, or choose another directory."
            )


def _clear(path: Path, spared: set[str]) -> None:
    with _clear_errors(path, 0):
        for entry in path.iterdir():
            if entry.name in spared:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


@contextmanager
def _clear_errors(path: Path, size: int) -> Iterator[None]:
    """Turn the operating system's errors into ours, with path, size and remedy."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        amount = f" ({size:,} bytes)" if size else ""
        remedy = "Check that the directory exists and may be written, or choose another."
        if error.errno in _FULL:
            remedy = f"{_free_space(path)} Free some space or choose another output directory, then resume."
        raise OutputError(f"Cannot write {path}{amount}: {error.strerror or error}. {remedy}") from error


def _free_space(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free:,} bytes are free there."
    except OSError:
        return "The disk is full."


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as they will read back, so that tuples and lists compare equal."""
    return dict(json.loads(json.dumps(dict(settings), allow_nan=False)))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
