"""Haiku: its norms and layers, its lifted transforms, state and random keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold.report.report import Report
from tests.frameworks.harness import check_folds, check_left, check_taken_up, ramp
from tests.helpers.contracts import (
    assert_identical,
    check_contracts,
    counts,
    fold_checked,
    relative_difference,
    removed_sums,
    snapshot,
)
from tests.models.zoo import perturb
from tests.models.zoo.base import floats, initial, tokens

Array = jax.Array
Layer = Callable[[Array], Any]

B, T, DIN, OUT, L = 3, 5, 9, 7, 2
D, HEADS, KEY, HID, VOCAB = 14, 6, 4, 22, 17  # no two axes of a value have equal sizes
X, OTHER_X = jnp.asarray(floats(B, T, DIN)), jnp.asarray(floats(2, 4, DIN))
IDS = jnp.asarray(tokens(B, T, VOCAB))


def init(transformed: Any, *inputs: Any) -> Any:
    """Parameters away from their defaults, and state (if any) as it starts."""
    made = jax.eval_shape(transformed.init, jax.random.key(0), *inputs)
    params = made[0] if isinstance(transformed, hk.TransformedWithState) else made
    return perturb(jax.tree_util.tree_map_with_path(initial, params))


def build(forward: Callable[..., Any], *inputs: Any) -> tuple[Callable[..., Any], Any]:
    """``apply(params, *inputs)`` without random keys, and parameters."""
    transformed = hk.without_apply_rng(hk.transform(forward))
    return jax.jit(transformed.apply), init(transformed, *inputs)


def edited(report: Report) -> set[str]:
    return {str(edit) for edit in report.edits}


layer_norm = partial(hk.LayerNorm, create_scale=True, create_offset=True)
norm = partial(layer_norm, -1)


# --- one norm ------------------------------------------------------------------------------------


def grouped(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], 3, 4)


def called_with_scales(x: Array) -> Array:
    """Scale and offset computed from data, as in adaptive norms."""
    scale, offset = (hk.Linear(12, name=name)(x.mean(1, keepdims=True)) for name in ("g", "c"))
    return hk.LayerNorm(-1, False, False)(hk.Linear(12)(x), scale, offset)


def channels_first(x: Array) -> Array:
    """(batch, token, feature) to (batch, feature, token)."""
    return hk.Conv1D(12, 3, data_format="NCW")(x.swapaxes(1, 2))


# name: (layer that holds one LayerNorm over 12 values of a projection, sizes of those axes)
FOLDING: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "scale and offset": (lambda x: norm()(hk.Linear(12)(x)), (12,)),
    "scale only": (lambda x: hk.LayerNorm(-1, True, False)(hk.Linear(12)(x)), (12,)),
    "offset only": (lambda x: hk.LayerNorm(2, False, True)(hk.Linear(12)(x)), (12,)),
    "neither": (lambda x: hk.LayerNorm(-1, False, False)(hk.Linear(12)(x)), (12,)),
    "large eps": (lambda x: norm(eps=0.3)(hk.Linear(12)(x)), (12,)),
    "fast variance": (lambda x: norm(use_fast_variance=True)(hk.Linear(12)(x)), (12,)),
    "scale and offset at call time": (called_with_scales, (12,)),
    "two axes": (
        lambda x: layer_norm((-2, -1), param_axis=(-2, -1))(grouped(hk.Linear(12)(x))),
        (3, 4),
    ),
    "two axes, scale along one": (
        lambda x: layer_norm(slice(2, None), param_axis=-1)(grouped(hk.Linear(12)(x))),
        (3, 4),
    ),
    "heads": (lambda x: norm()(grouped(hk.Linear(12)(x))), (4,)),
    "features first": (lambda x: layer_norm(1, param_axis=1)(channels_first(x)), (12,)),
    "groups of a token": (lambda x: hk.GroupNorm(3, slice(2, None))(hk.Linear(12)(x)), (4,)),
    "token by token": (lambda x: hk.BatchApply(norm())(hk.Linear(12)(x)), (12,)),
    "sequential": (lambda x: hk.Sequential([hk.Linear(12), norm()])(x), (12,)),
    "convolution": (lambda x: norm()(hk.Conv1D(12, 3, 2)(x)), (12,)),
    "groups of a convolution": (
        lambda x: norm()(grouped(hk.Conv1D(12, 2, feature_group_count=3)(x))),
        (4,),
    ),
    "transposed convolution": (lambda x: norm()(hk.Conv1DTranspose(12, 3, 2)(x)), (12,)),
    "average pooling": (
        lambda x: norm()(hk.avg_pool(hk.Conv1D(12, 1)(x), (2, 1), 1, "SAME")),
        (12,),
    ),
    "without bias": (lambda x: norm()(hk.Linear(12, with_bias=False)(x)), (12,)),
}


@pytest.mark.parametrize(("layer", "sizes"), FOLDING.values(), ids=FOLDING)
def test_norm_folds(layer: Layer, sizes: tuple[int, ...]) -> None:
    check_folds(*build(lambda x: jnp.sin(layer(x)), X), X, sizes=sizes, sums=(2, 3))


@pytest.mark.parametrize(("offset", "biased", "taken"), [(0, 0, 1), (1, 1, 1), (1, 0, 0)])
def test_scale_is_taken_up(offset: int, biased: int, taken: int) -> None:
    """Without an offset Haiku adds a zero."""

    def forward(x: Array) -> Array:
        y = hk.LayerNorm(-1, True, bool(offset))(hk.Linear(12)(x))
        return hk.Linear(OUT, with_bias=bool(biased))(y)

    check_taken_up(taken, *build(forward, X), X)


# name: (layer that holds one norm, where the way is barred)
LEFT: dict[str, tuple[Layer, str]] = {
    "group norm over tokens": (lambda x: hk.GroupNorm(3)(hk.Linear(12)(x)), "group_norm"),
    "instance norm": (lambda x: hk.InstanceNorm(True, True)(hk.Linear(12)(x)), "an input"),
    "tokens and features": (
        lambda x: layer_norm((1, 2), param_axis=-1)(hk.Linear(12)(x)),
        "layer_norm",
    ),
    "tokens": (lambda x: hk.LayerNorm(1, True, True)(hk.Linear(12)(x)), "an input"),
    "nonlinear": (lambda x: norm()(jax.nn.relu(hk.Linear(12)(x))), "max"),
    "norm of a norm": (lambda x: norm()(norm(name="first")(x)), "first"),
    "depthwise convolution": (
        lambda x: norm()(hk.DepthwiseConv1D(2, 3)(x)),
        "reduces over positions",
    ),
    "all groups of a convolution": (
        lambda x: norm()(hk.Conv1D(12, 2, feature_group_count=3)(x)),
        "layer_norm",
    ),
    "maximum pooling": (
        lambda x: norm()(hk.max_pool(hk.Conv1D(12, 1)(x), (2, 1), 1, "SAME")),
        "reduce_window_max",
    ),
}


@pytest.mark.parametrize(("layer", "obstacle"), LEFT.values(), ids=LEFT)
def test_norm_is_left_alone(layer: Layer, obstacle: str) -> None:
    check_left(*build(lambda x: jnp.sin(layer(x)), X), X, obstacle=obstacle)


def rms_norm(s: Array) -> Array:
    return hk.RMSNorm(-1)(s)


# What reads the stream besides a LayerNorm, and how many LayerNorms then fold.
READERS: dict[str, tuple[Layer, int]] = {
    "another norm": (lambda s: norm(eps=1e-2)(s), 2),
    "softmax": (jax.nn.softmax, 1),
    "rms norm": (rms_norm, 0),
    "linear": (lambda s: hk.Linear(OUT)(s), 0),
    "group norm over tokens": (lambda s: hk.GroupNorm(3)(s), 0),
    "output": (lambda s: s, 0),
}


def read_twice(reader: Layer, x: Array) -> Any:
    s = hk.Linear(12)(x)
    return hk.Linear(OUT)(norm()(s)), reader(s)


@pytest.mark.parametrize(("reader", "folded"), READERS.values(), ids=READERS)
def test_readers_of_the_stream(reader: Layer, folded: int) -> None:
    report = jax_lnfold.analyze(*build(partial(read_twice, reader), X), X)
    assert (report.n_folded, report.n_inserted) == (folded, 0)
    assert all(n.folded for n in report.norms) == bool(folded)


def test_rms_norm_is_no_layer_norm() -> None:
    assert jax_lnfold.analyze(*build(lambda x: rms_norm(hk.Linear(12)(x)), X), X).norms == ()


def test_all_of_these_compute_the_same() -> None:
    """One program of everything above that folds, which compiles faster than one each."""

    def forward(x: Array) -> dict[str, Any]:
        layers = {name: layer for name, (layer, _) in FOLDING.items()}
        readers = {name: partial(read_twice, reader) for name, (reader, n) in READERS.items() if n}
        return {name: layer(x) for name, layer in (layers | readers).items()}

    apply, params = build(forward, X)
    assert fold_checked(apply, params, X).report.n_folded > 0


# --- a GPT, with its blocks run in every way that Haiku has ---------------------------------------


class Block(hk.Module):
    """A pre-norm transformer block."""

    def __call__(self, s: Array) -> Array:
        length = s.shape[-2]
        mask = np.tril(np.ones((length, length), bool))[(None,) * (s.ndim - 1)]
        h = norm()(s)
        attention = hk.MultiHeadAttention(
            HEADS, KEY, w_init=hk.initializers.VarianceScaling(), model_size=D
        )
        s = s + attention(h, h, h, mask)
        return s + hk.Linear(D, name="down")(jax.nn.gelu(hk.Linear(HID, name="up")(norm()(s))))


Make = Callable[[], Layer]
Run = Callable[[Make, Array], Array]


def looped(make: Make, s: Array) -> Array:
    for _ in range(L):
        s = make()(s)
    return s


def remat(make: Make, s: Array) -> Array:
    for _ in range(L):
        s = hk.remat(make())(s)
    return s


def batched(make: Make, s: Array) -> Array:
    """One sequence at a time."""
    return hk.vmap(partial(remat, make), split_rng=False)(s)


def layer_stack(make: Make, s: Array) -> Array:
    return hk.experimental.layer_stack(L)(lambda s: make()(s))(s)


def layer_stack_of_remat(make: Make, s: Array) -> Array:
    return hk.experimental.layer_stack(L, unroll=2)(hk.remat(lambda s: make()(s)))(s)


def layer_stack_with_inputs(make: Make, s: Array) -> Array:
    """Every layer gets its own weight for what it adds, and returns the weight squared."""
    stack = hk.experimental.layer_stack(L, with_per_layer_inputs=True)
    weights = jnp.linspace(0.9, 0.5, L, dtype=s.dtype)
    return stack(lambda s, w: (s + w * (make()(s) - s), w**2))(s, weights)[0]


def scan(make: Make, s: Array) -> Array:
    """One block's parameters for all layers (ALBERT)."""
    block = make()
    return hk.scan(lambda s, _: (block(s), None), s, None, length=L)[0]


def fori_loop(make: Make, s: Array) -> Array:
    block = make()
    s = block(s) if hk.running_init() else s
    return hk.fori_loop(0, L, lambda i, s: block(s), s)


# name: (how the blocks are run, how often each LayerNorm of the program runs)
RUNS: dict[str, tuple[Run, list[int]]] = {
    "looped": (looped, [1] * (2 * L + 1)),
    "vmap of remat": (batched, [1] * (2 * L + 1)),
    "layer_stack": (layer_stack, [L, L, 1]),
    "layer_stack of remat, unrolled": (layer_stack_of_remat, [L, L, 1]),
    "layer_stack with inputs": (layer_stack_with_inputs, [L, L, 1]),
    "scan": (scan, [L, L, 1]),
    "fori_loop": (fori_loop, [L, L, 1]),
}
TIED = ("looped", "layer_stack")


def gpt(run: Run, tied: bool = False, **embed: Any) -> Layer:
    """A forward function from token ids to logits."""

    def forward(ids: Array) -> Array:
        table = hk.Embed(VOCAB, D, name="tokens", **embed)
        positions = hk.get_parameter("positions", (T, D), init=jnp.zeros)
        h = norm(name="final_norm")(run(Block, table(ids) + positions[: ids.shape[1]]))
        return h @ table.embeddings.T if tied else hk.Linear(VOCAB, name="head")(h)

    return forward


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in RUNS), *((name, True) for name in TIED)]
)
def test_gpt(name: str, tied: bool) -> None:
    """2L+1 LayerNorms fold; a tied table is read by the logits, so its rows are centered once."""
    run, runs = RUNS[name]
    apply, params = build(gpt(run, tied), IDS)
    folded = fold_checked(apply, params, IDS)
    assert counts(folded.report) == (len(runs), len(runs), int(tied))
    assert [n.count for n in folded.report.norms] == runs
    assert ("tokens/embeddings centered along axis 1" in edited(folded.report)) == (not tied)
    # `jnp.mean` and that of `jnp.var`, less the inserted
    assert removed_sums(apply, params, folded, IDS) == 2 * len(runs) - tied


def test_gpt_edits_every_writer() -> None:
    """Stacked kernels along their last axis, and nothing that does not write into the stream."""
    apply, params = build(gpt(layer_stack), IDS)
    report = jax_lnfold.analyze(apply, params, IDS)
    block = "__layer_stack_no_per_layer/block"
    assert edited(report) == {
        "tokens/embeddings centered along axis 1",
        "~/positions centered along axis 1",
        f"{block}/multi_head_attention/linear/w centered along axis 2",
        f"{block}/multi_head_attention/linear/b centered along axis 1",
        f"{block}/down/w centered along axis 2",
        f"{block}/down/b centered along axis 1",
    }


def test_one_hot_lookup() -> None:
    apply, params = build(gpt(layer_stack, lookup_style="ONE_HOT"), IDS)
    assert counts(jax_lnfold.analyze(apply, params, IDS)) == (3, 3, 0)


def test_stream_of_every_layer_returned() -> None:
    """Per-layer outputs that show the stream: a mean would be seen in them."""

    def forward(ids: Array, raw: bool) -> Any:
        def layer(s: Array, w: Array) -> tuple[Array, Array]:
            return s + w * (Block()(s) - s), s if raw else norm(name="probe")(s)

        stack = hk.experimental.layer_stack(L, with_per_layer_inputs=True)
        s = hk.Embed(VOCAB, D)(ids)
        s, seen = stack(layer)(s, jnp.ones(L, s.dtype))
        return hk.Linear(OUT)(norm()(s)), seen

    for raw, want in ((True, (3, 0, 0)), (False, (4, 4, 0))):
        apply, params = build(partial(forward, raw=raw), IDS)
        assert counts(jax_lnfold.analyze(apply, params, IDS)) == want
    fold_checked(apply, params, IDS)


def test_switched_blocks() -> None:
    """Branches that all write zero-mean into the stream, and one that does not."""

    def forward(ids: Array, nonlinear: bool) -> Array:
        s = hk.Embed(VOCAB, D)(ids)
        blocks = [Block(name="first"), jnp.tanh if nonlinear else Block(name="second")]
        if hk.running_init():
            for block in blocks:
                block(s)
        return hk.Linear(OUT)(norm()(hk.switch(ids[0, 0] % 2, blocks, s)))

    for nonlinear, want in ((False, (5, 5, 0)), (True, (3, 0, 0))):
        apply, params = build(partial(forward, nonlinear=nonlinear), IDS)
        assert counts(jax_lnfold.analyze(apply, params, IDS)) == want
    apply, params = build(partial(forward, nonlinear=False), IDS)
    folded = jax_lnfold.fold(apply, params, IDS)
    for first in (0, 1):
        check_contracts(apply, params, folded, IDS.at[0, 0].set(first))


# --- random keys and state ------------------------------------------------------------------------


def mlps(run: Run, drop: Layer, x: Array) -> Array:
    """Residual MLPs with `drop` on what they add to the stream."""

    def block(s: Array) -> Array:
        return s + drop(hk.Linear(12)(jax.nn.gelu(hk.Linear(HID)(norm()(s)))))

    return hk.Linear(OUT, name="head")(norm()(run(lambda: block, hk.Linear(12)(x))))


def dropout(*shared: int) -> Layer:
    """Training-time dropout whose mask is shared along these axes."""
    return lambda h: hk.dropout(hk.next_rng_key(), 0.4, h, broadcast_dims=shared)


@pytest.mark.parametrize(
    ("drop", "run", "want"),
    [
        pytest.param(dropout(), looped, (3, 1, 0), id="elementwise"),
        # The LayerNorm in the loop reads what the dropout left in the iteration before.
        pytest.param(dropout(), layer_stack, (2, 0, 0), id="elementwise, stacked"),
        pytest.param(dropout(0, 1), looped, (3, 1, 0), id="features"),
        pytest.param(dropout(2), looped, (3, 3, 0), id="tokens"),
        pytest.param(dropout(1, 2), layer_stack, (2, 2, 0), id="samples, stacked"),
    ],
)
def test_dropout_in_training(drop: Layer, run: Run, want: tuple[int, int, int]) -> None:
    """`hk.transform` with a key: a mask that differs between features spoils their mean."""
    transformed = hk.transform(partial(mlps, run, drop))
    report = jax_lnfold.analyze(transformed.apply, init(transformed, X), jax.random.key(3), X)
    assert counts(report) == want


def test_dropout_computes_the_same() -> None:
    """The folded program draws the same masks."""

    def forward(x: Array) -> list[Array]:
        return [mlps(looped, dropout(), x), mlps(layer_stack, dropout(1, 2), x)]

    transformed = hk.transform(forward)
    key = jax.random.key(3, impl="rbg")  # compiles faster
    report = fold_checked(jax.jit(transformed.apply), init(transformed, X), key, X).report
    assert report.n_folded > 0


def test_transform_without_a_key() -> None:
    """``apply(params, None, x)``, as in evaluation."""
    transformed = hk.transform(partial(mlps, looped, lambda h: h))
    apply, params = jax.jit(transformed.apply), init(transformed, X)
    assert counts(fold_checked(apply, params, None, X).report) == (3, 3, 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("inside", "folded"), [(False, 1), (True, 0)])
def test_batch_norm_with_state(training: bool, inside: bool, folded: int) -> None:
    """BatchNorm before the projection is harmless; between it and the LayerNorm it is not."""

    def forward(x: Array) -> Array:
        batch_norm = partial(
            hk.BatchNorm(True, True, 0.9), is_training=training or hk.running_init()
        )
        return norm()(batch_norm(hk.Linear(12)(x)) if inside else hk.Linear(12)(batch_norm(x)))

    transformed = hk.without_apply_rng(hk.transform_with_state(forward))
    params = init(transformed, X)
    _, shapes = jax.eval_shape(transformed.init, jax.random.key(0), X)
    state = jax.tree.map(ramp, shapes)
    before = snapshot(state)
    report = fold_checked(jax.jit(transformed.apply), params, state, X).report
    assert [n.folded for n in report.norms if n.path == "layer_norm"] == [bool(folded)]
    assert (report.n_folded, report.n_inserted) == (folded, 0)
    assert_identical(state, before)


def test_folded_params_train_and_evaluate() -> None:
    """What a user does: the folded tree in the original `apply`, and gradients through it."""
    apply, params = build(partial(mlps, layer_stack, lambda h: h), X)
    folded = fold_checked(apply, params, X)
    check_contracts(apply, params, folded, OTHER_X)
    tree = hk.data_structures.to_mutable_dict(folded.params)
    assert relative_difference(apply(tree, OTHER_X), apply(params, OTHER_X)) < 1e-12
    head, rest = hk.data_structures.partition(lambda module, name, _: module == "head", tree)
    want, got = (
        jax.grad(lambda head, f=f: jnp.sin(f(hk.data_structures.merge(rest, head), X)).sum())(head)
        for f in (apply, folded.apply)
    )
    assert relative_difference(got, want) < 1e-11


# --- recurrences ----------------------------------------------------------------------------------


class Recurrence(hk.RNNCore):
    """A state that decays at a rate given by the input, plus a projection; normalised."""

    def __init__(self, act: Layer) -> None:
        super().__init__()
        self.act = act

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        keep = jax.nn.sigmoid(hk.Linear(1, name="keep")(x))
        state = self.act(keep * state + hk.Linear(12, name="value")(x))
        return norm()(state), state

    def initial_state(self, batch_size: int | None) -> Array:
        return jnp.zeros((batch_size, 12))


@pytest.mark.parametrize(("act", "folded"), [(lambda s: s, 1), (jnp.tanh, 0)])
def test_dynamic_unroll(act: Layer, folded: int) -> None:
    """A linear recurrence keeps the mean of what it is fed zero (RetNet); an RNN does not."""

    def forward(x: Array) -> Array:
        core = Recurrence(act)
        return hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)[0]

    apply, params = build(forward, X)
    report = fold_checked(apply, params, X).report
    assert counts(report) == (1, folded, 0)
    assert report.norms[0].count == T
