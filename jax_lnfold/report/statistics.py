"""What the means of LayerNorms amount to on data: plain numbers, and a table of them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..measurement.shares import BINS, EDGES, Sums
from ..printable import counted, printable
from .table import NARROWEST, STYLE, WIDEST


@dataclass(frozen=True, slots=True, eq=False)
class MeanShare:
    """The share of the mean in the second moment of a LayerNorm's input, in float64.

    `share` is ``E[mean**2] / E[x**2]`` over all tokens. `mean`, `percentile_99` and `maximum` are
    those of ``mean**2 / mean(x**2)`` over tokens, 0 for a token of zeros. The percentile is that of
    a histogram: it is at most 9 % too large and, up to rounding, never too small. All are between 0
    (no token has a mean) and 1 (each is constant), and NaN if an activation is infinite or NaN, or
    if the LayerNorm did not run. Their shape is ``()``, or that of the loops around the LayerNorm:
    ``(12,)`` if a `scan` runs it for 12 layers.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lnfold
        >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0]])  # one token that is all mean, one without
        >>> found = jax_lnfold.measure(lambda _, x: jax.nn.standardize(x), {}, x)
        >>> float(found.norms[0].before.share), float(found.norms[0].before.maximum)
        (0.5, 1.0)
    """

    share: np.ndarray
    mean: np.ndarray
    percentile_99: np.ndarray
    maximum: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class NormStatistics:
    """What is known of one LayerNorm: its name, as in a report, and how many tokens it has seen.

    `before` is of the function as it was given. Of a fold, `after` is of its edited parameters,
    with the explicit centerings of its program. Both are None of a LayerNorm that cannot be looked
    at. `tokens` has the shape of the loops around the LayerNorm.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lnfold
        >>> found = jax_lnfold.measure(lambda _, x: jax.nn.standardize(x), {}, jnp.ones((3, 2)))
        >>> int(found.norms[0].tokens), found.norms[0].shares
        (3, ((1.0,),))
    """

    path: str
    title: str
    tokens: np.ndarray
    before: MeanShare | None
    after: MeanShare | None = None

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """The share of the mean before and after, one number for each iteration that runs it."""
        sides = [side for side in (self.before, self.after) if side is not None]
        return tuple(tuple(map(float, np.ravel(side.share))) for side in sides) or ((),)


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What `measure` returns, for every LayerNorm in program order; `print` shows a table.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lnfold
        >>> found = jax_lnfold.measure(lambda _, x: jax.nn.standardize(x), {}, jnp.ones((3, 2)))
        >>> found
        <Statistics: 1 LayerNorm of 1 batch>
        >>> found.left_out, found.not_finite
        ((), ())
    """

    norms: tuple[NormStatistics, ...]
    n_batches: int

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names of those that cannot be looked at."""
        return tuple(norm.path for norm in self.norms if norm.before is None)

    @property
    def not_finite(self) -> tuple[str, ...]:
        """The names of those whose input is infinite or NaN somewhere."""
        return tuple(norm.path for norm in self.norms if _is_spoilt(norm))

    def __repr__(self) -> str:
        """One line: notebooks keep it beside the table."""
        return f"<Statistics: {counted(len(self.norms), 'LayerNorm')} of {self._batches}>"

    def __str__(self) -> str:
        """The table as plain text, as wide as the terminal."""
        columns = shutil.get_terminal_size((110, 24)).columns
        file, width = io.StringIO(), min(max(columns, NARROWEST), WIDEST)
        Console(file=file, width=width, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __rich__(self) -> RenderableType:
        """The same in colour, for ``rich.print``."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in self._titles():
            table.add_column(title, overflow="fold")
        for row in self._rows():
            table.add_row(*(Text(printable(cell)) for cell in row))
        lines = (Text(printable(line)) for line in self.lines())
        return Group(*[table] * bool(self.norms), *lines)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        head = "".join(f"<th>{escape(title)}</th>" for title in self._titles())
        cells = ("".join(f"<td>{escape(printable(x))}</td>" for x in row) for row in self._rows())
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        table = f"<table><tr>{head}</tr>{body}</table>" if self.norms else ""
        below = "".join(f"<p>{escape(printable(line))}</p>" for line in self.lines())
        return f'<div class="lnfold"><style>{STYLE}</style>{table}{below}</div>'

    @property
    def _batches(self) -> str:
        return counted(self.n_batches, "batch", "batches")

    def _titles(self) -> list[str]:
        shown = ["share of mean", "mean of tokens", "99 %", "maximum"]
        after = ["after: share", "after: maximum"] if any(norm.after for norm in self.norms) else []
        return ["LayerNorm", "tokens", *shown, *after]

    def _rows(self) -> Iterator[list[str]]:
        """One for each LayerNorm, or for each iteration that runs it."""
        width = len(self._titles())
        for norm in self.norms:
            if norm.before is None:
                yield [norm.title, "not measured", *[""] * (width - 2)]
                continue
            b, a = norm.before, norm.after
            columns = [b.share, b.mean, b.percentile_99, b.maximum]
            columns += [a.share, a.maximum] if a is not None else []
            for index in np.ndindex(norm.tokens.shape):
                place = f" [{', '.join(map(str, index))}]" if index else ""
                numbers = (f"{column[index]:.2g}" for column in columns)
                yield [norm.title + place, str(norm.tokens[index]), *numbers]

    def lines(self) -> Iterator[str]:
        """What the numbers are, and what is odd about them."""
        if not self.norms:
            yield "No LayerNorm found."
            return
        yield (
            "Share of the mean in the second moment of the input, E[mean**2] / E[x**2], measured "
            f"on {self._batches}."
        )
        if self.not_finite:
            yield f"Infinite or NaN activations: {', '.join(self.not_finite)}."
        if self.left_out:
            yield f"Not measured: {', '.join(self.left_out)}."


def norm_statistics(
    path: str, title: str, before: Sums | None, after: Sums | None
) -> NormStatistics:
    """The numbers of one LayerNorm from NumPy sums of all of its tokens."""
    if before is None:
        return NormStatistics(path, title, np.zeros((), int), None)
    tokens = before.counts.sum(-1) + before.spoilt
    return NormStatistics(path, title, tokens, _share(before), after and _share(after))


def _share(sums: Sums) -> MeanShare:
    counted_tokens = sums.counts.sum(-1)
    usable = (counted_tokens > 0) & (sums.spoilt == 0)

    def known(x: Any) -> np.ndarray:
        return np.where(usable, x, np.nan)

    # Of zeros alone there is no second moment, and no mean.
    share = sums.means / np.where(sums.squares == 0, 1, sums.squares)
    mean = sums.shares / np.where(usable, counted_tokens, 1)
    below = np.cumsum(sums.counts, axis=-1) < np.ceil(0.99 * counted_tokens)[..., None]
    edge = EDGES[np.minimum(below.sum(-1), BINS - 1)]
    percentile = np.minimum(edge, sums.largest)
    return MeanShare(known(share), known(mean), known(percentile), known(sums.largest))


def _is_spoilt(norm: NormStatistics) -> bool:
    sides = [side for side in (norm.before, norm.after) if side is not None]
    return any(bool(np.any(np.isnan(side.share) & (norm.tokens > 0))) for side in sides)
