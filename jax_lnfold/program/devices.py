"""The devices of a `shard_map` as trailing axes ("mesh axes") of every value inside.

A value inside of a `shard_map` differs from device to device. Seen from outside, all its shards
together are one array with an axis more for every mesh axis: what a device does is a `vmap` over
the mesh axes, and a collective such as `psum` is a reduction along them. Mesh axes come last, so
that other axes keep their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._compat import ClosedJaxpr, JaxprEqn, Literal, open_jaxpr
from .primitives import ELEMENTWISE, IDENTITIES, STOP, TRANSPOSE

MeshAxes = tuple[tuple[str, int], ...]
"""Mesh axes with their sizes, in the order of the trailing axes."""


def with_mesh_axes(aval: Any, mesh_axes: MeshAxes) -> Any:
    """The shape and dtype of all shards of a value together."""
    if not mesh_axes:
        return aval
    return jax.ShapeDtypeStruct((*aval.shape, *(n for _, n in mesh_axes)), aval.dtype)


def per_device(
    eqn: JaxprEqn, mesh_axes: MeshAxes, run: Callable[..., Any] | None = None
) -> ClosedJaxpr | None:
    """The program that `eqn` is for all devices, None where it cannot be batched.

    It takes the operands that are no literals, with their mesh axes. `run` is what one device does,
    by default the equation.
    """
    name, run = eqn.primitive.name, run or partial(eqn.primitive.bind, **eqn.params)
    shapes = [with_mesh_axes(a.aval, mesh_axes) for a in eqn.invars]
    direct = _DIRECT.get(name)
    if name in ELEMENTWISE and direct is None and len({len(s.shape) for s in shapes}) == 1:
        direct = _elementwise

    def operands(given: Iterable[jax.Array]) -> list[Any]:
        arrays = iter(given)
        return [a.val if isinstance(a, Literal) else next(arrays) for a in eqn.invars]

    def one_lane(*given: jax.Array) -> Any:
        return run(*operands(given))

    def all_lanes(*given: jax.Array) -> Any:
        assert direct is not None
        pairs = zip(operands(given), shapes, strict=True)
        whole = (jnp.broadcast_to(x, s.shape) for x, s in pairs)
        return direct(eqn, mesh_axes, *whole)

    batched = one_lane
    for axis, size in mesh_axes:
        batched = jax.vmap(batched, in_axes=-1, out_axes=-1, axis_name=axis, axis_size=size)
    arrays = (s for s, a in zip(shapes, eqn.invars, strict=True) if not isinstance(a, Literal))
    try:
        closed = jax.make_jaxpr(all_lanes if direct else batched)(*arrays)
    except Exception:  # a batching rule of any package may fail in any way; opaque is always sound
        return None
    made = [tuple(with_mesh_axes(v.aval, ()).shape) for v in open_jaxpr(closed).outvars]
    wanted = [tuple(with_mesh_axes(v.aval, mesh_axes).shape) for v in eqn.outvars]
    return closed if made == wanted else None


def spread(aval: Any, spec: Sequence[Any], mesh_axes: MeshAxes) -> ClosedJaxpr:
    """The program that cuts a whole array, laid out by `spec`, into the shards of all devices."""
    cuts = _names_by_axis(spec, len(aval.shape), mesh_axes)
    sizes = dict(mesh_axes)

    def cut(x: jax.Array) -> jax.Array:
        shape, local, own = [], [], {}
        for n, names in zip(x.shape, cuts, strict=True):
            for name in names:
                own[name] = len(shape)
                shape.append(sizes[name])
                n //= sizes[name]
            local.append(len(shape))
            shape.append(n)
        present = [(i, own[name]) for i, name in enumerate(sizes) if name in own]
        shards = x.reshape(shape).transpose(*local, *(d for _, d in present))
        whole = (*shards.shape[: len(local)], *sizes.values())
        axes = (*range(len(local)), *(len(local) + i for i, _ in present))
        return jax.lax.broadcast_in_dim(shards, whole, axes)

    return jax.make_jaxpr(cut)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))


def collect(shards: Any, spec: Sequence[Any], mesh_axes: MeshAxes) -> tuple[ClosedJaxpr, int]:
    """The program that lays shards out as a whole array, and how many leading axes come with it.

    The leading axes are those mesh axes that `spec` does not name: every row is the result.
    """
    rank = len(shards.shape) - len(mesh_axes)
    cuts = _names_by_axis(spec, rank, mesh_axes)
    position = {name: rank + i for i, (name, _) in enumerate(mesh_axes)}
    named = [name for names in cuts for name in names]
    rest = [position[name] for name, _ in mesh_axes if name not in named]
    parts = [[*(position[name] for name in names), d] for d, names in enumerate(cuts)]

    def join(x: jax.Array) -> jax.Array:
        sizes = (prod(x.shape[d] for d in part) for part in parts)
        order = (*rest, *(d for part in parts for d in part))
        return x.transpose(order).reshape(*(x.shape[d] for d in rest), *sizes)

    return jax.make_jaxpr(join)(shards), len(rest)


def _names_by_axis(spec: Sequence[Any], rank: int, mesh_axes: MeshAxes) -> list[tuple[str, ...]]:
    known = {name for name, _ in mesh_axes}
    entries = [*spec, *[None] * (rank - len(spec))]
    groups = [e if isinstance(e, tuple) else () if e is None else (e,) for e in entries]
    return [tuple(name for name in group if name in known) for group in groups]


def _elementwise(eqn: JaxprEqn, mesh_axes: MeshAxes, *operands: jax.Array) -> Any:
    """MeshAxes line up like all axes."""
    return eqn.primitive.bind(*operands, **eqn.params)


def _same(eqn: JaxprEqn, mesh_axes: MeshAxes, *operands: jax.Array) -> list[jax.Array]:
    """Every device keeps what it has."""
    return list(operands)


def _reshape(eqn: JaxprEqn, mesh_axes: MeshAxes, x: jax.Array) -> list[jax.Array]:
    """Every device is reshaped by itself."""
    return [x.reshape(with_mesh_axes(eqn.outvars[0].aval, mesh_axes).shape)]


def _broadcast(eqn: JaxprEqn, mesh_axes: MeshAxes, x: jax.Array) -> list[jax.Array]:
    """Every device is broadcast by itself."""
    shape = with_mesh_axes(eqn.outvars[0].aval, mesh_axes).shape
    own = range(len(shape) - len(mesh_axes), len(shape))
    return [jax.lax.broadcast_in_dim(x, shape, (*eqn.params["broadcast_dimensions"], *own))]


def _transpose(eqn: JaxprEqn, mesh_axes: MeshAxes, x: jax.Array) -> list[jax.Array]:
    """Every device is transposed by itself."""
    return [x.transpose(*eqn.params["permutation"], *range(x.ndim - len(mesh_axes), x.ndim))]


def _positions(names: Any, x: jax.Array, mesh_axes: MeshAxes) -> list[int]:
    """The axes of `x` that are the mesh_axes with these names, in the order of the names."""
    order = [name for name, _ in mesh_axes]
    start = x.ndim - len(mesh_axes)
    return [start + order.index(n) for n in (names if isinstance(names, tuple) else (names,))]


def _reduce(
    over: Callable[..., jax.Array], eqn: JaxprEqn, mesh_axes: MeshAxes, *operands: jax.Array
) -> list[jax.Array]:
    """Every device gets the sum, or another reduction, over the devices."""
    axes = (tuple(_positions(eqn.params["axes"], x, mesh_axes)) for x in operands)
    whole = (over(x, a, keepdims=True) for x, a in zip(operands, axes, strict=True))
    return [jnp.broadcast_to(y, x.shape) for x, y in zip(operands, whole, strict=True)]


def _all_gather(eqn: JaxprEqn, mesh_axes: MeshAxes, x: jax.Array) -> list[jax.Array]:
    """Every device gets all shards side by side."""
    named = _positions(eqn.params["axis_name"], x, mesh_axes)
    at, rank = eqn.params["all_gather_dimension"], x.ndim - len(mesh_axes)
    rest = [d for d in range(rank, x.ndim) if d not in named]
    gathered = x.transpose(*range(at), *named, *range(at, rank), *rest)
    whole = with_mesh_axes(eqn.outvars[0].aval, mesh_axes).shape
    local = len(whole) - len(mesh_axes)
    y = gathered.reshape(*whole[:local], *(x.shape[d] for d in rest))
    axes = (*range(local), *(d - rank + local for d in rest))
    return [jax.lax.broadcast_in_dim(y, whole, axes)]


def _reduce_scatter(eqn: JaxprEqn, mesh_axes: MeshAxes, x: jax.Array) -> list[jax.Array]:
    """Every device gets its stretch of the sum over the devices."""
    named = _positions(eqn.params["axis_name"], x, mesh_axes)
    at, rank = eqn.params["scatter_dimension"], x.ndim - len(mesh_axes)
    total = jnp.sum(x, tuple(named))
    parts = [x.shape[d] for d in named]
    width = [x.shape[at] // prod(parts)] if eqn.params["tiled"] else []
    y = total.reshape(*total.shape[:at], *parts, *width, *total.shape[at + 1 :])
    cut = {d: at + i for i, d in enumerate(named)}
    rest = iter(range(rank - 1 + len(parts) + len(width), y.ndim))
    last = [cut[d] if d in cut else next(rest) for d in range(rank, x.ndim)]
    return [y.transpose(*(d for d in range(y.ndim) if d not in last), *last)]


# What needs no `vmap`, which would move the mesh_axes to the front and back.
_DIRECT: dict[str, Callable[..., list[jax.Array]]] = {
    **dict.fromkeys(IDENTITIES - {"convert_element_type", "reduce_precision"} | {STOP}, _same),
    **dict.fromkeys(("reshape", "squeeze"), _reshape),
    "broadcast_in_dim": _broadcast,
    TRANSPOSE: _transpose,
    **dict.fromkeys(("psum", "psum_invariant"), partial(_reduce, jnp.sum)),
    "pmax": partial(_reduce, jnp.max),
    "pmin": partial(_reduce, jnp.min),
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "reduce_scatter": _reduce_scatter,
}
