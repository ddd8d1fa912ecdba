"""Tables of results: ratios to the original, next to the bound, and the share of cost removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from .programs import BOUND, FOLDED, ORIGINAL
from .timing import spread

Row = Mapping[str, Any]


def table(rows: Iterable[Row]) -> Table:
    """One row per case that has all variants."""
    shown = Table("model", "norm", "folded / original", "bound / original", "norm's cost removed")
    for case, found in cases(rows).items():
        model, batch, spelling, dtype = case
        if {ORIGINAL, FOLDED, BOUND} <= found.keys():
            folded, bound = (ratios(found[v], found[ORIGINAL]) for v in (FOLDED, BOUND))
            removed = share_removed(float(np.median(folded)), float(np.median(bound)))
            name = f"{model}, batch {batch}"
            shown.add_row(name, f"{spelling} {dtype}", said(folded), said(bound), removed)
    return shown


def cases(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by case and variant."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        case = row["model"], row["batch"], row["spelling"], row["dtype"]
        found.setdefault(case, {})[row["variant"]] = row
    return found


def ratios(row: Row, base: Row) -> np.ndarray:
    """Ratio of times in each round, or of estimated cycles (a single number)."""
    if "seconds" in row:
        return np.array(row["seconds"]) / np.array(base["seconds"])
    return np.array([row["cycles"] / base["cycles"]])


def said(found: np.ndarray) -> str:
    """Median, with quartiles where there are several."""
    middle, low, high = spread(found)
    return f"{middle:.3f}" + (f" ({low:.3f}-{high:.3f})" if len(found) > 1 else "")


def share_removed(folded: float, bound: float) -> str:
    """How much of the difference to the bound is gone; nothing where norms cost nothing."""
    return f"{(1 - folded) / (1 - bound):.0%}" if bound < 1 else "-"
