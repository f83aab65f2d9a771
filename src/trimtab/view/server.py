"""The socket, the folder for images, the start and the end of the live view."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.errors import MissingExtraError, OutputError, SettingError, setting_error

LOOPBACK = "127.0.0.1"
"""The only address that is served; there is no setting for another."""

STOP_SECONDS = 2
"""How long open connections may take to end."""

FONTS = (["system-ui", "sans-serif"], ["ui-monospace", "monospace"])
"""Fonts of the user's machine; Gradio's own themes would fetch theirs."""


def serve(
    model: str | None = None,
    images: Sequence[str | Path] = (),
    port: int | None = None,
    *,
    announce: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the live view until it is interrupted.

    Only this machine is served, below a token that is new at each start. Uploads lie in a folder of their own that
    only this user can read and that is gone at the end.

    Args:
        model: Directory or hub name of a model to look through; None looks at the pixels of patches.
        images: Files to begin with; without any, a scene that trimtab draws.
        port: Port; None or 0 for a free one.
        announce: Called with the address as soon as the page can be opened.

    Raises:
        MissingExtraError: Gradio is not installed.
        SettingError: The port is taken or outside its range, or there is no such model.
        DataError: A file is no image that the view takes.
    """
    require_gradio()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending_on_terminate())  # loading takes long, and the folder is there already
        listening = stack.enter_context(_listen(port))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-view-"))).resolve()
        stack.enter_context(_gradio_settings(folder))
        token = secrets.token_urlsafe(32)
        server = _server(_application(model, images, folder, token, listening.getsockname()[1]))
        announce(f"http://{LOOPBACK}:{listening.getsockname()[1]}/{token}/")
        server.run(sockets=[listening])


def require_gradio() -> None:
    """Say how to get Gradio where it is missing.

    Raises:
        MissingExtraError: It is not installed.
    """
    if find_spec("gradio") is None:
        raise MissingExtraError("`trimtab view` needs the package gradio. Install it: pip install 'trimtab[view]'.")


def _application(model: str | None, images: Sequence[str | Path], folder: Path, token: str, port: int) -> Any:
    from trimtab.view.desk import Desk, load
    from trimtab.view.gate import Gate
    from trimtab.view.page import build_page

    given = _given(images, folder)
    desk = Desk(None if model is None else load(model))
    title = "Looking at the pixels of patches." if model is None else f"Looking through the model {model}."
    return Gate(_mounted(build_page(desk, given, title), token), token, port, folder)


def _mounted(page: Any, token: str) -> Any:
    """Mount the page below its token, with all that Gradio offers beside it switched off."""
    import gradio as gr
    from fastapi import FastAPI

    from trimtab.view.style import CSS
    from trimtab.view.uploads import MAX_BYTES

    page.queue(api_open=False)
    texts, codes = FONTS
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None), page, path=f"/{token}", root_path=f"/{token}",
        server_name=LOOPBACK, footer_links=[], run_history=False, allowed_paths=[], max_file_size=MAX_BYTES,
        ssr_mode=False, show_error=False, enable_monitoring=False, pwa=False, mcp_server=False, css=CSS,
        theme=gr.themes.Base(font=texts, font_mono=codes),
    )  # fmt: skip


def _server(gate: Any) -> Any:
    import uvicorn

    # Without an access log the token is written nowhere.
    server = uvicorn.Server(
        uvicorn.Config(
            gate, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )  # fmt: skip
    stock = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        gate.close()
        stock(number, frame)

    # uvicorn alone would wait for pages that stay open.
    server.handle_exit = handle_exit  # type: ignore[assignment, method-assign]
    return server


def _given(images: Sequence[str | Path], folder: Path) -> list[tuple[str, Path]]:
    from trimtab.view.uploads import keep_image

    if not images:
        return [("a scene of trimtab", keep_image(_scene(), "the scene", folder))]
    found = []
    for image in images:
        try:
            found.append((Path(image).name, keep_image(Path(image).read_bytes(), str(image), folder)))
        except OSError as error:
            raise SettingError(
                f"--image must be a file that can be read, but {str(image)!r} came ({error.strerror})."
            ) from error
    return found


def _scene() -> bytes:
    """Draw a picture to begin with."""
    import io

    from trimtab.data.scenes import make_scenes

    stream = io.BytesIO()
    make_scenes("test", 1)[0]["image"].save(stream, format="PNG")
    return stream.getvalue()


@contextlib.contextmanager
def _listen(port: int | None) -> Iterator[socket.socket]:
    if port is not None and not 0 <= port < 2**16:
        raise setting_error("view", "port", "in 0..65535", port)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        if os.name == "posix":  # a port of a view that just ended can be had again; elsewhere the option means more
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, port or 0))
            listening.listen()  # from now on a browser waits for the page
        except OSError as error:
            raise OutputError(
                f"Port {port} of {LOOPBACK} cannot be used ({error.strerror}). Choose another with --port, or leave it "
                "out for a free one."
            ) from error
        yield listening


@contextlib.contextmanager
def _gradio_settings(folder: Path) -> Iterator[None]:
    """Set what Gradio reads from the environment, and put back what was there.

    Settings of the user for other apps, which may open folders or ports, do not count here.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    for name in before:
        del os.environ[name]
    os.environ.update(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False")
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _ending_on_terminate() -> Iterator[None]:
    """Let a request to end (SIGTERM, or SIGHUP of a terminal that is closed) run what removes the folder.

    While uvicorn runs it takes SIGTERM itself, and hands it on when it has stopped.
    """

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop what the first one began
        raise SystemExit(128 + number)

    def hang_up(number: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    wanted: dict[int, Callable[[int, Any], None]] = {signal.SIGTERM: end}
    hanging_up = getattr(signal, "SIGHUP", None)
    if hanging_up is not None and signal.getsignal(hanging_up) is not signal.SIG_IGN:  # nohup ignores it
        wanted[hanging_up] = hang_up
    try:
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    except ValueError:  # not in the main thread, where no signal comes
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
