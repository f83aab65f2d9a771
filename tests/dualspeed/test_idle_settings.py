"""Settings that would have no effect are told or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tests.dualspeed.common import ROWS, attached
from tests.dualspeed.packing_tools import SETTINGS
from tests.tiny import FAMILIES, tiny_llava

from trimtab import DualSpeedConfig
from trimtab.errors import SettingError, TrimtabWarning

LLAVA = FAMILIES["llava"]


def told_in_steps(model: Any, steps: int, **settings: Any) -> list[str]:
    """Return what two steps of each mode warn of."""
    batch = LLAVA.make_batch(model, ROWS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with attached(model, **SETTINGS, **settings) as handle:
            for number in range(steps):
                with handle.force_mode("slow" if number % 2 else "fast"):
                    model(**batch).loss.backward()
    return [str(one.message) for one in told if issubclass(one.category, TrimtabWarning)]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_recompute_of_slow_steps_without_checkpointing_is_told_once(packing: bool) -> None:
    told = told_in_steps(tiny_llava(), 4, recompute="slow", packing=packing)
    assert [one.partition(":")[0] for one in told] == ["recompute='slow' has nothing to suspend"]


def test_recompute_with_checkpointing_or_as_the_model_says_is_not_told() -> None:
    model = tiny_llava()
    assert told_in_steps(model, 2, recompute="model") == []
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert told_in_steps(model, 2, recompute="slow") == []


def test_checkpointing_may_be_switched_on_after_attaching() -> None:
    """A Trainer does so."""
    model = tiny_llava()
    batch = LLAVA.make_batch(model, ROWS)
    with attached(model, recompute="slow", **SETTINGS):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()  # warnings are errors here


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"bucket_pool": 4}], ids=str)
def test_oversize_is_refused_without_a_budget(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"oversize must be 'error' without pack_tokens, but 'own' came"):
        DualSpeedConfig(oversize="own", **settings)


def test_oversize_is_taken_with_a_budget() -> None:
    config = DualSpeedConfig(oversize="own", packing=True, pack_tokens=100, schedule_unit="sample")
    assert config.oversize == "own"
