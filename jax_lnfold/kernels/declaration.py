"""`layer_norm`: declares that a function, a kernel say, is a LayerNorm, and which its RMS twin is.

Outside of a trace the function is called as it is. In a trace the call is one equation, which
compiles to what the function compiles to, and by which a fold knows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import update_wrapper
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import (
    ClosedJaxpr,
    close,
    consts_of,
    is_plain_aval,
    is_tracer,
    jaxpr_as_fun,
    open_jaxpr,
    outside_of_meshes,
)
from ..centering import widened
from ..errors import FoldError
from ..program.declared import AFTER_NORM, DeclaredCall, call_declared

Axes = int | tuple[int, ...]


def layer_norm(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    rms: Callable[..., Any],
    axis: Axes = -1,
    scale: int | str | None = None,
    shift: int | str | None = None,
    reference: Callable[..., Any] | None = None,
    name: str | None = None,
    check: bool = True,
    tolerance: float | None = None,
) -> Any:
    """Declare that a function of ``(x, ...)`` is a LayerNorm, so that `fold` can make it `rms`.

    For kernels, which are not looked into: Pallas, FFI calls, primitives, anything with derivatives
    of its own. The function keeps computing what it does, by itself and under `jit`, `vmap`,
    `grad`, `scan`, `shard_map` and `export`; only where `fold` proves that its mean is zero, the
    folded program calls `rms` with the same arguments instead. Both keep their own derivatives.

    Args:
        fn: the function; without it the result is a decorator. Its first argument x is an array of
            floating-point numbers, arrays among its other arguments (or in trees of them) are
            operands, too, and what else there is (numbers, names, None) is bound in each trace.
        rms: the twin. It takes the same arguments and returns arrays of the same shapes and dtypes,
            which must be the same numbers wherever x has a zero mean along `axis`.
        axis: the axis or axes of x that the mean is over, as the function sees x: axes that `vmap`
            adds do not count.
        scale: which argument multiplies the normalised values, by position or name; an array of the
            sizes of x along `axis`, or one that broadcasts against x.
        shift: which argument is added to them, likewise. If all arrays are declared, and the result
            has the shape of x, `fold_affine` works through the call, and the report finds the place
            in the tree.
        reference: a function of the same arguments in plain `jax.numpy` that computes the same, for
            what is more than a LayerNorm: a sum with a residual that is returned, too, a linear
            layer behind it, a scale to which one is added. Everything that a fold may know of the
            call is then read off this function, and `axis`, `scale` and `shift` are not needed.
        name: what reports call it; the function's own name by default.
        check: whether `fold` tests the declaration as `check_layer_norm` does, with the shapes that
            it meets, before it relies on it; that takes the memory of a few such arrays. Pass False
            for kernels that do not run on the machine that folds, and test them where they run.
        tolerance: the largest difference, relative to the largest number, that passes for rounding
            in that test; by default twice the 2/3rd power of the rounding unit (4.9e-5 in float32).

    Returns:
        The function that is declared, or a decorator.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_lnfold
        >>> def without_mean(x, g, b):
        ...     return g * x / jnp.sqrt((x * x).mean(-1, keepdims=True)) + b
        >>> @jax_lnfold.layer_norm(rms=without_mean, scale="g", shift="b")
        ... def my_norm(x, g, b):
        ...     c = x - x.mean(-1, keepdims=True)
        ...     return g * c / jnp.sqrt((c * c).mean(-1, keepdims=True)) + b
        >>> print(my_norm(jnp.arange(4.0), jnp.ones(4), jnp.zeros(4)).round(2))
        [-1.34 -0.45  0.45  1.34]

    Raises:
        FoldError: something is not callable, or an option has no such value. When it is traced:
            x is no array with such axes, or `rms` or `reference` return other shapes or dtypes. A
            function that does more than compute its results, or that names axes of a mesh, is
            called as it is and stays opaque.
    """

    def declare(function: Callable[..., Any]) -> Declared:
        return Declared(function, rms, axis, scale, shift, reference, name, check, tolerance)

    return declare if fn is None else declare(fn)


class Arrays(NamedTuple):
    """Arguments of a call: which of the leaves are arrays, and all of them."""

    leaves: list[Any]
    tree: Any
    positions: list[int]

    @property
    def operands(self) -> list[Any]:
        """The arrays."""
        return [self.leaves[i] for i in self.positions]

    @property
    def bound(self) -> tuple[Any, ...]:
        """All else."""
        return tuple(x for i, x in enumerate(self.leaves) if i not in self.positions)

    def flat(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the arrays alone."""

        def call(*arrays: Any) -> Any:
            leaves = [*self.leaves]
            for i, x in zip(self.positions, arrays, strict=True):
                leaves[i] = x
            args, keywords = jax.tree.unflatten(self.tree, leaves)
            return fn(*args, **keywords)

        return call


class Declared:
    """A function that was declared to be a LayerNorm, see `layer_norm`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        rms: Callable[..., Any],
        axis: Axes,
        scale: int | str | None,
        shift: int | str | None,
        reference: Callable[..., Any] | None,
        name: str | None,
        check: bool,
        tolerance: float | None,
    ) -> None:
        """Use `layer_norm` instead."""
        for argument, given in (("fn", fn), ("rms", rms), ("reference", reference)):
            if not callable(given) and not (given is None and argument == "reference"):
                raise FoldError(f"{argument}: a {type(given).__name__} is not callable")
        self.fn, self.rms, self.reference = fn, rms, reference
        self.axes = _axes(axis)
        self.scale, self.shift = _argument("scale", fn, scale), _argument("shift", fn, shift)
        self.name = str(name or getattr(fn, "__name__", "layer_norm"))
        self.check, self.tolerance = bool(check), _tolerance(tolerance)
        self.passed: set[Any] = set()  # keys of calls that the test was passed with
        update_wrapper(self, fn, updated=())

    def __repr__(self) -> str:
        """The function, and what it is declared to be."""
        return f"<LayerNorm {self.name}>"

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The function; in a trace, as one equation."""
        given = arrays_of(args, keywords)
        if not any(map(is_tracer, given.operands)):
            return self.fn(*args, **keywords)
        program, shapes = jax.make_jaxpr(given.flat(self.fn), return_shape=True)(*given.operands)
        if open_jaxpr(program).effects or self._is_of_one(args, keywords):
            return self.fn(*args, **keywords)
        made = self._call(given, program, shapes)
        return jax.tree.unflatten(jax.tree.structure(shapes), made)

    def _is_of_one(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        """Whether the mean is over single numbers: nobody knows what to make of that."""
        x: Any = next(iter(_bound(self.fn, args, keywords).values()), None)
        sizes = [x.shape[d] for d in self.axes if -x.ndim <= d < x.ndim] if is_array(x) else [0]
        return self.reference is None and bool(sizes) and all(n == 1 for n in sizes)

    def call_for(self, given: Arrays) -> DeclaredCall:
        """The call with arguments of these types, outside of any trace."""
        program, shapes = jax.make_jaxpr(given.flat(self.fn), return_shape=True)(*given.operands)
        twin = self._twin(given, given.operands, shapes)
        meaning = self._meaning(given, given.operands, shapes, bool(consts_of(program)))
        return self._described(given, program, twin, meaning)

    def _call(self, given: Arrays, program: ClosedJaxpr, shapes: Any) -> list[Any]:
        """Trace what belongs to the call, and put it into the trace as one equation."""
        operands = given.operands
        twin = self._twin(given, operands, shapes)
        plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        with outside_of_meshes():
            reference = self._meaning(given, plain, shapes, bool(consts_of(program)))
        (program, twin, reference), operands = _closed_over([program, twin, reference], operands)
        there = program, twin
        if not all(map(is_plain_aval, map(jax.typeof, operands))):
            # On a mesh: what is tested later, outside of it, is traced without.
            with outside_of_meshes():
                there = (
                    jax.make_jaxpr(given.flat(self.fn))(*plain),
                    jax.make_jaxpr(given.flat(self.rms))(*plain),
                )
        described = self._described(given, *there, reference)
        return call_declared(described, program, twin, operands)

    def _described(
        self, given: Arrays, program: ClosedJaxpr, twin: ClosedJaxpr, reference: ClosedJaxpr
    ) -> DeclaredCall:
        tail = any(eqn.primitive is AFTER_NORM for eqn in open_jaxpr(reference).eqns)
        types = tuple((tuple(a.shape), a.dtype) for a in program.in_avals)
        return DeclaredCall(
            name=self.name,
            program=program,
            twin=twin,
            reference=reference,
            measurable=not tail,
            scale_free=self.reference is None,
            tolerance=self.tolerance,
            owner=self,
            key=(given.tree, tuple(map(repr, given.bound)), types),
        )

    def _twin(self, given: Arrays, operands: Sequence[Any], shapes: Any) -> ClosedJaxpr:
        twin, found = jax.make_jaxpr(given.flat(self.rms), return_shape=True)(*operands)
        self._compare("rms", found, shapes)
        return twin

    def _meaning(
        self, given: Arrays, operands: Sequence[Any], shapes: Any, closes_over: bool
    ) -> ClosedJaxpr:
        """The plain program: the reference, or else the formula of a LayerNorm."""
        if self.reference is None:
            return jax.make_jaxpr(given.flat(self._formula(shapes, closes_over)))(*operands)
        reference, found = jax.make_jaxpr(given.flat(self.reference), return_shape=True)(*operands)
        self._compare("reference", found, shapes)
        return reference

    def _compare(self, argument: str, found: Any, wanted: Any) -> None:
        """Raise a `FoldError` unless two functions return arrays of the same types."""
        one, other = (
            (jax.tree.structure(t), [(s.shape, s.dtype) for s in jax.tree.leaves(t)])
            for t in (found, wanted)
        )
        if one != other:
            raise FoldError(
                f"{argument}: returns {_types(found)} where {self.name} returns {_types(wanted)}; "
                "both must return the same shapes and dtypes"
            )

    def _formula(self, shapes: Any, closes_over: bool) -> Callable[..., Any]:
        """The LayerNorm that is declared, without its epsilon; opaque in all that is not.

        What arrays do that the function closes over, nobody has said.
        """
        results = jax.tree.leaves(shapes)

        def formula(*args: Any, **keywords: Any) -> Any:
            named = _bound(self.fn, args, keywords)
            x, *_ = named.values()
            y = self._normalised(x)
            scale, shift = (None if n is None else named.get(n) for n in (self.scale, self.shift))
            leaves = arrays_of(args, keywords).operands
            known = [a for a in (x, scale, shift) if a is not None]
            is_whole = not closes_over and len(results) == 1 and results[0].shape == x.shape
            if not is_whole or any(all(a is not b for b in known) for a in leaves):
                types = tuple((tuple(s.shape), s.dtype) for s in results)
                return AFTER_NORM.bind(y, *(a for a in leaves if a is not x), results=types)
            y = y if scale is None else y * self._broadcast(scale, x)
            y = y if shift is None else y + self._broadcast(shift, x)
            if y.shape != x.shape:
                raise FoldError(f"scale: it and the shift of {self.name} do not fit x")
            return y.astype(results[0].dtype)

        return formula

    def _normalised(self, x: Any) -> jax.Array:
        if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise FoldError(f"{self.name}: its first argument must be an array of real numbers")
        if not all(-x.ndim <= d < x.ndim for d in self.axes):
            raise FoldError(f"axis: {self.axes} are no axes of x, which has {x.ndim}")
        wide, n = jnp.asarray(x, widened(x.dtype)), prod(x.shape[d] for d in self.axes)
        c = wide - jnp.sum(wide, self.axes, keepdims=True) / n
        return c / jnp.sqrt(jnp.sum(jnp.square(c), self.axes, keepdims=True) / n)

    def _broadcast(self, part: Any, x: Any) -> jax.Array:
        """A scale or shift against x."""
        axes = sorted(d % x.ndim for d in self.axes)
        part = jnp.asarray(part).astype(widened(x.dtype))
        if part.shape == tuple(x.shape[d] for d in axes):
            return part.reshape([n if d in axes else 1 for d, n in enumerate(x.shape)])
        return part


def arrays_of(args: tuple[Any, ...], keywords: dict[str, Any]) -> Arrays:
    """The arrays among the arguments of a call."""
    leaves, tree = jax.tree.flatten((args, keywords))
    return Arrays(leaves, tree, [i for i, x in enumerate(leaves) if is_array(x)])


def is_array(x: Any) -> bool:
    """Whether it is an operand: numbers of Python are bound."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _closed_over(
    programs: Sequence[ClosedJaxpr], operands: Sequence[Any]
) -> tuple[list[ClosedJaxpr], list[Any]]:
    """The programs, and the operands with the values of the trace around that they close over.

    What two programs close over is one operand.
    """
    closed_over = {id(c): c for closed in programs for c in consts_of(closed) if is_tracer(c)}
    if not closed_over:
        return [*programs], [*operands]
    everything, end, made = [*operands, *closed_over.values()], len(operands), []
    for closed in programs:

        def run(*given: Any, closed: Any = closed) -> Any:
            passed = dict(zip(closed_over, given[end:], strict=True))
            bound = [passed.get(id(c), c) for c in consts_of(closed)]
            return jaxpr_as_fun(close(open_jaxpr(closed), bound))(*given[:end])

        made.append(jax.make_jaxpr(run)(*everything))
    return made, everything


def _bound(fn: Callable[..., Any], args: Any, keywords: Any) -> dict[str, Any]:
    """The arguments of a call, by name."""
    found = inspect.signature(fn).bind(*args, **keywords).arguments
    named: dict[str, Any] = {}
    for name, x in found.items():
        kind = inspect.signature(fn).parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}[{i}]": each for i, each in enumerate(x)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= x
        else:
            named[name] = x
    return named


def _argument(option: str, fn: Callable[..., Any], given: Any) -> str | None:
    """The name of an argument, as `_bound` names it."""
    if given is None:
        return None
    parameters = inspect.signature(fn).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    more = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        if given < len(names):
            return names[given]
        if more:
            return f"{more[0]}[{given - len(names)}]"
    if isinstance(given, str) and given in names[1:]:
        return given
    raise FoldError(
        f"{option}: {given!r} is no argument behind the first one; pass the position or the name "
        f"of one of {', '.join(names[1:]) or 'the arguments, of which there is none'}"
    )


def _axes(axis: Any) -> tuple[int, ...]:
    axes = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    if not axes or not all(isinstance(d, int) and not isinstance(d, bool) for d in axes):
        raise FoldError(f"axis: {axis!r} is no axis and no tuple of axes; pass -1, say")
    return axes


def _tolerance(tolerance: Any) -> float | None:
    if tolerance is None or (isinstance(tolerance, int | float) and tolerance > 0):
        return tolerance
    raise FoldError(f"tolerance: {tolerance!r} is no positive number; leave it out, or pass 1e-3")


def _types(tree: Any) -> str:
    return ", ".join(f"{s.dtype}{[*s.shape]}" for s in jax.tree.leaves(tree)) or "nothing"
