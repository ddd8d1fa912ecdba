"""What a fold does to every LayerNorm of a program, and why some are left alone."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass

import jax.numpy as jnp
from rich.console import RenderableType

from .advice import advice
from .axes import AxisSet
from .graph import Graph, Place
from .norms import LayerNorm
from .placement import Placement, Reason
from .plan import CenterEdit, FoldPlan, ScaleEdit
from .primitives import MOVES
from .table import Row, grouped, to_html, to_rich, to_text


@dataclass(frozen=True, slots=True)
class Norm:
    """One LayerNorm: module path, axes averaged over, input shape, and what became of it.

    Inside of a `shard_map` the shape is that of one shard, and `mesh_axes` are the mesh axes that
    the mean spans besides. `count` is how often it runs in one call. `reason` is empty when
    `folded`, and otherwise names the operation in the way with its module path and source line;
    `blocker` is that operation. `two_pass` if its variance takes a second pass over the input.
    """

    path: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    count: int
    folded: bool
    reason: str
    mesh_axes: tuple[str, ...] = ()
    two_pass: bool = False
    blocker: Place | None = None
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Insertion:
    """One explicit centering put into the program: after which operation, along which axes."""

    after: str
    along: AxisSet


@dataclass(frozen=True)
class Report:
    """The outcome of a fold; `print` shows it as a table.

    `opaque` counts, by primitive, the operations met of which nothing is known; LayerNorms before
    or behind them stay as they are. `visits` is how often the analysis looked at an equation.
    `rounded` are key paths of edited leaves whose dtype has fewer digits than the arithmetic they
    are used in: they are rounded once more, as they would not be if they were edited before a cast.
    """

    norms: tuple[Norm, ...]
    insertions: tuple[Insertion, ...]
    edits: tuple[CenterEdit, ...]
    scales: tuple[ScaleEdit, ...]
    opaque: dict[str, int]
    visits: int
    rounded: tuple[str, ...] = ()

    @property
    def n_folded(self) -> int:
        """LayerNorms that run as RMSNorms in the folded program."""
        return sum(norm.folded for norm in self.norms)

    @property
    def n_inserted(self) -> int:
        """Explicit centerings in the folded program."""
        return len(self.insertions)

    def __str__(self) -> str:
        """The table and a summary as plain text, as wide as the terminal."""
        width = shutil.get_terminal_size((110, 24)).columns
        return to_text(rows(self), summary(self), width)

    def __rich__(self) -> RenderableType:
        """The same in colour, for ``rich.print``."""
        return to_rich(rows(self), summary(self))

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return to_html(rows(self), summary(self))


def make_report(placement: Placement, plan: FoldPlan) -> Report:
    """Put a placement into words."""
    graph = placement.graph
    norms = tuple(
        Norm(
            path=norm.module or "(top level)",
            axes=tuple(d for d in norm.along.axes if d < _local_rank(graph, norm.x)),
            shape=graph.shape(norm.x)[: _local_rank(graph, norm.x)],
            count=norm.count,
            folded=folded,
            reason=str(placement.left.get(i, "")),
            mesh_axes=_mesh_axes(graph, norm),
            two_pass=norm.two_pass,
            blocker=_blocker(placement.left.get(i)),
            advice=advice(placement, i) if i in placement.left else "",
        )
        for i, (norm, folded) in enumerate(zip(placement.norms, placement.folded, strict=True))
    )
    insertions = tuple(
        Insertion(_origin(placement, value), graph.on_one_device(value, along) or along)
        for value, sets in sorted(placement.explicit.items())
        for along in sets
        if not along.trivial
    )
    facts = placement.facts
    unknown = (facts.unknown[i] for i in sorted(facts.unknown))
    opaque = Counter(op.eqn.primitive.name for op in unknown)
    widened = (v for v in placement.leaf_sets if _is_widened(graph, v))
    rounded = tuple(plan.leaves[graph.leaves[v]].key_path for v in widened)
    return Report(norms, insertions, plan.edits, plan.scales, dict(opaque), facts.visits, rounded)


def _is_widened(graph: Graph, leaf: int) -> bool:
    """Whether a value, or a row of it, is converted to a dtype with more digits."""
    digits, todo = jnp.finfo(graph.avals[leaf].dtype).nmant, [leaf]
    while todo:
        for op, _ in graph.uses[todo.pop()]:
            if op.name == "convert_element_type":
                wide = op.params["new_dtype"]
                if jnp.issubdtype(wide, jnp.floating) and jnp.finfo(wide).nmant > digits:
                    return True
            elif op.name in MOVES or op.name == "loop_slice":
                todo += op.outputs
    return False


def _blocker(reason: Reason | None) -> Place | None:
    """What stands in the way: of centering the input, or else of the centering it needs."""
    found = (reason.obstacle, reason.noticed) if reason else ()
    return next((b.op.place() for b in found if b is not None and b.op is not None), None)


def _local_rank(graph: Graph, value: int) -> int:
    return len(graph.shape(value)) - len(graph.lanes_of(value))


def _mesh_axes(graph: Graph, norm: LayerNorm) -> tuple[str, ...]:
    start = _local_rank(graph, norm.x)
    return tuple(graph.lanes_of(norm.x)[d - start][0] for d in norm.along.axes if d >= start)


def _origin(placement: Placement, value: int) -> str:
    made = placement.graph.producer[value]
    return str(made[0].place()) if made else "an input of the function"


def rows(report: Report) -> list[Row]:
    """One row per LayerNorm, in model order, or per group of them in repeated blocks."""
    return grouped(
        Row(
            path=norm.path,
            shape="x".join(map(str, norm.shape)),
            axes=", ".join(map(str, (*norm.axes, *norm.mesh_axes))),
            variance="two-pass" if norm.two_pass else "one-pass",
            folded=norm.folded,
            words=(norm.reason, norm.advice),
            place=(norm.blocker.file, norm.blocker.line) if norm.blocker else None,
            runs=norm.count,
        )
        for norm in report.norms
    )


def summary(report: Report) -> list[str]:
    """Counts, and what else there is to know."""
    if not report.norms:
        return ["No LayerNorm found; nothing was changed."]
    edited = f"{_count(len(report.edits), 'parameter')} centered"
    if report.scales:
        edited += f", {_count(len(report.scales), 'scale')} merged"
    lines = [
        f"{report.n_folded} of {_count(len(report.norms), 'LayerNorm')} folded, {edited}, "
        f"{_count(report.n_inserted, 'explicit centering')} inserted."
    ]
    lines += [f"Inserted after {i.after}, along {i.along}." for i in report.insertions]
    if report.rounded:
        some = ", ".join(report.rounded[:3]) + ", ..." * (len(report.rounded) > 3)
        lines.append(
            f"Rounded once more, as they are stored narrower than used: {some}. "
            "Fold before you cast to avoid that."
        )
    if report.opaque:
        met = ", ".join(f"{name} ({n})" for name, n in report.opaque.items())
        lines.append(f"Opaque operations met: {met}.")
    return lines


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
