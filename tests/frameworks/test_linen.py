"""Flax linen: lifted transforms, variable collections, boxed parameters, precision, training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from flax.linen import partitioning
from jax.sharding import Mesh

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
from tests.helpers.contracts import (
    check_contracts,
    count_equations,
    counts,
    fold_checked,
    relative_difference,
)
from tests.models.zoo import perturb

Array = jax.Array
Body = Callable[[nn.Module, Array, Array], Array]

B, T, DIN, D, HID, OUT, L, VOCAB = 2, 5, 7, 12, 20, 3, 4, 17  # no two axes of equal size
HEADS, HEAD_DIM = 3, 6


KEY = jax.random.key(7, impl="rbg")
X, OTHER_X = draw(B, T, DIN), draw(3, 6, DIN)
IDS = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(B, T)))


class Block(nn.Module):
    """A pre-norm MLP; `change` comes between the MLP and the stream."""

    dense: Callable[..., nn.Module] = nn.Dense
    norm: Callable[..., nn.Module] = nn.LayerNorm
    change: Callable[[Array], Array] = lambda h: h

    @nn.compact
    def __call__(self, s: Array) -> Array:
        h = nn.gelu(self.dense(HID, name="up")(self.norm(name="norm")(s)))
        return s + self.change(self.dense(s.shape[-1], name="down")(h))


class Stream(nn.Module):
    """A linear start, a `body` given the stream and the input, a normed head."""

    body: Body
    dense: Callable[..., nn.Module] = nn.Dense
    norm: Callable[..., nn.Module] = nn.LayerNorm

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.body(self, self.dense(D, name="embed")(x), x)
        return self.dense(OUT, name="head")(self.norm(name="norm")(s))


def blocks(module: nn.Module, s: Array, x: Array) -> Array:
    for name in ("first", "second"):
        s = Block(name=name)(s)
    return s


def init(model: nn.Module, *inputs: Array) -> Any:
    """Variables around one, so that no mean is near zero and no variance negative."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return perturb(jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes))


def fold_model(model: nn.Module, *inputs: Array) -> jax_lnfold.Folded:
    return fold_checked(jax.jit(model.apply), init(model, *inputs), *inputs)


def edits_of(report: jax_lnfold.Report) -> Edits:
    return {e.key_path.removeprefix("params/"): e.axes for e in report.edits}


assert_left = partial(harness.assert_left, "test_linen")
START = writer("embed")
BLOCKS = START | writer("first/down") | writer("second/down")


STACKS: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}

# --- lifted transforms ---------------------------------------------------------------------------


def scan(body: Callable[..., Any] | None = None, **options: Any) -> Body:
    """`body` lifted to a loop over blocks whose parameters are stacked."""
    step = body or (lambda block, s, _: (block(s), None))
    options = {"length": L} | STACKS | options

    def run(module: nn.Module, s: Array, x: Array) -> Array:
        return nn.scan(step, **options)(Block(name="block"), s, None)[0]

    return run


def remat_over_scan(module: nn.Module, s: Array, x: Array) -> Array:
    loop = nn.scan(lambda m, s, _: (m(s), None), length=L, **STACKS)
    return nn.remat(lambda m, s: loop(m, s, None)[0])(Block(name="block"), s)


def nested_scans(module: nn.Module, s: Array, x: Array) -> Array:
    inner = nn.scan(lambda m, s, _: (m(s), None), length=2, **STACKS)
    outer = nn.scan(lambda m, s, _: (inner(m, s, None)[0], None), length=L, **STACKS)
    return outer(Block(name="block"), s, None)[0]


def scan_of_dict(module: nn.Module, s: Array, x: Array) -> Array:
    def step(block: nn.Module, carry: Any, _: None) -> tuple[Any, Array]:
        return {"stream": block(carry["stream"]), "step": carry["step"] + 1}, carry["step"]

    loop = nn.scan(step, length=L, **STACKS)
    carry, steps = loop(Block(name="block"), {"stream": s, "step": 0}, None)
    return carry["stream"] * (carry["step"] + steps.sum())


def scan_of_tuple(module: nn.Module, s: Array, x: Array) -> Array:
    """Per-token gates are carried beside the stream, and strengths are read row by row."""

    def step(block: nn.Module, carry: Any, strength: Array) -> tuple[Any, None]:
        s, gate = carry
        return (s + strength * gate * block(s), gate / 2), None

    loop = nn.scan(step, **STACKS)
    return loop(Block(name="block"), (s, nn.sigmoid(x[..., :1])), jnp.linspace(1, 2, L))[0][0]


def ensemble(axis: int) -> Body:
    """Members with parameters of their own read one stream and are averaged."""

    def run(module: nn.Module, s: Array, x: Array) -> Array:
        members = nn.vmap(
            lambda block, s: block(s),
            in_axes=None,
            axis_size=L,
            variable_axes={"params": axis},
            split_rngs={"params": True},
        )
        return members(Block(name="block"), s).mean(0)

    return run


def shared_vmap(module: nn.Module, s: Array, x: Array) -> Array:
    each = nn.vmap(
        lambda block, s: block(s),
        in_axes=1,
        out_axes=1,
        variable_axes={"params": None},
        split_rngs={"params": False},
    )
    return each(Block(name="block"), s)


def cond(module: nn.Module, s: Array, x: Array) -> Array:
    def then(m: nn.Module, s: Array) -> Array:
        return Block(name="then")(s)

    def other(m: nn.Module, s: Array) -> Array:
        return Block(name="other")(s)

    if module.is_initializing():
        return then(module, s) + other(module, s)
    return nn.cond(x[0, 0, 0] > 0, then, other, module, s)


def switch(module: nn.Module, s: Array, x: Array) -> Array:
    def skip(m: nn.Module, s: Array) -> Array:
        return s

    def write(m: nn.Module, s: Array) -> Array:
        return s + nn.Dense(D, name="write")(x)

    def block(m: nn.Module, s: Array) -> Array:
        return Block(name="block")(s)

    if module.is_initializing():
        return write(module, s) + block(module, s)
    return nn.switch((x[0, 0, 0] > 0) + 1, (skip, write, block), module, s)


def while_loop(module: nn.Module, s: Array, x: Array) -> Array:
    block = Block(name="block")
    if module.is_initializing():
        return block(s)
    steps = jnp.int32(x[0, 0, 0] * 0 + L)
    end = nn.while_loop(
        lambda m, c: c[0] < steps, lambda m, c: (c[0] + 1, m(c[1])), block, (jnp.int32(0), s)
    )
    return end[1]


def transposed(module: nn.Module, s: Array, x: Array) -> Array:
    """Every kernel of the block is stored with its axes swapped."""

    def swap(params: Any) -> Any:
        return jax.tree.map(jnp.transpose, params)

    return nn.map_variables(Block, "params", swap, swap, init=module.is_initializing())(
        name="block"
    )(s)


class Lora(nn.Module):
    """A Dense with a low-rank update that lives in the scope of the Dense."""

    rank: int = 4

    def setup(self) -> None:
        self.base = nn.Dense(D)
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        a = self.param("a", nn.initializers.normal(), (x.shape[-1], self.rank))
        b = self.param("b", nn.initializers.normal(), (self.rank, D))
        return self.base(x) + x @ a @ b


def shared_scope(module: nn.Module, s: Array, x: Array) -> Array:
    return Block(name="block")(s + Lora(name="lora")(x))


def sequential(module: nn.Module, s: Array, x: Array) -> Array:
    return nn.Sequential([Block(name="first"), lambda s: s / 2, Block(name="second")])(s)


def custom_vjp(module: nn.Module, s: Array, x: Array) -> Array:
    """A block through which only half of the gradient passes."""

    def backward(vjp: Callable[..., Any], cotangent: Array) -> Any:
        params, s = vjp(cotangent)
        return params, s / 2

    def run(block: nn.Module, s: Array) -> Array:
        return block(s)

    return nn.custom_vjp(run, partial(nn.vjp, run), backward)(Block(name="block"), s)


ONCE = writer("block/down")
STACKED = writer("block/down", 2, 1)

FOLDS: dict[str, Fold] = {
    "plain": Fold(lambda m, s, x: Block(name="block")(s), (1,), ONCE),
    "remat": Fold(
        lambda m, s, x: nn.remat(
            Block, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable
        )(name="block")(s),
        (1,),
        ONCE,
    ),
    "jit": Fold(lambda m, s, x: nn.jit(Block)(name="block")(s), (1,), ONCE),
    "scan": Fold(scan(), (L,), STACKED),
    "scan along axis 1": Fold(scan(variable_axes={"params": 1}), (L,), writer("block/down", 2, 0)),
    "scan reversed and unrolled": Fold(scan(reverse=True, unroll=2), (L,), STACKED),
    "scan over remat": Fold(
        scan(nn.remat(lambda block, s, _: (block(s), None), prevent_cse=False)), (L,), STACKED
    ),
    "scan of one shared layer": Fold(
        scan(variable_axes={}, variable_broadcast="params", split_rngs={"params": False}),
        (L,),
        ONCE,
    ),
    "scan, dict carry": Fold(scan_of_dict, (L,), STACKED),
    "scan, tuple carry": Fold(scan_of_tuple, (L,), STACKED),
    "remat over scan": Fold(remat_over_scan, (L,), STACKED),
    "nested scans": Fold(nested_scans, (2 * L,), writer("block/down", 3, 2)),
    "vmap over members": Fold(ensemble(0), (1,), STACKED),
    "vmap over members along axis 1": Fold(ensemble(1), (1,), writer("block/down", 2, 0)),
    "vmap over tokens": Fold(shared_vmap, (1,), ONCE),
    "cond": Fold(cond, (1, 1), writer("then/down") | writer("other/down")),
    "switch": Fold(switch, (1,), writer("write") | ONCE),
    "while_loop": Fold(while_loop, (1,), ONCE),
    "map_variables": Fold(transposed, (1,), writer("block/down", 0)),
    "share_scope": Fold(shared_scope, (1,), writer("lora") | {"lora/b": (1,)} | ONCE),
    "Sequential": Fold(sequential, (1, 1), writer("first/down") | writer("second/down")),
    "custom_vjp": Fold(custom_vjp, (1,), ONCE),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds_through_the_transform(name: str) -> None:
    body, runs, edits = FOLDS[name]
    model = Stream(body)
    report = check_folds_whole(jax.jit(model.apply), init(model, X), runs, X, OTHER_X)
    assert edits_of(report) == START | edits


def read_by_dense(module: nn.Module, s: Array, x: Array) -> Array:
    return s + nn.Dense(D)(Block(name="block")(s))


def cond_tanh(module: nn.Module, s: Array, x: Array) -> Array:
    return nn.cond(x[0, 0, 0] > 0, lambda m, s: s, lambda m, s: nn.tanh(s), module, Block()(s))


def switch_tanh(module: nn.Module, s: Array, x: Array) -> Array:
    branches = [lambda m, s: s, lambda m, s: nn.tanh(s), lambda m, s: -s]
    return nn.switch(jnp.int32(x[0, 0, 0] > 0) + 1, branches, module, Block()(s))


def cond_on_the_stream(module: nn.Module, s: Array, x: Array) -> Array:
    s = Block()(s)
    return nn.cond(s[0, 0, 0] > 0, lambda m, s: s, lambda m, s: -s, module, s)


def while_on_the_stream(module: nn.Module, s: Array, x: Array) -> Array:
    block = Block(name="block")
    if module.is_initializing():
        return block(s)
    return nn.while_loop(lambda m, s: jnp.abs(s).max() < 9, lambda m, s: m(s), block, s)


LEFT: dict[str, tuple[Body, str]] = {
    "remat": (lambda m, s, x: nn.remat(lambda b, s: nn.tanh(b(s)))(Block(), s), "tanh"),
    "jit": (lambda m, s, x: nn.jit(lambda b, s: nn.tanh(b(s)))(Block(), s), "tanh"),
    "scan": (scan(lambda block, s, _: (nn.tanh(block(s)), None)), "tanh"),
    "vmap": (
        lambda m, s, x: nn.vmap(
            lambda block, s: nn.tanh(block(s)),
            in_axes=1,
            out_axes=1,
            variable_axes={"params": None},
            split_rngs={"params": False},
        )(Block(), s),
        "tanh",
    ),
    "cond": (cond_tanh, "tanh"),
    "switch": (switch_tanh, "tanh"),
    "cond on the stream": (cond_on_the_stream, "slice"),
    "while_loop on the stream": (while_on_the_stream, "abs"),
    "dense reader": (read_by_dense, "dot_general"),
}


@pytest.mark.parametrize(("body", "primitive"), LEFT.values(), ids=LEFT)
def test_is_left_alone(body: Body, primitive: str) -> None:
    model = Stream(body)
    assert_left(model.apply, init(model, X), X, norms=2, primitive=primitive)


# --- variable collections ------------------------------------------------------------------------


def batch_norm_stem(module: nn.Module, s: Array, x: Array, train: bool) -> Array:
    stem = nn.BatchNorm(use_running_average=not train, name="stem")(nn.Dense(HID, name="in")(x))
    return Block(name="block")(s + nn.Dense(D, name="out")(stem))


def batch_norm_of_the_stream(module: nn.Module, s: Array, x: Array, train: bool) -> Array:
    s = Block(name="block")(s)
    return s + nn.BatchNorm(use_running_average=not train, name="stem")(s)


def apply_with_stats(body: Callable[..., Array], train: bool) -> tuple[nn.Module, Any]:
    model = Stream(partial(body, train=train))
    mutable = ["batch_stats"] if train else False
    return model, jax.jit(partial(model.apply, mutable=mutable))


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_beside_the_stream(train: bool) -> None:
    """Updated statistics are an output, and equal; a BatchNorm is no LayerNorm in training, too."""
    model, apply = apply_with_stats(batch_norm_stem, train)
    variables = init(model, X)
    folded = fold_checked(apply, variables, X)
    assert [(n.axes, n.folded) for n in folded.report.norms] == [((2,), True)] * 2
    assert folded.report.n_inserted == 0
    assert edits_of(folded.report) == START | writer("out") | ONCE
    assert folded.params["batch_stats"]["stem"]["mean"] is variables["batch_stats"]["stem"]["mean"]
    if train:
        _, updates = folded.apply(folded.params, X)
        assert set(updates) == {"batch_stats"}


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_of_the_stream_is_left_alone(train: bool) -> None:
    model, apply = apply_with_stats(batch_norm_of_the_stream, train)
    primitive = "(?:mul|reduce_sum|add)" if train else "mul"
    assert_left(apply, init(model, X), X, norms=2, primitive=primitive)


def test_batch_stats_as_an_input() -> None:
    model, apply = apply_with_stats(batch_norm_stem, True)
    variables = init(model, X)

    def split(params: Any, stats: Any, x: Array) -> Any:
        return apply({"params": params, "batch_stats": stats}, x)

    folded = fold_checked(split, variables["params"], variables["batch_stats"], X)
    assert counts(folded.report) == (2, 2, 0)
    assert edits_of(folded.report) == START | writer("out") | ONCE


def sow_stream(module: nn.Module, s: Array, x: Array) -> Array:
    s = Block(name="block")(s)
    module.sow("intermediates", "stream", s)
    return s


def sow_normed(module: nn.Module, s: Array, x: Array) -> Array:
    s = Block(name="block")(s)
    module.sow("intermediates", "normed", nn.LayerNorm(name="probe")(s))
    return s


def sow_each_layer(module: nn.Module, s: Array, x: Array) -> Array:
    def step(block: nn.Module, s: Array, _: None) -> tuple[Array, None]:
        s = block(s)
        block.sow("intermediates", "stream", s)
        return s, None

    options = STACKS | {"variable_axes": {"params": 0, "intermediates": 0}}
    return nn.scan(step, length=L, **options)(Block(name="block"), s, None)[0]


def params_of(model: nn.Module, *inputs: Array) -> Any:
    return {"params": init(model, *inputs)["params"]}


@pytest.mark.parametrize("body", [sow_stream, sow_each_layer])
def test_sown_stream(body: Body) -> None:
    """The stream is an output only where the collection is mutable."""
    model = Stream(body)
    variables = params_of(model, X)
    report = fold_checked(jax.jit(model.apply), variables, X).report
    assert counts(report) == (2, 2, 0)
    apply = partial(model.apply, mutable=["intermediates"])
    primitive = "add" if body is sow_stream else "scan"
    assert_left(apply, variables, X, norms=2, primitive=primitive)
    assert all("output" in n.reason for n in jax_lnfold.analyze(apply, variables, X).norms)


def test_sown_norm_folds() -> None:
    model = Stream(sow_normed)
    apply = jax.jit(partial(model.apply, mutable=["intermediates"]))
    folded = fold_checked(apply, params_of(model, X), X)
    assert counts(folded.report) == (3, 3, 0)
    assert folded(X)[1]["intermediates"]["normed"][0].shape == (B, T, D)


def test_captured_intermediates() -> None:
    """Capturing all outputs of modules makes the stream an output, those of LayerNorms do not."""
    model = Stream(blocks)
    variables = init(model, X)
    apply = partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    assert_left(apply, variables, X, norms=3, primitive="add")

    def only_norms(module: nn.Module, method: str) -> bool:
        return isinstance(module, nn.LayerNorm)

    apply = partial(model.apply, capture_intermediates=only_norms, mutable=["intermediates"])
    assert counts(fold_checked(jax.jit(apply), variables, X).report) == (3, 3, 0)


def test_sown_weight_penalty_bars_the_kernel() -> None:
    """A loss that reads a kernel notices its centering: the stream is centered instead, once."""

    def body(module: nn.Module, s: Array, x: Array) -> Array:
        kernel = module.variables["params"]["embed"]["kernel"]
        module.sow("losses", "l2", jnp.sum(kernel**2))
        return blocks(module, s, x)

    model = Stream(body)
    variables = params_of(model, X)
    report = fold_checked(jax.jit(model.apply), variables, X).report
    assert (counts(report), edits_of(report)) == ((3, 3, 0), BLOCKS)
    apply = jax.jit(partial(model.apply, mutable=["losses"]))
    report = fold_checked(apply, variables, X).report
    assert (counts(report), edits_of(report)) == (
        (3, 3, 1),
        writer("first/down") | writer("second/down"),
    )
    assert "test_linen.py:" in report.insertions[0].after


def test_perturbations_are_parameters_of_the_stream() -> None:
    model = Stream(lambda m, s, x: m.perturb("stream", Block(name="block")(s)))
    variables = init(model, X)
    assert variables["perturbations"]["stream"].shape == (B, T, D)
    report = fold_checked(jax.jit(model.apply), variables, X).report
    assert counts(report) == (2, 2, 0)
    assert edits_of(report) == START | ONCE | {"perturbations/stream": (2,)}


# --- dropout -------------------------------------------------------------------------------------


def dropped(rate: float = 0.4, **options: Any) -> Callable[[Array], Array]:
    return lambda h: nn.Dropout(rate, deterministic=False, **options)(h)


def two_blocks(**options: Any) -> Body:
    return lambda m, s, x: Block(name="second", **options)(Block(name="first", **options)(s))


def hidden_dropout(features: int, name: str) -> nn.Module:
    if name == "up":
        return nn.Dense(features, name=name)
    return nn.Sequential([dropped(), nn.Dense(features, name=name)])


# name: (body, folded, inserted) for a model of three LayerNorms
DROPOUT: dict[str, tuple[Body, int, int]] = {
    "residual": (two_blocks(change=dropped()), 1, 0),
    "per token": (two_blocks(change=dropped(broadcast_dims=(2,))), 3, 0),
    "per sample": (two_blocks(change=dropped(broadcast_dims=(1, 2))), 3, 0),
    "deterministic": (two_blocks(change=nn.Dropout(0.4, deterministic=True)), 3, 0),
    "hidden": (two_blocks(dense=hidden_dropout), 3, 0),
    "embedding": (lambda m, s, x: blocks(m, dropped()(s), x), 3, 1),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout(name: str) -> None:
    """Elementwise dropout on what is added to the stream leaves it a mean."""
    body, n_folded, n_inserted = DROPOUT[name]
    model = Stream(body)

    @jax.jit
    def apply(variables: Any, x: Array, key: Array) -> Array:
        return model.apply(variables, x, rngs={"dropout": key})

    shapes = jax.eval_shape(model.init, {"params": jax.random.key(0), "dropout": KEY}, X)
    variables = perturb(jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes))
    folded = fold_checked(apply, variables, X, KEY)
    check_contracts(apply, variables, folded, X, jax.random.fold_in(KEY, 1))
    assert counts(folded.report) == (3, n_folded, n_inserted)
    for norm in folded.report.norms[n_folded:]:
        assert_blames(norm, "select_n", "test_linen")
    random = relative_difference(folded(X, jax.random.fold_in(KEY, 1)), folded(X, KEY))
    assert (random > 0) == (name != "deterministic")


# --- parameters that are made from others --------------------------------------------------------


class TiedAutoEncoder(nn.Module):
    """`decode` multiplies by the transposed kernel of `encode`."""

    @nn.compact
    def _call(self, x: Array, decode: bool) -> Array:
        def dense(module: nn.Module) -> Array:
            return nn.Dense(DIN if decode else D, use_bias=False)(x)

        def swap(params: Any) -> Any:
            return jax.tree.map(jnp.transpose, params) if decode else params

        return nn.map_variables(dense, "params", swap, swap, mutable=True)(self)

    def encode(self, x: Array) -> Array:
        return self._call(x, False)

    def decode(self, x: Array) -> Array:
        return self._call(x, True)


class Coder(nn.Module):
    """Blocks between an encoder and the decoder of the same code or of another one."""

    tied: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        code = TiedAutoEncoder(name="code")
        s = blocks(self, code.encode(x), x)
        other = code if self.tied else TiedAutoEncoder(name="other")
        return other.decode(nn.LayerNorm(name="norm")(s))


@pytest.mark.parametrize("tied", [True, False])
def test_kernel_tied_by_map_variables(tied: bool) -> None:
    """The decoder notices a centering of the kernel: the stream is centered instead, once."""
    report = fold_model(Coder(tied), X).report
    writers = writer("first/down") | writer("second/down")
    assert counts(report) == (3, 3, int(tied))
    assert edits_of(report) == (writers if tied else writers | {"code/Dense_0/kernel": (1,)})


class Language(nn.Module):
    """Tokens in, logits out, with a tied or an untied table."""

    head: str

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        table = nn.Embed(VOCAB, D, name="table")
        s = blocks(self, table(ids) + nn.Embed(T, D, name="position")(jnp.arange(T))[None], ids)
        y = nn.LayerNorm(name="norm")(s)
        if self.head == "dense":
            return nn.Dense(VOCAB, name="head")(y)
        return table.attend(s if self.head == "raw" else y)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding(tied: bool) -> None:
    """The logits notice a centering of the table: the sum of both embeddings is centered, once."""
    report = fold_model(Language("tied" if tied else "dense"), IDS).report
    expected = writer("first/down") | writer("second/down")
    if not tied:
        expected |= {"table/embedding": (1,), "position/embedding": (1,)}
    assert counts(report) == (3, 3, int(tied))
    assert edits_of(report) == expected


def test_attend_to_the_raw_stream_is_left_alone() -> None:
    model = Language("raw")
    assert_left(model.apply, init(model, IDS), IDS, norms=2, primitive="dot_general")


def remade(change: Callable[[Array], Array]) -> Body:
    """A second writer of the stream, whose kernel is computed from its parameter."""

    def run(module: nn.Module, s: Array, x: Array) -> Array:
        def change_kernel(params: Any) -> Any:
            return jax.tree.map(lambda w: change(w) if w.ndim == 2 else w, params)

        dense = nn.map_variables(
            nn.Dense, "params", change_kernel, init=module.is_initializing(), mutable=True
        )
        return Block(name="block")(s + dense(D, name="remade")(x))

    return run


def standardized(w: Array) -> Array:
    """Weight standardisation: a LayerNorm of the kernel along its inputs."""
    return nn.standardize(w, axis=0)


# name: (body, LayerNorms, edits of the second writer); centering a kernel costs 2 * DIN * D, less
# than the means of two LayerNorms, 2 * B * T * D
REMADE: dict[str, tuple[Body, int, Edits]] = {
    "sign": (remade(jnp.sign), 2, {"remade/bias": (0,)}),
    "standardized": (remade(standardized), 3, {"remade/bias": (0,), "remade/kernel": (0,)}),
    "WeightNorm": (
        lambda m, s, x: Block(name="block")(s + nn.WeightNorm(nn.Dense(D, name="remade"))(x)),
        2,
        {"remade/bias": (0,)},
    ),
}


@pytest.mark.parametrize(("body", "norms", "edits"), REMADE.values(), ids=REMADE)
def test_computed_kernel_is_centered_explicitly(body: Body, norms: int, edits: Edits) -> None:
    """Once per call, which is cheaper than to center what the kernel writes."""
    folded = fold_model(Stream(body), X)
    assert counts(folded.report) == (norms, norms, 1)
    assert edits_of(folded.report) == START | ONCE | edits


# --- modules -------------------------------------------------------------------------------------


def attention(module: nn.Module, s: Array, x: Array, raw: bool = False, **options: Any) -> Array:
    y = nn.LayerNorm(name="before")(s)
    attend = nn.MultiHeadDotProductAttention(
        HEADS, qkv_features=HEADS * HEAD_DIM, normalize_qk=True, name="attention", **options
    )
    return s + attend(y, s if raw else y)


QUERY_KEY = writer("attention/query", 2, 1) | writer("attention/key", 2, 1)


def test_attention_with_normalized_queries_and_keys() -> None:
    """Both LayerNorms run per head, so the projections are centered per head."""
    folded = fold_model(Stream(attention), X)
    assert counts(folded.report) == (4, 4, 0)
    assert edits_of(folded.report) == START | QUERY_KEY | writer("attention/out", 2, 0)


def test_attention_that_reads_keys_from_the_raw_stream() -> None:
    report = fold_model(Stream(partial(attention, raw=True)), X).report
    assert [n.folded for n in report.norms] == [False, True, True, False]
    assert (report.n_inserted, edits_of(report)) == (0, QUERY_KEY)
    for norm in (report.norms[0], report.norms[-1]):
        assert_blames(norm, "dot_general", r"Stream/attention/.*test_linen")


def test_attention_with_a_cache() -> None:
    """One token at a time, with normalised keys in a cache that both programs share."""
    model = Stream(partial(attention, decode=True))
    shapes = jax.eval_shape(model.init, KEY, X)
    params = perturb(jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes["params"]))
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])

    @jax.jit
    def apply(params: Any, cache: Any, token: Array) -> Any:
        y, updates = model.apply({"params": params, "cache": cache}, token, mutable=["cache"])
        return y, updates["cache"]

    folded = fold_checked(apply, params, cache, X[:, :1])
    assert counts(folded.report) == (4, 4, 0)
    step = jax.jit(folded.apply)
    for t in range(T):
        token = X[:, t : t + 1]
        want = apply(params, cache, token)
        got = step(folded.params, cache, token)
        assert relative_difference(got, want) < 1e-12
        cache = got[1]
    assert cache["attention"]["cache_index"] == T


class NormedLSTM(nn.RNNCellBase):
    """An LSTM with LayerNorms on its gates and on its state."""

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], x: Array) -> tuple[Any, Array]:
        c, h = carry
        gates = nn.Dense(4 * D, name="in")(x) + nn.Dense(4 * D, use_bias=False, name="again")(h)
        i, f, g, o = jnp.split(nn.LayerNorm(name="gates")(gates), 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * nn.tanh(g)
        h = nn.sigmoid(o) * nn.tanh(nn.LayerNorm(name="state")(c))
        return (c, h), h

    def initialize_carry(self, rng: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        return (jnp.zeros((shape[0], D)),) * 2

    @property
    def num_feature_axes(self) -> int:
        return 1


def test_recurrent_cell() -> None:
    """The gates are linear in what is read; the state is gated per feature."""
    report = fold_model(nn.RNN(NormedLSTM(name="cell")), X).report
    gates, state = report.norms
    assert (gates.count, gates.folded, gates.shape) == (T, True, (B, 4 * D))
    assert (state.count, state.folded, report.n_inserted) == (T, False, 0)
    assert_blames(state, "mul", "test_linen")
    assert edits_of(report) == writer("cell/in") | {"cell/again/kernel": (1,)}


ACROSS_TOKENS = "`reduce_sum` (Stream/norm, test_linen.py:"
INPUT = "it is an input of the function"

# name: (norm of the stream, why it is left alone)
NORMS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "LayerNorm over tokens and features": (
        partial(nn.LayerNorm, reduction_axes=(1, 2), feature_axes=-1),
        ACROSS_TOKENS,
    ),
    "LayerNorm over tokens": (partial(nn.LayerNorm, reduction_axes=1, feature_axes=-1), INPUT),
    "InstanceNorm": (nn.InstanceNorm, INPUT),
    "GroupNorm": (partial(nn.GroupNorm, HEADS), ""),  # not even found
}


@pytest.mark.parametrize(("norm", "reason"), NORMS.values(), ids=NORMS)
def test_norm_over_tokens_is_left_alone(norm: Callable[..., nn.Module], reason: str) -> None:
    """Tokens have means of their own."""
    report = fold_model(Stream(lambda m, s, x: s, norm=norm), X).report
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())
    assert [reason in norm.reason for norm in report.norms] == [True] * bool(reason)


@pytest.mark.parametrize("shared", [True, False])
def test_norm_across_the_members_of_an_ensemble(shared: bool) -> None:
    """Members that read one input are centered by centering their stacked kernels."""

    class Members(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            members = nn.vmap(
                nn.Dense,
                in_axes=None if shared else 0,
                axis_size=L,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            s = members(D, name="members")(x)
            return nn.LayerNorm(reduction_axes=0, feature_axes=-1, name="norm")(s)

    model, x = Members(), X if shared else draw(L, T, DIN)
    report = fold_checked(jax.jit(model.apply), init(model, x), x).report
    assert counts(report) == (1, int(shared), 0)
    expected = {"members/kernel": (0,), "members/bias": (0,)} if shared else {}
    assert edits_of(report) == expected
    if not shared:
        assert_blames(report.norms[0], "dot_general", "test_linen")


def test_one_module_called_twice() -> None:
    """A shared block writes into the stream twice; a shared writer read raw is left alone."""

    def twice(module: nn.Module, s: Array, x: Array) -> Array:
        block = Block(name="block")
        return block(block(s))

    model = Stream(twice)
    report = fold_checked(jax.jit(model.apply), init(model, X), X).report
    assert (counts(report), edits_of(report)) == ((3, 3, 0), START | ONCE)
    assert [n.path for n in report.norms] == ["Stream/block/norm"] * 2 + ["Stream/norm"]

    def also_raw(module: nn.Module, s: Array, x: Array) -> Array:
        shared = nn.Dense(D, name="shared")
        return s + shared(x) + nn.Dense(D, name="out")(nn.tanh(shared(x / 2)))

    model = Stream(also_raw)
    assert_left(model.apply, init(model, X), X, norms=1, primitive="tanh")


# --- bound modules, methods ----------------------------------------------------------------------


class Encoder(nn.Module):
    """A module with several methods."""

    def setup(self) -> None:
        self.embed, self.block, self.norm = nn.Dense(D), Block(), nn.LayerNorm()

    def raw(self, x: Array) -> Array:
        return self.block(self.embed(x))

    def __call__(self, x: Array) -> Array:
        return self.norm(self.raw(x))


def test_bound_module() -> None:
    model = Encoder()
    variables = init(model, X)
    folded = fold_checked(jax.jit(lambda v, x: model.bind(v)(x)), variables, X)
    assert (counts(folded.report), edits_of(folded.report)) == ((2, 2, 0), START | ONCE)
    encoder = model.bind(folded.params)
    assert relative_difference(jax.jit(lambda x: encoder(x))(X), folded(X)) < 1e-12
    normed = nn.apply(lambda m, x: m.norm(m.raw(x)), model)
    assert counts(jax_lnfold.analyze(normed, variables, X)) == (2, 2, 0)


def test_method_that_returns_the_raw_stream_is_left_alone() -> None:
    model = Encoder()
    apply = partial(model.apply, method="raw")
    assert_left(apply, init(model, X), X, norms=1, primitive="add")


# --- containers and boxes ------------------------------------------------------------------------


def test_frozen_dict() -> None:
    model = Stream(blocks)
    variables = freeze(init(model, X))
    folded = fold_checked(jax.jit(model.apply), variables, X)
    assert isinstance(folded.params, FrozenDict)
    assert (counts(folded.report), edits_of(folded.report)) == ((3, 3, 0), BLOCKS)


def boxed_dense(partitioned: Callable[..., Any]) -> Callable[..., nn.Module]:
    return partial(
        nn.Dense,
        kernel_init=partitioned(nn.initializers.lecun_normal(), ("in", "out")),
        bias_init=partitioned(nn.initializers.zeros, ("out",)),
    )


def boxed(edits: Edits) -> Edits:
    return {f"{path}/value": axes for path, axes in edits.items()}


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxed_parameters(box: type) -> None:
    """Boxes are nodes of the tree: they come back with their names, also those of a scan's axis."""
    partitioned = nn.with_partitioning if box is nn.Partitioned else nn.with_logical_partitioning
    dense = boxed_dense(partitioned)

    def body(module: nn.Module, s: Array, x: Array) -> Array:
        loop = nn.scan(
            lambda block, s, _: (block(s), None),
            length=L,
            metadata_params={nn.PARTITION_NAME: "layers"},
            **STACKS | {"variable_axes": {"params": 1}},
        )
        return loop(Block(dense, name="block"), s, None)[0]

    model = Stream(body, dense)
    variables = init(model, X)
    folded = fold_checked(jax.jit(model.apply), variables, X)
    assert counts(folded.report) == (2, 2, 0)
    assert edits_of(folded.report) == boxed(START | writer("block/down", 2, 0))
    kernel = folded.params["params"]["block"]["down"]["kernel"]
    assert (type(kernel), kernel.names) == (box, ("in", "layers", "out"))
    plain = nn.unbox(variables)
    again = jax_lnfold.fold(model.apply, plain, X)
    assert edits_of(again.report) == START | writer("block/down", 2, 0)
    assert relative_difference(nn.unbox(folded.params), again.params) == 0


def test_sharding_constraints() -> None:
    """Constraints on parameters and on the stream, under a mesh."""
    rules = (("batch", "data"), ("token", None), ("in", None), ("out", "model"))

    def body(module: nn.Module, s: Array, x: Array) -> Array:
        s = nn.with_logical_constraint(s, ("batch", "token", "out"))
        return nn.with_logical_constraint(blocks(module, s, x), ("batch", "token", "out"))

    model = Stream(body, boxed_dense(nn.with_logical_partitioning))
    variables = init(model, X)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        assert count_equations("sharding_constraint", model.apply, variables, X) >= 2
        folded = fold_checked(jax.jit(model.apply), variables, X)
    assert (counts(folded.report)) == (3, 3, 0)
    assert set(edits_of(folded.report)) == {
        *boxed(START),
        *(writer("first/down") | writer("second/down")),
    }


class AxesDense(nn.Module):
    """A Dense that writes down its axis names in a collection without arrays."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = partitioning.param_with_axes(
            "kernel", nn.initializers.normal(), (x.shape[-1], self.features), axes=("in", "out")
        )
        bias = partitioning.param_with_axes(
            "bias", nn.initializers.zeros, (self.features,), axes=("out",)
        )
        return x @ kernel + bias


def test_axis_names_in_a_collection() -> None:
    model = Stream(lambda m, s, x: Block(AxesDense, name="block")(s), AxesDense)
    variables = init(model, X)
    assert jax.tree.leaves(variables["params_axes"]) == []
    folded = fold_checked(jax.jit(model.apply), variables, X)
    assert (counts(folded.report), edits_of(folded.report)) == ((2, 2, 0), START | ONCE)
    names = partitioning.get_axis_names(folded.params["params_axes"])
    assert tuple(names["embed"]["kernel"]) == ("in", "out")


# --- precision -----------------------------------------------------------------------------------


def stream_of(**kinds: Any) -> Stream:
    dense, norm = partial(nn.Dense, **kinds), partial(nn.LayerNorm, **kinds)

    def body(module: nn.Module, s: Array, x: Array) -> Array:
        for name in ("first", "second"):
            s = Block(dense, norm, name=name)(s)
        return s

    return Stream(body, dense, norm)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16(param_dtype: Any) -> None:
    """As many folds as in float64, and no less accurate than the original."""
    x = draw(20, 30, DIN)
    model = stream_of(dtype=jnp.bfloat16, param_dtype=param_dtype)
    apply = jax.jit(model.apply)
    shapes = jax.eval_shape(model.init, KEY, x)
    start = perturb(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    params = jax.tree.map(lambda w, like: w.astype(like.dtype), start, shapes)
    folded = fold_checked(apply, params, x, rtol=0.1)
    assert (counts(folded.report), edits_of(folded.report)) == ((3, 3, 0), BLOCKS)
    wide = jax.tree.map(lambda w: w.astype(jnp.float64), params)
    reference = jax.jit(stream_of(dtype=jnp.float64).apply)(wide, x)
    check_as_accurate(apply, params, folded, x, reference)


# --- training ------------------------------------------------------------------------------------


def test_custom_vjp_keeps_its_gradient() -> None:
    model = Stream(custom_vjp)
    variables = init(model, X)
    folded = jax_lnfold.fold(model.apply, variables, X)
    assert count_equations("custom_vjp_call", folded.apply, folded.params, X) == 1
    want, got = (
        jax.jit(jax.grad(lambda x, f=f, v=v: jnp.sum(jnp.sin(f(v, x)))))(X)
        for f, v in ((model.apply, variables), (folded.apply, folded.params))
    )
    assert relative_difference(got, want) < 1e-11
