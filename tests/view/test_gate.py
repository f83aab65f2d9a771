"""Who and what is let in, tried with real requests."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image

from tests.view.conftest import HOSTILE, Served
from trimtab.view.gate import POLICY, Gate

MIB = 2**20
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "teal").save(stream, format="PNG")
    return stream.getvalue()


def get(served: Served, path: str = "", **headers: str) -> httpx.Response:
    return httpx.get(f"{served.url}{path}", headers=headers, timeout=30, trust_env=False)


def raw(served: Served, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    """Send a request with exactly that path, which other clients would tidy up."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)) as connection:
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        reply = connection.getresponse()
        return reply.status, reply.read()


def upload(served: Served, data: Any, name: str = "picture.png") -> httpx.Response:
    url = f"{served.url}gradio_api/upload"
    return httpx.post(url, files={"files": (name, data, "image/png")}, timeout=60, trust_env=False)


def token(served: Served) -> str:
    return served.url.rstrip("/").rpartition("/")[2]


def test_the_page_is_there_under_its_token(served: Served) -> None:
    reply = get(served)
    assert reply.status_code == 200
    assert "Which visual tokens stay" in reply.text
    assert len(token(served)) >= 43


def test_only_loopback_is_served(served: Served) -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", served.port), timeout=5)


@pytest.mark.parametrize(
    "path", ["/", "/x/", "/favicon.ico", "/gradio_api/info", "/{head}/", "/{token}x/", "//", "/{token}%2f/x"]
)
def test_a_wrong_token_finds_nothing(served: Served, path: str) -> None:
    path = path.format(token=token(served), head=token(served)[:-1])
    for method in ("GET", "POST", "OPTIONS"):
        assert raw(served, method, path) == (404, b"Not found")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "", "[::1]:{port}"]
)
@pytest.mark.parametrize("path", ["", "gradio_api/startup-events", "gradio_api/heartbeat/x"])
def test_another_host_is_refused(served: Served, host: str, path: str) -> None:
    place = f"/{token(served)}/{path}"
    assert raw(served, "GET", place, Host=host.format(port=served.port)) == (421, b"Misdirected request")


def test_a_post_for_another_host_is_refused(served: Served) -> None:
    place = f"/{token(served)}/gradio_api/run/predict"
    assert raw(served, "POST", place, Host=f"evil.example:{served.port}")[0] == 421


def test_two_hosts_are_refused(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as line:
        hosts = f"Host: {served.address}\r\nHost: evil.example\r\n"
        line.sendall(f"GET /{token(served)}/ HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode())
        assert line.recv(100).split()[1] in (b"400", b"421")


def test_localhost_is_this_machine_too(served: Served) -> None:
    assert raw(served, "GET", f"/{token(served)}/", Host=f"localhost:{served.port}")[0] == 200


def test_a_websocket_is_not_opened(served: Served) -> None:
    wanted = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    wanted["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    place = f"/{token(served)}/gradio_api/run/predict"
    assert raw(served, "GET", place, **wanted)[0] == 404
    assert raw(served, "GET", place, Host="evil.example", **wanted)[0] == 421


def test_the_gate_closes_websockets_itself() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    gate = Gate(None, "t", 1, Path())  # type: ignore[arg-type]  # the page must not be asked
    anyio.run(gate, {"type": "websocket", "path": "/t/"}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
def test_other_origins_are_refused(served: Served, origin: str) -> None:
    headers = {"origin": origin.format(port=served.port)}
    for path in ("gradio_api/run/predict", "gradio_api/upload"):
        assert httpx.post(f"{served.url}{path}", headers=headers, json={}, trust_env=False).status_code == 403
    assert get(served, **headers).status_code == 403


def test_a_form_of_another_site_is_refused(served: Served) -> None:
    headers = {"sec-fetch-site": "cross-site"}
    assert httpx.post(f"{served.url}gradio_api/run/predict", headers=headers, trust_env=False).status_code == 403


def test_the_own_origin_is_let_in(served: Served) -> None:
    assert get(served, origin=f"http://{served.address}").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "gradio_api/info"),
        ("GET", "gradio_api/openapi.json"),
        ("GET", "gradio_api/proxy=https://huggingface.co/x"),
        ("GET", "gradio_api/file/etc/passwd"),
        ("GET", "gradio_api/runs"),
        ("GET", "monitoring"),
        ("GET", "docs"),
        ("GET", "openapi.json"),
        ("POST", "gradio_api/queue/join"),
        ("GET", "gradio_api/queue/data"),
        ("POST", "gradio_api/call/tell"),
        ("POST", "gradio_api/component_server"),
        ("POST", "gradio_api/vibe-edit"),
        ("POST", "gradio_api/mcp/"),
        ("DELETE", ""),
        ("PUT", "gradio_api/upload"),
    ],
)
def test_routes_that_the_page_does_not_need_are_not_there(served: Served, method: str, path: str) -> None:
    assert raw(served, method, f"/{token(served)}/{path}") == (404, b"Not found")


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file={folder}/../../etc/passwd",
        "gradio_api/file={folder}/..%2f..%2fetc/passwd",
        "gradio_api/file={folder}/..%252f..%252fetc/passwd",
        "gradio_api/file={folder}",
        "gradio_api/file=https://evil.example/x.png",
        "gradio_api/file=file:///etc/passwd",
        "gradio_api/file=etc/passwd",
        "assets/../../../../../../etc/passwd",
        "assets/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "static/..%5c..%5cetc/passwd",
    ],
)
def test_no_file_outside_the_folder_is_served(served: Served, path: str) -> None:
    place = f"/{token(served)}/{path.format(folder=served.folder)}"
    assert raw(served, "GET", place) == (404, b"Not found")


def test_a_link_out_of_the_folder_is_not_followed(served: Served) -> None:
    link = served.folder / "link.png"
    link.symlink_to("/etc/passwd")
    assert get(served, f"gradio_api/file={link}").status_code == 404


def test_a_given_image_is_served_and_only_this_user_reads_the_folder(served: Served) -> None:
    path = served.client.part("Image")["value"]["path"]
    reply = get(served, f"gradio_api/file={path}")
    assert reply.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(reply.content)).size == (90, 60)
    assert served.folder.stat().st_mode & 0o077 == 0


def test_every_reply_has_the_headers(served: Served) -> None:
    wrong = httpx.get(f"http://{served.address}/nothing", trust_env=False)
    for reply in (get(served), get(served, "theme.css"), wrong, upload(served, SVG)):
        headers = reply.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_the_policy_lets_no_other_script_run(served: Served) -> None:
    reply = get(served)
    rule = re.search(r"script-src ([^;]*)", reply.headers["content-security-policy"])
    assert rule is not None
    assert all(source == "'self'" or source.startswith("'sha256-") for source in rule.group(1).split())
    assert rule.group(1).count("sha256-") == len(re.findall(r"<script(?![^>]*\ssrc=)", reply.text))
    assert "http" not in POLICY
    assert "unsafe-eval" not in POLICY


def chunks(total: int) -> Iterator[bytes]:
    piece = bytes(MIB)
    for _ in range(total // MIB):
        yield piece


def peak_memory(served: Served) -> int:
    """Most memory that the server has held so far, in MiB."""
    status = Path(f"/proc/{served.process.pid}/status")
    if not status.is_file():
        pytest.skip("peak memory of another process is read from /proc")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found.group(1)) // 1024


def held_open(served: Served) -> set[str]:
    """Files that the server has open, also nameless ones."""
    links = Path(f"/proc/{served.process.pid}/fd").iterdir()
    return {os.readlink(link) for link in links if link.is_symlink()}


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_200_mib_are_refused_unread(served: Served, announced: bool) -> None:
    before, files, opened = peak_memory(served), set(served.folder.rglob("*")), held_open(served)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    if announced:
        headers["content-length"] = str(200 * MIB)
    seen: set[str] = set()

    def body() -> Iterator[bytes]:
        for number, piece in enumerate(chunks(200 * MIB)):
            if number % 20 == 0:
                seen.update(held_open(served))
            yield piece

    url = f"{served.url}gradio_api/upload"
    reply = httpx.post(url, headers=headers, content=body(), timeout=60, trust_env=False)
    assert reply.status_code == 413
    assert "20 MiB" in reply.text
    assert peak_memory(served) - before < 64
    assert set(served.folder.rglob("*")) == files
    assert not {name for name in seen - opened if name.startswith(("/tmp/", "/var/tmp/"))}


def test_a_large_message_is_refused(served: Served) -> None:
    url = f"{served.url}gradio_api/run/predict"
    assert httpx.post(url, content=bytes(2 * MIB), trust_env=False).status_code == 413
    assert httpx.post(url, content=chunks(2 * MIB), trust_env=False).status_code == 413


def test_a_length_that_lies_is_not_believed(served: Served) -> None:
    place = f"/{token(served)}/gradio_api/upload"
    assert raw(served, "POST", place, **{"Content-Length": str(200 * MIB)})[0] == 413
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as line:
        head = f"POST {place} HTTP/1.1\r\nHost: {served.address}\r\nContent-Length: -1\r\n\r\n"
        line.sendall(head.encode())
        assert line.recv(100).split()[1] in (b"400", b"413")


@pytest.mark.parametrize("name", ["picture.svg", "picture.png", HOSTILE])
def test_an_svg_with_script_is_refused_under_any_name(served: Served, name: str) -> None:
    before = set(served.folder.rglob("*"))
    reply = upload(served, SVG, name)
    assert reply.status_code == 415
    assert "PNG, JPEG" in reply.text
    assert reply.headers["content-type"].startswith("text/plain")
    assert set(served.folder.rglob("*")) == before


def test_an_image_is_kept_under_a_name_of_ours(served: Served) -> None:
    path = Path(upload(served, png(), "../../../../tmp/<b>.svg").json()[0])
    assert path.is_relative_to(served.folder)
    assert path.name == "image.png"
    assert path.read_bytes() == png()
    assert get(served, f"gradio_api/file={path}").status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"nothing", b"--b\r\n", b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nx\r\n--b--\r\n']
)
def test_a_broken_form_is_refused(served: Served, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    reply = httpx.post(f"{served.url}gradio_api/upload", headers=headers, content=body, trust_env=False)
    assert reply.status_code == 400


@pytest.mark.parametrize("path", ["/etc/passwd", "https://evil.example/x.png", "relative.png", None, 3, "/x\0y"])
def test_a_message_names_no_other_file(served: Served, path: Any) -> None:
    image = {"path": path, "url": "https://evil.example/x.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[{"deep": image}]], "fn_index": 0, "session_hash": "x"}
    reply = httpx.post(f"{served.url}gradio_api/run/predict", content=json.dumps(body), trust_env=False)
    assert (reply.status_code, reply.text) == (403, "The request names a file that is not here.")


def test_nothing_has_tried_to_leave_this_machine(served: Served) -> None:
    """Runs a whole session in a process whose sockets refuse, and note, every other address."""
    client = served.client
    path = upload(served, png()).json()[0]
    image = {"path": path, "url": None, "meta": {"_type": "gradio.FileData"}}
    assert "of 576" in client.show(image, ["divprune", "random"])
    assert served.notes.read_text() == ""
