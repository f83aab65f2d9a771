"""What the site puts in place of comments in a document, so that the Markdown reads well on a code host too.

A line such as ``<!-- site: names attach detach -->`` is replaced before the document is parsed:

==================== =====================================================================
mark                 becomes
==================== =====================================================================
contents             a hidden table of contents: the documents that are linked to below the mark
names NAMES          signature and docstring of names of `trimtab`, or of those with a dotted path
fields CLASS         a settings class with type, default and meaning of every field
pruners              every registered pruner with its options
modules PACKAGE      every module of a package with what it defines
commands             every command of the command line with its options and its example
errors               the tree of errors
==================== =====================================================================
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from command_pages import command_sections

from trimtab.pruners import PRUNERS

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MARK = re.compile(r"^<!-- site: (\w+)(.*?) -->$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\(([\w./-]+)\.md\)")
MEMBERS = ["   :members:"]


def names(words: str) -> str:
    """Return the directives that show public names."""
    paths = [word if "." in word else f"trimtab.{word}" for word in words.split()]
    return _rst([line for path in paths for line in _directive(path, _load(path))])


def fields(path: str) -> str:
    """Return the directives that show a settings class; the fields come from its docstring, see site_docstrings."""
    return _rst([f".. autoclass:: {path.strip()}", *MEMBERS])


def pruners(_: str) -> str:
    """Return a section for every pruner of the registry."""
    parts = []
    for name, cls in PRUNERS.items():
        needs = ", ".join(f"`{need}`" for need in sorted(cls.needs)) or "nothing beyond the features"
        directive = [f".. autoclass:: {cls.__module__}.{cls.__qualname__}"]
        parts.append(f"### {name}\n\n`pruner: {name}` needs {needs}.\n\n{_rst(directive)}")
    return "\n\n".join(parts)


def modules(package: str) -> str:
    """Return a section for every module of a package."""
    root = importlib.import_module(package.strip())
    found = sorted(module.name for module in pkgutil.iter_modules(root.__path__, f"{root.__name__}."))
    return "\n\n".join(f"## {name}\n\n" + _rst([f".. automodule:: {name}", *MEMBERS]) for name in found)


def commands(_: str) -> str:
    """Return a section for every command."""
    return command_sections()


def errors(_: str) -> str:
    """Return the tree of errors, and every class of it."""
    module = importlib.import_module("trimtab.errors")
    tree = re.search(r"::\n\n(.*?)\n\nEvery", inspect.getdoc(module) or "", re.DOTALL)
    assert tree is not None, "the docstring of trimtab.errors shows the tree"
    classes = [name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Exception)]
    return f"```text\n{inspect.cleandoc(tree[1])}\n```\n\n{names(' '.join(classes))}"


EXPANSIONS: dict[str, Callable[[str], str]] = {
    function.__name__: function for function in (names, fields, pruners, modules, commands, errors)
}


def expand(text: str) -> str:
    """Return a document with every mark replaced.

    Raises:
        KeyError: There is no such mark.
    """

    def replace(found: re.Match[str]) -> str:
        return contents(text[found.end() :]) if found[1] == "contents" else EXPANSIONS[found[1]](found[2])

    return MARK.sub(replace, text)


def contents(text: str) -> str:
    """Return a hidden table of contents: the documents that a text links to, in its order and in its words."""
    entries = {target: f"{words} <{target}>" for words, target in reversed(LINK.findall(text))}
    return "\n".join(["```{toctree}", ":hidden:", "", *reversed(entries.values()), "```"])


def _directive(path: str, value: object) -> list[str]:
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        bases = ["   :show-inheritance:"] if kind == "autoexception" else []
        return [f".. {kind}:: {path}", *MEMBERS, *bases, ""]
    return [f".. autofunction:: {path}", ""]


def _load(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _rst(lines: list[str]) -> str:
    return "\n".join(["```{eval-rst}", *lines, "```"])


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
    content[0] = expand(content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Enter the extension."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
