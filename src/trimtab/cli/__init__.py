"""The command line: parse, call one function, print."""

from trimtab.cli.app import main

__all__ = ["main"]
