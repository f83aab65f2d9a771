"""The places where trimtab meets transformers are as they were when the families were tested, and none is unnoticed."""

from __future__ import annotations

import copy

import pytest
import transformers
from tests.conformance.families import SUITE
from tests.conformance.seam import IMAGE_TEXT_TO_TEXT, changes, has_hook, read_seams, seam_of

from trimtab.anatomy import FAMILIES, REFUSED


@pytest.mark.parametrize("model_type", sorted(SUITE))
def test_the_seam_is_the_pinned_one(model_type: str) -> None:
    assert not changes(model_type, read_seams(), seam_of(model_type))


def test_seams_are_pinned_of_every_family_and_no_other() -> None:
    assert sorted(read_seams()["families"]) == sorted(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(SUITE))
def test_every_family_takes_features_that_were_encoded_before(model_type: str) -> None:
    seam = read_seams()["families"][model_type]
    assert seam["takes mm_encoder_outputs"]
    assert "get_image_features" in seam["encoders"]
    assert seam["class"] == FAMILIES[model_type].name


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("takes mm_encoder_outputs", False),
        ("encoders", {"get_image_features": ["images"]}),
        ("placeholders", ["image_token"]),
        ("computes positions of three coordinates", True),
    ],
)
def test_a_changed_seam_is_told_in_words(what: str, value: object) -> None:
    pinned, found = read_seams(), seam_of("llava")
    text = changes("llava", pinned, {**found, what: value})
    assert text.startswith(f"llava: {what} was {found[what]!r} in transformers")
    assert f"and is {value!r} in {transformers.__version__}." in text
    assert "family_table.py" in text
    missing = copy.deepcopy(pinned)
    del missing["families"]["llava"]
    assert "llava has no entry" in changes("llava", missing, found)


@pytest.mark.parametrize("model_type", sorted(IMAGE_TEXT_TO_TEXT))
def test_no_family_of_transformers_is_unnoticed(model_type: str) -> None:
    known = model_type in FAMILIES or model_type in REFUSED or not has_hook(model_type)
    assert known, (
        f"{model_type} ({IMAGE_TEXT_TO_TEXT[model_type]}) of transformers {transformers.__version__} has the public "
        "hook, but trimtab neither supports nor refuses it. Write a TinyFamily for it in tests/conformance/families "
        "and a row in src/trimtab/anatomy/family_table.py, or an entry in its REFUSED."
    )


def test_no_family_is_both_supported_and_refused() -> None:
    assert not FAMILIES.keys() & REFUSED.keys()
