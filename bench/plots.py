"""Figures: how far each fold goes from the model with its LayerNorms to the one without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from .programs import BOUND, FOLDS, ORIGINAL
from .tables import complete, ratios

# The palette of Okabe and Ito; every mark has a shape of its own besides.
COLORS = ("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v")
MARKS = {v: {"color": color, "marker": mark} for v, (color, mark) in zip(FOLDS, COLORS)}  # noqa: B905
TITLES = {"one_pass": "one-pass variance", "two_pass": "two-pass variance"}


def draw(rows: Iterable[Mapping[str, Any]], path: Path) -> Path | None:
    """A line per model and size from 1 (original) to the bound, a panel per spelling."""
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for (model, batch, length, spelling, dtype), found in complete(rows).items():
        panels.setdefault(spelling, {})[f"{model}, {batch} x {length}, {short(dtype)}"] = found
    if not panels:
        return None
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))[::-1]
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(names)), layout="constrained")
    for axes, (spelling, panel) in zip(
        figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0],
        panels.items(),
        strict=True,
    ):
        for name, found in panel.items():
            y, base = names.index(name), found[ORIGINAL]
            bound = float(np.median(ratios(found[BOUND], base)))
            axes.plot([1, bound], [y, y], color="0.75", linewidth=5, solid_capstyle="butt")
            axes.plot(bound, y, "|", color="black", markersize=10, markeredgewidth=2)
            for variant, style in MARKS.items():
                if variant in found:
                    ratio = float(np.median(ratios(found[variant], base)))
                    axes.plot(ratio, y, linestyle="", markersize=5, **style)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(TITLES.get(spelling, spelling), fontsize=10)
        axes.set_xlabel("ratio to the original")
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    marks = [
        *(mpl.lines.Line2D([], [], linestyle="", label=v, **s) for v, s in MARKS.items()),
        mpl.lines.Line2D(
            [], [], color="black", marker="|", linestyle="", markeredgewidth=2, label=BOUND
        ),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    with mpl.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def short(dtype: str) -> str:
    """As in the names of arrays."""
    return {"float32": "f32", "bfloat16": "bf16"}.get(dtype, dtype)
