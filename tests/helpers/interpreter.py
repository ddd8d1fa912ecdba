"""Runs a traced program equation by equation, with a look at (and a hand on) every value.

Written against jaxprs alone, so that facts and tolerance claims about values of the graph, those
in loops and branches included, can be checked against numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_lnfold._compat import (
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    call_jaxpr,
    consts_of,
    control_flow,
    open_jaxpr,
)
from jax_lnfold.program.graph import CallPath, Graph

Change = Callable[[int, Any], Any]
"""What becomes of a value, given its number in the graph; called once per visit, where it is made.
"""


class Interpreter:
    """Runs programs without compiling them, loops iteration by iteration.

    With a graph, every value goes through `change` before an equation reads it; what the program
    returns does not.
    """

    def __init__(self, graph: Graph | None = None, change: Change = lambda _, x: x) -> None:
        self.graph, self.change = graph, change
        self._returned: dict[int, Any] = {}  # before the change

    def run(self, closed: ClosedJaxpr, params: Any, inputs: Any) -> list[Any]:
        """The results of a function of (params, *inputs) that was traced to `closed`."""
        operands = jax.tree.leaves((params, inputs))
        jaxpr = open_jaxpr(closed)
        entering = [self._made((), v, x) for v, x in zip(jaxpr.invars, operands, strict=True)]
        results = self._walk(closed, entering, ())
        numbers = self.graph.env[()] if self.graph else {}
        pairs = zip(jaxpr.outvars, results, strict=True)
        return [
            x if isinstance(v, Literal) else self._returned.get(numbers.get(v, -1), x)
            for v, x in pairs
        ]

    def _made(self, path: CallPath, var: Any, x: Any) -> Any:
        number = self.graph.env[path].get(var) if self.graph else None
        if self.graph is None or number is None:
            return x
        if number in self.graph.outputs:
            self._returned[number] = x
        return self.change(number, x)

    def _walk(self, closed: Any, operands: Sequence[Any], path: CallPath) -> list[Any]:
        """The results of a jaxpr whose operands have been changed already."""
        jaxpr = open_jaxpr(closed)
        env = dict(zip(jaxpr.invars, operands, strict=True))
        for var, const in zip(jaxpr.constvars, consts_of(closed), strict=True):
            env[var] = self._made(path, var, const)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            values, site = [read(a) for a in eqn.invars], (*path, index)
            if (inner := call_jaxpr(eqn)) is not None:
                results = self._walk(inner, values, site)
            else:
                if control_flow(eqn) is not None:
                    made = self._control(eqn, values, site)
                else:
                    made = self._evaluate(eqn, values, site)
                results = [self._made(path, v, x) for v, x in zip(eqn.outvars, made, strict=True)]
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _evaluate(self, eqn: JaxprEqn, values: list[Any], site: CallPath) -> Sequence[Any]:
        for i, number in enumerate(self.graph.op_at[site].inputs if self.graph else ()):
            if isinstance(eqn.invars[i], Literal):
                values[i] = self.change(number, values[i])
        made = eqn.primitive.bind(*values, **eqn.params)
        return made if eqn.primitive.multiple_results else [made]

    def _control(self, eqn: JaxprEqn, values: list[Any], site: CallPath) -> Sequence[Any]:
        control = control_flow(eqn)
        assert control is not None

        def run(number: int, *own: Any) -> list[Any]:
            body, path = control.bodies[number], (*site, number)
            taken = [values[i] for i in body.operands]
            variables = open_jaxpr(body.jaxpr).invars[len(taken) :]
            entering = [self._made(path, v, x) for v, x in zip(variables, own, strict=True)]
            return self._walk(body.jaxpr, [*taken, *entering], path)

        carry = [values[i] for i in control.carries]
        if not control.is_loop:
            return run(int(values[0]))
        if len(control.bodies) == 2:  # `while`
            while run(0, *carry)[0]:
                carry = run(1, *carry)
            return carry
        order = range(control.length)
        rows: list[Any] = [None] * control.length
        for k in reversed(order) if eqn.params["reverse"] else order:
            results = run(0, *carry, *(values[i][k] for i in control.slices))
            carry, rows[k] = results[: len(carry)], results[len(carry) :]
        return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]
