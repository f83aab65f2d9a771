"""The conformance suite of the model families: every check, for every family of `SUITE`."""

from __future__ import annotations

import pytest
from tests.conformance.families import SUITE
from tests.conformance.family_checks import CHECKS
from tests.conformance.packed_check import packed_by_positions

from trimtab.anatomy import FAMILIES

CASES = [
    (name, check) for name in sorted(SUITE) for check in CHECKS if check != "videos" or SUITE[name].videos is not None
]


@pytest.mark.parametrize(("name", "check"), CASES, ids=lambda value: value)
def test_family(name: str, check: str) -> None:
    CHECKS[check](SUITE[name])


@pytest.mark.parametrize("name", sorted(SUITE))
def test_packs_found_by_positions(name: str) -> None:
    packed_by_positions(SUITE[name])


def test_every_tested_family_is_in_the_suite() -> None:
    assert sorted(FAMILIES) == sorted(SUITE)
