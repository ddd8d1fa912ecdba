"""One leaf, one role: the leaves of a merge are different ones, or it is left alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold import FoldPlan, PlanFormatError
from jax_lnfold.errors import Bug
from jax_lnfold.plan.edits.scale import ScaleEdit
from tests.helpers.contracts import assert_identical, fold_checked, relative_difference, snapshot

Params = dict[str, jax.Array]
D = 6


def normed(x: jax.Array, scale: jax.Array, shift: jax.Array | None = None) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    return x if shift is None else x + shift


def parameters(shapes: dict[str, tuple[int, ...]]) -> Params:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) + 0.5) for name, shape in shapes.items()}


# --- every pair of roles -------------------------------------------------------------------------


def block(p: Params, x: jax.Array) -> jax.Array:
    """A norm with two readers, a LayerScale, and a norm with one reader."""
    x = x @ p["stem"]
    y = normed(x, p["g1"], p["c1"])
    y = jnp.tanh(y @ p["w1"] + p["b1"]) * jnp.sin(y @ p["w2"] + p["b2"])
    x = x + (y @ p["w3"] + p["b3"]) * p["gate"]
    return normed(x, p["g2"], p["c2"]) @ p["w4"] + p["b4"]


VECTORS = ("g1", "c1", "b1", "b2", "gate", "b3", "g2", "c2", "b4")
MATRICES = ("w1", "w2", "w3", "w4")
AFFINE = {"g1": {"g1", "c1", "w1", "b1", "w2", "b2"}, "g2": {"g2", "c2", "w4", "b4"}}
GATED = {"gate", "w3", "b3"}
BLOCK = {"stem": (4, D)} | dict.fromkeys(VECTORS, (D,)) | dict.fromkeys(MATRICES, (D, D))
PAIRS = [" ".join(pair) for names in (VECTORS, MATRICES) for pair in combinations(names, 2)]
TURNED = [" ".join((*pair, "turned")) for pair in combinations(MATRICES, 2)]


@pytest.mark.parametrize("pair", ["stem stem", *PAIRS, *TURNED])
def test_a_leaf_in_two_roles(pair: str) -> None:
    """Merges that have neither of the roles stay as they are, all others are left."""
    leaf, role, *turned = pair.split()

    def apply(p: Params, x: jax.Array) -> jax.Array:
        return block(p | {role: p[leaf].T if turned else p[leaf]}, x)

    params, x = parameters(BLOCK), jax.random.normal(jax.random.key(1), (3, 4), jnp.float64)
    params = {name: array for name, array in params.items() if name == leaf or name != role}
    folded = jax_lnfold.fold(apply, params, x, fold_affine=True)
    want = apply(params, x)  # operation by operation: each is compiled once for all pairs
    assert relative_difference(folded.apply(folded.params, x), want) < 1e-12
    assert relative_difference(apply(folded.params, x), want) < 1e-12
    assert FoldPlan.from_json(folded.plan.to_json()) == folded.plan
    taken = [scale for scale, roles in AFFINE.items() if not roles & {leaf, role}]
    assert [edit.key_path for edit in folded.report.affine] == taken
    assert len(folded.report.scales) == (not GATED & {leaf, role})


# --- other ways to give a leaf two roles, next to those that do not ------------------------------


def two_readers(p: Params, x: jax.Array, names: str) -> jax.Array:
    y, (w, b, v, d) = normed(x, p["g"], p["c"]), (p[name] for name in names)
    return jnp.tanh(y @ w + b) * (y @ v + d)


def branches(p: Params, x: jax.Array, names: str) -> jax.Array:
    y, (w, b, v, d) = normed(x, p["g"], p["c"]), (p[name] for name in names)
    return jax.lax.cond(x[0, 0, 0] > 0, lambda: y @ w + b, lambda: y @ v + d)


def without_the_shift(p: Params, x: jax.Array, names: str) -> jax.Array:
    y, (w, v) = normed(x, p["g"]), (p[name] for name in names)
    return (y @ w) * ((y + p["c"]) @ v + p["b"])


def over_tokens(p: Params, x: jax.Array, names: str) -> jax.Array:
    """A sum over tokens, too: the kernel has an axis for them, or is repeated."""
    kernel = jnp.broadcast_to(p[names], (7, D, 5))
    return jnp.einsum("btd,tdf->bf", normed(x, p["g"], p["c"]), kernel) + p["b"]


def loops(p: Params, x: jax.Array, names: str) -> jax.Array:
    """A loop in an equally long loop: the rows of the shift are those of either."""

    def outer(x: jax.Array, outer_row: Params) -> tuple[jax.Array, None]:
        def inner(x: jax.Array, inner_row: Params) -> tuple[jax.Array, None]:
            shift = {"outer": outer_row, "inner": inner_row}[names]["cs"]
            y = normed(x, outer_row["gs"], shift)
            return x + jnp.tanh(y @ outer_row["ws"] + outer_row["bs"]), None

        return jax.lax.scan(inner, x, p)[0], None

    p = {name: p[name] for name in ("gs", "cs", "ws", "bs")}
    return jax.lax.scan(outer, x, p)[0]


SHAPES = {"g": (D,), "c": (D,), "w": (D, 5), "b": (5,), "v": (D, 5), "d": (5,)}
SHAPES |= {"k": (7, D, 5), "r": (1, D, 5)}
SHAPES |= {"gs": (3, D), "cs": (3, D), "ws": (3, D, D), "bs": (3, D)}

CASES: dict[str, tuple[Callable[..., jax.Array], dict[str, int]]] = {
    "two readers": (two_readers, {"wbvd": 1, "wbwb": 1, "wbwd": 0, "wbvb": 0}),
    "branches": (branches, {"wbvd": 1, "wbwb": 1, "wbwd": 0, "wbvb": 0}),
    # Different kernels could do, but a plan has no words for one that takes the scale alone.
    "without the shift": (without_the_shift, {"wv": 0, "ww": 0}),
    "over tokens": (over_tokens, {"k": 1, "r": 0, "w": 0}),
    "loops": (loops, {"outer": 1, "inner": 0}),
}


@pytest.mark.parametrize(
    ("case", "names"), [(case, names) for case, (_, all_) in CASES.items() for names in all_]
)
def test_roles(case: str, names: str) -> None:
    apply, taken = CASES[case]
    apply = partial(apply, names=names)
    params, x = parameters(SHAPES), jax.random.normal(jax.random.key(1), (2, 7, D), jnp.float64)
    folded = fold_checked(apply, params, x, fold_affine=True, defer_scale=True, deferred_cost=0.0)
    assert len(folded.report.affine) == taken[names]
    assert FoldPlan.from_json(folded.plan.to_json()) == folded.plan


def gated(p: Params, x: jax.Array, also: Callable[[Params], Any]) -> Any:
    """A LayerScale behind a term that one centering makes zero-mean before it is repeated."""
    y = jnp.broadcast_to(jnp.tanh(x[:, :1]) @ p["w3"], (2, 9, D)) + p["b3"]
    return normed(y * p["gate"], p["g1"]), also(p)


ALSO: dict[str, tuple[Callable[[Params], Any], bool]] = {
    "nothing": (lambda p: None, True),
    "another leaf": (lambda p: p["w1"], True),
    "a kernel": (lambda p: p["w3"], False),
    "rows of a kernel": (lambda p: p["w3"][:2], False),
    "a bias": (lambda p: p["b3"], False),
    "the scale": (lambda p: p["gate"], False),
}


@pytest.mark.parametrize(("returned", "merged"), ALSO.values(), ids=ALSO)
def test_what_is_returned_takes_no_scale(returned: Callable[[Params], Any], merged: bool) -> None:
    params, x = parameters(BLOCK | {"w3": (4, D)}), jnp.ones((2, 7, 4))
    folded = fold_checked(partial(gated, also=returned), params, x)
    assert len(folded.report.scales) == merged


# --- the plan is checked by itself ---------------------------------------------------------------


def plan() -> FoldPlan:
    x = jnp.ones((3, 4))
    return jax_lnfold.plan_fold(block, parameters(BLOCK), x, fold_affine=True)


def reader(number: int, **change: Any) -> Callable[[FoldPlan], FoldPlan]:
    """One reader of the first merge changed."""

    def broken(good: FoldPlan) -> FoldPlan:
        first, *rest = good.affine
        readers = [*first.readers]
        readers[number] = replace(readers[number], **change)
        return replace(good, affine=(replace(first, readers=tuple(readers)), *rest))

    return broken


def merge(**change: Any) -> Callable[[FoldPlan], FoldPlan]:
    """The first merge changed."""
    return lambda good: replace(good, affine=(replace(good.affine[0], **change), *good.affine[1:]))


def gate(key_path: str, *targets: str) -> Callable[[FoldPlan], FoldPlan]:
    axes = {"w": (1,), "b": (0,), "g": (0,), "c": (0,)}
    edit = ScaleEdit(key_path, tuple((t, axes[t[0]]) for t in targets))
    return lambda good: replace(good, scales=(edit,))


BROKEN: dict[str, Callable[[FoldPlan], FoldPlan]] = {
    "one kernel, two biases": reader(1, kernel="w1"),
    "two kernels, one bias": reader(1, bias="b1"),
    "a bias that is the shift": reader(0, bias="c1"),
    "a bias that is the scale": reader(0, bias="g1"),
    "a shift that is the scale": merge(shift="g1"),
    "a kernel of another merge": reader(0, kernel="w4"),
    "no bias for the shift": reader(0, bias=None),
    "an axis summed over twice": reader(0, summed=(0, 0)),
    "no readers": merge(readers=()),
    "no targets": gate("gate"),
    "a target twice": gate("gate", "w3", "w3"),
    "a target that is the scale": gate("gate", "gate"),
    "a target that is taken up": gate("gate", "w3", "g1"),
    "a target that is a shift": gate("gate", "w3", "c2"),
    "a scale that is a bias": gate("b1", "w3", "b3"),
    "a scale that is centered": gate("b3", "w3"),
    "no leaf": merge(shift="nothing"),
    "not even a merge": lambda good: replace(good, affine=("g1",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_such_plan_can_be_made(name: str) -> None:
    with pytest.raises(PlanFormatError, match=r"^plan: its parts do not fit together \("):
        BROKEN[name](plan())


def test_targets_may_be_readers() -> None:
    """What takes up a scale may be scaled besides: first the one, then the other."""
    params, good = parameters(BLOCK), plan()
    got = gate("gate", "w1", "b1")(good).center(params)
    p = {name: np.asarray(x) for name, x in params.items()}
    want = p["g1"][:, None] * p["w1"] * p["gate"]
    np.testing.assert_allclose(got["w1"], want, rtol=1e-14)
    want = (p["b1"] + p["c1"] @ p["w1"]) * p["gate"]
    np.testing.assert_allclose(got["b1"], want, rtol=1e-14)


def test_copies_are_checked() -> None:
    good = plan()
    assert pickle.loads(pickle.dumps(good)) == good
    object.__setattr__(good, "affine", good.affine * 2)
    with pytest.raises(PlanFormatError, match="plan: its parts do not fit"):
        pickle.loads(pickle.dumps(good))


def test_a_walk_that_errs_edits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is refused by rules that know nothing of how merges are found."""
    find = jax_lnfold.placement.affine.find_affine

    def err(*args: Any) -> Any:
        found, left = find(*args)
        return {v: replace(m, readers=m.readers * 2) for v, m in found.items()}, left

    monkeypatch.setattr(jax_lnfold.placement.affine, "find_affine", err)
    params, x = parameters(BLOCK), jnp.ones((3, 4))
    before = snapshot(params)
    with pytest.raises(Bug, match=r"not different leaves.*please report it"):
        jax_lnfold.fold(block, params, x, fold_affine=True, donate=True)
    assert_identical(params, before)
