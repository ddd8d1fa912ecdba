"""Flax NNX: split and merged modules, shared references, lifted transforms, state beside Params."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_lnfold
from tests.frameworks import harness
from tests.frameworks.harness import (
    Edits,
    Fold,
    assert_blames,
    check_as_accurate,
    check_folds_whole,
    draw,
    writer,
)
from tests.helpers.contracts import check_contracts, counts, fold_checked, relative_difference
from tests.models.zoo import perturb

Array = jax.Array
Make = Callable[[nnx.Rngs], Callable[[Array], Array]]

B, T, DIN, D, HID, OUT, L, VOCAB = 2, 5, 7, 12, 20, 3, 4, 17  # no two axes of equal size
HEADS, HEAD_DIM, RANK = 3, 6, 9


X, OTHER_X = draw(B, T, DIN), draw(3, 6, DIN)
IDS = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(B, T)))


class Block(nnx.Module):
    """A pre-norm MLP; `change` comes between the MLP and the stream."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        norm: Callable[..., nnx.Module] = nnx.LayerNorm,
        change: Callable[[Array], Array] = lambda h: h,
    ) -> None:
        self.norm = norm(D, rngs=rngs)
        self.up, self.down = linear(D, HID, rngs=rngs), linear(HID, D, rngs=rngs)
        self.change = change

    def __call__(self, s: Array) -> Array:
        return s + self.change(self.down(nnx.gelu(self.up(self.norm(s)))))


class Stream(nnx.Module):
    """A linear start, a body, a normed head."""

    def __init__(
        self,
        body: Make,
        rngs: nnx.Rngs,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        norm: Callable[..., nnx.Module] = nnx.LayerNorm,
    ) -> None:
        self.embed, self.body = linear(DIN, D, rngs=rngs), body(rngs)
        self.norm, self.head = norm(D, rngs=rngs), linear(D, OUT, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.norm(self.body(self.embed(x))))


class Layers(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, rngs: nnx.Rngs, make: Callable[[nnx.Rngs], nnx.Module] = Block) -> None:
        self.layers = nnx.List([make(rngs), make(rngs)])

    def __call__(self, s: Array) -> Array:
        for layer in self.layers:
            s = layer(s)
        return s


def moved(state: Any) -> Any:
    """A state around one, so that no mean is near zero and no variance negative."""
    return perturb(jax.tree.map(lambda leaf: np.ones(leaf.shape), state))


def build(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any]:
    """The graph of a module and a float64 state, without running any initialiser."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graphdef, moved(state)


def split(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[..., Array], Any]:
    """A module as a pure function of its state, and a state."""
    graphdef, state = build(make)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)), state


def fold_model(make: Callable[[nnx.Rngs], nnx.Module], *inputs: Array) -> jax_lnfold.Folded:
    return fold_checked(*split(make), *inputs)


def edits_of(report: jax_lnfold.Report) -> Edits:
    return {e.key_path.removesuffix("/value"): e.axes for e in report.edits}


assert_left = partial(harness.assert_left, "test_nnx")
START = writer("embed")
LAYERS = writer("body/layers/0/down") | writer("body/layers/1/down")


# --- ways to call a module -----------------------------------------------------------------------


def by_merge(graphdef: Any, state: Any, x: Array) -> Array:
    return nnx.merge(graphdef, state)(x)


def by_call(graphdef: Any, state: Any, x: Array) -> Array:
    y, _ = nnx.call((graphdef, state))(x)
    return y


def by_nnx_jit(graphdef: Any, state: Any, x: Array) -> Array:
    return nnx.jit(lambda module, x: module(x))(nnx.merge(graphdef, state), x)


def by_update(graphdef: Any, state: Any, x: Array) -> Array:
    """The state is put into a module that exists already."""
    module = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, state))
    nnx.update(module, state)
    return module(x)


@pytest.mark.parametrize("way", [by_merge, by_call, by_nnx_jit, by_update])
def test_ways_to_call(way: Callable[..., Array]) -> None:
    graphdef, state = build(partial(Stream, Layers))
    module = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))  # with Variables of its own
    apply = partial(way, graphdef)
    folded = fold_checked(jax.jit(apply), state, X)
    assert isinstance(folded.params, nnx.State)
    assert (counts(folded.report), edits_of(folded.report)) == ((3, 3, 0), START | LAYERS)
    nnx.update(module, folded.params)
    assert relative_difference(module(X), apply(state, X)) < 1e-12
    kernel = module.embed.kernel[...]
    assert (
        jnp.abs(kernel.mean(1)).max() < 1e-14 < jnp.abs(state["embed"]["kernel"][...].mean(1)).min()
    )


def test_module_as_the_tree() -> None:
    """A module is a pytree itself: the folded parameters are a module of its kind."""
    module = nnx.merge(*build(partial(Stream, Layers)))
    folded = fold_checked(jax.jit(lambda module, x: module(x)), module, X)
    assert isinstance(folded.params, Stream)
    assert (counts(folded.report), edits_of(folded.report)) == ((3, 3, 0), START | LAYERS)
    assert relative_difference(folded.params(X), module(X)) < 1e-12


def test_pure_dict() -> None:
    apply, state = split(partial(Stream, Layers))
    pure = nnx.to_pure_dict(state)

    def of_dict(pure: Any, x: Array) -> Array:
        whole = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(whole, pure)
        return apply(whole, x)

    folded = fold_checked(jax.jit(of_dict), pure, X)
    assert type(folded.params) is dict
    assert (counts(folded.report), edits_of(folded.report)) == ((3, 3, 0), START | LAYERS)


# --- lifted transforms ---------------------------------------------------------------------------


def scanned(
    axis: int = 0, step: Callable[..., Any] = lambda s, block: block(s), **options: Any
) -> Make:
    """Blocks with parameters stacked along `axis`, run by `nnx.scan`."""

    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            @nnx.split_rngs(splits=L)
            @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis}))
            def create(rngs: nnx.Rngs) -> Block:
                return Block(rngs)

            self.block = create(rngs)

        def __call__(self, s: Array) -> Array:
            axes = (nnx.Carry, nnx.StateAxes({nnx.Param: axis}))
            return nnx.scan(step, in_axes=axes, out_axes=nnx.Carry, **options)(s, self.block)

    return Stack


class Lifted(nnx.Module):
    """One block, run by `run(block, s)`."""

    def __init__(self, run: Callable[[Block, Array], Array], rngs: nnx.Rngs) -> None:
        self.block, self.run = Block(rngs), run

    def __call__(self, s: Array) -> Array:
        return self.run(self.block, s)


def lifted(run: Callable[[Block, Array], Array]) -> Make:
    return partial(Lifted, run)


def call(block: Block, s: Array) -> Array:
    return block(s)


def tanh(block: Block, s: Array) -> Array:
    return jnp.tanh(block(s))


class Members(nnx.Module):
    """An ensemble whose members read one stream and are averaged by `join`."""

    def __init__(self, join: Callable[[Array], Array], rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=L)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.block, self.join = create(rngs), join

    def __call__(self, s: Array) -> Array:
        return self.join(nnx.vmap(call, in_axes=(0, None), out_axes=0)(self.block, s))


def cond(block: Block, s: Array) -> Array:
    """Which branch runs is decided by the block's own parameters."""
    positive = block.norm.scale[0] > 0
    return nnx.cond(positive, call, lambda block, s: 2 * block(s), block, s)


def switch(block: Block, s: Array) -> Array:
    index = jnp.int32(block.norm.scale[0] > 0)
    return nnx.switch(index, (call, lambda block, s: -s), block, s)


def while_loop(block: Block, s: Array) -> Array:
    steps = jnp.int32(L) + jnp.int32(block.norm.scale[0] > 9)

    def body(carry: Any) -> Any:
        block, i, s = carry
        return block, i + 1, block(s)

    return nnx.while_loop(lambda c: c[1] < steps, body, (block, jnp.int32(0), s))[2]


def fori_loop(block: Block, s: Array) -> Array:
    def body(i: Array, carry: Any) -> Any:
        block, s = carry
        return block, block(s)

    return nnx.fori_loop(0, L, body, (block, s))[1]


ONCE = writer("body/block/down")
STACKED = writer("body/block/down", 2, 1)

FOLDS: dict[str, Fold] = {
    "remat": Fold(lifted(nnx.remat(call)), (1,), ONCE),
    "jit": Fold(lifted(nnx.jit(call)), (1,), ONCE),
    "scan": Fold(scanned(), (L,), STACKED),
    "scan along axis 1": Fold(scanned(1), (L,), writer("body/block/down", 2, 0)),
    "scan over remat, reversed": Fold(
        scanned(step=nnx.remat(lambda s, block: block(s)), reverse=True), (L,), STACKED
    ),
    "vmap over members": Fold(partial(Members, lambda y: y.mean(0)), (1,), STACKED),
    "vmap over samples": Fold(lifted(nnx.vmap(call, in_axes=(None, 0), out_axes=0)), (1,), ONCE),
    "cond": Fold(lifted(cond), (1, 1), ONCE),
    "switch": Fold(lifted(switch), (1,), ONCE),
    "while_loop": Fold(lifted(while_loop), (1,), ONCE),
    "fori_loop": Fold(lifted(fori_loop), (L,), ONCE),
    "Sequential": Fold(
        lambda rngs: nnx.Sequential(Block(rngs), lambda s: s / 2, Block(rngs)),
        (1, 1),
        writer("body/layers/0/down") | writer("body/layers/2/down"),
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds_through_the_transform(name: str) -> None:
    body, runs, edits = FOLDS[name]
    report = check_folds_whole(*split(partial(Stream, body)), runs, X, OTHER_X)
    assert edits_of(report) == START | edits


def cond_tanh(block: Block, s: Array) -> Array:
    return nnx.cond(block.norm.scale[0] > 0, call, tanh, block, s)


def cond_on_the_stream(block: Block, s: Array) -> Array:
    return nnx.cond(s[0, 0, 0] > 0, call, lambda block, s: -s, block, s)


def while_on_the_stream(block: Block, s: Array) -> Array:
    def body(carry: Any) -> Any:
        block, s = carry
        return block, block(s)

    return nnx.while_loop(lambda c: jnp.abs(c[1]).max() < 9, body, (block, s))[1]


LEFT: dict[str, tuple[Make, str]] = {
    "remat": (lifted(nnx.remat(tanh)), "tanh"),
    "jit": (lifted(nnx.jit(tanh)), "tanh"),
    "scan": (scanned(step=lambda s, block: jnp.tanh(block(s))), "tanh"),
    "members": (partial(Members, lambda y: jnp.tanh(y).mean(0)), "tanh"),
    "cond": (lifted(cond_tanh), "tanh"),
    "cond on the stream": (lifted(cond_on_the_stream), "slice"),
    "while_loop on the stream": (lifted(while_on_the_stream), "abs"),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_left_alone(name: str) -> None:
    body, primitive = LEFT[name]
    apply, state = split(partial(Stream, body))
    assert_left(apply, state, X, norms=2 + (name == "cond"), primitive=primitive)


def test_stream_of_every_layer_as_an_output_is_left_alone() -> None:
    class Stacked(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.stream = Stream(scanned(), rngs)

        def __call__(self, x: Array) -> Any:
            def step(s: Array, block: Block) -> tuple[Array, Array]:
                s = block(s)
                return s, s

            s, every = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(
                self.stream.embed(x), self.stream.body.block
            )
            return self.stream.norm(s if raw else every), every if raw else s.shape[0]

    for raw in (False, True):
        apply, state = split(Stacked)
        if raw:
            assert_left(apply, state, X, norms=2, primitive="scan")
        else:
            assert counts(fold_checked(apply, state, X).report) == (2, 2, 0)


# --- shared references ---------------------------------------------------------------------------


class Twice(nnx.Module):
    """One block under two names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = self.second = Block(rngs)

    def __call__(self, s: Array) -> Array:
        return self.second(self.first(s))


def test_block_under_two_names() -> None:
    apply, state = split(partial(Stream, Twice))
    assert "second" not in state["body"]
    report = fold_checked(apply, state, X).report
    assert (counts(report), edits_of(report)) == ((3, 3, 0), START | writer("body/first/down"))


class SharedWriter(nnx.Module):
    """A linear layer whose output is read as it is, and which writes into the stream if `both`."""

    def __init__(self, both: bool, rngs: nnx.Rngs) -> None:
        self.start, self.out = nnx.Linear(DIN, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.other = self.start if both else nnx.Linear(DIN, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.start(x) + self.out(jnp.tanh(self.other(x / 2))))


def test_writer_that_is_also_read_raw() -> None:
    apply, state = split(partial(SharedWriter, True))
    assert_left(apply, state, X, norms=1, primitive="tanh")
    apply, state = split(partial(SharedWriter, False))
    report = fold_checked(apply, state, X).report
    assert (counts(report), edits_of(report)) == ((1, 1, 0), writer("start") | writer("out"))


class Language(nnx.Module):
    """Tokens in, logits out. `head`: a layer of its own, the table, or a reference to its Param."""

    def __init__(self, head: str, rngs: nnx.Rngs) -> None:
        self.table, self.body = nnx.Embed(VOCAB, D, param_dtype=float, rngs=rngs), Layers(rngs)
        self.norm, self.how = nnx.LayerNorm(D, rngs=rngs), head
        if head == "own":
            self.kernel = nnx.Param(self.table.embedding[...])
        elif head != "attend":
            self.kernel = self.table.embedding

    def __call__(self, ids: Array) -> Array:
        s = self.body(self.table(ids))
        if self.how == "attend":
            return self.table.attend(self.norm(s))
        return (s if self.how == "raw" else self.norm(s)) @ self.kernel[...].T


@pytest.mark.parametrize("head", ["own", "attend", "reference"])
def test_embedding(head: str) -> None:
    """The logits notice a centering of the table: what is looked up is centered, once."""
    report = fold_model(partial(Language, head), IDS).report
    assert counts(report) == (3, 3, int(head != "own"))
    assert edits_of(report) == LAYERS | ({"table/embedding": (1,)} if head == "own" else {})
    assert all("test_nnx.py:" in i.after for i in report.insertions)


def test_table_that_reads_the_raw_stream_is_left_alone() -> None:
    apply, state = split(partial(Language, "raw"))
    assert_left(apply, state, IDS, norms=2, primitive="dot_general")


# --- state beside the parameters -----------------------------------------------------------------


class Normed(nnx.Module):
    """A BatchNorm beside the stream, or of it."""

    def __init__(self, of_the_stream: bool, rngs: nnx.Rngs) -> None:
        self.block, self.of_the_stream = Block(rngs), of_the_stream
        self.enter, self.out = nnx.Linear(D, HID, rngs=rngs), nnx.Linear(HID, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.batch = nnx.BatchNorm(D if of_the_stream else HID, rngs=rngs)

    def __call__(self, s: Array) -> Array:
        s = self.block(s)
        if self.of_the_stream:
            return s + self.batch(s)
        return s + self.out(nnx.gelu(self.batch(self.enter(self.norm(s)))))


def with_batch_stats(of_the_stream: bool, train: bool) -> tuple[Any, Any, Any]:
    module = nnx.eval_shape(lambda: Stream(partial(Normed, of_the_stream), nnx.Rngs(0)))
    module.train() if train else module.eval()
    graphdef, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)

    @jax.jit
    def apply(params: Any, stats: Any, x: Array) -> Any:
        module = nnx.merge(graphdef, params, stats)
        return module(x), nnx.state(module, nnx.BatchStat)

    return apply, moved(params), moved(stats)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_beside_the_stream(train: bool) -> None:
    """Updated statistics are an output, and equal; a BatchNorm is no LayerNorm in training, too."""
    apply, params, stats = with_batch_stats(False, train)
    folded = fold_checked(apply, params, stats, X)
    assert [(n.axes, n.folded) for n in folded.report.norms] == [((2,), True)] * 3
    assert folded.report.n_inserted == 0
    assert edits_of(folded.report) == START | ONCE | writer("body/out")
    _, updated = folded(stats, X)
    assert (relative_difference(updated, stats) > 1e-3) == train


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_of_the_stream_is_left_alone(train: bool) -> None:
    apply, params, stats = with_batch_stats(True, train)
    primitive = "(?:mul|reduce_sum|stop_gradient)" if train else "mul"
    assert_left(apply, params, stats, X, norms=2, primitive=primitive)


class Dropped(nnx.Module):
    """A block with dropout on what it adds to the stream, or on what its MLP reads."""

    def __init__(self, residual: bool, rngs: nnx.Rngs) -> None:
        self.dropout, self.residual = nnx.Dropout(0.4, rngs=rngs), residual
        self.norm, self.down = nnx.LayerNorm(D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, s: Array) -> Array:
        h = self.norm(s)
        return s + (self.dropout(self.down(h)) if self.residual else self.down(self.dropout(h)))


def key_or_count(leaf: Any) -> Array:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key(1, impl="rbg") if is_key else jnp.zeros(leaf.shape, leaf.dtype)


@pytest.mark.parametrize(
    ("residual", "train", "n_folded", "in_params"),
    [(True, True, 1, False), (True, False, 3, False), (False, True, 3, True)],
)
def test_dropout(residual: bool, train: bool, n_folded: int, in_params: bool) -> None:
    """Elementwise dropout on the residual leaves a mean; keys may be parameters or inputs."""
    blocks = partial(Layers, make=partial(Dropped, residual))
    module = nnx.eval_shape(lambda: Stream(blocks, nnx.Rngs(0)))
    module.train() if train else module.eval()
    graphdef, params, rest = nnx.split(module, nnx.Param, nnx.RngState)
    params, rest = moved(params), jax.tree.map(key_or_count, rest)

    def apply(params: Any, rest: Any, x: Array) -> Any:
        module = nnx.merge(graphdef, params, rest)
        return module(x), nnx.state(module, nnx.RngCount)

    def apply_whole(state: Any, x: Array) -> Any:
        return apply(*nnx.split_state(state, nnx.Param, nnx.RngState), x)

    if in_params:
        folded = fold_checked(jax.jit(apply_whole), nnx.merge_state(params, rest), X)
    else:
        folded = fold_checked(jax.jit(apply), params, rest, X)
        y, counters = folded(rest, X)
        again, _ = folded(nnx.merge_state(rest, counters), X)
        assert (relative_difference(again, y) > 0) == train
    report = folded.report
    assert counts(report) == (3, n_folded, 0)
    layers = writer("body/layers/0/down") | writer("body/layers/1/down")
    assert edits_of(report) == START | (layers if n_folded == 3 else {})
    for norm in report.norms[n_folded:]:
        assert_blames(norm, "select_n", "test_nnx")


class Sown(nnx.Module):
    """A block that notes down what it makes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.block = Block(rngs)

    def __call__(self, s: Array) -> Array:
        s = self.block(s)
        self.sow(nnx.Intermediate, "stream", s)
        return s


@pytest.mark.parametrize("returned", [False, True])
def test_sown_stream(returned: bool) -> None:
    """The stream is an output only where the intermediates are returned."""
    graphdef, state = build(partial(Stream, Sown))

    @jax.jit
    def apply(state: Any, x: Array) -> Any:
        y, noted = nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(x)
        return (y, noted) if returned else y

    if returned:
        assert_left(apply, state, X, norms=2, primitive="add")
    else:
        report = fold_checked(apply, state, X).report
        assert (counts(report), edits_of(report)) == ((2, 2, 0), START | ONCE)


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (partial(nnx.LayerNorm, reduction_axes=1), "it is an input of the function"),
        (partial(nnx.LayerNorm, reduction_axes=(1, 2)), "`reduce_sum` (test_nnx.py:"),
    ],
)
def test_layer_norm_over_tokens_is_left_alone(norm: Any, reason: str) -> None:
    apply, state = split(partial(Stream, lambda rngs: lambda s: s, norm=norm))
    report = jax_lnfold.fold(apply, state, X).report
    assert (counts(report), report.edits) == ((1, 0, 0), ())
    assert reason in report.norms[0].reason


class Attention(nnx.Module):
    """Pre-norm attention with normalised queries and keys; `raw` reads keys from the stream."""

    def __init__(self, raw: bool, rngs: nnx.Rngs) -> None:
        self.norm, self.raw = nnx.LayerNorm(D, rngs=rngs), raw
        self.attend = nnx.MultiHeadAttention(
            HEADS, D, HEADS * HEAD_DIM, normalize_qk=True, decode=False, rngs=rngs
        )

    def __call__(self, s: Array) -> Array:
        y = self.norm(s)
        return s + self.attend(y, s if self.raw else y)


QUERY_KEY = writer("body/attend/query", 2, 1) | writer("body/attend/key", 2, 1)


def test_attention_with_normalized_queries_and_keys() -> None:
    """Both LayerNorms run per head, so the projections are centered per head."""
    report = fold_model(partial(Stream, partial(Attention, False)), X).report
    assert counts(report) == (4, 4, 0)
    assert edits_of(report) == START | QUERY_KEY | writer("body/attend/out", 2, 0)


def test_attention_that_reads_keys_from_the_raw_stream() -> None:
    report = fold_model(partial(Stream, partial(Attention, True)), X).report
    assert [n.folded for n in report.norms] == [False, True, True, False]
    assert (report.n_inserted, edits_of(report)) == (0, QUERY_KEY)
    for norm in (report.norms[0], report.norms[-1]):
        assert_blames(norm, "dot_general", "test_nnx")


class Adapted(nnx.Module):
    """A start with a low-rank update, a block, a norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.start = nnx.LoRALinear(DIN, D, lora_rank=RANK, rngs=rngs)
        self.body, self.norm = Block(rngs), nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.body(self.start(x)))


def test_lora() -> None:
    report = fold_model(Adapted, X).report
    assert counts(report) == (2, 2, 0)
    expected = writer("start") | writer("body/down") | {"start/lora/lora_b": (1,)}
    assert edits_of(report) == expected


def test_lora_as_an_input() -> None:
    """An adapter that comes in with the data is not edited; its small kernel is centered."""
    graphdef, lora, params = nnx.split(
        nnx.eval_shape(lambda: Adapted(nnx.Rngs(0))), nnx.LoRAParam, ...
    )
    lora, params = moved(lora), moved(params)

    @jax.jit
    def apply(params: Any, lora: Any, x: Array) -> Array:
        return nnx.merge(graphdef, lora, params)(x)

    folded = fold_checked(apply, params, lora, X)
    assert counts(folded.report) == (2, 2, 1)
    assert edits_of(folded.report) == writer("start") | writer("body/down")
    other = jax.tree.map(lambda leaf: leaf**2 - 1, lora)
    check_contracts(apply, params, folded, other, X)


def test_partitioned_parameters() -> None:
    """Axis names are metadata of a Param: they stay."""
    linear = partial(
        nnx.Linear,
        kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out")),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros, ("out",)),
    )
    mesh = jax.make_mesh((1, 1), ("in", "out"))
    with jax.set_mesh(mesh):
        apply, state = split(partial(Stream, partial(Block, linear=linear), linear=linear))
        folded = fold_checked(apply, state, X)
    assert (counts(folded.report), edits_of(folded.report)) == (
        (2, 2, 0),
        START | writer("body/down"),
    )
    kernel, before = (s["embed"]["kernel"] for s in (folded.params, state))
    assert kernel.get_metadata() == before.get_metadata()
    assert "out" in str(kernel.get_metadata())


# --- precision, training -------------------------------------------------------------------------


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16(param_dtype: Any) -> None:
    """As many folds as in float64, and no less accurate than the original."""
    x = draw(20, 30, DIN)

    def of(**kinds: Any) -> tuple[Any, Any]:
        linear, norm = partial(nnx.Linear, **kinds), partial(nnx.LayerNorm, **kinds)
        block = partial(Layers, make=partial(Block, linear=linear, norm=norm))
        graphdef, state = nnx.split(
            nnx.eval_shape(lambda: Stream(block, nnx.Rngs(0), linear, norm))
        )
        return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)), state

    apply, shapes = of(dtype=jnp.bfloat16, param_dtype=param_dtype)
    start = perturb(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    state = jax.tree.map(lambda w: w.astype(param_dtype), start)
    folded = fold_checked(apply, state, x, rtol=0.1)
    assert (counts(folded.report), edits_of(folded.report)) == ((3, 3, 0), START | LAYERS)
    wide = jax.tree.map(lambda w: w.astype(jnp.float64), state)
    reference = of(dtype=jnp.float64)[0](wide, x)
    check_as_accurate(apply, state, folded, x, reference)


def test_gradient_of_a_module_with_folded_parameters() -> None:
    """The folded function's gradient, projected, is that of the module on folded parameters."""
    graphdef, state = build(partial(Stream, Layers))
    apply, target = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x)), draw(B, T, OUT)
    folded = jax_lnfold.fold(apply, state, X)

    def loss(module: Stream) -> Array:
        return jnp.mean((module(X) - target) ** 2)

    module = nnx.merge(graphdef, folded.params)
    value, grads = nnx.jit(nnx.value_and_grad(loss))(module)
    got, folded_grads = jax.jit(
        jax.value_and_grad(lambda p: jnp.mean((folded.apply(p, X) - target) ** 2))
    )(folded.params)
    assert abs(got - value) < 1e-12 * value
    assert relative_difference(folded.plan.center(folded_grads), nnx.state(grads)) < 1e-10
    assert relative_difference(folded_grads, nnx.state(grads)) > 1e-6


class WithAdapters(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.LoRALinear(7, 12, lora_rank=2, rngs=rngs)
        self.block = nnx.LoRALinear(7, 12, lora_rank=3, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(12, rngs=rngs), nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(self.stem(x) + self.block(jnp.tanh(x))))


@pytest.mark.parametrize("constrained", [True, False])
def test_adapters_are_trained_alone(constrained: bool) -> None:
    model, x = WithAdapters(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (6, 7))
    graphdef, state = nnx.split(model)
    folded = jax_lnfold.fold(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
    assert folded.report.n_folded == 1
    nnx.update(model, folded.params)
    last = jax_lnfold.center_updates(folded.plan) if constrained else optax.identity()
    tx = optax.chain(optax.adamw(1e-2), last)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    before = jax.tree.map(np.array, nnx.state(model, nnx.LoRAParam))

    @nnx.jit
    def step(model: WithAdapters, optimizer: nnx.Optimizer) -> None:
        def loss(model: WithAdapters) -> jax.Array:
            return jnp.square(folded.apply(nnx.state(model), x) - 1).mean()

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    for _ in range(30):
        step(model, optimizer)
    moved = jax.tree.map(
        lambda x, y: float(jnp.abs(x - y).max()), nnx.state(model, nnx.LoRAParam), before
    )
    assert all(change > 1e-3 for change in jax.tree.leaves(moved))
    difference = np.abs(folded.apply(nnx.state(model), x) - model(x)).max()
    assert difference < 1e-6 if constrained else difference > 1e-3


def test_what_was_merged_is_not_trained_without_what_took_it_up() -> None:
    model, x = WithAdapters(nnx.Rngs(0)), jnp.ones((6, 7))
    graphdef, state = nnx.split(model)
    plan = jax_lnfold.plan_fold(lambda s, x: nnx.merge(graphdef, s)(x), state, x, fold_affine=True)
    scale = nnx.state(model)["norm"]["scale"]
    with pytest.raises(jax_lnfold.TreeError, match="has leaf 'norm/scale/value', which other"):
        jax_lnfold.center_updates(plan).init({"norm": {"scale": scale}})
