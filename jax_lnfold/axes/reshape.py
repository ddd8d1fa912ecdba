"""What becomes of groups of positions when axes are merged and split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from .labels import ALL, FREE, MAX_LABELS, Entry, canonical, labels_of, paired


def runs_of_axes(
    old: list[int], new: list[int], old_shape: Sequence[Any], new_shape: Sequence[Any]
) -> Iterable[tuple[list[int], list[int]]]:
    """Pairs of runs of axes with equal products, as short as possible."""
    tail: list[tuple[list[int], list[int]]] = []
    while old and new and old_shape[old[-1]] == new_shape[new[-1]]:
        tail.append(([old[-1]], [new[-1]]))
        old, new = old[:-1], new[:-1]
    yield from tail
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = old[i : i + 1], new[j : j + 1]
        p, q = prod(old_shape[d] for d in olds), prod(new_shape[d] for d in news)
        while p != q:
            if not (isinstance(p, int) and isinstance(q, int)):
                olds, news = old[i:], new[j:]  # symbolic sizes: one block of all that remains
                break
            if len(olds) == len(old) - i and len(news) == len(new) - j:
                raise ValueError(f"shapes {old_shape} and {new_shape} have different sizes")
            if p < q:
                olds = old[i : i + len(olds) + 1]
                p = prod(old_shape[d] for d in olds)
            else:
                news = new[j : j + len(news) + 1]
                q = prod(new_shape[d] for d in news)
        i, j = i + len(olds), j + len(news)
        yield olds, news


def regrouped(old: list[tuple[Entry, Any]], new: list[Any]) -> list[Entry] | None:
    """The entries of a run of axes for one of the sizes `new`; None if there are none."""
    if len(old) == len(new) == 1:
        return [old[0][0]]
    if all(e == FREE for e, _ in old) or all(e == ALL for e, _ in old):
        return [old[0][0]] * len(new)
    total = prod(n for _, n in old)
    if not isinstance(total, int) or total > MAX_LABELS:
        return None
    merged = _merge([labels_of(e, n) for e, n in old])
    return _split(merged, new)


def _merge(parts: list[np.ndarray]) -> np.ndarray:
    merged = parts[0]
    for labels in parts[1:]:
        merged = paired(merged[:, None], labels[None, :]).reshape(-1)
    return merged


def _split(merged: np.ndarray, sizes: list[int]) -> list[Entry] | None:
    """Entries per axis whose product is the partition `merged`, or None if there are none."""
    if len(sizes) == 1:
        return [canonical(merged)]
    block = merged.reshape(sizes)
    parts = []
    for d, n in enumerate(sizes):
        rows = np.moveaxis(block, d, 0).reshape(n, -1)
        _, labels = np.unique(rows, axis=0, return_inverse=True)
        parts.append(np.where((rows >= 0).any(axis=1), labels.reshape(-1), -1))
    if canonical(_merge(parts)) != canonical(merged):
        return None
    return [canonical(p) for p in parts]
