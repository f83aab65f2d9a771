"""What reaches the page at all, and the headers of every reply.

Everything that a browser or another program sends passes here before Gradio sees it, in this order:

1. The Host header names this server. A page of another site whose name was made to point here (DNS rebinding) sends
   its own name and is refused.
2. The first part of the path is the token, compared in constant time. Anything else is "not found".
3. The Origin header, where there is one, is this server: no other site may send requests from the user's browser.
4. The route is one that the page needs. Gradio has many more (proxying, file serving, an own programming interface);
   what is not used is not reachable.
5. Bodies are counted while they come in. Uploads are checked by `trimtab.view.uploads` and never reach Gradio.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import DataError
from trimtab.view.uploads import MAX_BYTES, keep_image

UPLOAD = "gradio_api/upload"
RUN = "gradio_api/run/predict"
FILE = "gradio_api/file="

READ = re.compile(
    r"|config|theme\.css|(assets|static)/.+|gradio_api/(startup-events|heartbeat/\w+|upload_progress|file=.+)"
)
"""Routes of the page that are read, below the token."""

SENT = re.compile(rf"{UPLOAD}|{RUN}|gradio_api/(cancel|reset)/?")
"""Routes of the page that are sent to."""

MAX_MESSAGE = 2**20
"""Largest body that is no upload, in bytes."""

FRAME = 64 * 2**10
"""What the form around an uploaded file may take, in bytes."""

DRAIN_BYTES, DRAIN_SECONDS = 512 * 2**20, 20.0
"""How much of a refused body is thrown away, so that a client that sends before it reads can read why."""

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}

POLICY = (
    "default-src 'none'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
"""Gradio puts its settings into inline scripts, which are allowed by their hashes; styles it sets as it goes."""

_INLINE = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
_NO_ICON = b'<head><link rel="icon" href="data:," />'
"""Browsers look for an icon outside the token otherwise."""


class Gate:
    """Wrap the page.

    Args:
        page: The application behind, mounted under the token.
        token: First part of the path.
        port: Port of the server.
        folder: Where uploads and pictures of the page are kept; no other file is served.
    """

    def __init__(self, page: ASGIApp, token: str, port: int, folder: Path) -> None:
        self._page = page
        self._token = token.encode()
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        self._folder = folder.resolve()
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End the streams that pages hold open, so that the server can stop; to be called where its loop runs."""
        self._closing.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._page(scope, receive, send)
        elif scope["type"] == "websocket":
            # The page has none; closing before accepting is answered with 403.
            await send({"type": "websocket.close", "code": 1008})
        else:
            reply = self._refusal(scope)
            if reply is not None:
                await _send_whole(reply, receive, send)
            elif scope["method"] == "POST":
                await self._take(scope, receive, send)
            else:
                await self._pass_on(scope, receive, _Dressed(send))

    async def _pass_on(self, scope: Scope, receive: Receive, send: _Dressed) -> None:
        """Let the page answer until the server stops."""
        async with anyio.create_task_group() as group:

            async def stop() -> None:
                await self._closing.wait()
                group.cancel_scope.cancel()

            group.start_soon(stop)
            await self._page(scope, receive, send)
            group.cancel_scope.cancel()
        await send.end()

    def _refusal(self, scope: Scope) -> Response | None:
        """Return why a request goes no further, or None."""
        headers = Headers(scope=scope)
        if len(hosts := headers.getlist("host")) != 1 or hosts[0].lower() not in self._hosts:
            return PlainTextResponse("Misdirected request", 421)
        first, _, rest = scope["path"].lstrip("/").partition("/")
        if not hmac.compare_digest(first.encode("utf-8", "replace"), self._token):
            return PlainTextResponse("Not found", 404)
        origins = {f"http://{host}" for host in self._hosts}
        if any(origin.lower() not in origins for origin in headers.getlist("origin")):
            return PlainTextResponse("Forbidden", 403)
        if scope["method"] == "POST" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return PlainTextResponse("Forbidden", 403)
        known = {"GET": READ, "HEAD": READ, "POST": SENT}.get(scope["method"])
        if known is None or not known.fullmatch(rest) or _climbs(rest):
            return PlainTextResponse("Not found", 404)
        if rest.startswith(FILE) and not self._holds(rest.removeprefix(FILE)):
            return PlainTextResponse("Not found", 404)
        return None

    def _holds(self, name: Any) -> bool:
        """Whether a file lies in the folder of the page, also once links are followed."""
        try:
            return isinstance(name, str) and Path(name).is_absolute() and _below(Path(name).resolve(), self._folder)
        except (OSError, ValueError):
            return False

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = scope["path"].endswith(f"/{UPLOAD}")
        limit = MAX_BYTES + FRAME if upload else MAX_MESSAGE
        try:
            body = await _whole_body(Headers(scope=scope), receive, limit)
        except _TooLargeError:
            words = f"The file is larger than {MAX_BYTES // 2**20} MiB." if upload else "The request is too large."
            await _send_whole(PlainTextResponse(words, 413), receive, send)
            return
        if body is None:
            return
        if upload:
            await _send_whole(await self._keep(Headers(scope=scope), body), receive, send)
        elif not self._names_own_files(body):
            await _send_whole(PlainTextResponse("The request names a file that is not here.", 403), receive, send)
        else:
            await self._pass_on(scope, _replay(body, receive), _Dressed(send))

    async def _keep(self, headers: Headers, body: bytes) -> Response:
        """Keep an uploaded image; the reply has the form that Gradio's page expects."""
        try:
            upload = await _only_file(headers, body)
            data = await upload.read()
            # Gradio shows refusals as HTML, so the user's name for the file stays out of them.
            path = await anyio.to_thread.run_sync(keep_image, data, "The file", self._folder)
        except DataError as error:
            return PlainTextResponse(str(error), 415)
        except MultiPartException as error:
            return PlainTextResponse(f"The upload cannot be read: {error.message}", 400)
        return JSONResponse([str(path)])

    def _names_own_files(self, body: bytes) -> bool:
        """Whether every file that a message names lies in the folder; Gradio would fetch a URL given as path."""
        try:
            files = [one for one in _mappings(json.loads(body)) if {"path", "url"} & one.keys()]
        except (ValueError, RecursionError):
            return not body
        return all(self._holds(one.get("path")) for one in files)


class _TooLargeError(Exception):
    """A body is larger than allowed."""


class _Dressed:
    """Send replies with the headers of the house; pages with a policy that names their inline scripts."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._page: list[bytes] = []
        self._open = False

    async def end(self) -> None:
        """End a reply that was broken off."""
        if self._open:
            await self({"type": "http.response.body", "body": b""})

    async def __call__(self, message: Message) -> None:
        self._open = message["type"] == "http.response.start" or message.get("more_body", False)
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if kind.startswith("text/html"):
                self._start = message
                return
            await self._send({**message, "headers": _headers(message, POLICY.format(hashes=""))})
        elif self._start is None:
            await self._send(message)
        else:
            self._page.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._send_page(self._start, b"".join(self._page))

    async def _send_page(self, start: Message, page: bytes) -> None:
        page = page.replace(b"<head>", _NO_ICON, 1)
        digests = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _INLINE.findall(page)]
        policy = POLICY.format(hashes="".join(f" 'sha256-{digest}'" for digest in digests))
        length = (b"content-length", str(len(page)).encode())
        headers = [(name, value) for name, value in _headers(start, policy) if name != b"content-length"]
        await self._send({**start, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": page})


def _headers(start: Message, policy: str) -> list[tuple[bytes, bytes]]:
    own = {**HEADERS, "content-security-policy": policy}
    added = [(name.encode(), value.encode()) for name, value in own.items()]
    gone = {name for name, _ in added} | {b"access-control-allow-origin"}
    return [*((name, value) for name, value in start["headers"] if name.lower() not in gone), *added]


async def _send_whole(reply: Response, receive: Receive, send: Send) -> None:
    """Send a reply of one piece; a refused body is read and thrown away between its head and its end."""
    start = {"type": "http.response.start", "status": reply.status_code, "headers": reply.raw_headers}
    closing = [] if reply.status_code == 200 else [(b"connection", b"close")]
    await send({**start, "headers": [*_headers(start, POLICY.format(hashes="")), *closing]})
    await send({"type": "http.response.body", "body": bytes(reply.body), "more_body": True})
    if reply.status_code != 200:
        await _drain(receive)
    await send({"type": "http.response.body", "body": b""})


async def _drain(receive: Receive) -> None:
    thrown, until = 0, time.monotonic() + DRAIN_SECONDS
    with anyio.move_on_after(DRAIN_SECONDS):
        while thrown < DRAIN_BYTES and time.monotonic() < until:
            message = await receive()
            thrown += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return


async def _whole_body(headers: Headers, receive: Receive, limit: int) -> bytes | None:
    """Read a body that is not larger than the limit; None where the client has gone."""
    announced = headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        raise _TooLargeError
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _TooLargeError
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand on a body that was read already, then whatever else the client does."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _InMemory(MultiPartParser):
    """Reads a form that was counted already without writing it to a temporary file."""

    spool_max_size = MAX_BYTES + FRAME


async def _only_file(headers: Headers, body: bytes) -> UploadFile:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    if not headers.get("content-type", "").startswith("multipart/form-data"):
        raise MultiPartException("it is no form.")
    try:
        form = await _InMemory(headers, stream(), max_files=1, max_fields=0).parse()  # type: ignore[arg-type]
    except (KeyError, UnicodeDecodeError) as cause:
        raise MultiPartException("its form is broken.") from cause
    for value in form.values():
        if isinstance(value, UploadFile):
            return value
    raise MultiPartException("it holds no file.")


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _mappings(part)


def _climbs(path: str) -> bool:
    """Whether a path leaves its folder, also where it was quoted twice."""
    plain = unquote(path)
    return "\\" in plain or "\0" in plain or ".." in plain.split("/")


def _below(path: Path, folder: Path) -> bool:
    return path.is_file() and folder in path.parents
