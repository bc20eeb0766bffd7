"""The documentation site: `make docs` builds it, and fails on any warning."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from masksolve import __version__

project = "masksolve"
author = "The masksolve developers"
project_copyright = "the masksolve developers, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "names", "pages"]
exclude_patterns = ["_build"]
nitpicky = True
# Of docstrings: `solve_matrix` is a link, `weights` is code. See _ext/names.py.
default_role = "name"
highlight_language = "none"

# Sphinx's own page of search, in a theme that is light or dark as the reader's system is.
html_theme = "furo"
html_title = "masksolve"
html_theme_options = {"source_repository": "https://github.com/masksolve/masksolve/", "source_directory": "docs/"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

# Sections have links of their names.
myst_heading_anchors = 3

# Signatures without types: docstrings say them, with shapes.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
# Types are words for readers, such as "array_like, shape (R, C)", not names to be linked.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
nitpick_ignore_regex = [("py:class", r"[^.]*")]
