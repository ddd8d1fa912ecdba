"""Write the report and the picture of many architectures to one HTML page.

Run with ``python examples/gallery.py`` in a checkout; it takes about a minute on two CPU cores.
The models are those of the test suite, small but wired like the published architectures, so the
page shows which LayerNorms of each fold and what blocks the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import jax
from tqdm import tqdm

import jax_lnfold

ROOT = Path(__file__).resolve().parent.parent
STYLE = """
:root {color-scheme: light dark}
body {font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 0 1rem 4rem; max-width: 60rem;
 color: light-dark(#1f2328, #e6edf3); background: light-dark(#fff, #0d1117)}
nav {columns: 16rem; margin: 1.5rem 0}
nav a {display: block; color: inherit}
section {border-top: 1px solid #8886; margin-top: 2.5rem}
.lnfold, figure {overflow-x: auto; margin: 1rem 0}
figure svg {max-width: 100%; min-width: 24rem; height: auto}
"""


def section(name: str, about: str, report: jax_lnfold.Report) -> str:
    """One model: its report with what it costs, and its picture."""
    _ = report.cost
    return (
        f'<section id="{name}"><h2>{name}</h2><p>{escape(about)}</p>{report._repr_html_()}'
        f"<figure>{report.to_svg()}</figure></section>"
    )


def page(links: Sequence[str], sections: Sequence[str]) -> str:
    """The whole page, which needs no other file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>jax_lnfold: gallery</title><style>{STYLE}</style></head><body>"
        "<h1>Which LayerNorms fold?</h1><p>Small models wired like the published architectures, "
        f"analysed by jax_lnfold {jax_lnfold.__version__}. In the pictures a stream runs from top "
        "to bottom; point at a symbol to read what it means.</p>"
        f"<nav>{''.join(links)}</nav>{''.join(sections)}</body></html>\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse the models and write the page."""
    sys.path.insert(0, str(ROOT))
    jax.config.update("jax_enable_x64", True)  # the models' weights are float64
    from tests.models.zoo import ZOO

    names = [str(case) for case in ZOO]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("gallery.html"), metavar="FILE")
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args(argv)
    links, sections = [], []
    for case in tqdm([c for c in ZOO if str(c) in options.models], disable=None, unit="model"):
        model = case.build()
        report = jax_lnfold.analyze(model.apply_fn, model.params, *model.inputs)
        links.append(f'<a href="#{case}">{case}: {report.n_folded} of {len(report.norms)}</a>')
        sections.append(section(str(case), model.about, report))
    options.output.write_text(page(links, sections), encoding="utf-8")
    print(f"{len(sections)} models: {options.output}")


if __name__ == "__main__":
    main()
