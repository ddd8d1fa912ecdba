"""LayerNorms are called after their module, their place in the tree, or their line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import jax_lnfold

Array = jax.Array
Tree = Any
B, T, DIN, D, OUT, L, MEMBERS = 2, 5, 7, 12, 3, 4, 6  # no two axes of equal size


def ones(*shape: int) -> Array:
    return jnp.ones(shape, jnp.float32)


X = ones(B, T, DIN)
TREE = {
    "stem": ones(DIN, D),
    "ln": {"scale": ones(D), "shift": ones(D), "other": ones(D), "number": ones()},
    "tokens": {"each": ones(T), "all": ones(T, D)},
    "head": {"kernel": ones(D, D)},
    "blocks": {"norm": {"scale": ones(L, D)}, "out": {"kernel": ones(L, D, D)}},
    "flat": ones(D),
}


def std(x: Array) -> Array:
    c = x - x.mean(-1, keepdims=True)
    return c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 0.1)


LINE = f"test_names.py:{std.__code__.co_firstlineno + 2}"


def one_pass(x: Array, scale: Array, shift: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    scale = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean) + 0.1) * scale
    return x * scale + (shift - mean * scale)


def names(apply: Callable[..., Any], tree: Tree = TREE, *inputs: Any) -> list[tuple[str, str]]:
    """What tables show, and the key path, of each LayerNorm."""
    report = jax_lnfold.analyze(apply, tree, *(inputs or (X,)))
    return [(norm.title, norm.key_path) for norm in report.norms]


def stem(p: Tree, x: Array) -> Array:
    return x @ p["stem"]


LN = ("ln (" + LINE + ")", "ln/scale")
SHIFT = ("ln (" + LINE + ")", "ln/shift")
NONE = (LINE, "")

ONE: dict[str, tuple[Callable[[Any, Array], Any], tuple[str, str]]] = {
    "scale and shift": (lambda p, s: std(s) * p["ln"]["scale"] + p["ln"]["shift"], LN),
    "scale on the left": (lambda p, s: p["ln"]["scale"] * std(s), LN),
    "shift alone": (lambda p, s: std(s) + p["ln"]["shift"], SHIFT),
    "shift, then scale of the sum": (
        lambda p, s: (std(s) + p["ln"]["shift"]) * p["ln"]["scale"],
        SHIFT,
    ),
    "1 + s": (lambda p, s: std(s) * (1 + p["ln"]["scale"]), LN),
    "s - 1": (lambda p, s: std(s) * (p["ln"]["scale"] - 1), LN),
    "times a constant": (lambda p, s: std(s) * 3 * p["ln"]["scale"], LN),
    "scale times a constant": (lambda p, s: std(s) * (p["ln"]["scale"] * 3), LN),
    "negated": (lambda p, s: -std(s) * -p["ln"]["scale"], LN),
    "one number": (
        lambda p, s: std(s) * p["ln"]["number"],
        ("ln (" + LINE + ")", "ln/number"),
    ),
    "the first of two": (
        lambda p, s: std(s) * p["ln"]["other"] * p["ln"]["scale"],
        (LN[0], "ln/other"),
    ),
    "two uses": (
        lambda p, s: ((y := std(s)) * p["ln"]["scale"], y * p["ln"]["other"]),
        LN,
    ),
    "scale on the centered": (
        lambda p, s: (
            (c := s - s.mean(-1, keepdims=True))
            * p["ln"]["scale"]
            / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 0.1)
        ),
        ("ln", "ln/scale"),
    ),
    "one pass": (
        lambda p, s: one_pass(s, p["ln"]["scale"], p["ln"]["shift"]),
        (f"ln (test_names.py:{one_pass.__code__.co_firstlineno + 2})", "ln/scale"),
    ),
    "in half precision": (
        lambda p, s: std(s).astype(jnp.bfloat16) * p["ln"]["scale"].astype(jnp.bfloat16),
        LN,
    ),
    "transposed": (
        lambda p, s: std(s).transpose(0, 2, 1) * p["ln"]["scale"][:, None],
        LN,
    ),
    "in a call": (
        lambda p, s: jax.jit(lambda y, g: jax.checkpoint(jnp.multiply)(y, g))(
            std(s), p["ln"]["scale"]
        ),
        LN,
    ),
    "a row": (
        lambda p, s: std(s) * p["blocks"]["norm"]["scale"][2],
        (f"blocks/norm ({LINE})", "blocks/norm/scale"),
    ),
    "flat": (lambda p, s: std(s) * p["flat"], (f"{LINE} (flat)", "flat")),
    # near misses
    "bare": (lambda p, s: std(s), NONE),
    "a scale of data": (lambda p, s: std(s) * jnp.tanh(s), NONE),
    "a gate that is scaled": (lambda p, s: std(s) * (jnp.tanh(s) * p["ln"]["scale"]), NONE),
    "gated first": (lambda p, s: std(s) * jnp.tanh(s) * p["ln"]["scale"], NONE),
    "a function of a parameter": (lambda p, s: std(s) * jnp.exp(p["ln"]["scale"]), NONE),
    "the sum with the stream": (lambda p, s: (std(s) + s) * p["ln"]["scale"], NONE),
    "the stream": (lambda p, s: std(s * p["ln"]["scale"]), NONE),
    "a parameter per token": (lambda p, s: std(s) * p["tokens"]["each"][:, None], NONE),
    "a parameter per token and feature": (lambda p, s: std(s) * p["tokens"]["all"], NONE),
    "behind a nonlinearity": (lambda p, s: jnp.tanh(std(s)) * p["ln"]["scale"], NONE),
    "behind a matrix": (lambda p, s: std(s) @ p["head"]["kernel"] * p["ln"]["scale"], NONE),
}


@pytest.mark.parametrize(("body", "expected"), ONE.values(), ids=ONE)
def test_one_norm(body: Callable[[Any, Array], Any], expected: tuple[str, str]) -> None:
    ((title, key_path),) = names(lambda p, x: body(p, stem(p, x)))
    if expected[0] == "ln":  # at its own line
        title = title.split(" (")[0]
    assert (title, key_path) == expected


def test_a_row_that_the_data_choose_is_no_scale() -> None:
    def apply(p: Tree, x: Array, i: Any) -> Array:
        return std(stem(p, x)) * p["blocks"]["norm"]["scale"][i]

    assert names(apply, TREE, X, 2) == [NONE]
    assert names(apply, TREE, X, jnp.zeros((B, T), int)) == [NONE]


# --- several -------------------------------------------------------------------------------------

BLOCK = (f"blocks/norm ({LINE})", "blocks/norm/scale")


def in_scan(p: Tree, x: Array) -> Array:
    def block(s: Array, q: Tree) -> tuple[Array, None]:
        return s + std(s) * q["norm"]["scale"] @ q["out"]["kernel"], None

    s, _ = lax.scan(block, stem(p, x), p["blocks"])
    return std(s) * p["ln"]["scale"]


def in_fori_loop(p: Tree, x: Array) -> Array:
    def block(i: Any, s: Array) -> Array:
        q = jax.tree.map(lambda leaf: leaf[i], p["blocks"])
        return s + std(s) * q["norm"]["scale"] @ q["out"]["kernel"]

    return std(lax.fori_loop(0, L, block, stem(p, x))) * p["ln"]["scale"]


@pytest.mark.parametrize("apply", [in_scan, in_fori_loop])
def test_stacked_layers(apply: Callable[..., Array]) -> None:
    assert names(apply) == [BLOCK, LN]


def test_several_functions() -> None:
    functions = {"scan": in_scan, "bare": lambda p, x: std(stem(p, x))}
    expected = [(f"scan/{BLOCK[0]}", BLOCK[1]), (f"scan/{LN[0]}", LN[1]), (f"bare ({LINE})", "")]
    assert names(functions, TREE, {"scan": X, "bare": X}) == expected  # type: ignore[arg-type]
    served = jax_lnfold.fold(functions, TREE, {"scan": X, "bare": X})
    assert [(norm.title, norm.key_path) for norm in served.report.norms] == expected
    alone = [(norm.title, norm.key_path) for norm in served["scan"].report.norms]
    assert alone == [BLOCK, LN]


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None)])
def test_members(in_axes: tuple[int | None, ...]) -> None:
    """A scale for each member of an ensemble is one."""
    members = jax.tree.map(lambda leaf: jnp.stack([leaf] * MEMBERS), TREE)
    x = ones(MEMBERS, *X.shape) if in_axes[1] == 0 else X
    apply = jax.vmap(lambda p, x: std(stem(p, x)) * p["ln"]["scale"], in_axes)
    assert names(apply, members, x) == [LN]
    apply = jax.vmap(lambda p, x: std(stem(p, x)) * p["tokens"]["all"], in_axes)
    assert names(apply, members, x) == [NONE]


def test_one_scale_of_two_norms() -> None:
    def apply(p: Tree, x: Array) -> Array:
        s = stem(p, x)
        s = s + std(s) * p["ln"]["scale"] @ p["head"]["kernel"]
        return std(s) * p["ln"]["scale"]

    assert names(apply) == [LN, LN]


def test_two_scales_of_one_part() -> None:
    def apply(p: Tree, x: Array) -> Array:
        s = stem(p, x)
        s = s + std(s) * p["ln"]["other"] @ p["head"]["kernel"]
        return std(s) * p["ln"]["scale"]

    assert names(apply) == [
        (f"ln/other ({LINE})", "ln/other"),
        (f"ln/scale ({LINE})", "ln/scale"),
    ]


def test_norms_that_nothing_tells_apart_are_numbered() -> None:
    def apply(p: Tree, x: Array) -> Array:
        s = stem(p, x)
        for _ in range(3):
            s = s + std(s) @ p["head"]["kernel"]
        return std(s) * p["ln"]["scale"]

    assert names(apply) == [*((f"{LINE} #{n}", "") for n in (1, 2, 3)), LN]
    report = jax_lnfold.analyze(apply, TREE, X)
    assert f"{LINE} #{{1-3}} x3" in report._repr_html_()


def test_norms_of_one_scope_are_told_apart() -> None:
    def apply(p: Tree, x: Array) -> Array:
        with jax.named_scope("encoder"):
            s = std(stem(p, x)) * p["ln"]["scale"]
            s = std(s @ p["head"]["kernel"]) * p["ln"]["other"]
        with jax.named_scope("decoder"):
            return std(s @ p["head"]["kernel"])

    assert names(apply) == [
        ("encoder (ln/scale)", "ln/scale"),
        ("encoder (ln/other)", "ln/other"),
        ("decoder", ""),
    ]


def test_fields() -> None:
    (norm,) = jax_lnfold.analyze(lambda p, x: std(stem(p, x)) * p["ln"]["scale"], TREE, X).norms
    assert (norm.path, norm.part, norm.line) == ("ln", "ln", LINE)
    (norm,) = jax_lnfold.analyze(lambda p, x: std(stem(p, x)), TREE, X).norms
    assert (norm.path, norm.title, norm.part, norm.line) == (LINE, LINE, "", LINE)


def test_pictures_show_the_names() -> None:
    report = jax_lnfold.analyze(in_scan, TREE, X)
    for picture in (report.to_svg(), report.to_dot()):
        assert "blocks/norm" in picture
        assert f"{B}x{T}x{D} {LINE}" in picture


# --- frameworks ----------------------------------------------------------------------------------


def test_linen() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            s = nn.Dense(D, name="stem")(x)
            s = s + nn.Dense(D)(nn.LayerNorm(name="first")(s))
            norm = nn.LayerNorm(name="again", use_scale=False)
            return norm(norm(s) * 2)

    model = Model()
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    assert names(model.apply, shapes) == [
        ("Model/first", "params/first/scale"),
        ("Model/again", "params/again/bias"),
        ("Model/again", "params/again/bias"),
    ]


def test_nnx() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.stem = nnx.Linear(DIN, D, rngs=rngs)
            self.norms = nnx.List(
                [
                    nnx.LayerNorm(D, rngs=rngs),
                    nnx.LayerNorm(D, rngs=rngs, use_scale=False),
                    nnx.LayerNorm(D, rngs=rngs, use_scale=False, use_bias=False),
                ]
            )

        def __call__(self, x: Array) -> Array:
            s = self.stem(x)
            for norm in self.norms:
                s = s + jnp.tanh(norm(s))
            return s

    graphdef, state = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    apply = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    report = jax_lnfold.analyze(apply, state, X)
    line = f"test_names.py:{Model.__call__.__code__.co_firstlineno + 3}"
    assert [norm.title for norm in report.norms] == [f"norms/{i} ({line})" for i in (0, 1)] + [line]
    paths = [norm.key_path.removesuffix("/value") for norm in report.norms]
    assert paths == ["norms/0/scale", "norms/1/bias", ""]
    assert [norm.part for norm in report.norms] == ["norms/0", "norms/1", ""]


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 2)
    layers = [
        eqx.nn.Linear(DIN, D, key=keys[0]),
        eqx.nn.LayerNorm(D),
        eqx.nn.Linear(D, OUT, key=keys[1]),
        eqx.nn.LayerNorm(OUT, use_weight=False),
    ]
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    apply = lambda p, x: jax.vmap(jax.vmap(eqx.combine(p, static)))(x)  # noqa: E731
    line = f"test_names.py:{apply.__code__.co_firstlineno}"
    assert names(apply, params) == [
        (f"layers/1 ({line})", "layers/1/weight"),
        (f"layers/3 ({line})", "layers/3/bias"),
    ]


def test_haiku() -> None:
    hk = pytest.importorskip("haiku")

    def forward(x: Array) -> Array:
        s = hk.LayerNorm(-1, True, True, name="first")(hk.Linear(D)(x))
        return hk.LayerNorm(-1, True, True)(hk.Linear(OUT)(s))

    model = hk.without_apply_rng(hk.transform(forward))
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    assert names(model.apply, shapes) == [
        ("first", "first/scale"),
        ("layer_norm", "layer_norm/scale"),
    ]
