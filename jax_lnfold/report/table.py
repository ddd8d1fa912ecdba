"""Tables of LayerNorms, in a terminal and as HTML: repeated blocks share one row."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..printable import printable
from .norms import outcome_of

NARROWEST, WIDEST = 60, 200
COLORS = {"folded": "green", "approximate": "magenta", "left": "yellow"}
_NUMBER = re.compile(r"\d+")
_PLACE = re.compile(r"` \(([^()]*)\)")
"""Where an operation is, behind its name."""
MOST_PLACES = 4
Words = tuple[str, str]
"""A reason, and what could be changed, maybe empty."""
TITLES = ("LayerNorm", "input", "axes", "variance", "outcome")
SHARE = "share of mean"
"""The title of a column that is there if it was measured."""
DAMAGE = "error without its mean"
"""The title of another one: of the outputs, relative, of LayerNorms that keep a mean."""


@dataclass(frozen=True, slots=True)
class Row:
    """One LayerNorm, or several that differ in the numbers of their module paths only.

    `count` is how many there are, `runs` how often each runs in one call, `place` is the source
    line of what blocks it, and `words` are the reason and what could be changed, maybe empty.
    `shares` are the shares of the mean that were measured before and after, as far as they were,
    `damages` what leaving out a mean was measured to do. `dropped` if it is left out. `also` is
    what else became of it.
    """

    path: str
    shape: str
    axes: str
    variance: str
    folded: bool
    words: Words
    place: tuple[str, int] | None = None
    runs: int = 1
    count: int = 1
    approximate: bool = False
    shares: tuple[tuple[float, ...], ...] = ()
    dropped: bool = False
    damages: tuple[float, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``folded``, ``approximate`` or ``left``, for colours."""
        return "approximate" if self.approximate else "folded" if self.folded else "left"

    @property
    def damage(self) -> str:
        """The smallest and the largest damage, or the only one."""
        return _span(self.damages) if self.damages else ""

    @property
    def share(self) -> str:
        """The smallest and the largest share of the mean, or the only one, before and after."""
        return " -> ".join(_span(side) for side in self.shares)

    @property
    def outcome(self) -> str:
        """``folded`` or ``left``, with what else there is to say of it."""
        return self.with_number(None)

    def with_number(self, number: int | None) -> str:
        """The outcome, with the number of the reason why a LayerNorm is left."""
        outcome = outcome_of(self.folded, self.approximate, self.dropped)
        outcome += "" if number is None else f" ({number})"
        return ", ".join((outcome, *self.also))

    @property
    def name(self) -> str:
        """The path, with how many there are and how often each runs."""
        count = f" x{self.count}" if self.count > 1 else ""
        return self.path + count + (f" (runs {self.runs} times)" if self.runs > 1 else "")


def grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows that are alike up to the numbers in paths as one, in the order of the first of each."""
    alike: dict[Row, list[Row]] = {}
    for row in rows:
        words = (template(row.words[0]), template(row.words[1]))
        key = replace(row, path=template(row.path), words=words, shares=(), damages=())
        alike.setdefault(key, []).append(row)
    return [_together(group) for group in alike.values()]


def _together(group: Sequence[Row]) -> Row:
    reason, advice = (merged(texts) for texts in zip(*(row.words for row in group), strict=True))
    path = merged([row.path for row in group])
    shares = tuple(sum(sides, ()) for sides in zip(*(row.shares for row in group), strict=True))
    return replace(
        group[0],
        path=path,
        words=(reason, advice),
        count=len(group),
        shares=shares,
        damages=sum((row.damages for row in group), ()),
    )


def _span(numbers: tuple[float, ...]) -> str:
    """The smallest and the largest number, NaN if one of them is."""
    if not numbers:
        return "not measured"
    low, high = (f"{find(numbers):.1g}" for find in (np.min, np.max))
    return low if low == high else f"{low} to {high}"


def template(text: str) -> str:
    """The text without its numbers: those with the same one can be `merged`."""
    return _NUMBER.sub("#", text)


def merged(texts: Sequence[str]) -> str:
    """Texts that differ in numbers only as one: ``block_{0-11}/norm``."""
    words = _NUMBER.split(texts[0])
    columns = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    numbers = (_range(list(dict.fromkeys(column))) for column in columns)
    return words[0] + "".join(n + w for n, w in zip(numbers, words[1:], strict=True))


def _range(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    values = sorted(map(int, numbers))
    gapless = values == list(range(values[0], values[-1] + 1))
    return f"{{{values[0]}-{values[-1]}}}" if gapless else f"{{{','.join(map(str, values))}}}"


def measured(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The columns of what was measured, by title, with a cell for each row."""
    found = dict[str, list[str]]()
    if any(row.shares for row in rows):
        found[SHARE] = [row.share for row in rows]
    if any(row.damages for row in rows):
        found[DAMAGE] = [row.damage for row in rows]
    return found


def notes(rows: Iterable[Row]) -> tuple[dict[Words, int], list[Words]]:
    """Which reason for what is left each row has, by number, and the reasons from number 1 on.

    Those that differ in one place of the program only are one reason, with all of these places.
    """
    alike: dict[Words, list[Words]] = {}
    for words in dict.fromkeys(row.words for row in rows if not row.folded):
        reason, advice = words
        key = _PLACE.sub("", reason) if len(_PLACE.findall(reason)) == 1 else reason
        alike.setdefault((key, advice), []).append(words)
    numbers = {words: i for i, group in enumerate(alike.values(), 1) for words in group}
    return numbers, [_at_all_places(group) for group in alike.values()]


def _at_all_places(group: Sequence[Words]) -> Words:
    (reason, advice), *others = group
    if not others:
        return reason, advice
    places = [found[1] for words in group if (found := _PLACE.search(words[0]))]
    shown = "; ".join(places[:MOST_PLACES])
    if (more := len(places) - MOST_PLACES) > 0:
        shown += f"; and {more} more"
    return _PLACE.sub(lambda _: f"` ({shown})", reason), advice


def to_rich(rows: Sequence[Row], lines: Iterable[str]) -> Group:
    """The table, the reasons and some lines below it, for a rich console."""
    numbers, reasons = notes(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    more = measured(rows)
    for title in (*TITLES, *more):
        table.add_column(title, overflow="fold")
    for row, *others in zip(rows, *more.values(), strict=True):
        words = row.with_number(numbers.get(row.words))
        cells = map(_text, (row.name, row.shape, row.axes, row.variance))
        table.add_row(*cells, Text(words, COLORS[row.kind]), *map(_text, others))
    listed = Table.grid(padding=(0, 1))
    for number, (reason, advice) in enumerate(reasons, 1):
        text = _text(_sentence(reason)) + _text(f" {_sentence(advice)}" if advice else "", "cyan")
        listed.add_row(Text(f"({number})", "yellow"), text)
    return Group(*[table] * bool(rows), *[listed] * bool(reasons), *map(_text, lines))


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)


def to_text(rows: Sequence[Row], lines: Iterable[str], width: int) -> str:
    """The same as plain text; no line is longer than `width` columns (60 to 200)."""
    file = io.StringIO()
    width = min(max(width, NARROWEST), WIDEST)
    console = Console(file=file, width=width, color_system=None, legacy_windows=False)
    console.print(to_rich(rows, lines))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def to_html(rows: Sequence[Row], lines: Iterable[str]) -> str:
    """The same as HTML that needs nothing else, in the colours of the page around it.

    The outcome stands next to the name: a narrow screen shows these two.
    """
    numbers, found = notes(rows)
    more = measured(rows)
    titles = (TITLES[0], TITLES[-1], *more, *TITLES[1:-1])
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = ""
    for row, *others in zip(rows, *more.values(), strict=True):
        name, *cells = map(_html, (row.name, *others, row.shape, row.axes, row.variance))
        outcome = row.with_number(numbers.get(row.words))
        plain = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f'<tr><td>{name}</td><td class="{row.kind}">{outcome}</td>{plain}</tr>'
    table = f"<table><tr>{head}</tr>{body}</table>" if body else ""
    items = (f"<li>{_html(_sentence(r))} <em>{_html(_sentence(a))}</em></li>" for r, a in found)
    reasons = f"<ol>{''.join(items)}</ol>" if found else ""
    below = "".join(f"<p>{_html(line)}</p>" for line in lines)
    return f'<div class="lnfold"><style>{STYLE}</style>{table}{reasons}{below}</div>'


def _html(words: str) -> str:
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(printable(words)))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "." if words else ""


# The class is named three times to outrank what notebooks say of tables.
STYLE = """
.lnfold table {border-collapse: collapse; font-size: 0.9em}
.lnfold.lnfold.lnfold :is(th, td) {text-align: left; vertical-align: top;
 padding: 0.2em 1em 0.2em 0; border-bottom: 1px solid color-mix(in srgb, currentColor 25%,
 transparent); white-space: nowrap; color: inherit; background: none}
.lnfold.lnfold.lnfold td:first-child {white-space: normal; min-width: 9em}
.lnfold td:first-child, .lnfold li, .lnfold p {overflow-wrap: anywhere}
.lnfold.lnfold.lnfold td:is(.folded, .approximate, .left) {padding-left: 0.6em}
.lnfold .folded {border-left: 0.3em solid #2e9e5b}
.lnfold .approximate {border-left: 0.3em solid #8e4ec6}
.lnfold .left {border-left: 0.3em solid #d9822b}
"""
