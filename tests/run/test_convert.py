"""Values come out in the type that the field declares, or with a message that names the field."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

import pytest

from trimtab.errors import SettingError
from trimtab.run.convert import convert


class Strategy(Enum):
    NO = "no"
    STEPS = "steps"


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        ("2e-5", float, 2e-5),
        (1, float, 1.0),
        ("7", int, 7),
        (3.0, int, 3),
        ("yes", bool, True),
        ("False", bool, False),
        (True, bool, True),
        (5, str, "5"),
        ("no", Strategy | str, "no"),
        ("other", Strategy | str, "other"),
        ("a.json", list[str], ["a.json"]),
        (["a", "b"], list[str], ["a", "b"]),
        (None, int | None, None),
        ("none", None | str | list[str], "none"),
        (["x"], None | str | list[str], ["x"]),
        ({"a": 1}, dict | str | None, {"a": 1}),
        ("{", dict | str | None, "{"),
        ("all", bool | str, "all"),
        ("no", bool | str, "no"),
        (3, bool | str, "3"),
        (3, float | str, 3.0),
        ("x", Literal["x", "y"], "x"),
    ],
)
def test_values_take_the_declared_type(value: Any, hint: Any, result: Any) -> None:
    came = convert("run.yaml", "field", value, hint)
    assert came == result
    assert type(came) is type(result)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("fast", float, "a number"),
        (True, float, "a number"),
        (2.5, int, "a whole number"),
        ("maybe", bool, "true or false"),
        (1, bool, "true or false"),
        (None, str, "text"),
        ([1], str, "text"),
        ("x", dict, "a mapping"),
        ([{"a": 1}], list[str], "a list"),
        ("z", Literal["x", "y"], "'x' or 'y'"),
        ("weekly", Strategy, "one of no, steps"),
        (float("inf"), int, "a whole number"),
    ],
)
def test_values_that_do_not_fit_are_named(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(SettingError, match=rf"run\.yaml\.field must be {words}.* came"):
        convert("run.yaml", "field", value, hint)
