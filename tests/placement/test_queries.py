"""The scale and shift of keys go into those of queries, where that is exact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import load_file, save_file

import jax_lnfold
from jax_lnfold import FoldPlan, PlanFormatError, PlanMismatchError, TreeError
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.trees import leaf_paths
from tests.helpers.contracts import (
    check_contracts,
    count_equations,
    fold_checked,
    relative_difference,
)
from tests.models.zoo import BY_NAME
from tests.models.zoo.language import CausalLM, TextEmbed
from tests.models.zoo.layers import Attention, Block

fold_affine = partial(fold_checked, fold_affine=True)
Array = jax.Array
Params = dict[str, Array]
Apply = Callable[[Params, Array], Any]

# --- models --------------------------------------------------------------------------------------

# Leaves of keys that are merged, in two blocks; Flax's own attention has norms without a shift.
MERGED = {"vit_normalize_qk": 2, "qk_norm_stacked": 4, "qk_norm_split": 4}


def leaves_of(tree: Any) -> dict[str, Any]:
    return dict(leaf_paths(tree))


@pytest.mark.parametrize("name", MERGED)
def test_zoo(name: str) -> None:
    case = BY_NAME[name].build("one_pass")
    folded = fold_affine(case.apply_fn, case.params, *case.inputs)
    report, queries = folded.report, folded.plan.queries
    assert (report.n_folded, report.queries) == (9, queries)
    assert sum(1 + (edit.shift is not None) for edit in queries) == MERGED[name]
    for edit in queries:
        assert "k" in edit.key_path.split("/")[-2][0], edit.key_path
        assert "q" in edit.query.split("/")[-2][0], edit.query
    said = f"{MERGED[name]} scales and shifts of keys merged into those of queries"
    assert said in " ".join(str(report).split())
    left = {scale.key_path: scale.reason for scale in report.affine_left}
    assert left == {e.query: f"it has taken up that of the keys, `{e.key_path}`" for e in queries}
    leaves = leaves_of(folded.params)
    assert all((np.asarray(leaves[edit.key_path]) == 1).all() for edit in queries)
    assert folded.plan.is_centered(folded.params)


@pytest.mark.parametrize("layout", ["separate", "split", "per_head"])
def test_gpt_with_qk_norm(layout: str) -> None:
    """Masks choose between scores and the lowest number of the dtype."""
    attention = partial(Attention, layout=layout, qk_norm=nn.LayerNorm)
    block = partial(Block, nn.LayerNorm, attention)
    model = CausalLM(nn.LayerNorm, block, partial(TextEmbed, positions=16))
    ids = jax.random.randint(jax.random.key(0), (2, 7), 1, 20)
    params = moved(model.init(jax.random.key(1), ids))
    folded = fold_affine(model.apply, params, ids)
    assert len(folded.plan.queries) == 2
    for shape in ((3, 5), (1, 1)):
        check_contracts(model.apply, params, folded, jnp.ones(shape, int))


def moved(params: Any) -> Any:
    """Parameters that are neither ones nor zeros."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    new = [
        jnp.float64(x) + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return treedef.unflatten(new)


# --- what can be merged --------------------------------------------------------------------------

B, T, H, K, D = 2, 5, 3, 7, 12
SHAPES = {"wq": (D, H, K), "wk": (D, H, K), "wv": (D, H, K), "wo": (H, K, D), "wm": (D, K)}
SHAPES |= dict.fromkeys(("gq", "bq", "gk", "bk", "e"), (K,))
SHAPES |= {"hq": (H, K), "hbq": (H, K), "hk": (H, K), "hbk": (1, H, K), "pos": (T, T), "g": (4, K)}
SHAPES |= {"t": (K, 4), "tb": (4,), "sink": (H, 1, 1), "near": (T, 1, 1)}


def arrays() -> Params:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s) * 0.6 + 0.5) for k, s in SHAPES.items()}


def stream(*shape: int) -> Array:
    return jax.random.normal(jax.random.key(1), shape or (B, T, D), jnp.float64)


def normed(x: Array, scale: Any = 1, shift: Any = 0) -> Array:
    return nn.standardize(x) * scale + shift


def same(x: Any) -> Any:
    return x


SCORES = "bqhd,bkhd->bhqk"


def attention(
    scores: Callable[[Params, Array], Array] = lambda p, s: s,
    weights: Callable[[Array], Array] = nn.softmax,
    queries: Callable[[Params, Array], Array] = lambda p, q: normed(q, p["gq"], p["bq"]),
    keys: Callable[[Params, Array], Array] = lambda p, k: normed(k, p["gk"], p["bk"]),
    product: str = SCORES,
) -> Apply:
    """Cross-attention to all tokens but the last, so that queries and keys have other sizes."""

    def apply(p: Params, x: Array) -> Array:
        q = queries(p, jnp.einsum("btd,dhf->bthf", x, p["wq"]))
        k = keys(p, jnp.einsum("btd,dhf->bthf", x[:, : max(1, x.shape[1] - 1)], p["wk"]))
        v = jnp.einsum("btd,dhf->bthf", x[:, : max(1, x.shape[1] - 1)], p["wv"])
        w = weights(scores(p, jnp.einsum(product, q, k)))
        return jnp.einsum("bqhd,hdf->bqf", jnp.einsum("bhqk,bkhd->bqhd", w, v), p["wo"])

    return apply


def causal(s: Array) -> Array:
    return jnp.tril(jnp.ones(s.shape[-2:], bool))


def by_hand(s: Array) -> Array:
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def multi_query(p: Params, x: Array) -> Array:
    """All heads of the queries meet the one of the keys."""
    q = normed(jnp.einsum("btd,dhf->bthf", x, p["wq"]), p["gq"], p["bq"])
    k, v = normed(x @ p["wm"], p["gk"], p["bk"]), x @ p["wv"][:, 0]
    w = nn.softmax(jnp.einsum("bqhd,bkd->bhqk", q, k))
    return jnp.einsum("bqhd,hdf->bqf", jnp.einsum("bhqk,bkd->bqhd", w, v), p["wo"])


def grouped(p: Params, x: Array) -> Array:
    """Keys are repeated, so that two heads of the queries meet one of them."""
    heads = jnp.einsum("btd,dhf->bthf", x, p["wq"])
    q = normed(jnp.concatenate([heads, -heads[:, ::-1]], 2), p["gq"], p["bq"])
    k = jnp.repeat(normed(jnp.einsum("btd,dhf->bthf", x, p["wk"]), p["gk"], p["bk"]), 2, axis=2)
    return nn.softmax(jnp.einsum(SCORES, q, k)) @ p["pos"][: x.shape[1]]


def scanned(p: Params, x: Array) -> Array:
    """Four layers, with scales that are stacked."""
    apply = attention()
    stacked = {"gq": p["g"], "bq": p["g2"], "gk": p["g3"], "bk": p["g4"]}

    def body(x: Array, row: Params) -> tuple[Array, None]:
        return x + apply({**p, **row}, x), None

    return jax.lax.scan(body, x, stacked)[0]


def twice(p: Params, x: Array) -> Array:
    return attention()(p, attention()(p, x)[:, ::-1])


def blocks(p: Params, x: Array) -> Array:
    """Queries in two parts."""

    def scores(q: Array, k: Array) -> Array:
        parts = [jnp.einsum(SCORES, part, k) for part in (q[:, :2], q[:, 2:])]
        return nn.softmax(jnp.concatenate(parts, 2))

    q = normed(jnp.einsum("btd,dhf->bthf", x, p["wq"]), p["gq"], p["bq"])
    k = normed(jnp.einsum("btd,dhf->bthf", x, p["wk"]), p["gk"], p["bk"])
    return scores(q, k)


ALL = "gq bq gk bk"
MERGES: dict[str, tuple[Apply, str]] = {
    "plain": (attention(), ALL),
    "scores divided": (attention(lambda p, s: s / np.sqrt(K)), ALL),
    "queries divided": (attention(queries=lambda p, q: normed(q, p["gq"], p["bq"]) / 3), ALL),
    "queries gated": (
        attention(queries=lambda p, q: normed(q, p["gq"], p["bq"]) * jnp.tanh(q)),
        ALL,
    ),
    # The scale that comes last will do.
    "scaled twice": (
        attention(queries=lambda p, q: normed(q, p["gq"], p["bq"]) * p["e"]),
        "e gk bk",
    ),
    "heads first": (
        attention(
            queries=lambda p, q: normed(q.transpose(0, 2, 1, 3), p["gq"], p["bq"]),
            keys=lambda p, k: normed(k, p["gk"], p["bk"]).transpose(0, 2, 3, 1),
            product="bhqd,bhdk->bhqk",
        ),
        ALL,
    ),
    "no shift of queries": (attention(queries=lambda p, q: normed(q, p["gq"])), "gq gk bk"),
    "no shift of keys": (attention(keys=lambda p, k: normed(k, p["gk"])), "gq bq gk"),
    "scales alone": (
        attention(queries=lambda p, q: normed(q, p["gq"]), keys=lambda p, k: normed(k, p["gk"])),
        "gq gk",
    ),
    "scale plus one": (attention(keys=lambda p, k: normed(k, 1 + p["gk"], p["bk"])), ALL),
    "norms of heads": (
        attention(
            queries=lambda p, q: normed(q, p["hq"], p["hbq"]),
            keys=lambda p, k: normed(k, p["hk"], p["hbk"]),
        ),
        "hq hbq hk hbk",
    ),
    "queries by head": (
        attention(queries=lambda p, q: normed(q, p["hq"], p["hbq"])),
        "hq hbq gk bk",
    ),
    "causal, -inf": (attention(lambda p, s: jnp.where(causal(s), s, -jnp.inf)), ALL),
    "causal, lowest": (
        attention(lambda p, s: jnp.where(causal(s), s, jnp.finfo(s.dtype).min)),
        ALL,
    ),
    "causal, added": (attention(lambda p, s: s + jnp.where(causal(s), 0, -1e9)), ALL),
    "biased": (attention(lambda p, s: s + p["pos"][: s.shape[2], : s.shape[3]]), ALL),
    "by hand": (attention(weights=by_hand), ALL),
    "log": (attention(weights=nn.log_softmax), ALL),
    "norm of scores": (attention(weights=nn.standardize), ALL),
    "the largest": (attention(weights=lambda s: jax.nn.one_hot(s.argmax(-1), s.shape[-1])), ALL),
    # Without a shift there is nothing to notice.
    "sigmoid, no shift": (
        attention(weights=nn.sigmoid, keys=lambda p, k: normed(k, p["gk"])),
        "gq bq gk",
    ),
    "multi-query": (multi_query, ALL),
    "grouped": (grouped, ALL),
    "twice": (twice, ALL),
    "blocks of queries": (blocks, ALL),
    "rms norms": (
        attention(
            queries=lambda p, q: q * jax.lax.rsqrt((q**2).mean(-1, keepdims=True)) * p["gq"],
            keys=lambda p, k: k * jax.lax.rsqrt((k**2).mean(-1, keepdims=True)) * p["gk"],
        ),
        "gq gk",
    ),
}


def edited(folded: jax_lnfold.Folded) -> set[str]:
    return {path for edit in folded.plan.queries for path in edit.parts}


@pytest.mark.parametrize("name", MERGES)
def test_merges(name: str) -> None:
    apply, leaves = MERGES[name]
    params = arrays()
    folded = fold_affine(apply, params, stream())
    assert edited(folded) == {*leaves.split()}
    (edit,) = folded.plan.queries
    assert edit.key_path[1] == "k"
    one = int(name != "scale plus one")
    assert (folded.params[edit.key_path] == one).all()
    assert edit.shift is None or not folded.params[edit.shift].any()
    scale = params[edit.key_path] + 1 - one
    np.testing.assert_allclose(folded.params[edit.query], params[edit.query] * scale, rtol=1e-14)
    if edit.query_shift is not None:
        want = params[edit.query_shift] * jnp.squeeze(scale)
        np.testing.assert_allclose(folded.params[edit.query_shift], want, rtol=1e-14)
    check_contracts(apply, params, folded, stream(3, 4, D))
    assert FoldPlan.from_json(folded.plan.to_json()) == folded.plan
    assert folded.plan.version == 6
    assert folded.plan.is_centered(folded.params)
    assert not folded.plan.is_centered(params)
    assert relative_difference(folded.plan.center(folded.params), folded.params) < 1e-15


@pytest.mark.parametrize("name", ["plain", "causal, lowest", "multi-query", "norms of heads"])
def test_the_folded_program_does_not_multiply_keys(name: str) -> None:
    """One product and one sum less than in the program that is merely centered."""
    apply, params = MERGES[name][0], arrays()
    centered = jax_lnfold.fold(apply, params, stream())
    folded = jax_lnfold.fold(apply, params, stream(), fold_affine=True)
    for primitive, fewer in {"mul": 1, "add": 1, "dot_general": 0, "sub": 0}.items():
        counts = [count_equations(primitive, f.apply, params, stream()) for f in (centered, folded)]
        assert counts[0] - counts[1] == fewer, primitive
    (edit,) = folded.plan.queries
    gradients = jax.grad(lambda p: folded.apply(p, stream()).sum())(folded.params)
    assert edit.shift is not None
    assert not gradients[edit.key_path].any()
    assert not gradients[edit.shift].any()
    assert gradients[edit.query].any()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": 2}])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_of_jax(options: dict[str, Any], groups: int) -> None:
    """Its scores are float32 numbers; several heads of queries meet one of keys."""

    def apply(p: Params, x: Array) -> Array:
        k, v = (jnp.einsum("btd,dhf->bthf", x, p[name]) for name in ("wk", "wv"))
        q = jnp.repeat(jnp.einsum("btd,dhf->bthf", x, p["wq"]), groups, 2)
        q, k = normed(q, p["gq"], p["bq"]), normed(k, p["gk"], p["bk"])
        return jax.nn.dot_product_attention(q, k, v, **options)

    folded = fold_affine(apply, arrays(), stream(), rtol=1e-6)
    assert edited(folded) == {*ALL.split()}


@pytest.mark.parametrize("axis", [0, 1])
def test_shards(axis: int) -> None:
    """Each device attends within its samples, or within its tokens."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(*[None] * axis, "i")

    def sharded(weights: Callable[[Array], Array]) -> jax_lnfold.Folded:
        specs = {"in_specs": (PartitionSpec(), spec), "out_specs": spec}
        apply = jax.shard_map(attention(weights=weights), mesh=mesh, **specs)
        return fold_affine(apply, arrays(), stream(2, 8, D))

    assert edited(sharded(nn.softmax)) == {*ALL.split()}
    assert sharded(nn.sigmoid).plan.queries == ()


EXCHANGED = {
    "softmax over queries": attention(weights=lambda s: nn.softmax(s, axis=2)),
    "less the largest": attention(weights=lambda s: s - s.max(2, keepdims=True)),
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_keys_are_whatever_is_summed_over(name: str) -> None:
    """What a softmax over queries does not notice is a shift of these."""
    folded = fold_affine(EXCHANGED[name], arrays(), stream())
    (edit,) = folded.plan.queries
    assert [*edit.parts] == ["gq", "bq", "gk", "bk"]
    check_contracts(EXCHANGED[name], arrays(), folded, stream(3, 4, D))


def test_scan_over_layers() -> None:
    params = arrays()
    stacks = {f"g{i}": params["g"] * i for i in (2, 3, 4)}
    folded = fold_affine(scanned, params | stacks, stream())
    (edit,) = folded.plan.queries
    assert [*edit.parts] == ["g3", "g4", "g", "g2"]
    assert (edit.axes, edit.shift_axes) == ((0, 1), (0, 1))
    check_contracts(scanned, params | stacks, folded, stream(3, 4, D))


def test_keys_of_all_layers_and_queries_of_each() -> None:
    """One scale of keys goes into the queries of every layer, but not the other way round."""
    params = {**arrays(), "g2": arrays()["g"] * 2}
    shared = "gk", "bk"

    def apply(p: Params, x: Array, one: str = "k") -> Array:
        def body(x: Array, rows: tuple[Array, Array]) -> tuple[Array, None]:
            names = ("gq", "bq") if one == "k" else shared
            return x + attention()({**p, **dict(zip(names, rows, strict=True))}, x), None

        return jax.lax.scan(body, x, (p["g"], p["g2"]))[0]

    folded = fold_affine(apply, params, stream())
    (edit,) = folded.plan.queries
    assert [*edit.parts] == ["gk", "bk", "g", "g2"]
    assert (edit.axes, edit.shift_axes) == ((1,), (1,))
    report = fold_affine(partial(apply, one="q"), params, stream()).report
    assert report.queries == ()
    left = {scale.key_path: scale.reason for scale in report.affine_left}
    assert left["g"] == "its axes are not all axes of the scale `gq`"


def test_an_ensemble() -> None:
    """Members have scales of their own, along a batch axis of the product."""
    params = {k: jnp.stack([v, v * 2, v + 1]) for k, v in arrays().items()}
    apply = jax.vmap(attention(), (0, None))
    folded = fold_affine(apply, params, stream())
    (edit,) = folded.plan.queries
    assert (edit.axes, edit.shift_axes) == ((0, 1), (0, 1))
    some = jax.tree.map(lambda x: x[:2], params)
    assert (
        relative_difference(folded.apply(folded.plan.center(some), stream()), apply(some, stream()))
        < 1e-12
    )


def test_dropout_behind_the_softmax_is_not_in_the_way() -> None:
    def apply(p: Params, x: Array, key: Array) -> Array:
        def weights(s: Array) -> Any:
            drop = nn.Dropout(0.5, deterministic=False)
            return drop.apply({}, nn.softmax(s), rngs={"dropout": key})

        return attention(weights=weights)(p, x)

    for approximate in (set[str](), {"dropout"}):
        options = {"approximate": approximate} if approximate else {}
        assert fold_affine(apply, arrays(), stream(), jax.random.key(7), **options).plan.queries


def test_axes_need_not_be_in_order() -> None:
    """A scale and a shift by head are stored with their axes turned, and with one of size 1."""
    params = arrays()
    params |= {"hq": params["hq"].T, "hbq": params["hbq"].T[:, None]}
    apply = attention(
        queries=lambda p, q: normed(q, p["hq"].T, p["hbq"][:, 0].T),
        keys=lambda p, k: normed(k, p["hk"], p["hbk"]),
    )
    folded = fold_affine(apply, params, stream())
    (edit,) = folded.plan.queries
    assert (edit.query, edit.axes) == ("hq", (1, 0))
    assert (edit.query_shift, edit.shift_axes) == ("hbq", (2, 0))


# --- what only looks like it ---------------------------------------------------------------------


def rotary(x: Array) -> Array:
    angles = np.arange(x.shape[1])[:, None, None] * 0.1
    turned = jnp.concatenate([-x[..., 3:6], x[..., :3], x[..., 6:]], -1)
    return x * np.cos(angles) + turned * np.sin(angles)


def rotated(x: Array) -> Array:
    """The same by a matrix for every position."""
    turn = jnp.asarray(np.random.default_rng(2).normal(size=(x.shape[1], K, K)))
    return jnp.einsum("bthd,tde->bthe", x, turn)


def keys_read(read: Callable[[Params, Array], Array], which: str = "k") -> Apply:
    def apply(p: Params, x: Array) -> Array:
        k = normed(jnp.einsum("btd,dhf->bthf", x, p["wk"]), p["gk"], p["bk"])
        q = normed(jnp.einsum("btd,dhf->bthf", x, p["wq"]), p["gq"], p["bq"])
        w = nn.softmax(jnp.einsum(SCORES, q, k))
        more = read(p, k if which == "k" else q).sum()
        return jnp.einsum("bhqk,bkd->bhqd", w, x).sum((1, 3)) + more

    return apply


def returned(p: Params, x: Array) -> Any:
    scores: list[Array] = []

    def note(p: Params, s: Array) -> Array:
        scores.append(s)
        return s

    return attention(note)(p, x), scores[0]


def with_sink(p: Params, s: Array) -> Array:
    sink = jnp.broadcast_to(p["sink"], (*s.shape[:-1], 1))
    return jnp.concatenate([s, sink], -1)


def masked_keys(p: Params, k: Array) -> Array:
    """Their shift then varies along the keys."""
    return normed(k, p["gk"], p["bk"]) * p["near"][: k.shape[1]]


def unequal_keys(p: Params, k: Array) -> Array:
    k = normed(k, p["gk"], p["bk"])
    return jnp.concatenate([k[:, :2] * 2, k[:, 2:]], 1)


LEFT: dict[str, tuple[Apply, str]] = {
    "keys read elsewhere": (keys_read(lambda p, k: jnp.tanh(k)), "`tanh` .* reads what it scales"),
    "keys read by a layer": (
        keys_read(lambda p, k: k @ p["t"] + p["tb"]),
        "the kernel `t` reads what it scales, too",
    ),
    "queries read elsewhere": (
        keys_read(lambda p, q: jnp.tanh(q), "q"),
        "multiplies it with what has no scale that could take it up",
    ),
    "rotary": (
        attention(
            queries=lambda p, q: rotary(normed(q, p["gq"], p["bq"])),
            keys=lambda p, k: rotary(normed(k, p["gk"], p["bk"])),
        ),
        "",
    ),
    "rotary, no shifts": (
        attention(
            queries=lambda p, q: rotary(normed(q, p["gq"])),
            keys=lambda p, k: rotary(normed(k, p["gk"])),
        ),
        "",
    ),
    "rotary by matrices": (
        attention(
            queries=lambda p, q: rotated(normed(q, p["gq"], p["bq"])),
            keys=lambda p, k: rotated(normed(k, p["gk"], p["bk"])),
        ),
        "multiplies it with what is no parameter as it is stored",
    ),
    "softcap": (
        attention(lambda p, s: 3 * jnp.tanh(s / 3)),
        "its shift cannot be dropped: `tanh` .* notices a shift",
    ),
    "sink": (
        attention(with_sink, lambda s: nn.softmax(s)[..., :-1]),
        "its shift cannot be dropped: `reduce_max` .* shifted by different numbers",
    ),
    "scores returned": (
        returned,
        "its shift cannot be dropped: .* makes a value that is an output",
    ),
    "softmax over queries": (
        attention(
            weights=lambda s: nn.softmax(s, axis=2),
            queries=lambda p, q: normed(q, p["gq"], p["bq"]) / 3,
        ),
        "its shift cannot be dropped: `reduce_max` .* shifted by different numbers",
    ),
    "largest of all, too": (
        attention(weights=lambda s: nn.softmax(s) * s.max(2, keepdims=True)),
        "its shift cannot be dropped: `reduce_max`",
    ),
    "sigmoid": (attention(weights=nn.sigmoid), "its shift cannot be dropped: `logistic`"),
    "linear attention": (attention(weights=same), "its shift cannot be dropped"),
    # Masks that are low, but take up no shift in float64.
    "where, -1e9": (
        attention(lambda p, s: jnp.where(causal(s), s, -1e9)),
        "its shift cannot be dropped: `select_n` .* chooses differently",
    ),
    "where, +inf": (
        attention(lambda p, s: jnp.where(causal(s), s, jnp.inf)),
        "its shift cannot be dropped: `select_n` .* chooses differently",
    ),
    "where, other scores": (
        attention(lambda p, s: jnp.where(causal(s), s, p["sink"])),
        "its shift cannot be dropped: `select_n` .* chooses differently",
    ),
    "no scale of queries": (
        attention(queries=lambda p, q: normed(q)),
        "has no scale that could take it up",
    ),
    "no scale, a shift": (
        attention(queries=lambda p, q: nn.standardize(q) + p["bq"]),
        "has no scale that could take it up",
    ),
    "scale of queries plus one": (
        attention(queries=lambda p, q: normed(q, 1 + p["gq"], p["bq"])),
        "the program adds 1 to the scale `gq`",
    ),
    "one scale for both": (
        attention(queries=lambda p, q: normed(q, p["gk"]), keys=lambda p, k: normed(k, p["gk"])),
        "reads what it scales twice",
    ),
    "one shift for both": (
        attention(queries=lambda p, q: normed(q, p["gq"], p["bk"])),
        "reads the parameter `bk`, too",
    ),
    "one scale, other shifts": (
        attention(queries=lambda p, q: normed(q, p["gk"], p["bq"])),
        "the parameters `bq` and `bk` shift it",
    ),
    "a shift as scale": (
        attention(queries=lambda p, q: normed(q, p["gq"], p["gk"])),
        "",
    ),
    "scale returned": (lambda p, x: (attention()(p, x), p["gk"]), "it is returned"),
    "shift returned": (lambda p, x: (attention()(p, x), p["bk"]), "`bk` is returned"),
    "queries' shift returned": (
        lambda p, x: (attention()(p, x), p["bq"]),
        "has no scale that could take it up",
    ),
    "keys by head": (
        attention(keys=lambda p, k: normed(k, p["hk"], p["hbk"])),
        "its axes are not all axes of the scale `gq`",
    ),
    "keys scaled by position": (
        attention(keys=masked_keys),
        "scales what is scaled and shifted",
    ),
    "keys scaled unequally": (
        attention(keys=unequal_keys),
        "scales what is scaled and shifted",
    ),
    "features of keys turned": (
        attention(keys=lambda p, k: jnp.roll(normed(k, p["gk"], p["bk"]), 1, -1)),
        "",
    ),
    "a part of the features": (
        attention(
            queries=lambda p, q: normed(q, p["gq"], p["bq"])[..., :5],
            keys=lambda p, k: normed(k, p["gk"], p["bk"])[..., :5],
        ),
        "reads a part of what it scales",
    ),
    "something added to queries": (
        attention(queries=lambda p, q: normed(q, p["gq"], p["bq"]) + p["e"]),
        "has no scale that could take it up",
    ),
    "gradient stopped": (
        attention(keys=lambda p, k: jax.lax.stop_gradient(normed(k, p["gk"], p["bk"]))),
        "`stop_gradient` .* reads what it scales",
    ),
    "other queries, too": (
        lambda p, x: attention()(p, x) + attention(queries=lambda p, q: jnp.tanh(q))(p, x),
        "it is not all that the scale `gq` is multiplied with",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    apply, reason = LEFT[name]
    report = fold_affine(apply, arrays(), stream()).report
    assert report.queries == ()
    left = {scale.key_path: scale.reason for scale in report.affine_left}
    (found,) = [left[path] for path in ("gk", "hk") if path in left]
    assert re.search(reason, found), found


@pytest.mark.parametrize("path", ["gk", "bk", "gq", "bq"])
def test_excluded(path: str) -> None:
    report = fold_affine(attention(), arrays(), stream(), exclude=[path]).report
    assert report.queries == ()
    left = {scale.key_path: scale.reason for scale in report.affine_left}
    assert left["gk"] == f"the parameter `{path}` is excluded"


def test_no_leaf_has_two_merges() -> None:
    """Two keys with one scale of queries: the second one stays."""

    def apply(p: Params, x: Array) -> Array:
        other = attention(keys=lambda p, k: normed(k, p["e"]))
        return attention()(p, x) + other(p, x)

    report = fold_affine(apply, arrays(), stream()).report
    assert report.queries == ()


def test_dropped_scores() -> None:
    """A shift is not noticed if dropout is the identity, but only then."""

    def apply(p: Params, x: Array, key: Array) -> Array:
        drop = nn.Dropout(0.5, deterministic=False)
        return attention(lambda p, s: drop.apply({}, s, rngs={"dropout": key}))(p, x)

    inputs = stream(), jax.random.key(7)
    options = {"fold_affine": True, "approximate": {"dropout"}}
    assert jax_lnfold.fold(apply, arrays(), *inputs, **options).plan.queries == ()
    assert fold_affine(apply, arrays(), *inputs).plan.queries == ()


# --- random wirings -------------------------------------------------------------------------------

POOL = ("gq", "bq", "gk", "bk", "e", "l", "m", "n")
BETWEEN: list[Callable[[Params, Array], Array]] = [
    *[lambda p, y: y] * 6,
    lambda p, y: y / 3,
    lambda p, y: y * p["e"],
    lambda p, y: y + p["e"],
    lambda p, y: y * p["near"][: y.shape[1]],
    lambda p, y: jnp.concatenate([y[:, :1] * 2, y[:, 1:]], 1),
    lambda p, y: jnp.concatenate([y[..., :3], y[..., 3:]], -1),
    lambda p, y: jnp.roll(y, 1, 2),
    lambda p, y: jnp.roll(y, 1, 3),
    lambda p, y: rotary(y),
]
BEFORE: list[Callable[[Params, Array], Array]] = [
    *[lambda p, s: s] * 4,
    lambda p, s: s / 2 + p["sink"],
    lambda p, s: jnp.where(causal(s), s, -jnp.inf),
    lambda p, s: jnp.where(causal(s), s, -1.0),
    lambda p, s: s * p["near"][: s.shape[2], 0],
    lambda p, s: jnp.tanh(s),
]
WEIGHTS: list[Callable[[Array], Array]] = [
    *[nn.softmax] * 4,
    by_hand,
    nn.sigmoid,
    partial(nn.softmax, axis=2),
    lambda s: s - s.max(3, keepdims=True),
]


def random_attention(rng: np.random.Generator) -> Apply:
    """One or two of them, whose leaves are drawn from a few, so that many have several roles."""

    def one_of(options: Any) -> Any:
        return options[rng.integers(len(options))]

    def side(usual: tuple[str, str]) -> Callable[[Params, Array], Array]:
        scale, shift = (one_of([name] * 50 + [*POOL]) for name in usual)
        kind, between, plus = rng.integers(6), one_of(BETWEEN), rng.integers(8) == 0

        def run(p: Params, y: Array) -> Array:
            y = nn.standardize(y)
            y = y if kind == 0 else y * (p[scale] + 1 if plus else p[scale])
            return between(p, y if kind == 1 else y + p[shift])

        return run

    pairs = [(("gq", "bq"), ("gk", "bk")), (("e", "l"), ("m", "n"))]
    parts = [
        attention(one_of(BEFORE), one_of(WEIGHTS), side(q), side(k))
        for q, k in pairs[: 1 + rng.integers(2)]
    ]
    leak = one_of([*[None] * 50, *POOL])

    def apply(p: Params, x: Array) -> Any:
        return [part(p, x) for part in parts], [] if leak is None else [p[leak]]

    return apply


def test_random_wirings() -> None:
    params, found = arrays(), []
    params |= {k: params["e"] * n for n, k in enumerate("lmn", 2)}
    for number in range(40):
        apply = random_attention(np.random.default_rng(number))
        folded = fold_affine(apply, params, stream(), rtol=1e-11)
        found.append(len(folded.plan.queries))
        assert FoldPlan.from_json(folded.plan.to_json()) == folded.plan
    assert min(found.count(n) for n in (0, 1)) > 5


# --- plans, traces, files ------------------------------------------------------------------------


OTHERWISE: dict[str, Callable[..., Any]] = {
    "keys returned": lambda p, x: (attention()(p, x), p["gk"]),
    "keys' shift returned": lambda p, x: (attention()(p, x), p["bk"]),
    "queries' shift alone": lambda p, x: x[..., :K] * p["bq"],
    "no shift of queries": attention(queries=lambda p, q: normed(q, p["gq"])),
    "no shift of keys": attention(keys=lambda p, k: normed(k, p["gk"])),
    "softcap": attention(lambda p, s: jnp.tanh(s)),
    "sigmoid": attention(weights=nn.sigmoid),
    "plus one": attention(keys=lambda p, k: normed(k, 1 + p["gk"], p["bk"])),
    "exchanged": attention(
        queries=lambda p, q: normed(q, p["gk"], p["bk"]),
        keys=lambda p, k: normed(k, p["gq"], p["bq"]),
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_trace_that_sees_the_edit(name: str) -> None:
    def apply(p: Params, x: Array, how: Array | None = None) -> Any:
        return attention()(p, x) if how is None else OTHERWISE[name](p, x)

    params = arrays()
    folded = fold_affine(apply, params, stream())
    assert len(folded.plan.queries) == 1
    with pytest.raises(PlanMismatchError, match="scale 'gk' of keys, its shift, or that of"):
        folded.apply(folded.params, stream(), jnp.ones(3))


def test_another_trace_that_does_not() -> None:
    def apply(p: Params, x: Array, how: Array | None = None) -> Any:
        if how is None:
            return attention()(p, x)
        return multi_query(p, x) if how.ndim else jnp.einsum("btd,dhf->bthf", x, p["wv"])

    params = arrays()
    folded = fold_affine(apply, params, stream())
    for how in (jnp.ones(()), jnp.ones(1)):
        check_contracts(apply, params, folded, stream(), how)


def test_another_function_follows_the_plan() -> None:
    params, plan = arrays(), jax_lnfold.plan_fold(attention(), arrays(), stream(), fold_affine=True)
    again = jax_lnfold.fold(MERGES["causal, -inf"][0], params, stream(), plan=plan, center=True)
    check_contracts(MERGES["causal, -inf"][0], params, again, stream())
    with pytest.raises(PlanMismatchError, match=r"plan: .* scale 'gk' of keys"):
        jax_lnfold.fold(attention(weights=nn.sigmoid), params, stream(), plan=plan, center=True)


def test_several_functions() -> None:
    functions = {"one": attention(), "other": attention(lambda p, s: s * 2)}
    inputs = dict.fromkeys(functions, (stream(),))
    for name, noticed in (("other", False), ("third", True)):
        functions[name] = attention(weights=nn.sigmoid) if noticed else functions[name]
        inputs[name] = (stream(),)
        folded = jax_lnfold.fold(functions, arrays(), inputs, fold_affine=True)
        for key, one in folded.items():
            check_contracts(functions[key], arrays(), one, stream())
            assert len(one.plan.queries) == (not noticed)


def plan_data(apply: Apply = MERGES["queries by head"][0]) -> dict[str, Any]:
    return json.loads(jax_lnfold.plan_fold(apply, arrays(), stream(), fold_affine=True).to_json())


def test_the_file() -> None:
    data = plan_data()
    assert data["version"] == 6
    assert data["queries"] == [
        {
            "key_path": "gk",
            "shift": "bk",
            "query": "hq",
            "query_shift": "hbq",
            "axes": [1],
            "shift_axes": [1],
            "one": 1,
        }
    ]


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no axes": lambda e: e.pop("axes"),
    "other axes": lambda e: e.update(axes=[0]),
    "other axes of the shift": lambda e: e.update(shift_axes=[]),
    "an axis that is not there": lambda e: e.update(axes=[5]),
    "axes of no leaf": lambda e: e.update(query_shift=None),
    "one leaf in two roles": lambda e: e.update(shift="gk"),
    "keys that are queries": lambda e: e.update(query="gk", axes=[0]),
    "a shift of another size": lambda e: e.update(shift="tb"),
    "a shift of queries of another size": lambda e: e.update(query_shift="gq", shift_axes=[0]),
    "no such leaf": lambda e: e.update(query="nothing"),
    "another number": lambda e: e.update(one=2),
    "a bool": lambda e: e.update(one=True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plan_files(name: str) -> None:
    data = plan_data()
    BROKEN[name](data["queries"][0])
    with pytest.raises(PlanFormatError, match="text: broken plan"):
        FoldPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("part", ["key_path", "shift"])
def test_what_is_taken_up_is_not_edited_besides(part: str) -> None:
    data = plan_data()
    path = data["queries"][0][part]
    along = {"shape": [K], "entries": ["all"]}
    data["edits"].append({"key_path": path, "along": along})
    with pytest.raises(PlanFormatError, match=f"leaf '{path}' is taken up, and edited besides"):
        FoldPlan.from_json(json.dumps(data))


def test_two_merges_of_one_leaf_are_no_plan() -> None:
    data = plan_data()
    data["queries"].append({**data["queries"][0], "key_path": "e", "shift": None})
    with pytest.raises(PlanFormatError, match="scales and shifts of keys and queries are not"):
        FoldPlan.from_json(json.dumps(data))


def test_a_forged_plan_is_not_followed() -> None:
    """A file may be well formed and wrong; it is proved again for the program."""
    data = plan_data(attention())
    data["queries"][0].update(shift=None)
    plan = FoldPlan.from_json(json.dumps(data))
    with pytest.raises(PlanMismatchError, match="scale 'gk' of keys"):
        jax_lnfold.fold(attention(), arrays(), stream(), plan=plan, center=True)


def test_other_sizes() -> None:
    """A plan for stacked layers fits fewer of them, but no other size of a head."""
    params = arrays()
    params |= {f"g{i}": params["g"] * i for i in (2, 3, 4)}
    folded = fold_affine(scanned, params, stream())
    fewer = {k: v[:2] if k in ("g", "g2", "g3", "g4") else v for k, v in params.items()}
    center = folded.plan.center(fewer)
    want = scanned(fewer, stream())
    assert relative_difference(folded.apply(center, stream()), want) < 1e-12
    assert relative_difference(scanned(center, stream()), want) < 1e-12
    with pytest.raises(TreeError, match=r"leaf 'g[24]' has shape"):
        folded.plan.center(fewer | {"g2": params["g2"]})


def test_checkpoint(tmp_path: Path) -> None:
    plan = jax_lnfold.plan_fold(attention(), arrays(), stream(), fold_affine=True)
    tree = jax.tree.map(np.asarray, arrays())
    save_file(tree, tmp_path / "in.safetensors")
    center_checkpoint(plan, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for path, want in plan.center(tree).items():
        assert found[path].tobytes() == np.asarray(want).tobytes(), path


def test_training_keeps_keys_as_they_are() -> None:
    params, x = arrays(), stream()
    folded = jax_lnfold.fold(attention(), params, x, fold_affine=True)
    optimizer = optax.chain(optax.adam(1e-2), jax_lnfold.center_updates(folded.plan))
    now: Any = folded.params
    state = optimizer.init(now)
    for _ in range(3):
        gradients = jax.grad(lambda p: (folded.apply(p, x) ** 2).mean())(now)
        updates, state = optimizer.update(gradients, state, now)
        now = optax.apply_updates(now, updates)
    assert relative_difference(folded.apply(now, x), attention()(now, x)) < 1e-11
    assert (now["gk"] == 1).all()
    assert not now["bk"].any()
    assert relative_difference(now["gq"], folded.params["gq"]) > 1e-3
