"""Settings of the documentation site; `make docs` builds it into build/docs/html.

The whole repository is the source, so that links from the documents to README, changelog, examples and records lead
somewhere on the site as they do on a code host. Extensions of our own are in `_ext`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from trimtab import __version__  # noqa: E402  # the line above is for the extensions, which Sphinx imports later

project = "trimtab"
author = "The trimtab developers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_marks",
    "site_docstrings",
    "site_sources",
    "site_access",
]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "experiments/**.md"]
exclude_patterns = [".venv", ".git", "build", "src", "tests", "bench", "runs", "quickstart-out", "**/records", "**/.*"]
source_suffix = {".md": "markdown"}
templates_path = ["_templates"]

myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.xref_ambiguous"]

# A name in single backticks within a docstring is a link where the reference has it, and code where it has not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
add_module_names = False

nitpicky = True
nitpick_ignore_regex = [
    # Single backticks also name settings, arguments and files, which have no place of their own; see default_role.
    (r"py:obj", r".*"),
    # Types of other libraries: their documentation is elsewhere, and a build must not need the network.
    (
        r"py:.*",
        r"(torch|transformers|datasets|PIL|numpy|jaxtyping|collections|typing|pathlib|os|contextlib|datetime)\..*",
    ),
    (r"py:class", r"Tensor|Bool|Float|Int"),
    # Inside of trimtab, and left out of the reference on purpose; `T` is what a decorator takes and returns.
    (r"py:class", r"trimtab\.(registry\.T|dualspeed\.samples\.NoteRows|dualspeed\.isolator\.ModeIsolator)"),
    (r"py:class", r"trimtab\.(anatomy\.families\.Host|data\.sources\.Source|dualspeed\.inside\.DropsInside)"),
    (r"py:class", r"trimtab\.anatomy\.(decoder\.Decoder|drop_inside\.Stage)"),
]

html_theme = "furo"
html_title = "trimtab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which browsers refuse for files on the disk
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {
        "font-stack": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif",
        "font-stack--monospace": "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace",
        "color-brand-primary": "#0f5f8f",
        "color-brand-content": "#0f5f8f",
        "color-brand-visited": "#6b4a8f",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cc4ef",
        "color-brand-content": "#7cc4ef",
        "color-brand-visited": "#c3a6e8",
    },
}
pygments_style = "a11y-light"  # both have contrast enough for small text
pygments_dark_style = "a11y-dark"
copybutton_exclude = ".linenos, .gp, .go"
