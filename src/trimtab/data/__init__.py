"""Users' data in, batches out: readers, one normaliser of layouts, image opening, collators and made-up scenes.

Names load on first use. The scenes are in `trimtab.data.scenes`, the public question sets in
`trimtab.data.question_sets`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.data.collate import MaskPlaceholders as MaskPlaceholders
    from trimtab.data.collate import SupervisedCollator as SupervisedCollator
    from trimtab.data.collate import placeholder_ids as placeholder_ids
    from trimtab.data.images import open_image as open_image
    from trimtab.data.messages import Layout as Layout
    from trimtab.data.messages import detect_layout as detect_layout
    from trimtab.data.messages import to_messages as to_messages
    from trimtab.data.readers import Rows as Rows
    from trimtab.data.readers import load_rows as load_rows
    from trimtab.data.validate import ValidationReport as ValidationReport
    from trimtab.data.validate import validate_rows as validate_rows

_PUBLIC = {
    "Layout": "messages",
    "MaskPlaceholders": "collate",
    "Rows": "readers",
    "SupervisedCollator": "collate",
    "ValidationReport": "validate",
    "detect_layout": "messages",
    "load_rows": "readers",
    "open_image": "images",
    "placeholder_ids": "collate",
    "to_messages": "messages",
    "validate_rows": "validate",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trimtab.data' has no attribute {name!r}")
    return getattr(import_module(f"trimtab.data.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
