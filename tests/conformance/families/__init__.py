"""Every tiny model family of the conformance suite, gathered from the modules of this folder."""

from __future__ import annotations

import importlib
import pkgutil

from tests.tiny import FAMILIES as BASIC
from tests.tiny import TinyFamily

SUITE: dict[str, TinyFamily] = dict(BASIC)
"""By ``config.model_type``."""

for _module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
    for _family in importlib.import_module(f"{__name__}.{_module}").FAMILIES:
        assert _family.name not in SUITE, f"{_family.name} is defined twice"
        SUITE[_family.name] = _family
