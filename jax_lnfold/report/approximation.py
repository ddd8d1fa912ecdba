"""What was measured where a program does without means that are not zero: plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..printable import counted
from .statistics import Statistics


@dataclass(frozen=True, slots=True)
class Approximation:
    """What it amounts to that LayerNorms do without a mean that is not zero.

    Errors are relative, of the output for which it is largest: ``|y - y'| / |y|`` over all numbers
    of all `held_out` batches, to which nothing was fitted, against the function that was folded.
    `deviation` is that of the folded program, `exact` that without a mean left out, which is
    rounding, and `budget` what was allowed: by `default`, what a cast of the weights to bfloat16
    does. Nothing is known of the three if there were no batches. `damages` are the errors with the
    mean of one LayerNorm left out alone, by its name, also of those that keep it after all; `kept`
    says by name why others must. Of logits, `divergence` is the mean of
    ``KL(softmax(y) || softmax(y'))`` in nats, and `agreement` how often the largest one is the
    same, from 0 to 1. `statistics` are shares of the means on the batches held out, before and
    after the edits of parameters.

    Example:
        >>> import jax_lnfold
        >>> found = jax_lnfold.Approximation(0.01, False, 0.004, 1e-7, fitted=4, held_out=1)
        >>> print(next(found.lines(dropped=2)))
        Approximate: the means of 2 LayerNorms left out; relative error of the outputs 0.004 on \
1 of 5 batches, to which nothing was fitted (budget 0.01; 1e-07 with all means).
    """

    budget: float
    default: bool = False
    deviation: float | None = None
    exact: float | None = None
    fitted: int = 0
    held_out: int = 0
    divergence: float | None = None
    agreement: float | None = None
    damages: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    statistics: Statistics | None = field(default=None, compare=False)

    def lines(self, dropped: int) -> Iterator[str]:
        """What there is to know of a program in which as many LayerNorms do without a mean."""
        means = "no mean is left out"
        if dropped:
            some = f"the {'mean' if dropped == 1 else 'means'} of {counted(dropped, 'LayerNorm')}"
            means = f"{some} left out"
        if self.deviation is None:
            yield f"Approximate: {means}; what that amounts to was not measured."
        else:
            of_cast = ", what a cast of the weights to bfloat16 does" if self.default else ""
            without = f"; {self.exact:.1g} with all means" if dropped else ""
            yield (
                f"Approximate: {means}; relative error of the outputs "
                f"{self.deviation:.2g}{self._of_logits()} on {self.held_out} of "
                f"{counted(self.fitted + self.held_out, 'batch', 'batches')}, to which nothing was "
                f"fitted (budget {self.budget:.2g}{of_cast}{without})."
            )
        for why in dict.fromkeys(self.kept.values()):
            names = [name for name, other in self.kept.items() if other == why]
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            yield f"Cannot do without a mean: {some}, as {why}."

    def _of_logits(self) -> str:
        if self.divergence is None or self.agreement is None:
            return ""
        return f" (KL divergence {self.divergence:.2g}, argmax agrees {self.agreement:.2%})"
