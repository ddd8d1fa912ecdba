"""Means of leaves that cancel what remains of the means of LayerNorms, fitted to data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .measurement.derivatives import Derivatives, Group, shape_of_means
from .measurement.normal_equations import Normal, ridge
from .placement.free_means import FreeMeans
from .placement.place import Placement
from .plan.edits.means import MeanEdit
from .plan.plan import FoldPlan
from .printable import counted, printable
from .program.tracing import Traced
from .report.names import names_of

HELD_OUT = 5
"""Every fifth token of a LayerNorm is not fitted to, but tells whether the fit holds."""
FOLDS = 4
"""The ridge is chosen with fits to all batches but every fourth one: tokens of one are alike."""
MOST_FOLDED = 1024
"""LayerNorms that share leaves with more means than that have no folds, which would take memory."""
MOST_MEANS = 4096
"""LayerNorms that share leaves with more means than that are left centered."""
NOT_FINITE = "infinite or NaN activations"
"""Why nothing is fitted to what a LayerNorm reads."""


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
        self._placement, self._free = placement, free
        self._derivatives = Derivatives(traced, placement, free, params, example)
        self._shapes = self._derivatives.shapes
        self._groups = [*_groups(free, self._shapes)]
        self._fitted = tuple(g for g in self._groups if self._why_not(g) is None)

    def _why_not(self, group: Group) -> str | None:
        if any(i not in self._shapes for i in group.norms):
            return "not looked at"
        return f"has {group.size} means" if group.size > MOST_MEANS else None

    def run(self, plan: FoldPlan, inputs: Sequence[tuple[Any, ...]]) -> Regression:
        """The plan with the means that fit."""
        parts = {i: _Parts.empty(g.size, len(inputs)) for g in self._fitted for i in g.norms}
        for number, batch in enumerate(inputs if self._fitted else ()):
            for i, (means, squares, rows) in self._derivatives(self._fitted, batch).items():
                _add(parts[i], number, means, squares, rows)
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

    def _edits(self, group: Group, v: np.ndarray) -> Iterator[MeanEdit]:
        for leaf, start in group.starts.items():
            along = self._free.groups[leaf]
            means = v[start : start + prod(shape_of_means(along))].tolist()
            yield MeanEdit(self._placement.graph.leaves[leaf], along, tuple(means))


def _groups(free: FreeMeans, shapes: Mapping[int, Any]) -> Iterator[Group]:
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
            size += prod(shape_of_means(free.groups[leaf]))
        yield Group(tuple(sorted(norms)), starts, size)


class _Parts(NamedTuple):
    """The tokens of one LayerNorm: folds of those that are fitted to, and those held out."""

    folds: list[Normal]
    held: Normal

    @classmethod
    def empty(cls, size: int, batches: int) -> _Parts:
        count = 1 if size > MOST_FOLDED else max(1, min(FOLDS, batches))
        return cls([Normal.empty(size) for _ in range(count)], Normal.empty(size))

    @property
    def fitted(self) -> Normal:
        return Normal.of(self.folds)


def _add(
    parts: _Parts, batch: int, means: np.ndarray, squares: np.ndarray, rows: np.ndarray
) -> None:
    """The tokens of a batch, every fifth of all so far to those that are held out."""
    rows, means, squares = (np.asarray(x, np.float64) for x in (rows, means, squares))
    before = sum(part.tokens for part in (*parts.folds, parts.held)) // len(means)
    held = (before + np.arange(means.shape[-1])) % HELD_OUT == HELD_OUT - 1
    fold = parts.folds[batch % len(parts.folds)]
    for part, chosen in ((fold, ~held), (parts.held, held)):
        own = rows[:, :, chosen].reshape(len(rows), -1)
        part.add(own, means[:, chosen].ravel(), squares[:, chosen].ravel())


def _solved(parts: Sequence[_Parts], size: int) -> tuple[str, np.ndarray]:
    """The means that fit, or zeros, and why."""
    nothing = np.zeros(size)
    if not all(each.finite for own in parts for each in (*own.folds, own.held)):
        return NOT_FINITE, nothing
    folds = [*zip(*(own.folds for own in parts), strict=True)]
    v = ridge([own.fitted for own in parts], folds)
    if not v.any():
        return "nothing to fit, or too few tokens", nothing
    held = [own.held for own in parts]
    if any(not each.tokens or each.share(v) >= each.share(nothing) for each in held):
        return "it does not hold on the tokens that were held out", nothing
    return "", v


def _told(path: str, parts: _Parts | None, v: np.ndarray, why: str | None) -> RegressedNorm:
    if parts is None:
        nan = float("nan")
        return RegressedNorm(path, 0, 0, nan, nan, nan, why or "")
    fitted, held = parts.fitted, parts.held
    shares = held.share(np.zeros_like(v)), held.share(v), fitted.share(v)
    return RegressedNorm(path, fitted.tokens, held.tokens, *shares, why or "")
