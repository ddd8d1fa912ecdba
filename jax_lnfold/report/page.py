"""A report as a web page of its own, and the picture of one as PNG."""

from __future__ import annotations

import importlib
import re
from html import escape

from ..errors import FoldError

_STYLE = """
:root {color-scheme: light dark} body {font: 1em/1.4 system-ui, sans-serif; margin: 2em}
h1 {font-size: 1.2em} svg {max-width: 100%; height: auto}
"""
_ZOOM = 2.0  # pixels for one of the picture


def page(title: str, *parts: str) -> str:
    """A page that needs no other file."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    )


def to_png(svg: str) -> bytes:
    """The picture on light ground.

    Raises:
        FoldError: the package that draws it is not installed.
    """
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError:
        raise FoldError(
            "png: needs a package that draws it; pip install 'jax_lnfold[png]' (resvg-py), or "
            "write SVG, which needs nothing"
        ) from None
    ground = re.search(r"--ground: (#\w+)", svg)
    return resvg.svg_to_bytes(
        svg_string=_spelled_out(svg), zoom=_ZOOM, background=ground[1] if ground else None
    )


def _spelled_out(svg: str) -> str:
    """The same in the colours of light ground, without variables and shorthands of CSS."""
    svg = re.sub(r"@media [^{]*\{[^{}]*\{[^{}]*\}\}", "", svg)
    svg = re.sub(r"\bfont: (\w+) ([^;]*);", r"font-size: \1; font-family: \2;", svg)
    colors = dict(re.findall(r"(--\w+): (#\w+)", svg))
    svg = re.sub(r"--\w+: #\w+;\s*", "", svg)
    return re.sub(r"var\((--\w+)\)", lambda found: colors[found[1]], svg)
