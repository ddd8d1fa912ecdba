"""The public face of an outcome: what it costs, and how it is shown."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import RenderableType

from ..errors import NotAnalysedError
from ..trees import first_line
from .cost import Cost, measure
from .outcome import Outcome
from .picture import to_dot, to_svg
from .summary import headline, rows, summary
from .table import to_html, to_rich, to_text

COSTED_WHEN_SHOWN = 4000
"""Operations in a program that XLA compiles within seconds."""


@dataclass(frozen=True, repr=False)
class Report(Outcome):
    """The outcome of a fold; `print` shows it as a table. Its fields are those of `Outcome`."""

    @cached_property
    def cost(self) -> Cost:
        """What XLA says both programs cost; compiles them for the default backend when first read.

        Printing a report reads it by itself where that takes seconds (`COSTED_WHEN_SHOWN`).

        Raises:
            NotAnalysedError: the report was unpickled, or made under a `jax` transformation.
        """
        if self.programs is None:
            raise NotAnalysedError(
                "cost: the programs are not at hand; call `fold` or `analyze` again, outside of jit"
            )
        return measure(*self.programs())

    @property
    def _cost_is_known(self) -> bool:
        """Whether `cost` has been read, so that nothing is compiled to read it again."""
        return "cost" in self.__dict__

    def __getstate__(self) -> dict[str, Any]:
        """Programs cannot be pickled; what they cost can, once it is known."""
        return {**self.__dict__, "programs": None}

    def to_svg(self) -> str:
        """The zero-mean graph as a picture (SVG text): streams, writers, LayerNorms, blockers."""
        return to_svg(self.events, headline(self))

    def to_dot(self) -> str:
        """The same in the DOT language, for Graphviz."""
        return to_dot(self.events, headline(self))

    def __repr__(self) -> str:
        """One line: notebooks keep it beside the table."""
        return f"<Report: {summary(self)[0]}>"

    def __str__(self) -> str:
        """The table and a summary as plain text, as wide as the terminal."""
        width = shutil.get_terminal_size((110, 24)).columns
        return to_text(rows(self), self._lines(), width)

    def __rich__(self) -> RenderableType:
        """The same in colour, for ``rich.print``."""
        return to_rich(rows(self), self._lines())

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return to_html(rows(self), self._lines())

    def _lines(self) -> list[str]:
        """All that stands below the table."""
        if not self.n_folded:
            return summary(self)  # nothing was saved: do not compile for it
        return [*summary(self), self._cost_line()]

    def _cost_line(self) -> str:
        """What XLA says; for programs that take it long to compile, only if it was asked before."""
        if not self._cost_is_known and self.n_operations > COSTED_WHEN_SHOWN:
            return "Read `report.cost` to compile both programs and see what XLA says they cost."
        try:
            return str(self.cost)
        except Exception as error:  # a report is readable without it
            return f"XLA's cost analysis is not to be had: {first_line(error)}"
