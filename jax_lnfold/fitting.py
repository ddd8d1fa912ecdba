"""Means of leaves that cancel what remains of the means of LayerNorms, fitted to data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import consts_of
from .axes.axis_set import AxisSet
from .axes.labels import ALL
from .centering import widened
from .measurement.normal_equations import Normal, ridge
from .measurement.token_means import TokenMeans
from .placement.free_means import FreeMeans
from .placement.place import Placement
from .plan.edits.means import MeanEdit
from .plan.plan import FoldPlan
from .printable import counted, printable
from .program.tracing import Traced
from .report.names import names_of

HELD_OUT = 5
"""Every fifth token of a LayerNorm is not fitted to, but tells whether the fit holds."""
MOST_MEANS = 4096
"""LayerNorms that share leaves with more means than that are left centered."""
MOST_NUMBERS = 1 << 26
"""Derivatives that are held at a time: if a batch has more, it is every second token, say."""
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class RegressedNorm:
    """What a fit does to one LayerNorm, on tokens that were held out.

    `centered` and `regressed` are the share of the mean in the second moment,
    ``E[mean**2] / E[x**2]``, with means of zero and with those fitted; `fitted` is that on the
    `tokens` of the fit. If means stay zero, `why` says why.

    Example:
        >>> import jax_lnfold
        >>> norm = jax_lnfold.RegressedNorm("norm", 80, 20, 0.05, 0.01, 0.009)
        >>> norm.centered / norm.regressed  # times less of a mean
        5.0
    """

    path: str
    tokens: int
    held_out: int
    centered: float
    regressed: float
    fitted: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Regression:
    """What `regress` returns: the plan, and what it does to LayerNorms; `print` shows a table.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lnfold
        >>> x = jnp.ones((20, 4))
        >>> print(jax_lnfold.regress(lambda w, x: jax.nn.standardize(x @ w), jnp.eye(4), x))
        No LayerNorm keeps a mean that parameters could cancel.
    """

    plan: FoldPlan
    norms: tuple[RegressedNorm, ...]

    def __str__(self) -> str:
        """A line for each LayerNorm that the fit is about."""
        if not self.norms:
            return "No LayerNorm keeps a mean that parameters could cancel."
        lines = (
            f"{printable(n.path)}: {n.centered:.2g} centered, {n.regressed:.2g} regressed "
            f"({n.fitted:.2g} on the tokens of the fit){f'; {n.why}' if n.why else ''}"
            for n in self.norms
        )
        n = counted(sum(norm.tokens for norm in self.norms), "token")
        return "\n".join([f"Share of the mean on held-out tokens, of a fit to {n}:", *lines])


@dataclass(frozen=True)
class _Group:
    """LayerNorms that share leaves, with the place of each leaf's means among those of all."""

    norms: tuple[int, ...]
    starts: Mapping[int, int]
    size: int


class Fit:
    """A fit to tokens of LayerNorms, of the function at parameters that are centered."""

    def __init__(
        self,
        traced: Traced,
        placement: Placement,
        free: FreeMeans,
        params: Any,
        example: tuple[Any, ...],
    ) -> None:
        """Find out who shares what."""
        self._placement, self._free, self._consts = placement, free, consts_of(traced.closed)
        graph = placement.graph
        self._position = {v: traced.leaves.index(graph.leaves[v]) for v in free.groups}
        self._leaves = jax.tree.leaves(params)
        self._watched = TokenMeans(traced.closed, placement, {*free.feeds}, free.through)
        given = jax.tree.leaves(example)
        tokens = jax.eval_shape(lambda *x: self._watched(*x), self._consts, [*self._leaves, *given])
        self._shapes: dict[int, tuple[int, ...]] = {
            i: (prod(x.means.shape[:-1]), x.means.shape[-1]) for i, x in tokens.items()
        }
        self._groups = [*_groups(free, self._shapes)]
        self._fitted = [g for g in self._groups if self._why_not(g) is None]
        columns = sum(g.size * self._shapes[i][0] for g in self._fitted for i in g.norms)
        self._most = max(1, MOST_NUMBERS // max(1, columns))
        self._zeros = {
            leaf: np.zeros(_shape(free.groups[leaf]), widened(graph.avals[leaf].dtype))
            for group in self._fitted
            for leaf in group.starts
        }
        self._largest = max((prod(graph.shape(v)) for v in free.through), default=1)

    def _why_not(self, group: _Group) -> str | None:
        if any(i not in self._shapes for i in group.norms):
            return "not looked at"
        return f"has {group.size} means" if group.size > MOST_MEANS else None

    def run(self, plan: FoldPlan, inputs: Sequence[tuple[Any, ...]]) -> Regression:
        """The plan with the means that fit."""
        parts = {i: [Normal.empty(g.size) for _ in range(2)] for g in self._fitted for i in g.norms}
        program = jax.jit(self._derivatives)
        for batch in inputs if self._fitted else ():
            given = jax.tree.leaves(batch)
            found = jax.device_get(program(self._consts, self._leaves, given))
            for i, (means, squares, rows) in found.items():
                _add(parts[i], means, squares, rows)
        edits, norms = list[MeanEdit](), dict[int, RegressedNorm]()
        names = names_of(self._placement)
        for group in self._groups:
            why, v = self._why_not(group), np.zeros(group.size)
            if why is None:
                why, v = _solved([parts[i] for i in group.norms], group.size)
            for i in group.norms:
                norms[i] = _told(names[i].text, parts.get(i), v, why)
            if v.any():
                edits += self._edits(group, v)
        paths = {edit.key_path for edit in edits}
        centered = tuple(edit for edit in plan.edits if edit.key_path not in paths)
        made = replace(plan, edits=centered, means=tuple(edits))
        return Regression(made, tuple(norms[i] for i in sorted(norms)))

    def _edits(self, group: _Group, v: np.ndarray) -> Iterator[MeanEdit]:
        for leaf, start in group.starts.items():
            along = self._free.groups[leaf]
            means = v[start : start + prod(_shape(along))].tolist()
            yield MeanEdit(self._placement.graph.leaves[leaf], along, tuple(means))

    def _derivatives(self, consts: Any, leaves: list[Any], given: list[Any]) -> dict[int, Any]:
        """Means, second moments and derivatives (a row for each mean of a leaf) of all tokens."""
        found = dict[int, Any]()
        for size in sorted({g.size for g in self._fitted}):  # fewer passes for those with fewer
            alike = [group for group in self._fitted if group.size == size]
            found |= self._of_size(size, alike, consts, leaves, given)
        return found

    def _of_size(
        self, size: int, groups: list[_Group], consts: Any, leaves: list[Any], given: list[Any]
    ) -> dict[int, Any]:
        """The same of groups with as many means: each pass is for one mean of every group."""
        norms = [i for group in groups for i in group.norms]
        starts = {leaf: start for group in groups for leaf, start in group.starts.items()}

        def tokens(shifts: dict[int, Any]) -> Any:
            shifted = list(leaves)
            for leaf, shift in shifts.items():
                x = leaves[at := self._position[leaf]]
                shifted[at] = (x.astype(shift.dtype) + shift).astype(x.dtype)
            found = self._watched(consts, [*shifted, *given])
            some = {i: self._sampled(i, found[i]) for i in norms}
            return {i: x.means for i, x in some.items()}, {i: x.squares for i, x in some.items()}

        def seed(d: Any) -> dict[int, Any]:
            return {leaf: _one_at(d - start, self._zeros[leaf]) for leaf, start in starts.items()}

        zeros = {leaf: self._zeros[leaf] for leaf in starts}
        means, push, squares = jax.linearize(tokens, zeros, has_aux=True)
        chunk = max(1, min(size, _CHUNK // self._largest))
        rows = jax.lax.map(lambda d: push(seed(d)), jnp.arange(size), batch_size=chunk)
        return {i: (means[i], squares[i], rows[i]) for i in norms}

    def _sampled(self, i: int, tokens: Any) -> Any:
        """Tokens at equal distances, as many as may be, with a row for each iteration of loops."""
        rows, n = self._shapes[i]
        step = ceil(n / self._most)
        return jax.tree.map(lambda x: x.reshape(rows, n)[:, ::step], tokens)


def _one_at(position: Any, like: np.ndarray) -> jax.Array:
    """One at a position, counted in row-major order, and zeros."""
    return (jnp.arange(like.size) == position).astype(like.dtype).reshape(like.shape)


def _shape(along: AxisSet) -> tuple[int, ...]:
    return tuple(
        1 if entry == ALL else n for entry, n in zip(along.entries, along.shape, strict=True)
    )


def _groups(free: FreeMeans, shapes: Mapping[int, Any]) -> Iterator[_Group]:
    """The LayerNorms, put together where they share leaves."""
    left = {i: {*leaves} for i, leaves in free.feeds.items()}
    while left:
        first = min(left)
        leaves, norms = left.pop(first), [first]
        while more := [i for i, own in left.items() if own & leaves]:
            norms += more
            leaves = reduce(set.union, (left.pop(i) for i in more), leaves)
        starts, size = dict[int, int](), 0
        for leaf in sorted(leaves):
            starts[leaf] = size
            size += prod(_shape(free.groups[leaf]))
        yield _Group(tuple(sorted(norms)), starts, size)


def _add(parts: list[Normal], means: np.ndarray, squares: np.ndarray, rows: np.ndarray) -> None:
    """The tokens of a batch, every fifth of all so far to those that are held out."""
    rows, means, squares = (np.asarray(x, np.float64) for x in (rows, means, squares))
    before = sum(part.tokens for part in parts) // len(means)
    held = (before + np.arange(means.shape[-1])) % HELD_OUT == HELD_OUT - 1
    for part, chosen in zip(parts, (~held, held), strict=True):
        own = rows[:, :, chosen].reshape(len(rows), -1)
        part.add(own, means[:, chosen].ravel(), squares[:, chosen].ravel())


def _solved(parts: Sequence[Sequence[Normal]], size: int) -> tuple[str, np.ndarray]:
    """The means that fit, or zeros, and why."""
    nothing = np.zeros(size)
    if not all(part.finite for both in parts for part in both):
        return "infinite or NaN activations", nothing
    v = ridge([fitted for fitted, _ in parts])
    if not v.any():
        return "nothing to fit, or too few tokens", nothing
    if any(not held.tokens or held.share(v) >= held.share(nothing) for _, held in parts):
        return "it does not hold on the tokens that were held out", nothing
    return "", v


def _told(
    path: str, parts: Sequence[Normal] | None, v: np.ndarray, why: str | None
) -> RegressedNorm:
    if parts is None:
        nan = float("nan")
        return RegressedNorm(path, 0, 0, nan, nan, nan, why or "")
    fitted, held = parts
    shares = held.share(np.zeros_like(v)), held.share(v), fitted.share(v)
    return RegressedNorm(path, fitted.tokens, held.tokens, *shares, why or "")
