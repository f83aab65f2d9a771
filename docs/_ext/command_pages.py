"""The command line as Markdown, read from the typer application itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from trimtab.cli.app import app

HELP = "--help"


def command_sections() -> str:
    """Return a section for every command, in the order of `trimtab --help`; the verbs of a method have one each."""
    return "\n\n".join(_section(name, command) for name, command in _commands(typer.main.get_command(app)))


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        elif not command.hidden:
            yield f"{before}{name}", command


def _section(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    parts = [f"## trimtab {name}", inspect.cleandoc(command.help or "").replace("\f", "")]
    parts += [_example(command.epilog or "")]
    if arguments:
        parts.append(_table("Argument", [(_metavar(one), one.help, _default(one)) for one in arguments]))
    parts.append(_table("Option", [(_spelling(one), one.help, _default(one)) for one in options]))
    return "\n\n".join(part for part in parts if part)


def _example(epilog: str) -> str:
    """Return the end of a command's help: what it says, and its examples as code."""
    said = []
    for line in filter(None, map(str.strip, inspect.cleandoc(epilog).splitlines())):
        start, colon, example = line.partition("Example: ")
        said.append(f"{start}\n\n```bash\n{example}\n```" if colon else line)
    return "\n\n".join(said)


def _table(kind: str, rows: list[tuple[str, str | None, str]]) -> str:
    lines = [f"| {kind} | What it does | Default |", "|---|---|---|"]
    lines += [f"| `{name}` | {_cell(what or '')} | {default} |" for name, what, default in rows]
    return "\n".join(lines)


def _metavar(argument: Any) -> str:
    return (argument.metavar or argument.name.upper()).strip("[]") + ("..." if argument.nargs == -1 else "")


def _spelling(option: Any) -> str:
    return ", ".join(sorted(option.opts, key=len, reverse=True))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "must be given"
    value = parameter.default
    value = value() if callable(value) else value
    return "" if value is None or value is False or value == () else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
