"""Checks the links of a site that was built: pages, and places in them, that are files there.

``python .ci/links.py SITE``. Addresses of the site itself and of files in the repository are
checked, too; links to other sites are not followed.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
OURS = {
    r"https://jax-lnfold\.readthedocs\.io/en/latest/": "{site}",
    r"https://github\.com/jax-lnfold/jax_lnfold/(?:blob|tree)/main/": "{root}",
    r"https://raw\.githubusercontent\.com/jax-lnfold/jax_lnfold/main/": "{root}",
}
"""Where our addresses are on this machine."""


class Page(HTMLParser):
    """The links of a page, and the places that links may go to."""

    def __init__(self, path: Path) -> None:
        """Read the page."""
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element refers to, and what it is called."""
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.places.add(value)


def broken(site: Path) -> list[str]:
    """The links that go nowhere."""
    files = (path for path in site.rglob("*.html") if "_static" not in path.parts)  # templates
    pages = {path.resolve(): Page(path) for path in files}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            there = target in pages and (not place or place in pages[target].places)
            if not (there or (target.exists() and target not in pages)):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return found


def broken_addresses(site: Path) -> list[str]:
    """The addresses of ours, in the README and on pages, that are not there."""
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = []
    for file in texts:
        text = file.read_text(encoding="utf-8")
        for address, where in OURS.items():
            for path in re.findall(rf"{address}([^)\s>#]*)", text):
                if not Path(where.format(site=site, root=ROOT), path).exists():
                    found.append(f"{file.relative_to(ROOT)}: {path}")
    return found


def main() -> None:
    """Exit with the broken links, if there are any."""
    site = Path(sys.argv[1])
    if links := [*broken(site), *broken_addresses(site)]:
        sys.exit("\n".join(["links that go nowhere:", *links]))
    print(f"all links within {site} go somewhere")


if __name__ == "__main__":
    main()
