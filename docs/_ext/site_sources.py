"""Links to files and folders of the repository lead to pages of the site that show them.

A document links to an example, a test or a folder of records by its place in the repository, as a code host needs it.
Here such a link becomes one to a page with the file's text, or with the folder's list. Records are copied as they are.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util.osutil import relative_uri

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DATA = ".json"
"""End of the names of files that are copied, not shown: coloured, the records of an experiment weigh 50 MB."""

LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".css": "css", ".html": "html"}
"""How files are coloured; all others are plain text."""

PLACE = "repository"
"""Folder of these pages on the site."""


def page_of(path: str) -> str:
    """Return the name of the page that shows a file or folder of the repository."""
    return posixpath.join(PLACE, path) if path != "." else PLACE


def address_of(app: Sphinx, path: str) -> str:
    """Return where on the site a file or folder of the repository is shown, or lies."""
    return page_of(path) if path.endswith(DATA) else app.builder.get_target_uri(page_of(path))


def _redirect_links(app: Sphinx, doctree: nodes.document) -> None:
    """Point links to files and folders at their pages; runs before Sphinx gathers downloads."""
    root = Path(app.srcdir).resolve()
    here = app.env.docname
    wanted: set[str] = app.env.site_sources  # type: ignore[attr-defined]  # ours, set below
    found = [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]
    for node in found:
        if node.get("reftype") != "myst" or node.get("refdomain"):
            continue
        target = (root / here).parent / node["reftarget"].partition("#")[0]
        if not target.exists():
            continue
        path = os.path.relpath(target.resolve(), root)
        if path.startswith(".."):
            continue
        readme = f"{path}/README"
        if readme in app.env.found_docs:
            address = app.builder.get_target_uri(readme)
        else:
            address = address_of(app, path)
            wanted.add(path)
        uri = relative_uri(app.builder.get_target_uri(here), address)
        node.replace_self(nodes.reference("", "", *node.children, internal=True, refuri=uri))


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the pages of all files and folders that documents link to, and of the files in these folders."""
    root = Path(app.srcdir).resolve()
    todo = sorted(app.env.site_sources)  # type: ignore[attr-defined]
    done: set[str] = set()
    while todo:
        path = todo.pop(0)
        if path in done:
            continue
        done.add(path)
        if path.endswith(DATA):
            target = Path(app.outdir) / page_of(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, target)
            continue
        if (root / path).is_dir():
            inside = _listed(root / path)
            todo += [posixpath.join(path, child.name) for child in inside]
            body = _list_page(app, path, inside)
        else:
            body = _file_page(app, path, (root / path).read_text(encoding="utf-8"))
        yield page_of(path), {"title": path, "body": body}, "page.html"


def _listed(folder: Path) -> list[Path]:
    """Return what a folder's page lists: folders and texts; weights and pictures of somebody's trials are left out."""
    children = (child for child in folder.iterdir() if not child.name.startswith((".", "__")))
    return sorted((child for child in children if _is_shown(child)), key=lambda child: (child.is_file(), child.name))


def _is_shown(path: Path) -> bool:
    if path.is_dir() or path.name.endswith(DATA):
        return True
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _list_page(app: Sphinx, path: str, inside: list[Path]) -> str:
    here = app.builder.get_target_uri(page_of(path))
    items = []
    for child in inside:
        uri = relative_uri(here, address_of(app, posixpath.join(path, child.name)))
        items.append(f'<li><a href="{_escape(uri)}">{_escape(child.name)}{"/" if child.is_dir() else ""}</a></li>')
    return f"<h1><code>{_escape(path)}/</code></h1>\n<ul>{''.join(items)}</ul>"


def _file_page(app: Sphinx, path: str, text: str) -> str:
    language = LANGUAGES.get(Path(path).suffix, "text")
    code = app.builder.highlighter.highlight_block(text, language, force=True)  # type: ignore[attr-defined]
    return f"<h1><code>{_escape(path)}</code></h1>\n{code}"


def _escape(text: str) -> str:
    return nodes.unescape(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _begin(app: Sphinx) -> None:
    app.env.site_sources = set()  # type: ignore[attr-defined]


def _front_door(app: Sphinx, error: Exception | None) -> None:
    """Let the top of the site lead to its first page, which lies where the document lies in the repository."""
    if error is None and app.builder.format == "html":
        target = app.builder.get_target_uri(app.config.root_doc)
        (Path(app.outdir) / "index.html").write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>trimtab</title>\n'
            f'<meta http-equiv="refresh" content="0; url={target}">\n</head>\n'
            f'<body>\n<main><h1>trimtab</h1><p><a href="{target}">The documentation</a></p></main>\n</body>\n</html>\n',
            encoding="utf-8",
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Enter the extension."""
    app.connect("builder-inited", _begin)
    app.connect("doctree-read", _redirect_links, priority=100)
    app.connect("html-collect-pages", _pages)
    app.connect("build-finished", _front_door)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
