"""How Sphinx builds these pages: offline, from MyST sources and the package's docstrings."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # experiments, for api.md

project = "pyro_hybrid"
author = "The pyro_hybrid developers"
copyright = author
release = version = version_of("pyro_hybrid")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"{project} {release}"


def setup(app):
    """Leave out "Alias for field number 0": a NamedTuple's fields are described in its docstring."""
    app.connect(
        "autodoc-skip-member",
        lambda app, what, name, field, skip, options: skip or _is_alias(field),
    )


def _is_alias(member):
    return type(member).__name__ == "_tuplegetter"
