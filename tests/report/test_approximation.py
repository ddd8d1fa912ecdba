"""Means that are left out have a colour of their own, with what they were measured to do."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

import jax_lnfold
from jax_lnfold.report.approximation import Approximation
from tests.helpers.contracts import unbroken
from tests.models.zoo import BY_NAME

PURPLE = "#8e4ec6"


@pytest.fixture(scope="module")
def report() -> Any:
    """As if two of BERT's LayerNorms did without their mean, which is cheap to make."""
    model = BY_NAME["bert"].build()
    apply, params, inputs = model.apply_fn, model.params, model.inputs
    plan = jax_lnfold.fold(apply, params, *inputs, approximate={"mean"}, budget=math.inf).plan
    left_out = tuple(edit for edit in plan.dropped if "block_0" in edit.norm)
    damages = {edit.norm: 0.01 * (i + 1) for i, edit in enumerate(plan.dropped)}
    told = Approximation(
        budget=0.05,
        default=True,
        deviation=0.0421,
        exact=3e-8,
        fitted=4,
        held_out=1,
        divergence=2.1e-5,
        agreement=0.997,
        damages=damages,
        kept={"other": "something else reads its mean or its deviation, too"},
    )
    plan = replace(plan, dropped=left_out)
    options = {"approximate": {"mean"}, "plan": plan, "center": True}
    made = jax_lnfold.fold(apply, params, *inputs, **options).report
    norms = tuple(replace(n, damage=damages.get(n.path)) for n in made.norms)
    statistics = jax_lnfold.measure(apply, params, inputs)
    return replace(made, norms=norms, approximation=told, statistics=statistics)


def test_text(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = unbroken(report)
    assert report.n_dropped == 2
    assert report.n_folded == 3
    assert "3 of 5 LayerNorms folded, 2 of them approximately" in text
    assert "mean left out" in text
    assert "error without its mean" in text
    assert "0.01" in text
    assert (
        "Approximate: the means of 2 LayerNorms left out; relative error of the outputs 0.042 (KL "
        "divergence 2.1e-05, argmax agrees 99.70%) on 1 of 5 batches, to which nothing was fitted "
        "(budget 0.05, what a cast of the weights to bfloat16 does; 3e-08 with all means)."
    ) in text
    assert (
        "Cannot do without a mean: other, as something else reads its mean or its deviation, too."
        in text
    )
    assert pickle.loads(pickle.dumps(report)) == report


def test_colours(report: Any) -> None:
    file = io.StringIO()
    Console(file=file, width=200, force_terminal=True, color_system="standard").print(report)
    lines = [line for line in file.getvalue().splitlines() if "mean left out" in line]
    assert lines
    assert all("\x1b[35mmean left out" in line for line in lines)
    html = report._repr_html_()
    assert html.count('<td class="approximate">mean left out</td>') == len(lines)
    assert f".lnfold .approximate {{border-left: 0.3em solid {PURPLE}}}" in html
    assert "<th>error without its mean</th>" in html


def test_pictures(report: Any) -> None:
    kinds = [event.kind for event in report.events]
    assert [kinds.count(kind) for kind in ("folded", "approximated", "left")] == [1, 2, 2]
    assert "LayerNorm folded approximately: its mean is left out, but not zero" in report.to_svg()
    assert report.to_svg().count(f'fill="{PURPLE}"') > 2
    assert f'style="filled", color="{PURPLE}"' in report.to_dot()
    model = BY_NAME["bert"].build()
    folded = jax_lnfold.analyze(model.apply_fn, model.params, *model.inputs)
    assert PURPLE not in folded.to_svg()
    assert "error without its mean" not in str(folded)


def test_nothing_measured() -> None:
    told = Approximation(math.inf)
    assert [*told.lines(1)] == [
        "Approximate: the mean of 1 LayerNorm left out; what that amounts to was not measured."
    ]
    assert "no mean is left out" in next(told.lines(0))
