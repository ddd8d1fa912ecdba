"""The outcome of a fold in words: rows of a table, and the sentences below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .cost import si
from .outcome import Outcome, ScaleLeft
from .table import Row, counted, grouped, merged, template


def rows(outcome: Outcome) -> list[Row]:
    """One row per LayerNorm, in model order, or per group of them in repeated blocks."""
    return grouped(
        Row(
            path=norm.path,
            shape="x".join(map(str, norm.shape)),
            axes=", ".join(map(str, (*norm.axes, *norm.mesh_axes))),
            variance="two-pass" if norm.two_pass else "one-pass",
            folded=norm.folded,
            approximate=norm.approximate,
            words=(norm.reason, norm.advice),
            place=(norm.blocker.file, norm.blocker.line) if norm.blocker else None,
            runs=norm.count,
        )
        for norm in outcome.norms
    )


def headline(outcome: Outcome) -> str:
    """How many LayerNorms are folded."""
    if not outcome.norms:
        return "No LayerNorm found"
    return f"{outcome.n_folded} of {counted(len(outcome.norms), 'LayerNorm')} folded"


def summary(outcome: Outcome) -> list[str]:
    """Counts, and what else there is to know."""
    lines = [_outcome(outcome), *map(str, outcome.insertions)]
    if outcome.deferred:
        lines.append(f"{counted(len(outcome.deferred), 'scale')} deferred behind matrix products.")
    lines += _scales_left(outcome)
    if outcome.dropouts:
        measured = "not measured: pass arrays to fold"
        if outcome.deviation is not None:
            measured = f"{outcome.deviation:.2g} of the largest output on the example inputs"
        lines.append(
            f"Approximate: {counted(outcome.dropouts, 'dropout')} taken for the identity; "
            f"deviation {measured}. Without dropout the same parameters are exact."
        )
    if outcome.rounded:
        some = ", ".join(outcome.rounded[:3]) + ", ..." * (len(outcome.rounded) > 3)
        lines.append(
            f"Rounded once more, as they are stored narrower than used: {some}. "
            "Fold before you cast to avoid that."
        )
    if outcome.opaque:
        met = ", ".join(f"{name} ({n})" for name, n in outcome.opaque.items())
        lines.append(f"Opaque operations met: {met}.")
    if outcome.unseen:
        places = (f"{place} x{n}" if n > 1 else str(place) for place, n in outcome.unseen.items())
        lines.append(f"LayerNorms are not looked for inside of {', '.join(places)}.")
    return lines


def _outcome(outcome: Outcome) -> str:
    """What was folded and changed, as one sentence."""
    edited = []
    if outcome.norms:
        edited.append(f"{counted(len({e.key_path for e in outcome.edits}), 'parameter')} centered")
    if outcome.scales:
        edited.append(f"{counted(len(outcome.scales), 'scale')} merged")
    if outcome.affine:
        taken_up = sum(1 + (edit.shift is not None) for edit in outcome.affine)
        edited.append(f"{counted(taken_up, 'scale or shift', 'scales and shifts')} taken up")
    if outcome.edited_bytes:
        edited[-1] += f" ({si(outcome.edited_bytes)}B)"
    if outcome.constants:
        edited.append(f"{counted(outcome.constants, 'constant')} centered")
    if outcome.norms:
        edited.append(f"{counted(outcome.n_inserted, 'explicit centering')} inserted")
    elif not (edited or outcome.deferred):
        return f"{headline(outcome)}; nothing was changed."
    return f"{', '.join((headline(outcome), *edited))}."


def _scales_left(outcome: Outcome) -> list[str]:
    """Why scales are not taken up: a line for all that are left for the same reason."""
    lines = []
    for group in _alike(outcome.affine_left, lambda s: s.reason):
        of_blocks = _alike(group, lambda s: s.key_path)
        paths = ", ".join(f"`{merged([s.key_path for s in some])}`" for some in of_blocks)
        verb = "Scale {} stays" if len(group) == 1 else "Scales {} stay"
        lines.append(f"{verb.format(paths)}: {merged([s.reason for s in group])}.")
    return lines


def _alike(
    scales: Iterable[ScaleLeft], text: Callable[[ScaleLeft], str]
) -> Iterable[list[ScaleLeft]]:
    """Those whose texts differ in numbers only together."""
    found: dict[str, list[ScaleLeft]] = {}
    for scale in scales:
        found.setdefault(template(text(scale)), []).append(scale)
    return found.values()
