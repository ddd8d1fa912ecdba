"""What XLA says a program costs, before and after a fold."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax

from .._compat import ClosedJaxpr, jaxpr_as_fun

_REDUCE = re.compile(r" reduce\(")


@dataclass(frozen=True, slots=True)
class Cost:
    """XLA's own estimate for one call, compiled for `platform`: (original, folded).

    `reductions` counts the reduce operations of the compiled program, `bytes` are those read and
    written by its kernels, `flops` its floating-point operations. XLA counts the body of a loop
    once.

    Example:
        >>> from jax_lnfold import Cost
        >>> cost = Cost("cpu", reductions=(10, 5), bytes=(3e6, 2e6), flops=(5e6, 4e6))
        >>> str(cost).startswith("5 of 10 reductions and 1 MB of 3 MB accessed saved")
        True
    """

    platform: str
    reductions: tuple[int, int]
    bytes: tuple[float, float]
    flops: tuple[float, float]

    def __str__(self) -> str:
        """The estimates in a sentence."""
        (before, after), (r_before, r_after) = self.bytes, self.reductions
        accessed = f"{si(before - after)}B of {si(before)}B accessed"
        if before == after:
            accessed = f"none of the {si(before)}B accessed"
        return (
            f"{r_before - r_after} of {r_before} reductions and {accessed} saved in one call, by "
            f"XLA's cost analysis for {self.platform}."
        )


def measure(original: ClosedJaxpr, folded: ClosedJaxpr) -> Cost:
    """Compile both programs for the default backend and ask XLA; nothing is run."""
    (r_a, bytes_a, flops_a), (r_b, bytes_b, flops_b) = map(_measure, (original, folded))
    return Cost(jax.default_backend(), (r_a, r_b), (bytes_a, bytes_b), (flops_a, flops_b))


def _measure(program: ClosedJaxpr) -> tuple[int, float, float]:
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    compiled = jax.jit(jaxpr_as_fun(program)).lower(*shapes).compile()
    found = compiled.cost_analysis() or {}
    reductions = len(_REDUCE.findall(compiled.as_text() or ""))
    return reductions, found.get("bytes accessed", 0.0), found.get("flops", 0.0)


def si(number: float) -> str:
    """A number with three digits and a prefix: ``3.40 G``."""
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**exponent:
            return f"{number / 10**exponent:.3g} {prefix}"
    return f"{number:.3g} "
