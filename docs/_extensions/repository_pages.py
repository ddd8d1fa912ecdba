"""Pages that are files of the repository, with their links turned to where things are here.

A page that begins with ``<!-- page: CHANGELOG.md -->`` is that file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/jax-lnfold/jax_lnfold/blob/main"
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "bench/README.md": "benchmarks",
    "bench/training/README.md": "benchmarks_training",
}
_STUB = re.compile(r"<!-- page: (\S+) -->")
_DRAWN = re.compile(r"^```mermaid\n.*?^```", re.DOTALL | re.MULTILINE)  # by forges alone
_LINK = re.compile(r"(?P<start>!?\[[^\]]*\]\()(?P<target>[^)\s#]+)(?P<rest>[^)]*\))")


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the file in the place of the page."""
    stub = _STUB.match(source[0])
    if stub is None:
        return
    file, page = ROOT / stub[1], Path(app.srcdir, docname).parent
    app.env.note_dependency(str(file))

    def turned(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target:
            return link[0]
        found = (file.parent / target).resolve()
        if not found.exists():
            raise FileNotFoundError(f"{stub[1]} links to {target}, which is not there")
        name = found.relative_to(ROOT).as_posix()
        if name in PAGES:
            found = Path(app.srcdir, f"{PAGES[name]}.md")
        here = link["start"].startswith("!") or found.is_relative_to(app.srcdir)
        new = os.path.relpath(found, page) if here else f"{REPOSITORY}/{name}"
        return f"{link['start']}{new}{link['rest']}"

    text = _LINK.sub(turned, file.read_text(encoding="utf-8"))
    source[0] = _DRAWN.sub("![The walk of a fold through the code](figures/rooms.svg)", text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Replace pages as they are read."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
