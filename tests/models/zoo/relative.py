"""Index arithmetic of relative position biases."""

from __future__ import annotations

import numpy as np


def offsets(height: int, width: int) -> np.ndarray:
    """Return the row and column offset between all pairs of grid cells, (cells, cells, 2)."""
    cells = np.indices((height, width)).reshape(2, -1).T
    return cells[:, None] - cells[None, :]


def relative_index(height: int, width: int) -> np.ndarray:
    """Number the offsets between pairs of grid cells from 0, (cells, cells)."""
    rows, columns = np.moveaxis(offsets(height, width) + np.array([height - 1, width - 1]), -1, 0)
    return rows * (2 * width - 1) + columns
