"""Imports go one way: a walk over the syntax trees, with a table of what each part may see."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "trimtab"

FLOOR = {"errors", "shapes", "registry", "files", "records"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "shapes": {"errors"},
    "registry": {"errors"},
    "files": {"errors"},
    "records": {"errors", "files"},
    "cards": {"errors"},
    "ops": FLOOR,
    "anatomy": FLOOR | {"ops"},
    "pruners": {"errors", "shapes", "ops", "registry"},
    "data": FLOOR | {"ops"},
    "evaluate": FLOOR | {"ops", "anatomy", "data"},
    "bench": FLOOR | {"ops", "anatomy", "data", "evaluate", "pruners"},
    "report": FLOOR | {"evaluate"},
    "dualspeed": FLOOR | {"ops", "anatomy", "pruners", "data"},
    "methods": FLOOR | {"ops", "anatomy", "bench"},
    "quickstart": FLOOR | {"ops", "anatomy", "pruners", "data", "evaluate", "bench", "report", "dualspeed", "run"},
    "run": FLOOR | {"ops", "anatomy", "pruners", "data", "evaluate", "bench", "report", "dualspeed"},
    "integrations": FLOOR | {"ops", "anatomy", "pruners", "data", "evaluate", "dualspeed", "run"},
    "view": FLOOR | {"ops", "anatomy", "pruners", "data", "evaluate", "report", "dualspeed", "run"},
    "cli": FLOOR
    | {"cards", "ops", "anatomy", "pruners", "data", "evaluate", "bench", "report", "dualspeed", "methods"}
    | {"run", "quickstart", "view", "__init__"},
    "__main__": {"cli"},
}
"""What each part may import beside itself. ``__init__`` stands for names taken from ``trimtab`` itself."""

FRONT_DOOR = {"errors", "anatomy", "data", "dualspeed", "evaluate", "pruners", "report"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: Path, package: Path = PACKAGE) -> str:
    """Name the part of the house that a file belongs to."""
    return module.relative_to(package).parts[0].removesuffix(".py")


def imported_modules(source: str, here: tuple[str, ...]) -> Iterator[str]:
    """Yield the dotted names of all imports in a source, also those inside functions; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module or ""]))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def seen_parts(source: str, here: tuple[str, ...]) -> set[str]:
    """Name the parts of trimtab that a source imports."""
    names = [name.split(".") for name in imported_modules(source, here)]
    inside = [name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "trimtab"]
    return {part if part in ALLOWED else "__init__" for part in inside}


def test_the_walk_sees_every_form_of_import() -> None:
    source = (
        "import trimtab.cli\nfrom trimtab.run import x\ndef f():\n    from .. import data\n    from trimtab import y\n"
    )
    assert seen_parts(source, ("trimtab", "cli")) == {"cli", "run", "data", "__init__"}
    assert set(imported_modules(source, ("trimtab", "cli"))) == {
        "trimtab.cli",
        "trimtab.run.x",
        "trimtab.data",
        "trimtab.y",
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_go_one_way(module: Path) -> None:
    part = part_of(module)
    relative = module.relative_to(PACKAGE.parent).with_suffix("").parts
    seen = seen_parts(module.read_text(encoding="utf-8"), relative[:-1])
    if part == "__init__":
        assert seen <= FRONT_DOOR
        return
    assert part in ALLOWED, f"{part} is new in the house: enter it in ALLOWED with what it may import"
    assert seen - {part} <= ALLOWED[part], f"{module.name} may not import {sorted(seen - {part} - ALLOWED[part])}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_nothing_imports_what_stands_outside_the_package(module: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(module.read_text(encoding="utf-8"), ("trimtab",))}
    assert not roots & {"examples", "experiments", "tests"}


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_no_module_imports_a_library_that_is_never_required(library: str) -> None:
    users = [
        module.name
        for module in MODULES
        if library in {name.split(".")[0] for name in imported_modules(module.read_text(encoding="utf-8"), ("x",))}
    ]
    assert users == []


def test_a_room_imports_no_other_room() -> None:
    for module in (PACKAGE / "methods").glob("*/**/*.py"):
        room = module.relative_to(PACKAGE / "methods").parts[0]
        here = module.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
        for name in imported_modules(module.read_text(encoding="utf-8"), here):
            if name.startswith("trimtab.methods."):
                assert name.split(".")[2] == room, f"{module} imports another room: {name}"


def test_no_module_outside_a_room_names_a_room() -> None:
    """Deleting a room's folder breaks nothing: only the command line may import one, and by its name at run time."""
    rooms = {path.parent.name for path in (PACKAGE / "methods").glob("*/__init__.py")}
    for module in MODULES:
        if part_of(module) == "methods":
            continue
        here = module.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
        for name in imported_modules(module.read_text(encoding="utf-8"), here):
            assert not (name.startswith("trimtab.methods.") and name.split(".")[2] in rooms), f"{module}: {name}"


def test_the_table_allows_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part, seen in ALLOWED.items() if part not in done and seen - {"__init__"} <= done}
        assert ready, f"These parts may import each other in a circle: {sorted(set(ALLOWED) - done)}"
        done |= ready
