"""A program that returns what the means of its LayerNorms amount to, and nothing else.

The jaxpr is evaluated equation by equation, calls written out. What a loop computes anew in each
iteration leaves it as one row for each; where nobody knows how many there will be (`while`), the
sums of all iterations are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import (
    ClosedJaxpr,
    Control,
    JaxprEqn,
    Literal,
    Var,
    array_dtype,
    call_jaxpr,
    consts_of,
    control_flow,
    evaluate,
    is_tracer,
    manual,
    open_jaxpr,
    over_shards_and_more,
    switch,
)
from ..axes.axis_set import AxisSet
from ..axes.labels import ALL, FREE
from ..centering import group_means, widened
from ..placement.place import Placement
from ..plan.leaf import center_array
from ..program.graph import CallPath, Graph
from .shares import Sums, merged, sums_of

Found = dict[int, Sums]
"""By the position of a LayerNorm in the placement."""


class Watched:
    """The program of a placement, in which means are looked at and none is taken out.

    With `centered`, explicit centerings and centered constants are those of the placement: with
    edited parameters, the values are those of the folded program.
    """

    def __init__(self, closed: ClosedJaxpr, placement: Placement, centered: bool) -> None:
        """Find out where to look at what."""
        self.closed, self.graph = closed, placement.graph
        self.explicit = placement.explicit if centered else {}
        self.constants = placement.constants if centered else {}
        self.norms: dict[int, list[tuple[int, AxisSet, tuple[str, ...]]]] = {}
        for i, norm in enumerate(placement.norms):
            if (means := _on_one_shard(self.graph, norm.x, norm.along)) is not None:
                self.norms.setdefault(norm.x, []).append((i, *means))

    def __call__(self, consts: Sequence[Any], operands: Sequence[Any]) -> Found:
        """The sums of each LayerNorm that can be looked at; the consts are those of the jaxpr."""
        return self._walk(self.closed, consts, operands, ())[1]

    def _walk(
        self, closed: Any, consts: Sequence[Any], operands: Sequence[Any], path: CallPath
    ) -> tuple[list[Any], Found]:
        jaxpr, found = open_jaxpr(closed), Found()
        env: dict[Var, Any] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            const = self._edited(self.graph.env[path][var], const)
            env[var] = self._made(path, var, const, found)
        for var, x in zip(jaxpr.invars, operands, strict=True):
            env[var] = self._made(path, var, x, found)

        def read(atom: Any) -> Any:
            if not isinstance(atom, Literal):
                return env[atom]
            return np.asarray(atom.val, array_dtype(atom.aval))

        for index, eqn in enumerate(jaxpr.eqns):
            site = (*path, index)
            results, inside = self._equation(eqn, [read(a) for a in eqn.invars], site)
            found |= inside
            for var, x in zip(eqn.outvars, results, strict=True):
                env[var] = self._made(path, var, x, found)
        results = [
            read(a) if isinstance(a, Literal) else self._returned(path, a, env[a])
            for a in jaxpr.outvars
        ]
        return results, found

    def _returned(self, path: CallPath, var: Var, x: Any) -> Any:
        """What a jaxpr returns of a value."""
        return x

    def _made(self, path: CallPath, var: Var, x: Any, found: Found) -> Any:
        """A value where it is made, centered for all that read it, and looked at."""
        value = self.graph.env[path][var]
        if self.graph.home[value] != path:
            return x
        for along in self.explicit.get(value, ()):
            own = self.graph.on_one_device(value, along)
            assert own is not None
            x = centered(x, own)
        for i, along, mesh_axes in self.norms.get(value, ()):
            if i not in found:  # else a call returns what it is given
                found[i] = self._look(jnp.asarray(x), along, mesh_axes)
        return x

    def _look(self, x: jax.Array, along: AxisSet, mesh_axes: tuple[str, ...]) -> Any:
        """What is taken down of a LayerNorm's input."""
        return sums_of(x, along, mesh_axes)

    def _edited(self, value: int, const: Any) -> Any:
        for along in self.constants.get(value, ()):
            const = center_array(const if is_tracer(const) else np.asarray(const), along)
        return const

    def _equation(
        self, eqn: JaxprEqn, operands: list[Any], site: CallPath
    ) -> tuple[Sequence[Any], Found]:
        op = self.graph.op_at.get(site)
        if op is not None:
            for i, atom in enumerate(eqn.invars):
                if isinstance(atom, Literal):
                    operands[i] = self._edited(op.inputs[i], operands[i])
        if op is not None or site in self.graph.stand_ins:
            return evaluate(eqn, operands), {}
        if (control := control_flow(eqn)) is not None:
            return self._control(eqn, control, operands, site)
        inner = call_jaxpr(eqn)
        assert inner is not None
        if manual(eqn) is None:
            return self._walk(inner, consts_of(inner), operands, site)

        def shard(*operands: Any) -> tuple[Sequence[Any], Found]:
            """With a first axis in the sums, along which those of all devices can be laid."""
            results, sums = self._walk(inner, consts_of(inner), operands, site)
            return results, jax.tree.map(lambda x: x[None], sums)

        results, sums = over_shards_and_more(eqn, shard, operands)
        return results, _over_rows(sums)

    def _control(
        self, eqn: JaxprEqn, control: Control, operands: list[Any], site: CallPath
    ) -> tuple[Sequence[Any], Found]:
        bodies = [
            partial(self._body, body, [operands[i] for i in body.operands], (*site, number))
            for number, body in enumerate(control.bodies)
        ]
        if not control.is_loop:
            return _branches(eqn, bodies, operands[0])
        start = [operands[i] for i in control.carries]
        if len(bodies) == 2:
            return _while(bodies[0], bodies[1], start)

        def step(carry: list[Any], rows: list[Any]) -> tuple[list[Any], Any]:
            results, sums = bodies[0](*carry, *rows)
            return results[: len(start)], (results[len(start) :], sums)

        rows, reverse = [operands[i] for i in control.slices], eqn.params["reverse"]
        end, (stacked, sums) = jax.lax.scan(step, start, rows, control.length, reverse)
        return [*end, *stacked], sums

    def _body(
        self, body: Any, taken: list[Any], path: CallPath, *own: Any
    ) -> tuple[list[Any], Found]:
        return self._walk(body.jaxpr, consts_of(body.jaxpr), [*taken, *own], path)


def _branches(eqn: JaxprEqn, bodies: Sequence[Any], index: Any) -> tuple[Sequence[Any], Found]:
    """A conditional: of LayerNorms in other branches there is no token."""
    nothing: Found = {}
    for body in bodies:
        nothing |= _nothing(body)

    def run(body: Any) -> tuple[list[Any], Found]:
        results, sums = body()
        return results, {**nothing, **sums}

    results, sums = switch(eqn, index, [partial(run, body) for body in bodies], ())
    return results, sums


def _while(test: Any, body: Any, start: list[Any]) -> tuple[Sequence[Any], Found]:
    """A loop of who knows how many iterations: the sums of all of them together.

    LayerNorms of what decides whether it goes on are not looked at, nor those of loops that go on
    together under `vmap`: some of these would be done, and their tokens computed over and over.
    """
    several = jax.eval_shape(lambda: test(*start)[0][0]).ndim > 0
    sums = {} if several else _nothing(lambda: body(*start))

    def going(state: tuple[list[Any], Found]) -> Any:
        return test(*state[0])[0][0]

    def step(state: tuple[list[Any], Found]) -> tuple[list[Any], Found]:
        carry, before = state
        new, after = body(*carry)
        if several:
            masks = (jnp.expand_dims(going(state), range(going(state).ndim, x.ndim)) for x in new)
            return [jnp.where(*each) for each in zip(masks, new, carry, strict=True)], {}
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), before, after)
        return new, _over_rows(both)

    return jax.lax.while_loop(lambda state: jnp.any(going(state)), step, (start, sums))


def _nothing(body: Any) -> Found:
    """The sums of no token for all LayerNorms of a body."""
    _, sums = jax.eval_shape(body)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)


def _over_rows(sums: Mapping[int, Sums]) -> Found:
    return {i: merged(each, jnp) for i, each in sums.items()}


def centered(x: Any, along: AxisSet) -> Any:
    """The explicit centering of a folded program."""
    if along.trivial:
        return jnp.zeros_like(x)
    wide = x.astype(widened(x.dtype))
    return (wide - group_means(wide, along, jnp)).astype(x.dtype)


def _on_one_shard(
    graph: Graph, value: int, along: AxisSet
) -> tuple[AxisSet, tuple[str, ...]] | None:
    """The axes of one shard that a mean spans, and the mesh axes; None if it spans parts of these.

    None also of a value that no variable of the program holds.
    """
    mesh_axes = graph.mesh_axes_of(value)
    rank = len(along.shape) - len(mesh_axes)
    spans = along.entries[rank:]
    held = graph.env.get(graph.home[value], {})
    if graph.home[value] in graph.stand_ins or value not in held.values():
        return None
    if any(entry not in (ALL, FREE) for entry in spans):
        return None
    names = (name for (name, _), entry in zip(mesh_axes, spans, strict=True) if entry == ALL)
    return AxisSet(along.shape[:rank], along.entries[:rank]), tuple(names)
