"""Small programs for every primitive that has a rule, with random shapes and parameters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.sharding import AxisType

Rng = np.random.Generator
PRIMITIVES: dict[str, Primitive] = {
    p.name: p for p in gc.get_objects() if issubclass(type(p), Primitive)
}


class Program(NamedTuple):
    """A function of `operands` in which the primitive under test occurs."""

    fn: Callable[..., Any]
    operands: Sequence[Any]


class Example(NamedTuple):
    """Makes programs; `pull` and `push` say whether the rule has something to say about them."""

    make: Callable[[Rng], Program]
    pull: bool
    push: bool


EXAMPLES: dict[str, list[Example]] = {}


def example(
    names: str, pull: bool = True, push: bool = True
) -> Callable[[Callable[[Rng], Program]], Callable[[Rng], Program]]:
    def add(make: Callable[[Rng], Program]) -> Callable[[Rng], Program]:
        for name in names.split():
            EXAMPLES.setdefault(name, []).append(Example(make, pull, push))
        return make

    return add


def quick(
    names: str,
    fn: Callable[..., Any],
    *shapes: tuple[int, ...],
    pull: bool = True,
    push: bool = True,
    fixed: bool = False,
) -> None:
    """An example with operands of `shapes`, or of the same pattern with other sizes."""
    example(names, pull, push)(
        lambda rng: Program(fn, normals(rng, *(shapes if fixed else resized(rng, shapes))))
    )


opaque = partial(quick, pull=False, push=False)


def resized(rng: Rng, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes with every size above 1 replaced by another one."""
    old = {n: None for shape in shapes for n in shape if n > 1}
    new = {1: 1, **dict(zip(old, sizes(rng, len(old)), strict=True))}
    return [tuple(new[n] for n in shape) for shape in shapes]


def bound(primitive: str, **params: Any) -> Callable[..., Any]:
    return lambda *operands: PRIMITIVES[primitive].bind(*operands, **params)


def normals(rng: Rng, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [rng.normal(0.5, 1.0, shape) for shape in shapes]


def sizes(rng: Rng, count: int, low: int = 2, high: int = 6) -> tuple[int, ...]:
    """Different sizes, so that no two axes can be mistaken for each other."""
    return tuple(rng.permutation(np.arange(low, max(high, low + count)))[:count].tolist())


def some(rng: Rng, rank: int, least: int = 1) -> tuple[int, ...]:
    return tuple(sorted(rng.permutation(rank)[: rng.integers(least, rank + 1)].tolist()))


# Sums, copies, products, choices.


@example("add sub")
def sum_with_broadcasts(rng: Rng) -> Program:
    op = {0: lambda x, y: x + y, 1: lambda x, y: x - y}
    a, b, c = sizes(rng, 3)
    shapes = [[(a, b, c)] * 2, [(a, 1, c), (a, b, 1)], [(a, b, c), ()], [(), (a, b)]]
    operands = normals(rng, *shapes[rng.integers(4)])
    return Program(lambda x, y: (op[0](x, y), op[1](x, y)), operands)


quick("add sub", lambda x: (x + 1.5, 2.5 - x), (3, 4))
quick("add sub", lambda x, y: (x[:, None] + y, y - x[:, None]), (2,), (2, 3))
quick("add_any", bound("add_any"), (3, 4), (3, 4))
quick("neg", lambda x: -x, (3, 4, 2))
quick("copy", bound("copy"), (3, 4))
quick("name", bound("name", name="here"), (3, 4))
quick("stop_gradient", bound("stop_gradient"), (3, 4))
quick("layout_constraint", lambda x: with_layout_constraint(x, Layout((0, 1))), (3, 4))
quick("reduce_precision", lambda x: lax.reduce_precision(x, 11, 52), (3, 4))
quick("pvary", bound("pvary", axes=()), (3, 4))
quick("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y)), (3, 4), (6,))


@example("sharding_constraint")
def constrained_to_one_device(rng: Rng) -> Program:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("i",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    return Program(lambda x: lax.with_sharding_constraint(x, where), normals(rng, sizes(rng, 2)))


@example("convert_element_type")
def converted(rng: Rng) -> Program:
    given, new = rng.permutation([np.float64, np.float32])
    x = rng.normal(0.5, 1, sizes(rng, 2)).astype(given)
    return Program(lambda x: x.astype(new), [x])


opaque("convert_element_type", lambda x: x.astype(int), (3, 4))
opaque("convert_element_type", lambda x: (x > 0).astype(float), (3, 4))

_z = lax.complex


def parts(z: Any) -> Any:
    return lax.real(z), lax.imag(z)


quick("complex", _z, (3, 4), (3, 4))
quick("real imag", lambda x, y: parts(_z(x, y)), (3, 4), (3, 4))
quick("real imag", lambda x, y: parts(_z(x, y)[:, None] * (2 - 1j)), (3, 4), (3, 4))
quick("conj", lambda x, y: lax.conj(_z(x, y)), (3, 4), (3, 4))
quick("conj", lax.conj, (3, 4))
quick("convert_element_type", lambda x: x.astype(complex), (3, 4))
quick("convert_element_type", lambda x, y: _z(x, y).astype(np.complex64), (3, 4), (3, 4))
quick("mul", lambda x, y, g: _z(x, y) * _z(g, g + 1), (3, 4), (3, 4), (3, 1))
quick("mul", lambda x, y: _z(x, y) * (2 - 1j), (3, 4), (3, 4))
opaque("mul", lambda x, y: _z(x, y) * _z(y, x), (3, 4), (3, 4))
quick("div", lambda x, y, g: _z(x, y) / _z(g, g + 1), (3, 4), (3, 4), (3, 1))


@example("reshard")
def resharded(rng: Rng) -> Program:
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    return Program(lambda x: jax.sharding.reshard(x, where), normals(rng, sizes(rng, 2)))


PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {
    "mul": lambda x, g: x * g,
    "div": lambda x, g: x / g,
}


def _spread(g: jax.Array) -> jax.Array:
    """Computed at full size, and uniform along its last axis all the same."""
    wide = jnp.broadcast_to(jnp.exp(g)[:, :, None], (*g.shape, 4))
    return jnp.sum(jnp.transpose(wide, (1, 2, 0)) ** 2, -1) + 1


for _name, _op in PRODUCTS.items():
    quick(_name, lambda x, g, op=_op: op(x, g), (3, 4), ())
    quick(_name, lambda x, op=_op: op(x, 2.5), (3, 4))
    quick(_name, lambda x, g, op=_op: op(x, g), (3, 4), (3, 1))
    quick(_name, lambda x, g, op=_op: op(x, g), (1, 5), (3, 1))
    quick(_name, lambda x, g, op=_op: op(x, g), (3, 1, 5), (1, 2, 5))
    quick(_name, lambda x, g, op=_op: op(x, g[:, None]), (3, 4), (3,))
    quick(_name, lambda x, g, op=_op: op(x, _spread(g)), (2, 4), (3, 2), fixed=True)
    quick(_name, lambda x, g, op=_op: op(x, jnp.repeat(g, 3)), (2, 6), (2,), fixed=True)
    quick(_name, lambda x, g, op=_op: op(x, jnp.exp(g) + 1), (2, 3, 4), (2, 1, 4))
    opaque(_name, lambda x, g, op=_op: op(x, g), (3, 4), (3, 4))
quick("mul", lambda x, g: g * x, (3, 4), (3, 1))
quick("mul", lambda x, g: (g * x, x * x), (3, 4), ())
opaque("div", lambda x, g: g / x, (3, 4), (3, 1))


@example("mul div", pull=False, push=False)
def whole_numbers(rng: Rng) -> Program:
    """Products overflow and quotients are rounded."""
    n, d = sizes(rng, 2)
    x, g = rng.integers(1, 9, (n, d)), rng.integers(2, 5, (n, 1))
    return Program(lambda x, g: (lax.mul(x, jnp.broadcast_to(g, x.shape)), x // g), [x, g])


@example("select_n")
def chosen_as_one(rng: Rng) -> Program:
    shape = sizes(rng, 2)
    return Program(
        lambda p, x, y: lax.select_n(p, x, y), [rng.random() < 0.5, *normals(rng, shape, shape)]
    )


@example("select_n")
def chosen_per_token(rng: Rng) -> Program:
    n, d = sizes(rng, 2)
    which = rng.integers(0, 3, n).astype(np.int32)
    cases = normals(rng, *[(n, d)] * 3)
    fn = lambda p, *xs: lax.select_n(jnp.broadcast_to(p[:, None], (n, d)), *xs)  # noqa: E731
    return Program(fn, [which, *cases])


@example("select_n", pull=False, push=False)
def chosen_per_element(rng: Rng) -> Program:
    shape = sizes(rng, 2)
    return Program(lax.select_n, [rng.random(shape) < 0.5, *normals(rng, shape, shape)])


quick("select_n", lambda x, y: jnp.where(x[:, :1] > 0, x, y), (4, 3), (4, 3))

# Contractions.


@example("dot_general")
def contraction(rng: Rng) -> Program:
    """Any numbers of batch, contracted and free axes, in any order."""
    n_batch, n_sum = int(rng.integers(0, 3)), int(rng.integers(0, 3))
    n_free = [int(rng.integers(1, 3)), int(rng.integers(0, 3))]
    n = sizes(rng, n_batch + n_sum + sum(n_free), 2, 4)
    shared = list(range(n_batch + n_sum))
    first = len(shared)
    axes = [
        rng.permutation([*shared, *range(first, first + n_free[0])]).tolist(),
        rng.permutation([*shared, *range(first + n_free[0], len(n))]).tolist(),
    ]
    if rng.random() < 0.5:
        axes.reverse()
    batch = [[a.index(k) for k in range(n_batch)] for a in axes]
    contract = [[a.index(k) for k in range(n_batch, first)] for a in axes]
    numbers = (tuple(contract), tuple(batch))
    return Program(
        lambda x, y: lax.dot_general(x, y, numbers),
        normals(rng, *(tuple(n[k] for k in a) for a in axes)),
    )


quick("dot_general", lambda x, w: x @ w, (3, 4), (4, 6))
quick("dot_general", lambda x, y, w: _z(x, y) @ _z(w, -w), (3, 4), (3, 4), (4, 6))
quick("dot_general", lambda x, w: jnp.einsum("btd,dhk->bthk", x, w), (2, 3, 4), (4, 2, 5))
quick("dot_general", lambda x, w: jnp.einsum("bqhk,bshk->bhqs", x, w), (2, 3, 2, 4), (2, 5, 2, 4))
opaque("dot_general", lambda x, y: x @ y, (4,), (4,))


def ragged(
    numbers: Any, rows: Sequence[Any], lhs: tuple[int, ...], rhs: tuple[int, ...], **known: bool
) -> None:
    """Rows in as many groups as there are numbers of rows; the last rows may belong to none."""
    sizes = jnp.asarray(rows, np.int32)
    run = lambda x, w: lax.ragged_dot_general(x, w, sizes, numbers)  # noqa: E731
    example("ragged_dot_general", **known)(lambda rng: Program(run, normals(rng, lhs, rhs)))


_Ragged = lax.RaggedDotDimensionNumbers
ragged(_Ragged((((1,), (1,)), ((), ())), (0,), (0,)), (2, 0, 4), (6, 4), (3, 4, 5))
ragged(_Ragged((((1,), (1,)), ((), ())), (0,), (0,)), (1, 2, 1), (6, 4), (3, 4, 5))
ragged(_Ragged((((2,), (0,)), ((), ())), (0,), (2,)), (2, 1, 3), (6, 2, 4), (4, 5, 3))
ragged(_Ragged((((2,), (2,)), ((0,), (1,))), (1,), (0,)), (2, 4), (3, 6, 4), (2, 3, 4, 5))
ragged(_Ragged((((2,), (1,)), ((), ())), (1,), (0,)), [(2, 3), (0, 4)], (2, 5, 4), (2, 4, 3))
ragged(_Ragged((((2,), (1,)), ((), ())), (0,), (0,)), (2, 3), (5, 6, 4), (2, 4, 3))
ragged(_Ragged((((0,), (0,)), ((), ())), (0,), ()), (2, 3), (6, 4), (6, 5))
ragged(_Ragged((((0,), (1,)), ((), ())), (1,), (0,)), (2, 3), (4, 5, 6), (2, 4, 3))
ragged(_Ragged((((2,), (1,)), ((), ())), (1,), (0,)), (2, 3), (3, 5, 4), (2, 4, 6))
ragged(_Ragged((((1,), (1,)), ((0,), (0,))), (1,), ()), (2, 3), (2, 6, 4), (2, 6, 5))
ragged(_Ragged((((2,), (1,)), ((0,), (0,))), (0,), ()), (1, 1), (3, 5, 4), (3, 4, 6))


def solved(left: bool, **params: Any) -> Callable[[Any, Any], Any]:
    """A triangular system; the matrix is far from singular."""

    def run(a: Any, b: Any) -> Any:
        matrix = a + 4 * jnp.eye(a.shape[-1])
        return lax.linalg.triangular_solve(matrix, b, left_side=left, **params)

    return run


quick("triangular_solve", solved(True, lower=True), (3, 3), (3, 4))
quick("triangular_solve", solved(False, transpose_a=True), (4, 4), (3, 4))
quick("triangular_solve", solved(True, unit_diagonal=True), (2, 3, 3), (2, 3, 4))


def convolution(rng: Rng, groups: int, per_group: int) -> Program:
    spatial = int(rng.integers(1, 3))
    letters = "HW"[:spatial]
    layouts = [
        (f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        (f"NC{letters}", f"OI{letters}", f"NC{letters}"),
        (f"{letters}NC", f"I{letters}O", f"CN{letters}"),
    ]
    layout = layouts[rng.integers(3)]
    batch, inside = sizes(rng, 2, 2, 4)
    extent = {"N": batch, "C": groups * inside, "I": inside, "O": groups * per_group}
    image = {**extent, **dict(zip(letters, rng.integers(5, 8, spatial).tolist(), strict=True))}
    window = {**extent, **dict(zip(letters, rng.integers(1, 4, spatial).tolist(), strict=True))}
    params = {
        "window_strides": rng.integers(1, 3, spatial).tolist(),
        "padding": [(int(a), int(b)) for a, b in rng.integers(0, 3, (spatial, 2))],
        "lhs_dilation": rng.integers(1, 3, spatial).tolist(),
        "rhs_dilation": rng.integers(1, 3, spatial).tolist(),
    }
    shapes = tuple(image[k] for k in layout[0]), tuple(window[k] for k in layout[1])
    return Program(
        lambda x, k: lax.conv_general_dilated(
            x, k, dimension_numbers=layout, feature_group_count=groups, **params
        ),
        normals(rng, *shapes),
    )


example("conv_general_dilated")(lambda rng: convolution(rng, 1, 6))
example("conv_general_dilated")(lambda rng: convolution(rng, 3, 4))
example("conv_general_dilated")(lambda rng: convolution(rng, 2, 2))
example("conv_general_dilated", pull=False, push=False)(lambda rng: convolution(rng, 4, 1))
quick(
    "conv_general_dilated",
    lambda x, k: lax.conv_general_dilated(x, k, (1,), "SAME", batch_group_count=2),
    *[(4, 3, 5), (6, 3, 2)],
    pull=False,
    push=False,
    fixed=True,
)

# Sums along axes.


@example("reduce_sum")
def summed(rng: Rng) -> Program:
    shape = sizes(rng, 4)
    axes = some(rng, 3)
    return Program(
        lambda x: jnp.sum(x, tuple(shape.index(shape[a]) for a in axes)), normals(rng, shape)
    )


quick("reduce_sum", lambda x: jnp.mean(x, (0, 2), keepdims=True), (3, 4, 2))


@example("argmax argmin", pull=False, push=False)
def chosen(rng: Rng) -> Program:
    axis = int(rng.integers(3))
    return Program(lambda x: (x.argmax(axis), x.argmin(axis)), normals(rng, sizes(rng, 3)))


@example("reduce_xor", pull=False, push=False)
def reduced_bits(rng: Rng) -> Program:
    axes = some(rng, 3)
    fn = lambda x: lax.reduce_xor(x, axes)  # noqa: E731
    return Program(fn, [rng.integers(0, 9, sizes(rng, 4))])


@example("reduce_max reduce_min reduce_prod reduce_or reduce_and", pull=False, push=False)
def reduced(rng: Rng) -> Program:
    axes = some(rng, 3)

    def run(x: Any) -> Any:
        return x.max(axes), x.min(axes), x.prod(axes), (x > 0).any(axes), (x > 0).all(axes)

    return Program(run, normals(rng, sizes(rng, 4)))


@example("cumsum")
def cumulated(rng: Rng) -> Program:
    axis, reverse = int(rng.integers(3)), bool(rng.integers(2))
    return Program(lambda x: lax.cumsum(x, axis, reverse), normals(rng, sizes(rng, 3)))


@example("cumlogsumexp cummax cummin cumprod", pull=False, push=False)
def cumulated_otherwise(rng: Rng) -> Program:
    axis, reverse = int(rng.integers(3)), bool(rng.integers(2))
    kinds = lax.cumlogsumexp, lax.cummax, lax.cummin, lax.cumprod
    return Program(lambda x: [f(x, axis, reverse) for f in kinds], normals(rng, sizes(rng, 3)))


@example("reduce_window_max reduce_window_min", pull=False, push=False)
def largest_and_smallest(rng: Rng) -> Program:
    window = tuple(rng.integers(1, 3, 3).tolist())

    def run(x: Any) -> Any:
        pools = (-jnp.inf, lax.max), (jnp.inf, lax.min)
        return [lax.reduce_window(x, *pool, window, (1, 1, 2), "SAME") for pool in pools]

    return Program(run, normals(rng, sizes(rng, 3, 3)))


@example("reduce_window_sum")
def pooled(rng: Rng) -> Program:
    """Windows with strides, padding and dilation along some axes, and nothing along the others."""
    rank = 3
    given = np.tile([1, 1, 0, 0, 1, 1], (rank, 1))
    for d in rng.permutation(rank)[: rng.integers(1, rank)]:
        window = 1 if rng.random() < 0.4 else rng.integers(2, 4)
        given[d] = [window, *rng.integers([1, 0, 0, 1, 1], 3)]
    window, strides, low, high, base, dilation = (tuple(c) for c in given.T.tolist())
    return Program(
        lambda x: lax.reduce_window(
            x, 0.0, lax.add, window, strides, tuple(zip(low, high, strict=True)), base, dilation
        ),
        normals(rng, sizes(rng, rank, 3)),
    )


@example("fft")
def transformed(rng: Rng) -> Program:
    """Fourier transforms of every kind, along one axis or two, with lengths of their own."""
    kind, count = rng.integers(4), int(rng.integers(1, 3))
    lengths = tuple(rng.integers(3, 8, count).tolist())
    before = (*lengths[:-1], lengths[-1] // 2 + 1) if kind == 3 else lengths
    shape = (*sizes(rng, 3 - count), *before)
    types = (lax.FftType.FFT, lax.FftType.IFFT, lax.FftType.RFFT, lax.FftType.IRFFT)

    def run(x: Any, y: Any) -> Any:
        return lax.fft(x if kind == 2 else _z(x, y), types[kind], lengths)

    return Program(run, normals(rng, shape, shape))


# Moves.


@example("transpose")
def transposed(rng: Rng) -> Program:
    order = rng.permutation(4)
    while np.array_equal(order, np.arange(4)):
        order = rng.permutation(4)
    return Program(lambda x: jnp.transpose(x, order.tolist()), normals(rng, sizes(rng, 4)))


def reshaped(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    quick("reshape", lambda x: lax.reshape(x, new), old, fixed=True)


for _old, _new in [
    ((2, 12), (2, 3, 4)),
    ((2, 3, 4), (2, 12)),
    ((2, 3, 4), (6, 4)),
    ((4, 6), (2, 2, 3, 2)),
    ((2, 6, 2), (4, 3, 2)),
    ((3, 1, 4), (1, 3, 4, 1)),
    ((2, 3, 4), (24,)),
    ((12,), (4, 3)),
    ((4, 6), (6, 4)),
    ((5, 4, 3), (5, 3, 4)),
]:
    reshaped(_old, _new)
quick("squeeze", lambda x: jnp.squeeze(x, (1,)), (3, 1, 4, 1))


@example("broadcast_in_dim")
def broadcast(rng: Rng) -> Program:
    """New axes anywhere, and some axes of size 1 expanded."""
    shape = list(sizes(rng, 4))
    kept = some(rng, 4)
    given = [1 if rng.random() < 0.3 and i else shape[k] for i, k in enumerate(kept)]
    if len(kept) == 4 and given == shape:
        given[1] = 1
    return Program(lambda x: lax.broadcast_in_dim(x, shape, kept), normals(rng, tuple(given)))


quick("broadcast_in_dim", lambda x: jnp.broadcast_to(x[None], (3, *x.shape)), (2, 4))
quick("broadcast_in_dim", lambda x: jnp.broadcast_to(x, (3, 4)), (), pull=False)


@example("tile")
def tiled(rng: Rng) -> Program:
    shape, reps = list(sizes(rng, 3)), rng.permutation([1, 2, 3])
    if rng.random() < 0.5:
        shape[rng.integers(3)] = 1
    return Program(lambda x: jnp.tile(x, reps.tolist()), normals(rng, tuple(shape)))


@example("stack")
def stacked(rng: Rng) -> Program:
    axis, shape = int(rng.integers(3)), sizes(rng, 2)
    return Program(lambda *xs: lax.stack(list(xs), axis), normals(rng, shape, shape, shape))


@example("unstack")
def unstacked(rng: Rng) -> Program:
    axis = int(rng.integers(3))
    return Program(lambda x: tuple(lax.unstack(x, axis)), normals(rng, sizes(rng, 3)))


quick("device_put", lambda x: jax.device_put(x), (3, 4))


@example("rev")
def reversed_(rng: Rng) -> Program:
    axes = some(rng, 3)
    return Program(lambda x: lax.rev(x, axes), normals(rng, sizes(rng, 3)))


@example("slice")
def sliced(rng: Rng) -> Program:
    shape = sizes(rng, 3, 3, 8)
    start = [int(rng.integers(0, n - 1)) if rng.random() < 0.7 else 0 for n in shape]
    stop = [
        n if rng.random() < 0.5 else int(rng.integers(a + 1, n + 1))
        for a, n in zip(start, shape, strict=True)
    ]
    step = rng.integers(1, 4, 3).tolist()
    if (start, stop, step) == ([0, 0, 0], list(shape), [1, 1, 1]):
        start[0] = 1
    return Program(lambda x: lax.slice(x, start, stop, step), normals(rng, shape))


quick("slice", lambda qkv: qkv[:, :8], (3, 12), fixed=True)


@example("split")
def parted(rng: Rng) -> Program:
    axis, parts = int(rng.integers(2)), rng.integers(1, 5, rng.integers(2, 4)).tolist()
    shape = [*sizes(rng, 2)]
    shape.insert(axis, sum(parts))
    return Program(lambda x: lax.split(x, parts, axis), normals(rng, tuple(shape)))


@example("concatenate")
def joined(rng: Rng) -> Program:
    axis, parts = int(rng.integers(2)), rng.integers(1, 5, rng.integers(2, 4)).tolist()
    rest = sizes(rng, 2)
    shapes = [(*rest[:axis], n, *rest[axis:]) for n in parts]
    return Program(lambda *xs: lax.concatenate(xs, axis), normals(rng, *shapes))


@example("pad")
def padded(rng: Rng) -> Program:
    config = rng.integers(0, 3, (3, 3))
    config[rng.integers(3)] = 0
    config[rng.integers(3)] = [1, 2, int(rng.integers(2))]
    return Program(
        lambda x: lax.pad(x, 0.0, [tuple(c) for c in config.tolist()]), normals(rng, sizes(rng, 3))
    )


quick("pad", lambda x: lax.pad(x, 1.0, [(0, 0, 0), (1, 0, 0)]), (3, 4), pull=False)
quick("pad", lambda x, v: lax.pad(x, v, [(0, 0, 0), (1, 2, 1)]), (3, 4), (), pull=False)
opaque("pad", lambda x: lax.pad(x, 0.0, [(0, 0, 0), (-1, 2, 0)]), (3, 4))

# Look-ups and updates.


@example("dynamic_slice")
def sliced_at_run_time(rng: Rng) -> Program:
    shape = sizes(rng, 3, 3)
    taken = [int(rng.integers(2, n)) if d else n for d, n in enumerate(shape)]
    order = rng.permutation(3)
    shape, taken = tuple(shape[k] for k in order), [taken[k] for k in order]
    start = rng.integers(-1, 6, 3)
    return Program(lambda x, *i: lax.dynamic_slice(x, i, taken), [*normals(rng, shape), *start])


@example("dynamic_update_slice")
def updated_at_run_time(rng: Rng) -> Program:
    shape = sizes(rng, 3, 3)
    written = [int(rng.integers(2, n)) if d else n for d, n in enumerate(shape)]
    order = rng.permutation(3)
    shape, written = tuple(shape[k] for k in order), tuple(written[k] for k in order)
    start = rng.integers(-1, 6, 3)
    return Program(
        lambda x, u, *i: lax.dynamic_update_slice(x, u, i), [*normals(rng, shape, written), *start]
    )


def indexed(
    names: str,
    fn: Callable[..., Any],
    shapes: Sequence[tuple[int, ...]],
    indices: Sequence[tuple[int, ...]],
    below: int,
    pull: bool = True,
    push: bool = True,
) -> None:
    """An example with float operands of `shapes`, then indices from 0 to `below` - 1."""
    example(names, pull, push)(
        lambda rng: Program(
            fn, [*normals(rng, *shapes), *(rng.integers(0, below, shape) for shape in indices)]
        )
    )


def _take(axis: int, **params: Any) -> Callable[..., Any]:
    return lambda x, i: jnp.take(x, i, axis=axis, **params)


def _same_rows(x: Any, i: Any) -> Any:
    """A batch axis along which the indices are the same."""
    return jax.vmap(lambda x, i: x[i], out_axes=1)(x, jnp.broadcast_to(i, (3, *i.shape)))


indexed("gather", _take(0), [(5, 4)], [(2, 3)], 5)
indexed("gather", _take(1), [(3, 5, 4)], [(2,)], 5)
indexed("gather", _take(-1), [(3, 5)], [()], 5)
indexed("gather", _take(0, mode="clip"), [(5, 4)], [(6,)], 9)
indexed("gather", _take(0, mode="fill", fill_value=0.0), [(5, 4, 2)], [(6,)], 9)
indexed("gather", _take(0, mode="fill", fill_value=2.0), [(5, 4)], [(6,)], 9, pull=False)
indexed("gather", lambda x, i, j: x[i, j], [(5, 6, 4)], [(3,), (3,)], 5)
indexed("gather", lambda x, i, j: x[i, :, j], [(5, 4, 6)], [(3, 1), (2,)], 5)
indexed("gather", lambda x, i: x[:, i, :2], [(3, 5, 4)], [(2,)], 5)
indexed("gather", lambda x, i, j: x[i, j], [(4, 4)], [(3,), (3,)], 4, pull=False, push=False)
indexed("gather", jax.vmap(lambda x, i: x[i]), [(3, 5, 4)], [(3, 2)], 5)
indexed("gather", _same_rows, [(3, 5, 4)], [(2,)], 5)
indexed("gather", jax.vmap(lambda x, i: x[:, i], (1, 0)), [(4, 3, 5)], [(3,)], 5)
indexed("gather", jax.vmap(lambda x, i: x[i], (None, 0)), [(5, 4)], [(3, 2)], 5)
indexed("gather", lambda x, i: jnp.take_along_axis(x, i, 0), [(5, 4)], [(3, 4)], 5, False, False)
indexed("gather", lambda x, i: jnp.take_along_axis(x, i, 0), [(5, 4)], [(3, 1)], 5)
indexed("gather", lambda x, i: jnp.take_along_axis(x, i, 1), [(3, 5, 4)], [(3, 2, 1)], 5)


@example("gather")
def window_looked_up(rng: Rng) -> Program:
    """Windows of 2 by 3 that start anywhere, from (4, 3, 5), in a layout of its own."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(0, 2), collapsed_slice_dims=(2,), start_index_map=(2, 0)
    )
    start = rng.integers(0, 4, (6, 2))
    return Program(
        lambda x, i: lax.gather(x, i, numbers, (2, 3, 1), mode="clip"),
        [*normals(rng, (4, 3, 5)), start],
    )


_set = {"scatter": "set", "scatter-add": "add", "scatter-sub": "subtract"}
for _name, _how in _set.items():

    def _at(where: Callable[..., Any], how: str = _how, **params: Any) -> Callable[..., Any]:
        return lambda x, u, *i: getattr(x.at[where(*i)], how)(u, **params)

    _rows = _at(lambda i: i)
    indexed(_name, _rows, [(5, 4), (3, 4)], [(3,)], 5)
    indexed(_name, _at(lambda i: i, mode="drop"), [(5, 4), (6, 4)], [(6,)], 9)
    indexed(_name, _at(lambda i: i, mode="clip"), [(5, 4), (6, 4)], [(6,)], 9)
    indexed(_name, _at(lambda i: (slice(None), i)), [(2, 5, 4), (2, 3, 4)], [(3,)], 5)
    indexed(_name, _at(lambda i, j: (i, slice(None), j)), [(5, 4, 6), (3, 4)], [(3,), (3,)], 5)
    indexed(_name, _at(lambda i: (i, slice(1, 3))), [(5, 4, 3), (2, 2, 3)], [(2,)], 5)
    indexed(_name, _at(lambda i, j: (i, j)), [(5, 4), (3,)], [(3,), (3,)], 4, False, False)
    indexed(_name, _at(lambda i, j: (i, j)), [(5, 6, 4), (3, 4)], [(3,), (3,)], 5)
    indexed(_name, jax.vmap(_rows), [(3, 5, 4), (3, 2, 4)], [(3, 2)], 5)
    indexed(_name, jax.vmap(_rows, (1, 0, 0), 2), [(5, 3, 4), (3, 2, 4)], [(3, 2)], 5)

# Nonlinear elementwise primitives; operands between 0.1 and 0.9, integers or truth values.

UNARY = (
    "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic round rsqrt sign sin "
    "sinh sqrt square tan tanh"
)
BINARY = "atan2 eq ge gt igamma igamma_grad_a igammac le lt max min ne nextafter pow rem zeta"
TOTAL = "eq_to le_to lt_to"
INTEGER = "and mulhi or shift_left shift_right_arithmetic shift_right_logical xor"
NEWER = "log2 one_minus_square"


def _fractions(rng: Rng, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [rng.uniform(0.1, 0.9, shape) for shape in shapes]


def nonlinear(names: str, *shapes: tuple[int, ...], whole: bool = False) -> None:
    for name in names.split():
        spelling = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
        fn = getattr(lax, spelling.get(name, name), None) or bound(name)

        def make(rng: Rng, fn: Callable[..., Any] = fn) -> Program:
            draw = (lambda r, *s: [r.integers(0, 9, n) for n in s]) if whole else _fractions
            return Program(lambda *xs: fn(*xs), draw(rng, *resized(rng, shapes)))

        example(name, False, False)(make)


nonlinear(UNARY, (2, 3, 4))
nonlinear(BINARY, (3, 4), (3, 4))
nonlinear(BINARY, (3, 1, 4), (1, 2, 4))
nonlinear(TOTAL, (3, 4), (3, 4))
nonlinear(INTEGER, (3, 4), (3, 4), whole=True)
nonlinear("clz population_count", (3, 4), whole=True)
nonlinear(" ".join(n for n in NEWER.split() if n in PRIMITIVES), (3, 4))
opaque("polygamma", lambda x: lax.polygamma(1.0, x * x + 1), (3, 4))
quick(
    "regularized_incomplete_beta",
    lambda x: lax.betainc(2.0, 3.0, lax.logistic(x)),
    (3, 4),
    pull=False,
    push=False,
)
if "polynomial" in PRIMITIVES:
    quick(
        "polynomial",
        lambda x, a: vars(lax)["polynomial"](x, [a, 2.0, a]),
        (3, 4),
        (3, 4),
        pull=False,
        push=False,
    )
opaque("integer_pow", lambda x: x**3, (3, 4))
opaque("clamp", lambda x: lax.clamp(0.0, x, 1.0), (3, 4))
opaque("clamp", lax.clamp, (3, 4), (3, 4), (3, 4))
opaque("not", lambda x: ~(x > 0), (3, 4))
