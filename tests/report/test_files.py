"""Reports, pictures and plans as files, dictionaries and one line, as people first try it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, PlanFormatError
from jax_lnfold.report.page import to_png
from tests.helpers.contracts import unbroken
from tests.report.test_report import report_of


@pytest.mark.parametrize("name", ["to_svg", "to_dot", "to_html"])
def test_what_is_returned_is_written(name: str, tmp_path: Path) -> None:
    show: Callable[..., str] = getattr(report_of("mixer_wide"), name)
    text = show()
    for file in (tmp_path / "picture", str(tmp_path / "picture")):
        assert show(file) == text
        assert Path(file).read_text("utf-8") == text


def test_a_page_of_its_own() -> None:
    page = report_of("mixer_wide").to_html(title="<mixer>", cost=False)
    assert page.startswith("<!doctype html>")
    assert page.count("<table>") == page.count("<svg") == 1
    assert "<title>&lt;mixer&gt;</title>" in page


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    report = report_of("swin")
    image = report.to_png(tmp_path / "swin.png")
    assert (tmp_path / "swin.png").read_bytes() == image
    assert image.startswith(b"\x89PNG")
    width, height = (int.from_bytes(image[i : i + 4], "big") for i in (16, 20))
    assert f'width="{width // 2}" height="{height // 2}"' in report.to_svg()


def test_what_is_drawn_as_png_needs_no_style_that_few_programs_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Drawer:
        @staticmethod
        def svg_to_bytes(svg_string: str, zoom: float, background: str) -> bytes:
            assert not {"var(", "--ink", "@media", "font: "} & {*svg_string.split()}
            assert "var(" not in svg_string
            assert "fill: #1f2328" in svg_string
            assert (zoom, background) == (2, "#fff")
            return b"drawn"

    monkeypatch.setitem(sys.modules, "resvg_py", Drawer)  # type: ignore[misc]
    assert to_png(report_of("mixer_wide").to_svg()) == b"drawn"


def test_png_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(FoldError, match=r"pip install 'jax_lnfold\[png\]'.*or write SVG"):
        report_of("mixer_wide").to_png(tmp_path / "x.png")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["mixer_wide", "mixer_narrow", "bart"])
def test_a_report_as_a_dictionary(name: str) -> None:
    report = report_of(name)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [norm["folded"] for norm in told["norms"]] == [norm.folded for norm in report.norms]
    assert [norm["reason"] for norm in told["norms"]] == [norm.reason for norm in report.norms]
    assert told["n_folded"] == report.n_folded
    assert len(told["insertions"]) == told["n_inserted"] == report.n_inserted
    assert FoldPlan.from_json(json.dumps(told["plan"])) == report.plan
    assert "events" not in told


def test_places_and_costs_in_a_dictionary() -> None:
    def model(p: Any, x: Any) -> Any:
        return jax.nn.standardize(jax.pure_callback(lambda v: v, x, x) @ p)

    report = jax_lnfold.analyze(model, jnp.ones((3, 5)), jnp.ones((2, 3)))
    assert [*report.to_dict()["unseen"]] == [str(place) for place in report.unseen]
    assert "cost" not in report.to_dict()
    cost = report.cost
    assert report.to_dict()["cost"]["reductions"] == list(cost.reductions)


# --- plan files ----------------------------------------------------------------------------------


def test_a_plan_from_its_file(tmp_path: Path) -> None:
    plan = report_of("mixer_wide").plan
    file = tmp_path / "plan.json"
    assert plan.to_json(file) == file.read_text() == plan.to_json()
    assert FoldPlan.from_json(file) == FoldPlan.from_json(file.read_bytes()) == plan
    with pytest.raises(FileNotFoundError):
        FoldPlan.from_json(tmp_path / "none.json")
    with pytest.raises(PlanFormatError, match=r"pass pathlib.Path\('a/plan.json'\) to read a file"):
        FoldPlan.from_json("a/plan.json")


# --- one line ------------------------------------------------------------------------------------


def layer_norm(p: Any, x: Any) -> Any:
    return jax.nn.standardize(x @ p)


def test_what_fold_returns_in_one_line() -> None:
    p, x = jnp.ones((3, 5)), jnp.ones((2, 3))
    folded = jax_lnfold.fold(layer_norm, p)
    assert repr(folded) == "<Folded: not analysed before its first call>"
    folded(x)
    said = "1 of 1 LayerNorm folded, 1 parameter centered (120 B), 0 explicit centerings inserted"
    assert repr(folded) == f"<Folded: {said}>"
    assert repr(folded.report) == f"<Report: {said}>"
    two = jax_lnfold.fold({"a": layer_norm, "b": lambda p, x: x @ p}, p, {"a": x, "b": x + 1})
    assert repr(two).startswith("<FoldedFunctions 'a', 'b': ")


# --- reasons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_post_ln_says_one_reason_once(name: str) -> None:
    report = report_of(name)
    for text in (str(report), report._repr_html_()):
        said = " ".join(text.split())
        assert said.count("scales the positions along the mean unequally") == 1
        assert said.count("embed_norm, encoders.py:") == (1 if name == "bert" else 2)
    assert "(2)" not in str(report)


def test_at_most_four_places_of_a_reason() -> None:
    assert "; and 3 more) scales" in unbroken(report_of("bart"))


def test_reasons_that_differ_in_more_stay_apart() -> None:
    said = unbroken(report_of("swin"))
    assert said.count("this parameter is `params/stage_") == 2
    assert said.count("normalise before positions are joined".capitalize()) == 4


def test_a_mean_of_several_positions_is_told_so() -> None:
    """The LayerNorm that merges patches in Swin; V2 normalises each patch."""
    (first,) = {norm.advice for norm in report_of("swin").norms if not norm.folded}
    assert "this LayerNorm takes one mean of several together" in first
    assert all("joined" not in norm.advice for norm in report_of("swin_v2").norms)


def test_nothing_was_changed_where_it_is_said() -> None:
    p, x = jnp.arange(15.0).reshape(3, 5), jnp.ones((2, 3))
    folded = jax_lnfold.fold(lambda p, x: jnp.tanh(x @ p), p, x, fold_affine=True, untie=True)
    assert "nothing was changed" in str(folded.report)
    original, rewritten = folded.report.programs()  # type: ignore[misc]
    assert str(original) == str(rewritten)
    assert folded.params is p
    changed = jax_lnfold.fold(layer_norm, p, x)
    assert "nothing was changed" not in str(changed.report)


# --- errors of tracing ---------------------------------------------------------------------------

FLAGS, NUMBERS = "Bind Python flags", "Where numbers decide"


@pytest.mark.parametrize(
    ("function", "inputs", "hint"),
    [
        (lambda p, x, train: x @ p if train else x, (jnp.ones((2, 3)), True), FLAGS),
        (lambda p, x, n: jnp.ones(range(5)[n]), (jnp.ones((2, 3)), 2), FLAGS),
        (lambda p, x: x @ p if x.sum() > 0 else x, (jnp.ones((2, 3)),), NUMBERS),
        (lambda p, x: x @ p.T, (jnp.ones((2, 3)),), ""),
        (lambda p, x: x @ p["kernel"], (jnp.ones((2, 3)),), ""),
    ],
    ids=["flag", "index", "numbers", "shapes", "tree"],
)
def test_flags_are_spoken_of_where_there_are_some(
    function: Callable[..., Any], inputs: tuple[Any, ...], hint: str
) -> None:
    with pytest.raises(jax_lnfold.TraceError) as raised:
        jax_lnfold.fold(function, jnp.ones((3, 5)), *inputs)
    told = str(raised.value)
    assert [text for text in (FLAGS, NUMBERS) if text in told] == [hint] * bool(hint)
