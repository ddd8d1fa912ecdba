"""Leaves read from a checkpoint and written to its copy, however they are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from .leaf_store import LeafStore
from .view import View


class Rewriter:
    """Reads leaves as they were before all edits; writes each array once, when it is complete.

    In memory are arrays of which not all parts are written yet: a fused one, while its leaves come
    one after the other.
    """

    def __init__(self, source: LeafStore, target: LeafStore, written: Iterable[View]) -> None:
        """`written` are the views that will be written, each once."""
        self._source, self._target = source, target
        self._left = Counter(part.name for view in written for part in view.parts)
        self._shared = {name for name, n in self._left.items() if n > 1}
        self._begun: dict[str, np.ndarray] = {}
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, view: View) -> np.ndarray:
        """One leaf, as it is in the source."""
        return view.read(self._original)

    def write(self, view: View, new: np.ndarray) -> None:
        """Replace one leaf in the copy."""
        for part, piece in view.pieces(self._source.leaves, new):
            name = part.name
            whole = piece if not part.steps else part.put(self._before(name), piece)
            self._left[name] -= 1
            if self._left[name]:
                self._begun[name] = whole
            else:
                self._target.write(name, whole)

    def _before(self, name: str) -> np.ndarray:
        """The array with the parts that are written already; it may be changed."""
        if name in self._begun:
            return self._begun.pop(name)
        x = self._original(name)
        return np.array(x) if name in self._shared else np.require(x, requirements="W")

    def _original(self, name: str) -> np.ndarray:
        """An array of the source; one that holds several leaves is kept until the next such one."""
        if name not in self._shared:
            return self._source.read(name)
        if self._last is None or self._last[0] != name:
            self._last = None  # gives up its memory before the next one is read
            self._last = name, self._source.read(name)
        return self._last[1]
