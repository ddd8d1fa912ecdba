"""Equinox: modules as parameters, norms under `vmap`, shared and stacked layers, state."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
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
from tests.models.zoo.base import floats, tokens

Array = jax.Array
Key = jax.Array
Layer = Callable[..., Any]
Make = Callable[[], Layer]
Apply = Callable[..., Any]

B, T, DIN, OUT, L = 3, 5, 9, 7, 2
D, HEADS, HID, VOCAB = 24, 6, 22, 17  # no two axes of a value have equal sizes
X, OTHER_X = jnp.asarray(floats(B, T, DIN)), jnp.asarray(floats(2, 4, DIN))
IDS = jnp.asarray(tokens(B, T, VOCAB))


def split(make: Callable[[], Any], run: Layer | None = None) -> tuple[Apply, Any]:
    """``apply(params, *inputs)`` of the module that `make` returns, and random parameters.

    `run` calls the module on inputs, by default on each row of a batch.
    """
    shapes = eqx.filter_eval_shape(make)  # no time is spent on initialisers
    leaves, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    @jax.jit
    def apply(params: Any, *inputs: Any) -> Any:
        module = eqx.combine(params, static)
        return jax.vmap(module)(*inputs) if run is None else run(module, *inputs)

    return apply, perturb(jax.tree.map(lambda leaf: np.zeros(leaf.shape), leaves))


# --- one norm ------------------------------------------------------------------------------------

KEY = jax.random.key(0)
norm = partial(eqx.nn.LayerNorm, 12)


def linear(features_in: int = DIN, features_out: int = 12, **options: Any) -> eqx.nn.Linear:
    return eqx.nn.Linear(features_in, features_out, key=KEY, **options)


def conv(make: Layer = eqx.nn.Conv1d, **options: Any) -> eqx.nn.Sequential:
    """A convolution of a sample (T, DIN), with 12 features, which come last."""
    layer = make(DIN, 12, 3, key=KEY, **options)
    return eqx.nn.Sequential([eqx.nn.Lambda(jnp.transpose), layer, eqx.nn.Lambda(jnp.transpose)])


class OnTokens(eqx.Module):
    """A layer mapped over an axis of a sample."""

    layer: Layer
    axis: int = eqx.field(default=0, static=True)

    def __call__(self, x: Array, *, key: Key | None = None) -> Array:
        return jax.vmap(self.layer, self.axis, self.axis)(x)


def tokenwise(*layers: Layer) -> eqx.nn.Sequential:
    return eqx.nn.Sequential([OnTokens(layer) for layer in layers])


def chain(*layers: Layer) -> eqx.nn.Sequential:
    """Modules, and functions as they are."""
    return eqx.nn.Sequential(
        [layer if isinstance(layer, eqx.Module) else eqx.nn.Lambda(layer) for layer in layers]
    )


def grouped(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], 3, 4)


# name: (module with one LayerNorm over 12 values of a projection of (T, DIN), those axes' sizes)
FOLDING: dict[str, tuple[Make, tuple[int, ...]]] = {
    "two vmaps": (lambda: tokenwise(linear(), norm()), (12,)),
    "one vmap": (lambda: chain(lambda x: x[1], linear(), norm()), (12,)),
    "one vmap of both": (lambda: tokenwise(chain(linear(), norm())), (12,)),
    "weight only": (lambda: tokenwise(linear(), norm(use_bias=False)), (12,)),
    "bias only": (lambda: tokenwise(linear(), norm(use_weight=False)), (12,)),
    "neither": (lambda: tokenwise(linear(), norm(use_weight=False, use_bias=False)), (12,)),
    "large eps": (lambda: tokenwise(linear(), norm(eps=0.3)), (12,)),
    "projection without bias": (lambda: tokenwise(linear(use_bias=False), norm()), (12,)),
    "several axes": (lambda: tokenwise(linear(), chain(grouped), eqx.nn.LayerNorm((3, 4))), (3, 4)),
    "heads": (lambda: tokenwise(linear(), chain(grouped), OnTokens(eqx.nn.LayerNorm(4))), (4,)),
    "group norm of a vector": (lambda: tokenwise(linear(), eqx.nn.GroupNorm(3, 12)), (4,)),
    "mlp": (lambda: tokenwise(eqx.nn.MLP(DIN, 12, HID, 2, key=KEY), norm()), (12,)),
    "convolution": (lambda: chain(conv(stride=2), OnTokens(norm())), (12,)),
    "convolution, features first": (
        lambda: chain(jnp.transpose, eqx.nn.Conv1d(DIN, 12, 3, key=KEY), OnTokens(norm(), axis=1)),
        (12,),
    ),
    "transposed convolution": (
        lambda: chain(conv(eqx.nn.ConvTranspose1d), OnTokens(norm())),
        (12,),
    ),
    "groups of a convolution": (
        lambda: chain(conv(groups=3), OnTokens(chain(grouped, OnTokens(eqx.nn.LayerNorm(4))))),
        (4,),
    ),
    "average pooling": (
        lambda: chain(
            OnTokens(linear()), jnp.transpose, eqx.nn.AvgPool1d(2), jnp.transpose, OnTokens(norm())
        ),
        (12,),
    ),
    "mean over tokens": (lambda: chain(OnTokens(linear()), lambda x: x.mean(0), norm()), (12,)),
}


@pytest.mark.parametrize(("make", "sizes"), FOLDING.values(), ids=FOLDING)
def test_norm_folds(make: Make, sizes: tuple[int, ...]) -> None:
    check_folds(*split(make), X, sizes=sizes)


@pytest.mark.parametrize(("biased", "taken"), [(True, 1), (False, 0)])
def test_scale_and_shift_are_taken_up(biased: bool, taken: int) -> None:
    """`vmap` puts a transpose between the product of a layer and its bias."""
    model = split(lambda: tokenwise(linear(), norm(), linear(12, OUT, use_bias=biased)))
    check_taken_up(taken, *model, X)


def pooled(x: Array) -> Array:
    return eqx.nn.MaxPool1d(2)(x.T).T


# name: (module that holds one norm, where the way is barred)
LEFT: dict[str, tuple[Make, str]] = {
    "tokens and features": (
        lambda: chain(OnTokens(linear()), eqx.nn.LayerNorm((T, 12))),
        "LayerNorm",
    ),
    "tokens": (
        lambda: chain(OnTokens(linear()), jnp.transpose, OnTokens(eqx.nn.LayerNorm(T))),
        "an input",
    ),
    "group norm over tokens": (
        lambda: chain(jnp.transpose, eqx.nn.Conv1d(DIN, 12, 3, key=KEY), eqx.nn.GroupNorm(3, 12)),
        "GroupNorm",
    ),
    "all groups of a convolution": (lambda: chain(conv(groups=3), OnTokens(norm())), "LayerNorm"),
    "depthwise convolution": (
        lambda: chain(
            jnp.transpose,
            eqx.nn.Conv1d(DIN, DIN, 3, groups=DIN, key=KEY),
            jnp.transpose,
            OnTokens(eqx.nn.LayerNorm(DIN)),
        ),
        "conv_general_dilated",
    ),
    "nonlinear mlp": (
        lambda: tokenwise(eqx.nn.MLP(DIN, 12, HID, 1, final_activation=jnp.tanh, key=KEY), norm()),
        "tanh",
    ),
    "prelu": (lambda: tokenwise(linear(), eqx.nn.PReLU(), norm()), "select_n"),
    "maximum pooling": (
        lambda: chain(OnTokens(linear()), pooled, OnTokens(norm())),
        "reduce_window_max",
    ),
    "norm of a norm": (lambda: tokenwise(eqx.nn.LayerNorm(DIN), eqx.nn.LayerNorm(DIN)), "mul"),
}


@pytest.mark.parametrize(("make", "obstacle"), LEFT.values(), ids=LEFT)
def test_norm_is_left_alone(make: Make, obstacle: str) -> None:
    check_left(*split(make), X, obstacle=obstacle)


def test_rms_norm_is_no_layer_norm() -> None:
    apply, params = split(lambda: tokenwise(linear(), eqx.nn.RMSNorm(12)))
    assert jax_lnfold.analyze(apply, params, X).norms == ()


class TwoReaders(eqx.Module):
    """A projection that a LayerNorm and something else read."""

    reader: Layer
    linear: eqx.nn.Linear = eqx.field(default_factory=linear)
    norm: eqx.nn.LayerNorm = eqx.field(default_factory=norm)

    def __call__(self, x: Array) -> Any:
        return self.norm(s := self.linear(x)), self.reader(s)


# What reads the stream besides a LayerNorm, and how many norms then fold.
READERS: dict[str, tuple[Make, int]] = {
    "another norm": (lambda: norm(eps=1e-2), 2),
    "softmax": (lambda: jax.nn.softmax, 1),
    "group norm": (
        lambda: eqx.nn.GroupNorm(3, 12),
        1,
    ),  # a shift of all features is one of each group
    "rms norm": (lambda: eqx.nn.RMSNorm(12), 0),
    "linear": (lambda: linear(12, OUT), 0),
    "output": (lambda: eqx.nn.Identity(), 0),
}


@pytest.mark.parametrize(("reader", "folded"), READERS.values(), ids=READERS)
def test_readers_of_the_stream(reader: Make, folded: int) -> None:
    apply, params = split(lambda: OnTokens(TwoReaders(reader())))
    report = jax_lnfold.analyze(apply, params, X)
    assert (report.n_folded, report.n_inserted) == (folded, 0)


def test_all_of_these_compute_the_same() -> None:
    """One program of everything above that folds, which compiles faster than one each."""

    def make() -> dict[str, Layer]:
        modules = {name: make() for name, (make, _) in FOLDING.items()}
        readers = {name: OnTokens(TwoReaders(make())) for name, (make, n) in READERS.items() if n}
        return modules | readers

    def run(modules: dict[str, Layer], x: Array) -> Any:
        return {name: jax.vmap(module)(x) for name, module in modules.items()}

    apply, params = split(make, run)
    assert fold_checked(apply, params, X).report.n_folded > 0


@pytest.mark.parametrize(("features_in", "inserted"), [(7, 1), (9, 0)])
def test_weight_norm(features_in: int, inserted: int) -> None:
    """A normalised kernel is computed: centering it costs 2 * 12 * in, its LayerNorm 12 * B * T."""
    assert 2 * 7 < B * T < 2 * 9
    apply, params = split(lambda: tokenwise(eqx.nn.WeightNorm(linear(features_in)), norm()))
    x = jnp.asarray(floats(B, T, features_in))
    folded = fold_checked(apply, params, x)
    assert counts(folded.report) == (1, inserted, inserted)
    check_contracts(apply, params, folded, x[:2, :4])


# --- a GPT, with its blocks run in every way that Equinox has -------------------------------------


def keep(h: Array, key: Key | None) -> Array:
    return h


class Block(eqx.Module):
    """A pre-norm transformer block; `drop` is applied to what it adds to the stream."""

    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    drop: Layer
    heads: Layer | None = None

    def __init__(
        self, key: Key, drop: Layer = keep, heads: Make = lambda: None, p: float = 0.0
    ) -> None:
        keys = jax.random.split(key)
        self.norms = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
        self.attention = eqx.nn.MultiheadAttention(
            HEADS, D, use_output_bias=True, dropout_p=p, key=keys[0]
        )
        self.mlp = eqx.nn.MLP(D, D, HID, 1, jax.nn.gelu, key=keys[1])
        self.drop, self.heads = drop, heads()

    def __call__(self, s: Array, key: Key | None = None) -> Array:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        mask = np.tril(np.ones((len(s), len(s)), bool))
        h = jax.vmap(self.norms[0])(s)
        h = self.attention(h, h, h, mask, key=keys[0], process_heads=self.heads)
        s = s + self.drop(h, keys[1])
        return s + self.drop(jax.vmap(self.mlp)(jax.vmap(self.norms[1])(s)), keys[2])


class Rotary(eqx.Module):
    """Rotary positions on queries and keys, without parameters."""

    rotate: eqx.nn.RotaryPositionalEmbedding

    def __call__(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        turn = jax.vmap(self.rotate, 1, 1)
        return turn(q), turn(k), v


class NormedHeads(eqx.Module):
    """LayerNorms of queries and keys (ViT-22B)."""

    query: eqx.nn.LayerNorm
    key: eqx.nn.LayerNorm

    def __call__(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        return jax.vmap(jax.vmap(self.query))(q), jax.vmap(jax.vmap(self.key))(k), v


def shared_tables(embedding: eqx.nn.Embedding, head: eqx.nn.Linear) -> eqx.nn.Shared:
    """Tie the head to the embedding, as the documentation of `eqx.nn.Shared` does."""
    return eqx.nn.Shared(
        (embedding, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight
    )


Run = Callable[[Any, Array, Any], Array]


def looped(blocks: Any, s: Array, key: Key | None) -> Array:
    for i, block in enumerate(blocks):
        s = block(s, key if key is None else jax.random.fold_in(key, i))
    return s


def checkpointed(blocks: Any, s: Array, key: Key | None) -> Array:
    return looped([eqx.filter_checkpoint(block) for block in blocks], s, key)


def scanned(blocks: Any, s: Array, key: Key | None) -> Array:
    """One block whose arrays have a leading axis of layers."""
    arrays, static = eqx.partition(blocks, eqx.is_array)
    return jax.lax.scan(lambda s, a: (eqx.combine(a, static)(s), None), s, arrays)[0]


def separate(**options: Any) -> Any:
    return tuple(Block(key, **options) for key in jax.random.split(KEY, L))


def stacked(**options: Any) -> Any:
    return eqx.filter_vmap(partial(Block, **options))(jax.random.split(KEY, L))


class GPT(eqx.Module):
    """From one sequence of token ids to logits."""

    tables: Any
    positions: Array
    blocks: Any
    norm: eqx.nn.LayerNorm
    run: Run = eqx.field(static=True)

    def __init__(self, blocks: Any, run: Run = looped, tie: Layer = lambda *pair: pair) -> None:
        embedding = eqx.nn.Embedding(VOCAB, D, key=KEY)
        self.tables = tie(embedding, eqx.nn.Linear(D, VOCAB, key=KEY))
        self.positions, self.norm = jnp.zeros((T, D)), eqx.nn.LayerNorm(D)
        self.blocks, self.run = blocks, run

    def __call__(self, ids: Array, key: Key | None = None) -> Array:
        embedding, head = self.tables() if callable(self.tables) else self.tables
        s = jax.vmap(embedding)(ids) + self.positions[: len(ids)]
        return jax.vmap(head)(jax.vmap(self.norm)(self.run(self.blocks, s, key)))


def copied(embedding: eqx.nn.Embedding, head: eqx.nn.Linear) -> Any:
    """The same array at two places of a tree makes two parameters."""
    return embedding, eqx.tree_at(lambda h: h.weight, head, embedding.weight)


HD = D // HEADS


def rotary() -> Rotary:
    return Rotary(eqx.nn.RotaryPositionalEmbedding(HD))


def normed_heads() -> NormedHeads:
    return NormedHeads(eqx.nn.LayerNorm(HD), eqx.nn.LayerNorm(HD))


# name: (model, how often each LayerNorm of the program runs, explicit centerings)
GPTS: dict[str, tuple[Callable[[], GPT], list[int], int]] = {
    "looped": (lambda: GPT(separate()), [1] * 5, 0),
    "tied": (lambda: GPT(separate(), tie=shared_tables), [1] * 5, 1),
    "copied, query and key norms": (
        lambda: GPT(separate(heads=normed_heads), tie=copied),
        [1] * 9,
        0,
    ),
    "filter_checkpoint, rotary": (lambda: GPT(separate(heads=rotary), checkpointed), [1] * 5, 0),
    "scanned": (lambda: GPT(stacked(), scanned), [L, L, 1], 0),
    "scanned, tied, query and key norms": (
        lambda: GPT(stacked(heads=normed_heads), scanned, shared_tables),
        [L] * 4 + [1],
        1,
    ),
}


@pytest.mark.parametrize(("make", "runs", "inserted"), GPTS.values(), ids=GPTS)
def test_gpt(make: Callable[[], GPT], runs: list[int], inserted: int) -> None:
    """All LayerNorms fold; a tied table is read by the logits, so its rows are centered once."""
    apply, params = split(make)
    folded = fold_checked(apply, params, IDS)
    assert counts(folded.report) == (len(runs), len(runs), inserted)
    assert [n.count for n in folded.report.norms] == runs
    # `jnp.mean` and that of `jnp.var`
    assert removed_sums(apply, params, folded, IDS) == 2 * len(runs) - inserted


def test_gpt_edits_every_writer() -> None:
    """Linear kernels along their outputs, and nothing that does not write into the stream."""
    apply, params = split(GPTS["scanned"][0])
    report = jax_lnfold.analyze(apply, params, IDS)
    writers = ("attention/output_proj", "mlp/layers/1")
    assert {str(edit) for edit in report.edits} == {
        "tables/0/weight centered along axis 1",
        "positions centered along axis 1",
        *(f"blocks/{name}/weight centered along axis 1" for name in writers),
        *(f"blocks/{name}/bias centered along axis 1" for name in writers),
    }


# --- dropout --------------------------------------------------------------------------------------


def drop_elements(h: Array, key: Key) -> Array:
    return eqx.nn.Dropout(0.4)(h, key=key)


def drop_samples(h: Array, key: Key) -> Array:
    return h * eqx.nn.Dropout(0.4)(jnp.ones(()), key=key)


class Dropped(eqx.Module):
    """Elementwise dropout as a module, which `eqx.nn.inference_mode` switches off."""

    dropout: eqx.nn.Dropout = eqx.field(default_factory=lambda: eqx.nn.Dropout(0.4))

    def __call__(self, h: Array, key: Key) -> Array:
        return self.dropout(h, key=key)


def one_block(**options: Any) -> GPT:
    return GPT((Block(KEY, **options),))


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        pytest.param(lambda: one_block(drop=Dropped()), 1, id="elements"),
        pytest.param(
            lambda: eqx.nn.inference_mode(one_block(drop=Dropped(), p=0.4)), 3, id="inference"
        ),
        pytest.param(lambda: one_block(p=0.4), 3, id="attention weights"),
        pytest.param(lambda: one_block(drop=drop_samples), 3, id="samples"),
    ],
)
def test_dropout(make: Make, folded: int) -> None:
    """A mask that differs between features leaves only the LayerNorm before it folded."""
    apply, params = split(make)
    keys = jax.random.split(jax.random.key(1), B)
    assert counts(jax_lnfold.analyze(apply, params, IDS, keys)) == (3, folded, 0)


def test_dropout_computes_the_same() -> None:
    """The folded program draws the same masks."""
    parts = tokenwise(linear(), norm()), eqx.nn.Dropout(0.4), tokenwise(linear(12), norm())

    def run(module: eqx.nn.Sequential, x: Array, keys: Key) -> Array:
        return jax.vmap(lambda x, key: module(x, key=key))(x, keys)

    apply, params = split(lambda: chain(*parts), run)
    keys = jax.random.split(jax.random.key(1, impl="rbg"), B)  # compiles faster
    assert counts(fold_checked(apply, params, X, keys).report) == (2, 2, 0)


# --- state ----------------------------------------------------------------------------------------


class BatchNormed(eqx.Module):
    """BatchNorm before the projection, or `inside`, between it and the LayerNorm."""

    batch_norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    inside: bool = eqx.field(static=True)

    def __init__(self, inside: bool, mode: str) -> None:
        self.batch_norm = eqx.nn.BatchNorm(12 if inside else DIN, "batch", mode=mode)
        self.linear, self.norm, self.inside = linear(), norm(), inside

    def __call__(self, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        if self.inside:
            s, state = self.batch_norm(self.linear(x), state)
        else:
            x, state = self.batch_norm(x, state)
            s = self.linear(x)
        return self.norm(s), state


@pytest.mark.parametrize(("mode", "inference"), [("batch", False), ("ema", True)])
@pytest.mark.parametrize(("inside", "folded"), [(False, 1), (True, 0)])
def test_batch_norm_with_state(inside: bool, folded: int, mode: str, inference: bool) -> None:
    """The state goes in and comes out; statistics of the stream forbid to center it."""
    model, state = eqx.nn.make_with_state(BatchNormed)(inside, mode)
    model = eqx.nn.inference_mode(model, inference)
    vmapped = partial(jax.vmap, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    apply, params = split(lambda: model, lambda module, *inputs: vmapped(module)(*inputs))
    state = jax.tree.map(ramp, state)
    before = snapshot(state)
    report = fold_checked(apply, params, X[:, 0], state).report
    norms = [n.folded for n in report.norms if n.path == "norm"]
    assert norms == [bool(folded)]
    assert (report.n_folded, report.n_inserted) == (folded, 0)
    assert_identical(state, before)


# --- what a user sees -----------------------------------------------------------------------------


def test_folded_params_are_a_module() -> None:
    """`eqx.partition` and `eqx.combine` as in Equinox's own documentation, and a checkpoint."""
    model = tokenwise(linear(), norm(), eqx.nn.MLP(12, OUT, HID, 1, key=KEY))
    params, static = eqx.partition(model, eqx.is_array)
    params = perturb(params)
    model = eqx.combine(params, static)

    @eqx.filter_jit
    def apply(params: Any, x: Array) -> Array:
        return jax.vmap(eqx.combine(params, static))(x)

    folded = fold_checked(apply, params, X)
    assert counts(folded.report) == (1, 1, 0)
    module = eqx.combine(folded.params, static)
    stored = io.BytesIO()
    eqx.tree_serialise_leaves(stored, module)
    stored.seek(0)
    loaded = eqx.tree_deserialise_leaves(stored, model)
    call = eqx.filter_jit(lambda module, x: jax.vmap(module)(x))
    want = call(model, OTHER_X)
    for same in (module, loaded):
        assert isinstance(same, eqx.nn.Sequential)
        assert relative_difference(call(same, OTHER_X), want) < 1e-12
    assert not eqx.tree_equal(module[0], model[0])
    assert eqx.tree_equal(module[1:], model[1:])


def test_module_itself_as_params() -> None:
    """Without other leaves than arrays there is nothing to partition."""
    model = perturb(tokenwise(linear(), norm(), linear(12, OUT)))
    call = eqx.filter_jit(lambda module, x: jax.vmap(module)(x))
    folded = fold_checked(call, model, X)
    check_contracts(call, model, folded, OTHER_X)
    assert counts(folded.report) == (1, 1, 0)
    assert isinstance(folded.params, eqx.nn.Sequential)
