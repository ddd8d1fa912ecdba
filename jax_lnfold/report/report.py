"""The public face of an outcome: what it costs, and how it is shown."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jax
from rich.console import Console, RenderableType

from ..errors import FoldError, NotAnalysedError
from ..printable import printable, written
from ..trees import first_line
from .cost import Cost, measure
from .outcome import Outcome
from .page import page, to_png
from .picture import to_dot, to_svg
from .plain import plain
from .statistics import Statistics
from .summary import headline, in_short, rows, summary
from .table import to_html, to_rich, to_text

COSTED_WHEN_SHOWN = 100
"""Operations, loops counted once, in a program that XLA compiles twice within a second on a CPU.

Measured: 0.3 s and from 4 to 10 ms for each operation; other backends take longer.
"""


File = str | PathLike[str] | None
"""Where to write, if anywhere, what is returned."""


@dataclass(frozen=True, repr=False)
class Report(Outcome):
    """The outcome of a fold, as plain data and as a table; made by `fold` and `analyze`.

    `print` shows the table, in colour with `rich.print`, and notebooks show it as HTML.

    - `norms`: every LayerNorm (`Norm`) in program order; `n_folded` of them fold.
    - `insertions`: explicit centerings (`Insertion`); `n_inserted` of them. `constants` counts what
      is centered though it is no parameter, for nothing: it depends on no input and no parameter,
      so that the compiler does it.
    - `plan`, and its parts `edits`, `scales`, `affine`, `queries`; `edited_bytes` is the size of
      the leaves that are edited.
    - `affine_left`, `untied`, `tied`, `deferred`: of what `fold_affine`, `untie` and `defer_scale`
      asked for, what stays, and why, or what is done.
    - `rounded`: key paths of edited leaves whose dtype has fewer digits than the arithmetic they
      are used in: they are rounded once more, as they would not be if they were edited before a
      cast.
    - `opaque`: operations of which nothing is known, by primitive; LayerNorms before or behind
      them stay as they are. `unseen`: operations that cannot be looked into, by place; LayerNorms
      in there are not found.
    - `dropouts`, `deviation`: of an approximate fold, the dropouts taken for the identity, and the
      largest difference of an output on the example inputs, relative to the largest output (None
      if the inputs were shapes only).
    - `unrestricted`: if parameters were excluded, how many LayerNorms would fold, and how many
      explicit centerings would be inserted, if none were.
    - `statistics`: those of `with_statistics`. `visits`: how often the analysis looked at an
      equation. `n_operations`: equations of the program. `events`: what the pictures show.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> report = jax_lnfold.analyze(model, params, x)
        >>> norm = report.norms[0]
        >>> norm.folded, norm.axes, norm.shape, report.n_inserted
        (True, (1,), (3, 8), 0)
        >>> report.to_svg()[:4]
        '<svg'
    """

    @cached_property
    def cost(self) -> Cost:
        """What XLA says both programs cost; compiles them for the default backend when first read.

        Printing a report reads it by itself only where that takes less than a second
        (`COSTED_WHEN_SHOWN`). A terminal at stderr shows that it compiles.

        Raises:
            NotAnalysedError: the report was unpickled, or made under a `jax` transformation.
        """
        if self.programs is None:
            raise NotAnalysedError(
                "cost: the programs are not at hand; call `fold` or `analyze` again, outside of jit"
            )
        with _told("Compiling both programs for XLA's cost analysis"):
            return measure(*self.programs())

    @property
    def _cost_is_known(self) -> bool:
        """Whether `cost` has been read, so that nothing is compiled to read it again."""
        return "cost" in self.__dict__

    def __getstate__(self) -> dict[str, Any]:
        """Programs cannot be pickled; what they cost can, once it is known."""
        return {**self.__dict__, "programs": None}

    def with_statistics(self, statistics: Statistics) -> Report:
        """The report with a column of what `measure` found of the same LayerNorms.

        Args:
            statistics: what `measure` returned for this fold, or for the function alone.

        Returns:
            A new report; this one is as before.

        Raises:
            FoldError: these are no statistics, or they are of other LayerNorms.
        """
        if not isinstance(statistics, Statistics):
            raise FoldError(
                f"statistics: a {type(statistics).__name__} is not what `measure` returns; pass "
                "jax_lnfold.measure(folded, params, *batches)"
            )
        if [norm.title for norm in statistics.norms] != [norm.title for norm in self.norms]:
            raise FoldError(
                "statistics: of other LayerNorms than those of the report; measure the function "
                "that was folded"
            )
        return replace(self, statistics=statistics)

    def to_svg(self, file: File = None) -> str:
        """The zero-mean graph as a picture (SVG text): streams, writers, LayerNorms, blockers.

        Like the other pictures and pages, it is also written to the `file`, if a path is given.
        """
        return written(to_svg(self.events, headline(self)), file)

    def to_dot(self, file: File = None) -> str:
        """The same in the DOT language, for Graphviz."""
        return written(to_dot(self.events, headline(self)), file)

    def to_png(self, file: File = None) -> bytes:
        """The same as the bytes of a PNG image, on light ground, two pixels for one of the SVG.

        Raises:
            FoldError: the package that draws it is not installed (``jax_lnfold[png]``).
        """
        image = to_png(self.to_svg())
        if file is not None:
            Path(file).write_bytes(image)
        return image

    def to_html(
        self, file: File = None, title: str = "LayerNorms", cost: bool | None = None
    ) -> str:
        """A web page of its own with the table and the picture; `cost` is as in `lines`."""
        table = to_html(rows(self), self.lines(cost))
        return written(page(printable(title), table, self.to_svg()), file)

    def to_dict(self) -> dict[str, Any]:
        """What it knows as dictionaries, lists, text and numbers, which `json.dumps` takes.

        The keys are the names of fields and counts; ``plan`` is as in a plan file, ``unseen`` is by
        place, in words. Pictures are left out, and so is the ``cost`` until it is known.

        Example:
            ``json.dumps(report.to_dict())``
        """
        left_out = ("events", "plan", "programs")
        known = {name: getattr(self, name) for name in ("n_folded", "n_inserted")}
        known |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        known |= {"cost": self.cost} if self._cost_is_known else {}
        return plain(known) | {"plan": json.loads(self.plan.to_json())}

    def __repr__(self) -> str:
        """One line: notebooks keep it beside the table."""
        return f"<Report: {in_short(self)}>"

    def __str__(self) -> str:
        """The table and a summary as plain text, as wide as the terminal."""
        width = shutil.get_terminal_size((110, 24)).columns
        return to_text(rows(self), self.lines(), width)

    def __rich__(self) -> RenderableType:
        """The same in colour, for ``rich.print``."""
        return to_rich(rows(self), self.lines())

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return to_html(rows(self), self.lines())

    def lines(self, cost: bool | None = None) -> list[str]:
        """All that stands below the table.

        `cost` says whether both programs are compiled for what XLA says they cost; by default they
        are where something folded and that takes less than a second.
        """
        if cost is False or (cost is None and not self.n_folded):
            return summary(self)
        return [*summary(self), self._cost_line(bool(cost))]

    def _cost_line(self, asked: bool) -> str:
        """What XLA says; for programs that take it long to compile, only if it was asked."""
        if not (asked or self._cost_is_known or self.programs is None or self._compiles_at_once):
            return (
                "Read `report.cost` (`report --cost` on the command line) to compile both programs "
                "and see what XLA says they cost."
            )
        try:
            return str(self.cost)
        except Exception as error:  # a report is readable without it
            return f"XLA's cost analysis is not to be had: {first_line(error)}"

    @property
    def _compiles_at_once(self) -> bool:
        return self.n_operations <= COSTED_WHEN_SHOWN and jax.default_backend() == "cpu"


def _told(words: str) -> AbstractContextManager[Any]:
    """Shows on a terminal what is being done, as long as it is."""
    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext()
    return Console(stderr=True).status(words)
