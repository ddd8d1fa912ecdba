"""LayerNorms that keep their mean, in the spelling of the variance that a backend likes best.

A TPU's compiler makes sums of ``x`` and of ``x**2`` in the product that writes ``x``, but a mean of
``(x - mean)**2`` takes another pass; XLA makes one kernel for GPUs of a norm in two passes, and
several of one in a single pass. Both spellings are exact algebra (theory, section 14); in one pass,
only what is stored in 16 bits keeps its digits, and it keeps all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Var, trace_like
from ..analysis.facts import Facts
from ..analysis.layer_norms import find_norms
from ..program.flatten import flatten
from ..program.graph import Graph
from .inline import inlined
from .jaxprs import live, reading, same
from .roots import STATISTICS, Root, roots_of
from .variances import Change, in_one_pass, in_two_passes
from .walk import Walk


@dataclass(frozen=True, slots=True)
class Respelled:
    """A LayerNorm that keeps its mean, and takes one pass or two where it took the other number.

    `shape` is that of its input, `root` the root of its variance.

    Example:
        >>> from jax_lnfold import Respelled
        >>> Respelled("Bert/norm", shape=(2, 256, 768), two_pass=False, root=(0, 4)).two_pass
        False
    """

    module: str
    shape: tuple[int, ...]
    two_pass: bool
    root: Root | None


def respelled(
    closed: ClosedJaxpr, leaves: Sequence[str], spelling: str
) -> tuple[ClosedJaxpr, tuple[Respelled, ...]]:
    """The program with the LayerNorms in it spelled in ``"one_pass"`` or in ``"two_pass"``.

    Those in which something else than their plain arithmetic happens stay. The first inputs are the
    parameters named by `leaves`.
    """
    program = inlined(closed, STATISTICS)
    rewriter = _Rewriter(program, leaves, spelling)
    result = rewriter.closed(program, ())
    return (closed if result is program else result), tuple(rewriter.made)


class _Rewriter(Walk):
    def __init__(self, program: ClosedJaxpr, leaves: Sequence[str], spelling: str) -> None:
        super().__init__(flatten(program, leaves))
        facts = Facts(self.graph)
        self.roots = roots_of(self.graph)
        find = in_one_pass if spelling == "one_pass" else in_two_passes
        norms = [norm for norm in find_norms(facts).found if norm.root is not None]
        changes = [change for norm in norms for change in find(facts, norm)]
        self.changes = {change.op.index: change for change in changes}
        self.made: list[Respelled] = []

    def body(self, jaxpr: Jaxpr, path: tuple[int, ...]) -> Jaxpr:
        """The jaxpr with other sums of squares, the very same one where there are none."""
        ops = [self.graph.op_at.get((*path, index)) for index in range(len(jaxpr.eqns))]
        changes = [self.changes.get(op.index) if op is not None else None for op in ops]
        gone = {c.difference.index for c in changes if c is not None and c.difference is not None}
        eqns: list[JaxprEqn] = []
        renamed: dict[Any, Any] = {}
        for index, (eqn, op, change) in enumerate(zip(jaxpr.eqns, ops, changes, strict=True)):
            now = reading(eqn, [_renamed(a, renamed) for a in eqn.invars])
            if change is not None:
                eqns.append(_call(change, self.graph))
                self.made.append(self._told(change))
            elif op is not None and op.index in gone:
                renamed[eqn.outvars[0]] = now.invars[0]
            else:
                eqns.append(self.inside(now, (*path, index)))
        if same(eqns, jaxpr.eqns):
            return jaxpr
        outvars = [_renamed(a, renamed) for a in jaxpr.outvars]
        return jaxpr.replace(eqns=live(eqns, outvars), outvars=outvars)

    def _told(self, change: Change) -> Respelled:
        root = change.norm.root
        assert root is not None
        return Respelled(
            change.norm.module,
            self.graph.shape(change.value),
            change.difference is not None,
            self.roots.get(root.index),
        )


def _renamed(atom: Any, renamed: dict[Any, Any]) -> Any:
    return renamed.get(atom, atom) if isinstance(atom, Var) else atom


def _call(change: Change, graph: Graph) -> JaxprEqn:
    """One call to a function of its own name that makes the sum."""
    (eqn,) = trace_like(jax.jit(change.sums), graph.avals[change.value]).eqns
    return eqn.replace(invars=[change.atom], outvars=change.op.eqn.outvars)
