"""A figure per task: training loss, held-out metric, and how close the folded runs stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measures import FOLDED, ORDER, REFERENCE, runs

# The palette of Okabe and Ito; the two that coincide are told apart by their strokes.
STYLES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": "#56B4E9", "linewidth": 4.5, "alpha": 0.8},
    FOLDED: {"color": "black", "linewidth": 1.2, "linestyle": (0, (4, 2))},
    "rmsnorm": {"color": "#D55E00", "linewidth": 1.4},
    "none": {"color": "#009E73", "linewidth": 1.4, "linestyle": "-."},
}
FLOORS = {"float32": 1e-7, "float64": 1e-16}  # differences that the digits kept cannot show


def draw(content: dict[str, Any], task: str, path: Path) -> Path:
    """Draws a task into a file whose suffix says the format."""
    about = content["tasks"][task]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    loss, metric, close = figure.subplots(1, 3)
    for variant in ORDER:
        found = list(runs(content, task, variant).values())
        if not found:
            continue
        every = about["settings"]["log_every"]
        curves = np.array([run["train_loss"] for run in found], float)
        _band(loss, every * np.arange(1, curves.shape[1] + 1), curves, variant)
        curves = np.array([run["eval"]["metric"] for run in found], float)
        _band(metric, np.array(found[0]["eval"]["steps"]), curves, variant)
    _zoom(metric, about["settings"]["steps"])
    unit = f" ({about['unit']})" if about["unit"] else ""
    for axes, title in ((loss, "training loss"), (metric, f"held-out {about['metric']}{unit}")):
        axes.set_title(title, fontsize=10)
    loss.set_yscale("log")
    _closeness(content, task, close)
    for axes in (loss, metric, close):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = loss.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, handlelength=3
    )
    figure.suptitle(about["title"], x=0.01, ha="left", fontsize=11, fontweight="bold")
    with mpl.rc_context({"svg.hashsalt": task}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)
    return path


def _band(axes: Axes, steps: np.ndarray, curves: np.ndarray, variant: str) -> None:
    """The mean of the seeds and a standard deviation around it."""
    style, mean = STYLES[variant], curves.mean(axis=0)
    axes.plot(steps, mean, label=variant, **style)
    if len(curves) > 1 and variant != REFERENCE:
        std = curves.std(axis=0, ddof=1)
        low = np.maximum(mean - std, curves.min(axis=0))  # a logarithm needs what is positive
        axes.fill_between(steps, low, mean + std, color=style["color"], alpha=0.15, linewidth=0)


def _zoom(axes: Axes, steps: int) -> None:
    """Shows what follows the first third of the steps."""
    late = [
        y
        for line in axes.lines
        for x, y in np.transpose(line.get_data())
        if x >= steps / 3 and np.isfinite(y)
    ]
    if late and (margin := 0.1 * (max(late) - min(late))):
        axes.set_ylim(min(late) - margin, max(late) + margin)


def _closeness(content: dict[str, Any], task: str, axes: Axes) -> None:
    """Differences of the training losses of each seed, as a share of the loss."""
    every = content["tasks"][task]["settings"]["log_every"]
    lines = (
        ("float32", "#0072B2", "float32, each seed"),
        ("float64", "#CC79A7", "float64, seed 0"),
    )
    for dtype, color, label in lines:
        first, second = (runs(content, task, v, dtype) for v in (REFERENCE, FOLDED))
        for i, seed in enumerate(sorted(first.keys() & second.keys())):
            a, b = (np.array(r[seed]["train_loss"], float) for r in (first, second))
            relative = np.maximum(np.abs(b - a) / np.abs(a), FLOORS[dtype])
            steps = every * np.arange(1, len(a) + 1)
            axes.plot(steps, relative, color=color, linewidth=1, label=None if i else label)
    reference = runs(content, task, REFERENCE)
    if len(reference) > 1:
        curves = np.array([run["train_loss"] for run in reference.values()], float)
        share = curves.std(axis=0, ddof=1) / curves.mean(axis=0)
        steps = every * np.arange(1, curves.shape[1] + 1)
        axes.plot(steps, share, color="0.45", linestyle=":", label=f"{REFERENCE}, seed to seed")
    axes.set_yscale("log")
    axes.set_ylim(min(FLOORS.values()) / 3, 1e6)  # the legend is above the lines
    axes.set_title(f"|{FOLDED} - {REFERENCE}| / loss", fontsize=10)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False, loc="upper left")
