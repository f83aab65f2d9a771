"""`trimtab` in a process whose sockets reach this machine only, and that notes every try to leave it.

The environment names the file of notes, ``WATCHED_NOTES``; with ``WATCHED_ANSWER`` every model answers that.
"""

import ipaddress
import os
import socket
import sys
from typing import Any

NOTES = os.environ["WATCHED_NOTES"]


def is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a socket of the file system
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] in ("localhost", "", None)


def guard(name: str, address_of: Any, owner: Any = socket.socket) -> None:
    stock = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if not is_local(address_of(args)):
            with open(NOTES, "a", encoding="utf-8") as notes:
                notes.write(f"{name} {address_of(args)}\n")
            raise OSError(f"{name} would leave this machine")
        return stock(*args, **kwargs)

    setattr(owner, name, watched)


guard("connect", lambda args: args[1])
guard("connect_ex", lambda args: args[1])
guard("sendto", lambda args: args[-1])
guard("getaddrinfo", lambda args: (args[0].decode() if isinstance(args[0], bytes) else args[0],), socket)

if __name__ == "__main__":
    from trimtab.cli import main

    if answer := os.environ.get("WATCHED_ANSWER"):
        from trimtab.view import desk

        desk.Desk._ask = lambda *args, **kwargs: (answer, 0.5)  # type: ignore[method-assign]
    main(sys.argv[1:])
