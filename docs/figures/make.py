"""Draws the figures of the theory from numbers: ``python docs/figures/make.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
STYLE = """<style>
.figure {--ink: #1f2328; --faint: #656d76; --ground: #fff; --line: #8886;
 font: 13px system-ui, "DejaVu Sans", sans-serif; background: var(--ground)}
@media (prefers-color-scheme: dark) {
 .figure {--ink: #e6edf3; --faint: #9198a1; --ground: #0d1117}}
.figure text {fill: var(--ink)}
.figure .d {fill: var(--faint); font-size: 12px}
.figure .m {text-anchor: middle}
.figure .l {stroke: var(--faint); fill: none}
.figure .b {fill: var(--ground); stroke: var(--faint)}
.figure .g {fill: #2e9e5b}
.figure .o {fill: #d9822b}
.figure .n {fill: #6b7f99}
</style>"""


def figure(name: str, title: str, width: int, height: int, *parts: str) -> None:
    """Write a figure, which is readable on light and dark ground."""
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" role="img" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{title}</title>{STYLE}{''.join(parts)}</svg>\n"
    )
    (HERE / f"{name}.svg").write_text(text, encoding="utf-8")


def words(x: float, y: float, text: str, kind: str = "") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'


def line(x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> str:
    """A line from here to there."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path class="l" d="M{x1:g},{y1:g} L{x2:g},{y2:g}"{dash}/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head, to the right or down."""
    head = "l-6,-4 v8 z" if abs(x2 - x1) >= abs(y2 - y1) else "l-4,-6 h8 z"
    return line(x1, y1, x2, y2) + f'<path fill="var(--faint)" d="M{x2:g},{y2:g} {head}"/>'


def box(x: float, y: float, width: float, text: str, kind: str = "b") -> str:
    """A box around a word."""
    rect = f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="26" rx="4"/>'
    return rect + words(x + width / 2, y + 17.5, text, "m")


def bars(x: float, y: float, values: Sequence[float], kind: str, title: str) -> str:
    """A bar for each feature around a line at `y`, and their mean as a dashed line."""
    step, unit = 15, 16
    parts = [words(x, y - 62, title, "d"), line(x - 4, y, x + step * len(values), y)]
    for i, value in enumerate(values):
        top = y - max(value, 0) * unit
        parts.append(
            f'<rect class="{kind}" x="{x + i * step:g}" y="{top:.1f}" width="11" '
            f'height="{abs(value) * unit:.1f}"/>'
        )
    mean = y - float(np.mean(values)) * unit
    parts.append(line(x - 4, mean, x + step * len(values), mean, dashed=True))
    parts.append(words(x + step * len(values) + 4, mean + 4, "mean", "d"))
    return "".join(parts)


def centering() -> None:
    """What a linear layer writes, before and after its columns are centered."""
    rng = np.random.default_rng(3)
    kernel, bias = rng.normal(0.6, 1, (3, 8)), rng.normal(0.3, 0.5, 8)
    inputs = np.array([[0.9, 0.5, 0.2], [-0.6, -0.2, -0.9]])
    before = inputs @ kernel + bias
    after = inputs @ (kernel - kernel.mean(1, keepdims=True)) + bias - bias.mean()
    assert abs(after.mean(1)).max() < 1e-12
    parts = []
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        y = 90 + 150 * i
        parts.append(bars(20, y, one, "o", f"x W + b, features of token {i + 1}"))
        parts.append(arrow(190, y - 20, 232, y - 20))
        parts.append(bars(250, y, other, "g", f"x (C W) + C b, token {i + 1}"))
    figure("centering", "Features before and after centering", 430, 320, *parts)


def response() -> None:
    """What a shift of the input does to a LayerNorm, and to a GELU."""
    x = np.random.default_rng(5).normal(0, 1, 7)
    parts = []
    for i, u in enumerate((0.0, 1.2)):
        y, shifted = 90 + 150 * i, x + u
        name = "x" if u == 0 else "x + u"
        norm = (shifted - shifted.mean()) / shifted.std()
        tanh = np.tanh(np.sqrt(2 / np.pi) * (shifted + 0.044715 * shifted**3))
        parts += [
            bars(20, y, shifted, "n", name),
            arrow(168, y - 20, 202, y - 20),
            bars(220, y, norm, "g", f"LayerNorm({name})"),
            bars(400, y, shifted * (1 + tanh) / 2, "o", f"gelu({name})"),
        ]
    parts.append(words(220, 315, "the same: tolerates u", "d"))
    parts.append(words(400, 315, "another: notices u", "d"))
    figure("response", "The response to a shift", 560, 330, *parts)


def cut() -> None:
    """Where GPT-2 is centered: its table may not be edited, so the rows looked up are."""
    parts = [
        box(20, 50, 110, "token table"),
        words(20, 94, "read by the logits, too:", "d"),
        words(20, 110, "an edit would be noticed", "d"),
        arrow(130, 63, 180, 63),
        box(180, 50, 110, "rows looked up"),
        words(180, 94, "explicit centering,", "d"),
        words(180, 110, "cost 2 per element", "d"),
        arrow(290, 63, 370, 63),
        box(370, 50, 90, "stream"),
        box(230, 130, 110, "positions", "g"),
        box(230, 165, 110, "kernels, biases", "g"),
        words(230, 210, "edited, for nothing", "d"),
        line(340, 143, 415, 143),
        line(340, 178, 415, 178),
        line(415, 178, 415, 82),
        '<path fill="var(--faint)" d="M415,76 l-4,6 h8 z"/>',
        arrow(460, 63, 510, 63),
        box(510, 50, 130, "2L + 1 LayerNorms"),
        words(510, 94, "their own means,", "d"),
        words(510, 110, "cost 1 per element each", "d"),
        line(330, 20, 330, 120, dashed=True),
        words(338, 30, "the cut: 2 is less than 2L + 1", "d"),
    ]
    figure("cut", "A minimum cut", 660, 225, *parts)


ROOMS = (
    ("program", "a function becomes a graph of values", "rules, one for each primitive"),
    ("analysis", "what is zero-mean, who notices a shift, what is a LayerNorm", ""),
    ("placement", "the cheapest cut, proved again", ""),
    ("plan", "the edits by key path, as plain data", "checkpoints: the same on disk"),
    ("rewrite", "the program without the means that vanish", ""),
    ("report", "text, tables, pictures", ""),
)


def rooms() -> None:
    """The walk of a fold through the rooms of the code."""
    parts = [box(20, 14, 170, "apply_fn, params, inputs")]
    for i, (name, does, beside) in enumerate(ROOMS):
        y = 66 + 52 * i
        parts += [arrow(105, y - 26, 105, y), box(45, y, 120, name), words(185, y + 17, does)]
        if beside:
            parts.append(words(185, y + 33, beside, "d"))
    figure("rooms", "The rooms of the code", 600, 66 + 52 * len(ROOMS), *parts)


def main() -> None:
    """Draw all of them."""
    for draw in (centering, response, cut, rooms):
        draw()


if __name__ == "__main__":
    main()
