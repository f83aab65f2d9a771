"""Host libraries that do not fit: transformers too old or not known yet, torchvision built for another torch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import transformers
from packaging.version import Version

from trimtab.errors import HostLibraryError, TrimtabError, TrimtabWarning

NEWEST_TESTED = "5.23"
"""Release of transformers that the tests ran with last."""
_SIGNS = ("torchvision", "VIDEO_PROCESSOR")


def torchvision_trouble(error: BaseException) -> str:
    """Say what is wrong with torchvision and how to mend it, where that is why a host library failed.

    transformers imports torchvision where it is installed, and hides what went wrong behind an error of its own, so
    the causes are searched too.

    Args:
        error: What was raised.

    Returns:
        One or two sentences, or nothing where torchvision has no part in it.
    """
    causes = list(_causes(error))
    if not any(sign in str(cause) for cause in causes for sign in _SIGNS):
        return ""
    torch_build = version("torch")
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        return (
            f"It needs torchvision, which is not installed. Install the build that belongs to your torch {torch_build}."
        )
    return (
        f"The torchvision {found} that is installed does not fit the torch {torch_build} beside it ({causes[-1]}). "
        "Install the torchvision build that belongs to this torch, or uninstall torchvision: trimtab does not "
        "need it, only the processors of some models do."
    )


@contextmanager
def explain_import_errors(what: str) -> Iterator[None]:
    """Turn the import errors of a broken torchvision into one that says how to mend it.

    Args:
        what: What is being imported or loaded, to begin the message with.

    Yields:
        Nothing.

    Raises:
        HostLibraryError: torchvision does not fit. Other errors pass through.
    """
    try:
        yield
    except TrimtabError:
        raise
    except (ImportError, RuntimeError, AttributeError) as error:
        if trouble := torchvision_trouble(error):
            raise HostLibraryError(f"{what} cannot be loaded. {trouble}") from error
        raise


@functools.cache
def warn_of_untested_release() -> None:
    """Warn, once per process, where transformers is newer than the newest release that was tested.

    Warns:
        TrimtabWarning: It is.
    """
    installed = Version(transformers.__version__)
    if installed.release[:2] > Version(NEWEST_TESTED).release:
        warnings.warn(
            f"transformers {installed} is newer than {NEWEST_TESTED}, the newest release that this trimtab was tested "
            "with. It will probably work; where it does not, install an older transformers or a newer trimtab.",
            TrimtabWarning,
            stacklevel=3,
        )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it, the first cause last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
