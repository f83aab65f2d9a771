"""Where the installed transformers lets visual features in, family by family; ``python -m`` writes it to seam.json.

What is written: whether the forward takes ``mm_encoder_outputs``, the encoders and what they take, the attributes that
name the placeholders, and whether the base model computes positions of three coordinates. trimtab stands on these.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import transformers
from tests.conformance.families import SUITE
from tests.conformance.family_tools import model_of
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_TO_TEXT

FILE = Path(__file__).with_name("seam.json")
ENCODERS = ("get_image_features", "get_video_features")
TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")

Seam = dict[str, Any]


def has_hook(model_type: str) -> bool:
    """Return whether a class of the library's image-text-to-text list takes features that were encoded before."""
    model = getattr(transformers, IMAGE_TEXT_TO_TEXT[model_type])
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def seam_of(model_type: str) -> Seam:
    """Return the seam of one family's tiny model."""
    model = model_of(SUITE[model_type])
    encoders = {name: getattr(model.base_model, name) for name in ENCODERS if hasattr(model.base_model, name)}
    return {
        "class": type(model).__name__,
        "takes mm_encoder_outputs": "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters,
        "encoders": {name: list(inspect.signature(method).parameters) for name, method in encoders.items()},
        "placeholders": [name for name in TOKENS if getattr(model.config, name, None) is not None],
        "computes positions of three coordinates": hasattr(model.base_model, "compute_3d_position_ids"),
    }


def read_seams() -> dict[str, Any]:
    """Return what seam.json holds: the version of transformers, and the seam of every family."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def changes(model_type: str, pinned: dict[str, Any], found: Seam) -> str:
    """Say in words how a family's seam differs from the pinned one; empty where it does not."""
    before = pinned["families"].get(model_type)
    if before is None:
        return f"{model_type} has no entry in {FILE.name}. {_REMEDY}"
    differing = [
        f"{what} was {before.get(what)!r} in transformers {pinned['transformers']} and is {found[what]!r} in "
        f"{transformers.__version__}"
        for what in found
        if found[what] != before.get(what)
    ]
    return f"{model_type}: {'; '.join(differing)}. {_REMEDY}" if differing else ""


_REMEDY = (
    "Look at its row in src/trimtab/anatomy/family_table.py, run tests/conformance/test_families.py for it, and then "
    "write the new seam with: python -m tests.conformance.seam"
)


def write_seams() -> None:
    """Write the seams of all families of the suite to seam.json."""
    families = {name: seam_of(name) for name in sorted(SUITE)}
    FILE.write_text(json.dumps({"transformers": transformers.__version__, "families": families}, indent=1) + "\n")


if __name__ == "__main__":
    write_seams()
