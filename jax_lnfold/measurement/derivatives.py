"""Derivatives of the means of tokens by the means of leaves, several of them in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import jax
import jax.numpy as jnp

from .._compat import consts_of
from ..axes.axis_set import AxisSet
from ..axes.labels import ALL
from ..centering import widened
from ..placement.free_means import FreeMeans
from ..placement.place import Placement
from ..program.tracing import Traced
from .token_means import TokenMeans, Tokens

MOST_NUMBERS = 1 << 26
"""Derivatives that are held at a time: if a batch has more, it is every second token, say."""
_CHUNK = 1 << 22
MIXED = 0.05
"""Derivatives that differ by more are not those of single features."""


@dataclass(frozen=True, eq=False)
class Group:
    """LayerNorms that share leaves, with the place of each leaf's means among those of all."""

    norms: tuple[int, ...]
    starts: Mapping[int, int]
    size: int


class Derivatives:
    """Means of tokens of a function at parameters, and what means of its leaves do to them."""

    def __init__(
        self,
        traced: Traced,
        placement: Placement,
        free: FreeMeans,
        params: Any,
        example: tuple[Any, ...],
    ) -> None:
        """`shapes` are iterations of loops, tokens and features of each LayerNorm's input."""
        graph = placement.graph
        self._free, self._consts = free, consts_of(traced.closed)
        self._position = {v: traced.leaves.index(graph.leaves[v]) for v in free.groups}
        self._leaves = jax.tree.leaves(params)
        self._watched = TokenMeans(traced.closed, placement, {*free.feeds}, free.through)
        given = jax.tree.leaves(example)
        tokens = jax.eval_shape(lambda *x: self._watched(*x), self._consts, [*self._leaves, *given])
        self.shapes: dict[int, tuple[int, int, int]] = {
            i: (prod(x.values.shape[:-2]), *x.values.shape[-2:]) for i, x in tokens.items()
        }
        self._dtypes = {leaf: widened(graph.avals[leaf].dtype) for leaf in free.groups}
        self._largest = max((prod(graph.shape(v)) for v in free.through), default=1)
        self._mixed = frozenset[Group]()
        self._program = jax.jit(self._derivatives, static_argnums=(0, 1))

    def __call__(self, groups: tuple[Group, ...], batch: tuple[Any, ...]) -> dict[int, Any]:
        """Means, second moments and derivatives (a row for each mean of a leaf) of all tokens."""
        given = jax.tree.leaves(batch)
        while True:
            args = groups, self._mixed, self._consts, self._leaves, given
            found, differences = jax.device_get(self._program(*args))
            mixed = {i for i, difference in differences.items() if difference > MIXED}
            if not mixed:
                return found
            self._mixed |= {group for group in groups if mixed & {*group.norms}}

    def _derivatives(
        self,
        groups: tuple[Group, ...],
        mixed: frozenset[Group],
        consts: Any,
        leaves: list[Any],
        given: list[Any],
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """The same, and how far derivatives that are computed together are from the true ones.

        Those that `mixed` holds are computed one at a time.
        """
        alike = dict[tuple[int, int], list[Group]]()  # fewer passes for those with fewer means
        for group in groups:
            together = 1 if group in mixed else self._together(group)
            alike.setdefault((group.size, together), []).append(group)
        rows = sum(group.size * self.shapes[i][0] for group in groups for i in group.norms)
        most = max(1, MOST_NUMBERS // max(1, rows))
        found, differences = dict[int, Any](), dict[int, Any]()
        for (size, together), some in sorted(alike.items(), key=lambda each: each[0]):
            each = self._of_size(size, together, some, most, consts, leaves, given)
            found, differences = found | each[0], differences | each[1]
        return found, differences

    def _together(self, group: Group) -> int:
        """How many means of leaves one pass can tell apart, by the features of what it changes.

        All numbers that a mean of a leaf is of change alike, and so do the features of a token. If
        each feature depends on its own one, every one of these can stand for another mean.
        """
        leaves = {_numbers(self._free.groups[leaf]) for leaf in group.starts}
        features = leaves | {self.shapes[i][2] for i in group.norms}
        return features.pop() if len(features) == 1 else 1

    def _of_size(
        self,
        size: int,
        together: int,
        groups: list[Group],
        most: int,
        consts: Any,
        leaves: list[Any],
        given: list[Any],
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """The same of groups with as many means: each pass is for some means of every group."""
        norms = [i for group in groups for i in group.norms]
        starts = {leaf: start for group in groups for leaf, start in group.starts.items()}

        def tokens(shifts: dict[int, Any]) -> Any:
            shifted = list(leaves)
            for leaf, shift in shifts.items():
                x = leaves[at := self._position[leaf]]
                shifted[at] = (x.astype(shift.dtype) + shift).astype(x.dtype)
            found = self._watched(consts, [*shifted, *given])
            some = {i: _sampled(found[i], self.shapes[i], most) for i in norms}
            return {i: x.values for i, x in some.items()}, {i: x.squares for i, x in some.items()}

        def seed(weights: Any) -> dict[int, Any]:
            """Of ``[together, size]`` weights, a row for each feature."""
            return {
                leaf: _seed(weights[:, start:], self._free.groups[leaf], self._dtypes[leaf])
                for leaf, start in starts.items()
            }

        def some(first: Any) -> dict[int, Any]:
            at = first + jnp.arange(together)[:, None]
            found = push(seed(at == jnp.arange(size)))
            return {i: x if together > 1 else x.mean(-1, keepdims=True) for i, x in found.items()}

        zeros = seed(jnp.zeros((together, size)))
        values, push, squares = jax.linearize(tokens, zeros, has_aux=True)
        chunk = max(1, min(ceil(size / together), _CHUNK // self._largest))
        passes = jax.lax.map(some, jnp.arange(0, size, together), batch_size=chunk)
        rows = {i: _rows(x)[:size] for i, x in passes.items()}
        found = {i: (values[i].mean(-1), squares[i], rows[i]) for i in norms}
        if together == 1:
            return found, {}
        one = jax.random.normal(jax.random.key(0), (size,))
        want = push(seed(jnp.broadcast_to(one, (together, size))))
        return found, {i: _difference(one, rows[i], want[i].mean(-1)) for i in norms}


def shape_of_means(along: AxisSet) -> tuple[int, ...]:
    """The shape of the means of a leaf, with its rank."""
    return tuple(
        1 if entry == ALL else n for entry, n in zip(along.entries, along.shape, strict=True)
    )


def _sampled(tokens: Any, shape: tuple[int, int, int], most: int) -> Tokens:
    """Tokens at equal distances, as many as may be, with a row for each iteration of loops."""
    rows, n, features = shape
    step = ceil(n / most)
    values = tokens.values.reshape(rows, n, features)[:, ::step]
    return Tokens(values, tokens.squares.reshape(rows, n)[:, ::step])


def _seed(weights: jax.Array, along: AxisSet, dtype: Any) -> jax.Array:
    """A change of a leaf: a row of `weights` for each feature, an entry for each mean."""
    shape, axes = shape_of_means(along), _spanned(along)
    change = weights[:, : prod(shape)].astype(dtype).T
    if len(weights) == 1:
        return change.reshape(shape)
    kept = (n for d, n in enumerate(shape) if d not in axes)
    change = change.reshape(*kept, *(along.shape[d] for d in axes))
    return jnp.moveaxis(change, range(-len(axes), 0), axes)


def _rows(passes: jax.Array) -> jax.Array:
    """A row for each mean, of ``[passes, rows, tokens, means]``."""
    moved = jnp.moveaxis(passes, -1, 1)
    return moved.reshape(-1, *moved.shape[2:])


def _difference(direction: jax.Array, rows: jax.Array, want: jax.Array) -> jax.Array:
    """How far the derivatives are from that in one direction, relative to it."""
    highest = jax.lax.Precision.HIGHEST
    got = jnp.einsum("d,drn->rn", direction.astype(rows.dtype), rows, precision=highest)
    largest = jnp.linalg.norm(want)
    return jnp.linalg.norm(got - want) / jnp.where(largest == 0, 1, largest)


def _numbers(along: AxisSet) -> int:
    """How many numbers a mean of a leaf is of."""
    return prod(along.shape[d] for d in _spanned(along))


def _spanned(along: AxisSet) -> tuple[int, ...]:
    return tuple(d for d, entry in enumerate(along.entries) if entry == ALL)
