"""Every sentence of a report is true of the program, and its advice is of use.

Small programs, one for each kind of thing in the way, stand next to others that look alike.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.experimental.pallas import pallas_call

import jax_lnfold
from jax_lnfold.program.tracing import trace
from jax_lnfold.report.report import Report
from jax_lnfold.report.summary import summary

D = 12
NO_MEAN = "does not carry a zero mean from its operands to its result"
NONLINEARITY = "end with a linear layer after this nonlinearity"
LAST = "end with a linear layer after it"
REWRITE = f"write this operation with primitives that have a rule, or {LAST}"

strange = jax.extend.core.Primitive("strange")
strange.def_impl(jnp.sin)
strange.def_abstract_eval(lambda s: s)


def of(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {"stem": of(7, D), "first": of(D, D), "second": of(D, D), "head": of(D, 3)}
X = of(2, 5, 7)
Start = Callable[[Any, jax.Array], jax.Array]


def report_of(apply: Callable[..., Any], params: Any = PARAMS, x: Any = X) -> Report:
    return jax_lnfold.analyze(apply, params, x)


def stream(start: Start) -> Callable[[Any, jax.Array], jax.Array]:
    """Two pre-LN layers and a head on a stream that begins with `start`."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        s = start(p, x)
        for name in ("first", "second"):
            s = s + jax.nn.standardize(s) @ p[name]
        return jax.nn.standardize(s) @ p["head"]

    return apply


def stem(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["stem"]


def pooled(combine: Callable[..., Any], first: float) -> Start:
    def start(p: Any, x: jax.Array) -> jax.Array:
        return lax.reduce_window(stem(p, x), first, combine, (1, 2, 1), (1, 1, 1), "SAME")

    return start


def on_host(p: Any, x: jax.Array) -> jax.Array:
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((2, 5, D), x.dtype), stem(p, x))


class Told(NamedTuple):
    """What is said of a centering inserted where a stream begins."""

    start: Start
    primitive: str
    why: str
    advice: str


STARTS: dict[str, Told] = {
    "tanh": Told(lambda p, x: jnp.tanh(stem(p, x)), "tanh", NO_MEAN, NONLINEARITY),
    "max pooling": Told(pooled(lax.max, -jnp.inf), "reduce_window_max", NO_MEAN, NONLINEARITY),
    "min pooling": Told(pooled(lax.min, jnp.inf), "reduce_window_min", NO_MEAN, NONLINEARITY),
    "largest so far": Told(
        lambda p, x: lax.cummax(stem(p, x), axis=1), "cummax", NO_MEAN, NONLINEARITY
    ),
    "softmax": Told(lambda p, x: jax.nn.softmax(stem(p, x)), "exp", NO_MEAN, NONLINEARITY),
    "an order": Told(
        lambda p, x: jnp.sort(stem(p, x)),
        "sort",
        "passes on neither means nor shifts, as it puts in an order",
        LAST,
    ),
    "a primitive of somebody else": Told(
        lambda p, x: strange.bind(stem(p, x)),
        "strange",
        "has no rule: what it does to means and shifts is not known",
        REWRITE,
    ),
    "a callback": Told(
        on_host,
        "pure_callback",
        "is not looked into, as it runs a program that is no jaxpr, or not here",
        REWRITE,
    ),
}


@pytest.mark.parametrize("told", STARTS.values(), ids=STARTS)
def test_where_a_stream_begins(told: Told) -> None:
    (insertion,) = report_of(stream(told.start)).insertions
    assert insertion.reason.startswith(f"`{told.primitive}` (test_words.py:")
    assert insertion.reason.endswith(f") {told.why}")
    assert insertion.advice == told.advice


@pytest.mark.parametrize("case", STARTS)
def test_a_linear_layer_last_is_a_cure(case: str) -> None:
    def start(p: Any, x: jax.Array) -> jax.Array:
        return STARTS[case].start(p, x) @ p["last"]

    last = {"last": of(D, D)}
    report = report_of(stream(start), PARAMS | last)
    assert (report.n_folded, report.n_inserted) == (3, 0)


def test_average_pooling_needs_no_words() -> None:
    report = report_of(stream(pooled(lax.add, 0.0)))
    assert (report.n_folded, report.n_inserted) == (3, 0)


def test_only_what_has_no_rule_is_counted() -> None:
    unknown = {"a primitive of somebody else": "strange", "a callback": "pure_callback"}
    for case, told in STARTS.items():
        expected = {unknown[case]: 1} if case in unknown else {}
        assert report_of(stream(told.start)).opaque == expected


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (jnp.tanh, "notices a shift of its operand"),
        (jnp.sort, "passes on neither means nor shifts, as it puts in an order"),
        (strange.bind, "has no rule: what it does to means and shifts is not known"),
    ],
)
def test_who_else_reads_a_stream(read: Callable[[Any], Any], why: str) -> None:
    def apply(p: Any, x: jax.Array) -> Any:
        s = stem(p, x)
        return jax.nn.standardize(s) @ p["head"], read(s)

    (norm,) = report_of(apply).norms
    assert norm.reason.endswith(f") {why}")


# --- scales and gates ----------------------------------------------------------------------------

PRE_LN = "normalise inside the branch (pre-LN): here a LayerNorm's scale writes last"
BATCH_NORM = "normalise inside the branch: here a BatchNorm's scale writes last"
MERGE = "merge this scale into the linear layer before it"
GATE = "gate by one number per token or per head instead of one per channel"
VECTORS = {name: of(D) for name in ("g", "b", "g2")}
GATED = PARAMS | VECTORS | {"table": of(5, D)}
GATED |= {name: of(D, D) for name in ("gate", "gate2")}


def normalised(s: jax.Array) -> jax.Array:
    return jax.nn.standardize(s, epsilon=1e-6)


def root_mean_square(s: jax.Array) -> jax.Array:
    return s * lax.rsqrt(jnp.mean(s * s, -1, keepdims=True) + 1e-6)


def scale_on_root(p: Any, s: jax.Array) -> jax.Array:
    """As Flax writes it: the scale is multiplied to the root first."""
    centered = s - s.mean(-1, keepdims=True)
    return centered * (lax.rsqrt(s.var(-1, keepdims=True) + 1e-6) * p["g"]) + p["b"]


def scale_apart(p: Any, s: jax.Array) -> jax.Array:
    """No difference is formed: ``x a - mean a``, with a scale in a."""
    a = p["g"] / jnp.sqrt(s.var(-1, keepdims=True) + 1e-6)
    return s * a + (p["b"] - s.mean(-1, keepdims=True) * a)


def of_batch(p: Any, s: jax.Array) -> jax.Array:
    root = lax.rsqrt(s.var((0, 1)) + 1e-6)
    return (s - s.mean((0, 1))) * (root * p["g"]) + p["b"]


def with_statistics(p: Any, s: jax.Array) -> jax.Array:
    return (s - p["b"]) * (lax.rsqrt(p["g2"] + 1e-6) * p["g"])


def on_stem(write: Callable[[Any, jax.Array], jax.Array]) -> Start:
    return lambda p, x: write(p, stem(p, x))


SCALED: dict[str, tuple[Start, str]] = {
    "a LayerNorm's scale": (on_stem(lambda p, s: normalised(s) * p["g"]), PRE_LN),
    "the scale first": (on_stem(lambda p, s: p["g"] * normalised(s)), PRE_LN),
    "on the root": (on_stem(scale_on_root), PRE_LN),
    "apart": (on_stem(scale_apart), PRE_LN),
    "one plus a scale": (on_stem(lambda p, s: normalised(s) * (1 + p["g"])), PRE_LN),
    "a divisor": (on_stem(lambda p, s: normalised(s) / p["g"]), PRE_LN),
    "a scale from data": (
        on_stem(lambda p, s: normalised(s) * (1 + jnp.tanh(s[:, :1] @ p["gate"]))),
        PRE_LN,
    ),
    "a gate behind a LayerNorm's shift": (
        on_stem(lambda p, s: (normalised(s) * p["g"] + p["b"]) * (s[:, :1] @ p["gate"])),
        GATE,
    ),
    "a gate from data": (on_stem(lambda p, s: s * jnp.tanh(s[:, :1] @ p["gate"])), GATE),
    "a gated layer": (on_stem(lambda p, s: jax.nn.sigmoid(s @ p["gate"]) * (s @ p["gate2"])), GATE),
    "a scale of a nonlinearity": (
        on_stem(lambda p, s: jnp.tanh(s) * p["g"]),
        "end with a linear layer after this scale",
    ),
    "an RMSNorm's scale": (
        on_stem(lambda p, s: root_mean_square(s) * p["g"]),
        "end with a linear layer after this scale",
    ),
    "a product with itself": (on_stem(lambda p, s: s * s), NONLINEARITY),
    "a swish": (on_stem(lambda p, s: s * jax.nn.sigmoid(s)), NONLINEARITY),
    "a quotient": (on_stem(lambda p, s: p["g"] / s), NONLINEARITY),
    "a table of scales": (on_stem(lambda p, s: s * p["table"]), ""),
    "a BatchNorm in training": (on_stem(of_batch), BATCH_NORM),
}


@pytest.mark.parametrize(("start", "expected"), SCALED.values(), ids=SCALED)
def test_scales_and_gates(start: Start, expected: str) -> None:
    (insertion,) = report_of(stream(start), GATED).insertions
    assert insertion.advice == expected


def test_scales_that_a_layer_takes_up_need_no_words() -> None:
    for start in (on_stem(lambda p, s: s * p["g"]), on_stem(with_statistics)):
        report = report_of(stream(start), GATED)
        assert report.n_inserted == 0 or report.insertions[0].advice == MERGE


def test_a_scale_that_is_read_twice_could_be_merged_by_hand() -> None:
    def start(p: Any, x: jax.Array) -> jax.Array:
        s = stem(p, x)
        return s * p["g"] + jnp.tanh(s).sum(-1, keepdims=True)

    for insertion in report_of(stream(start), GATED).insertions:
        assert insertion.advice == MERGE


def linen_tower() -> tuple[Callable[..., Any], Any]:
    class Tower(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            s = linen.LayerNorm()(linen.Dense(D)(x))
            for _ in range(2):
                s = s + linen.Dense(D)(linen.LayerNorm()(s))
            return linen.Dense(3)(linen.LayerNorm()(s))

    tower = Tower()
    return tower.apply, jax.eval_shape(tower.init, jax.random.key(0), X)


def nnx_tower() -> tuple[Callable[..., Any], Any]:
    class Tower(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.stem, self.head = nnx.Linear(7, D, rngs=rngs), nnx.Linear(D, 3, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(4)])
            self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])

        def __call__(self, x: jax.Array) -> jax.Array:
            s = self.norms[0](self.stem(x))
            for norm, layer in zip(self.norms[1:3], self.layers, strict=True):
                s = s + layer(norm(s))
            return self.head(self.norms[3](s))

    graph, state = nnx.split(Tower(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


def equinox_tower() -> tuple[Callable[..., Any], Any]:
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((7, D), (D, D), (D, D), (D, 3))
    layers = [eqx.nn.Linear(*size, key=key) for size, key in zip(sizes, keys, strict=True)]
    tree, static = eqx.partition((layers, [eqx.nn.LayerNorm(D) for _ in sizes]), eqx.is_array)

    def one(layers: Any, norms: Any, x: jax.Array) -> jax.Array:
        s = norms[0](layers[0](x))
        for norm, layer in zip(norms[1:3], layers[1:3], strict=True):
            s = s + layer(norm(s))
        return layers[3](norms[3](s))

    def apply(tree: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(partial(one, *eqx.combine(tree, static))))(x)

    return apply, tree


def plain_tower() -> tuple[Callable[..., Any], Any]:
    return stream(on_stem(scale_on_root)), GATED


@pytest.mark.parametrize(
    ("build", "scale"),
    [
        (linen_tower, "a LayerNorm's scale"),
        (nnx_tower, "the scale of the LayerNorm `norms/0`"),
        (equinox_tower, "the scale of the LayerNorm `1/0`"),
        (plain_tower, "a LayerNorm's scale"),
    ],
)
def test_a_layer_norm_is_known_by_its_arithmetic(
    build: Callable[[], tuple[Callable[..., Any], Any]], scale: str
) -> None:
    apply, params = build()
    report = report_of(apply, params)
    (insertion,) = report.insertions
    advice = PRE_LN.replace("a LayerNorm's scale", scale)
    assert (report.n_folded, insertion.advice) == (4, advice)
    assert "`mul` (" in insertion.reason
    assert "test_words.py:" in insertion.reason


# --- source lines --------------------------------------------------------------------------------

MODEL = """
import jax, jax.numpy as jnp

def norm(p, s):
    return jax.nn.standardize(s) * p["g"] + p["b"]

def block(p, s):
    return s + jnp.tanh(norm(p, s)) @ p["first"]

def model(p, x):
    s = jnp.tanh(x @ p["stem"])
    for _ in range(2):
        s = block(p, s)
    return norm(p, s) @ p["head"]
"""


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that is defined in an installed package."""
    folder = tmp_path / "lib" / "site-packages"
    folder.mkdir(parents=True)
    (folder / "packaged_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "packaged_model", raising=False)
    return importlib.import_module("packaged_model")


def test_lines_of_a_model_in_a_package(packaged: Any) -> None:
    for apply in (packaged.model, lambda p, x: packaged.model(p, x)):
        report = report_of(apply, GATED)
        assert {norm.path for norm in report.norms} == {"packaged_model.py:5"}
        (insertion,) = report.insertions
        assert insertion.after == "`tanh` (packaged_model.py:11)"


def test_lines_of_a_model_of_ones_own_with_layers_of_a_package(packaged: Any) -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        s = jnp.tanh(x @ p["stem"])
        s = s + packaged.norm(p, s) @ p["first"]
        s = packaged.block(p, s)
        return packaged.norm(p, s) @ p["head"]

    report = report_of(apply, GATED)
    start = apply.__code__.co_firstlineno
    assert [norm.path for norm in report.norms] == [f"test_words.py:{start + n}" for n in (2, 3, 4)]


@pytest.mark.parametrize("build", [linen_tower, nnx_tower, equinox_tower, plain_tower])
def test_no_line_of_a_framework(build: Callable[[], tuple[Callable[..., Any], Any]]) -> None:
    apply, params = build()
    graph = trace(apply, params, (X,)).graph()
    assert {Path(op.location().file).name for op in graph.ops} <= {"test_words.py", ""}
    assert any(op.location().line for op in graph.ops)


def test_a_layer_of_a_framework_alone_has_no_line() -> None:
    norm = linen.LayerNorm()
    graph = trace(norm.apply, norm.init(jax.random.key(0), jnp.ones((2, D))), (jnp.ones((2, D)),))
    assert {op.location().where for op in graph.graph().ops} == {""}


# --- outputs and parameters ----------------------------------------------------------------------

RETURN = "return the normalised values instead of the stream itself"
LEAVE_OUT = f"{RETURN}. Or leave this output out"
NOT_CENTERED = "a parameter that feeds it cannot be centered"


class Pair(NamedTuple):
    logits: Any
    aux: Any


RETURNED: dict[str, tuple[Callable[[Any, Any, Any], Any], str, str]] = {
    "second of two": (lambda y, s, t: (y, s), "`[1]`", "[0]"),
    "first of two": (lambda y, s, t: (s, y), "`[0]`", "[1]"),
    "inside of the second": (lambda y, s, t: (y, {"stem": s, "x": y}), "`[1]['stem']`", "[0]"),
    "of three": (lambda y, s, t: (y, y + 1, s), "`[2]`", ""),
    "by name": (lambda y, s, t: {"logits": y, "aux": s}, "`['aux']`", "['logits']"),
    "by attribute": (lambda y, s, t: Pair(y, s), "`.aux`", ".logits"),
    "twice": (lambda y, s, t: (y, [s, {"again": s}]), "`[1][0]`, `[1][1]['again']`", "[0]"),
    "on both sides": (lambda y, s, t: ([y, s], s), "`[0][1]`, `[1]`", ""),
    "next to another stream": (lambda y, s, t: (y, {"s": s, "t": t}), "`[1]['s']`", "[0]"),
}


@pytest.mark.parametrize(("outputs", "named", "rest"), RETURNED.values(), ids=RETURNED)
def test_which_output_it_is(outputs: Callable[[Any, Any, Any], Any], named: str, rest: str) -> None:
    def apply(p: Any, x: jax.Array) -> Any:
        s = stem(p, x)
        return outputs(jax.nn.standardize(s) @ p["head"], s, jnp.tanh(x))

    (norm,) = report_of(apply).norms
    assert norm.reason == (
        f"{NOT_CENTERED}: `dot_general` (test_words.py:{stem.__code__.co_firstlineno + 1}) makes "
        f"a value that is an output: {named}"
    )
    example = f": `lambda params, *inputs: apply(params, *inputs){rest}`" if rest else ""
    assert norm.advice == LEAVE_OUT + example
    if rest:
        cured = eval("lambda params, *inputs: apply(params, *inputs)" + rest, {"apply": apply})
        assert report_of(cured).n_folded == 1


def test_the_only_output_is_not_left_out() -> None:
    report = report_of(lambda p, x: (s := stem(p, x)) + jax.nn.standardize(s))
    assert [norm.advice for norm in report.norms] == [RETURN]
    report = report_of(lambda p, x: lax.optimization_barrier((stem(p, x),)))
    assert report.norms == ()

    def apply(p: Any, x: jax.Array) -> Any:
        s = stem(p, x)
        jax.debug.callback(lambda y: None, jax.nn.standardize(s))
        return s

    (norm,) = report_of(apply).norms
    assert norm.reason.endswith("makes a value that is an output")
    assert norm.advice == RETURN


def test_a_parameter_that_is_returned() -> None:
    def apply(p: Any, x: jax.Array) -> Any:
        return jax.nn.standardize(stem(p, x)) @ p["head"], p["stem"]

    (norm,) = report_of(apply).norms
    assert norm.reason == (
        f"{NOT_CENTERED}: what it is given makes a value that is an output: `[1]`"
    )
    assert norm.advice.endswith("apply(params, *inputs)[0]`")


def test_which_parameter_it_is() -> None:
    def apply(p: Any, x: jax.Array) -> Any:
        s = (x @ p["stem"])[:, :, :] @ p["first"]
        return jax.nn.standardize(s) @ p["head"] + jnp.tanh(p["first"]).sum()

    (norm,) = report_of(apply).norms
    assert norm.reason.startswith(f"{NOT_CENTERED}: `tanh` (test_words.py:")
    assert norm.reason.endswith(") notices a shift of its operand; this parameter is `first`")
    assert norm.advice == "give this operation a parameter of its own (untie it)"


# --- without LayerNorms --------------------------------------------------------------------------

NOTHING = "No LayerNorm found; nothing was changed."
AFFINE = VECTORS | {"stem": of(7, D), "w": of(D, 3), "c": of(3)}


def scaled_rms(p: Any, x: jax.Array) -> jax.Array:
    return (root_mean_square(stem(p, x)) * p["g"]) @ p["w"] + p["c"]


def test_what_is_changed_without_layer_norms() -> None:
    def folded(**options: Any) -> list[str]:
        return summary(jax_lnfold.analyze(scaled_rms, AFFINE, X, **options))

    assert folded() == [NOTHING]
    assert folded(fold_affine=True) == ["No LayerNorm found, 1 scale or shift taken up (192 B)."]
    assert folded(fold_affine=True, defer_scale=True, deferred_cost=0.0) == [
        "No LayerNorm found, 1 scale or shift taken up (192 B).",
        "1 scale deferred behind matrix products.",
    ]

    def twice(p: Any, x: jax.Array) -> Any:
        h = root_mean_square(stem(p, x)) * p["g"]
        return h @ p["w"], h

    first, *others = summary(jax_lnfold.analyze(twice, AFFINE, X, fold_affine=True))
    assert first == NOTHING
    assert others[0].startswith("Scale `g` stays: ")


def norm_on_host(s: Any) -> Any:
    return jax.pure_callback(lambda s: s, jax.ShapeDtypeStruct(s.shape, s.dtype), s)


def exported(s: Any) -> Any:
    shape = jax.ShapeDtypeStruct(s.shape, s.dtype)
    return jax.export.export(jax.jit(jax.nn.standardize))(shape).call(s)


def in_kernel(s: Any) -> Any:
    def kernel(x: Any, y: Any) -> None:
        y[...] = jax.nn.standardize(x[...])

    return pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(s.shape, s.dtype))(s)


HIDDEN = {
    "pure_callback": norm_on_host,
    "call_exported": exported,
    "pallas_call": in_kernel,
    "strange": strange.bind,
}


@pytest.mark.parametrize("primitive", HIDDEN)
def test_what_is_not_looked_into(primitive: str) -> None:
    hidden = HIDDEN[primitive]

    def apply(p: Any, x: jax.Array) -> Any:
        s = stem(p, x)
        for _ in range(2):
            s = s + hidden(s) @ p["first"]
        return s

    report = report_of(apply)
    ((place, count),) = report.unseen.items()
    assert (place.primitive, count) == (primitive, 2)
    assert summary(report) == [NOTHING, f"LayerNorms are not looked for inside of {place} x2."]
    both = summary(report_of(lambda p, x: jax.nn.standardize(apply(p, x)) @ p["head"]))
    assert both[0].startswith("0 of 1 LayerNorm folded")
    assert both[-1] == f"LayerNorms are not looked for inside of {place} x2."


def test_what_hides_no_layer_norm() -> None:
    def apply(p: Any, x: jax.Array) -> Any:
        s = stem(p, x)
        jax.debug.callback(lambda y: None, s)
        keep = jax.pure_callback(lambda k: k, jax.ShapeDtypeStruct((2,), bool), s[:, 0, 0] > 0)
        noise = jax.random.normal(jax.random.key(0), s.shape)
        return jnp.sort(lax.cummax(s, axis=1)) * keep[:, None, None] + noise

    report = report_of(apply)
    assert report.unseen == {}
    assert summary(report) == [NOTHING]


# --- nothing of a kind that is not there ---------------------------------------------------------

ALONG = f"{NONLINEARITY}, along the mean: the product behind it is along other axes"
INPUT = "center this input before the call, or begin with a linear layer"
STORE = "store this, which is made of parameters alone, as a parameter"
THROUGH = "let this operation read the stream through a LayerNorm"
UNTIE = "give this operation a parameter of its own (untie it)"
MIXED = GATED | {"tokens": of(5, 5), "tokens2": of(5, 5), "channels": of(D, 5, 5)}


def token_mixer(p: Any, s: jax.Array) -> jax.Array:
    h = jnp.tanh(s.mT @ p["tokens"]) @ p["tokens2"]
    return h.mT


def channel_mixer(p: Any, s: jax.Array) -> jax.Array:
    return jnp.tanh(s @ p["gate"])


def attention(p: Any, s: jax.Array) -> jax.Array:
    return jax.nn.softmax(s @ s.mT) @ jnp.tanh(s @ p["gate"])


def wide(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, D - 7)))


def noise(s: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(0), s.sum().astype(int))
    return jax.random.normal(key, s.shape)


MORE_STARTS: dict[str, tuple[Start, str]] = {
    "products of tokens behind a nonlinearity": (on_stem(token_mixer), ALONG),
    "no product behind a nonlinearity": (on_stem(channel_mixer), NONLINEARITY),
    "attention to a nonlinearity": (on_stem(attention), ALONG),
    "a product for each channel": (
        on_stem(lambda p, s: jnp.einsum("btc,cts->bsc", s, p["channels"])),
        "",
    ),
    "sums along the mean": (on_stem(lambda p, s: jnp.cumsum(s, -1)), ""),
    "a reshape across the mean": (on_stem(lambda p, s: s.reshape(2, D, 5).mT), ""),
    "elements picked along the mean": (
        on_stem(lambda p, s: jnp.take_along_axis(s, jnp.argsort(s, -1), -1)),
        "",
    ),
    "the largest token": (on_stem(lambda p, s: s - s + s.max(1, keepdims=True)), NONLINEARITY),
    "an input": (lambda p, x: wide(x), INPUT),
    "an input without a rule": (lambda p, x: jnp.sort(wide(x)), LAST),
    "a function of a parameter": (lambda p, x: x @ jnp.tanh(p["stem"]), STORE),
    "a scaled parameter": (lambda p, x: x @ (jnp.exp(p["stem"]) * p["g"]), STORE),
    "noise": (
        on_stem(lambda p, s: s + noise(s)),
        "center this noise, or draw one number per token",
    ),
}


@pytest.mark.parametrize(("start", "expected"), MORE_STARTS.values(), ids=MORE_STARTS)
def test_advice_is_about_what_is_there(start: Start, expected: str) -> None:
    (insertion,) = report_of(stream(start), MIXED).insertions
    assert insertion.advice == expected
    assert ("linear layer" in str(insertion)) == ("linear layer" in expected)


def test_an_input_that_a_layer_norm_reads() -> None:
    (norm,) = report_of(lambda p, x: jax.nn.standardize(x) @ p["stem"]).norms
    assert norm.reason.startswith("its input is not zero-mean: it is an input of the function; ")
    assert norm.advice == INPUT
    (insertion,) = report_of(stream(lambda p, x: wide(x) + 0.0)).insertions
    assert insertion.advice == INPUT
    x = jax.ShapeDtypeStruct((2, 5, 7), jnp.int32)
    (norm,) = report_of(lambda p, x: jax.nn.standardize(x * 1.0) @ p["stem"], x=x).norms
    assert norm.advice == ""


READERS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a layer": (lambda p, s: s @ p["gate"], THROUGH),
    "a nonlinearity": (lambda p, s: jnp.tanh(s), THROUGH),
    "max pooling": (
        lambda p, s: lax.reduce_window(s, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"),
        THROUGH,
    ),
    "an order": (lambda p, s: jnp.sort(s), THROUGH),
    "what has no rule": (lambda p, s: strange.bind(s), THROUGH),
    "a product for each channel": (
        lambda p, s: jnp.einsum("btc,cts->bsc", s, p["channels"]),
        THROUGH,
    ),
    "the parameter itself": (lambda p, s: jnp.tanh(p["stem"]), UNTIE),
    "a multiple of the parameter": (lambda p, s: jnp.tanh(2 * p["stem"]), UNTIE),
    "its rows": (lambda p, s: jnp.tanh(p["stem"][:3]), UNTIE),
    "sums across the mean": (lambda p, s: jnp.cumsum(s, -1), ""),
}


@pytest.mark.parametrize(("read", "expected"), READERS.values(), ids=READERS)
def test_who_else_reads(read: Callable[[Any, Any], Any], expected: str) -> None:
    def apply(p: Any, x: jax.Array) -> Any:
        s = stem(p, x)
        return jax.nn.standardize(s) @ p["head"], read(p, s).sum()

    (norm,) = report_of(apply, MIXED).norms
    assert norm.advice == expected
