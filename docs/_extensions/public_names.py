"""Links of signatures to public names, wherever in the package these are defined."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import jax_lnfold


def _public() -> dict[str, str]:
    """The public name of each object, by module and name of its definition."""
    found = {name: getattr(jax_lnfold, name) for name in jax_lnfold.__all__}
    return {f"{x.__module__}.{x.__qualname__}": f"jax_lnfold.{n}" for n, x in found.items()}


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
    """Ask us for names that Sphinx does not find."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
