"""The program as one flat graph of values, with calls walked into.

Calls (`jit`, `checkpoint`, `custom_jvp_call`, ...) share jaxprs and variables between call sites,
so a value is known by (call path, variable). An operand and the variable it binds inside the call
are the same value: call boundaries vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import (
    CUSTOM_RULES,
    ClosedJaxpr,
    Control,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    call_jaxpr,
    consts_of,
    control_flow,
    is_tracer,
    open_jaxpr,
    source_line,
)

CallPath = tuple[int, ...]
"""Equation indices of the calls around a jaxpr, outermost first."""


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One equation at one call site; `inputs` and `outputs` are value numbers.

    `calls` are the call equations around it, innermost first. `role` names what a loop or a
    conditional does with one value (see `JOINS` and `rules.control`), empty for other equations.
    """

    index: int
    eqn: JaxprEqn
    path: CallPath
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    calls: tuple[JaxprEqn, ...]
    role: str = ""

    @property
    def name(self) -> str:
        """The name of the primitive, or the role."""
        return self.role or self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the equation."""
        return self.eqn.params

    def describe(self) -> str:
        """``primitive (module path, file.py:line)`` for reports."""
        where = ", ".join(
            part for part in (self.module, source_line((self.eqn, *self.calls))) if part
        )
        name = self.eqn.primitive.name
        return f"`{name}` ({where})" if where else f"`{name}`"


JOINS = frozenset({"loop_carry", "loop_result", "branch_result"})
"""Roles whose output is one of the inputs: the first and the next value of a carry, branches."""


class Graph:
    """Values, the operation that makes each, and the operations that read it.

    Loops are walked into once: a carry is made from its first and its next value. `uses` lists
    live operations only: what cannot reach an output or an effect is dead code and notices nothing.
    """

    def __init__(self, closed: ClosedJaxpr, n_leaves: int) -> None:
        """Flatten `closed`, whose first `n_leaves` inputs are the parameter leaves."""
        self.avals: list[Any] = []
        self.producer: list[tuple[Op, int] | None] = []
        self.data_free: list[bool] = []  # computed from parameters and constants only
        self.fixed: list[bool] = []  # computed from constants only
        self.constants: dict[int, Any] = {}
        self.bound: set[int] = set()  # constants that the jaxpr binds to a variable
        self.captured: set[int] = set()  # closed over by a function with a derivative rule
        self.ops: list[Op] = []
        self.op_at: dict[tuple[CallPath, int], Op] = {}
        self.env: dict[CallPath, dict[Var, int]] = {}
        self.trips: dict[CallPath, int] = {(): 1}  # how often a jaxpr runs in one call
        self.home: list[CallPath] = []
        self._custom: set[CallPath] = set()

        jaxpr = open_jaxpr(closed)
        inputs = [self._new(v.aval, (), i < n_leaves, False) for i, v in enumerate(jaxpr.invars)]
        self.leaves = {v: i for i, v in enumerate(inputs[:n_leaves])}
        results = self._walk(jaxpr, consts_of(closed), inputs, (), "", ())
        self.outputs = frozenset(results)
        self.uses: list[list[tuple[Op, int]]] = [[] for _ in self.avals]
        self._link_uses()

    def shape(self, value: int) -> tuple[Any, ...]:
        """The shape of a value."""
        return tuple(self.avals[value].shape)

    def in_custom_rule(self, value: int) -> bool:
        """Whether the value is made inside a call that has a derivative rule of its own."""
        path = self.home[value]
        return any(path[: n + 1] in self._custom for n in range(len(path)))

    def is_editable_constant(self, value: int) -> bool:
        """Whether the program reads a constant from a variable, and nobody else reads it.

        A derivative rule reads the constants that its function closes over by itself.
        """
        hidden = value in self.captured or self.in_custom_rule(value)
        return value in self.bound and not hidden

    def scalar(self, value: int) -> np.ndarray | None:
        """The number that every element of a value has, if the program fixes it."""
        while (made := self.producer[value]) is not None:
            if made[0].name not in ("convert_element_type", "broadcast_in_dim", "reshape"):
                return None
            value = made[0].inputs[0]
        constant = self.constants.get(value)
        return None if constant is None or np.ndim(constant) else np.asarray(constant)

    def _new(self, aval: Any, path: CallPath, data_free: bool, fixed: bool) -> int:
        self.avals.append(aval)
        self.producer.append(None)
        self.data_free.append(data_free)
        self.fixed.append(fixed)
        self.home.append(path)
        return len(self.avals) - 1

    def _constant(self, value: Any, aval: Any, path: CallPath) -> int:
        number = self._new(aval, path, True, True)
        if not is_tracer(value) and not jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            self.constants[number] = value
        return number

    def _walk(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[int],
        path: CallPath,
        module: str,
        calls: tuple[JaxprEqn, ...],
    ) -> list[int]:
        env: dict[Var, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._constant(const, var.aval, path)
            self.bound.add(env[var])
        self.env[path] = env
        if path not in self.trips:
            self.trips[path] = self.trips[path[:-1]]

        def read(atom: Any) -> int:
            return (
                self._constant(atom.val, atom.aval, path)
                if isinstance(atom, Literal)
                else (env[atom])
            )

        for index, eqn in enumerate(jaxpr.eqns):
            operands = tuple(read(a) for a in eqn.invars)
            here = "/".join(p for p in (module, str(eqn.source_info.name_stack)) if p)
            inner, control = call_jaxpr(eqn), control_flow(eqn)
            if control is not None:
                results = self._control(eqn, control, operands, (*path, index), here, calls)
            elif inner is not None:
                if eqn.primitive.name in CUSTOM_RULES:
                    self._custom.add((*path, index))
                    self.captured.update(operands[: eqn.params.get("num_consts", 0)])
                body, site = open_jaxpr(inner), (*path, index)
                results = self._walk(body, consts_of(inner), operands, site, here, (eqn, *calls))
            else:
                free = not eqn.effects and all(self.data_free[v] for v in operands)
                fixed = free and all(self.fixed[v] for v in operands)
                results = [self._new(v.aval, path, free, fixed) for v in eqn.outvars]
                op = Op(len(self.ops), eqn, path, here, operands, tuple(results), calls)
                self.op_at[path, index] = op
                self._add(op)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _add(self, op: Op) -> None:
        self.ops.append(op)
        for position, value in enumerate(op.outputs):
            self.producer[value] = (op, position)

    def _control(
        self,
        eqn: JaxprEqn,
        control: Control,
        operands: tuple[int, ...],
        site: CallPath,
        module: str,
        calls: tuple[JaxprEqn, ...],
    ) -> list[int]:
        """Walk into a loop or a conditional, with operations for what it does to its values."""
        outside = site[:-1]

        def add(role: str, inputs: Sequence[int], outputs: Sequence[int], path: CallPath) -> None:
            number = len(self.ops)
            self._add(Op(number, eqn, path, module, tuple(inputs), tuple(outputs), calls, role))

        add("observe", [operands[i] for i in control.observed], (), outside)
        starts = [operands[i] for i in control.carries]
        carried: list[tuple[int, int]] = []  # carries inside the bodies, which carry each is
        ends: list[list[int]] = []
        for number, body in enumerate(control.bodies):
            inside, jaxpr = (*site, number), open_jaxpr(body.jaxpr)
            self.trips[inside] = self.trips[outside] * control.length
            taken = [operands[i] for i in body.operands]
            own = [self._new(v.aval, inside, False, False) for v in jaxpr.invars[len(taken) :]]
            carried += [(value, k) for k, value in enumerate(own[: len(starts)])]
            for row, i in zip(own[len(starts) :], control.slices, strict=True):
                self.data_free[row] = self.data_free[operands[i]]
                add("loop_slice", (operands[i],), (row,), inside)
            consts = consts_of(body.jaxpr)
            ends.append(self._walk(jaxpr, consts, [*taken, *own], inside, module, (eqn, *calls)))
        if control.is_loop:
            add("observe", [value for end in ends[:-1] for value in end], (), outside)
        results = [self._new(v.aval, outside, False, False) for v in eqn.outvars]
        for value, k in carried:
            add("loop_carry", (starts[k], ends[-1][k]), (value,), self.home[value])
        for k, value in enumerate(results):
            if not control.is_loop:
                add("branch_result", [end[k] for end in ends], (value,), outside)
            elif k < len(starts):
                add("loop_result", (starts[k], ends[-1][k]), (value,), outside)
            else:
                add("loop_stack", (ends[-1][k],), (value,), outside)
        return results

    def _link_uses(self) -> None:
        live: set[int] = set()
        todo = list(self.outputs)
        for op in self.ops:
            if op.name == "observe" or (op.eqn.effects and not op.role):
                live.add(op.index)
                todo.extend(op.inputs)
        while todo:
            made = self.producer[todo.pop()]
            if made is not None and made[0].index not in live:
                live.add(made[0].index)
                todo.extend(made[0].inputs)
        for op in self.ops:
            if op.index in live:
                for position, value in enumerate(op.inputs):
                    self.uses[value].append((op, position))
