"""The front door: public names stand once, resolve, and cost nothing until used."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).parents[2]
PUBLIC = sorted(trimtab._PUBLIC)
HEAVY = ("torch", "transformers", "matplotlib", "sklearn", "datasets", "numpy", "accelerate", "rich")


def loaded_after(code: str) -> set[str]:
    """Return the top-level libraries that a fresh interpreter holds after running `code`."""
    ending = "\nimport sys\nprint('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_to_what_its_module_holds(name: str) -> None:
    value = getattr(trimtab, name)
    assert value is getattr(importlib.import_module(trimtab._PUBLIC[name]), name)
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_declared_public_by_its_module(name: str) -> None:
    module = importlib.import_module(trimtab._PUBLIC[name])
    if hasattr(module, "__all__"):
        assert name in module.__all__


def test_the_type_checker_sees_the_same_names() -> None:
    tree = ast.parse((ROOT / "src" / "trimtab" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: line.module for line in block.body if isinstance(line, ast.ImportFrom) for alias in line.names}
    assert seen == trimtab._PUBLIC


def test_all_error_classes_are_public() -> None:
    from trimtab import errors

    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert classes == {name for name, module in trimtab._PUBLIC.items() if module == "trimtab.errors"}


def test_dir_lists_the_public_names() -> None:
    assert set(PUBLIC) <= set(dir(trimtab))


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'attach'"):
        trimtab.atach  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert written is not None
    assert trimtab.__version__ == written.group(1) == version("trimtab")


def test_importing_trimtab_loads_nothing_heavy() -> None:
    assert loaded_after("import trimtab").isdisjoint(HEAVY)


def test_the_probe_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_after("import numpy")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["methods"], ["methods", "dualspeed", "--json"], ["train", "--help"], ["vtw", "search", "--help"]],
)
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    call = f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code"
    assert loaded_after(f"from trimtab.cli import main\n{call}").isdisjoint(
        {"torch", "transformers", "matplotlib", "datasets", "sklearn"}
    )


def test_importing_changes_no_warning_filter_and_no_environment() -> None:
    code = (
        "import os, warnings\nbefore = (dict(os.environ), list(warnings.filters))\nimport trimtab, trimtab.cli\n"
        "assert before == (dict(os.environ), list(warnings.filters))"
    )
    loaded_after(code)
