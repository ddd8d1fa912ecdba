"""Programs of many kinds: routing, decoding, stacked layers, ensembles and linear recurrences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_lnfold
from tests.models.zoo.base import floats
from tests.whole.test_sharing import (
    BLOCK,
    DIN,
    HD,
    HID,
    OUT,
    B,
    D,
    H,
    block,
    check,
    heads,
    make,
    mlp,
    norm,
)

Array = jax.Array
Model = Callable[..., Any]

T, L, E, M, HK, SLOTS = 15, 5, 10, 4, 8, 6  # tokens, layers, experts, ensemble, key width
X = jnp.asarray(floats(B, T, DIN))
LAYERS = {name: (L, *shape) for name, shape in BLOCK.items()}
PARAMS = make(
    embed=(DIN, D), layers=LAYERS, block=BLOCK, other=BLOCK, v=(D, OUT), route=(D, E), token=(3, D),
)  # fmt: skip
WRITERS = "embed layers/down layers/bias"
ONE, OTHER = "embed block/down block/bias", "other/down other/bias"


def head(p: Any, s: Array) -> Array:
    return norm(s) @ p["v"]


def update(p: Any, s: Array) -> Array:
    """What a block adds to the stream."""
    return mlp(p, norm(s))


def stack(p: Any, s: Array, layer: Model = block) -> Array:
    return jax.lax.scan(lambda s, w: (layer(w, s), None), s, p["layers"])[0]


# --- choices made by the data --------------------------------------------------------------------


def switch(p: Any, x: Array, last: Model = lambda p, s: 2.0 * s) -> Array:
    """A layer, a mixture of tokens, or the `last` branch."""
    branches = [lambda p, s: block(p["block"], s), lambda p, s: s + jnp.flip(s, 1), last]
    choice = (x[0, 0, 0] * 3).astype(int)
    return head(p, jax.lax.switch(choice, branches, p, x @ p["embed"]))


def switch_by_norm(p: Any, x: Array) -> Array:
    s = x @ p["embed"]
    choice = jnp.argmax(norm(s)[0, 0] @ p["route"])
    s = jax.lax.switch(choice, [lambda s: block(p["block"], s), lambda s: -s, lambda s: s], s)
    return head(p, s)


def switch_of_norms(p: Any, x: Array) -> Array:
    """Every branch normalises, and returns something else than the stream."""
    s = x @ p["embed"]
    branches = [head, lambda p, s: jnp.tanh(head(p, s)), lambda p, s: jnp.ones((B, T, OUT))]
    return jax.lax.switch((x[0, 0, 0] * 3).astype(int), branches, p, s)


def switch_in_vmap(p: Any, x: Array) -> Array:
    """A choice for every sample is a selection."""

    def sample(x: Array) -> Array:
        choice = (x[0, 0] * 3).astype(int)
        branches = [lambda s: block(p["block"], s), lambda s: block(p["other"], s), lambda s: s]
        return head(p, jax.lax.switch(choice, branches, x @ p["embed"]))

    return jax.vmap(sample)(x)


def skipped(p: Any, x: Array) -> Array:
    """Layers are skipped where the normalised stream says so."""

    def layer(w: Any, s: Array) -> Array:
        return jax.lax.cond(norm(s).max() > 2.0, block, lambda w, s: s, w, s)

    return head(p, stack(p, x @ p["embed"], layer))


def mixture_of_depths(p: Any, x: Array, reader: Model = norm) -> Array:
    """The highest scores go through the block and are added back."""
    s = x @ p["embed"]
    scores = reader(s) @ p["route"][:, 0]
    gate, chosen = jax.lax.top_k(scores, 4)
    rows = jnp.take_along_axis(s, chosen[..., None], axis=1)
    written = update(p["block"], rows) * nn.sigmoid(gate)[..., None]
    return head(p, s.at[jnp.arange(len(x))[:, None], chosen].add(written))


def stochastic_depth(p: Any, x: Array, shape: tuple[int, ...] = (B, 1, 1)) -> Array:
    """Branches dropped for whole samples."""
    s, keys = x @ p["embed"], jax.random.split(jax.random.key(3))
    for key, layer in zip(keys, (p["block"], p["other"]), strict=True):
        s = s + update(layer, s) * jax.random.bernoulli(key, 0.8, shape) / 0.8
    return head(p, s)


def padded(p: Any, x: Array) -> Array:
    """A padding mask after every layer."""
    mask = (x[..., :1] > -1).astype(x.dtype)
    s = (x @ p["embed"]) * mask
    s = block(p["block"], s) * mask
    return head(p, block(p["other"], s) * mask)


def padded_with_class_token(p: Any, x: Array) -> Array:
    """Learned tokens go first; the mask covers all."""
    tokens = jnp.broadcast_to(p["token"], (len(x), *p["token"].shape))
    mask = jnp.pad(x[..., :1] > -1, ((0, 0), (3, 0), (0, 0)), constant_values=True)
    s = jnp.concatenate([tokens, x @ p["embed"]], 1) * mask
    return head(p, block(p["block"], s))


def raw(s: Array) -> Array:
    return s


class Case(NamedTuple):
    """A program with its LayerNorms, how many of them fold, and the leaves edited for it."""

    apply: Model
    norms: int
    folded: int
    edited: str = ""


CHOICES = {
    "switch": Case(switch, 2, 2, ONE),
    "switch by a normalised stream": Case(switch_by_norm, 3, 3, ONE),
    "switch of norms": Case(switch_of_norms, 2, 2, "embed"),
    "switch for every sample": Case(switch_in_vmap, 3, 3, f"{ONE} {OTHER}"),
    "layers skipped": Case(skipped, 3, 3, WRITERS),
    "mixture of depths": Case(mixture_of_depths, 3, 3, ONE),
    "router on the raw stream": Case(partial(mixture_of_depths, reader=raw), 2, 0),
    "stochastic depth": Case(stochastic_depth, 3, 3, f"{ONE} {OTHER}"),
    "dropout": Case(partial(stochastic_depth, shape=(B, T, D)), 3, 1, "embed"),
    "padding mask": Case(padded, 3, 3, f"{ONE} {OTHER}"),
    "padding mask, class token": Case(padded_with_class_token, 2, 2, f"{ONE} token"),
}


EXPERTS = make(
    embed=(DIN, D), route=(D, E), up=(E, D, HID), down=(E, HID, D), bias=(E, D), v=(D, OUT)
)


def routing(scores: Array) -> tuple[Array, Array]:
    """Top-1 routing with room for some tokens: where each token goes, and its weight."""
    best = jax.nn.one_hot(scores.argmax(-1), E, dtype=scores.dtype)
    place = (jnp.cumsum(best, 1) * best - 1).astype(int)
    slots = jax.nn.one_hot(place, SLOTS, dtype=scores.dtype) * best[..., None]
    return slots, slots * jax.nn.softmax(scores)[..., None]


def mixture_of_experts(p: Any, x: Array, reader: Model = norm) -> Array:
    """Tokens are sent to slots of the experts by one-hot products, and back."""
    s = x @ p["embed"]
    slots, weights = routing(reader(s) @ p["route"])
    inside = jnp.einsum("btec,btd->ebcd", slots, norm(s))
    hidden = jnp.tanh(jnp.einsum("ebcd,edh->ebch", inside, p["up"]))
    out = jnp.einsum("ebch,ehd->ebcd", hidden, p["down"]) + p["bias"][:, None, None]
    return head(p, s + jnp.einsum("btec,ebcd->btd", weights, out))


def soft_experts(p: Any, x: Array, per_feature: bool = False) -> Array:
    """Every expert sees every token."""
    s = x @ p["embed"]
    n = norm(s)
    hidden = jnp.tanh(jnp.einsum("btd,edh->bteh", n, p["up"]))
    out = jnp.einsum("bteh,ehd->bted", hidden, p["down"]) + p["bias"]
    weights = jax.nn.softmax(n @ p["route"])[..., None]
    if per_feature:
        weights = weights * nn.sigmoid(n)[..., None, :]
    return head(p, s + jnp.sum(weights * out, 2))


def sorted_experts(p: Any, x: Array, reader: Model = norm, back: bool = True) -> Array:
    """Tokens are sorted by expert; each kernel is multiplied by the rows of its own."""
    s = x @ p["embed"]
    n, scores = norm(s).reshape(-1, D), reader(s).reshape(-1, D) @ p["route"]
    best = scores.argmax(-1)
    order, rows = jnp.argsort(best), jnp.bincount(best, length=E)
    hidden = jnp.tanh(jax.lax.ragged_dot(n[order], p["up"], rows))
    out = jax.lax.ragged_dot(hidden, p["down"], rows) + p["bias"][best[order]]
    out = out * jax.nn.softmax(scores).max(-1)[order][:, None]
    out = out[jnp.argsort(order)] if back else jnp.zeros_like(out).at[order].add(out)
    return head(p, s + out.reshape(s.shape))


MIXTURES = {
    "sorted": Case(sorted_experts, 3, 3, "embed down bias"),
    "sorted, added back": Case(partial(sorted_experts, back=False), 3, 3, "embed down bias"),
    "sorted, router on the raw stream": Case(partial(sorted_experts, reader=raw), 2, 0),
    "slots": Case(mixture_of_experts, 3, 3, "embed down bias"),
    "slots, router on the raw stream": Case(partial(mixture_of_experts, reader=raw), 2, 0),
    "all experts": Case(soft_experts, 2, 2, "embed down bias"),
    "a gate for every feature": Case(partial(soft_experts, per_feature=True), 2, 1, "embed"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_of_experts(name: str) -> None:
    apply, norms, folded, edited = MIXTURES[name]
    report = check(apply, EXPERTS, X, counts=(norms, folded, 0), edited=edited).report
    if "down" in edited:
        words = {str(edit) for edit in report.edits}
        assert words >= {"down centered along axis 2", "bias centered along axis 1"}


# --- layers in loops -----------------------------------------------------------------------------


def weights_in_the_carry(p: Any, x: Array) -> Array:
    start = (x @ p["embed"], p["block"])
    return head(
        p, jax.lax.scan(lambda c, _: ((block(c[1], c[0]), c[1]), None), start, length=3)[0][0]
    )


def rotating_weights(p: Any, x: Array) -> Array:
    """The hidden units change places from layer to layer."""

    def body(carry: Any, _: None) -> Any:
        s, w = carry
        return (block(w, s), {**w, "down": jnp.roll(w["down"], 1, axis=0)}), None

    (s, _), _ = jax.lax.scan(body, (x @ p["embed"], p["block"]), length=3)
    return head(p, s)


def rates(p: Any, x: Array, shape: tuple[int, ...] = ()) -> Array:
    """A factor for every layer."""
    factors = jnp.linspace(1, 0.5, L * max(shape, default=1)).reshape(L, *shape)

    def body(s: Array, row: Any) -> Any:
        return s + row["rate"] * update(row["layer"], s), None

    return head(p, jax.lax.scan(body, x @ p["embed"], {"rate": factors, "layer": p["layers"]})[0])


def keys_as_rows(p: Any, x: Array) -> Array:
    """Stochastic depth per sample, with a key for every layer."""

    def body(s: Array, row: Any) -> Any:
        key, layer = row
        return s + update(layer, s) * jax.random.bernoulli(key, 0.8, (B, 1, 1)) / 0.8, None

    keys = jax.random.split(jax.random.key(5), L)
    return head(p, jax.lax.scan(body, x @ p["embed"], (keys, p["layers"]))[0])


def chunks_in_layers(p: Any, x: Array) -> Array:
    """Every layer runs over the sequence in chunks."""

    def layer(w: Any, s: Array) -> Array:
        chunks = jnp.moveaxis(s.reshape(len(x), 3, -1, D), 1, 0)
        _, out = jax.lax.scan(lambda _, c: (None, block(w, c)), None, chunks)
        return jnp.moveaxis(out, 0, 1).reshape(s.shape)

    return head(p, stack(p, x @ p["embed"], layer))


def repeated_layers(p: Any, x: Array) -> Array:
    """Every layer runs three times."""

    def layer(w: Any, s: Array) -> Array:
        return jax.lax.scan(lambda s, _: (block(w, s), None), s, length=3)[0]

    return head(p, stack(p, x @ p["embed"], layer))


def mapped(p: Any, x: Array) -> Array:
    return jax.lax.map(lambda row: head(p, stack(p, row @ p["embed"])), x)


def mapped_in_batches(p: Any, x: Array) -> Array:
    """A loop over batches and a rest: two programs."""
    rows = x.reshape(-1, DIN)[:7]
    return jax.lax.map(lambda row: head(p, row @ p["embed"]), rows, batch_size=3)


def backwards(p: Any, x: Array) -> Array:
    def body(i: Array, s: Array) -> Array:
        return block(jax.tree.map(lambda w: w[L - 1 - i], p["layers"]), s)

    return head(p, jax.lax.fori_loop(0, L, body, x @ p["embed"]))


def halting(p: Any, x: Array) -> Array:
    """Layers run until the normalised stream is large somewhere."""

    def going(carry: Any) -> Array:
        return (carry[0] < L) & (norm(carry[1]).max() < 2.5)

    def body(carry: Any) -> Any:
        i, s = carry
        return i + 1, block(jax.tree.map(lambda w: w[i], p["layers"]), s)

    return head(p, jax.lax.while_loop(going, body, (0, x @ p["embed"]))[1])


def two_streams(p: Any, x: Array, raw_start: bool = False) -> Array:
    """Reversible: the streams change places after every layer."""

    def body(carry: Any, w: Any) -> Any:
        a, b = carry
        return (b, a + update(w, b)), None

    other = jnp.tile(x, 2)[..., :D] if raw_start else jnp.flip(x, 1) @ p["embed"]
    (a, b), _ = jax.lax.scan(body, (x @ p["embed"], other), p["layers"])
    return head(p, a + b)


def momentum(p: Any, x: Array) -> Array:
    """A residual stream of second order."""

    def body(carry: Any, w: Any) -> Any:
        s, speed = carry
        speed = 0.9 * speed + update(w, s)
        return (s + speed, speed), None

    start = x @ p["embed"]
    return head(p, jax.lax.scan(body, (start, jnp.zeros_like(start)), p["layers"])[0][0])


def segments(p: Any, x: Array, leak: bool = False) -> Any:
    """Memory tokens carry the stream from one segment of the sequence to the next."""

    def body(memory: Array, part: Array) -> Any:
        s = block(p["block"], jnp.concatenate([memory, part @ p["embed"]], 1))
        return s[:, :3], s[:, 3:]

    parts = jnp.moveaxis(x.reshape(B, 3, -1, DIN), 1, 0)
    memory = jnp.broadcast_to(p["token"], (len(x), *p["token"].shape))
    memory, out = jax.lax.scan(body, memory, parts)
    return (head(p, out), memory) if leak else head(p, out)


LOOPS = {
    "weights in the carry": Case(weights_in_the_carry, 2, 2, ONE),
    "rotating weights": Case(rotating_weights, 2, 2, ONE),
    "a rate for every layer": Case(rates, 2, 2, WRITERS),
    "a rate for every layer and feature": Case(partial(rates, shape=(D,)), 2, 0),
    "a key for every layer": Case(keys_as_rows, 2, 2, WRITERS),
    "chunks in layers": Case(chunks_in_layers, 2, 2, WRITERS),
    "repeated layers": Case(repeated_layers, 2, 2, WRITERS),
    "map": Case(mapped, 2, 2, WRITERS),
    "map in batches": Case(mapped_in_batches, 2, 2, "embed"),
    "backwards": Case(backwards, 2, 2, WRITERS),
    "halting": Case(halting, 3, 3, WRITERS),
    "two streams": Case(two_streams, 2, 2, WRITERS),
    "momentum": Case(momentum, 2, 2, WRITERS),
    "segments": Case(segments, 2, 2, f"{ONE} token"),
    "segments, memory returned": Case(partial(segments, leak=True), 2, 0),
}


@pytest.mark.parametrize(
    ("apply", "norms", "folded", "edited"), (CHOICES | LOOPS).values(), ids=CHOICES | LOOPS
)
def test_choices_and_loops(apply: Model, norms: int, folded: int, edited: str) -> None:
    check(apply, PARAMS, X, counts=(norms, folded, 0), edited=edited)


def test_counts_of_nested_loops() -> None:
    report = jax_lnfold.analyze(repeated_layers, PARAMS, X)
    assert [norm.count for norm in report.norms] == [3 * L, 1]


def test_one_of_two_streams_starts_at_the_data() -> None:
    """They change places, so both must be zero-mean: one centering before the loop."""
    check(partial(two_streams, raw_start=True), PARAMS, X, counts=(2, 2, 1), edited=WRITERS)


def test_centering_inside_a_loop() -> None:
    """Without a residual: three norms in every iteration are worth one centering."""

    def layer(w: Any, s: Array) -> Array:
        return jnp.abs(sum(update(w, s) for _ in range(3)))

    def apply(p: Any, x: Array) -> Array:
        return head(p, stack(p, x @ p["embed"], layer))

    report = check(apply, PARAMS, X, counts=(4, 4, 1), edited="embed").report
    assert "`abs`" in report.insertions[0].after
    assert line_of(layer, "jnp.abs") in report.insertions[0].after


def test_centering_inside_a_branch() -> None:
    """Three norms after a conditional are worth centering its nonlinear branch."""

    def apply(p: Any, x: Array) -> Array:
        s = jax.lax.cond(x[0, 0, 0] > 0, jnp.tanh, lambda s: 2.0 * s, x @ p["embed"])
        return head(p, block(p["other"], block(p["block"], s)))

    check(apply, PARAMS, X, counts=(3, 3, 1), edited="block/down block/bias other/down other/bias")


def line_of(function: Model, code: str) -> str:
    """Where a piece of code stands in a function of this file."""
    lines, first = inspect.getsourcelines(function)
    (index,) = (i for i, line in enumerate(lines) if code in line)
    return f"test_programs.py:{first + index}"


def highway(w: Any, s: Array) -> Array:
    gate = nn.sigmoid(norm(s))
    return s * gate + update(w, s)


def rms_in_the_stream(w: Any, s: Array) -> Array:
    power = jnp.mean(s * s, -1, keepdims=True)
    return block(w, s) / jnp.sqrt(power)


def clipped(w: Any, s: Array) -> Array:
    return jnp.maximum(block(w, s), -2.0)


def summed_features(w: Any, s: Array) -> Array:
    return jnp.cumsum(block(w, s), -1)


# carry that cannot stay zero-mean -> what the reasons name, and the LayerNorms in the program
SPOILT: dict[Model, tuple[str, str, int]] = {
    highway: ("`mul`", "s * gate", 3),
    rms_in_the_stream: ("`sqrt`", "jnp.sqrt", 2),
    clipped: ("`max`", "jnp.maximum", 2),
    summed_features: ("`cumsum`", "jnp.cumsum", 2),
}


@pytest.mark.parametrize("layer", SPOILT, ids=lambda f: f.__name__)
def test_carry_that_cannot_stay_zero_mean(layer: Model) -> None:
    primitive, code, norms = SPOILT[layer]

    def apply(p: Any, x: Array) -> Array:
        return head(p, stack(p, x @ p["embed"], layer))

    report = check(apply, PARAMS, X, counts=(norms, 0, 0)).report
    for left in report.norms:
        assert line_of(layer, code) in left.reason
        assert primitive in left.reason


def squashed(p: Any, s: Array) -> Array:
    return jnp.tanh(s)


def test_branch_that_spoils_the_mean() -> None:
    report = check(partial(switch, last=squashed), PARAMS, X, counts=(2, 0, 0)).report
    place = line_of(squashed, "jnp.tanh")
    assert all("`tanh`" in left.reason and place in left.reason for left in report.norms)


# --- layers stacked along another axis -----------------------------------------------------------


def test_layers_stacked_along_the_second_axis() -> None:
    """MaxText: kernels are (in, layer, out), vectors (feature, layer)."""
    layers = {k: (shape[0], L, *shape[1:]) for k, shape in BLOCK.items()}
    params = make(embed=(DIN, D), layers=layers, v=(D, OUT))

    def apply(p: Any, x: Array) -> Array:
        rows = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p["layers"])
        return head(p, stack({"layers": rows}, x @ p["embed"]))

    report = check(apply, params, X, counts=(2, 2, 0), edited=WRITERS).report
    words = {"layers/down centered along axis 2", "layers/bias centered along axis 0"}
    assert words < {str(edit) for edit in report.edits}


# --- incremental decoding ------------------------------------------------------------------------

KERNELS = dict.fromkeys(("query", "key", "value", "out"), (L, D, D))
DECODER = make(embed=(DIN, D), layers=KERNELS, v=(D, OUT))
CACHE = make(key=(L, B, SLOTS, D), value=(L, B, SLOTS, D))


def attend(w: Any, query: Array, keys: Array, values: Array, position: Array) -> Array:
    seen = jnp.arange(SLOTS) <= position
    scores = jnp.where(seen, query @ keys.mT, -jnp.inf)
    return (jax.nn.softmax(scores) @ values) @ w["out"]


def write(cache: Array, row: Array, position: Array) -> Array:
    return jax.lax.dynamic_update_slice(cache, row, (0, position, 0))


def cached_step(kind: str, w: Any, s: Array, cache: Any, position: Array) -> tuple[Array, Any]:
    """One layer on one token. `kind` says what is cached for the keys."""
    n = norm(s)
    key = s if kind == "stream" else n @ w["key"]
    rows = {"key": norm(key) if kind == "normalised key" else key, "value": n @ w["value"]}
    cache = {k: write(cache[k], rows[k], position) for k in rows}
    keys = {"stream": lambda c: norm(c) @ w["key"], "raw key": norm}.get(kind, raw)(cache["key"])
    return s + attend(w, n @ w["query"], keys, cache["value"], position), cache


def decode_rows(kind: str, p: Any, x: Array, cache: Any, position: Array) -> Any:
    """The caches of all layers are rows and stacked results of the loop."""

    def body(s: Array, row: Any) -> Any:
        return cached_step(kind, row["layer"], s, row["cache"], position)

    s, cache = jax.lax.scan(body, x @ p["embed"], {"layer": p["layers"], "cache": cache})
    return head(p, s), cache


def decode_carry(kind: str, p: Any, x: Array, cache: Any, position: Array) -> Any:
    """The caches of all layers are carried and updated in place."""

    def body(i: Array, carry: Any) -> Any:
        s, cache = carry
        w, own = (jax.tree.map(lambda y: y[i], tree) for tree in (p["layers"], cache))
        s, own = cached_step(kind, w, s, own, position)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return s, jax.tree.map(put, cache, own)

    s, cache = jax.lax.fori_loop(0, L, body, (x @ p["embed"], cache))
    return head(p, s), cache


# what is cached -> LayerNorms, folded ones, leaves edited
DECODING = {
    "key": (2, 2, "embed layers/out"),
    "normalised key": (3, 3, "embed layers/key layers/out"),
    "raw key": (3, 2, "embed layers/out"),
    "stream": (3, 0, ""),
}


@pytest.mark.parametrize(
    ("decode", "kind"),
    [*((decode_rows, kind) for kind in DECODING), (decode_carry, "key"), (decode_carry, "stream")],
)
def test_decoding(decode: Model, kind: str) -> None:
    norms, n_folded, edited = DECODING[kind]
    apply, x = partial(decode, kind), X[:, :1]
    check(apply, DECODER, x, CACHE, jnp.asarray(2), counts=(norms, n_folded, 0), edited=edited)


# --- ensembles -----------------------------------------------------------------------------------

STREAM = {"embed": (DIN, D), "layers": LAYERS}
MEMBERS = make(**jax.tree.map(lambda s: (M, *s), {**STREAM, "v": (D, OUT)},
                              is_leaf=lambda s: isinstance(s, tuple)))  # fmt: skip
INPUTS = jnp.asarray(floats(M, B, T, DIN))


def member(p: Any, x: Array) -> Array:
    return head(p, stack(p, x @ p["embed"]))


def averaged(p: Any, x: Array) -> Array:
    """One norm of the average of all streams."""
    s = jax.vmap(lambda p: stack(p, x @ p["embed"]))({k: p[k] for k in STREAM})
    return norm(s.mean(0)) @ p["v"][0]


def multiplied(p: Any, x: Array) -> Array:
    s = jax.vmap(lambda p: stack(p, x @ p["embed"]))({k: p[k] for k in STREAM})
    return norm(s[0] * s[1] * s[2] * s[3]) @ p["v"][0]


ENSEMBLES: dict[str, tuple[Model, Any, Array, int]] = {
    "an input each": (jax.vmap(member), MEMBERS, INPUTS, 2),
    "one input, members last": (jax.vmap(member, (0, None), 2), MEMBERS, X, 2),
    "average": (averaged, MEMBERS, X, 2),
    "product": (multiplied, MEMBERS, X, 0),
}


@pytest.mark.parametrize(("apply", "params", "x", "folds"), ENSEMBLES.values(), ids=ENSEMBLES)
def test_ensemble(apply: Model, params: Any, x: Array, folds: int) -> None:
    """Every member is centered by itself."""
    folded = check(apply, params, x, counts=(2, folds, 0), edited=WRITERS if folds else "")
    edits = {str(edit) for edit in folded.report.edits}
    if folds:
        assert edits == {
            "embed centered along axis 2",
            "layers/down centered along axis 3",
            "layers/bias centered along axis 2",
        }


@pytest.mark.parametrize("leak", [False, True])
def test_ensemble_with_a_shared_embedding(leak: bool) -> None:
    """One member reads the shared stream raw: no member may have it centered."""

    def apply(p: Any, x: Array) -> Any:
        axes = {"embed": None, "layers": 0, "v": 0}
        y = jax.vmap(member, (axes, None))(p, x)
        return (y, jnp.tanh(x @ p["embed"])) if leak else y

    params = {**MEMBERS, "embed": PARAMS["embed"]}
    counts = (2, 2, 1) if leak else (2, 2, 0)
    edited = "layers/down layers/bias" if leak else WRITERS
    check(apply, params, X, counts=counts, edited=edited)


# --- linear recurrences --------------------------------------------------------------------------

WIDE = dict.fromkeys(("receptance", "key", "decay"), (D, H * HK))
MIX = make(
    embed=(DIN, D), g=(D,), c=(D,), **WIDE, value=(D, D), gate=(D, D), u=(H, HK),
    gx=(D,), cx=(D,), out=(D, D), v=(D, OUT),
)  # fmt: skip
State = dict[str, Array]
Cell = Callable[[Any, State, State], tuple[State, Array]]


def project(p: Any, x: Array) -> tuple[Array, State]:
    """The stream, and what a layer reads of it, by heads."""
    s = x @ p["embed"]
    n = norm(s) * p["g"] + p["c"]
    steps = {k: heads(n @ p[k], HK) for k in WIDE} | {"value": heads(n @ p["value"])}
    steps["decay"], steps["gate"] = nn.sigmoid(steps["decay"]), nn.silu(n @ p["gate"])
    return s, steps


def finish(p: Any, s: Array, out: Array, gate: Array) -> Array:
    """A norm per head, then back into the stream."""
    out = norm(out).reshape(s.shape) * p["gx"] + p["cx"]
    return head(p, s + (out * gate) @ p["out"])


def recurrent(cell: Cell, p: Any, x: Array, leak: bool = False) -> Any:
    s, steps = project(p, x)
    start = {"kv": jnp.zeros((len(x), H, HK, HD)), "k": jnp.zeros((len(x), H, HK))}
    rows = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), steps)
    state, out = jax.lax.scan(partial(cell, p), start, rows)
    y = finish(p, s, jnp.moveaxis(out, 0, 1), steps["gate"])
    return (y, state) if leak else y


def outer(t: State) -> Array:
    return t["key"][..., :, None] * t["value"][..., None, :]


def read(t: State, state: Array) -> Array:
    return jnp.einsum("bhk,bhkd->bhd", t["receptance"], state)


FADING = 1 - 2.0 ** -jnp.arange(1, 1 + H)  # RetNet: one decay per head


def retention(p: Any, state: State, t: State) -> tuple[State, Array]:
    kv = FADING[:, None, None] * state["kv"] + outer(t)
    return {**state, "kv": kv}, read(t, kv)


def rwkv(p: Any, state: State, t: State) -> tuple[State, Array]:
    """RWKV-6: a decay per key channel that depends on the token, a bonus for the present one."""
    kv = outer(t)
    out = read(t, state["kv"] + p["u"][..., None] * kv)
    return {**state, "kv": t["decay"][..., None] * state["kv"] + kv}, out


def delta_rule(p: Any, state: State, t: State) -> tuple[State, Array]:
    """What the state holds for a key is replaced by the value, in part."""
    key = t["key"] / jnp.linalg.norm(t["key"], axis=-1, keepdims=True)
    error = t["value"] - jnp.einsum("bhk,bhkd->bhd", key, state["kv"])
    kv = state["kv"] + key[..., None] * (t["decay"][..., :1] * error)[..., None, :]
    return {**state, "kv": kv}, read(t, kv)


def linear_attention(p: Any, state: State, t: State) -> tuple[State, Array]:
    t = {**t, "key": nn.softplus(t["key"]), "receptance": nn.softplus(t["receptance"])}
    kv, k = state["kv"] + outer(t), state["k"] + t["key"]
    weight = jnp.sum(t["receptance"] * k, -1, keepdims=True)
    return {"kv": kv, "k": k}, read(t, kv) / weight


def gated_by_head(p: Any, state: State, t: State) -> tuple[State, Array]:
    """mLSTM: forget and input gates per head, a bounded denominator."""
    forget, enter = t["decay"][..., :1], jnp.exp(t["decay"][..., 1:2])
    kv = forget[..., None] * state["kv"] + enter[..., None] * outer(t)
    k = forget * state["k"] + enter * t["key"]
    weight = jnp.abs(jnp.sum(t["receptance"] * k, -1, keepdims=True))
    return {"kv": kv, "k": k}, read(t, kv) / jnp.maximum(weight, 1.0)


def decay_per_value(p: Any, state: State, t: State) -> tuple[State, Array]:
    kv = t["decay"][..., None, :HD] * state["kv"] + outer(t)
    return {**state, "kv": kv}, read(t, kv)


def squashed_writes(p: Any, state: State, t: State) -> tuple[State, Array]:
    kv = state["kv"] + jnp.tanh(outer(t))
    return {**state, "kv": kv}, read(t, kv)


def value_residual(p: Any, state: State, t: State) -> tuple[State, Array]:
    """RWKV-7: values are mixed with other ones, feature by feature."""
    mixed = t["value"] + (heads(t["gate"]) - t["value"]) * t["decay"][..., :HD]
    return rwkv(p, state, {**t, "value": mixed})


def parallel_retention(p: Any, x: Array) -> Array:
    """RetNet over the whole sequence."""
    s, t = project(p, x)
    age = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
    fading = jnp.where(age >= 0, FADING[:, None, None] ** jnp.maximum(age, 0), 0.0)
    scores = jnp.einsum("bthk,bshk->bhts", t["receptance"], t["key"]) * fading
    return finish(p, s, jnp.einsum("bhts,bshd->bthd", scores, t["value"]), t["gate"])


def chunked_retention(p: Any, x: Array) -> Array:
    """RetNet chunk by chunk: in parallel inside, with a state across."""
    s, t = project(p, x)
    size = 5
    rows = {k: t[k].reshape(len(x), -1, size, *t[k].shape[2:]).swapaxes(0, 1) for k in t}
    age = jnp.arange(size)[:, None] - jnp.arange(size)
    within = jnp.where(age >= 0, FADING[:, None, None] ** jnp.maximum(age, 0), 0.0)
    reach = FADING ** (1 + jnp.arange(size))[:, None]  # of the state, at each token
    left = FADING ** (size - 1 - jnp.arange(size))[:, None]  # of each token, at the end

    def chunk(state: Array, t: State) -> tuple[Array, Array]:
        scores = jnp.einsum("bthk,bshk->bhts", t["receptance"], t["key"]) * within
        inner = jnp.einsum("bhts,bshd->bthd", scores, t["value"])
        across = jnp.einsum("bthk,bhkd->bthd", t["receptance"], state) * reach[..., None]
        added = jnp.einsum("bshk,bshd->bhkd", t["key"] * left[..., None], t["value"])
        return FADING[:, None, None] ** size * state + added, inner + across

    _, out = jax.lax.scan(chunk, jnp.zeros((len(x), H, HK, HD)), rows)
    return finish(p, s, out.swapaxes(0, 1).reshape(len(x), -1, H, HD), t["gate"])


def present_value_after_the_norm(p: Any, x: Array) -> Array:
    """RWKV-7: the values of the present token are added once more, after the norm."""
    s, t = project(p, x)
    rows = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), t)
    start = {"kv": jnp.zeros((len(x), H, HK, HD))}
    _, out = jax.lax.scan(partial(rwkv, p), start, rows)
    bonus = jnp.sum(t["receptance"] * t["key"] * p["u"], -1, keepdims=True) * t["value"]
    out = norm(jnp.moveaxis(out, 0, 1)) + bonus
    return head(p, s + (out.reshape(s.shape) * t["gate"]) @ p["out"])


CELLS: tuple[Cell, ...] = (retention, rwkv, delta_rule, linear_attention, gated_by_head)
RECURRENCES: dict[str, Model] = {cell.__name__: partial(recurrent, cell) for cell in CELLS} | {
    "parallel retention": parallel_retention,
    "chunked retention": chunked_retention,
}
NOT_LINEAR: tuple[Cell, ...] = (decay_per_value, squashed_writes, value_residual)
BROKEN: dict[str, Model] = {cell.__name__: partial(recurrent, cell) for cell in NOT_LINEAR} | {
    "state returned": partial(recurrent, retention, leak=True),
    "present value after the norm": present_value_after_the_norm,
}


@pytest.mark.parametrize("apply", RECURRENCES.values(), ids=RECURRENCES)
def test_recurrence_that_is_linear_in_the_values(apply: Model) -> None:
    """The norm per head asks for values that are zero-mean per head; nothing else is touched."""
    folded = check(apply, MIX, X, counts=(3, 3, 0), edited="embed value out")
    assert "value centered along axis 1 in 3 groups" in {str(e) for e in folded.report.edits}
    groups = np.asarray(folded.params["value"]).reshape(D, H, HD)
    np.testing.assert_allclose(groups.mean(-1), 0, atol=1e-15)
    assert [n.shape for n in folded.report.norms][::2] == [(B, T, D)] * 2


@pytest.mark.parametrize("name", BROKEN)
def test_recurrence_that_is_not(name: str) -> None:
    report = check(BROKEN[name], MIX, X, counts=(3, 2, 0), edited="embed out").report
    assert [n.folded for n in report.norms] == [True, False, True]
    assert "test_programs.py:" in report.norms[1].reason


SSM = make(
    embed=(DIN, D), rate=(D,), slow=(), re=(D, HID), im=(D, HID), angle=(D,), step=(D,),
    v=(HID, OUT), wide=(D, OUT), taps=(3, D), b=(D, HK), c=(D, HK), a=(D, HK),
)  # fmt: skip


def over_time(step: Model, start: Array, *rows: Array) -> Array:
    _, out = jax.lax.scan(step, start, tuple(jnp.moveaxis(row, 1, 0) for row in rows))
    return jnp.moveaxis(out, 0, 1)


def diagonal(name: str, p: Any, x: Array) -> Array:
    """A decay for every feature, or one for all."""
    decay = nn.sigmoid(p[name])

    def step(h: Array, row: Any) -> Any:
        h = decay * h + row[0]
        return h, h

    return norm(over_time(step, jnp.zeros((len(x), D)), x @ p["embed"])) @ p["wide"]


def readout(p: Any, x: Array) -> Array:
    """LRU: complex states, read by two real kernels."""
    decay = nn.sigmoid(p["rate"]) * jnp.exp(1j * p["angle"])

    def step(h: Array, row: Any) -> Any:
        h = decay * h + row[0]
        return h, h.real @ p["re"] - h.imag @ p["im"]

    start = jnp.zeros((len(x), D), complex)
    return norm(over_time(step, start, x @ p["embed"])) @ p["v"]


def mamba(p: Any, x: Array) -> Array:
    """A selective state space: steps and decays differ from feature to feature."""
    u = x @ p["embed"]
    u = sum(tap * jnp.roll(u, i, 1) for i, tap in enumerate(p["taps"]))
    size = nn.softplus(u * p["step"])

    def step(h: Array, row: Any) -> Any:
        u, size, b, c = row
        h = jnp.exp(-size[..., None] * p["a"] ** 2) * h + (size * u)[..., None] * b[:, None]
        return h, jnp.sum(h * c[:, None], -1)

    rows = (u, size, u @ p["b"], u @ p["c"])
    return norm(over_time(step, jnp.zeros((len(x), D, HK)), *rows) + u) @ p["wide"]


def associative(p: Any, x: Array, width: int = 1) -> Array:
    """A recurrence with decays that depend on the token, by a parallel scan."""

    def combine(a: Any, b: Any) -> Any:
        return a[0] * b[0], b[0] * a[1] + b[1]

    decay = nn.sigmoid(jnp.tile(x, 2)[..., :width])
    _, states = jax.lax.associative_scan(combine, (decay, x @ p["embed"]), axis=1)
    return norm(states) @ p["wide"]


DIAGONAL = {
    "one decay for all features": Case(partial(diagonal, "slow"), 1, 1, "embed"),
    "a decay for every feature": Case(partial(diagonal, "rate"), 1, 0),
    "read by a kernel": Case(readout, 1, 1, "re im"),
    "mamba": Case(mamba, 1, 0),
    "parallel scan": Case(associative, 1, 1, "embed"),
    "parallel scan, a decay for every feature": Case(partial(associative, width=D), 1, 0),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_diagonal_recurrence(name: str) -> None:
    apply, norms, folded, edited = DIAGONAL[name]
    report = check(apply, SSM, X, counts=(norms, folded, 0), edited=edited).report
    if not folded:
        assert "`mul`" in report.norms[0].reason


# --- spectra and complex numbers -----------------------------------------------------------------

IMAGE = jnp.asarray(floats(B, 6, 4, DIN))
FOURIER = make(
    embed=(DIN, D), v=(D, OUT), block=BLOCK, re=(D, D, 2, 3), im=(D, D, 2, 3), skip=(D, D),
    bias=(D,), filter_re=(6, 3), filter_im=(6, 3), gate_re=(6, 3, D), gate_im=(6, 3, D),
    values=(DIN, H, HD), kernel=(T, H), wide=(H * HD, OUT), state=(D, HK), rate=(HK,), angle=(HK,),
    out_re=(HK, D), out_im=(HK, D),
)  # fmt: skip


def fourier_operator(p: Any, x: Array) -> Array:
    """FNO: the lowest frequencies go through kernels of their own, the pixels through one."""
    s = x @ p["embed"]
    spectrum = jnp.fft.rfft2(s, axes=(1, 2))
    low = jnp.einsum("bxyi,ioxy->bxyo", spectrum[:, :2, :3], jax.lax.complex(p["re"], p["im"]))
    mixed = jnp.zeros_like(spectrum).at[:, :2, :3].set(low)
    y = jnp.fft.irfft2(mixed, s=(6, 4), axes=(1, 2)) + s @ p["skip"] + p["bias"]
    return nn.gelu(norm(y)) @ p["v"]


def global_filter(p: Any, x: Array, name: str, read: Model = lambda z: z) -> Array:
    """GFNet: the spectrum of the normalised pixels is filtered, then comes an MLP."""
    s = x @ p["embed"]
    z = jnp.fft.rfft2(norm(s), axes=(1, 2), norm="ortho")
    weights = read(jax.lax.complex(p[f"{name}_re"], p[f"{name}_im"]))
    z = z * (weights if weights.ndim == 3 else weights[..., None])
    y = jnp.fft.irfft2(z, s=(6, 4), axes=(1, 2), norm="ortho")
    return head(p, s + mlp(p["block"], norm(y)))


def spectral_mixing(p: Any, x: Array, axis: int) -> Array:
    """FNet without its blocks: the stream takes up real parts of its own transform."""
    s = x @ p["embed"]
    return head(p, s + jnp.fft.fft(s, axis=axis).real)


def long_convolution(p: Any, x: Array, kernel: Model = lambda k: k) -> Array:
    """Values of every head are convolved over time, by a transform of twice the length."""
    values = jnp.einsum("btd,dhk->bthk", x, p["values"])
    spectra = jnp.fft.rfft(values, 2 * T, axis=1), jnp.fft.rfft(p["kernel"], 2 * T, axis=0)
    y = jnp.fft.irfft(spectra[0] * kernel(spectra[1])[..., None], 2 * T, axis=1)[:, :T]
    return norm(y).reshape(B, T, H * HD) @ p["wide"]


def complex_states(p: Any, x: Array, read: Model = jnp.real) -> Array:
    """S5 and LRU: a parallel scan over complex states, read by a complex kernel."""
    u = x @ p["embed"]
    decay = jnp.exp(-jnp.exp(p["rate"]) + 1j * p["angle"])
    rows = jnp.broadcast_to(decay, (B, T, HK)), (u @ p["state"]).astype(complex)

    def combine(a: Any, b: Any) -> Any:
        return a[0] * b[0], b[0] * a[1] + b[1]

    _, states = jax.lax.associative_scan(combine, rows, axis=1)
    y = read(states @ (p["out_re"] + 1j * p["out_im"]))
    return norm(2 * y + u @ p["skip"]) @ p["v"]


OUTPUTS = "out_re out_im skip"
SPECTRAL = {
    "Fourier operator": Case(fourier_operator, 1, 1, "re im skip bias"),
    "one filter for all channels": Case(partial(global_filter, name="filter"), 3, 3, ONE),
    "a filter for every channel": Case(partial(global_filter, name="gate"), 3, 2, ONE),
    "transform of the pixels": Case(partial(spectral_mixing, axis=1), 1, 1, "embed"),
    "transform of the channels": Case(partial(spectral_mixing, axis=-1), 1, 0),
    "long convolution": Case(long_convolution, 1, 1, "values"),
    "complex states": Case(complex_states, 1, 1, OUTPUTS),
    "imaginary parts": Case(partial(complex_states, read=lambda z: z.conj().imag), 1, 1, OUTPUTS),
    "sizes of complex numbers": Case(partial(complex_states, read=jnp.abs), 1, 0),
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectra_and_complex_numbers(name: str) -> None:
    """Linear for every channel, whatever becomes of the positions."""
    apply, norms, folded, edited = SPECTRAL[name]
    x = X if apply is long_convolution or "complex" in name or "imag" in name else IMAGE
    check(apply, FOURIER, x, counts=(norms, folded, 0), edited=edited)


def test_complex_value_is_centered_where_that_pays() -> None:
    """What a spectrum is made of may not be edited, so the spectrum itself loses its mean."""

    def apply(p: Any, x: Array) -> Any:
        z = jnp.fft.rfft(jnp.tanh(x @ p["embed"]), axis=1)
        return sum(norm(jnp.fft.irfft(z * k, T, axis=1)) @ p["v"] for k in (1.0, 2.0, 3j, 4.0, 5.0))

    report = check(apply, FOURIER, X, counts=(5, 5, 1)).report
    assert not report.edits


def test_function_that_was_traced_before() -> None:
    """What calls it is looked into like any other call."""
    stream = jax.ShapeDtypeStruct((B, T, D), X.dtype)
    traced = jax.jit(lambda s: block(PARAMS["block"], s)).trace(stream)

    def apply(p: Any, x: Array) -> Array:
        return head(p, traced(x @ p["embed"]))

    check(apply, PARAMS, X, counts=(2, 2, 0), edited="embed")
