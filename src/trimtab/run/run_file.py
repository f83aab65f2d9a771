"""Reading run files: YAML without its traps.

PyYAML reads YAML 1.1, where ``2e-5`` is a string, ``no`` is false, ``010`` is eight and ``1:30`` is ninety, and where
the last of two equal keys silently wins. Here scalars follow the core schema of YAML 1.2, and equal keys are an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import SettingError

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2 that refuses equal keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own protocol)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; equal keys are an error."""
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise SettingError(f"line {line}: the key {key!r} stands on line {seen[key]} already. Remove one.")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Build a whole number; a leading zero does not make it octal."""
        return int(node.value)


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def read_run_file(path: str | Path) -> dict[str, Any]:
    """Read a run file.

    Args:
        path: A YAML file of ``key: value`` lines.

    Returns:
        The settings as they stand, unchecked.

    Raises:
        SettingError: The file is missing, empty, not text, not YAML, not a mapping, or holds a key twice.
    """
    text = _read_text(Path(path))
    try:
        settings = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SettingError(f"{path}: {_explain(error)}") from error
    except SettingError as error:
        raise SettingError(f"{path}, {error}") from None
    if settings is None:
        raise SettingError(f"{path} is empty. It needs at least model_name_or_path, data_files and output_dir.")
    if not isinstance(settings, dict):
        raise SettingError(f"{path} must hold 'key: value' lines, but holds a {type(settings).__name__}.")
    for key in settings:
        if not isinstance(key, str):
            raise SettingError(f"{path}: the key {key!r} must be the name of a setting.")
    return settings


def parse_value(text: str) -> Any:
    """Read one value of the command line as YAML would read it; text that is no YAML stays as it is."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SettingError(f"There is no run file {str(path)!r}. Name an existing YAML file.") from error
    except (IsADirectoryError, PermissionError) as error:
        raise SettingError(f"{str(path)!r} cannot be read as a run file: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 text (byte {error.start}). Is it a YAML file?") from error


def _explain(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    parts = [getattr(error, name, None) for name in ("context", "problem")]
    problem = ", ".join(part for part in parts if part) or str(error)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    hint = " YAML indents with spaces, never with tabs." if "'\\t'" in problem else ""
    return f"{place}{problem}.{hint}"
