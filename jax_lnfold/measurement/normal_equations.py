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

    @classmethod
    def of(cls, parts: Sequence[Normal]) -> Normal:
        """Of the tokens of all parts together."""
        total = cls.empty(len(parts[0].vector))
        for part in parts:
            for name, value in vars(part).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    @property
    def finite(self) -> bool:
        """Whether no token was infinite or NaN."""
        sums = self.matrix.sum() + self.vector.sum() + self.means + self.squares
        return bool(np.isfinite(sums))


def ridge(normals: Sequence[Normal], folds: Sequence[Sequence[Normal]] = ()) -> np.ndarray:
    """The v that make the sum of all shares small, every LayerNorm of `normals` counting alike.

    Minimises ``sum (m + J v)**2 + ridge |v|**2``. Each of the `folds` holds, for every LayerNorm, a
    part of the tokens; the ridge is the one with which fits to all other folds are best for a fold.
    Without folds it is the one of generalised cross validation, among those that leave at least
    half of the degrees of freedom to the tokens.
    """
    squares = [n.squares for n in normals]
    size, tokens = len(normals[0].vector), sum(n.tokens for n in normals)
    matrix, vector, total = _weighted(normals, squares)
    scale = np.trace(matrix) / size
    if not tokens or not scale > 0 or not total > 0:
        return np.zeros(size)
    values, basis = _eigen(matrix)
    ridges = scale * STEPS[::-1, None]  # of equals, the largest
    along = basis.T @ vector
    if len(folds) > 1:
        scores = _left_out(matrix, vector, [_weighted(f, squares) for f in folds], ridges)
    else:
        scores = _generalised(values, along, total, tokens, ridges)
    if not np.isfinite(scores).any():
        return np.zeros(size)
    return -basis @ (along / (values + ridges[int(np.argmin(scores))]))


def _weighted(
    normals: Sequence[Normal], squares: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, float]:
    """The sums of all LayerNorms, relative to these second moments."""
    size = len(normals[0].vector)
    used = [(n, s) for n, s in zip(normals, squares, strict=True) if s > 0]
    matrix = sum((n.matrix / s for n, s in used), np.zeros((size, size)))
    vector = sum((n.vector / s for n, s in used), np.zeros(size))
    return matrix, vector, sum(n.means / s for n, s in used)


def _eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, basis = np.linalg.eigh(matrix)
    return np.maximum(values, 0), basis


def _left_out(
    matrix: np.ndarray,
    vector: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray, float]],
    ridges: np.ndarray,
) -> np.ndarray:
    """For every ridge, what is left in the folds, of fits to all others."""
    scores = np.zeros(len(ridges))
    for own, along, total in folds:
        values, basis = _eigen(matrix - own)
        v = -(basis @ ((basis.T @ (vector - along))[:, None] / (values[:, None] + ridges.T)))
        scores += total + 2 * along @ v + (v * (own @ v)).sum(0)
    return scores


def _generalised(
    values: np.ndarray, along: np.ndarray, total: float, tokens: int, ridges: np.ndarray
) -> np.ndarray:
    """Generalised cross validation, infinite for ridges that leave too few degrees of freedom."""
    freedom = (values / (values + ridges)).sum(1) / tokens
    left = total - (along**2 * (values + 2 * ridges) / (values + ridges) ** 2).sum(1)
    left = np.maximum(left, 1e-14 * total)  # what is below has no digits
    return np.where(freedom <= 0.5, left / (1 - np.minimum(freedom, 0.5)) ** 2, np.inf)
