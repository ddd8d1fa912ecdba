"""What the rules must answer to hand-picked questions, above all to those that are near misses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify  # noqa: F401  (its primitives are of jax, too)
from jax.experimental.pallas import pallas_call
from jax.extend.core import Primitive, primitives

from jax_lnfold._compat import WALKED
from jax_lnfold.analysis.facts import Facts
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import ALL, FREE, Labels
from jax_lnfold.program.flatten import flatten
from jax_lnfold.program.primitives import EXCHANGES, NOT_CARRYING, UNSEEN
from jax_lnfold.rules import RULES, Opaque, Rule, register
from jax_lnfold.rules.example import equation
from tests.rules.rule_examples import UNARY, Program
from tests.rules.test_rules import check_pull, check_push, find

F, A = FREE, ALL
INDEX = np.array([2, 0])
Given = str | tuple[int, ...]
Answer = Mapping[int, Sequence[Given]] | None
"""Entries for each operand (pull) or output (push) named; None where the rule must refuse."""


class Known(NamedTuple):
    """A question about output or operand `position` of the first equation of `primitive`."""

    primitive: str
    fn: Callable[..., Any]
    operands: Sequence[Any]
    asked: Sequence[Given]
    answer: Answer
    position: int = 0
    exact: bool = True


def conv(groups: int = 1) -> Callable[[Any, Any], Any]:
    return lambda x, k: lax.conv_general_dilated(
        x, k, (1,), "SAME", None, None, ("NWC", "WIO", "NWC"), groups
    )


def window(*size: int) -> Callable[[Any], Any]:
    return lambda x: lax.reduce_window(x, 0.0, lax.add, size, (1,) * len(size), "SAME")


def batched(x: Any, y: Any) -> Any:
    return lax.dot_general(x, y, (((2,), (1,)), ((0,), (0,))))


def repeats(x: Any, w: Any, first: bool = False) -> Any:
    """A batched product, (2, 5, 4) by (4, 6) or the other way round."""
    wide = jnp.broadcast_to(w, (2, 4, 6))
    return batched(wide.transpose(0, 2, 1), x.transpose(0, 2, 1)) if first else batched(x, wide)


def repeats_over_one(x: Any, w: Any) -> Any:
    wide = jnp.broadcast_to(w, (2, 3, 4, 6))
    return lax.dot_general(x, wide, (((3,), (2,)), ((0, 1), (0, 1))))


def spectrum(x: Any) -> Any:
    return lax.fft(x, lax.FftType.RFFT, (5,))


def ragged(x: Any, w: Any) -> Any:
    return lax.ragged_dot(x, w, jnp.array([2, 1, 2], np.int32))


def dense(x: Any, w: Any) -> Any:
    return jnp.tensordot(x, w, 1)


def times(x: Any, g: Any) -> Any:
    return x * g


def repeated(v: Any) -> Any:
    return jnp.broadcast_to(v[:, None], (2, 6))


HALVES = (0, 0, 0, 1, 1, 1)
PAIRS = (0, 0, 1, 1, 2, 2)

PULLS: dict[str, Known] = {
    "sum: both operands": Known("add", jnp.add, [(2, 6), (2, 6)], (F, A), {0: (F, A), 1: (F, A)}),
    "sum with a per-token operand: that one must be zero": Known(
        "add", jnp.add, [(2, 6), (2, 1)], (F, A), {0: (F, A), 1: (F, F)}
    ),
    "sum with a scalar": Known("sub", jnp.subtract, [(2, 6), ()], (F, A), {0: (F, A), 1: ()}),
    "product with a per-token factor": Known("mul", times, [(2, 6), (2, 1)], (F, A), {0: (F, A)}),
    "product of two that are uniform: rather zero-mean than zero": Known(
        "mul", lambda g, v: g * repeated(v), [(2, 1), (2,)], (F, A), {1: (F, A)}
    ),
    "product of two that are uniform, the other way round": Known(
        "mul", lambda g, v: repeated(v) * g, [(2, 1), (2,)], (F, A), {0: (F, A)}
    ),
    "product with a per-channel factor": Known("mul", times, [(2, 6), (1, 6)], (F, A), None),
    "product with a per-channel factor, other mean": Known(
        "mul", times, [(2, 6), (1, 6)], (A, F), {0: (A, F)}
    ),
    "product with a per-token factor, mean over tokens": Known(
        "mul", times, [(2, 6), (2, 1)], (A, A), None
    ),
    "product with a per-head factor": Known(
        "mul", lambda x, g: x * jnp.repeat(g, 3), [(2, 6), (2,)], (F, HALVES), {0: (F, HALVES)}
    ),
    "product with a per-head factor, whole width": Known(
        "mul", lambda x, g: x * jnp.repeat(g, 3), [(2, 6), (2,)], (F, A), None
    ),
    "product with a per-head factor, groups across heads": Known(
        "mul", lambda x, g: x * jnp.repeat(g, 3), [(2, 6), (2,)], (F, PAIRS), None
    ),
    "quotient with a per-token divisor": Known(
        "div", jnp.divide, [(2, 6), (2, 1)], (F, A), {0: (F, A)}
    ),
    "quotient of a per-token dividend": Known("div", jnp.divide, [(2, 1), (2, 6)], (F, A), None),
    "choice per element": Known(
        "select_n", jnp.where, [np.eye(2, 6) > 0, (2, 6), (2, 6)], (F, A), None
    ),
    "choice per token": Known(
        "select_n",
        lambda x, y: jnp.where(x[:, :1] > 0, x, y),
        [(2, 6), (2, 6)],
        (F, A),
        {1: (F, A), 2: (F, A)},
    ),
    "choice per token, mean over tokens": Known(
        "select_n", lambda x, y: jnp.where(x[:, :1] > 0, x, y), [(2, 6), (2, 6)], (A, F), None
    ),
    "conversion to whole numbers": Known(
        "convert_element_type", lambda x: x.astype(int), [(2, 6)], (F, A), None
    ),
    "real and imaginary part": Known(
        "complex", lax.complex, [(2, 6), (2, 6)], (F, A), {0: (F, A), 1: (F, A)}
    ),
    "size of a complex number": Known("abs", jnp.abs, [np.ones((2, 6)) * 1j], (F, A), None),
    "square of a complex number": Known(
        "mul", lambda z: z * z.conj(), [np.ones((2, 6)) * 1j], (F, A), None
    ),
    "ragged product: columns of all kernels": Known(
        "ragged_dot_general", ragged, [(5, 4), (3, 4, 6)], (F, A), {1: (F, F, A)}
    ),
    "ragged product: mean over the rows": Known(
        "ragged_dot_general", ragged, [(5, 4), (3, 4, 6)], (A, F), None
    ),
    "ragged product: mean over rows and columns": Known(
        "ragged_dot_general", ragged, [(5, 4), (3, 4, 6)], (A, A), None
    ),
    "transform along other axes": Known("fft", spectrum, [(6, 5)], (A, F), {0: (A, F)}),
    "transform along other axes, half of the channels": Known(
        "fft", spectrum, [(6, 5)], (HALVES, F), {0: (HALVES, F)}
    ),
    "transform along the mean": Known("fft", spectrum, [(6, 5)], (F, A), None),
    "transform along some axes of the mean": Known(
        "fft", spectrum, [(6, 5)], (A, A), {0: (A, F)}, exact=False
    ),
    "conversion from whole numbers": Known(
        "convert_element_type", lambda x: x.astype(float), [np.ones((2, 6), int)], (F, A), None
    ),
    "dense: columns of the weights": Known(
        "dot_general", dense, [(2, 5, 4), (4, 6)], (F, F, A), {1: (F, A)}
    ),
    "dense: heads of the weights": Known(
        "dot_general", dense, [(2, 5, 4), (4, 6)], (F, F, HALVES), {1: (F, HALVES)}
    ),
    "dense: mean over tokens": Known(
        "dot_general", dense, [(2, 5, 4), (4, 6)], (F, A, F), {0: (F, A, F)}
    ),
    "dense: mean over tokens and features": Known(
        "dot_general", dense, [(5, 4), (4, 6)], (A, A), {1: (F, A)}, exact=False
    ),
    "batched product: mean over the batch": Known(
        "dot_general", batched, [(2, 5, 4), (2, 4, 6)], (A, F, F), None
    ),
    "batched product: mean over batch and features": Known(
        "dot_general", batched, [(2, 5, 4), (2, 4, 6)], (A, F, A), {1: (F, F, A)}, exact=False
    ),
    "batched product: weights that repeat over the batch": Known(
        "dot_general", repeats, [(2, 5, 4), (4, 6)], (A, F, F), {0: (A, F, F)}
    ),
    "batched product: weights first, repeated over the batch": Known(
        "dot_general",
        lambda x, w: repeats(x, w, True),
        [(2, 5, 4), (4, 6)],
        (A, F, F),
        {1: (A, F, F)},
    ),
    "batched product: weights that repeat, mean over batch and features": Known(
        "dot_general", repeats, [(2, 5, 4), (4, 6)], (A, F, A), {1: (F, F, A)}, exact=False
    ),
    "two batch axes: weights that repeat over the first": Known(
        "dot_general", repeats_over_one, [(2, 3, 5, 4), (3, 4, 6)], (A, F, F, F), {0: (A, F, F, F)}
    ),
    "two batch axes: weights that differ over the second": Known(
        "dot_general", repeats_over_one, [(2, 3, 5, 4), (3, 4, 6)], (F, A, F, F), None
    ),
    "convolution: output features": Known(
        "conv_general_dilated", conv(), [(2, 5, 4), (3, 4, 6)], (F, F, A), {1: (F, F, A)}
    ),
    "grouped convolution: across groups": Known(
        "conv_general_dilated",
        conv(2),
        [(2, 5, 4), (3, 2, 6)],
        (F, F, A),
        {1: (F, F, HALVES)},
        exact=False,
    ),
    "grouped convolution: within groups": Known(
        "conv_general_dilated", conv(2), [(2, 5, 4), (3, 2, 6)], (F, F, HALVES), {1: (F, F, HALVES)}
    ),
    "grouped convolution: pairs across the border": Known(
        "conv_general_dilated",
        conv(2),
        [(2, 5, 4), (3, 2, 6)],
        (F, F, PAIRS),
        {1: (F, F, (0, 0, 1, 2, 3, 3))},
        exact=False,
    ),
    "depthwise convolution": Known(
        "conv_general_dilated", conv(6), [(2, 5, 6), (3, 1, 6)], (F, F, A), None
    ),
    "convolution: mean over positions": Known(
        "conv_general_dilated", conv(), [(2, 5, 4), (3, 4, 6)], (F, A, F), None
    ),
    "convolution: mean over positions and features": Known(
        "conv_general_dilated",
        conv(),
        [(2, 5, 4), (3, 4, 6)],
        (F, A, A),
        {1: (F, F, A)},
        exact=False,
    ),
    "cumulative sum along a zero": Known(
        "cumsum", lambda x: lax.cumsum(x, 1), [(5, 6)], (F, F), {0: (F, F)}
    ),
    "pooling a zero": Known("reduce_window_sum", window(1, 3), [(5, 6)], (F, F), {0: (F, F)}),
    "single elements that are zero": Known(
        "gather", lambda t: t[:, INDEX], [(5, 6)], (F, F), {0: (F, F)}
    ),
    "feature update of zeros at run time": Known(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        [(5, 6), (5, 2), 1],
        (F, F),
        {0: (F, F), 1: (F, F)},
    ),
    "token and feature mean of a feature update": Known(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        [(5, 6), (5, 2), 1],
        (A, A),
        {0: (A, F), 1: (A, F)},
        exact=False,
    ),
    "rows of a table, mean over rows and features": Known(
        "gather", lambda t: t[INDEX], [(5, 6)], (A, A), {0: (F, A)}, exact=False
    ),
    "reduction of another axis": Known(
        "reduce_sum", lambda x: x.sum(0), [(5, 6)], (A,), {0: (F, A)}
    ),
    "cumulative sum of another axis": Known(
        "cumsum", lambda x: lax.cumsum(x, 0), [(5, 6)], (F, A), {0: (F, A)}
    ),
    "cumulative sum along the mean": Known(
        "cumsum", lambda x: lax.cumsum(x, 1), [(5, 6)], (F, A), None
    ),
    "pooling other axes": Known("reduce_window_sum", window(3, 1), [(5, 6)], (F, A), {0: (F, A)}),
    "pooling along the mean": Known("reduce_window_sum", window(1, 3), [(5, 6)], (F, A), None),
    "pooling along one of the means": Known(
        "reduce_window_sum", window(3, 1), [(5, 6)], (A, A), {0: (F, A)}, exact=False
    ),
    "splitting an axis": Known(
        "reshape", lambda x: x.reshape(2, 2, 3), [(2, 6)], (F, F, A), {0: (F, HALVES)}
    ),
    "splitting an axis, mean over its slow part": Known(
        "reshape", lambda x: x.reshape(2, 2, 3), [(2, 6)], (F, A, F), {0: (F, (0, 1, 2, 0, 1, 2))}
    ),
    "splitting through groups": Known(
        "reshape", lambda x: x.reshape(2, 6), [(2, 2, 3)], (F, PAIRS), None
    ),
    "merging: a region of one half": Known(
        "reshape",
        lambda x: x.reshape(2, 6),
        [(2, 2, 3)],
        (A, (0, 1, 2, -1, -1, -1)),
        {0: (A, (0, -1), F)},
    ),
    "merging: a region across halves asks for all positions": Known(
        "reshape", lambda x: x.reshape(2, 6), [(2, 2, 3)], (A, (0, 1, 2, 3, -1, -1)), {0: (A, F, F)}
    ),
    "merging: groups across halves are given up": Known(
        "reshape", lambda x: x.reshape(2, 6), [(2, 2, 3)], (A, PAIRS), {0: (A, F, F)}, exact=False
    ),
    "merging and splitting elsewhere": Known(
        "reshape", lambda x: x.reshape(6, 4), [(4, 6)], (F, A), None
    ),
    "new axes: a mean along them is nothing new": Known(
        "broadcast_in_dim",
        lambda x: jnp.broadcast_to(x[:, None], (2, 3, 6)),
        [(2, 6)],
        (F, A, A),
        {0: (F, A)},
    ),
    "new axes only: the operand must be zero": Known(
        "broadcast_in_dim",
        lambda x: lax.broadcast_in_dim(x, (2, 6), (0,)),
        [(2,)],
        (F, A),
        {0: (F,)},
    ),
    "expanded axis: the operand must be zero": Known(
        "broadcast_in_dim",
        lambda x: lax.broadcast_in_dim(x, (2, 6), (0, 1)),
        [(2, 1)],
        (F, A),
        {0: (F, F)},
    ),
    "tiles: mean along another axis": Known(
        "tile", lambda x: jnp.tile(x, (2, 1)), [(5, 6)], (F, A), {0: (F, A)}
    ),
    "tiles of one position": Known(
        "tile", lambda x: jnp.tile(x, (1, 3)), [(5, 1)], (A, A), {0: (A, F)}
    ),
    "tiles along the mean": Known(
        "tile", lambda x: jnp.tile(x, (1, 2)), [(5, 3)], (A, A), {0: (A, F)}, exact=False
    ),
    "unstack: a region": Known(
        "unstack", lambda x: tuple(lax.unstack(x, 0)), [(3, 2, 6)], (F, A), {0: ((0, -1, -1), F, A)}
    ),
    "stack: a region of one operand": Known(
        "stack",
        lambda *xs: lax.stack(list(xs), 0),
        [(2, 6), (2, 6)],
        ((-1, 0), F, A),
        {1: (F, A)},
        exact=False,
    ),
    "stack: mean along other axes": Known(
        "stack",
        lambda *xs: lax.stack(list(xs), 1),
        [(2, 6), (2, 6)],
        (F, F, A),
        {0: (F, A), 1: (F, A)},
    ),
    "slice: a region": Known(
        "slice", lambda x: x[:, 2:5], [(2, 6)], (F, A), {0: (F, (-1, -1, 0, 0, 0, -1))}
    ),
    "slice of tokens": Known("slice", lambda x: x[1:3], [(4, 6)], (F, A), {0: ((-1, 0, 1, -1), A)}),
    "slice with a step": Known(
        "slice", lambda x: x[:, ::2], [(2, 6)], (F, A), {0: (F, (0, -1, 0, -1, 0, -1))}
    ),
    "split: its own region": Known(
        "split",
        lambda x: lax.split(x, (2, 4), 1),
        [(2, 6)],
        (F, A),
        {0: (F, (-1, -1, 0, 0, 0, 0))},
        position=1,
    ),
    "reversed": Known(
        "rev",
        lambda x: lax.rev(x, (1,)),
        [(2, 6)],
        (F, (0, 0, 0, -1, 1, 1)),
        {0: (F, (0, 0, -1, 1, 1, 1))},
    ),
    "transposed": Known("transpose", jnp.transpose, [(6, 2)], (F, HALVES), {0: (HALVES, F)}),
    "concatenated along another axis": Known(
        "concatenate",
        lambda x, y: jnp.concatenate([x, y], 0),
        [(2, 6), (3, 6)],
        (F, A),
        {0: (F, A), 1: (F, A)},
    ),
    "concatenated along the mean": Known(
        "concatenate",
        lambda x, y: jnp.concatenate([x, y], 1),
        [(2, 2), (2, 4)],
        (F, A),
        {0: (F, A), 1: (F, A)},
        exact=False,
    ),
    "concatenated: a region inside one operand": Known(
        "concatenate",
        lambda x, y: jnp.concatenate([x, y], 1),
        [(2, 2), (2, 4)],
        (F, (-1, -1, -1, 0, 0, 0)),
        {1: (F, (-1, 0, 0, 0))},
        exact=False,
    ),
    "padded with zeros": Known(
        "pad", lambda x: jnp.pad(x, ((0, 0), (1, 2))), [(2, 3)], (F, A), {0: (F, A)}, exact=False
    ),
    "padded at the end": Known(
        "pad", lambda x: jnp.pad(x, ((0, 0), (0, 2))), [(2, 3)], (F, A), {0: (F, A)}, exact=False
    ),
    "padded with ones": Known(
        "pad", lambda x: lax.pad(x, 1.0, [(0, 0, 0), (1, 2, 0)]), [(2, 3)], (F, A), None
    ),
    "padded with ones along another axis": Known(
        "pad", lambda x: lax.pad(x, 1.0, [(1, 2, 0), (0, 0, 0)]), [(2, 3)], (F, A), None
    ),
    "padded with an input": Known(
        "pad", lambda x, v: lax.pad(x, v, [(0, 0, 0), (1, 2, 0)]), [(2, 3), ()], (F, A), None
    ),
    "cropped by padding": Known(
        "pad", lambda x: lax.pad(x, 0.0, [(0, 0, 0), (-1, 0, 0)]), [(2, 6)], (F, A), None
    ),
    "cropped by padding, padded along another axis": Known(
        "pad", lambda x: lax.pad(x, 0.0, [(0, -1, 0), (1, 2, 0)]), [(2, 6)], (F, A), None
    ),
    "rows of a table": Known("gather", lambda t: t[INDEX], [(5, 6)], (F, A), {0: (F, A)}),
    "rows of a table, mean over the rows": Known(
        "gather", lambda t: t[INDEX], [(5, 6)], (A, F), None
    ),
    "single elements of a table": Known("gather", lambda t: t[:, INDEX], [(5, 6)], (F, A), None),
    "windows of a table": Known("gather", lambda t: t[INDEX, 2:4], [(5, 6)], (F, A), None),
    "missing rows filled with ones": Known(
        "gather",
        lambda t: jnp.take(t, INDEX, 0, mode="fill", fill_value=1.0),
        [(5, 6)],
        (F, A),
        None,
    ),
    "missing rows filled with numbers that are none": Known(
        "gather",
        lambda t: jnp.take(t, INDEX, 0, mode="fill", fill_value=jnp.nan),
        [(5, 6)],
        (F, A),
        {0: (F, A)},
    ),
    "nothing padded to something": Known(
        "pad", lambda x: jnp.pad(x, ((0, 0), (1, 2))), [(2, 0)], (A, F), {0: (A, F)}, exact=False
    ),
    "token slice at run time": Known(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)),
        [(5, 6), 1],
        (F, A),
        {0: (F, A)},
    ),
    "feature slice at run time": Known(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (0, i), (5, 2)),
        [(5, 6), 1],
        (F, A),
        None,
    ),
    "token update at run time": Known(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
        [(5, 6), (2, 6), 1],
        (F, A),
        {0: (F, A), 1: (F, A)},
    ),
    "feature update at run time": Known(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        [(5, 6), (5, 2), 1],
        (F, A),
        None,
    ),
    "rows written": Known(
        "scatter", lambda x, u: x.at[INDEX].set(u), [(5, 6), (2, 6)], (F, A), {0: (F, A), 2: (F, A)}
    ),
    "rows written at two indices": Known(
        "scatter",
        lambda x, u: x.at[INDEX, INDEX].set(u),
        [(5, 4, 6), (2, 6)],
        (F, F, A),
        {0: (F, F, A), 2: (F, A)},
    ),
    "rows increased": Known(
        "scatter-add",
        lambda x, u: x.at[INDEX].add(u),
        [(5, 6), (2, 6)],
        (F, A),
        {0: (F, A), 2: (F, A)},
    ),
    "single elements increased": Known(
        "scatter-add", lambda x, u: x.at[:, INDEX].add(u), [(5, 6), (5, 2)], (F, A), None
    ),
    "rows replaced by a function of themselves": Known(
        "scatter", lambda x: x.at[INDEX].apply(jnp.exp), [(5, 6)], (F, A), None
    ),
}

PUSHES: dict[str, Known] = {
    "per-token operand of a sum": Known("add", jnp.add, [(2, 1), (2, 6)], (F, F), {0: (F, A)}),
    "scalar operand of a sum": Known("add", jnp.add, [(2, 6), ()], (), {0: (A, A)}, 1),
    "product with a per-channel factor": Known("mul", times, [(2, 6), (1, 6)], (F, A), None),
    "shifted scale": Known("mul", times, [(2, 6), (1, 6)], (F, A), None, 1),
    "per-token shift of a per-token value": Known(
        "mul", times, [(2, 1), (2, 6)], (F, F), {0: (F, F)}
    ),
    "product with a per-token factor": Known("mul", times, [(2, 6), (2, 1)], (F, A), {0: (F, A)}),
    "product with one number, spread in another shape": Known(
        "mul",
        lambda x, g: x * jnp.broadcast_to(g, (2, 6)).reshape(3, 4),
        [(3, 4), ()],
        (A, A),
        {0: (A, A)},
    ),
    "shift of single elements of a product": Known(
        "mul", times, [(2, 6), (1, 6)], (F, F), {0: (F, F)}
    ),
    "shift of single elements of a choice": Known(
        "select_n", jnp.where, [np.eye(2, 6) > 0, (2, 6), (2, 6)], (F, F), {0: (F, F)}, 1
    ),
    "product with a per-channel factor, both axes shifted": Known(
        "mul", times, [(2, 6), (1, 6)], (A, A), {0: (A, F)}
    ),
    "shifted divisor": Known("div", jnp.divide, [(2, 6), (2, 1)], (F, F), None, 1),
    "choice by a shifted value": Known(
        "select_n", jnp.where, [np.eye(2, 6) > 0, (2, 6), (2, 6)], (F, A), None
    ),
    "choice per element": Known(
        "select_n", jnp.where, [np.eye(2, 6) > 0, (2, 6), (2, 6)], (F, A), None, 1
    ),
    "conversion to whole numbers": Known(
        "convert_element_type", lambda x: x.astype(int), [(2, 6)], (F, A), None
    ),
    "barrier: its own output": Known(
        "optimization_barrier",
        lambda x, y: lax.optimization_barrier((x, y)),
        [(2, 6), (6,)],
        (A,),
        {1: (A,)},
        1,
    ),
    "dense: columns of the weights": Known(
        "dot_general", dense, [(2, 5, 4), (4, 6)], (F, A), {0: (F, F, A)}, 1
    ),
    "dense: what is summed away": Known(
        "dot_general", dense, [(2, 5, 4), (4, 6)], (F, F, A), {0: (F, F, F)}
    ),
    "batched product: across the batch": Known(
        "dot_general", batched, [(2, 5, 4), (2, 4, 6)], (A, F, F), {0: (F, F, F)}
    ),
    "batched product: weights that repeat over the batch": Known(
        "dot_general", repeats, [(2, 5, 4), (4, 6)], (A, F, F), {0: (A, F, F)}
    ),
    "two batch axes: weights that repeat over the first": Known(
        "dot_general", repeats_over_one, [(2, 3, 5, 4), (3, 4, 6)], (A, A, A, F), {0: (A, F, A, F)}
    ),
    "convolution: shifted image": Known(
        "conv_general_dilated", conv(), [(2, 5, 4), (3, 4, 6)], (F, F, A), None
    ),
    "convolution: output features": Known(
        "conv_general_dilated", conv(), [(2, 5, 4), (3, 4, 6)], (F, F, A), {0: (F, F, A)}, 1
    ),
    "grouped convolution: across groups": Known(
        "conv_general_dilated", conv(2), [(2, 5, 4), (3, 2, 6)], (F, F, A), {0: (F, F, HALVES)}, 1
    ),
    "depthwise convolution": Known(
        "conv_general_dilated", conv(6), [(2, 5, 6), (3, 1, 6)], (F, F, A), {0: (F, F, F)}, 1
    ),
    "reduction along the mean": Known(
        "reduce_sum", lambda x: x.sum(1), [(5, 6)], (F, A), {0: (F,)}
    ),
    "cumulative sum along the mean": Known(
        "cumsum", lambda x: lax.cumsum(x, 1), [(5, 6)], (F, A), {0: (F, F)}
    ),
    "pooling along the mean": Known(
        "reduce_window_sum", window(1, 3), [(5, 6)], (F, A), {0: (F, F)}
    ),
    "splitting an axis": Known(
        "reshape", lambda x: x.reshape(2, 2, 3), [(2, 6)], (F, HALVES), {0: (F, F, A)}
    ),
    "splitting through groups": Known(
        "reshape", lambda x: x.reshape(2, 2, 3), [(2, 6)], (F, PAIRS), None
    ),
    "splitting through a region: given up": Known(
        "reshape", lambda x: x.reshape(2, 2, 3), [(2, 6)], (A, (0, 1, 2, 3, -1, -1)), {0: (A, F, F)}
    ),
    "slice along the mean": Known("slice", lambda x: x[:, 2:5], [(2, 6)], (F, A), {0: (F, A)}),
    "slice of groups": Known(
        "slice", lambda x: x[:, 2:5], [(2, 6)], (F, HALVES), {0: (F, (0, 1, 1))}
    ),
    "unstack: a shifted region": Known(
        "unstack", lambda x: tuple(lax.unstack(x, 0)), [(3, 2, 6)], ((-1, 0, -1), F, A), {1: (F, A)}
    ),
    "split along the mean": Known(
        "split", lambda x: lax.split(x, (2, 4), 1), [(2, 6)], (F, A), {0: (F, A), 1: (F, A)}
    ),
    "concatenated along the mean": Known(
        "concatenate",
        lambda x, y: jnp.concatenate([x, y], 1),
        [(2, 2), (2, 4)],
        (F, A),
        {0: (F, (-1, -1, 0, 0, 0, 0))},
        1,
    ),
    "padded along the mean": Known(
        "pad",
        lambda x: lax.pad(x, 1.0, [(0, 0, 0), (1, 1, 1)]),
        [(2, 2)],
        (F, A),
        {0: (F, (-1, 0, -1, 0, -1))},
    ),
    "cropped by padding, padded along another axis": Known(
        "pad", lambda x: lax.pad(x, 0.0, [(0, -1, 0), (1, 2, 0)]), [(2, 6)], (F, A), None
    ),
    "shifted padding": Known(
        "pad", lambda x, v: lax.pad(x, v, [(0, 0, 0), (1, 2, 0)]), [(2, 3), ()], (), None, 1
    ),
    "tiles of one position": Known(
        "tile", lambda x: jnp.tile(x, (1, 3)), [(5, 1)], (A, F), {0: (A, A)}
    ),
    "tiles along the mean": Known(
        "tile", lambda x: jnp.tile(x, (1, 2)), [(5, 3)], (A, A), {0: (A, F)}
    ),
    "rows of a table": Known("gather", lambda t: t[INDEX], [(5, 6)], (F, A), {0: (F, A)}),
    "ragged product: shifted columns": Known(
        "ragged_dot_general", ragged, [(5, 4), (3, 4, 6)], (A, A, HALVES), {0: (F, HALVES)}, 1
    ),
    "ragged product: shifted rows": Known(
        "ragged_dot_general", ragged, [(5, 4), (3, 4, 6)], (A, A), {0: (F, F)}
    ),
    "transform along other axes": Known("fft", spectrum, [(6, 5)], (A, A), {0: (A, F)}),
    "transform along the mean": Known("fft", spectrum, [(6, 5)], (F, A), {0: (F, F)}),
    "rows of a table, one shift for all": Known(
        "gather", lambda t: t[INDEX], [(5, 6)], (A, A), {0: (F, A)}
    ),
    "single elements of a table": Known(
        "gather", lambda t: t[:, INDEX], [(5, 6)], (F, A), {0: (F, F)}
    ),
    "feature update at run time": Known(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        [(5, 6), (5, 2), 1],
        (A, A),
        {0: (A, F)},
    ),
    "rows overwritten": Known(
        "scatter", lambda x, u: x.at[INDEX].set(u), [(5, 6), (2, 6)], (A, A), {0: (F, A)}
    ),
    "rows replaced by a function of themselves": Known(
        "scatter", lambda x: x.at[INDEX].apply(jnp.exp), [(5, 6)], (F, A), None
    ),
    "rows written": Known(
        "scatter", lambda x, u: x.at[INDEX].set(u), [(5, 6), (2, 6)], (A, A), {0: (F, A)}, 2
    ),
    "rows written at two indices": Known(
        "scatter",
        lambda x, u: x.at[INDEX, INDEX].set(u),
        [(5, 4, 6), (2, 6)],
        (F, A),
        {0: (F, F, A)},
        2,
    ),
}


def operands_of(known: Known) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.normal(0.5, 1, x) if isinstance(x, tuple) else x for x in known.operands]


def labelled(shape: tuple[int, ...], entries: Sequence[Given]) -> AxisSet:
    return AxisSet(shape, tuple(Labels(e) if isinstance(e, tuple) else e for e in entries))


@pytest.mark.parametrize("question", PULLS)
def test_pull(question: str) -> None:
    known = PULLS[question]
    one = find(known.primitive, Program(known.fn, operands_of(known)), 2)[0]
    along = labelled(one.context.out_shape(known.position), known.asked)
    answer = one.rule.pull(one.context, known.position, along)
    if known.answer is None:
        assert isinstance(answer, Opaque)
        return
    assert not isinstance(answer, Opaque)
    assert {i: s.entries for i, s in answer.needs} == known.answer
    assert answer.exact == known.exact
    check_pull(one, known.position, along)


@pytest.mark.parametrize("question", PUSHES)
def test_push(question: str) -> None:
    known = PUSHES[question]
    one = find(known.primitive, Program(known.fn, operands_of(known)), 2)[0]
    along = labelled(one.context.in_shape(known.position), known.asked)
    answer = one.rule.push(one.context, known.position, along)
    if known.answer is None:
        assert isinstance(answer, Opaque)
        return
    assert not isinstance(answer, Opaque)
    assert {i: s.entries for i, s in answer} == known.answer
    check_push(one, known.position, along)


@pytest.mark.parametrize("name", UNARY.split())
def test_nonlinear_primitives_neither_carry_a_mean_nor_hide_a_shift(name: str) -> None:
    one = find(name, Program(getattr(lax, name), [np.full((2, 3), 0.5)]), 1)[0]
    along = AxisSet.over((2, 3), (1,))
    assert isinstance(one.rule.pull(one.context, 0, along), Opaque)
    assert isinstance(one.rule.push(one.context, 0, along), Opaque)


def test_nonlinear_rules_only_say_what_is_uniform() -> None:
    linear = {"convert_element_type", "mul", "div", "dot_general", "conv_general_dilated"}
    silent = {n for n, r in RULES.items() if r.uniform} - linear
    assert silent > {"sin", "reduce_max"}
    bare = Rule()
    for name in silent:
        assert RULES[name].pull is bare.pull
        assert RULES[name].push is bare.push


def looped(xs: Any, c: Any) -> Any:
    """All that loops and conditionals do to a value: (2, 6) per iteration of 4."""
    c, ys = lax.scan(lambda c, x: (c + x, c), c, xs)
    return lax.cond(c.sum() > 0, lambda: c, lambda: -c), ys


BOTH = {0: (F, A), 1: (F, A)}
LOOP_PULLS: list[tuple[str, Sequence[Given], Answer, bool]] = [
    ("loop_carry", (F, A), BOTH, True),
    ("loop_result", (F, A), BOTH, True),
    ("branch_result", (F, A), BOTH, True),
    ("loop_slice", (F, A), {0: (F, F, A)}, True),
    ("loop_slice", (A, HALVES), {0: (F, A, HALVES)}, True),
    ("loop_stack", (F, F, A), {0: (F, A)}, True),
    ("loop_stack", (F, F, F), {0: (F, F)}, True),
    ("loop_stack", (A, F, A), {0: (F, A)}, False),
    ("loop_stack", (A, F, F), None, False),
]
LOOP_PUSHES: list[tuple[str, int, Sequence[Given], Answer]] = [
    ("loop_carry", 0, (F, A), {0: (F, A)}),
    ("loop_result", 1, (F, A), {0: (F, A)}),
    ("branch_result", 1, (F, A), {0: (F, A)}),
    ("loop_slice", 0, (F, F, A), {0: (F, A)}),
    ("loop_slice", 0, (F, A, HALVES), {0: (A, HALVES)}),
    ("loop_slice", 0, (A, F, F), {0: (F, F)}),
    ("loop_stack", 0, (F, A), {0: (F, F, A)}),
]


@pytest.mark.parametrize(("name", "asked", "answer", "exact"), LOOP_PULLS)
def test_pull_of_loops(name: str, asked: Sequence[Given], answer: Answer, exact: bool) -> None:
    ctx = equation(looped, (4, 2, 6), (2, 6), primitive=name)
    pulled = RULES[name].pull(ctx, 0, labelled(ctx.out_shape(), asked))
    assert isinstance(pulled, Opaque) == (answer is None)
    if not isinstance(pulled, Opaque):
        assert {i: s.entries for i, s in pulled.needs} == answer
        assert all(s.shape == ctx.in_shape(i) for i, s in pulled.needs)
        assert pulled.exact == exact


@pytest.mark.parametrize(("name", "operand", "asked", "answer"), LOOP_PUSHES)
def test_push_of_loops(name: str, operand: int, asked: Sequence[Given], answer: Answer) -> None:
    ctx = equation(looped, (4, 2, 6), (2, 6), primitive=name)
    pushed = RULES[name].push(ctx, operand, labelled(ctx.in_shape(operand), asked))
    assert not isinstance(pushed, Opaque)
    assert {i: s.entries for i, s in pushed} == answer
    assert all(s.shape == ctx.out_shape(i) for i, s in pushed)


LONG = 1 << 23
"""More positions than labels are spelled out for."""
LONG_PULLS: dict[str, Callable[[Any], Any]] = {
    "slice": lambda x: x[:, 3:],
    "split": lambda x: lax.split(x, (3, LONG - 3), 1),
}
LONG_PUSHES: dict[str, Callable[[Any], Any]] = {
    "concatenate": lambda x: jnp.concatenate([x, jnp.zeros((2, 3))], 1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0))),
}


def test_pull_through_slices_of_axes_too_long_for_regions() -> None:
    for name, fn in LONG_PULLS.items():
        ctx = equation(fn, (2, LONG), primitive=name)
        pull, shape = RULES[name].pull, ctx.out_shape()
        answer = pull(ctx, 0, AxisSet.over(shape, (0,)))
        assert not isinstance(answer, Opaque)
        assert answer.needs == ((0, AxisSet.over((2, LONG), (0,))),)
        assert isinstance(pull(ctx, 0, AxisSet.over(shape, (1,))), Opaque)
        assert isinstance(pull(ctx, 0, AxisSet.over(shape, (0, 1))), Opaque)


def test_pull_through_a_slice_of_several_axes_one_of_them_too_long() -> None:
    ctx = equation(lambda x: x[1:, 3:], (3, LONG), primitive="slice")
    for axes in ((0,), (1,), (0, 1)):
        along = AxisSet.over(ctx.out_shape(), axes)
        assert isinstance(RULES["slice"].pull(ctx, 0, along), Opaque)


def test_push_into_axes_too_long_for_regions() -> None:
    for name, fn in LONG_PUSHES.items():
        ctx = equation(fn, (2, LONG), primitive=name)
        push, shape = RULES[name].push, ctx.in_shape(0)
        assert push(ctx, 0, AxisSet.over(shape, (0,))) == (
            (0, AxisSet.over(ctx.out_shape(), (0,))),
        )
        assert isinstance(push(ctx, 0, AxisSet.over(shape, (1,))), Opaque)


def opaque_things(x: Any, key: Any) -> Any:
    """What makes, looks up and orders numbers carries nothing."""
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))
    wrapped = jax.random.bits(jax.random.wrap_key_data(jax.random.key_data(first)))
    old = jax.extend.random.threefry_2x32(key, jnp.arange(4, dtype=jnp.uint32))
    looked_up = [lax.top_k(x, 2), lax.sort(x), lax.iota(int, 3), x.view(jnp.uint64)]
    rounded = x.astype(jnp.float8_e4m3fn), lax.reduce_precision(x, 4, 3)
    return second, wrapped, old, looked_up, rounded


def test_opaque_primitives_are_known_and_have_no_rule() -> None:
    operands = jax.ShapeDtypeStruct((5,), float), jax.ShapeDtypeStruct((2,), jnp.uint32)
    graph = flatten(jax.make_jaxpr(opaque_things)(*operands))
    facts = Facts(graph)
    for op in graph.ops:
        facts.context(op)
    assert not facts.unknown
    assert {op.name for op in graph.ops} >= {"random_bits", "threefry2x32", "sort", "top_k", "iota"}


CLASSES: dict[str, Collection[str]] = {
    "rule": RULES,
    "walked into": WALKED,
    "between devices": EXCHANGES,
    "opaque": NOT_CARRYING,
    "not looked into": UNSEEN,
}


def named_in(*modules: ModuleType) -> set[str]:
    """The primitives that modules know by name."""
    return {v.name for m in modules for v in vars(m).values() if isinstance(v, Primitive)}


def loaded_of_jax() -> list[ModuleType]:
    """The modules of jax, without experiments; what kernels are written with stays in kernels."""
    apart = ("pallas", "mosaic", "triton", "thunky", "experimental")
    loaded = [(name, m) for name, m in sys.modules.items() if name.split(".")[0] == "jax"]
    return [m for name, m in loaded if not any(part in name for part in apart)]


def test_every_primitive_of_jax_is_accounted_for() -> None:
    """It has a rule, or is left alone for a reason: a new one has to be looked at."""
    everything = named_in(primitives, lax) | named_in(*loaded_of_jax()) | {pallas_call.__name__}
    assert len(everything) > 250
    assert not everything.difference(*CLASSES.values())


def test_a_primitive_is_of_one_kind() -> None:
    for (first, names), (second, others) in combinations(CLASSES.items(), 2):
        assert not {*names} & {*others}, f"{first} and {second}"
    assert all({**NOT_CARRYING, **UNSEEN}.values())


def test_what_is_not_looked_into_is_counted() -> None:
    def fn(x: Any) -> Any:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    graph = flatten(jax.make_jaxpr(fn)(jnp.ones(3)))
    facts = Facts(graph)
    assert not facts.uniform(graph.ops[0].outputs[0], AxisSet.over((3,), (0,)))
    assert [op.name for op in facts.unknown.values()] == ["pure_callback"]


def test_kernel_with_a_symbolic_number_of_features() -> None:
    (n,) = jax.export.symbolic_shape("n")
    ctx = equation(conv(), (2, 5, 4), (3, 4, n), primitive="conv_general_dilated")
    pulled = RULES["conv_general_dilated"].pull(ctx, 0, AxisSet.over((2, 5, n), (2,)))
    assert not isinstance(pulled, Opaque)
    assert pulled.needs == ((1, AxisSet.over((3, 4, n), (2,))),)


def test_a_primitive_has_one_rule() -> None:
    with pytest.raises(ValueError, match="'sin' has a rule already"):
        register("sin", Rule())


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "argmax": lambda x, d: x.argmax(d),
    "argmin": lambda x, d: x.argmin(d),
    "reduce_and": lambda x, d: (x > 0).all(d),
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_or": lambda x, d: (x > 0).any(d),
    "reduce_prod": jnp.prod,
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize(
    ("axis", "asked", "needed"),
    [
        (0, (F, A), (F, F, A)),
        (0, (A, HALVES), (F, A, HALVES)),
        (1, (A, HALVES), (A, F, HALVES)),
        (2, (A, F), (A, F, F)),
        (2, ((0, 0, 1, -1), A), ((0, 0, 1, -1), A, F)),
    ],
)
def test_uniform_through_reductions(
    name: str, axis: int, asked: Sequence[Given], needed: Sequence[Given]
) -> None:
    """They make the same of the same numbers: of whole slices along the axis they reduce."""
    ctx = equation(lambda x: REDUCTIONS[name](x, axis), (4, 2, 6), primitive=name)
    rule = RULES[name]
    assert rule.uniform is not None
    answer = rule.uniform(ctx, 0, labelled(ctx.out_shape(), asked))
    assert not isinstance(answer, Opaque)
    assert answer.needs == ((0, labelled((4, 2, 6), needed)),)


MAPS: list[Callable[[Any], Any]] = [
    lambda x: x.astype(int),
    lambda x: x.astype(int) * x.astype(int),
    lambda x: lax.div(x.astype(int), x.astype(int)),
    lambda x: jnp.where(x > 0, x, 1.0),
    lambda x: jnp.where(x > 0, x.astype(int), 1),
    lambda x: jnp.exp(x) - x / x,
    lambda x: jnp.exp(x - x.max(1, keepdims=True)),
    lambda x: jnp.broadcast_to(x, (3, 2, 6)).argmin(0),
]


@pytest.mark.parametrize("number", range(len(MAPS)))
def test_uniform_through_elementwise_operations(number: int) -> None:
    for fn, expected in ((lambda v: MAPS[number](repeated(v)), True), (MAPS[number], False)):
        operand = jax.ShapeDtypeStruct((2,) if expected else (2, 6), float)
        graph = flatten(jax.make_jaxpr(fn)(operand))
        (out,) = graph.outputs
        assert Facts(graph).uniform(out, AxisSet.over((2, 6), (1,))) == expected
