"""Which outputs of a jaxpr are inputs, passed on through calls and loops as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .._compat import Control, Jaxpr, JaxprEqn, Var, call_jaxpr, control_flow, open_jaxpr
from .primitives import TRANSPOSE


class Passed(NamedTuple):
    """An input by its position, with its axes in another order: along `axes[d]` runs axis d."""

    position: int
    axes: tuple[int, ...]

    @property
    def in_place(self) -> bool:
        """Whether all axes are where they were."""
        return self.axes == (*range(len(self.axes)),)


def passed_on(jaxpr: Jaxpr) -> list[Passed | None]:
    """The input that each output is, None if it is not known to be one.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda a, b: (b.T, jax.jit(lambda x: (x, x + 1))(a)))
    >>> [found and found.position for found in passed_on(jaxpr(1.0, 2.0).jaxpr)]
    [1, 0, None]
    """
    source = {var: Passed(i, (*range(_rank(var)),)) for i, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for made, found in zip(eqn.outvars, _through(eqn), strict=True):
            given = None if found is None else eqn.invars[found.position]
            if found is not None and isinstance(given, Var) and given in source:
                before = source[given]
                source[made] = before._replace(axes=tuple(before.axes[d] for d in found.axes))
    return [source.get(x) if isinstance(x, Var) else None for x in jaxpr.outvars]


def passes_all_on(jaxpr: Jaxpr) -> list[bool]:
    """Of each output, whether it is the input at its position."""
    found = passed_on(jaxpr)
    return [f is not None and f.position == i and f.in_place for i, f in enumerate(found)]


def _through(eqn: JaxprEqn) -> Sequence[Passed | None]:
    """The operand that each result of an equation is."""
    if (control := control_flow(eqn)) is not None:
        positions = _in_loop(control) if control.is_loop else _in_branches(control)
        ranks = map(_rank, eqn.outvars)
        return [
            None if i is None else Passed(i, (*range(rank),))
            for i, rank in zip(positions, ranks, strict=True)
        ]
    if (inner := call_jaxpr(eqn)) is not None:
        return passed_on(open_jaxpr(inner))
    if eqn.primitive.name == TRANSPOSE:
        return [Passed(0, tuple(eqn.params["permutation"]))]
    return [None] * len(eqn.outvars)


def _in_loop(control: Control) -> Iterable[int | None]:
    """Carries that no iteration changes, and rows that are stacked again in their order."""
    body = control.bodies[-1]
    first = len(body.operands)
    rows = first + len(control.carries)
    for j, i in enumerate(_positions(open_jaxpr(body.jaxpr))):
        if j < len(control.carries):
            yield control.carries[j] if i == first + j else None
        else:
            yield control.slices[i - rows] if i is not None and i >= rows else None


def _in_branches(control: Control) -> Iterable[int | None]:
    """What all branches pass on."""
    each = (
        [None if i is None else body.operands[i] for i in _positions(open_jaxpr(body.jaxpr))]
        for body in control.bodies
    )
    for first, *rest in zip(*each, strict=True):
        yield first if all(x == first for x in rest) else None


def _rank(var: Var) -> int:
    return len(getattr(var.aval, "shape", ()))


def _positions(jaxpr: Jaxpr) -> list[int | None]:
    return [f.position if f is not None and f.in_place else None for f in passed_on(jaxpr)]
