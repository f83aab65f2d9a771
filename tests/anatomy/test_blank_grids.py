"""The blank image of a family, whatever form its images have, goes where a real image goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.conformance.families import SUITE
from tests.conformance.family_tools import model_of

from trimtab.anatomy import FAMILIES, encode_images
from trimtab.anatomy.blank import encode_blank
from trimtab.anatomy.family_table import NO_BLANK
from trimtab.errors import UnsupportedModelError

UNKNOWN = {
    "gemma3n": "its vision tower is one of timm, whose configuration does not tell the size of its images",
    "molmo2": "it takes images with tables of patches to pool, which only its processor makes",
}
"""Families without a blank image, and why."""


def reached(model: Any) -> set[str]:
    """Return the parameters that have a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", sorted(SUITE.keys() - UNKNOWN.keys()))
def test_a_blank_image_reaches_the_parameters_that_an_image_reaches(name: str) -> None:
    family = SUITE[name]
    model = model_of(family, fresh=True)
    torch.cat(encode_images(model, family.make_batch(model, (1,))).blocks).sum().backward()
    expected = reached(model)
    model.zero_grad(set_to_none=True)
    encode_blank(model, torch.device("cpu")).backward()
    assert expected
    assert reached(model) >= expected


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_family_without_a_blank_image_says_so_and_its_notes_too(name: str) -> None:
    model = model_of(SUITE[name])
    with pytest.raises(UnsupportedModelError, match=r"no blank image of .* is known.*Give every batch an image"):
        encode_blank(model, torch.device("cpu"))
    assert NO_BLANK in FAMILIES[name].notes


def test_no_other_family_is_noted_to_lack_one() -> None:
    assert {name for name, family in FAMILIES.items() if NO_BLANK in family.notes} == set(UNKNOWN)
