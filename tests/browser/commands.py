"""Commands of trimtab as a user starts them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trimtab.cli import main

END_SECONDS = 30


def run(*words: object) -> None:
    """Run a command that ends by itself, in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0


@contextmanager
def serve_view(folder: Path, *words: object) -> Iterator[str]:
    """Serve the live view in a process of its own; give its address. Ctrl-C must end it without a complaint."""
    command = [sys.executable, "-m", "trimtab", "view", "--no-open", "--json", *map(str, words)]
    with (folder / "view.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (folder / "view.log").read_text()
            yield json.loads(line)["url"]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=END_SECONDS)
        told = (folder / "view.log").read_text()
    assert process.returncode == 0, told
    assert "Traceback" not in told, told
