"""A program with every float in float64: what the errors of narrower ones are measured against.

Running a function on float64 parameters is not enough: many cast them back (Flax with
``dtype=bfloat16``). Here its jaxpr is evaluated with the casts themselves widened, and complex
numbers with them. Integers, random bits and the program's own constants stay what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import (
    ClosedJaxpr,
    Control,
    Jaxpr,
    JaxprEqn,
    Literal,
    array_dtype,
    call_jaxpr,
    consts_of,
    control_flow,
    evaluate,
    is_known,
    manual,
    open_jaxpr,
    over_shards,
    switch,
)

# What these compute depends on the bits of the dtype.
_BY_DTYPE = frozenset("bitcast_convert_type nextafter random_gamma rng_uniform".split())
_PRECISE = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def run_widened(
    closed: ClosedJaxpr, operands: Sequence[Any]
) -> tuple[list[jax.Array], tuple[str, ...]]:
    """Run a program on arrays, compiled, with every float in float64.

    Returns:
        The results, and the primitives that had to run in their own dtypes, on numbers rounded to
        these: callbacks, kernels, bit patterns, and whatever else is unknown or has no float64.
    """
    walker = _Widening()
    with jax.enable_x64(True):
        results = jax.jit(lambda consts, given: walker.walk(open_jaxpr(closed), consts, given))(
            consts_of(closed), operands
        )
    counts = Counter(walker.kept.values())
    return results, tuple(f"{n} x {name}" if n > 1 else name for name, n in sorted(counts.items()))


class _Widening:
    def __init__(self) -> None:
        self.kept: dict[int, str] = {}  # by equation: the body of a loop is traced repeatedly

    def walk(self, jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr."""
        inputs = zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True)
        env = {var: _cast(jnp.asarray(x), _wide_type(var)) for var, x in inputs}

        def read(atom: Any) -> Any:
            if not isinstance(atom, Literal):
                return env[atom]
            return np.asarray(atom.val, array_dtype(atom.aval)).astype(_wide_type(atom))

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _inside(self, body: Any, *operands: Any) -> list[Any]:
        return self.walk(open_jaxpr(body), consts_of(body), operands)

    def _equation(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        if is_known(eqn) and eqn.primitive.name not in _BY_DTYPE:
            try:
                results = self._widened(eqn, operands)
                if [x.dtype for x in results] == [_wide_type(v) for v in eqn.outvars]:
                    return results
            except Exception:  # there are kernels of single precision only
                pass
        return self._as_it_was(eqn, operands)

    def _as_it_was(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        """The results of an equation on operands rounded to its own dtypes."""
        narrow = [_cast(x, array_dtype(a.aval)) for x, a in zip(operands, eqn.invars, strict=True)]
        results = evaluate(eqn, narrow)
        exact = eqn.primitive.name == "bitcast_convert_type"  # of bits that are no float's
        atoms = eqn.invars if exact else (*eqn.invars, *eqn.outvars)
        if eqn.outvars and any(array_dtype(a.aval) != _wide_type(a) for a in atoms):
            self.kept[id(eqn)] = eqn.primitive.name
        return [_cast(x, _wide_type(v)) for x, v in zip(results, eqn.outvars, strict=True)]

    def _widened(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        if (control := control_flow(eqn)) is not None:
            return self._control(eqn, control, operands)
        if (inner := call_jaxpr(eqn)) is not None:
            if manual(eqn) is not None:
                return over_shards(eqn, partial(self._inside, inner), operands)
            return self._inside(inner, *operands)
        if eqn.primitive.name == "reduce_precision":
            return operands
        params = jax.tree.map(self._parameter, dict(eqn.params))
        if params.get("precision") is not None:
            params["precision"] = _PRECISE
        return evaluate(eqn.replace(params=params), operands)

    def _parameter(self, x: Any) -> Any:
        """A parameter of an equation, widened if it is a dtype or a jaxpr."""
        if isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic)):
            return _wide(np.dtype(x))
        if not isinstance(x, (Jaxpr, ClosedJaxpr)):
            return x
        types: list[Any] = [v.aval for v in open_jaxpr(x).invars]
        avals = [jax.ShapeDtypeStruct(t.shape, _wide(t.dtype)) for t in types]
        closed = jax.make_jaxpr(partial(self._inside, x))(*avals)
        return closed if isinstance(x, ClosedJaxpr) else open_jaxpr(closed)

    def _control(self, eqn: JaxprEqn, control: Control, operands: list[Any]) -> list[Any]:
        fixed, bodies = [], [body.jaxpr for body in control.bodies]
        for body in control.bodies:
            fixed.append([operands[i] for i in body.operands])
        start = [operands[i] for i in control.carries]
        if eqn.primitive.name == "cond":
            branches = [partial(self._inside, body) for body in bodies]
            return switch(eqn, operands[0], branches, fixed[0])
        if eqn.primitive.name == "while":
            return self._while(bodies, fixed, start)

        def step(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
            results = self._inside(bodies[0], *fixed[0], *carry, *rows)
            return results[: len(start)], results[len(start) :]

        rows = [operands[i] for i in control.slices]
        length, reverse = control.length, eqn.params["reverse"]
        end, stacked = jax.lax.scan(step, start, rows, length, reverse)
        return [*end, *stacked]

    def _while(self, bodies: list[Any], fixed: list[list[Any]], start: list[Any]) -> list[Any]:
        def going(carry: list[Any]) -> Any:
            return self._inside(bodies[0], *fixed[0], *carry)[0]

        def step(carry: list[Any]) -> list[Any]:
            new, more = self._inside(bodies[1], *fixed[1], *carry), going(carry)
            if not more.ndim:
                return new
            # Loops under `vmap` go on together; those that are done keep what they have.
            masks = (jnp.expand_dims(more, range(more.ndim, x.ndim)) for x in new)
            return [jnp.where(*each) for each in zip(masks, new, carry, strict=True)]

        return jax.lax.while_loop(lambda carry: jnp.any(going(carry)), step, start)


def _wide(dtype: Any) -> Any:
    """Double precision for numbers with a fraction, the dtype itself for others."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _wide_type(atom: Any) -> Any:
    """The dtype of a value in the widened program, None of what is no array."""
    dtype = array_dtype(atom.aval)
    return None if dtype is None else _wide(dtype)


def _cast(x: Any, dtype: Any) -> Any:
    return x if dtype is None or x.dtype == dtype else x.astype(dtype)
