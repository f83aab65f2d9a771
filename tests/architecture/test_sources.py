"""What holds for every file: docstrings, no path of a machine, no random state but our own."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("src", "examples", "experiments", "tests") for path in (ROOT / folder).rglob("*.py")
)
PACKAGE_FILES = sorted((ROOT / "src" / "trimtab").rglob("*.py"))
TEXT_ENDINGS = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".html", ".css", ".cff", ""}
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|mnt|farm)/\w")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def kept_files() -> list[Path]:
    """List what belongs to the project: files that git tracks, or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a clone to know which files belong to the project")
    return [ROOT / name for name in listing.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:
        assert (ast.get_docstring(tree) or "").strip(), f"{short(path)} has no docstring"


def test_the_pattern_finds_paths_of_a_machine() -> None:
    slash = "/"
    assert MACHINE_PATH.search(f"see {slash}home{slash}someone")
    assert MACHINE_PATH.search(f"'{slash}root{slash}x'")
    assert not MACHINE_PATH.search("https://example.org/home/page")
    assert not MACHINE_PATH.search("runs/work/one")


def test_no_file_names_a_path_of_a_machine() -> None:
    found = [
        f"{short(path)}: {match.group()}"
        for path in kept_files()
        if path.suffix in TEXT_ENDINGS and path.name != "LICENSE"
        for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


def calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=short)
def test_the_package_leaves_global_random_states_alone(path: Path) -> None:
    forbidden = {"random.seed", "np.random.seed", "numpy.random.seed", "random.random", "random.choice"}
    assert not calls(ast.parse(path.read_text(encoding="utf-8"))) & forbidden


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=short)
def test_the_package_starts_no_process_group(path: Path) -> None:
    named = {name.rpartition(".")[2] for name in calls(ast.parse(path.read_text(encoding="utf-8")))}
    assert "init_process_group" not in named


def test_no_file_is_larger_than_one_page_of_one_idea() -> None:
    long = {short(path): n for path in PACKAGE_FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 600}
    assert long == {}
