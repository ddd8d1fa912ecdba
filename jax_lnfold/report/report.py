"""What a fold does to every LayerNorm of a program, and why some are left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich.console import RenderableType

from .._compat import ClosedJaxpr
from ..axes.axis_set import AxisSet
from ..errors import NotAnalysedError
from ..plan.edits.affine import AffineEdit
from ..plan.edits.center import CenterEdit
from ..plan.edits.scale import ScaleEdit
from ..plan.plan import FoldPlan
from ..printable import counted
from ..program.graph import Location
from ..rewrite.defer import Deferral
from ..trees import first_line
from . import picture
from .cost import Cost, measure, si
from .events import Event
from .table import Row, grouped, merged, template, to_html, to_rich, to_text

Programs = Callable[[], tuple[ClosedJaxpr, ClosedJaxpr]]
"""The original and the folded program."""

COSTED_WHEN_SHOWN = 4000
"""Operations in a program that XLA compiles within seconds."""


@dataclass(frozen=True, slots=True)
class Norm:
    """One LayerNorm: module path, axes averaged over, input shape, and what became of it.

    Inside of a `shard_map` the shape is that of one shard, and `mesh_axes` are the mesh axes that
    the mean spans besides. `count` is how often it runs in one call. `reason` is empty when
    `folded`, and otherwise names the operation in the way with its module path and source line;
    `blocker` is that operation. `two_pass` if its variance takes a second pass over the input.
    `approximate` if it is folded although dropout before it leaves it a mean.
    """

    path: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    count: int
    folded: bool
    reason: str
    mesh_axes: tuple[str, ...] = ()
    two_pass: bool = False
    blocker: Location | None = None
    advice: str = ""
    approximate: bool = False


@dataclass(frozen=True, slots=True)
class Insertion:
    """One explicit centering put into the program: after which operation, along which axes.

    `reason` says what keeps its value from being zero-mean by itself, `advice` what could be
    changed about that; both may be empty.
    """

    after: str
    along: AxisSet
    reason: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """The centering in sentences."""
        words = f"Inserted after {self.after}, along {self.along}"
        words += f": {self.reason}." if self.reason else "."
        return words + (f" To do without, {self.advice}." if self.advice else "")


@dataclass(frozen=True, slots=True)
class ScaleLeft:
    """A scale (its key path) that no linear layer takes up, and why; `fold_affine` asked for it."""

    key_path: str
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """The outcome of a fold; `print` shows it as a table.

    `plan` says how parameters are edited, `edited_bytes` is the size of those, `events` is what the
    pictures show.
    `constants` counts what is centered though it is no parameter, for nothing: it depends on no
    input and no parameter, so that the compiler does it.
    `opaque` counts, by primitive, the operations met of which nothing is known; LayerNorms before
    or behind them stay as they are. `visits` is how often the analysis looked at an equation.
    `rounded` are key paths of edited leaves whose dtype has fewer digits than the arithmetic they
    are used in: they are rounded once more, as they would not be if they were edited before a cast.
    `unseen` counts, by place, operations that run what cannot be looked into: LayerNorms in there
    are not found. `dropouts` counts the dropouts taken for the identity, `deviation` is the largest
    difference of an output that they caused on the example inputs, relative to the largest output
    (None if the inputs were shapes only). With `fold_affine`, `affine_left` are the scales that
    stay.
    """

    norms: tuple[Norm, ...]
    insertions: tuple[Insertion, ...]
    plan: FoldPlan
    deferred: tuple[Deferral, ...]
    opaque: dict[str, int]
    visits: int
    affine_left: tuple[ScaleLeft, ...] = ()
    rounded: tuple[str, ...] = ()
    dropouts: int = 0
    deviation: float | None = None
    constants: int = 0
    edited_bytes: int = 0
    events: tuple[Event, ...] = ()
    n_operations: int = 0
    programs: Programs | None = field(default=None, compare=False)
    unseen: dict[Location, int] = field(default_factory=dict)

    @property
    def edits(self) -> tuple[CenterEdit, ...]:
        """Parameters that are centered."""
        return self.plan.edits

    @property
    def scales(self) -> tuple[ScaleEdit, ...]:
        """Scales that the linear layers before them take up."""
        return self.plan.scales

    @property
    def affine(self) -> tuple[AffineEdit, ...]:
        """Scales and shifts that the linear layers behind them take up."""
        return self.plan.affine

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

    def __getstate__(self) -> dict[str, Any]:
        """Programs cannot be pickled; what they cost can, once it is known."""
        return {**self.__dict__, "programs": None}

    def to_svg(self) -> str:
        """The zero-mean graph as a picture (SVG text): streams, writers, LayerNorms, blockers."""
        return picture.to_svg(self.events, headline(self))

    def to_dot(self) -> str:
        """The same in the DOT language, for Graphviz."""
        return picture.to_dot(self.events, headline(self))

    @property
    def n_folded(self) -> int:
        """LayerNorms that run as RMSNorms in the folded program."""
        return sum(norm.folded for norm in self.norms)

    @property
    def n_inserted(self) -> int:
        """Explicit centerings in the folded program."""
        return len(self.insertions)

    def __repr__(self) -> str:
        """One line: notebooks keep it beside the table."""
        return f"<Report: {summary(self)[0]}>"

    def __str__(self) -> str:
        """The table and a summary as plain text, as wide as the terminal."""
        width = shutil.get_terminal_size((110, 24)).columns
        return to_text(rows(self), _lines(self), width)

    def __rich__(self) -> RenderableType:
        """The same in colour, for ``rich.print``."""
        return to_rich(rows(self), _lines(self))

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return to_html(rows(self), _lines(self))


def rows(report: Report) -> list[Row]:
    """One row per LayerNorm, in model order, or per group of them in repeated blocks."""
    return grouped(
        Row(
            path=norm.path,
            shape="x".join(map(str, norm.shape)),
            axes=", ".join(map(str, (*norm.axes, *norm.mesh_axes))),
            variance="two-pass" if norm.two_pass else "one-pass",
            folded=norm.folded,
            approximate=norm.approximate,
            words=(norm.reason, norm.advice),
            place=(norm.blocker.file, norm.blocker.line) if norm.blocker else None,
            runs=norm.count,
        )
        for norm in report.norms
    )


def headline(report: Report) -> str:
    """How many LayerNorms are folded."""
    if not report.norms:
        return "No LayerNorm found"
    return f"{report.n_folded} of {counted(len(report.norms), 'LayerNorm')} folded"


def summary(report: Report) -> list[str]:
    """Counts, and what else there is to know."""
    return [line for section in SECTIONS for line in section(report)]


Section = Callable[[Report], Iterable[str]]
"""Lines below the table, maybe none, about one thing that a report knows."""


def _insertions(report: Report) -> Iterable[str]:
    return map(str, report.insertions)


def _deferred(report: Report) -> Iterable[str]:
    if report.deferred:
        yield f"{counted(len(report.deferred), 'scale')} deferred behind matrix products."


def _approximation(report: Report) -> Iterable[str]:
    if report.dropouts:
        measured = "not measured: pass arrays to fold"
        if report.deviation is not None:
            measured = f"{report.deviation:.2g} of the largest output on the example inputs"
        yield (
            f"Approximate: {counted(report.dropouts, 'dropout')} taken for the identity; deviation "
            f"{measured}. Without dropout the same parameters are exact."
        )


def _rounded(report: Report) -> Iterable[str]:
    if report.rounded:
        some = ", ".join(report.rounded[:3]) + ", ..." * (len(report.rounded) > 3)
        yield (
            f"Rounded once more, as they are stored narrower than used: {some}. "
            "Fold before you cast to avoid that."
        )


def _opaque(report: Report) -> Iterable[str]:
    if report.opaque:
        met = ", ".join(f"{name} ({n})" for name, n in report.opaque.items())
        yield f"Opaque operations met: {met}."


def _unseen(report: Report) -> Iterable[str]:
    if report.unseen:
        places = (f"{place} x{n}" if n > 1 else str(place) for place, n in report.unseen.items())
        yield f"LayerNorms are not looked for inside of {', '.join(places)}."


def _outcome(report: Report) -> Iterable[str]:
    """What was folded and changed, as one sentence."""
    edited = [CenterEdit.told(())] * (bool(report.norms) and not report.edits)
    edited += report.plan.told()
    if report.edited_bytes:
        edited[-1] += f" ({si(report.edited_bytes)}B)"
    if report.constants:
        edited.append(f"{counted(report.constants, 'constant')} centered")
    if report.norms:
        edited.append(f"{counted(report.n_inserted, 'explicit centering')} inserted")
    elif not (edited or report.deferred):
        return [f"{headline(report)}; nothing was changed."]
    return [f"{', '.join((headline(report), *edited))}."]


def _scales_left(report: Report) -> Iterable[str]:
    """Why scales are not taken up: a line for all that are left for the same reason."""
    for group in _alike(report.affine_left, lambda s: s.reason):
        of_blocks = _alike(group, lambda s: s.key_path)
        paths = ", ".join(f"`{merged([s.key_path for s in some])}`" for some in of_blocks)
        verb = "Scale {} stays" if len(group) == 1 else "Scales {} stay"
        yield f"{verb.format(paths)}: {merged([s.reason for s in group])}."


def _alike(
    scales: Iterable[ScaleLeft], text: Callable[[ScaleLeft], str]
) -> Iterable[list[ScaleLeft]]:
    """Those whose texts differ in numbers only together."""
    found: dict[str, list[ScaleLeft]] = {}
    for scale in scales:
        found.setdefault(template(text(scale)), []).append(scale)
    return found.values()


SECTIONS: tuple[Section, ...] = (
    _outcome,
    _insertions,
    _deferred,
    _scales_left,
    _approximation,
    _rounded,
    _opaque,
    _unseen,
)
"""What stands below the table, in this order: as text, in colour and as HTML."""


def _lines(report: Report) -> list[str]:
    """All that stands below the table."""
    if not report.n_folded:
        return summary(report)  # nothing was saved: do not compile for it
    return [*summary(report), cost_line(report)]


def cost_line(report: Report) -> str:
    """What XLA says; for programs that take it long to compile, only if it was asked before."""
    asked = "cost" in report.__dict__
    if not asked and report.n_operations > COSTED_WHEN_SHOWN:
        return "Read `report.cost` to compile both programs and see what XLA says they cost."
    try:
        return str(report.cost)
    except Exception as error:  # a report is readable without it
        return f"XLA's cost analysis is not to be had: {first_line(error)}"
