"""The entry point: runs a command and turns errors into one clean message."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from trimtab.cli import cache_commands, house_commands, report_commands, rooms, run_commands, view_commands
from trimtab.errors import TrimtabError, TrimtabWarning

USER_ERROR = 2
"""Exit code when a setting, data or place is at fault; the same code as for a wrong option."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="trimtab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train multimodal models on fewer visual tokens and get back an ordinary checkpoint.",
    epilog="Start here: trimtab quickstart",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from trimtab import __version__

        print(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    context.obj["debug"] = debug


house_commands.add_to(app)
run_commands.add_to(app)
cache_commands.add_to(app)
report_commands.add_to(app)
view_commands.add_to(app)
rooms.add_to(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 done, 2 a setting, data or place is at fault (one message on stderr), 130 interrupted.

    Args:
        arguments: What stands behind ``trimtab``; None takes it from the process.
    """
    state: dict[str, Any] = {"debug": False}
    try:
        with _plain_warnings():
            app(args=None if arguments is None else list(arguments), prog_name="trimtab", obj=state)
    except TrimtabError as error:
        if state["debug"]:
            raise
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer turns Ctrl-C into this, without a word
            print("trimtab: interrupted.", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("trimtab: interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show our own warnings as one line without the place in our code."""
    show = warnings.showwarning

    def plain(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, TrimtabWarning):
            print(f"trimtab: warning: {message}", file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    warnings.showwarning = plain
    try:
        yield
    finally:
        warnings.showwarning = show
