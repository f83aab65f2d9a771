"""Optional packages: loaded when a setting asks for them, with a message that says how to get them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trimtab.errors import MissingExtraError


def require(package: str, purpose: str) -> Any:
    """Import an optional package.

    Args:
        package: Name of the package, which is also the name of trimtab's extra.
        purpose: The setting that needs it, for the message.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtraError(
            f"`{purpose}` needs the package {package}. Install it: pip install 'trimtab[{package}]'."
        )
    return import_module(package)
