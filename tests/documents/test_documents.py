"""Documents say what is so: commands, flags, targets, imports, links and the table of methods."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tomllib
import typer
import yaml
from tests.documents.reading import DOCUMENTS, ROOT, blocks, commands, inline_commands, links, short

from trimtab.cards import all_cards, markdown_table
from trimtab.cli.app import app
from trimtab.dualspeed.config import DualSpeedConfig
from trimtab.run.config import RunConfig, build_config, training_hints

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
CLI = typer.main.get_command(app)
OTHERS = {"swift", "lmms-eval"}
"""Commands of other frameworks, whose options are not looked at."""
TAKES_SETTINGS = {"train", "eval", "check", "bench"}
documents = pytest.mark.parametrize("path", DOCUMENTS, ids=short)


def settings_names() -> set[str]:
    own = {f.name for f in fields(RunConfig)} | {f"dualspeed.{f.name}" for f in fields(DualSpeedConfig)}
    return own | set(training_hints("trainer"))


def check_trimtab(words: list[str]) -> None:
    """Raise where a command line of trimtab names a command or an option that does not exist."""
    assert words, "trimtab without a command"
    if words[0].startswith("--"):
        assert words[0] in {option for parameter in CLI.params for option in parameter.opts}
        return
    assert words[0] in CLI.commands, f"trimtab has no command {words[0]}"
    command = CLI.commands[words[0]]
    if hasattr(command, "commands") and words[1:] and not words[1].startswith("-"):
        assert words[1] in command.commands, f"trimtab {words[0]} has no command {words[1]}"
        command = command.commands[words[1]]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in (word.partition("=")[0] for word in words[1:] if word.startswith("-")):
        taken = words[0] in TAKES_SETTINGS and word[2:].replace("-", "_") in settings_names()
        bench = words[0] == "bench" and word[2:] in bench_arguments(words[1])
        assert word in options or taken or bench, f"trimtab {words[0]} has no option {word}"


def bench_arguments(kind: str) -> set[str]:
    from trimtab.bench.pruners import bench_pruners
    from trimtab.run.bench_training import bench_training

    functions = {"pruners": bench_pruners, "training": bench_training}
    return set(inspect.signature(functions[kind]).parameters) if kind in functions else set()


def check_command(words: list[str]) -> None:
    """Raise where a command line names something that does not exist."""
    if words[0] == "make":
        assert set(words[1:2]) <= TARGETS, f"the Makefile has no target {words[1]}"
    elif words[0] == "accelerate" and "trimtab" not in words:
        assert (ROOT / words[-1]).is_file(), f"there is no script {words[-1]}"
    elif "trimtab" in words[:4] or words[0] == "accelerate":
        check_trimtab(words[words.index("trimtab") + 1 :])
    elif words[:2] == ["pip", "install"]:
        assert words[2] == "-e", "trimtab is on no package index yet: install it from the folder"
        assert words[3].startswith(".")
        extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= extras
    elif words[0] == "python":
        script = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
        assert (ROOT / f"{script}.py").is_file() or (ROOT / script).is_dir(), f"there is no script {words[1:3]}"
    else:
        assert words[0] in {"git", "cd", "source", *OTHERS}, f"what is {words[0]}?"


@documents
def test_every_command_exists_with_its_options(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for words in [*commands(text), *inline_commands(text)]:
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "make nonsense",
        "trimtab nonsense",
        "trimtab train --learning_rat 1",
        "trimtab export --fast",
        "trimtab vtw nonsense",
        "trimtab vtw search --fast",
        "trimtab bench training --text_men 40",
        "python none.py",
        "pip install trimtab[view]",
        "pip install -e .[viw]",
        "python -m none.at_all",
    ],
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(line.split())


@documents
def test_python_blocks_compile_and_their_imports_exist(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        tree = compile(block, short(path), "exec", flags=0x400)
        for node in tree.body:
            for name in getattr(node, "names", []):
                module = getattr(node, "module", None)
                found = importlib.import_module(module or name.name)
                assert module is None or hasattr(found, name.name), f"{module} has no {name.name}"


@documents
def test_run_files_are_accepted(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8"), "yaml"):
        settings = yaml.safe_load(block)
        if "model_name_or_path" in settings:
            build_config(settings)


@documents
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{short(path)} links to {target}"


def pictures(text: str) -> list[tuple[str, str]]:
    """Return words and place of every picture of a document."""
    return re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", text)


def test_every_picture_is_shown_and_told_in_words() -> None:
    shown = {
        (path.parent / place).resolve(): words
        for path in DOCUMENTS
        for words, place in pictures(path.read_text(encoding="utf-8"))
    }
    assert set(shown) == set((ROOT / "docs" / "pictures").iterdir()), "a picture that no document shows, or none"
    for place, words in shown.items():
        assert len(words.split()) > 6, f"say what {place.name} shows to those who do not see it"


def test_the_table_of_methods_is_the_one_of_the_cards() -> None:
    between = re.search(r"<!-- methods:[^\n]*-->\n(.*?)\n?<!-- /methods -->", README, re.DOTALL)
    assert between is not None
    assert between.group(1) == markdown_table(all_cards()), "run: python -m trimtab methods --markdown"


def test_the_readme_shows_the_two_commands_first() -> None:
    assert commands(README)[:2] == [["make", "quickstart"], ["make", "test"]]


def test_ci_calls_the_checks_and_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    called = re.findall(r"^make (?:--\S+ )?(\S+)$", script, re.MULTILINE)
    assert called == ["check", "docs", commands(README)[1][1]]
    assert script.index("export TRIMTAB_BROWSER=required\n") < script.index("make --no-print-directory check\n")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("target", ["quickstart", "test", "test-all", "browser", "docs", "check", "format"])
def test_every_target_makes_its_environment(target: str) -> None:
    rule = re.search(rf"^{target}: (\S+) ##", MAKEFILE, re.MULTILINE)
    assert rule is not None
    assert rule.group(1) in {".venv/.stamp-run", ".venv/.stamp-dev"}


def test_the_contributing_guide_shows_a_card_that_parses() -> None:
    from trimtab.cards import parse_card

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    card = next(block for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S) if block.startswith("Name:"))
    assert parse_card("name", card).paper == "title, venue or arXiv number"


def test_the_pinned_versions_meet_what_the_package_asks_for() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {Requirement(line).name.lower(): Requirement(line) for line in lines if line and line[0] != "#"}
    for requirement in map(Requirement, wanted):
        pin = pinned[requirement.name.lower()]
        version = next(iter(pin.specifier)).version
        assert requirement.specifier.contains(version), f"{requirement} against {pin}"


def test_the_constraints_name_neither_places_nor_local_builds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))
    assert "torch==2.13.0" in lines


def test_versions_agree() -> None:
    import trimtab

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == trimtab.__version__
    assert citation["license"] == "Apache-2.0"
    assert f"## {trimtab.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text


def test_make_help_lists_the_targets() -> None:
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make (\S+)", told, re.MULTILINE)) == TARGETS


def test_python_m_trimtab_prints_the_table() -> None:
    command = [sys.executable, "-m", "trimtab", "methods", "--markdown"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.strip() == markdown_table(all_cards())
