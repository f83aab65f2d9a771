"""Records: what was done, with what, on what, and what came out, as JSON that stands on its own."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from trimtab.errors import DataError, SettingError
from trimtab.files import read_json, write_json_atomic

SCHEMA = 1
"""Version of the form below; raised when a field changes its meaning."""

MARK = "trimtab_record"
"""Key that tells a record from any other JSON file; its value is the schema version."""

PACKAGES = ("trimtab", "torch", "transformers", "accelerate", "datasets", "trl", "peft", "numpy", "pillow")

_SCRIPTS = ("bench", "docs", "examples", "experiments")
"""Folders of the repository whose scripts are named as the command of a record."""

_SECRET = re.compile(r"(?:^|[-_])(?:token|secret|password|passwd|api[-_]?key)$", re.IGNORECASE)
"""How an option is named whose value stays out of records; `pack_tokens` is none."""

_PATH = re.compile(r"""(?<![^\s=,\[{('"])(?:~|/(?!/)|[A-Za-z]:[\\/])[^\s,'"\]})]*""")
"""A path inside a word of a command that starts at a root."""

_FIELDS: dict[str, tuple[type, ...]] = {
    MARK: (int,),
    "kind": (str,),
    "settings": (dict,),
    "results": (dict,),
    "seed": (int, type(None)),
    "started": (str,),
    "seconds": (int, float, type(None)),
    "peak_memory_mib": (int, float, type(None)),
    "commit": (dict, type(None)),
    "versions": (dict,),
    "hardware": (dict,),
}


def make_record(
    kind: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    seed: int | None = None,
    started: datetime | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Gather a record of something that was just done in this process.

    No host name, user name or absolute path enters: absolute paths among the settings become relative to the
    working directory, or bare names where they lie outside it. Tensors and arrays become lists, NaN and infinity
    become null.

    Args:
        kind: What sort of record it is, for example ``"arm"``.
        settings: Everything that must be known to do it again.
        results: What came out.
        seed: The seed, or None where nothing was drawn.
        started: When it began, with a time zone; now by default.
        seconds: How long it took.

    Returns:
        The record, ready for `write_record`: schema version, kind, settings, results, seed, start (ISO 8601,
        UTC), seconds, peak resident memory of this process in MiB, git commit of trimtab (None outside its
        repository), versions, hardware, and the command that this process is (see `own_command`; None for others).

    Raises:
        SettingError: An empty kind, or a start without a time zone.
    """
    if not kind:
        raise SettingError("A record's kind must be a word, but '' came. Name what was done, for example 'arm'.")
    if started is not None and started.tzinfo is None:
        raise SettingError(
            f"A record's start must have a time zone, but {started} came. Use datetime.now(timezone.utc)."
        )
    begin = (started or datetime.now(timezone.utc)).astimezone(timezone.utc)
    return {
        MARK: SCHEMA,
        "kind": kind,
        "settings": _plain(settings, portable=True),
        "results": _plain(results, portable=False),
        "seed": seed,
        "started": begin.isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(float(seconds), 3),
        "peak_memory_mib": _peak_memory(),
        "commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "command": own_command(),
    }


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all.

    Raises:
        DataError: It is not a record; see `check_record`.
        OutputError: The file cannot be written.
    """
    write_json_atomic(path, check_record(record, str(path)))


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one record.

    Raises:
        DataError: The file is missing, truncated, no record, or of a newer schema.
    """
    return check_record(read_json(path), str(path))


def read_records(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read all records of a directory and of its ``records`` folder, sorted by path; other JSON files are passed over.

    Raises:
        DataError: No such directory, a JSON file in it is truncated, or it holds no record.
    """
    root = Path(directory)
    files = sorted([*root.glob("*.json"), *root.glob("records/*.json")])
    contents = [(str(path), read_json(path)) for path in files]
    records = [check_record(c, name) for name, c in contents if isinstance(c, dict) and MARK in c]
    if not records:
        raise DataError(f"{root} holds no record ({len(files)} JSON files seen). Give the output directory of a run.")
    return records


def check_record(content: Any, name: str = "record") -> dict[str, Any]:
    """Return the content if it is a record of a schema this version knows.

    Args:
        content: What was read or is to be written.
        name: What to call it in messages.

    Raises:
        DataError: A field is missing or of a wrong type, or the schema is newer.
    """
    if not isinstance(content, Mapping) or MARK not in content:
        raise DataError(f"{name} is not a trimtab record (no {MARK!r} field). Give a file that write_record made.")
    if isinstance(content[MARK], int) and content[MARK] > SCHEMA:
        raise DataError(f"{name} has schema {content[MARK]}, but this trimtab knows up to {SCHEMA}. Upgrade trimtab.")
    for field, kinds in _FIELDS.items():
        value = content.get(field, ...)
        if not isinstance(value, kinds) or isinstance(value, bool):
            came = "nothing" if value is ... else type(value).__name__
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{name}: field {field!r} must be {allowed}, but {came} came. Make the record again.")
    command = content.get("command")
    if command is not None and not (isinstance(command, list) and all(isinstance(word, str) for word in command)):
        raise DataError(f"{name}: field 'command' must be a list of words or null. Make the record again.")
    return dict(content)


def own_command() -> list[str] | None:
    """Return the command that this process is, so that somebody else can give it again.

    Only `trimtab` itself and scripts of this repository are named: what a test, a notebook or somebody's own script
    was called with repeats nothing. Paths that start at a root become relative to the working directory or bare
    names, and values of options such as ``--hub_token`` become ``***``. Several processes are told as accelerate
    starts them.

    Returns:
        The words of the command, or None.
    """
    program = _program()
    if program is None:
        return None
    words = _portable_words(sys.argv[1:])
    processes = os.environ.get("WORLD_SIZE", "1")
    if not processes.isdigit() or int(processes) < 2:
        return [*(["trimtab"] if program == "trimtab" else ["python", program]), *words]
    launch = ["accelerate", "launch", "--num_processes", processes]
    return [*launch, *(["-m", "trimtab"] if program == "trimtab" else [program]), *words]


def _program() -> str | None:
    """Return "trimtab", the path of a script within the repository, or None."""
    main: Any = sys.modules.get("__main__")
    module = getattr(getattr(main, "__spec__", None), "name", None)
    if module in ("trimtab", "trimtab.__main__"):
        return "trimtab"
    file = getattr(main, "__file__", None)
    if module is not None or not file:
        return None
    if Path(file).stem == "trimtab" and Path(file).suffix in ("", ".exe"):
        return "trimtab"
    path, root = Path(os.path.abspath(file)), Path(__file__).resolve().parents[2]
    if not path.is_relative_to(root) or not (root / "src" / "trimtab").is_dir():
        return None
    inside = path.relative_to(root)
    return inside.as_posix() if inside.parts[0] in _SCRIPTS else None


def _portable_words(words: Sequence[str]) -> list[str]:
    told: list[str] = []
    secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        if secret and not word.startswith("--"):
            told.append("***")
            secret = False
            continue
        secret = bool(_SECRET.search(name)) and word.startswith("-") and not equals
        hidden = equals and word.startswith("-") and _SECRET.search(name)
        told.append(f"{name}=***" if hidden else _portable_word(word))
    return told


def _portable_word(word: str) -> str:
    """Return a word whose paths tell nothing about this machine; the part before an equals sign stays."""
    whole = word.startswith(("/", "~")) and os.path.exists(os.path.expanduser(word))  # it may hold spaces
    return portable_path(word) if whole else _PATH.sub(lambda found: portable_path(found[0]), word)


def git_commit() -> dict[str, Any] | None:
    """Return ``{"hash", "dirty"}`` of the repository that tracks this package, or None where none does."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parent, "status", "--porcelain")
    return None if head is None else {"hash": head, "dirty": bool(changes)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, without importing any."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return processor, cores this process may use, memory in GiB, accelerator and CPU threads of torch.

    Torch is asked only if it is loaded already; without it accelerator and threads are None.
    """
    torch: Any = sys.modules.get("torch")
    return {
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": _accelerator(torch) if torch else None,
        "threads": torch.get_num_threads() if torch else None,
    }


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "cpu model"))]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _accelerator(torch: Any) -> str | None:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return "Apple GPU" if torch.backends.mps.is_available() else None


def _peak_memory() -> float | None:
    """Return the highest resident memory of this process so far in MiB."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _plain(value: Any, *, portable: bool) -> Any:
    """Return the value in JSON's types, with portable paths if asked."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, portable=portable) for key, item in value.items()}
    if isinstance(value, PurePath) or (portable and isinstance(value, str)):
        return portable_path(str(value))
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (Sequence, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_plain(item, portable=portable) for item in items]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), portable=portable)
    raise DataError(f"A record cannot hold a {type(value).__name__}. Give numbers, words, lists and mappings of them.")


def portable_path(text: str) -> str:
    """Return a path without what tells about this machine: relative to the working directory, or its bare name.

    Text that is no path from a root stays as it is.
    """
    if not text.startswith(("/", "~")) and not PurePath(text).is_absolute():
        return text
    path = Path(os.path.abspath(os.path.expanduser(text)))
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name
