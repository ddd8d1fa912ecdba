"""The mean of every token that LayerNorms read, as a function of the means of some leaves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compat import ClosedJaxpr, JaxprEqn, Var, control_flow, evaluate, is_explicit, manual
from ..axes.axis_set import AxisSet
from ..axes.labels import Labels
from ..centering import group_means, widened
from ..placement.place import Placement
from ..program.graph import CallPath
from .shares import one_each
from .watched import Found, Watched


class Tokens(NamedTuple):
    """Numbers of all tokens, ``[tokens, features]``, and their ``mean(x**2)``.

    Loops around them are leading axes. Of tokens that are parts of an axis, or of arrays whose
    sharding is in their type, there is only the mean.
    """

    values: Any
    squares: Any

    @property
    def means(self) -> Any:
        """The mean of each token."""
        return self.values.mean(-1)


class TokenMeans(Watched):
    """The program of a placement that returns the `Tokens` of the LayerNorms at `positions`.

    Means are a function of the values in `through` alone, for derivatives: they are affine in the
    means of leaves, and nothing else of the program need be differentiated. LayerNorms of a
    `while_loop`, where nobody knows how many tokens there are, and of a `shard_map` are not found.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        placement: Placement,
        positions: Collection[int],
        through: Collection[int],
    ) -> None:
        """Find out where to look at what."""
        super().__init__(closed, placement, centered=True)
        self._through = through
        for value, looks in self.norms.items():
            self.norms[value] = [look for look in looks if look[0] in positions]

    def _made(self, path: CallPath, var: Var, x: Any, found: Found) -> Any:
        value = self.graph.env[path][var]
        if self.graph.home[value] == path and value not in self._through:
            x = jax.lax.stop_gradient(x)
        return super()._made(path, var, x, found)

    def _look(self, x: jax.Array, along: AxisSet, mesh_axes: tuple[str, ...]) -> Any:
        wide = x.astype(widened(x.dtype))
        square = jnp.square(jax.lax.stop_gradient(wide))
        squares = one_each(group_means(square, along, jnp), along).ravel()
        labelled = any(isinstance(entry, Labels) for entry in along.entries)
        if labelled or is_explicit(jax.typeof(wide)):  # whose axes cannot be put together
            return Tokens(one_each(group_means(wide, along, jnp), along).reshape(-1, 1), squares)
        last = range(x.ndim - len(along.axes), x.ndim)
        return Tokens(jnp.moveaxis(wide, along.axes, last).reshape(len(squares), -1), squares)

    def _equation(
        self, eqn: JaxprEqn, operands: list[Any], site: CallPath
    ) -> tuple[Sequence[Any], Found]:
        control = control_flow(eqn)
        is_while = control is not None and control.is_loop and len(control.bodies) == 2
        if is_while or manual(eqn) is not None:
            return evaluate(eqn, operands), {}
        return super()._equation(eqn, operands, site)
