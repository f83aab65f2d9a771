"""Start and end of the view, and the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.view.conftest import HOSTILE, WATCHED, Served, serving
from trimtab.cli import main
from trimtab.errors import DataError, MissingExtraError, OutputError, SettingError
from trimtab.view import serve
from trimtab.view import server as module


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["view", *arguments])
    return int(ended.value.code or 0)


def test_there_is_no_setting_for_another_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--host", "0.0.0.0") == 2
    assert "--host" in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=rf"Port {port} of 127\.0\.0\.1 cannot be used"):
            serve(port=port)
        assert run("--port", str(port), "--no-open") == 2
    assert "--port" in capsys.readouterr().err


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_outside_its_range_is_told(port: int) -> None:
    with pytest.raises(SettingError, match=rf"view\.port must be in 0\.\.65535, but {port} came"):
        serve(port=port)


def test_without_gradio_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimtab\[view\]'"):
        serve()


def test_importing_the_package_loads_no_gradio() -> None:
    code = "import sys, trimtab.view, trimtab.cli; print('gradio' in sys.modules, 'starlette' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]


def test_images_that_cannot_be_shown_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--image must be a file that can be read, but .*none\.png"):
        serve(images=[tmp_path / "none.png"])
    (tmp_path / "a.png").write_text("<svg/>")
    with pytest.raises(DataError, match=r"a\.png is no image"):
        serve(images=[tmp_path / "a.png"])


def test_a_model_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds no model"):
        serve(model=str(tmp_path))


def test_settings_of_gradio_in_the_environment_are_put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with module._gradio_settings(tmp_path):
        assert "GRADIO_SHARE" not in os.environ
        assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
    assert os.environ["GRADIO_SHARE"] == "True"
    assert "GRADIO_TEMP_DIR" not in os.environ


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_a_model_loads_leaves_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(signal, name):
        pytest.skip("no such signal on this system")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: list[Path] = []

    def loading(*arguments: object) -> None:
        found.extend(tmp_path.iterdir())
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(module, "_application", loading)
    outside = signal.signal(getattr(signal, name), signal.SIG_DFL)  # tests may run under nohup
    try:
        with pytest.raises(SystemExit) as ended:
            serve()
        assert signal.getsignal(getattr(signal, name)) is signal.SIG_DFL
    finally:
        signal.signal(getattr(signal, name), outside)
    assert ended.value.code == 143
    assert len(found) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminal hangs up on this system")
def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with module._ending_on_terminate():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGINT", 0),
        pytest.param("SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 143, marks=pytest.mark.slow),
    ],
)
def test_it_ends_cleanly_and_its_folder_with_it(name: str, code: int, tmp_path: Path) -> None:
    if not hasattr(signal, name):
        pytest.skip("no such signal on this system")
    with serving(tmp_path) as served:
        folder = served.folder
        assert folder.is_dir()
        with httpx.stream("GET", f"{served.url}gradio_api/heartbeat/x", trust_env=False, timeout=30) as open_one:
            assert open_one.status_code == 200
            served.process.send_signal(getattr(signal, name))
            assert served.process.wait(timeout=30) == code
    told = (tmp_path / "told.txt").read_text()
    assert "Traceback" not in told
    assert ("the view has ended" in told) == (code == 0)
    assert not folder.exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url, trust_env=False)


def test_the_guard_of_these_tests_notes_what_leaves(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    code = "import socket, runpy; runpy.run_path(%r)\n%s"
    for tried in (
        "socket.create_connection(('192.0.2.1', 80))",
        "socket.getaddrinfo('huggingface.co', 443)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    ):
        notes.write_text("")
        words = [sys.executable, "-c", code % (str(WATCHED), tried)]
        ended = subprocess.run(words, env={**os.environ, "WATCHED_NOTES": str(notes)}, capture_output=True, check=False)
        assert ended.returncode
        assert notes.read_text()


def test_a_session_over_http(served: Served) -> None:
    client = served.client
    image = client.part("Image")["value"]
    page = client.show(image, ["divprune", "random"], 0.25)
    assert page.count('class="tt-panel"') == 2
    assert "144 of 576" in page
    assert "A question is missing" not in page
    assert 'role="alert"' in client.show(image, ["scope"])
    assert "Choose a pruner" in client.show(image, [])
    assert "Choose an image" in client.show(None, ["divprune"])  # type: ignore[arg-type]
    assert "must be" in client.show(image, ["divprune"], 7)
    second = client.ask("Images given at the start", "change", [1])[0]
    assert second["path"].endswith(".jpg")


def test_given_names_stand_in_the_page_as_text_only(served: Served) -> None:
    page = httpx.get(served.url, trust_env=False).text
    assert "<img src=x" not in page
    assert [name for name, _ in served.client.part("Images given at the start")["choices"]] == [HOSTILE, "plain.jpg"]


def test_a_page_asks_for_nothing_else(served: Served) -> None:
    """Every file that the page names lies under its address."""
    config = served.client.config
    assert config["analytics_enabled"] is False
    assert not config.get("footer_links")
    assert "https://fonts" not in json.dumps(config)


def test_messages_that_no_page_would_send_are_told(served: Served) -> None:
    image = served.client.part("Image")["value"]
    assert "must be a list" in served.client.show(image, "divprune")  # type: ignore[arg-type]
    assert "must be a number" in served.client.show(image, ["divprune"], "much")  # type: ignore[arg-type]
    assert "no pruner" in served.client.show(image, ["nonsense"])
    with pytest.raises(SettingError, match="could not do it") as told:
        served.client.show({"path": image["path"], "meta": 3}, ["divprune"])
    assert "object has no attribute" not in str(told.value), "messages of Gradio and of Python stay in the terminal"


def test_a_picture_that_is_gone_is_told(served: Served) -> None:
    path = served.folder / "gone" / "image.png"
    path.parent.mkdir()
    path.write_bytes(b"no picture any more")
    image = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    assert "The image is gone or broken" in served.client.show(image, ["random"])
    Image.new("RGB", (9, 9)).save(path)
    assert "of 576" in served.client.show(image, ["random"])
