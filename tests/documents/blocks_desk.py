"""A folder with what the documents speak of, in which their blocks run one after the other."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import io
import json
import re
import runpy
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from PIL import Image
from tests.documents import blocks_table as table
from tests.documents.blocks import Block, bare, blocks_of, command_lines
from tests.documents.reading import ROOT, blocks, short
from tests.run.small_run import write_model, write_rows

from trimtab.cli import main
from trimtab.run.config import build_config, load_config

README_RUN = yaml.safe_load(blocks((ROOT / "README.md").read_text(encoding="utf-8"), "yaml")[0])


class Desk:
    """Runs the blocks of one page.

    Args:
        folder: An empty folder; made the working directory.
        model: Folder with the tiny model.
        patch: What puts stand-ins in place of models with hub names.
        whole: Run commands and run files as they stand, as far as minutes allow.

    Attributes:
        output: What the block before printed.
        mask: What makes lines comparable: as they are where code printed them, numbers masked where a command did.
        scope: The names that the python blocks have made.
    """

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch, *, whole: bool = False) -> None:
        self.folder, self.model, self.patch, self.whole = folder, model, patch, whole
        self.output, self.mask = "", str.strip
        self.scope: dict[str, Any] = {"__name__": "page"}
        folder.mkdir(parents=True, exist_ok=True)
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("COLUMNS", "100")
        self._patch_hub()

    def lay_out(self) -> None:
        """Write the data files, a picture and the run file of the README."""
        write_rows(self.folder / "train.jsonl", count=8)
        write_rows(self.folder / "test.jsonl", "test", 4)
        rows = [json.loads(line) for line in (self.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        (self.folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
        shutil.copy(self.folder / "test-0.png", self.folder / "picture.png")
        self._write_run_file("run.yaml", README_RUN)

    def lay_quickstart(self) -> None:
        """Put the tiny model where quickstart leaves its start and its checkpoint."""
        for name in ("start", "checkpoint"):
            shutil.copytree(self.model, self.folder / "quickstart-out" / name, dirs_exist_ok=True)

    def run(self, block: Block, later: list[Block]) -> None:
        """Run a block; `later` are those behind it on the page."""
        assert hasattr(self, block.language), f"{block}: say what the block is, one of the languages that are run"
        for (page, start), instead in table.BLOCKS.items():
            if page == block.page and block.text.startswith(start):
                instead.check(self, block)
                return
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard):
            getattr(self, block.language)(block, later)
        if block.language != "text":
            self.output, self.mask = heard.getvalue(), plain if block.language == "bash" else str.strip

    def bash(self, block: Block, later: list[Block]) -> None:
        """Run the commands one after the other."""
        for words in map(bare, command_lines(block.text)):
            place = words.index(">") if ">" in words else len(words)
            heard = io.StringIO()
            with contextlib.redirect_stdout(heard):
                self._command(words[:place])
            print(heard.getvalue(), end="")
            for name in words[place + 1 :]:
                Path(name).write_text(heard.getvalue(), encoding="utf-8")

    def python(self, block: Block, later: list[Block]) -> None:
        """Run the code with the names of the blocks before; a block that is a file is written, too."""
        if block.file_name:
            Path(block.file_name).write_text(block.text, encoding="utf-8")
        code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec")
        exec(code, self.scope)

    def yaml(self, block: Block, later: list[Block]) -> None:
        """Load a run file; one that no later command uses, or a piece of one, trains."""
        settings = yaml.safe_load(block.text)
        name = block.file_name or "run.yaml"
        self._write_run_file(name, settings, block.text)
        if block.file_name is None or not any(name in one.text for one in later if one.language == "bash"):
            self.trimtab(["train", "--config", name, "--output_dir", f"out-{block.number}"])

    def toml(self, block: Block, later: list[Block]) -> None:
        """Offer the entry points of a package as if it were installed, and look for them."""
        from trimtab import pruner_names, registry
        from trimtab.pruners.registry import PRUNERS

        offered = tomllib.loads(block.text)["project"]["entry-points"]
        points = [EntryPoint(name, value, group) for group, some in offered.items() for name, value in some.items()]
        self.patch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])
        self.patch.setattr(PRUNERS, "_outside_loaded", False)
        for point in points:
            PRUNERS._classes.pop(point.name, None)  # a block before may have registered it by hand
        importlib.invalidate_caches()
        assert points
        assert {point.name for point in points} <= set(pruner_names()), f"{block}: not every entry point was found"

    def json(self, block: Block, later: list[Block]) -> None:
        """Read rows of a user's data; the pictures that they name are drawn."""
        from trimtab import load_rows

        rows = [json.loads(line) for line in block.text.splitlines()]
        for name in re.findall(r'"([\w./-]+\.(?:png|jpg))"', block.text):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 32), "red").save(name)
        Path("rows.jsonl").write_text(block.text, encoding="utf-8")
        assert len([*load_rows("rows.jsonl")]) == len(rows)

    def diff(self, block: Block, later: list[Block]) -> None:
        """The two changed lines make of one example the other."""
        from tests.documents.test_two_lines import CHANGED, PLAIN, apply

        assert apply(block.text, PLAIN.read_text(encoding="utf-8")) == CHANGED.read_text(encoding="utf-8")

    def text(self, block: Block, later: list[Block]) -> None:
        """Every line was printed by the block before, in this order; what commands print may have other numbers."""
        printed = iter(map(self.mask, self.output.splitlines()))
        for line in filter(None, map(self.mask, block.text.splitlines())):
            assert line == "..." or line in printed, f"{block}: {line!r} was not printed, or not here:\n{self.output}"

    def trimtab(self, words: list[str]) -> None:
        """Run a command of trimtab in this process."""
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code, f"trimtab {' '.join(words)} ended with {ended.value.code}"

    def _command(self, words: list[str]) -> None:
        key = longest(table.COMMANDS, words)
        if key is not None:
            table.COMMANDS[key].check(self, words)
            return
        shorter = table.WHOLE_SHORTER if self.whole else table.SHORTER
        more = longest(shorter, words)
        words = [*words, *shorter[more][0]] if more else words
        if words[:3] == ["python", "-m", "trimtab"]:
            words = words[2:]
        if words[0] == "trimtab":
            self.trimtab(words[1:])
            return
        example = words[0] == "python" and words[1].startswith("examples/")  # others may write into the repository
        assert example, f"tests/documents/blocks_table.py has to say what is done with {' '.join(words)!r}"
        self.patch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")

    def _write_run_file(self, name: str, settings: dict[str, Any], text: str = "") -> None:
        base = {} if "model_name_or_path" in settings else README_RUN
        settings = {**base, **settings}
        if self.whole:
            Path(name).write_text(text, encoding="utf-8")
        else:
            quick = {key: value for key, (value, _) in table.STAND_INS.items()}
            build_config(settings)  # what stands in the block is accepted as it stands
            settings = {**settings, **quick}
            if settings["model_name_or_path"] in table.HUB:
                settings["model_name_or_path"] = str(self.model)
            Path(name).write_text(yaml.safe_dump(settings), encoding="utf-8")
        load_config(name)

    def _patch_hub(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        for auto in (AutoModelForImageTextToText, AutoProcessor):
            stock = auto.from_pretrained

            def small(name: Any, *rest: Any, stock: Any = stock, **more: Any) -> Any:
                return stock(str(self.model) if name in table.HUB else name, *rest, **more)

            self.patch.setattr(auto, "from_pretrained", small)


def run_page(path: Path, desk: Desk) -> Iterator[tuple[Desk, Block]]:
    """Run the blocks of a page in order; yield the desk and each block when it is done."""
    found = blocks_of(path)
    folder, section = desk.folder, None
    for number, block in enumerate(found):
        if section is None or (short(path) in table.ALTERNATIVES and block.section != section):
            section = block.section
            desk = Desk(folder / str(section), desk.model, desk.patch, whole=desk.whole)
            desk.lay_out()
            if short(path) in table.AFTER_A_RUN:
                desk.trimtab(["train", "--config", "run.yaml"])
        desk.run(block, found[number + 1 :])
        yield desk, block


def let_warnings_pass() -> None:
    """Let the warnings of the table pass, for the test that runs."""
    for line in table.WARNINGS:
        action, message, category = line.split(":")
        warnings.filterwarnings(action, message, getattr(builtins, category))  # type: ignore[arg-type]


def longest(entries: Any, words: list[str]) -> tuple[str, ...] | None:
    """Return the longest key whose words the command begins with."""
    fitting = [key for key in entries if tuple(words[: len(key)]) == key]
    return max(fitting, key=len, default=None)


def plain(line: str) -> str:
    """Return a line without frames, with every number as one mark and every gap as one space."""
    line = re.sub(r"[─-╿]+", " ", line)
    return " ".join(re.sub(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "0", line).split())


def write_tiny_model(folder: Path, layers: int = 1) -> Path:
    """Write the model that stands in for large ones."""
    return write_model(folder, layers)
