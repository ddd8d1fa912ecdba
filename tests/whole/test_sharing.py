"""Parameters with several uses, and uses of parts of a parameter: every reader has to agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_lnfold
from tests.helpers.contracts import check_contracts, fold_checked, relative_difference, removed_sums
from tests.models.zoo.base import floats, perturb

Array = jax.Array
Model = Callable[..., Any]

B, T, DIN, D, HID, OUT, VOCAB = 2, 5, 7, 12, 9, 11, 13  # all different
H, HD, HK, FF = 3, 4, 6, 10  # D = H * HD
X = jnp.asarray(floats(B, T, DIN))
BLOCK = {"g": (D,), "c": (D,), "up": (D, HID), "down": (HID, D), "bias": (D,)}

norm = jax.nn.standardize


def make(**shapes: Any) -> Any:
    """Leaves of these shapes, with means that no centering overlooks."""
    full = jax.tree.map(lambda s: np.full(s, 0.3), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return perturb(full)


def paths(tree: Any) -> dict[str, Any]:
    """Leaves by key path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def check(
    apply: Model, params: Any, *inputs: Any, counts: tuple[int, int, int], edited: str = ""
) -> jax_lnfold.Folded:
    """Fold; `counts` are LayerNorms, folded ones and insertions, `edited` the leaves changed."""
    apply = jax.jit(apply)
    folded = fold_checked(apply, params, *inputs)
    report = folded.report
    assert (len(report.norms), report.n_folded, report.n_inserted) == counts
    assert {edit.key_path for edit in report.edits} == set(edited.split())
    old, new = paths(params), paths(folded.params)
    changed = {k for k in old if np.asarray(old[k]).tobytes() != np.asarray(new[k]).tobytes()}
    scaled = {s.key_path for s in report.scales} | {t for s in report.scales for t, _ in s.targets}
    assert changed == set(edited.split()) | scaled
    removed = removed_sums(apply, params, folded, *inputs)
    assert removed == report.n_folded - report.n_inserted
    return folded


def rms_norm(s: Array) -> Array:
    return s * jax.lax.rsqrt(jnp.mean(s * s, -1, keepdims=True) + 1e-5)


def mlp(p: Any, n: Array) -> Array:
    return jnp.tanh((n * p["g"] + p["c"]) @ p["up"]) @ p["down"] + p["bias"]


def block(p: Any, s: Array) -> Array:
    return s + mlp(p, norm(s))


# --- one block for all layers --------------------------------------------------------------------


def in_python(p: Any, layer: Model, s: Array) -> Array:
    for _ in range(3):
        s = layer(p, s)
    return s


def in_scan(p: Any, layer: Model, s: Array) -> Array:
    return jax.lax.scan(lambda s, _: (layer(p, s), None), s, length=3)[0]


def post_block(p: Any, s: Array) -> Array:
    return norm(s + mlp(p, s)) * p["g"] + p["c"]


ALBERT = make(embed=(DIN, D), block=BLOCK, v=(D, OUT))


Expected = tuple[tuple[int, int, int], str]
ALL = "embed block/down block/bias"
# name: (program, given how the block is repeated; what is expected unrolled, and in a loop)
SHARED: dict[str, tuple[Callable[..., Any], Expected, Expected]] = {
    "plain": (
        lambda p, repeat, x: norm(repeat(p["block"], block, x @ p["embed"])) @ p["v"],
        ((4, 4, 0), ALL),
        ((2, 2, 0), ALL),
    ),
    # One centering per layer costs more than it saves; only the first norm comes for free. In a
    # loop the first norm is every norm.
    "whose writer is read elsewhere": (
        lambda p, repeat, x: (
            norm(repeat(p["block"], block, x @ p["embed"])) @ p["v"],
            jnp.tanh(p["block"]["down"]),
        ),
        ((4, 1, 0), "embed"),
        ((2, 0, 0), ""),
    ),
    # ALBERT itself normalises after the sum, where a scale and a bias spoil the mean. The first
    # sum still starts from a normalised embedding; in a loop it is every sum.
    "normalised after the sum": (
        lambda p, repeat, x: repeat(p["block"], post_block, norm(x @ p["embed"])) @ p["v"],
        ((4, 2, 0), ALL),
        ((2, 1, 0), "embed"),
    ),
}


@pytest.mark.parametrize("repeat", [in_python, in_scan])
@pytest.mark.parametrize("name", SHARED)
def test_block_shared_by_all_layers(name: str, repeat: Model) -> None:
    apply, unrolled, looped = SHARED[name]
    counts, edited = unrolled if repeat is in_python else looped
    check(lambda p, x: apply(p, repeat, x), ALBERT, X, counts=counts, edited=edited)


def test_latents_and_one_block_for_every_look_at_the_data() -> None:
    """Perceiver: learned latents start the stream, one cross-attention serves all rounds."""

    def apply(p: Any, x: Array) -> Array:
        data = norm(x @ p["embed"])
        s = jnp.broadcast_to(p["latents"], (x.shape[0], HK, D))
        for _ in range(2):
            weights = jax.nn.softmax((norm(s) @ p["query"]) @ data.mT)
            s = block(p["block"], s + weights @ (data @ p["out"]))
        return norm(s) @ p["v"]

    shapes = {"embed": (DIN, D), "latents": (HK, D), "query": (D, D), "out": (D, D), "v": (D, OUT)}
    edited = "embed latents out block/down block/bias"
    check(apply, make(**shapes, block=BLOCK), X, counts=(6, 6, 0), edited=edited)


# --- one layer, two readers ----------------------------------------------------------------------

# What a second use of `w` and `b` feeds: (reader, LayerNorms in it, does it ignore a shift)
SECOND: dict[str, tuple[Callable[[Array], Array], int, bool]] = {
    "layer norm": (norm, 1, True),
    "layer norm of a gated value": (lambda s: norm(s * jnp.exp(X[..., :1])), 1, True),
    "layer norm of chosen tokens": (lambda s: norm(jnp.where(X[..., :1] > 0, s, 0.0)), 1, True),
    "layer norm of tokens or an integer": (
        lambda s: norm(jnp.where(X[..., :1] > 0, s, 0)),
        1,
        True,
    ),
    "layer norm of masked tokens": (lambda s: norm(s * (X[..., :1] > 0)), 1, True),
    "layer norm of a mean over tokens": (lambda s: norm(s.mean(1)), 1, True),
    "softmax over features": (jax.nn.softmax, 0, True),
    "nothing": (lambda s: jnp.zeros_like(s), 0, True),
    "rms norm": (rms_norm, 0, False),
    "output": (lambda s: s, 0, False),
    "layer norm over tokens": (lambda s: norm(s, axis=1), 1, False),
    "layer norm per head": (lambda s: norm(s.reshape(B, T, H, HD)), 1, True),
    "layer norm of two tokens": (lambda s: norm(s[:, :4].reshape(B, 2, 2 * D)), 1, False),
    "layer norm of some features": (lambda s: norm(s[..., :HK]), 1, True),
    "layer norm of scaled features": (lambda s: norm(s * jnp.arange(D)), 1, False),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_use_of_a_layer(name: str) -> None:
    reader, norms, tolerant = SECOND[name]

    def apply(p: Any, x: Array) -> Any:
        first, second = (y @ p["w"] + p["b"] for y in (x, jnp.flip(x, 1)))
        return norm(first) @ p["v"], reader(second)

    # a norm of some of the features tolerates the centering of all, and is not served by it
    narrower = name in ("layer norm per head", "layer norm of some features")
    folded = (1 + norms - narrower) if tolerant else 0
    params = make(w=(DIN, D), b=(D,), v=(D, OUT))
    edited = "w b" if tolerant else ""
    report = check(apply, params, X, counts=(1 + norms, folded, 0), edited=edited).report
    assert all(str(e).endswith(("w centered along axis 1", "b centered along axis 0"))
               for e in report.edits)  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2])
def test_intolerant_second_use_costs_one_centering_of_a_long_stream(depth: int) -> None:
    """Two norms are not worth a centering, three are."""

    def apply(p: Any, x: Array) -> Any:
        s = x @ p["w"]
        for _ in range(depth):
            s = block(p["block"], s)
        return norm(s) @ p["v"], jnp.flip(x, 1) @ p["w"]

    params = make(w=(DIN, D), block=BLOCK, v=(D, OUT))
    worth = depth > 1
    edited = "block/down block/bias" if worth else ""
    check(apply, params, X, counts=(depth + 1, (depth + 1) * worth, int(worth)), edited=edited)


OWN_READERS: dict[str, tuple[Callable[[Array], Any], bool]] = {
    "weight standardisation": (lambda w: X @ (w - w.mean(1, keepdims=True)), True),
    "its shape": (lambda w: jnp.ones(w.shape), True),
    "returned": (lambda w: w, False),
    "penalty": (lambda w: jnp.sum(w**2), False),
    "spectral norm": (lambda w: jnp.linalg.norm(w @ jnp.ones(D)), False),
    "standardisation along the other axis": (lambda w: X @ (w - w.mean(0, keepdims=True)), False),
}


@pytest.mark.parametrize(("reader", "tolerant"), OWN_READERS.values(), ids=OWN_READERS)
def test_kernel_that_is_read_by_itself(reader: Callable[[Array], Any], tolerant: bool) -> None:
    params = make(w=(DIN, D), v=(D, OUT))
    counts = (1, int(tolerant), 0)

    def apply(p: Any, x: Array) -> Any:
        return norm(x @ p["w"]) @ p["v"], reader(p["w"])

    check(apply, params, X, counts=counts, edited="w" if tolerant else "")


def test_standardised_kernel_needs_no_edit() -> None:
    def apply(p: Any, x: Array) -> Array:
        return norm(x @ (p["w"] - p["w"].mean(1, keepdims=True))) @ p["v"]

    check(apply, make(w=(DIN, D), v=(D, OUT)), X, counts=(1, 1, 0))


# --- one table for encoder and decoder -----------------------------------------------------------

SOURCE = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(B, 5)))
TARGET = jnp.asarray(np.random.default_rng(1).integers(VOCAB, size=(B, 6)))
CROSS = {"query": (D, HK), "key": (D, HK), "out": (D, D)}
T5 = make(shared=(VOCAB, D), enc=BLOCK, dec=BLOCK, cross=CROSS, head=(D, VOCAB), pos=(VOCAB, D))


def attend(p: Any, n: Array, memory: Array) -> Array:
    return jax.nn.softmax((n @ p["query"]) @ (memory @ p["key"]).mT) @ (memory @ p["out"])


def t5(
    p: Any, source: Array, target: Array, tied: bool = False, scale: float = 1, leak: bool = False
) -> Any:
    table = p["shared"] * scale if scale != 1 else p["shared"]
    s = block(p["enc"], block(p["enc"], table[source]))
    memory = norm(s)
    t = block(p["dec"], table[target])
    t = t + attend(p["cross"], norm(t), memory)
    logits = norm(t) @ (p["shared"].T if tied else p["head"])
    return (logits, s) if leak else logits


WRITERS = "enc/down enc/bias dec/down dec/bias cross/out"
T5_CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int], str]] = {
    "untied": ({}, (6, 6, 0), f"shared {WRITERS}"),
    "untied, scaled": ({"scale": D**0.5}, (6, 6, 0), f"shared {WRITERS}"),
    # the rows that each side looks up
    "tied": ({"tied": True}, (6, 6, 2), WRITERS),
    # the scaled table has fewer rows than the two sides look up, and other readers than the logits
    "tied, scaled": ({"tied": True, "scale": D**0.5}, (6, 6, 1), WRITERS),
    # the encoder's stream is an output: only the decoder's rows are centered
    "encoder leaks": ({"leak": True}, (6, 3, 1), "dec/down dec/bias cross/out"),
}


@pytest.mark.parametrize("name", T5_CASES)
def test_table_shared_by_encoder_and_decoder(name: str) -> None:
    options, counts, edited = T5_CASES[name]
    report = check(partial(t5, **options), T5, SOURCE, TARGET, counts=counts, edited=edited).report
    if name == "tied, scaled":
        assert "`mul`" in report.insertions[0].after


@pytest.mark.parametrize("tied", [False, True])
def test_shared_table_before_post_norm_blocks(tied: bool) -> None:
    """BART: each side has one norm that an edit could serve; one insertion each is too much."""

    def apply(p: Any, source: Array, target: Array) -> Array:
        memory, t = (
            norm(p["shared"][ids] + p["pos"][: ids.shape[1]]) * p["enc"]["g"] + p["enc"]["c"]
            for ids in (source, target)
        )
        memory = post_block(p["enc"], memory)
        t = post_block(p["dec"], t + attend(p["cross"], t, memory))
        return t @ (p["shared"].T if tied else p["head"])

    counts = (4, 0, 0) if tied else (4, 2, 0)
    check(apply, T5, SOURCE, TARGET, counts=counts, edited="" if tied else "shared pos")


# --- one leaf, two axis sets ---------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "inserted"), [(T, 0), (30, 1)])
def test_kernel_and_its_transpose(tokens: int, inserted: int) -> None:
    """Neither use tolerates the centering of the other.

    The transpose is a value of its own: with many tokens it is worth an explicit centering.
    """

    def apply(p: Any, x: Array) -> Array:
        h = norm(x @ p["w"]) * p["g"] + p["c"]
        return norm(h @ p["w"].T) @ p["v"]

    params = make(w=(DIN, D), g=(D,), c=(D,), v=(DIN, OUT))
    x = jnp.asarray(floats(B, tokens, DIN))
    folded = check(apply, params, x, counts=(2, inserted, inserted))
    check_contracts(apply, params, folded, X)


def test_kernel_contracted_along_either_axis() -> None:
    """Without a transpose there is nothing to center but the leaf."""

    def apply(p: Any, x: Array) -> Array:
        h = norm(x @ p["w"]) * p["g"] + p["c"]
        return norm(jnp.einsum("btk,ik->bti", h, p["w"])) @ p["v"]

    params = make(w=(DIN, D), g=(D,), c=(D,), v=(DIN, OUT))
    check(apply, params, jnp.asarray(floats(B, 30, DIN)), counts=(2, 0, 0))


def test_table_looked_up_and_multiplied() -> None:
    """Rows by index and by one-hot products ask for the same centering."""

    def apply(p: Any, ids: Array) -> Any:
        hot = jax.nn.one_hot(ids, VOCAB, dtype=float)
        return norm(p["table"][ids]) @ p["v"], norm(hot @ p["table"]) @ p["v"]

    params = make(table=(VOCAB, D), v=(D, OUT))
    check(apply, params, SOURCE, counts=(2, 2, 0), edited="table")


@pytest.mark.parametrize("narrow", [8, D])
def test_slimmable_columns(narrow: int) -> None:
    """The narrow network is normalised over fewer columns: only the wide one can be served."""

    def apply(p: Any, x: Array) -> Any:
        return norm(x @ p["w"][:, :narrow]) @ p["v"][:narrow], norm(x @ p["w"]) @ p["v"]

    folded = 1 if narrow < D else 2
    report = check(apply, make(w=(DIN, D), v=(D, OUT)), X, counts=(2, folded, 0), edited="w").report
    assert [str(e) for e in report.edits] == ["w centered along axis 1"]
    assert report.norms[1].folded


def test_nested_rows() -> None:
    """MatFormer: the narrow layer uses the first hidden units of the wide one."""

    def apply(p: Any, x: Array) -> Any:
        s = x @ p["w"]
        n = norm(s)
        wide = s + jnp.tanh(n @ p["up"]) @ p["down"]
        narrow = s + jnp.tanh(n @ p["up"][:, :HD]) @ p["down"][:HD]
        return norm(wide) @ p["v"], norm(narrow) @ p["v"]

    params = make(w=(DIN, D), up=(D, HID), down=(HID, D), v=(D, OUT))
    check(apply, params, X, counts=(3, 3, 0), edited="w down")


def test_kernels_that_overlap_in_a_flat_vector() -> None:
    """A row of one kernel is parts of two rows of the other: centering one spoils the other."""
    start = 5

    def apply(p: Any, x: Array) -> Any:
        first, second = (p["flat"][i : i + DIN * D].reshape(DIN, D) for i in (0, start))
        return norm(x @ first) @ p["v"], norm(x @ second) @ p["v"]

    params = make(flat=(DIN * D + start,), v=(D, OUT))
    check(apply, params, X, counts=(2, 0, 0), edited="")


# --- some columns of a fused kernel --------------------------------------------------------------


def heads(y: Array, width: int = HD) -> Array:
    return y.reshape(*y.shape[:-1], -1, width)


def scores(p: Any, q: Array, k: Array, v: Array) -> Array:
    """Attention of normalised queries and keys, (batch, token, head, feature)."""
    q, k = norm(q) * p["g"] + p["c"], norm(k) * p["g"]
    return jax.nn.dot_product_attention(q, k, v)


def split_qkv(p: Any, y: Array) -> Any:
    return scores(p, *map(heads, jnp.split(y, 3, -1)))


def stacked_qkv(p: Any, y: Array) -> Any:
    q, k, v = jnp.moveaxis(y.reshape(B, T, 3, H, HD), 2, 0)
    return scores(p, q, k, v)


def per_head_qkv(p: Any, y: Array) -> Any:
    return scores(p, *jnp.split(heads(y, 3 * HD), 3, -1))


def cached_keys(p: Any, y: Array) -> Any:
    q, k, v = map(heads, jnp.split(y, 3, -1))
    return scores(p, q, k, v), (k, v)


def palm(p: Any, y: Array) -> Any:
    """Many query heads, one head of keys and values, and the two halves of a gated layer."""
    q, k, v, gate, up = jnp.split(y, np.cumsum([D, HD, HD, FF]), -1)
    return scores(p, heads(q), heads(k), heads(v)), nn.silu(gate) * up


def rotary_first(p: Any, y: Array) -> Any:
    angle = jnp.arange(T)[:, None, None] / jnp.arange(1, 1 + HD // 2)
    q, k, v = map(heads, jnp.split(y, 3, -1))

    def rotate(z: Array) -> Array:
        a, b = jnp.split(z, 2, -1)
        turned = (a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle))
        return jnp.concatenate(turned, -1)

    return scores(p, rotate(q), rotate(k), v)


def gated(p: Any, y: Array) -> Any:
    gate, up = jnp.split(y, 2, -1)
    return nn.silu(norm(gate)) * up


def interleaved(p: Any, y: Array) -> Any:
    return nn.silu(norm(y[..., ::2])) * y[..., 1::2]


def paired(p: Any, y: Array) -> Any:
    pairs = y.reshape(B, T, -1, 2)
    return nn.silu(norm(pairs[..., 0])) * pairs[..., 1]


def gated_both(p: Any, y: Array) -> Any:
    return gated(p, norm(y))


QUERIES, KEYS = (np.arange(D).reshape(H, HD) + i * D for i in (0, 1))
GROUPED = np.arange(3 * D).reshape(H, 3, HD)
EVEN = np.arange(0, 2 * FF, 2)

# name: (function of the projection, its width, LayerNorms, groups of columns that are centered)
FUSED: dict[str, tuple[Model, int, int, list[np.ndarray]]] = {
    "qkv": (split_qkv, 3 * D, 2, [*QUERIES, *KEYS]),
    "qkv stacked": (stacked_qkv, 3 * D, 2, [*QUERIES, *KEYS]),
    "qkv by head": (per_head_qkv, 3 * D, 2, [*GROUPED[:, 0], *GROUPED[:, 1]]),
    "keys and values returned": (cached_keys, 3 * D, 2, [*QUERIES]),
    "rotary first": (rotary_first, 3 * D, 2, []),
    "palm": (palm, D + 2 * HD + 2 * FF, 2, [*QUERIES, np.arange(D, D + HD)]),
    "gate and up": (gated, 2 * FF, 1, [np.arange(FF)]),
    "gate and up interleaved": (interleaved, 2 * FF, 1, [EVEN]),
    "gate and up in pairs": (paired, 2 * FF, 1, [EVEN]),
    "norm of both, then of the gate": (gated_both, 2 * FF, 2, [np.arange(2 * FF)]),
}


@pytest.mark.parametrize("name", FUSED)
def test_some_columns_are_centered(name: str) -> None:
    read, width, norms, groups = FUSED[name]

    def apply(p: Any, x: Array) -> Any:
        return read(p, x @ p["w"] + p["b"])

    params = make(w=(DIN, width), b=(width,), g=(HD,), c=(HD,))
    folds = {"rotary first": 0, "keys and values returned": 1}.get(name, norms)
    if name == "norm of both, then of the gate":
        folds = 1  # the second one reads features of the first
    folded = check(apply, params, X, counts=(norms, folds, 0), edited="w b" if groups else "")
    outside = np.setdiff1d(np.arange(width), np.concatenate([[], *groups]).astype(int))
    for leaf in ("w", "b"):
        old, new = np.asarray(params[leaf]), np.asarray(folded.params[leaf])
        np.testing.assert_array_equal(new[..., outside], old[..., outside])
        for group in groups:
            want = old[..., group] - old[..., group].mean(-1, keepdims=True)
            np.testing.assert_allclose(new[..., group], want, rtol=0, atol=1e-15)


# --- kernels that are computed from parameters ---------------------------------------------------

SHAPES = {"a": (3, D), "b": (4, D), "w": (DIN, D), "i": (DIN, 2), "o": (2, D), "e": (3, DIN, D)}
NARROW = {"left": (DIN, 5), "right": (DIN, 7), "gain": (D,), "v": (D, OUT)}
MADE = make(**SHAPES, **NARROW)


def lora(p: Any) -> Array:
    return p["w"] + 0.5 * (p["i"] @ p["o"])


def weight_norm(p: Any) -> Array:
    return p["gain"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)


# name: (kernel, leaves to edit); without any the kernel itself may be worth a centering
KERNELS: dict[str, tuple[Callable[[Any], Array], str]] = {
    "rows of two leaves": (lambda p: jnp.concatenate([p["a"], p["b"]]), "a b"),
    "low-rank update": (lora, "w o"),
    "average of an ensemble": (lambda p: p["e"].mean(0), "e"),
    "one of an ensemble": (lambda p: p["e"][-1], "e"),
    "columns of two leaves": (lambda p: jnp.concatenate([p["left"], p["right"]], 1), ""),
    "weight norm": (weight_norm, ""),
    "rectified": (lambda p: nn.relu(p["w"]), ""),
    "scaled by row": (lambda p: p["w"] * p["i"][:, :1], "w"),
}


@pytest.mark.parametrize(
    ("name", "tokens", "worth"),
    [(k, n, n > T) for k, (_, edited) in KERNELS.items() for n in ((T,) if edited else (T, 20))],
)
def test_computed_kernel(name: str, tokens: int, worth: bool) -> None:
    """Centering a kernel of 7 rows costs twice 7, and saves one mean for every token."""
    kernel, edited = KERNELS[name]

    def apply(p: Any, x: Array) -> Array:
        return norm(x @ kernel(p)) @ p["v"]

    counts = (1, 1, 0) if edited else (1, int(worth), int(worth))
    folded = check(apply, MADE, jnp.asarray(floats(B, tokens, DIN)), counts=counts, edited=edited)
    check_contracts(apply, MADE, folded, X)


@pytest.mark.parametrize(("axis", "counts"), [(0, (2, 2, 0)), (1, (2, 2, 0))])
def test_joined_kernel_with_a_norm_for_each_part(axis: int, counts: tuple[int, int, int]) -> None:
    """Two projections in one product, each normalised on its own."""

    def apply(p: Any, x: Array) -> Any:
        first, second = ("left", "right") if axis else ("a", "b")
        w = jnp.concatenate([p[first], p[second]], axis)
        if axis:
            y = x @ w
            return norm(y[..., :5]), norm(y[..., 5:])
        return norm(x[..., :3] @ w[:3]), norm(x[..., 3:] @ w[3:])

    check(apply, MADE, X, counts=counts, edited="left right" if axis else "a b")


# --- rows of a stacked parameter -----------------------------------------------------------------

STACKED = make(w=(3, DIN, D), b=(3, D), v=(D, OUT))


@pytest.mark.parametrize("row", [0, 1, -1])
def test_one_row_of_a_stack_feeds_a_norm(row: int) -> None:
    def apply(p: Any, x: Array) -> Any:
        raw = [x @ p["w"][i] + p["b"][i] for i in range(3) if i != row % 3]
        return norm(x @ p["w"][row] + p["b"][row]) @ p["v"], raw

    folded = check(apply, STACKED, X, counts=(1, 1, 0), edited="w b")
    for leaf in ("w", "b"):
        old, new = np.array(STACKED[leaf]), np.array(folded.params[leaf])
        old[row] -= old[row].mean(-1, keepdims=True)
        np.testing.assert_allclose(new[row], old[row], rtol=0, atol=1e-15)
        np.testing.assert_array_equal(np.delete(new, row, 0), np.delete(old, row, 0))


def test_all_rows_of_a_stack_in_one_edit() -> None:
    def apply(p: Any, x: Array) -> Any:
        return [norm(x @ w + b) @ p["v"] for w, b in zip(p["w"], p["b"], strict=True)]

    report = check(apply, STACKED, X, counts=(3, 3, 0), edited="w b").report
    words = [str(e) for e in report.edits]
    assert sorted(words) == ["b centered along axis 1", "w centered along axis 2"]


@pytest.mark.parametrize("leak", [False, True])
def test_row_chosen_by_the_data(leak: bool) -> None:
    """Any row may feed the norm, so all of them are centered; a raw row could be the same one."""

    def apply(p: Any, x: Array, i: Array) -> Any:
        y = norm(x @ p["w"][i]) @ p["v"]
        return (y, x @ p["w"][1]) if leak else y

    counts = (1, int(not leak), 0)
    edited = "" if leak else "w"
    check(apply, STACKED, X, jnp.asarray(2), counts=counts, edited=edited)


# --- all parameters in one vector ----------------------------------------------------------------

TREE = make(embed=(DIN, D), block=BLOCK, v=(D, OUT))


def two_norms(p: Any, x: Array) -> Array:
    return norm(block(p["block"], x @ p["embed"])) @ p["v"]


@pytest.mark.parametrize("penalty", [False, True])
def test_raveled_parameters(penalty: bool) -> None:
    flat, unravel = jax.flatten_util.ravel_pytree(TREE)

    def apply(flat: Array, x: Array) -> Any:
        y = two_norms(unravel(flat), x)
        return (y, jnp.sum(flat**2)) if penalty else y

    folded = fold_checked(jax.jit(apply), flat, X)
    report = folded.report
    assert (len(report.norms), report.n_folded) == (2, 0 if penalty else 2)
    want = TREE if penalty else jax_lnfold.fold(two_norms, TREE, X).params
    for path, leaf in paths(unravel(folded.params)).items():
        np.testing.assert_allclose(leaf, paths(want)[path], rtol=0, atol=1e-15)
        if path in ("v", "block/up", "block/g", "block/c"):
            np.testing.assert_array_equal(leaf, paths(TREE)[path])


def test_slices_of_a_vector() -> None:
    """Kernel and bias cut out by hand, in the other order, with a gap nobody reads."""

    def apply(flat: Array, x: Array) -> Array:
        bias, kernel = flat[:D], flat[D + 2 : D + 2 + DIN * D].reshape(DIN, D)
        return norm(x @ kernel + bias) @ flat[-D * OUT :].reshape(D, OUT)

    flat = make(flat=(D + 2 + DIN * D + D * OUT,))["flat"]
    folded = fold_checked(jax.jit(apply), flat, X)
    assert (folded.report.n_folded, folded.report.n_inserted) == (1, 0)
    kept = np.r_[D : D + 2, flat.size - D * OUT : flat.size]
    np.testing.assert_array_equal(folded.params[kept], flat[kept])
    assert abs(folded.params[:D].mean()) < 1e-15


# --- one compiled function, several calls --------------------------------------------------------


@jax.jit
def normed_layer(w: Array, b: Array, x: Array) -> Array:
    return norm(x @ w + b)


@jax.jit
def stream(p: Any, x: Array) -> Array:
    """Three norms on what `w` writes."""
    return norm(block(p["block"], block(p["block"], x @ p["w"])))


def test_function_called_twice_with_the_same_parameters() -> None:
    def apply(p: Any, x: Array) -> Any:
        return [normed_layer(p["w"], p["b"], y) for y in (x, jnp.flip(x, 1))]

    check(apply, make(w=(DIN, D), b=(D,)), X, counts=(2, 2, 0), edited="w b")


def test_function_called_with_editable_and_other_parameters() -> None:
    def apply(p: Any, x: Array) -> Any:
        calls = [normed_layer(p[i]["w"], p[i]["b"], x) for i in ("first", "second")]
        return calls, jnp.tanh(p["second"]["w"])

    layer = {"w": (DIN, D), "b": (D,)}
    folded = check(
        apply, make(first=layer, second=layer), X, counts=(2, 1, 0), edited="first/w first/b"
    )
    assert [n.folded for n in folded.report.norms] == [True, False]


def test_centering_inserted_into_one_of_two_calls() -> None:
    def apply(p: Any, x: Array) -> Any:
        return [stream(p[i], x) for i in ("first", "second")], jnp.tanh(p["second"]["w"])

    part = {"w": (DIN, D), "block": BLOCK}
    names = ("first", "second")
    edited = " ".join(
        ["first/w", *(f"{i}/block/{leaf}" for i in names for leaf in ("down", "bias"))]
    )
    apply_params = make(first=part, second=part)
    check(apply, apply_params, X, counts=(6, 6, 1), edited=edited)


# --- one array at two places of the tree ---------------------------------------------------------


def both_normed(p: Any, x: Array) -> Any:
    return norm(x @ p["a"]) @ p["v"], norm(jnp.flip(x, 1) @ p["b"]) @ p["v"]


def one_normed(p: Any, x: Array) -> Any:
    return norm(x @ p["a"]) @ p["v"], jnp.tanh(x @ p["b"])


def scale_and_bias(p: Any, x: Array) -> Any:
    """A layer scale is merged into `w` and the biases are edited."""
    return norm((x @ p["w"]) * p["gain"] + p["b"]) @ p["v"]


def same_kernel(kind: Callable[..., Any]) -> Any:
    kernel = kind(make(w=(DIN, D))["w"])
    return {"a": kernel, "b": kernel, "v": kind(make(v=(D, OUT))["v"])}


def same_vector(kind: Callable[..., Any]) -> Any:
    vector = kind(make(b=(D,))["b"])
    leaves = make(w=(DIN, D), v=(D, OUT))
    return {"b": vector, "gain": vector, **jax.tree.map(kind, leaves)}


# name: (function, tree with one array at two places, LayerNorms, leaves edited)
ALIASED: dict[str, tuple[Model, Callable[..., Any], int, str]] = {
    "both feed a norm": (both_normed, same_kernel, 2, "a b"),
    "one feeds a norm": (one_normed, same_kernel, 1, "a"),
    "a scale and a bias": (scale_and_bias, same_vector, 1, "w b"),
}


@pytest.mark.parametrize("kind", [np.array, jnp.array], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", ALIASED)
def test_same_array_at_two_places(name: str, kind: Callable[..., Any]) -> None:
    apply, tree, norms, edited = ALIASED[name]
    check(apply, tree(kind), X, counts=(norms, norms, 0), edited=edited)


@pytest.mark.parametrize("name", ALIASED)
def test_donating_an_array_at_two_places(name: str) -> None:
    """It works, or it is refused before anything has been deleted."""
    apply, tree, *_ = ALIASED[name]
    params = tree(jnp.array)
    want = apply(params, X)
    refused, folded = None, None
    try:
        folded = jax_lnfold.fold(apply, params, X, donate=True)
    except jax_lnfold.FoldError as error:
        refused = error
    if folded is None:
        assert "donate" in str(refused)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    else:
        assert relative_difference(folded(X), want) < 1e-12
        assert relative_difference(apply(folded.params, X), want) < 1e-12


# --- one scale for two layers --------------------------------------------------------------------


@pytest.mark.parametrize("leak", [False, True])
def test_layer_scale_shared_by_two_layers(leak: bool) -> None:
    """Both kernels absorb the scale, or none does."""

    def apply(p: Any, x: Array) -> Any:
        s = x @ p["embed"]
        for i in ("first", "second"):
            s = s + (jnp.tanh(norm(s) @ p[i]["up"]) @ p[i]["down"]) * p["gain"]
        y = norm(s) @ p["v"]
        return (y, jnp.tanh(p["second"]["down"])) if leak else y

    layer = {"up": (D, HID), "down": (HID, D)}
    params = make(embed=(DIN, D), first=layer, second=layer, gain=(D,), v=(D, OUT))
    edited = "embed" if leak else "embed first/down second/down"
    folded = check(apply, params, X, counts=(3, 1 if leak else 3, 0), edited=edited)
    assert len(folded.report.scales) == (0 if leak else 1)
    assert bool(np.all(np.asarray(folded.params["gain"]) == 1)) is not leak
