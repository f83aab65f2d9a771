"""What the tests of withdrawal share."""

from __future__ import annotations

import pytest
from tests.methods.vtw.models import NAMES


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each of the families that every check must hold for."""
    return str(request.param)
