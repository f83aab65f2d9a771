"""YAML without its traps, and clear words about the traps that remain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import SettingError
from trimtab.run.run_file import parse_value, read_run_file


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E4", 1e4),
        ("2.0e-5", 2e-5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("", None),
        ("none", "none"),
        ("1.2.3", "1.2.3"),
        ("0x10", "0x10"),
        (".inf", math.inf),
        ("[a, 1e-3]", ["a", 1e-3]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    found = read_run_file(written(tmp_path, f"key: {text}\n"))
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back(number: float) -> None:
    assert parse_value(repr(number)) == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "must hold 'key: value' lines, but holds a list"),
        ("just words\n", "holds a str"),
        ("seed: 1\nname: a\nseed: 2\n", r"line 3: the key 'seed' stands on line 1 already"),
        ("dualspeed: {keep_ratio: 0.1, keep_ratio: 0.2}\n", "the key 'keep_ratio' stands on line 1"),
        ("dualspeed:\n\tkeep_ratio: 0.1\n", r"line 2, column 1.*never with tabs"),
        ("a: [1, 2\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("1: one\n", "the key 1 must be the name of a setting"),
        (b"name: \xff\xfe\n", "is not UTF-8 text"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        read_run_file(written(tmp_path, text))
    assert "run.yaml" in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"There is no run file .*absent\.yaml"):
        read_run_file(tmp_path / "absent.yaml")
    with pytest.raises(SettingError, match="cannot be read as a run file"):
        read_run_file(tmp_path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert read_run_file(written(tmp_path, "\ufeffseed: 1\n")) == {"seed": 1}


def test_text_of_the_command_line_that_is_no_yaml_stays_text() -> None:
    assert parse_value("[unclosed") == "[unclosed"
    assert parse_value("a: b: c") == "a: b: c"
