"""Settings of Sphinx, which builds these pages offline, from MyST sources and the docstrings of the package."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

# api.md documents the experiments, which are outside of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

project = "pyro_hybrid"
author = "The pyro_hybrid developers"
copyright = author
version = version_of("pyro_hybrid")
release = version

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


def skip_field_aliases(app, what, name, member, skip, options):
    """Skip fields of a NamedTuple, whose docstring describes them, and which Sphinx calls aliases for numbers."""
    return skip or type(member).__name__ == "_tuplegetter"


def setup(app):
    """Connect the function that skips members."""
    app.connect("autodoc-skip-member", skip_field_aliases)
