"""Rules that users bring along, for primitives and kernels that they know better.

They are kept by the primitive object, by the function that is a Pallas kernel, or by the target of
an FFI call, so that what two libraries register does not meet unless they mean the same thing.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from .._compat import Primitive, is_of_jax
from ..axes.axis_set import AxisSet
from ..axes.labels import FREE, Entry
from ..errors import FoldError
from ..program.graph import ROLES
from ..program.primitives import EXCHANGES, NOT_CARRYING, UNSEEN
from .registry import (
    OWN_RULES,
    AxesRule,
    AxisMap,
    Context,
    Opaque,
    Pull,
    PullRule,
    Push,
    PushRule,
    Rule,
    no_axes,
    no_pull,
    no_push,
)

_OF_JAX = EXCHANGES | NOT_CARRYING.keys() | UNSEEN.keys()


@dataclass(frozen=True, slots=True)
class Called:
    """The calls of one kernel, see `pallas_kernel` and `ffi_target`."""

    kind: str
    name: str

    def __str__(self) -> str:
        """What is called."""
        return f"the {self.kind} kernel {self.name}"


def pallas_kernel(kernel: Any) -> Called:
    """The calls of `pallas.pallas_call` with this kernel, a function or a `partial` of one.

    They are known by the file and line of the function, whatever the name of the call. So a rule
    must hold whatever a `partial` binds, or the function closes over: a kernel with an activation
    behind its product, as an option, is not linear. Give the linear one a function of its own.

        >>> def copy_kernel(x_ref, y_ref):
        ...     y_ref[...] = x_ref[...]
        >>> pallas_kernel(copy_kernel).kind
        'pallas'
    """
    while isinstance(kernel, partial):
        kernel = kernel.func
    kernel = inspect.unwrap(kernel) if callable(kernel) else kernel
    if not inspect.isfunction(kernel):
        raise FoldError(
            f"kernel: {kernel!r} is no function; pass the function that pallas_call is given"
        )
    return Called("pallas", f"{kernel.__code__.co_filename}:{kernel.__code__.co_firstlineno}")


def ffi_target(name: str) -> Called:
    """The calls of `jax.ffi.ffi_call` of this target, which is one in a process.

    >>> ffi_target("my_library.matmul").name
    'my_library.matmul'
    """
    if not isinstance(name, str):
        raise FoldError(
            f"name: {name!r} is no text; pass what jax.ffi.register_ffi_target is given"
        )
    return Called("ffi", name)


def register(
    primitive: Primitive | Called,
    rule: Rule | None = None,
    /,
    *,
    pull: PullRule = no_pull,
    push: PushRule = no_push,
    uniform: PullRule | None = None,
    axes: AxesRule = no_axes,
) -> None:
    """Give a primitive of your own, or a kernel, a rule, for all folds of this process.

    Args:
        primitive: the object itself, or what `pallas_kernel` or `ffi_target` return.
        rule: all of it, as `linear` makes one.
        pull: or its parts, each as `Rule` says: what has to be zero-mean,
        push: where a shift goes,
        uniform: what has to be uniform, if pulls do not say it,
        axes: and which axes are kept.

    Try it with `check_rule` first: a rule that is wrong is a wrong number for somebody.

    Raises:
        FoldError: it has a rule already, is one of jax's own, or is told by its name only.
    """
    if isinstance(primitive, Called):
        key: Any = (primitive.kind, primitive.name)
    elif isinstance(primitive, Primitive):
        key = primitive
        if is_of_jax(primitive) or primitive.name in ROLES | _OF_JAX:
            raise FoldError(
                f"primitive: {primitive.name!r} is a name that this library knows, of jax's own or "
                "of what it takes apart; only primitives with names of their own can have a rule"
            )
    else:
        raise FoldError(
            f"primitive: {primitive!r} is no primitive, and a name alone could be anybody's; pass "
            "the object, pallas_kernel(function) or ffi_target(name)"
        )
    if key in OWN_RULES:
        raise FoldError(f"primitive: {primitive} has a rule already; register it once")
    if rule is not None and not isinstance(rule, Rule):
        raise FoldError(f"rule: a {type(rule).__name__} is no Rule; pass linear(...), or parts")
    OWN_RULES[key] = rule or Rule(pull, push, uniform, axes)


def linear(spec: str, operands: Collection[int] | None = None) -> Rule:
    """The rule of what is linear in operands, with axes named as in `jax.numpy.einsum`.

    A matrix product is ``linear("nk,km->nm")``, an embedding lookup ``linear("bt,vd->btd", [1])``,
    a convolution ``linear("bhwi,xyio->bjko")``, a sum over devices ``linear("td->td")``.

    An axis of an operand and of the result that have one letter go together: along it every
    position is computed by itself, and all of them alike if no other operand has that letter. For
    arrays of other ranks, as `vmap` makes them, nothing is claimed.

    Args:
        spec: one letter for each axis.
        operands: positions of the operands that it is linear in; by default each.

    Returns:
        The rule, for `register`.

    Example:
        >>> from jax_lnfold import rules
        >>> product = rules.linear("nk,km->nm")

    Raises:
        FoldError: `spec` is not of this form, or has no such operands.
    """
    form = _Form.parsed(spec, operands)
    return Rule(form.pull, form.push, None, form.axes)


@dataclass(frozen=True)
class _Form:
    """The letters of operands and of the result, and which operands it is linear in."""

    operands: tuple[str, ...]
    result: str
    linear: frozenset[int]

    @staticmethod
    def parsed(spec: Any, operands: Any) -> _Form:
        left, arrow, result = str(spec).replace(" ", "").partition("->")
        parts = tuple(left.split(","))
        ok = arrow and all(part.isalpha() or not part for part in (*parts, result))
        if not ok or any(len({*part}) != len(part) for part in (*parts, result)):
            raise FoldError(f'spec: {spec!r} is not of the form "nk,km->nm"')
        chosen = frozenset(range(len(parts)) if operands is None else operands)
        if not chosen or not chosen <= {*range(len(parts))}:
            raise FoldError(f"operands: {operands!r} are no positions among {len(parts)} operands")
        return _Form(parts, result, chosen)

    def fits(self, ctx: Context) -> bool:
        """Whether the equation has these operands, of these ranks, and one size for each letter.

        Of a second result nothing was said.
        """
        shapes = [*(ctx.in_shape(i) for i in range(len(ctx.op.inputs))), ctx.out_shape()]
        parts = *self.operands, self.result
        if len(ctx.op.outputs) != 1 or [*map(len, shapes)] != [*map(len, parts)]:
            return False
        sizes = {
            (a, n)
            for part, shape in zip(parts, shapes, strict=True)
            for a, n in zip(part, shape, strict=True)
        }
        return len(sizes) == len({a for a, _ in sizes})

    def alike(self, operand: int) -> dict[int, int]:
        """Axes of an operand along which all positions are computed alike, and where they are."""
        others = "".join(part for i, part in enumerate(self.operands) if i != operand)
        return {
            d: self.result.index(letter)
            for d, letter in enumerate(self.operands[operand])
            if letter in self.result and letter not in others
        }

    def pull(self, ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
        """Any operand that has all axes of the set, and alike, may be centered along them."""
        for i in sorted(self.linear) if self.fits(ctx) else ():
            axes = {after: before for before, after in self.alike(i).items()}
            if {*along.axes} <= {*axes}:
                shape = ctx.in_shape(i)
                entries: list[Entry] = [FREE] * len(shape)
                for d in along.axes:
                    entries[axes[d]] = along.entries[d]
                return Pull(((i, AxisSet.of(shape, entries)),))
        return Opaque("is linear in no operand that has these axes")

    def push(self, ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
        """What is uniform along an axis that is kept stays so; a sum of a shift is any number."""
        if operand not in self.linear or not self.fits(ctx):
            return Opaque("is not linear in this operand")
        entries: list[Entry] = [FREE] * len(self.result)
        for before, after in self.alike(operand).items():
            entries[after] = along.entries[before]
        return ((0, AxisSet.of(ctx.out_shape(), entries)),)

    def axes(self, ctx: Context, operand: int) -> AxisMap:
        """Factors along an axis that is kept pass, also where positions differ."""
        if operand not in self.linear or not self.fits(ctx):
            return {}
        return {
            d: self.result.index(letter)
            for d, letter in enumerate(self.operands[operand])
            if letter in self.result
        }
