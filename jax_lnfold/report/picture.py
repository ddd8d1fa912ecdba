"""Pictures of the zero-mean graph: SVG, which needs nothing else, and DOT for Graphviz.

Streams are vertical lines, laid out by `picture_rows`; what writes into them and what reads them
stands in rows from top to bottom, in program order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from ..printable import printable
from .events import APPROXIMATED, BLOCKED, EDITED, FOLDED, INSERTED, LEFT, NOTICED, WRITTEN, Event
from .picture_rows import Box, Layout, PictureRow, lay_out

LEGEND = {
    EDITED: ("#2e9e5b", "parameters that write into the stream, centered"),
    WRITTEN: ("#8a8f98", "parameters that write into the stream, as they were"),
    INSERTED: ("#2f6fdb", "explicit centering"),
    FOLDED: ("#2e9e5b", "LayerNorm folded: reads a stream without a mean"),
    APPROXIMATED: ("#8e4ec6", "LayerNorm folded approximately: its mean is left out, but not zero"),
    LEFT: ("#d9822b", "LayerNorm left as it is"),
    BLOCKED: ("#d1373f", "keeps the stream from being zero-mean"),
    NOTICED: ("#d1373f", "would notice a centering"),
}
"""The colour of each kind of event, and what it means."""

_ROW, _LANE, _CHAR, _MARGIN, _INDENT, _ARROW = 36, 22, 7.3, 14, 7, 24
_LONGEST = 56  # characters
_NORMS = (FOLDED, APPROXIMATED, LEFT)
_READS, _FULL = (*_NORMS, NOTICED), (EDITED, FOLDED, APPROXIMATED)


def to_svg(events: Sequence[Event], title: str) -> str:
    """The picture as an SVG element, readable on light and dark ground."""
    layout = lay_out(events)
    deepest = max((layout.depth(box) + 1 for box in layout.boxes), default=0)
    left = _MARGIN + deepest * _INDENT + _LANE / 2
    lanes = max((row.lane for row in layout.rows), default=0) + 1
    text_x = left + (lanes - 1) * _LANE + _ARROW + 8
    texts = [_texts(row) for row in layout.rows]
    kinds = [kind for kind in LEGEND if any(e.kind == kind for e in events)]
    widest = max((len(t) for pair in texts for t in pair), default=0)
    widest = max(widest + 5, *(len(LEGEND[k][1]) for k in kinds), len(title)) if kinds else 40
    width = text_x + widest * _CHAR + _MARGIN + deepest * _INDENT
    first = 2 * _MARGIN + 24
    legend_y = first + len(layout.rows) * _ROW
    height = legend_y + 20 * len(kinds)

    def x(lane: int) -> float:
        return left + lane * _LANE

    def y(row: float) -> float:
        return first + row * _ROW

    parts = [f'<text class="t" x="{_MARGIN}" y="{_MARGIN + 12}">{escape(title)}</text>']
    parts += [_box(layout, box, y(box.top), y(box.bottom), width) for box in layout.boxes]
    parts += [
        f'<line class="s" x1="{x(lane)}" y1="{y(a):.0f}" x2="{x(lane)}" y2="{y(b):.0f}"/>'
        for lane, a, b in sorted(layout.lines)
    ]
    for i, (row, (name, detail)) in enumerate(zip(layout.rows, texts, strict=True)):
        parts.append(_mark(row, x(row.lane), y(i), text_x - 6))
        parts.append(f'<text x="{text_x}" y="{y(i) - 3:.0f}">{escape(name)}</text>')
        parts.append(
            f'<text class="d" x="{text_x}" y="{y(i) + 10:.0f}">{escape(detail)}</text></g>'
        )
    for i, kind in enumerate(kinds):
        at = legend_y + 20 * i
        parts.append(f"<g>{_symbol(kind, left, at)}")
        parts.append(f'<text class="d" x="{left + 16}" y="{at + 4}">{LEGEND[kind][1]}</text></g>')
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="lnfold-picture" role="img" {size}>'
    return f"{head}<style>{_STYLE}</style>{''.join(parts)}</svg>"


def _texts(row: PictureRow) -> tuple[str, str]:
    """The two lines of a row."""
    event = row.events[0]
    name, detail = row.text("name"), row.text("detail")
    if event.kind in (EDITED, WRITTEN):
        name, detail = name or detail, detail if name else ""
        detail = f"{detail} centered".strip() if event.kind == EDITED else detail
    if event.kind in _NORMS:
        detail = f"{detail} {event.kind}"
    return _shortened(name), _shortened(detail)


def _shortened(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _LONGEST else f"\N{HORIZONTAL ELLIPSIS}{text[1 - _LONGEST :]}"


def _box(layout: Layout, box: Box, top: float, bottom: float, width: float) -> str:
    depth = layout.depth(box)
    x, pad = 4 + depth * _INDENT, _ROW / 2 - 1.5 * depth
    count = f"\N{MULTIPLICATION SIGN}{box.count}"
    label = f"loop {count}" if box.is_loop else count
    return (
        f'<rect class="b" x="{x}" y="{top - pad:.0f}" width="{width - 2 * x:.0f}" '
        f'height="{bottom - top + 2 * pad:.0f}" rx="8"/>'
        f'<text class="c" x="{width - x - 8:.0f}" y="{top - 2 + 13 * depth:.0f}">{label}</text>'
    )


def _mark(row: PictureRow, x: float, y: float, end: float) -> str:
    """A symbol on the line, and an arrow from or to the text; the group stays open."""
    event = row.events[0]
    color = LEGEND[event.kind][0]
    tip = f"M{end},{y} l-6,-4 v8 z" if event.kind in _READS else f"M{x + 8},{y} l6,-4 v8 z"
    said = ". ".join(t[:1].upper() + t[1:] for t in (LEGEND[event.kind][1], event.why) if t)
    return (
        f'<g><title>{escape(printable(said))}</title><path d="M{x},{y} H{end}" stroke="{color}"/>'
        f'<path d="{tip}" fill="{color}"/>{_symbol(event.kind, x, y)}'
    )


def _symbol(kind: str, x: float, y: float) -> str:
    """Full diamonds and squares for what was changed, empty ones for the rest.

    A cross for what keeps a mean, an exclamation mark for what would notice, a minus for a
    centering.
    """
    color, full = LEGEND[kind][0], kind in _FULL
    fill = f'fill="{color}" stroke="{color}"' if full else f'class="e" stroke="{color}"'
    if kind in (EDITED, WRITTEN):
        return f'<path d="M{x - 7},{y} l7,-7 l7,7 l-7,7 z" {fill} stroke-width="2"/>'
    if kind in _NORMS:
        return (
            f'<rect x="{x - 6}" y="{y - 6}" width="12" height="12" rx="2" {fill} stroke-width="2"/>'
        )
    outline = f'<circle cx="{x}" cy="{y}" r="8" fill="{color}"/>'
    stroke = f"M{x - 3},{y - 3} l6,6 m0,-6 l-6,6"
    if kind == INSERTED:
        stroke = f"M{x - 4},{y} h8"
    if kind == NOTICED:
        outline = f'<path d="M{x},{y - 9} l9,16 h-18 z" fill="{color}"/>'
        stroke = f"M{x},{y - 4} v6 m0,1.5 v2"
    return f'{outline}<path d="{stroke}" stroke="#fff" stroke-width="2"/>'


_STYLE = """
.lnfold-picture {--ink: #1f2328; --faint: #656d76; --ground: #fff; --box: #8881;
 font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--ground)}
@media (prefers-color-scheme: dark) {
 .lnfold-picture {--ink: #e6edf3; --faint: #9198a1; --ground: #0d1117}}
.lnfold-picture text {fill: var(--ink)}
.lnfold-picture .t {font-weight: bold; font-size: 13px}
.lnfold-picture .d {fill: var(--faint); font-size: 11px}
.lnfold-picture .c {text-anchor: end; font-weight: bold}
.lnfold-picture .b {fill: var(--box); stroke: #8886}
.lnfold-picture .s {stroke: var(--faint); stroke-width: 3}
.lnfold-picture .e {fill: var(--ground)}
"""


def to_dot(events: Sequence[Event], title: str) -> str:
    """The picture in the DOT language, for Graphviz to lay out."""
    return "\n".join((f"digraph {{ label={_quoted(title)};", *_dot(lay_out(events)), "}"))


def _dot(layout: Layout) -> Iterator[str]:
    yield ' node [fontname="monospace", fontsize=10, shape=box]; edge [arrowsize=0.6];'
    outermost_first = sorted(enumerate(layout.boxes), key=lambda b: b[1].top - b[1].bottom)
    for i, row in enumerate(layout.rows):
        for number, box in outermost_first:
            if box.top == i:
                count = f"loop x{box.count}" if box.is_loop else f"x{box.count}"
                yield f' subgraph cluster_{number} {{ label="{count}";'
        event = row.events[0]
        label = _quoted("\n".join(filter(None, _texts(row))))
        color, meaning = LEGEND[event.kind]
        style = "filled" if event.kind in _FULL else "solid"
        shape = "rounded," if event.kind in (EDITED, WRITTEN) else ""
        tooltip = _quoted(printable(event.why) or meaning)
        yield f' n{i} [label={label}, style="{shape}{style}", color="{color}", tooltip={tooltip}];'
        yield f' s{i} [shape=point, label=""]; {{ rank=same; s{i}; n{i}; }}'
        yield f" s{i} -> n{i};" if event.kind in _READS else f" n{i} -> s{i};"
        yield from [" }"] * sum(box.bottom == i for box in layout.boxes)
    for _, a, b in sorted(layout.lines):
        if float(a).is_integer() and float(b).is_integer():
            yield f" s{a} -> s{b} [penwidth=3, arrowhead=none, weight=9];"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
