"""The mean of every token that LayerNorms read, as a function of the means of some leaves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compat import ClosedJaxpr, JaxprEqn, Var, control_flow, evaluate, manual
from ..axes.axis_set import AxisSet
from ..centering import group_means, widened
from ..placement.place import Placement
from ..program.graph import CallPath
from .shares import one_each
from .watched import Found, Watched


class Tokens(NamedTuple):
    """``mean(x)`` and ``mean(x**2)`` of all tokens; loops around them are leading axes."""

    means: Any
    squares: Any


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
        both = wide, jnp.square(jax.lax.stop_gradient(wide))
        return Tokens(*(one_each(group_means(y, along, jnp), along).ravel() for y in both))

    def _equation(
        self, eqn: JaxprEqn, operands: list[Any], site: CallPath
    ) -> tuple[Sequence[Any], Found]:
        control = control_flow(eqn)
        is_while = control is not None and control.is_loop and len(control.bodies) == 2
        if is_while or manual(eqn) is not None:
            return evaluate(eqn, operands), {}
        return super()._equation(eqn, operands, site)
