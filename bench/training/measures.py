"""Statistics of the runs in a results file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy import stats

Content: TypeAlias = dict[str, Any]

REFERENCE, FOLDED = "layernorm", "cbwc_rmsnorm"
ORDER = (REFERENCE, FOLDED, "rmsnorm", "none")
SMALL = 5e-5  # deviations below are written with exponents
APART = 1e-3  # of the training loss, as a share of it


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds."""

    n: int
    mean: float
    std: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of what was measured; the deviation of a single value is not known."""
        x = np.array(list(values), float)
        mean = float(x.mean()) if len(x) else np.nan
        return cls(len(x), mean, float(x.std(ddof=1)) if len(x) > 1 else np.nan)

    @property
    def interval(self) -> float:
        """Half of the 95 % confidence interval of the mean, by Student's t."""
        if self.n < 2:
            return np.nan
        return float(stats.t.ppf(0.975, self.n - 1)) * self.std / self.n**0.5

    def text(self, signed: bool = False) -> str:
        """Mean and deviation with the digits that the deviation allows."""
        if not self.n:
            return "—"
        if self.std == self.mean == 0:
            return "0 ± 0"
        if 0 < self.std < SMALL:
            mean = "0" if abs(self.mean) < self.std / 2 else f"{self.mean:.0e}"
            return f"{mean} ± {self.std:.0e}"
        digits = 4
        if np.isfinite(self.std) and self.std > 0:
            digits = int(np.clip(1 - np.floor(np.log10(self.std)), 0, 4))
        value = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return f"{value} ± {self.std:.{digits}f}" if np.isfinite(self.std) else value


class Agreement(NamedTuple):
    """How close the folded run of a seed stays to the one with LayerNorms."""

    apart: int | None  # steps until the training losses differ by `APART`
    largest: float  # difference of the training losses on the way, as a share of the loss
    final: float  # difference of the final metrics


def runs(content: Content, task: str, variant: str, dtype: str = "float32") -> dict[int, Any]:
    """Runs by seed."""
    return {
        run["seed"]: run
        for run in content["runs"]
        if (run["task"], run["variant"], run["dtype"]) == (task, variant, dtype)
    }


def finals(content: Content, task: str, variant: str) -> Spread:
    """The final metric over the seeds that did not diverge."""
    found = (run["final"] for run in runs(content, task, variant).values() if not run["diverged"])
    return Spread.of(x for x in found if x is not None)


def differences(content: Content, task: str, variant: str) -> Spread:
    """The final metric less that of the LayerNorms, seed by seed."""
    first, second = (runs(content, task, v) for v in (REFERENCE, variant))
    pairs = [(first[s]["final"], second[s]["final"]) for s in sorted(first.keys() & second.keys())]
    return Spread.of(b - a for a, b in pairs if a is not None and b is not None)


def agreement(content: Content, task: str, dtype: str = "float32") -> list[Agreement]:
    """Of each seed that has both runs."""
    first, second = (runs(content, task, v, dtype) for v in (REFERENCE, FOLDED))
    every = content["tasks"][task]["settings"]["log_every"]
    found = []
    for seed in sorted(first.keys() & second.keys()):
        a, b = (np.array(r[seed]["train_loss"], float) for r in (first, second))
        relative = np.abs(b - a) / np.abs(a)
        above = np.flatnonzero(relative > APART)
        final = abs((second[seed]["final"] or 0) - (first[seed]["final"] or 0))
        apart = (int(above[0]) + 1) * every if len(above) else None
        found.append(Agreement(apart, float(relative.max()), final))
    return found
