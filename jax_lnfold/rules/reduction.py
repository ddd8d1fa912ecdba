"""What mixes positions along axes other than those of the mean: sums, pooling, Fourier, maxima."""

from __future__ import annotations

from collections.abc import Sequence

from ..axes import FREE, AxisSet
from ..primitives import POOLS
from .registry import Context, Opaque, Pull, Push, Rule, register


def _pull_sum(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """A sum over other axes keeps a zero mean."""
    axes = set(ctx.params["axes"])
    rest = iter(along.entries)
    entries = [FREE if d in axes else next(rest) for d in range(len(ctx.in_shape(0)))]
    return Pull(((0, AxisSet.of(ctx.in_shape(0), entries)),))


def _push_sum(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    axes = set(ctx.params["axes"])
    entries = (e for d, e in enumerate(along.entries) if d not in axes)
    return ((0, AxisSet.of(ctx.out_shape(), entries)),)


def _pull_cumsum(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    return _keep(along, [ctx.params["axis"]])


def _push_cumsum(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
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
    return [d for d, given in enumerate(per_axis) if given != (1, 1, (0, 0), 1, 1)]


def _pull_window(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    kept = along.free(_windowed(ctx))
    if kept.trivial and not along.trivial:
        return Opaque("sums windows along the mean")
    return Pull(((0, AxisSet.of(ctx.in_shape(0), kept.entries)),), exact=kept == along)


def _push_window(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    return ((0, AxisSet.of(ctx.out_shape(), along.free(_windowed(ctx)).entries)),)


def _transformed(ctx: Context) -> range:
    """The axes of a Fourier transform: the last ones."""
    rank = len(ctx.in_shape(0))
    return range(rank - len(ctx.params["fft_lengths"]), rank)


def _pull_fft(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """``C_S F(x) = F(C_S x)``: a transform of other axes is linear, real ones included."""
    kept = along.free(_transformed(ctx))
    if kept.trivial and not along.trivial:
        return Opaque("transforms along the mean")
    return Pull(((0, AxisSet.of(ctx.in_shape(0), kept.entries)),), exact=kept == along)


def _push_fft(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """``F(x + u) = F(x) + F(u)``, which is uniform where u is, along other axes."""
    kept = along.free(_transformed(ctx))
    return ((0, AxisSet.of(ctx.out_shape(), kept.entries)),)


def _keep(along: AxisSet, mixed: Sequence[int]) -> Pull | Opaque:
    kept = along.free(mixed)
    if kept.trivial and not along.trivial:
        return Opaque("sums along the mean")
    return Pull(((0, kept),), exact=kept == along)


register("reduce_sum", Rule(_pull_sum, _push_sum))
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
