"""The folded program with a switch for the mean of each LayerNorm that can do without it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._compat import ClosedJaxpr, JaxprEqn, Var
from ..placement.place import Placement
from ..program.graph import CallPath
from .watched import Found, Watched, centered


class Switched(Watched):
    """The outputs of a program with edited parameters, one compilation for all switches.

    Each of the `groups` are positions of LayerNorms; the sums that they take for their mean are
    zero unless the switch of the group is true. LayerNorms that fold compute their mean: with these
    parameters it is zero, too.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        placement: Placement,
        groups: Sequence[Collection[int]],
        switches: jax.Array,
    ) -> None:
        """A bool for each group."""
        super().__init__(closed, placement, centered=True)
        self.norms = {}
        self._switch = {
            op.index: switches[n]
            for n, group in enumerate(groups)
            for i in group
            for op in placement.norms[i].sums
        }
        self._first: dict[int, Var] = {}
        self._as_made: dict[int, Any] = {}

    def outputs(self, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        """What the program returns; the consts are those of the jaxpr."""
        return self._walk(self.closed, consts, operands, ())[0]

    def _made(self, path: CallPath, var: Var, x: Any, found: Found) -> Any:
        """Centered where all that read it are in reach; what returns it sees it as it was."""
        value = self.graph.env[path][var]
        if value not in self.explicit or self.graph.centered_at(value) != path:
            return x
        if self._first.setdefault(value, var) is not var:
            return x  # a call returns what it was given, which is centered
        self._as_made[value] = x
        for along in self.explicit[value]:
            own = self.graph.on_one_device(value, along)
            assert own is not None
            x = centered(x, own)
        return x

    def _returned(self, path: CallPath, var: Var, x: Any) -> Any:
        value = self.graph.env[path][var]
        if value in self._as_made and self.graph.centered_at(value) == path:
            return self._as_made[value] if value in self.graph.outputs else x
        return x

    def _equation(
        self, eqn: JaxprEqn, operands: list[Any], site: CallPath
    ) -> tuple[Sequence[Any], Found]:
        results, found = super()._equation(eqn, operands, site)
        op = self.graph.op_at.get(site)
        if op is None or (switch := self._switch.get(op.index)) is None:
            return results, found
        (mean,) = results
        return [jnp.where(switch, mean, jnp.zeros((), mean.dtype))], found
