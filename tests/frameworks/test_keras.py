"""Keras 3 on JAX: layers and their spellings, functional models, `keras.applications`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers, ops

import jax_lnfold
from jax_lnfold.report.report import Report
from tests.frameworks.harness import check_folds, check_left, check_taken_up
from tests.helpers.contracts import (
    check_contracts,
    counts,
    fold_checked,
    relative_difference,
    removed_sums,
)
from tests.models.zoo import perturb
from tests.models.zoo.base import floats, tokens

Layer = Callable[..., Any]
Build = Callable[[Any], Any]

B, T, DIN, OUT, L = 3, 5, 9, 7, 2
D, HEADS, KEY, HID, VOCAB = 14, 6, 4, 22, 17  # no two axes of a value have equal sizes
X = jnp.asarray(floats(B, T, DIN))
IDS = jnp.asarray(tokens(B, T, VOCAB))
IMAGES = jnp.asarray(floats(B, 8, 6, 3))
NORM = layers.LayerNormalization

# Keras computes its norms in float32, whatever the dtype policy; everything else is in float64.
RTOL = 1e-5
fold_checked = partial(fold_checked, rtol=RTOL)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture
def lazy() -> Iterator[None]:
    """Models without values: to compile an initialiser for every shape takes very long."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session()


def value(variable: keras.Variable) -> Any:
    """Some value for the state of a model: statistics away from 0, seeds."""
    size = int(np.prod(variable.shape))
    return jnp.linspace(1, 2, size).reshape(variable.shape).astype(variable.dtype)


def stateless(model: keras.Model, training: bool = False) -> tuple[Layer, list[Any], list[Any]]:
    """``apply(params, state, *inputs)``, returning outputs and new state, and both lists."""
    params = perturb([np.zeros(v.shape) for v in model.trainable_variables])
    params = [p.astype(v.dtype) for p, v in zip(params, model.trainable_variables, strict=True)]
    state = [value(v) for v in model.non_trainable_variables]
    return jax.jit(partial(model.stateless_call, training=training)), params, state


def functional(build: Build, shape: tuple[int | None, ...] = (None, DIN)) -> keras.Model:
    inputs = keras.Input(shape)
    return keras.Model(inputs, build(inputs))


# --- one norm ------------------------------------------------------------------------------------


def dense(**options: Any) -> layers.Layer:
    return layers.Dense(12, **options)


def heads(equation: str = "btd,dhk->bthk", **options: Any) -> layers.Layer:
    return layers.EinsumDense(equation, (None, 3, 4), bias_axes="hk", **options)


def chain(*steps: Layer) -> Build:
    def build(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return build


# name: (build of a model with one norm over 12 values of a projection, sizes of those axes)
FOLDING: dict[str, tuple[Build, tuple[int, ...]]] = {
    "scale and offset": (lambda x: NORM()(dense()(x)), (12,)),
    "scale only": (lambda x: NORM(center=False)(dense()(x)), (12,)),
    "offset only": (lambda x: NORM(scale=False)(dense()(x)), (12,)),
    "neither": (lambda x: NORM(center=False, scale=False)(dense()(x)), (12,)),
    "large epsilon": (lambda x: NORM(epsilon=0.3)(dense()(x)), (12,)),
    "without bias": (lambda x: NORM()(dense(use_bias=False)(x)), (12,)),
    "two axes": (lambda x: NORM(axis=(-2, -1))(layers.Reshape((-1, 3, 4))(dense()(x))), (3, 4)),
    "two axes of an einsum": (lambda x: NORM(axis=[3, 2])(heads()(x)), (3, 4)),
    "heads of an einsum": (lambda x: NORM()(heads()(x)), (4,)),
    "features first": (lambda x: NORM(axis=1)(layers.Permute((2, 1))(dense()(x))), (12,)),
    "attention": (lambda x: NORM()(layers.MultiHeadAttention(3, 4, output_shape=12)(x, x)), (12,)),
    "convolution": (lambda x: NORM()(layers.Conv1D(12, 3, 2)(x)), (12,)),
    "causal convolution": (lambda x: NORM()(layers.Conv1D(12, 2, padding="causal")(x)), (12,)),
    "transposed convolution": (lambda x: NORM()(layers.Conv1DTranspose(12, 3, 2)(x)), (12,)),
    "separable convolution": (lambda x: NORM()(layers.SeparableConv1D(12, 3)(x)), (12,)),
    "groups of a convolution": (
        lambda x: NORM()(layers.Reshape((-1, 3, 4))(layers.Conv1D(12, 2, groups=3)(x))),
        (4,),
    ),
    "group norm of a vector": (lambda x: layers.GroupNormalization(3)(dense()(x[:, 1])), (4,)),
    "time distributed": (lambda x: NORM()(layers.TimeDistributed(dense())(x)), (12,)),
    "add": (lambda x: NORM()(layers.Add()([dense()(x), dense()(x)])), (12,)),
    "average": (lambda x: NORM()(layers.Average()([dense()(x), dense()(x)])), (12,)),
    "subtract": (lambda x: NORM()(layers.Subtract()([dense()(x), dense()(x)])), (12,)),
    "concatenate tokens": (
        lambda x: NORM()(layers.Concatenate(1)([dense()(x), dense()(x)])),
        (12,),
    ),
    "average pooling": (lambda x: NORM()(layers.AveragePooling1D(2)(dense()(x))), (12,)),
    "global pooling": (lambda x: NORM()(layers.GlobalAveragePooling1D()(dense()(x))), (12,)),
    "zero padding": (lambda x: NORM()(layers.ZeroPadding1D(2)(dense()(x))), (12,)),
    "cropping": (lambda x: NORM()(layers.Cropping1D((1, 0))(dense()(x))), (12,)),
    "upsampling": (lambda x: NORM()(layers.UpSampling1D(2)(dense()(x))), (12,)),
    "repeat": (lambda x: NORM()(layers.RepeatVector(4)(dense()(x[:, 0]))), (12,)),
    "rescaling": (lambda x: NORM()(layers.Rescaling(0.5)(dense()(x))), (12,)),
    "rescaling with an offset": (lambda x: NORM()(layers.Rescaling(0.5, 2.0)(dense()(x))), (12,)),
    "dropout": (lambda x: NORM()(layers.Dropout(0.4)(dense()(x))), (12,)),
}


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("build", "sizes"), FOLDING.values(), ids=FOLDING)
def test_norm_folds(build: Build, sizes: tuple[int, ...]) -> None:
    check_folds(*stateless(functional(build)), X, sizes=sizes)


# name: (build of a model with one norm at the end, where the way is barred)
LEFT: dict[str, tuple[Build, str]] = {
    "group norm over tokens": (
        lambda x: layers.GroupNormalization(3)(dense()(x)),
        "group_normalization",
    ),
    "tokens and features": (
        lambda x: NORM(axis=(1, 2))(dense()(layers.Reshape((T, DIN))(x))),
        "layer_normalization",
    ),
    "tokens": (lambda x: NORM(axis=1)(dense()(layers.Reshape((T, DIN))(x))), "an input"),
    "flattened": (
        lambda x: NORM()(layers.Flatten()(dense()(layers.Reshape((T, DIN))(x)))),
        "layer_normalization",
    ),
    "activation": (lambda x: NORM()(dense(activation="relu")(x)), "max"),
    "maximum pooling": (lambda x: NORM()(layers.MaxPooling1D(2)(dense()(x))), "reduce_window_max"),
    "maximum": (lambda x: NORM()(layers.Maximum()([dense()(x), dense()(x)])), "max"),
    "multiply": (lambda x: NORM()(layers.Multiply()([dense()(x), dense()(x)])), "mul"),
    "concatenate features": (
        lambda x: NORM()(layers.Concatenate()([layers.Dense(5)(x), layers.Dense(7)(x)])),
        "layer_normalization",
    ),
    "depthwise convolution": (
        lambda x: NORM()(layers.DepthwiseConv1D(2)(x)),
        "conv_general_dilated",
    ),
    "all groups of a convolution": (
        lambda x: NORM()(layers.Conv1D(12, 2, groups=3)(x)),
        "layer_normalization",
    ),
    "batch norm": (lambda x: NORM()(layers.BatchNormalization()(dense()(x))), "mul"),
    "norm of a norm": (lambda x: NORM()(NORM()(x)), "mul"),
    "recurrence": (lambda x: NORM()(layers.SimpleRNN(12, dtype="float32")(x)), "tanh"),
}


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("biased", "taken"), [(True, 1), (False, 0)])
def test_scale_and_shift_are_taken_up(biased: bool, taken: int) -> None:
    """Keras writes the scale twice, and subtracts the mean from the shift."""
    model = functional(chain(dense(), NORM(), layers.Dense(OUT, use_bias=biased)))
    check_taken_up(taken, *stateless(model), X, rtol=RTOL)


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("build", "obstacle"), LEFT.values(), ids=LEFT)
def test_norm_is_left_alone(build: Build, obstacle: str) -> None:
    check_left(*stateless(functional(build)), X, obstacle=obstacle)


@pytest.mark.usefixtures("lazy")
@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.parametrize(
    "norm",
    [
        lambda: NORM(rms_scaling=True),  # x over its deviation, not centered
        layers.RMSNormalization,
        layers.UnitNormalization,
        layers.BatchNormalization,
    ],
)
def test_no_layer_norm(norm: Layer) -> None:
    model = functional(lambda x: norm()(dense()(x)))
    report = fold_checked(*stateless(model), X).report
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())


# What reads the stream besides a LayerNorm, and how many norms then fold.
READERS: dict[str, tuple[Build, int]] = {
    "another norm": (lambda s: NORM(epsilon=1e-2)(s), 2),
    "softmax": (lambda s: layers.Softmax()(s), 1),
    "rms norm": (lambda s: layers.RMSNormalization()(s), 0),
    "unit norm": (lambda s: layers.UnitNormalization()(s), 0),
    "dense": (lambda s: layers.Dense(OUT)(s), 0),
    "group norm over tokens": (lambda s: layers.GroupNormalization(3)(s), 0),
    "batch norm": (lambda s: layers.BatchNormalization()(s), 0),
    "output": (lambda s: s, 0),
}


def read_twice(reader: Build, x: Any) -> list[Any]:
    s = dense()(x)
    return [NORM()(s), reader(s)]


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("reader", "folded"), READERS.values(), ids=READERS)
def test_readers_of_the_stream(reader: Build, folded: int) -> None:
    report = jax_lnfold.analyze(*stateless(functional(partial(read_twice, reader))), X)
    assert (report.n_folded, report.n_inserted) == (folded, 0)


@pytest.mark.usefixtures("lazy")
def test_all_of_these_compute_the_same() -> None:
    """One program of everything above that folds, which compiles faster than one each."""

    def build(x: Any) -> list[Any]:
        readers = [partial(read_twice, reader) for reader, n in READERS.values() if n]
        return [build(x) for build in (*(build for build, _ in FOLDING.values()), *readers)]

    assert fold_checked(*stateless(functional(build)), X).report.n_folded > 0


# --- transformers ---------------------------------------------------------------------------------


class Positions(layers.Layer):
    """Learned positions, and a class token in front if asked for."""

    def __init__(self, length: int, class_token: bool = False) -> None:
        super().__init__()
        self.length, self.class_token = length, class_token

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.table = self.add_weight(shape=(self.length, shape[-1]))
        if self.class_token:
            self.token = self.add_weight(shape=(1, 1, shape[-1]))

    def call(self, x: Any) -> Any:
        if self.class_token:
            token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1]))
            x = ops.concatenate([token, x], axis=1)
        return x + self.table[: x.shape[1]]

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, length, width = shape
        return batch, length and length + self.class_token, width


def keep() -> Layer:
    return layers.Identity()


def multi_head(**options: Any) -> layers.Layer:
    return layers.MultiHeadAttention(HEADS, KEY, **options)


def grouped_query(**options: Any) -> layers.Layer:
    return layers.GroupQueryAttention(KEY, HEADS, 2, **options)


def blocks(
    s: Any, causal: bool, attention: Layer = multi_head, drop: Layer = keep, depth: int = L
) -> Any:
    """Pre-norm transformer blocks and a final LayerNorm."""
    for _ in range(depth):
        h = NORM()(s)
        s = layers.Add()([s, drop()(attention()(h, h, use_causal_mask=causal))])
        h = layers.Dense(D)(layers.Dense(HID, activation="gelu")(NORM()(s)))
        s = layers.Add()([s, drop()(h)])
    return NORM()(s)


def gpt(head: str = "dense", **options: Any) -> keras.Model:
    """From token ids to logits; the head is a Dense layer, or the embedding run in reverse."""

    def build(ids: Any) -> Any:
        if head == "dense":
            embedding = layers.Embedding(VOCAB, D)
            logits = layers.Dense(VOCAB)
        else:
            embedding = layers.ReversibleEmbedding(VOCAB, D, tie_weights=head == "tied")
            logits = partial(embedding, reverse=True)
        return logits(blocks(Positions(T)(embedding(ids)), causal=True, **options))

    return functional(build, (None,))


def vit(pooling: str, patches: str = "convolution", **options: Any) -> keras.Model:
    """From images to logits, with a class token or pooling before or after the final norm."""

    def build(image: Any) -> Any:
        if patches == "convolution":
            s = layers.Reshape((12, D))(layers.Conv2D(D, 2, 2)(image))
        else:
            s = layers.Reshape((4, 2, 3, 2 * 3))(image)
            s = layers.EinsumDense("bhpwc,pcd->bhwd", (None, None, D), bias_axes="d")(s)
            s = layers.Reshape((12, D))(s)
        s = blocks(Positions(13, class_token=pooling == "token")(s), causal=False, **options)
        s = s[:, 0] if pooling == "token" else layers.GlobalAveragePooling1D()(s)
        return layers.Dense(OUT)(s)

    return functional(build, IMAGES.shape[1:])


# name: (model, input, explicit centerings); all 2L+1 LayerNorms fold.
TRANSFORMERS: dict[str, tuple[Callable[[], keras.Model], Any, int]] = {
    "gpt": (gpt, IDS, 0),
    "gpt, tied": (partial(gpt, "tied"), IDS, 1),
    "gpt, grouped queries, head in reverse": (
        partial(gpt, "untied", attention=grouped_query),
        IDS,
        0,
    ),
    "vit, class token": (partial(vit, "token"), IMAGES, 0),
    "vit, pooled, patches by einsum": (partial(vit, "mean", "einsum"), IMAGES, 0),
}


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("make", "x", "inserted"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformer(make: Callable[[], keras.Model], x: Any, inserted: int) -> None:
    apply, params, state = stateless(make())
    folded = fold_checked(apply, params, state, x)
    assert counts(folded.report) == (2 * L + 1, 2 * L + 1, inserted)
    # the mean of `ops.moments` and of its variance
    assert removed_sums(apply, params, folded, state, x) == 2 * (2 * L + 1) - inserted


@pytest.mark.usefixtures("lazy")
def test_gpt_edits_every_writer() -> None:
    model = gpt()
    report = jax_lnfold.analyze(*stateless(model), IDS)
    edited = {model.trainable_variables[int(edit.key_path)].path for edit in report.edits}
    writers = {
        variable.path
        for variable in model.trainable_variables
        if variable.shape[-1] == D and not variable.path.endswith(("gamma", "beta"))
    }
    assert edited == writers
    assert len(writers) == 2 + 4 * L  # two tables, and kernel and bias of two layers per block


def dropout(*noise_shape: int | None) -> Layer:
    return partial(layers.Dropout, 0.4, noise_shape=noise_shape or None)


def residual(drop: Layer, x: Any) -> Any:
    """Two residual MLPs."""
    s = dense()(x)
    for _ in range(2):
        h = layers.Dense(HID, activation="relu")(NORM()(s))
        s = layers.Add()([s, drop()(dense()(h))])
    return NORM()(s)


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(
    ("drop", "folded"),
    [
        pytest.param(dropout(), 1, id="elements"),
        pytest.param(partial(layers.SpatialDropout1D, 0.4), 1, id="features"),
        pytest.param(partial(layers.GaussianDropout, 0.4), 1, id="gaussian"),
        pytest.param(partial(layers.GaussianNoise, 0.4), 1, id="noise"),
        pytest.param(dropout(None, None, 1), 3, id="tokens"),
        pytest.param(dropout(None, 1, 1), 3, id="samples"),
    ],
)
def test_dropout(drop: Layer, folded: int) -> None:
    """A mask that differs between features leaves only the LayerNorm before it folded."""
    model = functional(partial(residual, drop))
    apply, params, state = stateless(model, training=True)
    assert state  # seeds, which training advances
    assert counts(jax_lnfold.analyze(apply, params, state, X)) == (3, folded, 0)
    assert counts(jax_lnfold.analyze(*stateless(model), X)) == (3, 3, 0)


@pytest.mark.usefixtures("lazy")
def test_dropout_computes_the_same() -> None:
    """With the same seeds, which are part of the state."""
    drops = (dropout(), dropout(None, 1, 1))
    model = functional(lambda x: [residual(drop, x) for drop in drops])
    assert fold_checked(*stateless(model, training=True), X).report.n_folded > 0


@pytest.mark.usefixtures("lazy")
def test_dropout_of_attention_weights() -> None:
    """Values are mixed with other weights, and stay zero-mean."""
    apply, params, state = stateless(gpt(attention=partial(multi_head, dropout=0.4)), training=True)
    want = (2 * L + 1, 2 * L + 1, 0)
    assert counts(jax_lnfold.analyze(apply, params, state, IDS)) == want


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("inside", "folded"), [(False, 1), (True, 0)])
def test_batch_norm_with_state(training: bool, inside: bool, folded: int) -> None:
    """BatchNorm before the projection is harmless; between it and the LayerNorm it is not."""
    batch_norm = layers.BatchNormalization()
    steps = (dense(), batch_norm) if inside else (batch_norm, dense())
    apply, params, state = stateless(functional(chain(*steps, NORM(name="norm"))), training)
    report = fold_checked(apply, params, state, X).report
    assert [n.folded for n in report.norms if n.path.endswith("norm")] == [bool(folded)]
    assert (report.n_folded, report.n_inserted) == (folded, 0)


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("policy", "rtol"), [("float32", RTOL), ("mixed_bfloat16", 0.05)])
def test_dtype_policies(policy: str, rtol: float) -> None:
    """Variables in float32; with mixed precision they are read in bfloat16, norms in float32."""
    keras.config.set_dtype_policy(policy)
    apply, params, state = stateless(functional(partial(residual, keep)))
    assert {p.dtype for p in params} == {jnp.dtype("float32")}
    folded = jax_lnfold.fold(apply, params, state, X)
    assert counts(folded.report) == (3, 3, 0)
    check_contracts(apply, params, folded, state, X, rtol=rtol)


# --- what a user sees -----------------------------------------------------------------------------


def test_folded_weights_in_the_model(tmp_path: Path) -> None:
    """`set_weights`, `predict`, a call, and a saved model."""
    zeros = {"kernel_initializer": "zeros"}
    model = functional(chain(dense(**zeros), NORM(), layers.Dense(OUT, **zeros)))
    apply, params, state = stateless(model)
    model.set_weights([np.asarray(p) for p in params])
    want = model.predict(X, verbose=0)
    folded = fold_checked(apply, params, state, X)
    assert counts(folded.report) == (1, 1, 0)
    check_contracts(apply, params, folded, state, X[:2, :4], rtol=RTOL)
    model.set_weights([np.asarray(p) for p in folded.params])  # `predict` donates its weights
    model.save(tmp_path / "folded.keras")
    loaded = keras.saving.load_model(tmp_path / "folded.keras")
    kernel = loaded.trainable_variables[0].numpy()
    np.testing.assert_allclose(kernel.mean(-1), 0, atol=1e-15)
    for same in (model(X), model.predict(X, verbose=0), loaded(X), folded(state, X)[0]):
        assert relative_difference(jnp.asarray(same), jnp.asarray(want)) < RTOL


# --- keras.applications ---------------------------------------------------------------------------


def analysed(model: keras.Model) -> Report:
    """The report for 32x32 images, without values."""
    trainable, other = (
        [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    x = jax.ShapeDtypeStruct((B, 32, 32, 3), "float64")
    return jax_lnfold.analyze(model.stateless_call, trainable, other, x)


@pytest.fixture
def convnext(lazy: None) -> keras.Model:
    return keras.applications.ConvNeXtTiny(weights=None, input_shape=(32, 32, 3), classes=OUT)


def test_convnext(convnext: keras.Model) -> None:
    """Stem, 3 + 3 + 9 + 3 blocks, 3 downsamplings and head; depthwise kernels read the stream."""
    report = analysed(convnext)
    assert counts(report) == (1 + 18 + 3 + 1, 1, 0)
    stem, *others = report.norms
    assert stem.folded
    assert stem.path.endswith("stem_layernorm")
    for n in others:
        assert ("conv_general_dilated" if "stage" in n.path else "mul") in n.reason


def test_first_stage_of_convnext(convnext: keras.Model) -> None:
    """Its stem, three blocks and a downsampling, computed."""
    end = convnext.get_layer("convnext_tiny_downsampling_block_0").output
    apply, params, state = stateless(keras.Model(convnext.input, end))
    report = fold_checked(apply, params, state, jnp.asarray(floats(2, 32, 32, 3))).report
    assert counts(report) == (5, 1, 0)


@pytest.mark.usefixtures("lazy")
def test_network_without_layer_norms() -> None:
    model = keras.applications.MobileNetV2(
        weights=None, alpha=0.35, input_shape=(32, 32, 3), classes=OUT
    )
    assert analysed(model).norms == ()
