"""What a fold does to every LayerNorm of a program, and why some are left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..analysis.layer_norms import LayerNorm
from ..axes.axis_set import AxisSet
from ..placement.place import Placement
from ..placement.reasons import Reason
from ..plan.plan import FoldPlan
from ..program.graph import Graph, Location
from ..rewrite.rewritten import Rewritten
from ..rewrite.roots import roots_of
from .advice import advice
from .names import Name


@dataclass(frozen=True, slots=True)
class Norm:
    """One LayerNorm: its name, axes averaged over, input shape, and what became of it.

    `path` is the name: the module path, or else the part of the tree that holds its scale, or else
    file and line, as far as is known. Two LayerNorms of one name share module and parameters.
    `title` is the same with what tables show next to it, `key_path` the leaf that is its scale, or
    else its shift, `part` that without its last key, `line` is ``file.py:line`` of the code that
    calls it; each of them is empty if there is none.
    Inside of a `shard_map` the shape is that of one shard, and `mesh_axes` are the mesh axes that
    the mean spans besides. `count` is how often it runs in one call. `reason` is empty when
    `folded`, and otherwise names the operation in the way with its module path and source line;
    `blocker` is that operation. `two_pass` if its variance takes a second pass over the input.
    `approximate` if it is folded although it has a mean: that dropout before it leaves, or if it is
    `dropped`, that no edit removes. `damage` is then the relative error of the outputs which this
    alone makes, None if that was not measured; also of LayerNorms that are left after all. `kernel`
    is the name of the function that computes it, if that was declared to be a LayerNorm. `also`
    says what else became of it: ``"affine"`` if linear layers, or queries, have taken up its scale,
    ``"deferred"`` if products are scaled in its place, ``"matrix unit"`` if its statistics are
    products, ``"respelled"`` if it takes one pass over its input where it took two, or the other
    way round.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lnfold
        >>> def model(w, x):
        ...     return jax.nn.standardize(x @ w)
        >>> (norm,) = jax_lnfold.analyze(model, jnp.ones((3, 5)), jnp.ones((2, 3))).norms
        >>> norm.folded, norm.axes, norm.shape
        (True, (1,), (2, 5))
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
    title: str = ""
    key_path: str = ""
    part: str = ""
    line: str = ""
    dropped: bool = False
    damage: float | None = None
    kernel: str = ""
    also: tuple[str, ...] = ()

    @property
    def became(self) -> str:
        """All of it in words: ``folded, affine, matrix unit``."""
        outcome = outcome_of(self.folded, self.approximate, self.dropped)
        return ", ".join((outcome, *self.also))


def outcome_of(folded: bool, approximate: bool, dropped: bool) -> str:
    """What became of a mean."""
    if dropped:
        return "mean left out"
    return "folded approximately" if approximate else "folded" if folded else "left"


@dataclass(frozen=True, slots=True)
class Insertion:
    """One explicit centering put into the program: after which operation, along which axes.

    `reason` says what keeps its value from being zero-mean by itself, `advice` what could be
    changed about that; both may be empty.

    Example:
        >>> from jax_lnfold import AxisSet, Insertion
        >>> print(Insertion("`tanh` (MLP, model.py:7)", AxisSet.over((2, 5), axes=[1])))
        Inserted after `tanh` (MLP, model.py:7), along axis 1.
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


def norms_of(
    placement: Placement,
    names: Sequence[Name],
    damages: Mapping[str, float],
    also: Sequence[tuple[str, ...]],
) -> tuple[Norm, ...]:
    """All of them, in program order; damages are by name, `also` is what else became of each."""
    return tuple(_norm(placement, i, names, damages, more) for i, more in enumerate(also))


def also_of(
    placement: Placement, names: Sequence[Name], plan: FoldPlan, rewritten: Rewritten
) -> list[tuple[str, ...]]:
    """What else became of each LayerNorm, as far as its root in the program tells."""
    roots = roots_of(placement.graph)
    taken = {edit.key_path for edit in (*plan.affine, *plan.queries)}
    deferred = {each.root for each in rewritten.deferred}
    products = {each.root for each in rewritten.sums}
    others = {each.root for each in rewritten.respelled}

    def also(norm: LayerNorm, name: Name) -> Iterator[str]:
        root = None if norm.root is None else roots.get(norm.root.index)
        if name.key_path in taken:
            yield "affine"
        if root is not None and root in deferred:
            yield "deferred"
        if root is not None and root in products:
            yield "matrix unit"
        if root is not None and root in others:
            yield "respelled"

    return [(*also(norm, name),) for norm, name in zip(placement.norms, names, strict=True)]


def _norm(
    placement: Placement,
    i: int,
    names: Sequence[Name],
    damages: Mapping[str, float],
    also: tuple[str, ...],
) -> Norm:
    """What became of the LayerNorm at position `i`."""
    name, dropped = names[i], i in placement.dropped
    graph, norm = placement.graph, placement.norms[i]
    reason = None if dropped else placement.left.get(i)
    rank = _local_rank(graph, norm.x)
    return Norm(
        path=name.text,
        axes=tuple(d for d in norm.along.axes if d < rank),
        shape=graph.shape(norm.x)[:rank],
        count=norm.count,
        folded=placement.folded[i] or dropped,
        reason=str(reason or ""),
        mesh_axes=_mesh_axes(graph, norm),
        two_pass=norm.two_pass and not name.kernel,
        blocker=_blocker(reason),
        advice=advice(placement, reason, names) if reason else "",
        approximate=i in placement.approximate or dropped,
        title=name.title,
        key_path=name.key_path,
        part=name.part,
        line=name.line,
        dropped=dropped,
        damage=None if placement.folded[i] else damages.get(name.text),
        kernel=name.kernel,
        also=also,
    )


def insertions_of(placement: Placement, names: Sequence[Name]) -> tuple[Insertion, ...]:
    """Explicit centerings that are computed in a call: the compiler does those of constants."""
    graph = placement.graph
    return tuple(
        Insertion(
            _origin(placement, value),
            graph.on_one_device(value, along) or along,
            _why_inserted(placement.inserted[value]),
            advice(placement, placement.inserted[value], names),
        )
        for value, sets in sorted(placement.explicit.items())
        for along in sets
        if not along.trivial and not graph.fixed[value]
    )


def _why_inserted(reason: Reason) -> str:
    if reason.obstacle is None or reason.leaf is None:
        return str(reason.obstacle or "")
    return f"a parameter that feeds it cannot be centered, as {reason.obstacle}{reason.named}"


def _blocker(reason: Reason | None) -> Location | None:
    """What stands in the way: of centering the input, or else of the centering it needs."""
    found = (reason.obstacle, reason.noticed) if reason else ()
    return next((b.op.location() for b in found if b is not None and b.op is not None), None)


def _local_rank(graph: Graph, value: int) -> int:
    return len(graph.shape(value)) - len(graph.mesh_axes_of(value))


def _mesh_axes(graph: Graph, norm: LayerNorm) -> tuple[str, ...]:
    start = _local_rank(graph, norm.x)
    return tuple(graph.mesh_axes_of(norm.x)[d - start][0] for d in norm.along.axes if d >= start)


def _origin(placement: Placement, value: int) -> str:
    made = placement.graph.producer[value]
    return str(made[0].location()) if made else "an input of the function"
