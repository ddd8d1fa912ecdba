"""Tables of results: ratios to the original, next to the bound, and the share of cost removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from .cases import KEYS, POST_LN
from .programs import BOUND, FOLDS, FORWARD, ORIGINAL
from .timing import spread

MAIN = ("cycles", "microseconds")
"""What compilers say of time: that of TPUs of whole programs, that of GPUs of its own kernels."""
Row = Mapping[str, Any]
Found = Mapping[str, Row]
"""Rows of a case by variant."""
Cases = Mapping[tuple[Any, ...], Found]
"""By (model, batch, length, spelling, dtype)."""


def table(rows: Iterable[Row], quantity: str | None = None, markdown: bool = False) -> Table:
    """One row per case that has the original and the bound; then all that lack no variant.

    Models in which no mean folds are not among those.
    """
    found = complete(rows)
    look = {"box": box.MARKDOWN} if markdown else {}
    shown = Table("model", "batch", "length", "norm", *FOLDS, BOUND, **look)
    for (model, batch, length, spelling, dtype), by_variant in found.items():
        about = model, str(batch), str(length), f"{spelling} {dtype}"
        shown.add_row(*about, *cells(by_variant, quantity))
    pre_ln = {case: v for case, v in found.items() if case[0] not in POST_LN}
    known = {variant for by_variant in pre_ln.values() for variant in by_variant} & {*FORWARD}
    whole = {case: v for case, v in pre_ln.items() if known <= v.keys()}
    for kind in dict.fromkeys(case[-2:] for case in whole):
        some = {case: v for case, v in whole.items() if case[-2:] == kind}
        values = [together(some, variant, quantity) for variant in (*FOLDS, BOUND)]
        models = len({case[0] for case in some})
        shown.add_row(f"all {models} models", "", "", " ".join(kind), *values, style="bold")
    return shown


def cases(rows: Iterable[Row], keys: Sequence[str] = KEYS) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by case (their `keys` but for the last one) and variant."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys[:-1]), {})[row["variant"]] = row
    return found


def complete(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Cases whose ratios can be said."""
    return {case: v for case, v in cases(rows).items() if {ORIGINAL, BOUND} <= v.keys()}


def cells(found: Found, quantity: str | None) -> list[str]:
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


def ratios(row: Row, base: Row, quantity: str | None = None) -> np.ndarray:
    """Ratio of times in each round, or of estimates (a single number)."""
    if "seconds" in row:
        return np.array(row["seconds"]) / np.array(base["seconds"])
    quantity = quantity or next(name for name in MAIN if name in row)
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


def overall(found: Cases, variant: str, quantity: str | None = None) -> tuple[float, float]:
    """Geometric means over models of the ratios of a variant and of the bound; NaN without any.

    The share of several models is that of these two means. Shares themselves have no geometric
    mean, as they may be negative, and no useful mean either: where norms cost next to nothing, a
    share is any number. Ratios are positive, and a model counts by what its norms cost. Several
    sizes of a model count as one: their geometric mean.
    """
    logs: dict[str, list[list[float]]] = {}
    for case, rows in found.items():
        if variant in rows:
            both = [ratios(rows[v], rows[ORIGINAL], quantity) for v in (variant, BOUND)]
            logs.setdefault(case[0], []).append([float(np.log(np.median(r))) for r in both])
    if not logs:
        return np.nan, np.nan
    folded, bound = np.exp(np.mean([np.mean(sizes, axis=0) for sizes in logs.values()], axis=0))
    return float(folded), float(bound)


def interval(found: Cases, variant: str, draws: int = 400) -> tuple[float, float]:
    """Quartiles of the overall share of measured cases, by drawing rounds with replacement."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(draws):
        drawn: dict[tuple[Any, ...], dict[str, Row]] = {}
        for case, rows in found.items():
            index = rng.integers(
                len(rows[ORIGINAL]["seconds"]), size=len(rows[ORIGINAL]["seconds"])
            )
            drawn[case] = {
                v: {"seconds": np.array(row["seconds"])[index]} for v, row in rows.items()
            }
        shares.append(share(*overall(drawn, variant)))
    low, high = np.quantile(shares, (0.25, 0.75))
    return float(low), float(high)


def together(found: Cases, variant: str, quantity: str | None) -> str:
    """The geometric mean of ratios, and the share of the cost that it means."""
    ratio, bound = overall(found, variant, quantity)
    if np.isnan(ratio):
        return ""
    if variant == BOUND:
        return f"{ratio:.3f}"
    removed = share_removed(ratio, bound)
    if bound < 1 and all("seconds" in rows[ORIGINAL] for rows in found.values()):
        removed += " ({:.0%} to {:.0%})".format(*interval(found, variant))
    return f"{ratio:.3f} {removed}"
