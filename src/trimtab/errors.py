"""All errors and warnings that trimtab raises.

::

    TrimtabError
    ├── SettingError (ValueError)           a setting or argument is outside its range
    ├── DataError (ValueError)              a row, image or label of the user's data cannot be used
    ├── TokenMismatchError (ValueError)     placeholders and visual features do not fit together
    ├── UnsupportedModelError (TypeError)   the model lacks what the method needs
    ├── MissingExtraError (ImportError)     an optional package is not installed
    ├── HostLibraryError (ImportError)      a package is installed, but too old or built for another torch
    ├── RankDisagreementError (RuntimeError) two processes of one run would not do the same
    ├── WrongOrderError (RuntimeError)      a call came before or after its time
    ├── NotSupportedError (NotImplementedError) two things that are right alone do not go together yet
    └── OutputError (OSError)               an output directory or file cannot be written as asked

    TrimtabWarning (UserWarning)            something works, but probably not as the user thinks

Every message says which setting, of what, what is allowed, what came, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of every error that trimtab raises on purpose."""


class SettingError(TrimtabError, ValueError):
    """A setting or argument is outside its allowed range."""


class DataError(TrimtabError, ValueError):
    """A row, image or label of the user's data cannot be used."""


class TokenMismatchError(TrimtabError, ValueError):
    """The image placeholders of a batch and its visual features do not fit together."""


class UnsupportedModelError(TrimtabError, TypeError):
    """The model lacks what the method needs."""


class MissingExtraError(TrimtabError, ImportError):
    """An optional package is not installed."""


class HostLibraryError(TrimtabError, ImportError):
    """A package is installed, but too old or built for another torch."""


class RankDisagreementError(TrimtabError, RuntimeError):
    """Two processes of one run would not do the same."""


class WrongOrderError(TrimtabError, RuntimeError):
    """A call came before or after its time."""


class NotSupportedError(TrimtabError, NotImplementedError):
    """Two things that are right alone do not go together yet."""


class OutputError(TrimtabError, OSError):
    """An output directory or file cannot be written as asked."""


class TrimtabWarning(UserWarning):
    """Something works, but probably not as the user thinks."""


def setting_error(owner: str, setting: str, allowed: str, came: object, remedy: str = "") -> SettingError:
    """Build the house form of a settings error.

    Args:
        owner: What the setting belongs to, for example ``"DualSpeedConfig"``.
        setting: Name of the setting.
        allowed: The allowed range in words, for example ``"a number in (0, 1]"``.
        came: The value that came; shown with ``repr``.
        remedy: What to do, one sentence, or empty.

    Returns:
        The error, to be raised by the caller.
    """
    text = f"{owner}.{setting} must be {allowed}, but {came!r} came."
    return SettingError(f"{text} {remedy}".rstrip())


def near_miss(name: str, known: Iterable[str]) -> str:
    """Name the nearest known name, or list all of them.

    Args:
        name: What came.
        known: What would have been right.

    Returns:
        A sentence to end an error message with.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) if names else '(none)'}."
