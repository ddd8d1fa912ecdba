"""Tables of results: ratios to the original, next to the bound, and the share of cost removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from .cases import KEYS
from .programs import BOUND, FOLDS, ORIGINAL
from .timing import spread

Row = Mapping[str, Any]
Found = Mapping[str, Row]
"""Rows of a case by variant."""


def table(rows: Iterable[Row], quantity: str = "cycles") -> Table:
    """One row per case that has the original and the bound; then all cases together."""
    found = complete(rows)
    shown = Table("model", "batch", "length", "norm", *FOLDS, BOUND)
    for (model, batch, length, spelling, dtype), by_variant in found.items():
        about = model, str(batch), str(length or ""), f"{spelling} {dtype}"
        shown.add_row(*about, *cells(by_variant, quantity))
    for spelling in dict.fromkeys(case[KEYS.index("spelling")] for case in found):
        some = [v for case, v in found.items() if case[KEYS.index("spelling")] == spelling]
        values = [together(some, variant, quantity) for variant in (*FOLDS, BOUND)]
        shown.add_row(f"all {len(some)}", "", "", spelling, *values, style="bold")
    return shown


def cases(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by case and variant."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in KEYS[:-1]), {})[row["variant"]] = row
    return found


def complete(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Cases whose ratios can be said."""
    return {case: v for case, v in cases(rows).items() if {ORIGINAL, BOUND} <= v.keys()}


def cells(found: Found, quantity: str) -> list[str]:
    """What is said of each fold, and of the bound."""
    base = found[ORIGINAL]
    bound = ratios(found[BOUND], base, quantity)
    said_of = []
    for variant in FOLDS:
        if variant not in found:
            said_of.append("")
            continue
        folded = ratios(found[variant], base, quantity)
        removed = share_removed(float(np.median(folded)), float(np.median(bound)))
        said_of.append(f"{said(folded)} {removed}")
    return [*said_of, said(bound)]


def ratios(row: Row, base: Row, quantity: str = "cycles") -> np.ndarray:
    """Ratio of times in each round, or of estimates (a single number)."""
    if "seconds" in row:
        return np.array(row["seconds"]) / np.array(base["seconds"])
    return np.array([row[quantity] / base[quantity]])


def said(found: np.ndarray) -> str:
    """Median, with quartiles where there are several."""
    middle, low, high = spread(found)
    return f"{middle:.3f}" + (f" ({low:.3f}-{high:.3f})" if len(found) > 1 else "")


def share_removed(folded: float, bound: float) -> str:
    """How much of the difference to the bound is gone; nothing where norms cost nothing."""
    return f"{share(folded, bound):.0%}" if bound < 1 else "-"


def share(folded: float, bound: float) -> float:
    """Negative where a fold costs, above one where it beats the model without norms."""
    return (1 - folded) / (1 - bound)


def overall(
    found: Sequence[Found], variant: str, quantity: str = "cycles"
) -> tuple[float, float, int]:
    """Geometric means over cases of the ratios of a variant and of the bound, and how many cases.

    The share of several cases is that of these two means. Shares themselves have no geometric
    mean, as they may be negative, and no useful mean either: where norms cost next to nothing, a
    share is any number. Ratios are positive, and a case counts by what its norms cost.
    """
    some = [v for v in found if variant in v]
    medians = [
        [np.median(ratios(v[name], v[ORIGINAL], quantity)) for name in (variant, BOUND)]
        for v in some
    ]
    folded, bound = np.exp(np.log(medians).mean(axis=0)) if some else (np.nan, np.nan)
    return float(folded), float(bound), len(some)


def interval(found: Sequence[Found], variant: str, draws: int = 400) -> tuple[float, float]:
    """Quartiles of the overall share of measured cases, by drawing rounds with replacement."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = []
        for rows in found:
            if variant in rows:
                rounds = len(rows[ORIGINAL]["seconds"])
                index = rng.integers(rounds, size=rounds)
                drawn.append(
                    {k: {"seconds": np.array(r["seconds"])[index]} for k, r in rows.items()}
                )
        shares.append(share(*overall(drawn, variant)[:2]))
    low, high = np.quantile(shares, (0.25, 0.75))
    return float(low), float(high)


def together(found: Sequence[Found], variant: str, quantity: str) -> str:
    """The geometric mean of ratios, and the share of the cost that it means."""
    ratio, bound, number = overall(found, variant, quantity)
    if not number:
        return ""
    if variant == BOUND:
        return f"{ratio:.3f}"
    removed = share_removed(ratio, bound)
    if bound < 1 and "seconds" in found[0][ORIGINAL]:
        removed += " ({:.0%} to {:.0%})".format(*interval(found, variant))
    return f"{ratio:.3f} {removed}"
