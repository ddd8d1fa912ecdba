"""The gallery: report and picture of every architecture in the zoo of the tests, made here and now.

It takes about 20 seconds, and is made again only if the page or the library has changed.
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]


class Gallery(SphinxDirective):
    """A section for each model: what it is, its report, its picture."""

    def run(self) -> list[nodes.Node]:
        """The sections, in the order of the zoo."""
        import jax

        with jax.enable_x64(True):  # the weights of the models are float64
            from tests.models.zoo import ZOO

            sections = [self._section(case) for case in ZOO]
        for file in [*ROOT.glob("jax_lnfold/**/*.py"), *ROOT.glob("tests/models/zoo/*.py")]:
            self.env.note_dependency(str(file))
        return sections

    def _section(self, case: object) -> nodes.section:
        import jax_lnfold
        from jax_lnfold.report.summary import rows
        from jax_lnfold.report.table import to_html

        model = case.build()
        report = jax_lnfold.analyze(model.apply_fn, model.params, *model.inputs)
        name = f"gallery-{case}"
        section = nodes.section(ids=[name], names=[name])
        title = f"{case}: {report.n_folded} of {len(report.norms)}"
        table = to_html(rows(report), report.lines(cost=False))
        html = f'{table}<div class="lnfold-figure">{report.to_svg()}</div>'
        section += [
            nodes.title("", title),
            nodes.paragraph("", "", *self.parse_inline(model.about)[0]),
            nodes.raw("", html, format="html"),
        ]
        return section


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive ``gallery``."""
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
