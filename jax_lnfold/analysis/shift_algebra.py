"""The algebra of responses: how a value changes when the root of a `Tracker` is shifted.

For ``x -> x + u`` with ``u`` uniform along S, a derived value ``y`` becomes ``y + r(u)`` where the
response ``r`` is a polynomial in ``u``. Its coefficients are products of an exact fraction, ``x``,
sums of ``x`` over some axes, and other values of the program.

What is behind `stop_gradient` is computed from a copy of everything, and ``u`` is another shift
there: what does not respond to the two has the same derivatives, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np


class Sum(NamedTuple):
    """The sum of ``x``, or of its copy behind `stop_gradient`, over some axes of the root."""

    axes: tuple[int, ...] = ()
    stopped: bool = False


X = Sum()
STOPPED_SHIFT = "u'"
Factor = str | Sum
"""A sum of ``x``; another value, ``*7`` or ``/7`` (``'*7`` its copy); or `STOPPED_SHIFT`."""
Term = tuple[int, tuple[Factor, ...]]
"""Degree in all shifts, of which those behind `stop_gradient` are factors, and sorted factors."""
Response = dict[Term, Fraction]


@dataclass(frozen=True)
class Tracked:
    """A value that responds: how, and how its axes line up with those of the root.

    `form` writes the value itself as a combination of ``x`` and its sums, where that is possible.
    `dims` names the root's axis behind every axis, None for a broadcast one. What `grows` is
    multiplied by ``exp(r)``; else ``r`` is added to it.
    """

    response: Response
    form: dict[Sum, Fraction] | None
    dims: tuple[int | None, ...]
    grows: bool = False

    @property
    def factors(self) -> set[str]:
        """All other values that the response depends on."""
        named = (f for _, factors in self.response for f in factors)
        return {f for f in named if isinstance(f, str) and f != STOPPED_SHIFT}

    @property
    def is_shift(self) -> bool:
        """Whether the value changes by nothing but a multiple of the shifts."""
        shifts = (1, ()), (1, (STOPPED_SHIFT,))
        return not self.grows and all(term in shifts for term in self.response)


class Refused(Exception):
    """An operation notices the shift in a way that nothing cancels."""


def summed(t: Tracked, axes: frozenset[int], count: int) -> Tracked:
    """The response of a sum over `axes` of the root, with `count` terms (``axes`` may be empty).

    ``sum(x + u) = sum(x) + n u`` where u is uniform along the axes summed over; the caller has
    checked that. Axes are left as they are.
    """

    def factor_sum(factors: tuple[Factor, ...]) -> tuple[tuple[Factor, ...], int]:
        """The factors of the sum, and how often each is counted."""
        varying = [f for f in factors if isinstance(f, Sum) and not axes <= {*f.axes}]
        if not axes or not varying:
            return factors, count
        shifts = tuple(f for f in factors if f == STOPPED_SHIFT)
        single = varying[0]
        if len(factors) > len(shifts) + 1 or axes & {*single.axes}:
            raise Refused("sums powers of the shifted value")
        both = tuple(sorted(axes | {*single.axes}))
        return ordered((single._replace(axes=both), *shifts)), 1

    response: Response = {}
    for (degree, factors), number in t.response.items():
        kept, times = factor_sum(factors)
        accumulate(response, (degree, kept), number * times)
    form: dict[Sum, Fraction] | None = None
    if t.form is not None:
        form = {}
        for factor, number in t.form.items():
            kept, times = factor_sum((factor,))
            accumulate(form, kept[0], number * times)
    return Tracked(response, form, t.dims)


def ordered(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """The factors of a product in their one order."""
    return tuple(sorted(factors, key=str))


def accumulate(total: dict[Any, Fraction], key: Any, number: Fraction) -> None:
    """Add to a coefficient; coefficients that become zero disappear."""
    value = total.get(key, Fraction(0)) + number
    if value:
        total[key] = value
    else:
        total.pop(key, None)


def scaled(t: Tracked, factor: Fraction) -> Tracked:
    """``factor * y``."""
    response = {term: number * factor for term, number in t.response.items() if factor}
    form = None if t.form is None else {k: v * factor for k, v in t.form.items()}
    return Tracked(response, form, t.dims)


def total(a: Tracked, b: Tracked) -> Tracked:
    """``a + b``."""
    response, form = dict(a.response), None
    for term, number in b.response.items():
        accumulate(response, term, number)
    if a.form is not None and b.form is not None:
        form = dict(a.form)
        for factor, number in b.form.items():
            accumulate(form, factor, number)
    return Tracked(response, form, a.dims)


def stopped(t: Tracked) -> Tracked:
    """The same of the copy that is behind `stop_gradient`, which is shifted by another u'.

    ``stop(y + r(u)) = y' + r(u')``.

    >>> respond(lambda x: x - jax.lax.stop_gradient(x), (2, 3), along=[1])
    -u' + u
    """

    def copy(factor: Factor) -> Factor:
        if isinstance(factor, Sum):
            return factor._replace(stopped=True)
        return factor if factor[0] == "'" or factor == STOPPED_SHIFT else f"'{factor}"

    response: Response = {}
    for (degree, factors), number in t.response.items():
        shifts = (STOPPED_SHIFT,) * (degree - factors.count(STOPPED_SHIFT))
        accumulate(response, (degree, ordered((*map(copy, factors), *shifts))), number)
    form: dict[Sum, Fraction] | None = None
    if t.form is not None:
        form = {}
        for factor, number in t.form.items():
            accumulate(form, copy(factor), number)
    return Tracked(response, form, t.dims, t.grows)


def product(a: Tracked, b: Tracked) -> Tracked:
    """``(a + r)(b + s) - ab = a s + r b + r s``."""
    if a.form is None or b.form is None:
        raise Refused("multiplies by the shifted value")
    response: Response = {}
    own = [{(0, (k,)): v for k, v in t.form.items()} for t in (a, b) if t.form is not None]
    for left, right in ((own[0], b.response), (a.response, own[1]), (a.response, b.response)):
        for (p, f), v in left.items():
            for (q, g), w in right.items():
                accumulate(response, (p + q, ordered((*f, *g))), v * w)
    return Tracked(response, None, a.dims)


def exact_number(number: np.ndarray, counts: Iterable[int]) -> Fraction:
    """The number meant by a program: a count or its reciprocal, rounded to the dtype, or itself."""
    for n in sorted(counts):
        for exact in (Fraction(n), Fraction(1, n) if n else Fraction(0)):
            if number == np.asarray(float(exact)).astype(number.dtype):
                return exact
    return Fraction(float(number))
