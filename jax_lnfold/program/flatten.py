"""From a jaxpr to the flat graph, with calls, loops and per-device programs walked into.

Calls (`jit`, `checkpoint`, `custom_jvp_call`, ...) share jaxprs and variables between call sites,
so a value is known by (call path, variable). An operand and the variable it binds inside the call
are the same value: call boundaries vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compat import (
    CUSTOM_RULES,
    Body,
    ClosedJaxpr,
    Control,
    Jaxpr,
    JaxprEqn,
    Literal,
    Manual,
    Var,
    call_jaxpr,
    consts_of,
    control_flow,
    has_effects,
    is_stranger,
    jaxpr_as_fun,
    manual,
    open_jaxpr,
)
from ..trees import is_editable
from .declared import declared_call, meaning
from .devices import MeshAxes, collect, per_device, spread, with_mesh_axes
from .dropout import dropped_operand, note_noise
from .frames import UNKNOWN, Line, calling_line
from .garbage import collector_paused
from .graph import DROPOUT, OTHER_MEANING, QUANTIZE, ROLES, CallPath, Graph, Op, OutputPath
from .marks import marks_in, without_marks


@collector_paused()
def flatten(
    closed: ClosedJaxpr,
    leaves: Sequence[str] = (),
    see_through_dropout: bool = False,
    output_paths: Sequence[OutputPath] = (),
    runs: Sequence[int] = (),
) -> Graph:
    """The graph of `closed`, whose first inputs are the parameter leaves with these key paths.

    The paths of the outputs are what reports call them; `runs` is how often the calls run that are
    its first equations.
    """
    graph, jaxpr = Graph(), open_jaxpr(closed)
    avals = (v.aval for v in jaxpr.invars)
    inputs = [graph.new_value(aval, (), i < len(leaves), False) for i, aval in enumerate(avals)]
    graph.leaves = dict(zip(inputs, leaves, strict=False))
    graph.trips |= {(index,): n for index, n in enumerate(runs)}
    graph.is_joint = bool(runs)
    frame = _Frame(caller=cache(partial(calling_line, jaxpr.eqns)))
    results = _Walker(graph, see_through_dropout).walk(jaxpr, consts_of(closed), inputs, frame)
    graph.outputs = frozenset(results)
    graph.output_paths = [*zip(results, output_paths, strict=False)]
    graph.link_uses()
    return graph


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a jaxpr stands: path, module, marks, calls and caller around it, and mesh axes."""

    path: CallPath = ()
    module: str = ""
    calls: tuple[JaxprEqn, ...] = ()
    mesh_axes: MeshAxes = ()
    caller: Callable[[], Line] = lambda: UNKNOWN
    marks: tuple[str, ...] = ()

    def inside(self, eqn: JaxprEqn, *key: int) -> _Frame:
        """The frame of a jaxpr that an equation of this one holds."""
        return replace(self, path=(*self.path, *key), calls=(eqn, *self.calls))


class _WalkedBody(NamedTuple):
    """A body of a loop or a conditional: its carries and results, and the frame of what joins them.

    Carries and rows are made where the body begins, in no call but those around the equation.
    """

    border: _Frame
    carries: Sequence[int]
    results: Sequence[int]


class _Walker:
    def __init__(self, graph: Graph, see_through_dropout: bool) -> None:
        self.graph, self.see_through_dropout = graph, see_through_dropout
        self.hidden = 0  # programs without an equation of their own have negative numbers

    def walk(
        self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[int], frame: _Frame
    ) -> list[int]:
        """Add the operations of a jaxpr; the values of its outputs."""
        graph, path = self.graph, frame.path
        env = graph.env[path] = dict(zip(jaxpr.invars, inputs, strict=True))
        graph.mesh_axes[path] = frame.mesh_axes
        if path not in graph.trips:
            graph.trips[path] = graph.trips[path[:-1]]
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._constant(const, var.aval, frame)
            graph.bound.add(env[var])
        for index, eqn in enumerate(jaxpr.eqns):
            results = self._equation(eqn, index, frame)
            env.update(zip(eqn.outvars, results, strict=True))
        return [self._read(a, frame) for a in jaxpr.outvars]

    def _constant(self, value: Any, aval: Any, frame: _Frame) -> int:
        number = self.graph.new_constant(value, aval, frame.path)
        return self._spread(number, (), frame) if frame.mesh_axes else number

    def _read(self, atom: Any, frame: _Frame) -> int:
        if isinstance(atom, Literal):
            return self._constant(atom.val, atom.aval, frame)
        return self.graph.env[frame.path][atom]

    def _equation(self, eqn: JaxprEqn, index: int, frame: _Frame) -> list[int]:
        """Add what an equation does; the values of its results."""
        names = "" if frame.path in self.graph.stand_ins else str(eqn.source_info.name_stack)
        module = "/".join(p for p in (frame.module, without_marks(names)) if p)
        here = replace(frame, module=module, marks=(*frame.marks, *marks_in(names)))
        if (stand_in := _stand_in_for(eqn, frame)) is not None:
            return self._meant(stand_in, eqn, index, here)
        operands = [self._read(a, frame) for a in eqn.invars]
        if _has_other_meaning(eqn, frame):
            return self._operation(eqn, index, operands, here, OTHER_MEANING)
        if (control := control_flow(eqn)) is not None:
            return self._control(eqn, index, control, operands, here)
        if (devices := manual(eqn)) is not None:
            return self._devices(eqn, index, devices, operands, here)
        if (inner := call_jaxpr(eqn)) is not None:
            return self._call(eqn, index, inner, operands, here)
        return self._operation(eqn, index, operands, here)

    def _add(
        self,
        eqn: JaxprEqn,
        frame: _Frame,
        inputs: Sequence[int],
        outputs: Sequence[int],
        role: str = "",
        carry: int | None = None,
    ) -> Op:
        op = Op(
            index=len(self.graph.ops),
            eqn=eqn,
            path=frame.path,
            module=frame.module,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            calls=frame.calls,
            role=role,
            carry=carry,
            stands_in=frame.path in self.graph.stand_ins,
            caller=frame.caller,
            marks=frame.marks,
        )
        self.graph.add(op)
        return op

    def _operation(
        self,
        eqn: JaxprEqn,
        index: int,
        inputs: Sequence[int],
        frame: _Frame,
        role: str = "",
    ) -> list[int]:
        """An equation that is not walked into."""
        graph = self.graph
        free = not has_effects(eqn) and all(graph.data_free[v] for v in inputs)
        fixed = free and all(graph.fixed[v] for v in inputs)
        avals = (with_mesh_axes(v.aval, frame.mesh_axes) for v in eqn.outvars)
        results = [graph.new_value(aval, frame.path, free, fixed) for aval in avals]
        dropped = None if role else dropped_operand(graph, eqn.primitive.name, inputs)
        role = DROPOUT if self.see_through_dropout and dropped is not None else role
        role = role or (QUANTIZE if _is_coarse(eqn) else "")
        op = self._add(eqn, frame, inputs, results, role)
        graph.op_at[*frame.path, index] = op
        if dropped is not None:
            graph.dropouts[op.index] = dropped
        elif not role:
            note_noise(graph, eqn.primitive.name, inputs, results)
        pairs = zip(inputs, eqn.invars, strict=True)
        graph.literals.update(v for v, a in pairs if isinstance(a, Literal))
        return results

    def _call(
        self,
        eqn: JaxprEqn,
        index: int,
        inner: ClosedJaxpr | Jaxpr,
        operands: Sequence[int],
        frame: _Frame,
    ) -> list[int]:
        """Walk into a function that is called."""
        graph, within, start = self.graph, frame.inside(eqn, index), len(self.graph.ops)
        if eqn.primitive.name in CUSTOM_RULES:
            # Its derivative is of another function: what is changed inside would not be in there.
            graph.sealed.add(within.path)
            graph.captured.update(operands[: eqn.params.get("num_consts", 0)])
        results = self.walk(open_jaxpr(inner), consts_of(inner), operands, within)
        if within.path in graph.sealed:
            self._settle_unread(results, start, within.path, frame.path)
        return results

    def _meant(self, stand_in: ClosedJaxpr, eqn: JaxprEqn, index: int, frame: _Frame) -> list[int]:
        """Walk into what an equation means."""
        graph, start, site = self.graph, len(self.graph.ops), (*frame.path, index)
        given = [self._read(a, frame) for a in eqn.invars if not isinstance(a, Literal)]
        results = self._stand_in(stand_in, given, frame.inside(eqn, index))
        if (call := declared_call(eqn)) is None:
            self._settle(results, site, frame.path)
        else:  # what its own norm reads, say, would not be the centered one
            graph.declared[site] = call
            self._settle_unread(results, start, site, frame.path)
        return results

    def _stand_in(self, closed: ClosedJaxpr, operands: Sequence[int], frame: _Frame) -> list[int]:
        """Walk into a program that says what an equation means for all mesh_axes."""
        self.graph.stand_ins[frame.path] = closed
        self.graph.sealed.add(frame.path)
        frame = replace(frame, mesh_axes=())
        return self.walk(open_jaxpr(closed), consts_of(closed), operands, frame)

    def _hidden(self, frame: _Frame) -> _Frame:
        """The frame of a stand-in that no equation of the jaxpr holds."""
        self.hidden += 1
        return replace(frame, path=(*frame.path, -self.hidden))

    def _spread(self, value: int, spec: Sequence[Any], frame: _Frame) -> int:
        """The shards of a whole array on the devices of a frame."""
        cut = spread(self.graph.avals[value], spec, frame.mesh_axes)
        return self._stand_in(cut, [value], self._hidden(frame))[0]

    def _settle(self, values: Sequence[int], stand_in: CallPath, path: CallPath) -> None:
        """Results of a stand-in are bound to variables of the jaxpr at `path`."""
        for value in values:
            if self.graph.home[value] == stand_in:
                self.graph.home[value] = path

    def _settle_unread(
        self, values: Sequence[int], start: int, inside: CallPath, path: CallPath
    ) -> None:
        """Results of a sealed call can be centered after it if nothing inside reads them."""
        read = {v for op in self.graph.ops[start:] for v in op.inputs}
        for value in values:
            if self.graph.home[value][: len(inside)] == inside and value not in read:
                self.graph.home[value] = path

    def _devices(
        self, eqn: JaxprEqn, index: int, devices: Manual, operands: Sequence[int], frame: _Frame
    ) -> list[int]:
        """Walk into a `shard_map`: the shards of all devices together, see `mesh_axes`."""
        graph, mesh_axes = self.graph, devices.axes
        within = replace(frame.inside(eqn, index), mesh_axes=mesh_axes)
        graph.trips[within.path] = graph.trips[frame.path]
        shards = []
        for value, spec in zip(operands, devices.in_specs, strict=True):
            shard = self._spread(value, spec, within)
            if graph.home[shard] in graph.stand_ins:
                graph.home[shard] = within.path
            shards.append(shard)
        body = call_jaxpr(eqn)
        assert body is not None
        results = []
        ends = self.walk(open_jaxpr(body), consts_of(body), shards, within)
        for value, spec in zip(ends, devices.out_specs, strict=True):
            joined, rows = collect(graph.avals[value], spec, mesh_axes)
            outside = self._hidden(replace(within, path=frame.path))
            (value,) = self._stand_in(joined, [value], outside)
            for _ in range(rows):  # the same on all devices: any row will do
                aval = graph.avals[value]
                aval = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
                free, fixed = graph.data_free[value], graph.fixed[value]
                row = graph.new_value(aval, outside.path, free, fixed)
                self._add(eqn, frame, (value,), (row,), "device_row")
                value = row
            self._settle([value], outside.path, frame.path)
            results.append(value)
        return results

    def _control(
        self, eqn: JaxprEqn, index: int, control: Control, operands: Sequence[int], frame: _Frame
    ) -> list[int]:
        """Walk into a loop or a conditional, with operations for what it does to its values."""
        self._add(eqn, frame, [operands[i] for i in control.observed], (), "observe")
        bodies = [
            self._control_body(
                eqn, control, body, operands, frame, frame.inside(eqn, index, number)
            )
            for number, body in enumerate(control.bodies)
        ]
        if control.is_loop:
            tests = [value for body in bodies[:-1] for value in body.results]
            self._add(eqn, frame, tests, (), "observe")
        results = self._new_values(eqn.outvars, frame)
        starts, ends = [operands[i] for i in control.carries], bodies[-1].results
        for body in bodies:
            for k, value in enumerate(body.carries):
                self._add(eqn, body.border, (starts[k], ends[k]), (value,), "loop_carry", k)
        for k, value in enumerate(results):
            if not control.is_loop:
                branches = [body.results[k] for body in bodies]
                self._add(eqn, frame, branches, (value,), "branch_result")
            elif k < len(starts):
                self._add(eqn, frame, (starts[k], ends[k]), (value,), "loop_result", k)
            else:
                self._add(eqn, frame, (ends[k],), (value,), "loop_stack")
        return results

    def _control_body(
        self,
        eqn: JaxprEqn,
        control: Control,
        body: Body,
        operands: Sequence[int],
        frame: _Frame,
        within: _Frame,
    ) -> _WalkedBody:
        """Walk into one of the bodies of a loop or a conditional in `frame`."""
        graph, jaxpr = self.graph, open_jaxpr(body.jaxpr)
        border = replace(within, calls=frame.calls)
        # Symbolic sizes count once, here and in the sizes of values.
        length = control.length if isinstance(control.length, int) else 1
        graph.trips[within.path] = graph.trips[frame.path] * length
        taken = [operands[i] for i in body.operands]
        own = self._new_values(jaxpr.invars[len(taken) :], within)
        carries, rows = own[: len(control.carries)], own[len(control.carries) :]
        for row, i in zip(rows, control.slices, strict=True):
            graph.data_free[row] = graph.data_free[operands[i]]
            self._add(eqn, border, (operands[i],), (row,), "loop_slice")
        results = self.walk(jaxpr, consts_of(body.jaxpr), [*taken, *own], within)
        return _WalkedBody(border, carries, results)

    def _new_values(self, variables: Iterable[Var], frame: _Frame) -> list[int]:
        """Values of variables that depend on the data, as far as is known."""
        avals = (with_mesh_axes(v.aval, frame.mesh_axes) for v in variables)
        return [self.graph.new_value(aval, frame.path, False, False) for aval in avals]


def _stand_in_for(eqn: JaxprEqn, frame: _Frame) -> ClosedJaxpr | None:
    """What a declared call means, or a single operation inside of a `shard_map` for all devices."""
    if (declared := meaning(eqn)) is not None:
        return per_device(eqn, frame.mesh_axes, jaxpr_as_fun(declared))
    if not frame.mesh_axes or is_stranger(eqn) or has_effects(eqn):
        return None
    if control_flow(eqn) is not None or manual(eqn) is not None or call_jaxpr(eqn) is not None:
        return None
    if eqn.params.get("axis_index_groups") is not None:
        return None
    return per_device(eqn, frame.mesh_axes)


def _has_other_meaning(eqn: JaxprEqn, frame: _Frame) -> bool:
    """Whether no rule for its primitive may be asked about it, nor what is inside of it."""
    if is_stranger(eqn) or eqn.primitive.name in ROLES:
        return True
    if not frame.mesh_axes:
        return False
    if control_flow(eqn) is not None:
        # Devices may branch differently: a result need not be that of one branch.
        return eqn.primitive.name != "scan"
    # Per device, a rule would be about other axes.
    return manual(eqn) is not None or call_jaxpr(eqn) is None


def _is_coarse(eqn: JaxprEqn) -> bool:
    """Whether it rounds so much that what it is given is no longer its result: to float8, say."""
    name, params = eqn.primitive.name, eqn.params
    if name == "reduce_precision":
        return params["exponent_bits"] < 5 or params["mantissa_bits"] < 7
    new = params.get("new_dtype") if name == "convert_element_type" else None
    return new is not None and jnp.issubdtype(new, jnp.floating) and not is_editable(new)
