"""All public names in the reference, and links to them, wherever they are defined."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from pydoc import locate
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

import jax_lnfold


def _public() -> dict[str, str]:
    """The public name of each object, by module and name of its definition."""
    found = {name: getattr(jax_lnfold, name) for name in jax_lnfold.__all__}
    return {
        f"{x.__module__}.{x.__qualname__}": f"jax_lnfold.{name}"
        for name, x in found.items()
        if not inspect.ismodule(x)
    }


def link_theory(app: Sphinx, what: str, name: str, x: Any, options: Any, lines: list[str]) -> None:
    """Make links of sections of the theory that a docstring names; API pages are in one folder."""
    text = Path(app.srcdir, "theory.md").read_text("utf-8")
    titles = dict(re.findall(r"^## (\d+)\. (.*)$", text, re.M))

    def linked(found: re.Match[str]) -> str:
        if found[1] not in titles:
            raise ValueError(f"{name}: the theory has no section {found[1]}")
        title = f"{found[1]}-{titles[found[1]]}".lower()
        anchor = re.sub(r"[^\w -]", "", title).replace(" ", "-")
        return f"(`{found[0][1:-1]} <../../theory.html#{anchor}>`__)"

    lines[:] = [re.sub(r"\(theory, section (\d+)\)", linked, line) for line in lines]


class OtherNames(SphinxDirective):
    """What is public and on no other page of this folder."""

    def run(self) -> list[nodes.Node]:
        """An entry for each, or a line that says that there are none."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        pages = "".join(page.read_text("utf-8") for page in folder.glob("*.md"))
        names = re.findall(r"^\.\. auto(?:function|class|exception|module):: ([\w.]+)", pages, re.M)
        told = [locate(n if "." in n else f"jax_lnfold.{n}") for n in names]
        others = [n for n in jax_lnfold.__all__ if getattr(jax_lnfold, n) not in told]
        if not others:
            return [nodes.paragraph(text="There are none.")]
        lines = [f".. auto{_kind(name)}:: jax_lnfold.{name}" for name in others]
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def _kind(name: str) -> str:
    x = getattr(jax_lnfold, name)
    if inspect.ismodule(x):
        return "module"
    return "function" if inspect.isroutine(x) else "class"


def resolve(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, contnode: nodes.Element
) -> Any:
    """The link to the public name of what Sphinx knows under its full one only."""
    target = node.get("reftarget", "")
    name = _public().get(target, f"jax_lnfold.{target}")
    python = env.get_domain("py")
    if node.get("refdomain") != "py" or name not in getattr(python, "objects", {}):
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive ``other-names``, and ask us for names that Sphinx does not find."""
    app.add_directive("other-names", OtherNames)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", link_theory)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
