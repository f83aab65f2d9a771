"""Every code block of the README and of the pages under docs is run, in order, as a reader would."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.documents import blocks_table as table
from tests.documents.blocks import LANGUAGES, PAGES, Block, bare, blocks_of, command_lines, parse
from tests.documents.blocks_desk import Desk, let_warnings_pass, longest, plain, run_page, write_tiny_model
from tests.documents.reading import ROOT, short

README = ROOT / "README.md"
WITH_BLOCKS = [path for path in PAGES if blocks_of(path) and path != README]  # test_readme_runs.py runs that one
TUTORIAL = ROOT / "docs" / "tutorial.md"
EVERY = [block for path in PAGES for block in blocks_of(path)]
NEEDED = {"docs/guides/trl.md": "trl", "docs/guides/peft.md": "peft"}
"""Extras that a page is about."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Undo after the test what a page changes in this process: patched names, pruners it registers."""
    from trimtab.pruners import pruner_names
    from trimtab.pruners.registry import PRUNERS

    pruner_names()
    before = dict(PRUNERS._classes)
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    PRUNERS._classes = before


@pytest.mark.parametrize("path", WITH_BLOCKS, ids=short)
def test_the_blocks_of_a_page_run(path: Path, model: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if short(path) in NEEDED:
        pytest.importorskip(NEEDED[short(path)])
    if short(path) in table.LAYERS:
        model = write_tiny_model(tmp_path / "deep", table.LAYERS[short(path)][0])
    let_warnings_pass()
    for _ in run_page(path, Desk(tmp_path, model, patch)):
        pass


@pytest.mark.parametrize("block", EVERY, ids=str)
def test_every_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block}: say which of {', '.join(LANGUAGES)} it is"
    assert block.text.strip(), f"{block} is empty"


@pytest.mark.parametrize("block", [block for block in EVERY if block.language == "python"], ids=str)
def test_a_block_makes_no_function_that_its_page_does_not_use(block: Block) -> None:
    page = [other for other in EVERY if other.page == block.page]
    text = "\n".join(other.text for other in page)
    for node in ast.parse(block.text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list:
            assert text.count(node.name) > 1, f"{block}: {node.name} is made but not used, so that it was not run"


def commands_of_all() -> list[list[str]]:
    return [bare(words) for block in EVERY if block.language == "bash" for words in command_lines(block.text)]


@pytest.mark.parametrize("entries", ["COMMANDS", "SHORTER", "WHOLE_SHORTER"])
def test_no_entry_for_commands_is_left_over(entries: str) -> None:
    wanted = getattr(table, entries)
    used = {longest(wanted, words) for words in commands_of_all()} - {None}
    assert used == set(wanted), "take out of the table what no block uses"


def test_no_entry_for_blocks_and_pages_is_left_over() -> None:
    text = "\n".join(block.text for block in EVERY)
    settings = "\n".join(block.text for block in EVERY if block.language == "yaml")
    for page, start in table.BLOCKS:
        assert sum(b.page == page and b.text.startswith(start) for b in EVERY) == 1, f"one block {start} in {page}"
    assert {b.page for b in EVERY} >= {*table.AFTER_A_RUN, *table.ALTERNATIVES, *table.LAYERS, *NEEDED}
    assert all(name in text for name in table.HUB)
    assert all(name in settings for name in table.STAND_INS if name not in ("disable_tqdm",))


def test_every_exception_has_a_reason() -> None:
    reasons = [one.reason for one in [*table.COMMANDS.values(), *table.BLOCKS.values()]]
    with_values = (table.SHORTER, table.STAND_INS, table.WHOLE_SHORTER, table.LAYERS)
    reasons += [reason for one in with_values for _, reason in one.values()]
    reasons += [
        *table.HUB.values(),
        *table.AFTER_A_RUN.values(),
        *table.ALTERNATIVES.values(),
        *table.WARNINGS.values(),
    ]
    assert all(len(reason.split()) > 3 for reason in reasons)


BROKEN = {
    "an error": ("python", "1 / 0", ZeroDivisionError),
    "a wrong output": ("text", "step 3: something else", AssertionError),
    "an unknown option": ("bash", "trimtab methods --nothing", AssertionError),
    "a command without a rule": ("bash", "curl nowhere", AssertionError),
    "an unknown setting": ("yaml", "keep_ration: 0.1", Exception),
    "a row without an answer": ("json", '{"messages": [{"role": "user", "content": "why"}]}', Exception),
    "a diff that does not fit": ("diff", "-nothing\n+something", AssertionError),
    "a language that is not run": ("ruby", "puts 1", AssertionError),
    "no language": ("", "text", AssertionError),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_block_is_found(kind: str, model: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    language, text, error = BROKEN[kind]
    desk = Desk(tmp_path, model, patch)
    desk.lay_out()
    with pytest.raises(error):
        desk.run(Block("page.md", 1, 1, language, text + "\n", 0), [])


def test_outputs_are_compared_but_for_numbers_and_frames() -> None:
    assert plain("┃ seconds │  1.25e-3  ┃") == plain("| seconds 7")[2:] == "seconds 0"
    assert plain("accuracy 0.9") != plain("accuracy high")


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("```python\nx = 1\n", "not closed"),
        ("text\n\n    x = 1\n", "without a fence"),
        ("````text\na\n```\n", "not closed"),
    ],
)
def test_code_outside_of_fences_is_found(page: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        parse(page, "page.md")


@pytest.mark.slow
def test_the_tutorial_runs_from_quickstart_on(model: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No stand-ins: the models, run files and data of the tutorial, until it speaks of a hub."""
    let_warnings_pass()
    desk = Desk(tmp_path, model, patch, whole=True)
    found = blocks_of(TUTORIAL)
    upto = next(number for number, block in enumerate(found) if any(name in block.text for name in table.HUB))
    assert upto > 8
    for number, block in enumerate(found[:upto]):
        desk.run(block, found[number + 1 :])
