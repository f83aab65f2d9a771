"""The command that serves the live view."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import webbrowser
from pathlib import Path

import typer


def add_to(app: typer.Typer) -> None:
    """Enter the command of this file."""
    app.command(epilog="Example: trimtab view --model out --image picture.png --image another.jpg")(view)


def view(
    model: str = typer.Option(None, metavar="DIR|NAME", help="Model to look through and to ask; pixels without one."),
    image: list[Path] = typer.Option(None, help="Image to begin with; may be given several times."),
    port: int = typer.Option(None, help="Port on this machine; a free one by default."),
    no_open: bool = typer.Option(False, "--no-open", help="Do not open the browser."),
    as_json: bool = typer.Option(False, "--json", help="Print the address as JSON first, on one line."),
) -> None:
    """Show in the browser which visual tokens of an image stay, and what the model then answers.

    Only this machine is served, and nothing leaves it. Ends with Ctrl-C.
    """
    from trimtab.cli import show
    from trimtab.view import serve

    def announce(url: str) -> None:
        print(json.dumps({"url": url}) if as_json else f"The view is at {url}\nIt ends with Ctrl-C.", flush=True)
        if not no_open:
            # Some systems wait for the browser to end.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    # Ctrl-C is the usual end here, not an interruption.
    with show.error_document(as_json), contextlib.suppress(KeyboardInterrupt):
        serve(model, image or (), port, announce=announce)
    print("trimtab: the view has ended.", file=sys.stderr)
