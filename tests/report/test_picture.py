"""Pictures show every LayerNorm, what writes into its stream and what is in the way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jax_lnfold
from jax_lnfold.report.events import Event
from jax_lnfold.report.picture import to_dot, to_svg
from jax_lnfold.report.picture_rows import Layout, lay_out
from jax_lnfold.report.repeats import Repeat, fold_repeats
from jax_lnfold.report.report import Report
from tests.models.zoo import ZOO, vision
from tests.models.zoo.base import recipe
from tests.report.test_report import report_of

SVG = "{http://www.w3.org/2000/svg}"


def names_of(events: Sequence[Event], *kinds: str) -> list[str]:
    return [event.name for event in events if event.kind in kinds]


@pytest.mark.parametrize("name", [str(case) for case in ZOO])
def test_events_of_the_zoo(name: str) -> None:
    report = report_of(name)
    kinds = Counter(event.kind for event in report.events)
    assert kinds["folded"] == report.n_folded
    assert kinds["left"] == len(report.norms) - report.n_folded
    assert kinds["inserted"] == report.n_inserted
    edited = [e for e in report.events if e.kind == "edited"]
    written = {"/".join(filter(None, (e.name, n))) for e in edited for n in e.detail.split(", ")}
    assert written == {edit.key_path.removeprefix("params/") for edit in report.edits}
    for event in report.events:
        if event.kind == "left":
            others = {e.kind for e in report.events if e.stream == event.stream}
            assert others & {"blocked", "noticed"}, "what is in the way is on the same stream"
            assert event.why


def test_one_stream_in_program_order() -> None:
    events = report_of("vit").events
    assert {event.stream for event in events} == {0}
    block = ["block_0.residual/attn_norm", "attn/out", "block_0.residual/mlp_norm", "mlp/fc2"]
    assert names_of(events, "edited", "folded")[:6] == [
        "stream/patches",
        "stream",
        *(f"blocks/block_0/{part}" for part in block),
    ]
    assert [e.detail for e in events[:3]] == ["kernel, bias", "cls, positions", "2x7x24"]


def test_a_stream_for_each_projection() -> None:
    events = report_of("qk_norm_split").events
    by_stream = [names_of([e for e in events if e.stream == s], "folded") for s in range(5)]
    assert [len(names) for names in by_stream] == [5, 1, 1, 1, 1]
    assert by_stream[1] == ["blocks/block_0/block_0.residual/attn/q_norm"]
    assert by_stream[4] == ["blocks/block_1/block_1.residual/attn/k_norm"]


def test_blockers_are_where_they_act() -> None:
    events = report_of("bert").events
    assert names_of(events, "folded") == ["embed_norm"]
    for stream in range(1, 5):
        kinds = [e.kind for e in events if e.stream == stream]
        assert kinds == ["blocked", "written", "written", "left"]
    assert all(e.name.startswith("mul ") for e in events if e.kind == "blocked")
    tied = [e for e in report_of("bloom").events if e.kind == "noticed"]
    assert [e.name.split()[0] for e in tied] == ["dot_general"], "the table is read once more"


def test_a_stream_that_is_returned() -> None:
    def apply(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        s = x @ w
        return s, nn.standardize(s)

    events = jax_lnfold.analyze(apply, jnp.ones((7, 5)), jnp.ones((2, 7))).events
    assert [e.kind for e in events] == ["written", "left", "noticed"]
    assert events[-1].name == "returned as an output"
    assert events[-1].detail.startswith("dot_general test_picture.py:")


README_PICTURE = Path(__file__).parents[2] / "examples" / "vit_qk_norm.svg"


def readme_picture() -> str:
    model = recipe(partial(vision.vit, depth=12, normalize_qk=True), *vision.IMAGES)()
    return jax_lnfold.analyze(model.apply_fn, model.params, *model.inputs).to_svg()


def test_picture_of_the_readme() -> None:
    """`python -m tests.report.test_picture` draws it again."""
    assert README_PICTURE.read_text("utf-8") == readme_picture()


# --- repeats -------------------------------------------------------------------------------------


def unfolded(items: Sequence[Any], entry: Sequence[int] = ()) -> list[Any]:
    """Keys and counts of folded rows: ``"a", (["b", "c"], 3)``."""
    return [(unfolded(i.items), i.count) if isinstance(i, Repeat) else i[0][0] for i in items]


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("abc", ["a", "b", "c"]),
        ("aaa", [(["a"], 3)]),
        ("xababy", ["x", (["a", "b"], 2), "y"]),
        ("abbabbabbc", [(["a", (["b"], 2)], 3), "c"]),
        ("abcabd", ["a", "b", "c", "a", "b", "d"]),
        ("aabaab", [([(["a"], 2), "b"], 2)]),
    ],
)
def test_repeats(text: str, folded: list[Any]) -> None:
    rows = [[(letter, i)] for i, letter in enumerate(text)]
    found = fold_repeats(rows, lambda entry: entry[0])
    assert unfolded(found) == folded

    assert fold_repeats(rows, lambda entry: entry[0], lambda entry: False) == rows

    def entries(items: Sequence[Any]) -> list[Any]:
        return [e for i in items for e in (entries(i.items) if isinstance(i, Repeat) else i)]

    assert sorted(entries(found), key=lambda e: e[1]) == [row[0] for row in rows]


class Deep(nn.Module):
    """Pre-LN layers, unrolled or scanned."""

    depth: int
    scanned: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(12, name="stem")(x)
        if self.scanned:
            parts = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Layer, length=self.depth, **parts)(name="layers")(x, None)
        else:
            for i in range(self.depth):
                x, _ = Layer(name=f"layer_{i}")(x, None)
        return nn.LayerNorm(name="last")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.gelu(nn.Dense(9, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(12, name="down")(y), None


def deep_report(depth: int, scanned: bool = False) -> Report:
    model, x = Deep(depth, scanned), jnp.ones((2, 5, 7), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax_lnfold.analyze(model.apply, params, x)


@pytest.mark.parametrize("scanned", [False, True])
def test_48_layers_fit_on_a_page(scanned: bool) -> None:
    report = deep_report(48, scanned)
    layout = lay_out(report.events)
    assert [row.text("name") for row in layout.rows] == (
        ["stem", "layers/norm", "layers/down", "last"]
        if scanned
        else ["stem", "layer_{0-47}/norm", "layer_{0-47}/down", "last"]
    )
    (box,) = layout.boxes
    assert (box.top, box.bottom, box.count, box.is_loop) == (1, 2, 48, scanned)
    assert float(ElementTree.fromstring(report.to_svg()).attrib["height"]) < 400


@pytest.mark.parametrize("name", ["vit", "bert", "swin", "qk_norm_split", "bart", "convnext"])
def test_lines_join_the_rows_of_each_stream(name: str) -> None:
    events = report_of(name).events
    layout = lay_out(events)
    assert sorted(map(id, events)) == sorted(id(e) for row in layout.rows for e in row.events)
    row_of = {id(e): i for i, row in enumerate(layout.rows) for e in row.events}
    for stream in {event.stream for event in events}:
        rows = [row_of[id(e)] for e in events if e.stream == stream]
        for row, following in pairwise(rows):
            lane = layout.rows[row].lane
            from_box = any(
                (lane, row, box.bottom + 0.5) in layout.lines
                and (lane, box.top - 0.5, following) in layout.lines
                for box in layout.boxes
            )
            assert (lane, row, following) in layout.lines or from_box
    assert no_row_of_another_stream_is_crossed(layout)


def no_row_of_another_stream_is_crossed(layout: Layout) -> bool:
    """No piece passes a row on its lane that is about other streams only."""
    rows = layout.rows
    for lane, start, end in layout.lines:
        ends = [rows[int(r)] for r in (start, end) if float(r).is_integer()]
        streams = {e.stream for row in ends for e in row.events}
        between = [r for i, r in enumerate(rows) if start < i < end and r.lane == lane]
        if any(not streams & {e.stream for e in row.events} for row in between):
            return False
    return True


# --- SVG and DOT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "bert", "swin", "dit", "gpt2"])
def test_svg(name: str) -> None:
    report = report_of(name)
    text = report.to_svg()
    svg = ElementTree.fromstring(text)
    assert svg.tag == f"{SVG}svg"
    said = [t.text or "" for t in svg.iter(f"{SVG}text")]
    assert said[0] == f"{report.n_folded} of {len(report.norms)} LayerNorms folded"
    for row in lay_out(report.events).rows:
        assert any(row.text("name")[-40:] in t for t in said)
    width = float(svg.attrib["width"])
    for t in svg.iter(f"{SVG}text"):
        if t.get("class") != "c":
            assert float(t.attrib["x"]) + 7.25 * len(t.text or "") <= width, "inside the picture"
    assert not re.search(r"href|url\(|@import|<script", text), "needs nothing else"
    assert "prefers-color-scheme: dark" in text
    titles = {t.text or "" for t in svg.iter(f"{SVG}title")}
    for norm in report.norms:
        assert not norm.reason or any(norm.reason[1:] in t for t in titles)


def test_text_in_pictures_is_escaped() -> None:
    event = Event("left", 0, '<b>&"name"\\', "2x5", "a < b & c", 1, ())
    svg = to_svg([event], "1 < 2 & 3")
    said = [t.text for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert said[:2] == ["1 < 2 & 3", '<b>&"name"\\']
    assert r'label="<b>&\"name\"\\\n2x5 left"' in to_dot([event], "")


def test_long_names_are_cut_in_front() -> None:
    svg = to_svg([Event("folded", 0, "module/" * 30 + "norm", "2x5")], "")
    said = [t.text or "" for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert max(map(len, said)) <= 56
    assert said[1].endswith("module/norm")
    assert said[1].startswith("\N{HORIZONTAL ELLIPSIS}")


def test_no_layernorm() -> None:
    report = jax_lnfold.analyze(lambda w, x: x @ w, jnp.ones((7, 3)), jnp.ones((2, 7)))
    (text,) = ElementTree.fromstring(report.to_svg()).iter(f"{SVG}text")
    assert text.text == "No LayerNorm found"
    assert report.to_dot().count("->") == 0


@pytest.mark.parametrize("name", ["vit", "bert", "qk_norm_split"])
def test_dot(name: str) -> None:
    report = report_of(name)
    dot, layout = report.to_dot(), lay_out(report.events)
    bare = re.sub(r'"(\\.|[^"\\])*"', '""', dot)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"^ n\d+ \[", dot, re.M)) == len(layout.rows)
    assert len(re.findall(r"subgraph cluster_\d+", dot)) == len(layout.boxes)
    arrows = set(re.findall(r"([ns]\d+) -> ([ns]\d+);", dot))
    for i, row in enumerate(layout.rows):
        reads = row.events[0].kind in ("folded", "left", "noticed")
        assert ((f"s{i}", f"n{i}") if reads else (f"n{i}", f"s{i}")) in arrows


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    README_PICTURE.write_text(readme_picture(), "utf-8")


ODD = "\x1b[31m\x00\x07\x9b\ufffe\ud800\n"
"""Names that neither a terminal nor XML may see as they are."""


def test_odd_names() -> None:
    def layer_norm(x: jax.Array) -> jax.Array:
        with jax.named_scope(f"norm{ODD}"):
            c = x - x.mean(-1, keepdims=True)
            return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)

    def model(p: dict[str, Any], x: jax.Array) -> jax.Array:
        with jax.named_scope(f"block{ODD}"):
            x = layer_norm(x @ p[f"stem{ODD}"])
            y = layer_norm(jnp.tanh(x) @ p[f"mix{ODD}"] * p[f"mix{ODD}"].sum())
            return layer_norm(jnp.tanh(y)), layer_norm(jnp.tanh(x) @ p["head"] + jnp.sort(x))

    params = {f"stem{ODD}": jnp.ones((3, 4)), f"mix{ODD}": jnp.ones((4, 4)), "head": jnp.eye(4)}
    report = jax_lnfold.analyze(model, params, jnp.ones((2, 3)))
    assert 0 < report.n_folded < len(report.norms)
    escaped = r"\x1b[31m\x00\x07\x9b\ufffe\ud800\n"
    svg, dot = report.to_svg(), report.to_dot()
    ElementTree.fromstring(svg)
    assert f"stem{escaped}" in svg
    lines = [*str(report).split("\n"), *report._repr_html_().split("\n"), *dot.split("\n")]
    lines += [*svg.split("\n"), *map(str, (*report.edits, *report.insertions))]
    assert [line for line in lines if not line.isprintable()] == []
    assert escaped in report._repr_html_()


def test_each_kind_has_a_symbol_of_its_own() -> None:
    """Told apart without colours and arrows, in the legend, too."""
    kinds = "edited written inserted folded left blocked noticed".split()
    root = ElementTree.fromstring(to_svg([Event(k, 0, k) for k in kinds], "all kinds"))
    legend = root.findall(f"{SVG}g")[-len(kinds) :]
    assert len(legend) == len(kinds)
    shapes = {
        tuple(
            (part.tag, *re.findall("[a-z]", part.get("d", "")), part.get("class"))
            for part in group
            if part.tag != f"{SVG}text"
        )
        for group in legend
    }
    assert len(shapes) == len(kinds)
