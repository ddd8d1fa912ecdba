"""The outcome of a fold in words: rows of a table, and the sentences below it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ..plan.edits.center import CenterEdit
from ..printable import counted
from .approximation import Approximation
from .cost import si
from .norms import Norm
from .outcome import Outcome, ScaleLeft
from .table import Row, grouped, merged, template


def rows(outcome: Outcome) -> list[Row]:
    """One row per LayerNorm, in model order, or per group of them in repeated blocks."""
    measured = outcome.statistics.norms if outcome.statistics else [None] * len(outcome.norms)
    return grouped(
        Row(
            path=norm.title,
            shape="x".join(map(str, norm.shape)),
            axes=", ".join(map(str, (*norm.axes, *norm.mesh_axes))),
            variance=_variance(norm),
            folded=norm.folded,
            approximate=norm.approximate,
            words=(norm.reason, norm.advice),
            place=(norm.blocker.file, norm.blocker.line) if norm.blocker else None,
            runs=norm.count,
            shares=statistics.shares if statistics else (),
            dropped=norm.dropped,
            damages=() if norm.damage is None else (norm.damage,),
            also=norm.also,
        )
        for norm, statistics in zip(outcome.norms, measured, strict=True)
    )


def _variance(norm: Norm) -> str:
    """How it is computed, as far as anybody looks into that."""
    if norm.kernel:
        return f"in {norm.kernel}"
    return "two-pass" if norm.two_pass else "one-pass"


def headline(outcome: Outcome) -> str:
    """How many LayerNorms are folded."""
    if not outcome.norms:
        return "No LayerNorm found"
    some = f", {outcome.n_dropped} of them approximately" if outcome.n_dropped else ""
    return f"{outcome.n_folded} of {counted(len(outcome.norms), 'LayerNorm')} folded{some}"


def in_short(outcome: Outcome) -> str:
    """The first sentence, without its stop."""
    return summary(outcome)[0].removesuffix(".")


def summary(outcome: Outcome) -> list[str]:
    """Counts, and what else there is to know."""
    return [line for section in SECTIONS for line in section(outcome)]


Section = Callable[[Outcome], Iterable[str]]
"""Lines below the table, maybe none, about one thing that a report knows."""


def _insertions(outcome: Outcome) -> Iterable[str]:
    return map(str, outcome.insertions)


def _untied(outcome: Outcome) -> Iterable[str]:
    for leaf in outcome.untied:
        yield f"`{leaf.key_path}` untied by a copy ({si(leaf.bytes)}B), which lookups read."
    for leaf in outcome.tied:
        yield f"`{leaf.key_path}` stays tied: {leaf.reason}."


def _assumed(outcome: Outcome) -> Iterable[str]:
    """What else than the program the fold rests on: a line for all leaves that are alike."""
    groups: dict[str, list[str]] = {}
    for edit in outcome.plan.assumed:
        groups.setdefault(template(str(edit)), []).append(str(edit))
    if groups:
        yield f"Exact as long as these stay so: {'; '.join(map(merged, groups.values()))}."
    if outcome.unknown:
        leaves = counted(len(outcome.unknown), "parameter")
        yield f"Nothing is assumed of {leaves}, whose values are not at hand."


def _deferred(outcome: Outcome) -> Iterable[str]:
    if outcome.deferred:
        yield f"{counted(len(outcome.deferred), 'scale')} deferred behind matrix products."


def _on_matrix_unit(outcome: Outcome) -> Iterable[str]:
    if outcome.on_matrix_unit:
        number = counted(len(outcome.on_matrix_unit), "sum")
        yield f"{number} of statistics computed on the matrix unit, as products with ones."


def _respelled(outcome: Outcome) -> Iterable[str]:
    if outcome.respelled:
        number = counted(len(outcome.respelled), "LayerNorm")
        passes = "two passes" if outcome.respelled[0].two_pass else "one pass"
        yield f"{number} respelled in {passes}, with the mean."


def _excluded(outcome: Outcome) -> Iterable[str]:
    if outcome.unrestricted is not None:
        folded, inserted = outcome.unrestricted
        yield (
            f"Without `exclude`, {counted(folded, 'LayerNorm')} would fold with "
            f"{counted(inserted, 'explicit centering')}."
        )


def _approximation(outcome: Outcome) -> Iterable[str]:
    if outcome.dropouts:
        measured = "not measured: pass arrays to fold"
        if outcome.deviation is not None:
            measured = f"{outcome.deviation:.2g} of the largest output on the example inputs"
        yield (
            f"Approximate: {counted(outcome.dropouts, 'dropout')} taken for the identity; "
            f"deviation {measured}. Without dropout the same parameters are exact."
        )


def _means_left_out(outcome: Outcome) -> Iterable[str]:
    told = outcome.approximation
    if told is None and outcome.n_dropped:
        told = Approximation(math.inf)
    return told.lines(outcome.n_dropped) if told else ()


def _rounded(outcome: Outcome) -> Iterable[str]:
    if outcome.rounded:
        some = ", ".join(outcome.rounded[:3]) + ", ..." * (len(outcome.rounded) > 3)
        yield (
            f"Rounded once more, as they are stored narrower than used: {some}. "
            "Fold before you cast to avoid that."
        )


def _opaque(outcome: Outcome) -> Iterable[str]:
    if outcome.opaque:
        met = ", ".join(f"{name} ({n})" for name, n in outcome.opaque.items())
        yield f"Opaque operations met: {met}."


def _unseen(outcome: Outcome) -> Iterable[str]:
    if outcome.unseen:
        places = (f"{place} x{n}" if n > 1 else str(place) for place, n in outcome.unseen.items())
        yield f"LayerNorms are not looked for inside of {', '.join(places)}."


def _outcome(outcome: Outcome) -> Iterable[str]:
    """What was folded and changed, as one sentence."""
    edited = [CenterEdit.told(())] * (bool(outcome.norms) and not outcome.edits)
    edited += outcome.plan.told()
    if outcome.edited_bytes:
        edited[-1] += f" ({si(outcome.edited_bytes)}B)"
    if outcome.constants:
        edited.append(f"{counted(outcome.constants, 'constant')} centered")
    if outcome.norms:
        edited.append(f"{counted(outcome.n_inserted, 'explicit centering')} inserted")
    elif not (edited or outcome.deferred or outcome.on_matrix_unit or outcome.respelled):
        return [f"{headline(outcome)}; nothing was changed."]
    return [f"{', '.join((headline(outcome), *edited))}."]


def _measured(outcome: Outcome) -> Iterable[str]:
    return outcome.statistics.lines() if outcome.statistics else ()


def _scales_left(outcome: Outcome) -> Iterable[str]:
    """Why scales are not taken up: a line for all that are left for the same reason."""
    for group in _alike(outcome.affine_left, lambda s: s.reason):
        of_blocks = _alike(group, lambda s: s.key_path)
        paths = ", ".join(f"`{merged([s.key_path for s in some])}`" for some in of_blocks)
        verb = "Scale {} stays" if len(group) == 1 else "Scales {} stay"
        yield f"{verb.format(paths)}: {merged([s.reason for s in group])}."


def _alike(
    scales: Iterable[ScaleLeft], text: Callable[[ScaleLeft], str]
) -> Iterable[list[ScaleLeft]]:
    """Those whose texts differ in numbers only together."""
    found: dict[str, list[ScaleLeft]] = {}
    for scale in scales:
        found.setdefault(template(text(scale)), []).append(scale)
    return found.values()


SECTIONS: tuple[Section, ...] = (
    _outcome,
    _measured,
    _insertions,
    _excluded,
    _untied,
    _assumed,
    _deferred,
    _on_matrix_unit,
    _respelled,
    _scales_left,
    _approximation,
    _means_left_out,
    _rounded,
    _opaque,
    _unseen,
)
"""What stands below the table, in this order: as text, in colour and as HTML."""
