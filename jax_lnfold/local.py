"""Makers and readers of the values of one jaxpr, as far as products and norms are concerned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ._compat import Jaxpr, JaxprEqn, Var, is_stranger
from .primitives import MOVES

CONVERT = "convert_element_type"


@dataclass(frozen=True, slots=True)
class Reader:
    """A product that reads the scaled value by its operand `position`, after the `steps`."""

    index: int
    position: int
    steps: tuple[JaxprEqn, ...]


class Local:
    """Makers and readers of the values of one jaxpr."""

    def __init__(self, jaxpr: Jaxpr) -> None:
        """Look through all equations once."""
        self.jaxpr = jaxpr
        self.index: dict[Var, int] = {}
        self.readers: dict[Var, list[tuple[int, int]]] = {}
        for index, eqn in enumerate(jaxpr.eqns):
            self.index |= dict.fromkeys(eqn.outvars, index)
            for position, atom in enumerate(eqn.invars):
                if isinstance(atom, Var):
                    self.readers.setdefault(atom, []).append((index, position))
        self.returned = {a for a in jaxpr.outvars if isinstance(a, Var)}

    def maker(self, atom: Any) -> JaxprEqn | None:
        """The equation that makes a value, None for inputs and numbers."""
        index = self.index.get(atom) if isinstance(atom, Var) else None
        return None if index is None else self.jaxpr.eqns[index]

    def products(self, var: Var, steps: tuple[JaxprEqn, ...] = ()) -> list[Reader]:
        """The products that read a value, moved and converted only; none if it is used elsewise."""
        found: list[Reader] = []
        if var in self.returned:
            return []
        for index, position in self.readers.get(var, ()):
            eqn = self.jaxpr.eqns[index]
            if name_of(eqn) == "dot_general":
                found.append(Reader(index, position, steps))
            elif name_of(eqn) in MOVES | {CONVERT} and len(eqn.invars) == 1:
                more = self.products(eqn.outvars[0], (*steps, eqn))
                if not more:
                    return []
                found += more
            else:
                return []
        return found

    def source(self, atom: Any) -> Any:
        """What a value was before it was converted to dtypes that hold more."""
        while (made := self.maker(atom)) is not None and name_of(made) == CONVERT:
            (before,) = made.invars
            if not (isinstance(before, Var) and holds(dtype_of(atom), dtype_of(before))):
                break
            atom = before
        return atom

    def is_norm(self, base: Var, factor: Var) -> bool:
        """Whether the factor is computed from squares of what it scales.

        So the base has to be there, whole, before anything can be scaled. (The denominators of a
        softmax are there sooner, and compilers know what to do with them.)
        """
        source = self.source(base)
        start, todo, seen = self.index.get(source, -1), [factor], {factor}
        while todo:
            index = self.index.get(todo.pop(), -1)
            if index <= start:
                continue
            eqn = self.jaxpr.eqns[index]
            if _squares(eqn) and self.source(eqn.invars[0]) == source:
                return True
            for atom in eqn.invars:
                if isinstance(atom, Var) and atom not in seen:
                    seen.add(atom)
                    todo.append(atom)
        return False


def _squares(eqn: JaxprEqn) -> bool:
    name, x = name_of(eqn), eqn.invars[:1]
    power = name == "integer_pow" and eqn.params["y"] == 2
    return name == "square" or power or (name == "mul" and eqn.invars == [*x, *x])


def name_of(eqn: JaxprEqn) -> str:
    """The name of the primitive, none if somebody else's goes by the name of one of jax's own."""
    return "" if is_stranger(eqn) else eqn.primitive.name


def dtype_of(atom: Any) -> Any:
    """The dtype of an atom."""
    return atom.aval.dtype


def shape_of(atom: Any) -> tuple[Any, ...]:
    """The shape of an atom."""
    return tuple(atom.aval.shape)


def holds(dtype: Any, before: Any) -> bool:
    """Whether every number of `before` is in the range of `dtype`."""
    if not all(jnp.issubdtype(d, jnp.floating) for d in (dtype, before)):
        return False
    a, b = jnp.finfo(dtype), jnp.finfo(before)
    return a.maxexp >= b.maxexp and a.minexp <= b.minexp
