"""Axis sets against partitions of small arrays, position by position."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import ALL, FREE, Labels, canonical, intersect, labels_of
from jax_lnfold.centering import group_means
from jax_lnfold.plan.leaf import center_array
from jax_lnfold.rules.partitions import (
    axis_labels,
    centered,
    group_ids,
    group_mean,
    numbered,
    random_entry,
    random_set,
    same_partition,
    uniformed,
)

SEEDS = range(6)
ROUNDS = 60


def random_shape(rng: np.random.Generator, low: int = 0, high: int = 3) -> tuple[int, ...]:
    return tuple(rng.integers(1, 7, rng.integers(low, high + 1)).tolist())


def random_slices(rng: np.random.Generator, shape: tuple[int, ...]) -> list[slice]:
    """Non-empty stretches with a step; whole axes are written ``slice(0, n, 1)``."""
    slices = []
    for n in shape:
        start = int(rng.integers(0, n))
        cut = slice(start, int(rng.integers(start + 1, n + 1)), int(rng.integers(1, 4)))
        slices.append(slice(0, n, 1) if rng.random() < 0.4 else cut)
    return slices


def near_pair(rng: np.random.Generator) -> tuple[AxisSet, AxisSet]:
    """Two sets of one shape that agree on some axes, so that they are often nested."""
    shape = random_shape(rng, 1)
    a, b = random_set(rng, shape, 0.4), random_set(rng, shape, 0.4)
    mixed = (x if rng.random() < 0.5 else y for x, y in zip(a.entries, b.entries, strict=True))
    return a, AxisSet.of(shape, mixed)


def projector(along: AxisSet) -> np.ndarray:
    """The matrix that subtracts group means from a flattened array."""
    size = prod(along.shape)
    basis = np.eye(size).reshape(size, *along.shape)
    return np.array([centered(e, along).reshape(-1) for e in basis]).T


def union_of_groups(fine: AxisSet, coarse: AxisSet) -> bool:
    """Whether every group of `coarse` is made of whole groups of `fine`."""
    f, c = group_ids(fine), group_ids(coarse)
    inside = c >= 0
    if np.any(f[inside] < 0):
        return False
    return all(len(np.unique(c[f == label])) == 1 for label in np.unique(f[inside]))


def product_on(ids: np.ndarray) -> AxisSet | None:
    """The axis set with these groups, found by comparing positions along each axis in turn."""
    entries = []
    for d, n in enumerate(ids.shape):
        rows = np.moveaxis(ids, d, 0).reshape(n, -1)
        labels = np.full(n, -1)
        for i in range(n):
            for j in range(i + 1):
                if np.any((rows[i] == rows[j]) & (rows[i] >= 0)):
                    labels[i] = labels[j] if labels[j] >= 0 else i
                    break
        entries.append(canonical(labels))
    found = AxisSet.of(ids.shape, entries)
    return found if same_partition(group_ids(found), ids) else None


@pytest.mark.parametrize("seed", SEEDS)
def test_canonical_keeps_the_partition_and_forgets_the_names(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        size = int(rng.integers(1, 9))
        labels = rng.integers(-1, 4, size)
        entry = canonical(labels)
        assert same_partition(axis_labels(entry, size), labels)
        names = rng.permutation(100)[:4]
        assert canonical(np.where(labels >= 0, names[labels], -1)) == entry
        assert canonical(labels_of(entry, size)) == entry
        inside, count = numbered(labels)
        whole = bool((labels >= 0).all())
        assert (entry == FREE) == (whole and count == size)
        assert (entry == ALL) == (whole and count == 1 and size > 1)
        if isinstance(entry, tuple):
            assert entry == tuple(inside.tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_sets_say_what_they_average_over(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        along = random_set(rng, random_shape(rng))
        ids = group_ids(along)
        inside, count = numbered(ids)
        assert along.empty == (not np.any(inside >= 0))
        assert along.trivial == (count == prod(along.shape))
        for d, n in enumerate(along.shape):
            assert np.array_equal(along.labels(d), axis_labels(along.entries[d], n))
            assert (d in along.axes) == (along.entries[d] != FREE)
            if not along.empty:
                first = np.take(ids, [0], axis=d)
                assert along.uniform_along(d) == (np.all(ids == first) and np.all(first >= -1))


def test_over_and_of_have_one_spelling_on_axes_of_size_one() -> None:
    assert AxisSet.over((2, 1, 3), (1, 2)) == AxisSet((2, 1, 3), (FREE, FREE, ALL))
    assert AxisSet.of((2, 1, 3), (FREE, ALL, ALL)) == AxisSet.over((2, 1, 3), (2,))
    assert AxisSet.over((), ()).trivial
    assert AxisSet.of([2, 3], [ALL, FREE]).axes == (0,)


@pytest.mark.parametrize("seed", SEEDS)
def test_reshape_finds_the_same_groups_or_none_exist(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = missing = 0
    for _ in range(3 * ROUNDS):
        factors = rng.choice([1, 2, 2, 3, 3, 4], rng.integers(1, 5)).tolist()
        cuts = [sorted(rng.integers(0, len(factors) + 1, rng.integers(0, 3))) for _ in range(2)]
        old, new = (
            tuple(prod(factors[a:b]) for a, b in zip([0, *c], [*c, len(factors)], strict=True))
            for c in cuts
        )
        along = random_set(rng, old)
        if along.empty:
            assert along.reshape(new) in (None, along)
            continue
        after, truth = along.reshape(new), product_on(group_ids(along).reshape(new))
        assert after == truth
        found, missing = found + (after is not None), missing + (after is None)
    assert found > ROUNDS
    assert missing > 0


def test_reshape_of_heads_and_back() -> None:
    heads = AxisSet.over((2, 3, 4), (2,))
    fused = heads.reshape((2, 12))
    assert fused == AxisSet((2, 12), (FREE, Labels(i // 4 for i in range(12))))
    assert fused.reshape((2, 3, 4)) == heads
    assert fused.reshape((2, 4, 3)) is None
    assert fused.reshape((2, 3, 2, 2)) == AxisSet.over((2, 3, 2, 2), (2, 3))
    assert AxisSet.over((2, 12), (1,)).reshape((2, 3, 1, 4)) == AxisSet.over((2, 3, 1, 4), (1, 3))


@pytest.mark.parametrize("seed", SEEDS)
def test_select_and_embed_move_groups_with_their_positions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        shape = random_shape(rng)
        positions = random_slices(rng, shape)
        index = tuple(positions)
        along = random_set(rng, shape)
        seen = along.select(positions)
        assert seen == AxisSet.of(
            seen.shape, (canonical(seen.labels(d)) for d in range(len(shape)))
        )
        assert same_partition(group_ids(seen), group_ids(along)[index])
        inner = random_set(rng, seen.shape)
        outer = inner.embed(shape, positions)
        assert outer is not None
        ids = np.full(shape, -1)
        ids[index] = group_ids(inner)
        assert same_partition(group_ids(outer), ids)
        assert outer.select(positions) == inner


@pytest.mark.parametrize("seed", SEEDS)
def test_refines_and_disjoint_agree_with_the_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nested = apart = 0
    for _ in range(4 * ROUNDS):
        a, b = near_pair(rng)
        shared = np.any((group_ids(a) >= 0) & (group_ids(b) >= 0))
        if a.empty or b.empty:
            assert not a.refines(b) or union_of_groups(a, b)
            assert not a.disjoint(b) or not shared
            continue
        assert a.refines(b) == union_of_groups(a, b)
        assert a.disjoint(b) == b.disjoint(a) == (not shared)
        nested, apart = nested + a.refines(b), apart + a.disjoint(b)
    assert nested > 10
    assert apart > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_compatible_centerings_do_not_undo_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compatible = 0
    for _ in range(ROUNDS):
        a, b = near_pair(rng)
        if prod(a.shape) > 60 or not a.compatible(b):
            continue
        compatible += 1
        first, second = projector(a), projector(b)
        np.testing.assert_allclose(second @ first @ second, first @ second, atol=1e-12)
        np.testing.assert_allclose(first @ second @ first, second @ first, atol=1e-12)
    assert compatible > 10


def test_compatible_on_known_pairs() -> None:
    rows, columns = AxisSet.over((4, 6), (1,)), AxisSet.over((4, 6), (0,))
    pairs = AxisSet((4, 6), (FREE, Labels((0, 0, 1, 1, 2, 2))))
    crossed = AxisSet((4, 6), (FREE, Labels((0, 0, 0, 1, 1, 1))))
    left = AxisSet((4, 6), (FREE, Labels((0, 0, 0, -1, -1, -1))))
    right = AxisSet((4, 6), (FREE, Labels((-1, -1, -1, 0, 0, 0))))
    assert rows.compatible(columns)
    assert rows.compatible(pairs)
    assert left.compatible(right)
    assert not pairs.compatible(AxisSet((4, 6), (FREE, Labels((0, 1, 1, 1, 0, 0)))))
    assert not rows.compatible(left)
    assert not left.compatible(columns)
    assert not pairs.compatible(left)
    assert crossed.compatible(rows)
    assert pairs.compatible(columns)


@pytest.mark.parametrize("seed", SEEDS)
def test_intersect_joins_only_what_both_join(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        size = int(rng.integers(1, 9))
        a, b = random_entry(rng, size, 0.3), random_entry(rng, size, 0.3)
        if size == 1:
            a, b = (FREE if e == ALL else e for e in (a, b))
        found = intersect(a, b, size)
        x, y = axis_labels(a, size), axis_labels(b, size)
        free = FREE in (a, b)
        inside = np.ones(size, bool) if free else (x >= 0) & (y >= 0)
        labels = axis_labels(found, size)
        assert np.array_equal(labels >= 0, inside)
        for i in np.flatnonzero(inside):
            for j in np.flatnonzero(inside):
                both = x[i] == x[j] and y[i] == y[j]
                assert (labels[i] == labels[j]) == (i == j if free else both)
        assert found == intersect(b, a, size)


@pytest.mark.parametrize("seed", SEEDS)
def test_widened_and_free_are_finer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    widened = 0
    for _ in range(2 * ROUNDS):
        along = random_set(rng, random_shape(rng, 1), 0.4)
        axes = [d for d in range(len(along.shape)) if rng.random() < 0.5]
        freed = along.free(axes)
        assert freed.entries == tuple(FREE if d in axes else e for d, e in enumerate(along.entries))
        if along.empty:
            continue
        assert union_of_groups(freed, along)
        for wide in (along.widened(axes), along.widened()):
            ids, inside = group_ids(wide), group_ids(along)
            assert union_of_groups(wide, along)
            assert same_partition(np.where(inside >= 0, ids, -1), inside)
            widened += wide != along
        for d, (entry, wide) in enumerate(
            zip(along.entries, along.widened(axes).entries, strict=True)
        ):
            assert wide == (along.widened().entries[d] if d in axes else entry)
        for d, entry in enumerate(along.widened().entries):
            labels = axis_labels(entry, along.shape[d])
            inside = labels[labels >= 0]
            assert entry == FREE or len(np.unique(inside)) < len(inside)
    assert widened > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_center_array_is_the_projection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(ROUNDS // 6):
        along = random_set(rng, random_shape(rng), 0.4)
        x = rng.normal(3, 1, along.shape)
        np.testing.assert_allclose(center_array(x, along), centered(x, along), atol=1e-13)
        np.testing.assert_allclose(
            center_array(uniformed(x, along), along),
            np.where(group_ids(along) < 0, uniformed(x, along), 0),
            atol=1e-13,
        )
        means = np.broadcast_to(group_means(x, along, np), along.shape)
        np.testing.assert_allclose(means, group_mean(x, along), atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize(
    "labels", ["012345", "000000", "000111", "012012", "-00110", "0-1-01", "------"]
)
def test_center_array_on_jax_arrays(labels: str, dtype: Any) -> None:
    entry = canonical(np.array([-1 if c == "-" else int(c) for c in labels]))
    along = AxisSet((4, 6), (FREE, entry))
    x = np.random.default_rng(0).normal(3, 1, (4, 6)).astype(dtype)
    result = center_array(jnp.asarray(x), along)
    assert isinstance(result, jax.Array)
    assert result.dtype == dtype
    expected = centered(x.astype(np.float64), along)
    np.testing.assert_allclose(result, expected, atol=8 * np.finfo(dtype).eps)
    assert center_array(x, along).dtype == dtype


def test_sets_with_symbolic_sizes() -> None:
    b, t = jax.export.symbolic_shape("b, t")
    along = AxisSet.over((b, t, 12), (2,))
    assert along.reshape((b * t, 12)) in (None, AxisSet.over((b * t, 12), (1,)))
    assert along.reshape((b, t, 3, 4)) == AxisSet.over((b, t, 3, 4), (2, 3))
    assert AxisSet.over((b, t, 12), (1,)).reshape((b * t, 12)) is None
    assert along.refines(along)
    assert not along.refines(AxisSet.over((b, t, 12), (1,)))
    whole = [slice(0, b, 1), slice(0, t, 1)]
    part = AxisSet.over((b, t, 4), (2,)).embed((b, t, 12), [*whole, slice(4, 8, 1)])
    assert part == AxisSet((b, t, 12), (FREE, FREE, Labels((-1,) * 4 + (0,) * 4 + (-1,) * 4)))
    heads = AxisSet.over((b, t, 3, 4), (2, 3))
    assert AxisSet.over((b, 1, t, 12), (3,)).reshape((b, t, 3, 4)) == heads
    assert along.reshape((b, 1, t, 3, 4)) == AxisSet.over((b, 1, t, 3, 4), (3, 4))
    first = [slice(0, b, 1), slice(0, 1, 1), slice(0, 12, 1)]
    assert AxisSet.over((b, 1, 12), (2,)).embed((b, t, 12), first) is None


def test_reshape_of_nothing() -> None:
    nowhere = AxisSet((2, 6), (FREE, Labels((-1,) * 6)))
    assert nowhere.reshape((2, 6)) == nowhere
    assert nowhere.reshape((12,)) is None
    assert AxisSet.over((0, 3), (1,)).reshape((0, 3)) == AxisSet.over((0, 3), (1,))
    assert AxisSet.over((0, 3), (1,)).reshape((0, 4)) is None


def test_sets_in_words() -> None:
    pairs = Labels((0, 0, 1, 1, -1))
    assert str(AxisSet.over((2, 5), (1,))) == "axis 1"
    assert str(AxisSet((2, 5), (ALL, pairs))) == "axis 0 and axis 1 in 2 groups"
    assert str(AxisSet.over((2, 5), ())) == "every element"


def test_stretches_of_symbolic_axes() -> None:
    b, t = jax.export.symbolic_shape("b, t")
    along, whole = AxisSet.over((b, 12), (1,)), slice(0, 12, 1)
    assert along.select([slice(1, b, 1), whole]) == AxisSet.over((b - 1, 12), (1,))
    assert along.select([slice(0, 4, 1), whole]) == AxisSet.over((4, 12), (1,))
    assert intersect(ALL, ALL, t) == ALL
    assert AxisSet.over((b, t, 12), (2,)).reshape((b * t, 12)) == AxisSet.over((b * t, 12), (1,))
    assert AxisSet.over((b, t), (0, 1)).reshape((b * t,)) == AxisSet.over((b * t,), (0,))
    assert AxisSet.over((b, t), ()).reshape((t, b)) == AxisSet.over((t, b), ())
    assert AxisSet.over((1 << 12, 1 << 11), (1,)).reshape((1 << 23,)) is None
    assert AxisSet.over((2, b), (0,)).reshape((b, 2)) is None
    assert AxisSet.over((b, 2), (0,)).reshape((2, b)) is None
    assert not AxisSet.over((b, t), (0,)).refines(AxisSet.over((b, t), (1,)))
    assert not AxisSet.over((b, t), (0, 1)).refines(AxisSet.over((b, t), (0,)))


@pytest.mark.parametrize(("start", "step"), [(0, 2), (1, 3)])
def test_strides_on_symbolic_axes(start: int, step: int) -> None:
    (b,) = jax.export.symbolic_shape("b")
    taken = jax.eval_shape(
        lambda x: jax.lax.slice(x, (start, 0), x.shape, (step, 1)),
        jax.ShapeDtypeStruct((b, 12), float),
    )
    seen = AxisSet.over((b, 12), (1,)).select([slice(start, b, step), slice(0, 12, 1)])
    assert seen == AxisSet.over(taken.shape, (1,))
