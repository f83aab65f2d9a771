"""The documentation site: builds without a warning, leads nowhere wrong, asks no other host, lacks nothing public."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.cli.commands import commands
from tests.documents.site import ROOT, STRICT, Page, broken_targets, built_site, is_outside, read_pages

import trimtab
import trimtab.methods
from trimtab.cards import all_cards
from trimtab.pruners import PRUNERS
from trimtab.run.config import RunConfig

pytest.importorskip("sphinx", reason="the extra `docs` is not installed")

OUTSIDE = {
    "github.com": "projects that ours plugs into",
    "semver.org": "what a version number means",
}
"""Sites that links may lead to, with the reason; there is no network to look whether they are there."""

HEADINGS = (
    "For whom", "The idea", "Smallest example", "Settings", "What we measured", "Limits",
    "Where we differ from the paper",
)  # fmt: skip
"""What the page of every method says, in this order; others may stand between."""

REFERENCE = "docs/reference/{}.html"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_site(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return read_pages(site)


def ids(pages: dict[str, Page]) -> set[str]:
    return {one for name, page in pages.items() if name.startswith("docs/reference/") for one in page.ids}


def test_the_command_builds_as_strictly_as_the_tests() -> None:
    rule = re.search(r"^docs: .*\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert rule is not None
    assert set(STRICT) <= set(rule[1].split())
    assert rule[1].endswith("-c docs . build/docs/html")


def test_every_document_is_a_page(pages: dict[str, Page]) -> None:
    for path in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("C*.md"), *(ROOT / "experiments").rglob("*.md")]:
        assert path.relative_to(ROOT).with_suffix(".html").as_posix() in pages


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert broken_targets(site, pages) == []


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ('<a href="gone.html">', True),
        ('<a href="#gone">', True),
        ('<a href="other.html#gone">', True),
        ('<img src="gone.png">', True),
        ('<a href="other.html#here"><a href="#top" id="top"><a href="https://example.org/gone">', False),
    ],
)
def test_a_wrong_link_would_be_found(tmp_path: Path, body: str, wrong: bool) -> None:
    (tmp_path / "page.html").write_text(body)
    (tmp_path / "other.html").write_text('<p id="here">')
    assert bool(broken_targets(tmp_path, read_pages(tmp_path))) is wrong


def test_links_to_other_sites_are_few_and_known(pages: dict[str, Page]) -> None:
    found = {target for page in pages.values() for target in page.links if is_outside(target)}
    for target in found:
        assert re.fullmatch(r"https://[\w.-]+(/[\w./#?=&%-]*)?", target), target
    assert {target.split("/")[2] for target in found} == set(OUTSIDE)


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    loaded = [target for page in pages.values() for target in page.loaded]
    assert loaded
    assert not [target for target in loaded if is_outside(target) and not target.startswith("data:")]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", text), style.name


def test_the_top_of_the_site_leads_to_its_first_page(site: Path, pages: dict[str, Page]) -> None:
    assert pages["index.html"].links == ["docs/index.html"]
    assert 'content="0; url=docs/index.html"' in (site / "index.html").read_text(encoding="utf-8")


def test_links_to_files_show_their_text(site: Path, pages: dict[str, Page]) -> None:
    linked = [target for target in pages["docs/reference/pruners.html"].links if "own_pruner.py" in target]
    assert linked == ["../../repository/examples/own_pruner.py.html"]
    shown = (site / "repository" / "examples" / "own_pruner.py.html").read_text(encoding="utf-8")
    assert "register_pruner" in re.sub(r"<[^>]+>", "", shown)


@pytest.mark.parametrize("name", sorted(trimtab._PUBLIC))
def test_every_public_name_has_a_place(pages: dict[str, Page], name: str) -> None:
    assert f"trimtab.{name}" in ids(pages), f"write {name} into a mark of docs/reference/*.md"


@pytest.mark.parametrize("room", [one.name for one in pkgutil.iter_modules(trimtab.methods.__path__)])
def test_every_public_name_of_a_method_has_a_place(pages: dict[str, Page], room: str) -> None:
    package = f"trimtab.methods.{room}"
    names = {f"{package}.{name}" for name in importlib.import_module(package).__all__}
    assert names <= pages[REFERENCE.format(room)].ids, f"write them into a mark of docs/reference/{room}.md"


@pytest.mark.parametrize("name", [field.name for field in fields(trimtab.DualSpeedConfig)])
def test_every_field_of_dualspeed_has_a_place(pages: dict[str, Page], name: str) -> None:
    assert f"trimtab.DualSpeedConfig.{name}" in pages[REFERENCE.format("settings")].ids


@pytest.mark.parametrize("name", [field.name for field in fields(RunConfig)])
def test_every_field_of_a_run_has_a_place(pages: dict[str, Page], name: str) -> None:
    assert f"trimtab.run.config.RunConfig.{name}" in pages[REFERENCE.format("settings")].ids


def test_a_field_shows_its_type_and_default(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / REFERENCE.format("settings")).read_text(encoding="utf-8"))
    assert re.search(r"keep_ratio: float = 0\.1", text)
    assert re.search(r"pack_tokens: int \| None = None", text)


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_shows_its_options_and_an_example(site: Path, name: str) -> None:
    text = (site / REFERENCE.format("commands")).read_text(encoding="utf-8")
    found = re.search(rf'<section id="trimtab-{name.replace(" ", "-")}">(.*?)</section>', text, re.DOTALL)
    assert found is not None
    words = re.sub(r"<[^>]+>", "", found[1])
    for parameter in commands()[name].params:
        assert all(option in words for option in parameter.opts if option.startswith("-")), parameter.name
    assert f"trimtab {name}" in words.partition("\n")[2], "an example"


@pytest.mark.parametrize("name", [n for n, cls in PRUNERS.items() if cls.__module__.startswith("trimtab.")])
def test_every_pruner_has_a_place(pages: dict[str, Page], name: str) -> None:
    cls = PRUNERS.get(name)
    page = pages[REFERENCE.format("pruners")]
    assert f"{cls.__module__}.{cls.__qualname__}" in page.ids
    assert name.replace("_", "-") in page.ids


def test_every_module_of_tensor_functions_has_a_place(pages: dict[str, Page]) -> None:
    from trimtab import ops

    for module in pkgutil.iter_modules(ops.__path__, "trimtab.ops."):
        own = [
            f"{module.name}.{name}"
            for name, value in vars(importlib.import_module(module.name)).items()
            if callable(value) and getattr(value, "__module__", "") == module.name and not name.startswith("_")
        ]
        assert own
        assert set(own) <= pages[REFERENCE.format("ops")].ids


def kinds_of_records() -> set[str]:
    """Return the kinds that calls of ``make_record`` name, in the package and in the scripts."""
    found = set()
    for path in (one for folder in ("src", "bench", "experiments") for one in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "make_record":
                kind = node.args[0]
                found.add(kind.value if isinstance(kind, ast.Constant) else named[kind.id])  # type: ignore[attr-defined]
    return found


def test_every_kind_and_field_of_a_record_is_described() -> None:
    from trimtab.records import make_record

    text = (ROOT / "docs" / "reference" / "records.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    record = make_record("any", {}, {})
    assert kinds_of_records() <= set(rows), "a kind without a row"
    assert set(rows) == set(record) | kinds_of_records(), "a row that no record has"


@pytest.mark.parametrize("card", all_cards(), ids=lambda card: card.name)
def test_every_method_has_a_page_under_the_same_headings(card: Any) -> None:
    text = (ROOT / "docs" / "methods" / f"{card.name}.md").read_text(encoding="utf-8")
    found = [heading for heading in re.findall(r"^## (.*)$", text, re.MULTILINE) if heading in HEADINGS]
    assert tuple(found) == HEADINGS


def test_nothing_that_a_user_leaves_in_the_checkout_becomes_a_page(tmp_path: Path) -> None:
    from sphinx.util.matching import get_matching_files

    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    kept = ["README.md", "docs/index.md", "docs/guides/trl.md", "experiments/dualspeed/README.md"]
    left = [
        "quickstart-out/checkpoint/README.md", "runs/a/README.md", ".venv/lib/x/docs/a.md", "venv/x.md", "out/a.md",
        "build/docs/html/a.md", "tests/a.md", "NOTES.md", "docs/.ipynb_checkpoints/a.md", "experiments/a/records/b.md",
    ]  # fmt: skip
    for name in [*kept, *left]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = get_matching_files(tmp_path, conf["include_patterns"], conf["exclude_patterns"])
    assert set(found) == set(kept)


def test_a_folder_lists_texts_and_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    listed = importlib.import_module("site_sources")._listed
    for name in ("script.py", "record.json", "model.safetensors", ".hidden", "__pycache__/a.pyc", "inside/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xfe\x00" if name == "model.safetensors" else b"text")
    assert [path.name for path in listed(tmp_path)] == ["inside", "record.json", "script.py"]


def test_a_mark_that_is_not_known_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    marks = importlib.import_module("site_marks")
    with pytest.raises(KeyError, match="nonsense"):
        marks.expand("<!-- site: nonsense -->")
    assert marks.expand("no mark") == "no mark"
    assert "attach" in marks.expand("<!-- site: names attach -->")
