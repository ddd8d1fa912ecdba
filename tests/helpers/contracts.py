"""The three promises of a fold, as checks that every test shares.

1. ``folded.apply(folded.params, x) == apply_fn(params, x)``;
2. ``apply_fn(folded.params, x) == apply_fn(params, x)``, and ``folded.params`` is a drop-in;
3. the caller's ``params`` are, bit for bit, what they were before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

import jax_lnfold

ApplyFn = Callable[..., Any]
PyTree = Any


def _host(leaf: Any) -> np.ndarray:
    """A copy of a leaf on the host; typed PRNG keys as the integers they hold."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf, copy=True)


def snapshot(tree: PyTree) -> PyTree:
    """A host copy of every leaf, to be compared with `assert_identical` later."""
    return jax.tree.map(_host, tree)


def assert_drop_in(tree: PyTree, reference: PyTree) -> None:
    """Same tree structure, and the same shape and dtype at every leaf."""
    assert jax.tree.structure(tree) == jax.tree.structure(reference)
    for (path, leaf), other in zip(
        jax.tree_util.tree_flatten_with_path(tree)[0], jax.tree.leaves(reference), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert jnp.shape(leaf) == jnp.shape(other), f"{name} changed its shape"
        assert jnp.result_type(leaf) == jnp.result_type(other), f"{name} changed its dtype"


def assert_identical(tree: PyTree, before: PyTree) -> None:
    """Every leaf of `tree` has the bits of the snapshot `before`."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (path, leaf), old in zip(flat, jax.tree.leaves(before), strict=True):
        new = _host(leaf)
        same = new.dtype == old.dtype and new.shape == old.shape and new.tobytes() == old.tobytes()
        assert same, f"{jax.tree_util.keystr(path)} is not what it was"


def relative_difference(got: PyTree, want: PyTree) -> float:
    """Largest ``max|got - want| / max|want|`` over the leaves; NaN matches NaN."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = _host(a), _host(b)
        assert a.shape == b.shape, f"shape {a.shape} instead of {b.shape}"
        wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        odd = ~(np.isfinite(a) & np.isfinite(b))
        if not np.array_equal(a[odd], b[odd], equal_nan=True):
            return float("inf")
        if not (~odd).any():
            continue
        scale = np.abs(b[~odd]).max()
        gap = np.abs(a[~odd] - b[~odd]).max()
        worst = max(worst, float(gap / scale) if scale > 0 else float(gap))
    return worst


def check_contracts(
    apply_fn: ApplyFn,
    params: PyTree,
    folded: jax_lnfold.Folded,
    *inputs: Any,
    rtol: float = 1e-12,
    before: PyTree | None = None,
) -> None:
    """Assert the three contracts of `folded` on `inputs`.

    `before` is a `snapshot` of `params` from before the fold (see `fold_checked`); without it,
    contract 3 only covers the calls made here.
    """
    before = snapshot(params) if before is None else before
    assert_drop_in(folded.params, params)
    original, run = jax.jit(apply_fn), jax.jit(folded.apply)  # op by op takes longer to compile
    want = original(params, *inputs)
    for name, got in (
        ("folded.apply(folded.params)", run(folded.params, *inputs)),
        ("apply_fn(folded.params)", original(folded.params, *inputs)),
    ):
        assert_drop_in(got, want)
        difference = relative_difference(got, want)
        assert difference <= rtol, f"{name} differs from apply_fn(params) by {difference:.3g}"
    assert_identical(params, before)


def fold_checked(
    apply_fn: ApplyFn, params: PyTree, *inputs: Any, rtol: float = 1e-12, **options: Any
) -> jax_lnfold.Folded:
    """`jax_lnfold.fold`, with all three contracts checked on the example inputs."""
    before = snapshot(params)
    folded = jax_lnfold.fold(apply_fn, params, *inputs, **options)
    check_contracts(apply_fn, params, folded, *inputs, rtol=rtol, before=before)
    return folded


def unbroken(shown: Any) -> str:
    """What is printed, without the ends of lines, which are where a terminal ends."""
    return " ".join(str(shown).split())


def counts(report: jax_lnfold.Report) -> tuple[int, int, int]:
    """How many LayerNorms there are, how many of them fold, and explicit centerings."""
    return len(report.norms), report.n_folded, report.n_inserted


def _as_jaxpr(value: Any) -> jax.extend.core.Jaxpr | None:
    inner = getattr(value, "jaxpr", value)
    return inner if isinstance(inner, jax.extend.core.Jaxpr) else None


def iter_equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and, once per call site, of the jaxprs that its equations hold."""
    inner = _as_jaxpr(jaxpr)
    assert inner is not None
    for eqn in inner.eqns:
        yield eqn
        for param in eqn.params.values():
            for value in param if isinstance(param, tuple | list) else (param,):
                if _as_jaxpr(value) is not None:
                    yield from iter_equations(value)


def count_equations(name: str, fn: ApplyFn, *args: Any) -> int:
    """How many equations of the primitive `name` the jaxpr of ``fn(*args)`` holds."""
    equations = iter_equations(jax.make_jaxpr(fn)(*args))
    return sum(eqn.primitive.name == name for eqn in equations)


def removed_sums(apply_fn: ApplyFn, params: PyTree, folded: jax_lnfold.Folded, *inputs: Any) -> int:
    """How many ``reduce_sum`` equations fewer the folded program has."""
    original = count_equations("reduce_sum", apply_fn, params, *inputs)
    return original - count_equations("reduce_sum", folded.apply, folded.params, *inputs)


def count_reductions(fn: ApplyFn, *args: Any, sizes: int | tuple[int, ...]) -> int:
    """How many ``reduce_sum`` equations of `fn(*args)` sum over axes of exactly these sizes.

    ``sizes=12`` counts the sums over one axis of size 12; ``sizes=(3, 4)`` those over two axes of
    sizes 3 and 4, in any order.
    """
    wanted = sorted((sizes,) if isinstance(sizes, int) else sizes)
    count = 0
    for eqn in iter_equations(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name == "reduce_sum":
            shape = eqn.invars[0].aval.shape
            count += sorted(shape[axis] for axis in eqn.params["axes"]) == wanted
    return count
