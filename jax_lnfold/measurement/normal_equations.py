"""Ridge regression from sums over tokens, in float64: which means of leaves cancel a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = np.logspace(-13, 3, 65)
"""Ridges that are tried, relative to the mean of the eigenvalues."""


@dataclass
class Normal:
    """Sums over the tokens of one LayerNorm, with ``m + J v`` the mean of a token.

    `matrix` is the sum of ``J'J``, `vector` that of ``J'm``, `means` of ``m**2`` and `squares` of
    ``mean(x**2)``.
    """

    matrix: np.ndarray
    vector: np.ndarray
    means: float = 0.0
    squares: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, size: int) -> Normal:
        """Of no token, for `size` numbers v."""
        return cls(np.zeros((size, size)), np.zeros(size))

    def add(self, rows: np.ndarray, means: np.ndarray, squares: np.ndarray) -> None:
        """Tokens, with their ``J'`` as columns of `rows`."""
        with np.errstate(all="ignore"):  # of what is not finite, which is found in the end
            self.matrix += rows @ rows.T
            self.vector += rows @ means
            self.means += float(means @ means)
        self.squares += float(squares.sum())
        self.tokens += len(means)

    def share(self, v: np.ndarray) -> float:
        """The share of the mean in the second moment with the means v, that without at first."""
        left = self.means + 2 * self.vector @ v + v @ self.matrix @ v
        return max(float(left), 0.0) / self.squares if self.squares else 0.0

    @property
    def finite(self) -> bool:
        """Whether no token was infinite or NaN."""
        sums = self.matrix.sum() + self.vector.sum() + self.means + self.squares
        return bool(np.isfinite(sums))


def ridge(normals: Sequence[Normal]) -> np.ndarray:
    """The v that make the sum of all shares small, every LayerNorm of `normals` counting alike.

    Minimises ``sum (m + J v)**2 + ridge |v|**2``; the ridge is the one of generalised cross
    validation, among those that leave at least half of the degrees of freedom to the tokens.
    """
    used = [n for n in normals if n.squares > 0]
    size = len(normals[0].vector)
    tokens = sum(n.tokens for n in used)
    matrix = sum((n.matrix / n.squares for n in used), np.zeros((size, size)))
    vector = sum((n.vector / n.squares for n in used), np.zeros(size))
    total = sum(n.means / n.squares for n in used)
    scale = np.trace(matrix) / size
    if not tokens or not scale > 0 or not total > 0:
        return np.zeros(size)
    values, basis = np.linalg.eigh(matrix)
    values, along = np.maximum(values, 0), basis.T @ vector
    ridges = (scale * STEPS)[:, None]
    kept = values / (values + ridges)
    freedom = kept.sum(1) / tokens
    left = total - (along**2 * (values + 2 * ridges) / (values + ridges) ** 2).sum(1)
    left = np.maximum(left, 1e-14 * total)  # what is below has no digits
    scores = np.where(freedom <= 0.5, left / (1 - np.minimum(freedom, 0.5)) ** 2, np.inf)
    if not np.isfinite(scores).any():
        return np.zeros(size)
    best = scale * STEPS[len(STEPS) - 1 - int(np.argmin(scores[::-1]))]
    return -basis @ (along / (values + best))
