"""What mixes positions along axes other than those of the mean: sums, pooling, Fourier, maxima."""

from __future__ import annotations

from collections.abc import Sequence

from ..axes.axis_set import AxisSet
from ..axes.labels import FREE
from ..program.primitives import POOLS
from .registry import AxisMap, Context, Opaque, Pull, Push, Rule, register


def _pull_sum(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Sums over other axes keep a zero mean.

    ``C_S sum(x) = sum(C_S' x)``. About uniformity, the answer is that of every reduction: it
    makes the same of the same slices. Reads `axes`.

    >>> pull(lambda x: x.sum(0), (2, 3), along=[0])
    operand 0 along axis 1
    >>> uniform_if(lambda x: x.max(0), (2, 3), along=[0])
    operand 0 along axis 1
    """
    axes = set(ctx.params["axes"])
    rest = iter(along.entries)
    entries = [FREE if d in axes else next(rest) for d in range(len(ctx.in_shape(0)))]
    return Pull(((0, AxisSet.of(ctx.in_shape(0), entries)),))


def _push_sum(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The sum of a shift is uniform along the axes that are left.

    ``sum(x + u) = sum(x) + sum(u)``. Reads `axes`.

    >>> push(lambda x: x.sum(0), (2, 3), along=[0, 1])
    output 0 along axis 0
    >>> push(lambda x: x.sum(0), (2, 3), along=[0])
    output 0 along no axis
    """
    axes = set(ctx.params["axes"])
    entries = (e for d, e in enumerate(along.entries) if d not in axes)
    return ((0, AxisSet.of(ctx.out_shape(), entries)),)


def _axes_of_sum(ctx: Context, operand: int) -> AxisMap:
    """The axes that are not summed over.

    ``sum(x g) = sum(x) g``. Reads `axes`.

    >>> axes(lambda x: x.sum(1), (2, 3, 4))
    {0: 0, 2: 1}
    """
    kept = (d for d in range(len(ctx.in_shape(0))) if d not in ctx.params["axes"])
    return {d: o for o, d in enumerate(kept)}


def _pull_cumsum(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Partial sums along another axis keep a zero mean.

    ``C_S cumsum(x) = cumsum(C_S x)``. About uniformity, the answer is that of every running
    reduction. Reads `axis`.

    >>> pull(lambda x: jnp.cumsum(x, 0), (2, 3), along=[1])
    operand 0 along axis 1
    >>> pull(lambda x: jnp.cumsum(x, 0), (2, 3), along=[0])
    opaque: sums along the mean
    >>> uniform_if(lambda x: jax.lax.cummax(x, 0), (2, 3), along=[1])
    operand 0 along axis 1
    """
    return _keep(along, [ctx.params["axis"]])


def _push_cumsum(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Partial sums of a shift grow along their axis, and stay uniform along the others.

    ``cumsum(x + u) = cumsum(x) + cumsum(u)``. Reads `axis`.

    >>> push(lambda x: jnp.cumsum(x, 0), (2, 3), along=[0, 1])
    output 0 along axis 1
    """
    return ((0, along.free([ctx.params["axis"]])),)


def _windowed(ctx: Context) -> list[int]:
    """Axes along which a window mixes positions or leaves some out."""
    p = ctx.params
    per_axis = zip(
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        p["base_dilation"],
        p["window_dilation"],
        strict=True,
    )
    # Any other window, stride, padding or dilation sums some positions and not others.
    return [d for d, given in enumerate(per_axis) if given != (1, 1, (0, 0), 1, 1)]


def _pull_window(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Sums over windows along other axes keep a zero mean.

    ``C_S window_sum(x) = window_sum(C_S x)``. About uniformity, the answer is that of any
    pooling. Reads `window_dimensions`, `window_strides`, `padding`, `base_dilation` and
    `window_dilation`.

    >>> def pool(x):
    ...     return jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 1), (2, 1), "VALID")
    >>> pull(pool, (6, 4), along=[1])
    operand 0 along axis 1
    >>> pull(pool, (6, 4), along=[0])
    opaque: sums windows along the mean
    """
    kept = along.free(_windowed(ctx))
    if kept.trivial and not along.trivial:  # windows overlap, or leave positions out
        return Opaque("sums windows along the mean")
    return Pull(((0, AxisSet.of(ctx.in_shape(0), kept.entries)),), exact=kept == along)


def _push_window(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Windows at the border are padded: the shift stays uniform along the other axes only.

    ``window_sum(x + u) = window_sum(x) + window_sum(u)``. Reads `window_dimensions`,
    `window_strides`, `padding`, `base_dilation` and `window_dilation`.

    >>> def pool(x):
    ...     return jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 1), (2, 1), "SAME")
    >>> push(pool, (5, 4), along=[0, 1])
    output 0 along axis 1
    """
    return ((0, AxisSet.of(ctx.out_shape(), along.free(_windowed(ctx)).entries)),)


def _transformed(ctx: Context) -> range:
    """The axes of a Fourier transform: the last ones."""
    rank = len(ctx.in_shape(0))
    return range(rank - len(ctx.params["fft_lengths"]), rank)


def _pull_fft(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """A transform of other axes is linear, so it keeps a zero mean; real ones are, too.

    ``C_S F(x) = F(C_S x)``. Reads `fft_lengths`.

    >>> pull(lambda x: jnp.fft.rfft(x, axis=1), (2, 6), along=[0])
    operand 0 along axis 0
    >>> pull(lambda x: jnp.fft.rfft(x, axis=1), (2, 6), along=[1])
    opaque: transforms along the mean
    """
    kept = along.free(_transformed(ctx))
    if kept.trivial and not along.trivial:
        return Opaque("transforms along the mean")
    return Pull(((0, AxisSet.of(ctx.in_shape(0), kept.entries)),), exact=kept == along)


def _push_fft(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The transform of a shift is uniform where the shift is, along other axes.

    ``F(x + u) = F(x) + F(u)``. Reads `fft_lengths`.

    >>> push(lambda x: jnp.fft.rfft(x, axis=1), (2, 6), along=[0, 1])
    output 0 along axis 0
    """
    kept = along.free(_transformed(ctx))
    return ((0, AxisSet.of(ctx.out_shape(), kept.entries)),)


def _keep(along: AxisSet, mixed: Sequence[int]) -> Pull | Opaque:
    """The finer set that leaves out the axes along which positions are mixed."""
    kept = along.free(mixed)
    if kept.trivial and not along.trivial:
        return Opaque("sums along the mean")
    return Pull(((0, kept),), exact=kept == along)


register("reduce_sum", Rule(_pull_sum, _push_sum, axes=_axes_of_sum))
# Opaque to means and shifts, except where a `Tracker` says so, but the same numbers are reduced to
# the same: the maximum in a softmax is uniform wherever its scores are.
register(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_xor",
    Rule(uniform=_pull_sum),
)
register("fft", Rule(_pull_fft, _push_fft))
# Nonlinear, but the same for what does not vary along other axes than those of the window.
register(POOLS, Rule(uniform=_pull_window))
register("cumlogsumexp cummax cummin cumprod", Rule(uniform=_pull_cumsum))
register("cumsum", Rule(_pull_cumsum, _push_cumsum))
register("reduce_window_sum", Rule(_pull_window, _push_window))
