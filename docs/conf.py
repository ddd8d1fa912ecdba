"""How Sphinx makes the site: ``sphinx-build -W -n docs docs/_build``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]  # the zoo of the tests is drawn

import jax_lnfold  # noqa: E402

project = "jax_lnfold"
author = "the jax_lnfold authors"
project_copyright = f"2026, {author}"
version = release = jax_lnfold.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "command_line",
    "gallery_page",
    "public_names",
    "repository_pages",
]
exclude_patterns = ["_build", "_extensions", "conftest.py"]

# Markdown
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # so that [text](page.md#heading) is a link that is checked

# Docstrings
default_role = "py:obj"  # `fold` in a docstring is code, and a link where there is something
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # `fold` has overloads; the words say shapes and dtypes as well
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
# What is not ours is not linked; links to what is ours, and between pages, are checked.
nitpick_ignore_regex = [("py:obj", r"(?!jax_lnfold\.).*"), ("py:.*", r"(?!jax_lnfold\b).*")]

# Pages
html_theme = "sphinx_book_theme"
html_title = f"jax_lnfold {release}"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]
html_theme_options = {
    "repository_url": "https://github.com/jax-lnfold/jax_lnfold",
    "use_repository_button": True,
    "path_to_docs": "docs",
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has a search already
    "pygments_light_style": "default",
    "pygments_dark_style": "github-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
