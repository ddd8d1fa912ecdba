"""Tests declarations on numbers: it is a LayerNorm, and its twin is the same without a mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import ClosedJaxpr, consts_of, jaxpr_as_fun
from ..analysis.facts import Facts
from ..analysis.layer_norms import find_norms
from ..axes.axis_set import AxisSet
from ..centering import group_means, widened
from ..errors import FoldError
from ..placement.place import place_within
from ..program.declared import DeclaredCall
from ..program.flatten import flatten
from ..program.graph import Graph
from ..trees import first_line, is_editable
from .declaration import Declared, arrays_of, layer_norm
from .operands import Sets, large, masks, operands, scaled, small

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
Results = tuple[list[np.ndarray], dict[int, np.ndarray]]
"""Values, and gradients by operand."""


@dataclass(frozen=True, slots=True)
class LayerNormCheck:
    """The largest differences that were found, each relative to the largest number compared.

    `shift`: of the function and what it is declared to be when x is shifted, or where that is not
    known, of its results before and after the shift. `twin`: of the function and its twin where x
    is zero-mean. The same of gradients, None if the function has none. `tolerance` is what passed.

    Example:
        >>> import jax_lnfold
        >>> found = jax_lnfold.LayerNormCheck(1e-7, 2e-7, None, None, tolerance=5e-5)
        >>> max(found.shift, found.twin) <= found.tolerance
        True
    """

    shift: float
    twin: float
    shift_gradient: float | None
    twin_gradient: float | None
    tolerance: float


def check_layer_norm(fn: Any, *example: Any, **declaration: Any) -> LayerNormCheck:
    """Test on random numbers that a function is a LayerNorm as it was declared.

    Of floating-point arrays in the example only shapes and dtypes matter; others are used as they
    are. x is drawn with a spread of 1, other operands between 0.5 and 1.5. Compared are values and
    gradients: under a shift of x that is another number for each group of positions, and of the
    function with its twin where x is zero-mean, also where x is small, so that an epsilon counts.
    `fold` does the same once for the shapes and numbers of Python that it meets; arrays of integers
    or booleans, which it does not know, are ones then, and zeros and ones.

    Args:
        fn: what `layer_norm` returns, or a function, and then the keywords of `layer_norm`.
        *example: the arguments of one call: arrays, `jax.ShapeDtypeStruct`, and all else.
        **declaration: the keywords of `layer_norm`, if `fn` is not declared yet.

    Returns:
        The differences that were found, which are within the tolerance.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax_lnfold
        >>> def no_mean(x):
        ...     return x / jnp.sqrt((x * x).mean(-1, keepdims=True))
        >>> def norm(x):
        ...     return no_mean(x - x.mean(-1, keepdims=True))
        >>> jax_lnfold.check_layer_norm(norm, jnp.ones((3, 8)), rms=no_mean).twin < 1e-6
        True

    Raises:
        FoldError: it is none, or its twin is another function; the message has the numbers. Or the
            function, which must run here, cannot.
    """
    if isinstance(fn, Declared) and declaration:
        raise FoldError(f"{next(iter(declaration))}: {fn.name} is declared already")
    declared = fn if isinstance(fn, Declared) else layer_norm(fn, **declaration)
    given = arrays_of(example, {})
    call = declared.call_for(given)
    found = _check(call, dict(enumerate(given.operands)))
    declared.passed.add(_known_by(call))
    return found


def check_declared(graph: Graph) -> None:
    """Test every declaration that a program relies on, once for each combination of shapes.

    Raises:
        FoldError: as `check_layer_norm` does.
    """
    for call in graph.declared.values():
        tested = call.owner.passed
        if not call.owner.check or (known := _known_by(call)) in tested:
            continue
        if all(isinstance(n, int) for aval in call.program.in_avals for n in aval.shape):
            _check(call, {})
            tested.add(known)
        elif not tested:
            raise FoldError(
                f"layer_norm: {call.name} cannot be tested with symbolic sizes; fold with numbers "
                "first, or pass it to check_layer_norm"
            )


def _known_by(call: DeclaredCall) -> Any:
    """What a test that was passed speaks for: arguments of these types, and these very programs.

    What functions read that is no argument, a setting say, may be another the next time.
    """
    programs = call.program, call.twin, call.reference
    texts = (_ADDRESS.sub("", str(closed)) for closed in programs)
    return call.key, *texts, *(_digest(c) for closed in programs for c in consts_of(closed))


def _digest(const: Any) -> Any:
    """The same for the same numbers; where they cannot be read, the same for nothing."""
    try:
        return np.asarray(const).tobytes()
    except Exception:  # spread over processes, keys
        return object()


def _check(call: DeclaredCall, given: Mapping[int, Any]) -> LayerNormCheck:
    sets, run, found = _centerings(call), _Runner(call), list[LayerNormCheck]()
    for known in masks(call, given):
        pair = operands(call, sets, known)
        # Nobody knows which masks and counts make sense, but for the first, where NaN is wrong.
        if not found or _is_finite(run(call.program, pair[0])):
            found.append(_tested(call, sets, run, *pair))
    slopes = [(c.shift_gradient, c.twin_gradient) for c in found]
    return LayerNormCheck(
        shift=max(c.shift for c in found),
        twin=max(c.twin for c in found),
        shift_gradient=max((a for a, _ in slopes if a is not None), default=None),
        twin_gradient=max((b for _, b in slopes if b is not None), default=None),
        tolerance=found[0].tolerance,
    )


def _tested(
    call: DeclaredCall, sets: Sets, run: _Runner, zero: list[Any], moved: list[Any]
) -> LayerNormCheck:
    """The test with these operands: where the norm is given no mean, and where it is."""
    tolerance = call.tolerance or _tolerance(call)
    program, along = run(call.program, zero), _words(sets)
    shift, twin = [], []
    if call.scale_free:
        what = f"{call.name} notices a shift of x along {along}"
        shift.append(_compared(call, what, program, run(call.program, moved), {}, tolerance))
    if call.measurable:
        there = scaled(sets, moved, large(call)) if call.scale_free else moved
        what = f"{call.name} differs from what it is declared to be where x is shifted along"
        pair = run(call.program, there), run(call.reference, there)
        shift.append(_compared(call, f"{what} {along}", *pair, {}, tolerance))
    for spread in (1.0, *small(call)):
        there = scaled(sets, zero, spread)
        what = f"rms differs from {call.name} where x is zero-mean along {along}"
        what += "" if spread == 1 else f" with a spread of {spread:.2g}"
        one, other = run(call.program, there), run(call.twin, there)
        if spread != 1 and not _is_finite(one):  # powers of what is small, in float16
            one, other = (one[0], {}), (other[0], {})
        twin.append(_compared(call, what, one, other, sets, tolerance))
    shift_value, shift_slope = _largest(shift)
    twin_value, twin_slope = _largest(twin)
    return LayerNormCheck(shift_value, twin_value, shift_slope, twin_slope, tolerance)


def _largest(found: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Of values, and of gradients if there are any."""
    slopes = [slope for _, slope in found if slope is not None]
    return max(value for value, _ in found), max(slopes, default=None)


def _is_finite(found: Results) -> bool:
    return all(np.isfinite(x).all() for x in (*found[0], *found[1].values()))


def _compared(
    call: DeclaredCall, what: str, one: Results, other: Results, sets: Sets, tolerance: float
) -> tuple[float, float | None]:
    """The differences of values and gradients, if they pass."""
    values, gradients = _differences(one, other, sets)
    _refuse(call, what, values, gradients, tolerance)
    return values, gradients


def _refuse(
    call: DeclaredCall, what: str, values: float, gradients: float | None, tolerance: float
) -> None:
    """Raise a `FoldError` with the numbers if one is too large; NaN is, too."""
    ok = values <= tolerance and (gradients is None or gradients <= tolerance)
    if not ok:
        slopes = "" if gradients is None else f", their gradients by {gradients:.2g},"
        shapes = ", ".join(f"{a.dtype}{[*a.shape]}" for a in call.program.in_avals)
        raise FoldError(
            f"layer_norm: {what} (shapes {shapes}): values differ by {values:.2g}{slopes} relative "
            f"to the largest, and the tolerance is {tolerance:.2g}; correct the declaration, or "
            "pass it a tolerance if this is its rounding"
        )


def _centerings(call: DeclaredCall) -> Sets:
    """What a fold would center if every operand could be edited: so the norm's input is found."""
    operands = call.reference.in_avals
    names = [str(i) for i in range(len(operands))]
    norms = find_norms(Facts(flatten(call.reference, names))).found
    if len(norms) > 1:  # one that folds and one that does not would have no twin
        raise FoldError(
            f"reference: {call.name} has {len(norms)} LayerNorms; declare kernels that have one"
        )
    for k in range(len(call.reference.out_avals)):

        def one(*given: Any, k: int = k) -> Any:
            return jaxpr_as_fun(call.reference)(*given)[k]

        graph = flatten(jax.make_jaxpr(one)(*operands), names)
        placement = place_within(Facts(graph), {}, explicit_cost=2.0)
        if placement.norms and all(placement.folded) and not placement.explicit:
            return {int(graph.leaves[v]): sets for v, sets in placement.leaf_sets.items()}
    raise FoldError(
        f"reference: {call.name} has no LayerNorm of its operands in it that could become an "
        "RMSNorm; see analyze(lambda operands: reference(*operands), operands)"
    )


class _Runner:
    """Runs programs of the same operands: results that are real numbers, and their gradients."""

    def __init__(self, call: DeclaredCall) -> None:
        self.call = call
        self.types = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in call.program.in_avals]
        self.moving = [i for i, x in enumerate(self.types) if is_editable(x.dtype)]
        self.compiled: dict[int, Any] = {}
        self.has_gradients = self._differentiable(call.program)
        if self.has_gradients and not self._differentiable(call.twin):
            raise FoldError(
                f"rms: cannot be differentiated, and {call.name} can; give it a derivative, too"
            )

    def __call__(self, closed: ClosedJaxpr, operands: Sequence[Any]) -> Results:
        """The results, and the gradients of what the operands at `moving` are."""
        run = self._with_gradients if self.has_gradients else self._values
        try:
            # What is compiled runs at once, even where an outer trace would take it down.
            if id(closed) not in self.compiled:
                program = jax.jit(lambda *xs: run(closed, xs)).lower(*self.types).compile()
                self.compiled[id(closed)] = program
            results, gradients = self.compiled[id(closed)](*operands)
            wide = [
                [np.asarray(y, widened(y.dtype)) for y in part] for part in (results, gradients)
            ]
        except Exception as error:  # kernels fail in many ways where they do not belong
            raise FoldError(
                f"layer_norm: {self.call.name} cannot be tested here "
                f"({type(error).__name__}: {first_line(error)}); declare it with check=False, and "
                "pass it to check_layer_norm where it runs"
            ) from error
        return wide[0], dict(zip(self.moving, wide[1], strict=bool(wide[1])))

    def _differentiable(self, closed: ClosedJaxpr) -> bool:
        try:
            jax.eval_shape(lambda *xs: self._with_gradients(closed, xs), *self.types)
        except Exception:  # so say kernels without a derivative
            return False
        return True

    def _values(self, closed: ClosedJaxpr, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return _real(jaxpr_as_fun(closed)(*operands)), []

    def _with_gradients(
        self, closed: ClosedJaxpr, operands: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        def of_moving(*given: Any) -> list[Any]:
            whole = [*operands]
            for i, x in zip(self.moving, given, strict=True):
                whole[i] = x
            return _real(jaxpr_as_fun(closed)(*whole))

        results, back = jax.vjp(of_moving, *(operands[i] for i in self.moving))
        keys = jax.random.split(jax.random.key(0), len(results))
        weights = [
            jax.random.normal(key, y.shape, jnp.float32).astype(y.dtype)
            for key, y in zip(keys, results, strict=True)
        ]
        return results, list(back(weights))


def _real(results: Sequence[Any]) -> list[Any]:
    return [y for y in results if jnp.issubdtype(y.dtype, jnp.floating)]


def _differences(one: Results, other: Results, sets: Sets) -> tuple[float, float | None]:
    """The largest ones of results, and of gradients, of which means along `sets` do not count."""
    values = _largest(_relative(a, b) for a, b in zip(one[0], other[0], strict=True))
    if not one[1]:
        return values, None
    slopes = (
        _relative(*(_without_means(each[1][i], sets.get(i, ())) for each in (one, other)))
        for i in one[1]
    )
    return values, _largest(slopes)


def _largest(differences: Iterable[float]) -> float:
    """NaN if one of them is."""
    return float(np.max([*differences], initial=0.0))


def _without_means(x: Any, sets: Sequence[AxisSet]) -> Any:
    for along in sets:
        x = x - group_means(x, along, np)
    return x


def _relative(a: Any, b: Any) -> float:
    """NaN wherever one of both is."""
    size = float(max(np.abs(a).max(initial=0), np.abs(b).max(initial=0)))
    return float(np.abs(a - b).max(initial=0)) / size if size else 0.0


def _tolerance(call: DeclaredCall) -> float:
    dtypes = [a.dtype for a in (*call.program.in_avals, *call.program.out_avals)]
    units = [float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return 2 * max(units) ** (2 / 3)


def _words(sets: Sets) -> str:
    found = dict.fromkeys(str(along) for each in sets.values() for along in each)
    return " or ".join(found)
