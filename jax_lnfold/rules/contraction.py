"""Contractions: matrix products of every kind, triangular systems and convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..axes.axis_set import AxisSet
from ..axes.broadcast import output_axes
from ..axes.labels import FREE, Entry, Labels, intersect
from .registry import AxisMap, Context, Opaque, Pull, Push, Rule, register


def _axes_of_output(ctx: Context, operand: int) -> dict[int, int]:
    ranks = [len(ctx.in_shape(i)) for i in (0, 1)]
    return output_axes(ctx.params["dimension_numbers"], ranks, operand)


def _axes_of_dot(ctx: Context, operand: int) -> AxisMap:
    """The free axes of the operand.

    ``(x g) W = (x W) g``. Reads `dimension_numbers`.

    >>> axes(jnp.matmul, (2, 3), (3, 4))
    {0: 0}
    >>> axes(jnp.matmul, (2, 3), (3, 4), operand=1)
    {1: 1}
    """
    return _axes_of_output(ctx, operand)


def _repeated_batches(ctx: Context, operand: int, entries: Sequence[Entry]) -> dict[int, int]:
    """Batch axis of an operand -> axis of the output, where the other operand does not vary.

    ``entries`` says along what, per batch axis. Such an axis is as good as a free one.
    """
    own, other = (ctx.params["dimension_numbers"][1][i] for i in (operand, 1 - operand))
    shape = ctx.in_shape(1 - operand)
    found = {}
    for o, (d, e) in enumerate(zip(own, other, strict=True)):
        along = (entries[o] if k == e else FREE for k in range(len(shape)))
        if ctx.uniform(1 - operand, AxisSet.of(shape, along)):
            found[d] = o
    return found


def _pull_dot(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """S on the free axes of one operand: center that one, weights rather than data.

    ``C_S (h W) = h (C_S' W)``. Where S spans free axes of both, the finer set on one of them is
    enough. Reads `dimension_numbers`.

    >>> pull(jnp.matmul, (5, 2), (2, 3), along=[1])
    operand 1 along axis 1
    >>> pull(jnp.matmul, (5, 2), (2, 3), along=[0, 1])
    operand 1 along axis 1, not exact
    >>> pull(jnp.matmul, (4, 5, 2), (4, 2, 3), along=[0])
    opaque: mixes the axes of the mean with each other
    >>> pull(jnp.matmul, (4, 5, 2), (4, 2, 3), along=[0], uniform=[0])
    operand 1 along axis 0
    """
    candidates: dict[tuple[bool, bool, int], AxisSet] = {}
    for operand in range(2):
        axes = _axes_of_output(ctx, operand) | _repeated_batches(ctx, operand, along.entries)
        entries: list[Entry] = [FREE] * len(ctx.in_shape(operand))
        for d, o in axes.items():
            entries[d] = along.entries[o]
        wanted = AxisSet.of(ctx.in_shape(operand), entries)
        if not wanted.trivial:  # along nothing, the operand would have to be zero
            # Uniform along a part of S only, the product may vary along the rest.
            exact = set(along.axes) <= set(axes.values())
            candidates[exact, ctx.data_free(operand), operand] = wanted
    if not candidates:
        return Opaque("mixes the axes of the mean with each other")
    exact, _, operand = best = max(candidates)
    return Pull(((operand, candidates[best]),), exact)


def _push_dot(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The shift of an operand stays uniform along its free axes, not along those summed over.

    ``h (W + u) = h W + h u``. Reads `dimension_numbers`.

    >>> push(jnp.matmul, (5, 2), (2, 3), operand=1, along=[1])
    output 0 along axis 1
    >>> push(jnp.matmul, (5, 2), (2, 3), operand=1, along=[0])
    output 0 along no axis
    """
    entries: list[Entry] = [FREE] * len(ctx.out_shape())
    batch = [along.entries[d] for d in ctx.params["dimension_numbers"][1][operand]]
    axes = _axes_of_output(ctx, operand) | _repeated_batches(ctx, operand, batch)
    for d, o in axes.items():
        entries[o] = along.entries[d]
    return ((0, AxisSet.of(ctx.out_shape(), entries)),)


def _uniform_dot(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Uniform along S if both operands are along what S is on their free and batch axes.

    ``h W = h' W'`` where rows ``h = h'`` and columns ``W = W'``. Reads `dimension_numbers`.

    >>> uniform_if(jnp.matmul, (5, 2), (2, 3), along=[1])
    operand 0 along no axis, operand 1 along axis 1
    >>> uniform_if(jnp.matmul, (4, 5, 2), (4, 2, 3), along=[0])
    operand 0 along axis 0, operand 1 along axis 0
    """
    needs = []
    for operand, batch in enumerate(ctx.params["dimension_numbers"][1]):
        entries: list[Entry] = [FREE] * len(ctx.in_shape(operand))
        axes = _axes_of_output(ctx, operand) | {d: o for o, d in enumerate(batch)}
        for d, o in axes.items():
            entries[d] = along.entries[o]
        needs.append((operand, AxisSet.of(ctx.in_shape(operand), entries)))
    return Pull(tuple(needs))


def _axes_of_ragged(ctx: Context, operand: int) -> dict[int, int]:
    """Free axis of an operand -> axis of the output, where all along it are treated alike."""
    numbers = ctx.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    bound = [{*contract[0], *batch[0]}, {*contract[1], *batch[1], *numbers.rhs_group_dimensions}]
    free = [[d for d in range(len(ctx.in_shape(i))) if d not in bound[i]] for i in (0, 1)]
    offset = (ragged in contract[0]) + len(batch[0]) + (len(free[0]) if operand else 0)
    axes = {d: offset + k for k, d in enumerate(free[operand])}
    if operand == 0 and ragged in axes:
        # Along it the kernels differ, and their numbers of rows may along the axes before it.
        same = len(ctx.in_shape(2)) == 1
        return {d: o for d, o in axes.items() if d > ragged or (same and d != ragged)}
    return axes


def _pull_ragged(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """S on free axes of one operand, as in a dot; a row that belongs to no group is zero.

    ``C_S (h_i W_e(i)) = h_i (C_S' W_e(i))`` for the kernel e(i) of row i. Which axes are free is
    the same in all three modes, where the ragged axis is a free one of the rows, summed over, or a
    batch axis. Reads `ragged_dot_dimension_numbers` and `group_offset`.

    >>> sizes = jnp.array([2, 3])
    >>> pull(lambda h, w: jax.lax.ragged_dot(h, w, sizes), (5, 4), (2, 4, 3), along=[1])
    operand 1 along axis 2
    >>> pull(lambda h, w: jax.lax.ragged_dot(h, w, sizes), (5, 4), (2, 4, 3), along=[0])
    opaque: mixes the axes of the mean with each other
    """
    if ctx.params["group_offset"] is not None:
        return Opaque("leaves out some of the groups")
    for operand in (1, 0):
        axes = _axes_of_ragged(ctx, operand)
        if along.axes and {*along.axes} <= {*axes.values()}:
            entries: list[Entry] = [FREE] * len(ctx.in_shape(operand))
            for d, o in axes.items():
                entries[d] = along.entries[o]
            return Pull(((operand, AxisSet.of(ctx.in_shape(operand), entries)),))
    return Opaque("mixes the axes of the mean with each other")


def _push_ragged(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The shift of an operand stays uniform along its free axes, as in a dot.

    ``h_i (W_e(i) + u_e(i)) = h_i W_e(i) + h_i u_e(i)``. Reads `ragged_dot_dimension_numbers` and
    `group_offset`.

    >>> sizes = jnp.array([2, 3])
    >>> dot = lambda h, w: jax.lax.ragged_dot(h, w, sizes)
    >>> push(dot, (5, 4), (2, 4, 3), operand=1, along=[2])
    output 0 along axis 1
    >>> push(dot, (5, 4), (2, 4, 3), operand=1, along=[0, 1])
    output 0 along no axis
    """
    if operand == 2 or ctx.params["group_offset"] is not None:
        return Opaque("groups rows by the shifted value")
    entries: list[Entry] = [FREE] * len(ctx.out_shape())
    for d, o in _axes_of_ragged(ctx, operand).items():
        entries[o] = along.entries[d]
    return ((0, AxisSet.of(ctx.out_shape(), entries)),)


def _right_sides(ctx: Context, along: AxisSet) -> AxisSet:
    """The set along right-hand sides alone: columns of B in ``A X = B``, rows in ``X A = B``."""
    side = len(along.shape) - (1 if ctx.params["left_side"] else 2)
    return along.free(d for d in along.axes if d != side)


def _pull_solve(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Every right-hand side is solved for by itself: B, for S along the right-hand sides.

    ``C_S A⁻¹ B = A⁻¹ C_S B``. Reads `left_side`.

    >>> def solve(a, b):
    ...     return jax.lax.linalg.triangular_solve(a, b, left_side=True)
    >>> pull(solve, (3, 3), (3, 5), along=[1])
    operand 1 along axis 1
    >>> pull(solve, (3, 3), (3, 5), along=[0])
    opaque: solves for the axes of the mean together
    """
    kept = _right_sides(ctx, along)
    if kept.trivial and not along.trivial:
        return Opaque("solves for the axes of the mean together")
    return Pull(((1, kept),), exact=kept == along)


def _push_solve(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The shift of B stays uniform along the right-hand sides.

    ``A⁻¹ (B + u) = A⁻¹ B + A⁻¹ u``. Reads `left_side`.

    >>> def solve(a, b):
    ...     return jax.lax.linalg.triangular_solve(a, b, left_side=True)
    >>> push(solve, (3, 3), (3, 5), operand=1, along=[0, 1])
    output 0 along axis 1
    >>> push(solve, (3, 3), (3, 5), along=[0, 1])
    opaque: divides by the shifted value
    """
    if operand == 0:
        return Opaque("divides by the shifted value")
    return ((0, _right_sides(ctx, along)),)


def _kernel_features(ctx: Context, entry: Entry, size: int) -> Entry:
    """The entry, split where the convolution's feature groups end.

    Groups read different inputs, so a mean across them is not one of the kernel's columns.
    """
    groups = ctx.params["feature_group_count"]
    if groups == 1:
        return entry
    block = Labels(i // (size // groups) for i in range(size))
    return FREE if groups == size else intersect(entry, block, size)


def _conv_features(ctx: Context) -> tuple[int, int, int]:
    """Output-feature axis of the kernel and of the output, and their size."""
    numbers = ctx.params["dimension_numbers"]
    kernel, result = numbers.rhs_spec[0], numbers.out_spec[1]
    return kernel, result, ctx.in_shape(1)[kernel]


def _pull_conv(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """S on the output features: center the kernel's, group by group.

    ``C_S conv(x, K) = conv(x, C_S' K)``. Reads `dimension_numbers`, `feature_group_count` and
    `batch_group_count`.

    >>> def conv(x, k, groups=1):
    ...     return jax.lax.conv_general_dilated(x, k, (1,), "SAME", feature_group_count=groups)
    >>> pull(conv, (2, 4, 9), (6, 4, 3), along=[1])
    operand 1 along axis 0
    >>> pull(lambda x, k: conv(x, k, 2), (2, 4, 9), (6, 2, 3), along=[1])
    operand 1 along axis 0 in groups (0, 0, 0, 1, 1, 1), not exact
    >>> pull(conv, (2, 4, 9), (6, 4, 3), along=[2])
    opaque: is a convolution that gives every position along the mean its own input
    """
    kernel, result, size = _conv_features(ctx)
    if ctx.params["batch_group_count"] != 1:  # output features read different parts of the batch
        return Opaque("is a convolution with batch groups")
    entry = _kernel_features(ctx, along.entries[result], size)
    if entry == FREE:
        return Opaque("is a convolution that gives every position along the mean its own input")
    exact = along.axes == (result,) and entry == along.entries[result]
    return Pull(((1, _only(ctx.in_shape(1), kernel, entry)),), exact)


def _push_conv(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """A shift of the kernel along its output features becomes one along those of the result.

    ``conv(x, K + u) = conv(x, K) + conv(x, u)``. Reads `dimension_numbers`, `feature_group_count`
    and `batch_group_count`.

    >>> conv = lambda x, k: jax.lax.conv(x, k, (1,), "SAME")
    >>> push(conv, (2, 4, 9), (6, 4, 3), operand=1, along=[0])
    output 0 along axis 1
    >>> push(conv, (2, 4, 9), (6, 4, 3), along=[1])
    opaque: is a convolution that reads the shifted value
    """
    if operand == 0:  # summed over features and windows, of which those at the border are cut off
        return Opaque("is a convolution that reads the shifted value")
    kernel, result, size = _conv_features(ctx)
    if ctx.params["batch_group_count"] != 1:
        return Opaque("is a convolution with batch groups")
    entry = _kernel_features(ctx, along.entries[kernel], size)
    return ((0, _only(ctx.out_shape(), result, entry)),)


def _uniform_conv(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Uniform along samples and output features if the kernel and the data of all groups are.

    ``conv(x, K) = conv(x', K')`` where samples ``x = x'`` and output features ``K = K'``. Reads
    `dimension_numbers`, `feature_group_count` and `batch_group_count`.

    >>> conv = lambda x, k: jax.lax.conv(x, k, (1,), "SAME")
    >>> uniform_if(conv, (2, 4, 9), (6, 4, 3), along=[0, 1])
    operand 0 along axis 0, operand 1 along axis 0
    >>> uniform_if(conv, (2, 4, 9), (6, 4, 3), along=[2])
    opaque: is a convolution along these axes
    """
    numbers, grouped = ctx.params["dimension_numbers"], ctx.params["feature_group_count"] != 1
    kernel, result, _ = _conv_features(ctx)
    samples, entry = along.entries[numbers.out_spec[0]], along.entries[result]
    if ctx.params["batch_group_count"] != 1 or (grouped and isinstance(entry, Labels)):
        return Opaque("is a convolution in groups")
    if not {*along.axes} <= {numbers.out_spec[0], result}:
        return Opaque("is a convolution along these axes")
    entries: list[Entry] = [FREE] * len(ctx.in_shape(0))
    entries[numbers.lhs_spec[0]], entries[numbers.lhs_spec[1]] = samples, entry if grouped else FREE
    data = AxisSet.of(ctx.in_shape(0), entries)
    return Pull(((0, data), (1, _only(ctx.in_shape(1), kernel, entry))))


def _axes_of_conv(ctx: Context, operand: int) -> AxisMap:
    """The output features of the kernel.

    ``conv(x, k g) = conv(x, k) g``. Reads `dimension_numbers` and `batch_group_count`.

    >>> axes(lambda x, k: jax.lax.conv(x, k, (1,), "SAME"), (2, 4, 9), (6, 4, 3), operand=1)
    {0: 1}
    >>> axes(lambda x, k: jax.lax.conv(x, k, (1,), "SAME"), (2, 4, 9), (6, 4, 3))
    {}
    """
    if operand != 1 or ctx.params["batch_group_count"] != 1:
        return {}
    kernel, result, _ = _conv_features(ctx)
    return {kernel: result}


def _only(shape: Iterable[Any], axis: int, entry: Entry) -> AxisSet:
    shape = tuple(shape)
    return AxisSet.of(shape, (entry if d == axis else FREE for d in range(len(shape))))


register("dot_general", Rule(_pull_dot, _push_dot, _uniform_dot, _axes_of_dot))
register("triangular_solve", Rule(_pull_solve, _push_solve))
register("ragged_dot_general", Rule(_pull_ragged, _push_ragged))
register("conv_general_dilated", Rule(_pull_conv, _push_conv, _uniform_conv, _axes_of_conv))
