"""A terminal for tests: a pseudo-terminal whose screen can be read as text."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b.|([\r\n])|(.)", re.DOTALL)


class Terminal:
    """What came out of a pseudo-terminal.

    Attributes:
        columns: Its width.
        stream: Where programs write.
        raw: The bytes so far.
    """

    def __init__(self, columns: int, stream: IO[str]) -> None:
        self.columns, self.stream, self.raw = columns, stream, b""

    @property
    def text(self) -> str:
        """All that was ever shown, without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode("utf-8", "replace"))

    def screen(self) -> list[str]:
        """Return the lines as they stand at last; a line too long for the width goes on in the next."""
        lines: list[list[str]] = [[]]
        row = column = 0
        for argument, command, newline, letter in SEQUENCE.findall(self.raw.decode("utf-8", "replace")):
            if command == "A":
                row = max(0, row - int(argument or 1))
            elif command == "K":
                lines[row] = [] if argument == "2" else lines[row][:column]
            elif newline == "\r":
                column = 0
            elif newline == "\n" or (letter and column >= self.columns):
                row, column = row + 1, 0 if letter else column
            lines += [[] for _ in range(row + 1 - len(lines))]
            if letter:
                lines[row] += [" "] * (column + 1 - len(lines[row]))
                lines[row][column] = letter
                column += 1
        return ["".join(line).rstrip() for line in lines]


@contextmanager
def open_terminal(columns: int) -> Iterator[Terminal]:
    """Open a pseudo-terminal; what was written is there when the block is left."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w", encoding="utf-8", buffering=1) as stream:
        terminal = Terminal(columns, stream)
        reader = threading.Thread(target=_read, args=(master, terminal))
        reader.start()
        yield terminal
    reader.join()
    os.close(master)


def _read(master: int, terminal: Terminal) -> None:
    while True:
        try:
            came = os.read(master, 65536)
        except OSError:  # Linux says so when the other side was closed
            return
        if not came:
            return
        terminal.raw += came
