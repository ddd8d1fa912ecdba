"""What the rules must answer to hand-picked questions, above all to those that are near misses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
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
from jax_lnfold.rules import RULES, Context, Opaque, Rule
from jax_lnfold.rules.example import equation
from jax_lnfold.rules.registry import register
from tests.rules.rule_examples import UNARY, Program
from tests.rules.test_rules import find

F, A = FREE, ALL
INDEX = np.array([2, 0])
Given = str | tuple[int, ...]
Answer = Mapping[int, Sequence[Given]] | None
"""Entries for each operand (pull) or output (push) named; None where the rule must refuse."""


class Asked(NamedTuple):
    """A question to a rule, about an output (pull) or an operand (push)."""

    rule: str
    question: str
    along: Sequence[Given]
    answer: Answer
    position: int = 0
    exact: bool = True


class Known(NamedTuple):
    """What is asked about the first equation of `primitive` in a function."""

    primitive: str
    fn: Callable[..., Any]
    operands: Sequence[Any]
    asked: Asked


HALVES = (0, 0, 0, 1, 1, 1)
NAMED: dict[str, Given] = {"F": FREE, "A": ALL, "H": HALVES, "P": (0, 0, 1, 1, 2, 2)}


def entries(text: str) -> tuple[Given, ...]:
    """One for each axis: free, all, halves or pairs of six, or labels, as in ``F[001-]``."""
    found = re.findall(r"\[(.*?)\]|(\w)", text)
    spelled = ((tuple(int(c) if c != "-" else -1 for c in labels), name) for labels, name in found)
    return tuple(NAMED[name] if name else labels for labels, name in spelled)


def ask(
    rule: str, question: str, along: str, answer: str | None, position: int = 0, exact: bool = True
) -> Asked:
    """A question in short: of the answer one part for each operand or output, or a point."""
    parts = None if answer is None else enumerate(answer.split())
    told = None if parts is None else {i: entries(part) for i, part in parts if part != "."}
    return Asked(rule, question, entries(along), told, position, exact)


pull, push = partial(ask, "pull"), partial(ask, "push")


def about(
    primitive: str, fn: Callable[..., Any], operands: Sequence[Any]
) -> Callable[..., list[Known]]:
    return lambda *questions: [Known(primitive, fn, operands, asked) for asked in questions]


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


KNOWN: list[Known] = [
    *about("add", jnp.add, [(2, 6), (2, 6)])(pull("sum: both operands", "FA", "FA FA")),
    *about("add", jnp.add, [(2, 6), (2, 1)])(
        pull("sum with a per-token operand: that one must be zero", "FA", "FA FF")
    ),
    *about("sub", jnp.subtract, [(2, 6), ()])(pull("sum with a scalar", "FA", "FA ()")),
    *about("mul", times, [(2, 6), (2, 1)])(
        pull("product with a per-token factor", "FA", "FA"),
        pull("product with a per-token factor, mean over tokens", "AA", None),
        push("product with a per-token factor", "FA", "FA"),
    ),
    *about("mul", lambda g, v: g * repeated(v), [(2, 1), (2,)])(
        pull("product of two that are uniform: rather zero-mean than zero", "FA", ". FA")
    ),
    *about("mul", lambda g, v: repeated(v) * g, [(2, 1), (2,)])(
        pull("product of two that are uniform, the other way round", "FA", "FA")
    ),
    *about("mul", times, [(2, 6), (1, 6)])(
        pull("product with a per-channel factor", "FA", None),
        pull("product with a per-channel factor, other mean", "AF", "AF"),
        push("product with a per-channel factor", "FA", None),
        push("shifted scale", "FA", None, 1),
        push("shift of single elements of a product", "FF", "FF"),
        push("product with a per-channel factor, both axes shifted", "AA", "AF"),
    ),
    *about("mul", lambda x, g: x * jnp.repeat(g, 3), [(2, 6), (2,)])(
        pull("product with a per-head factor", "FH", "FH"),
        pull("product with a per-head factor, whole width", "FA", None),
        pull("product with a per-head factor, groups across heads", "FP", None),
    ),
    *about("div", jnp.divide, [(2, 6), (2, 1)])(
        pull("quotient with a per-token divisor", "FA", "FA"),
        push("shifted divisor", "FF", None, 1),
    ),
    *about("div", jnp.divide, [(2, 1), (2, 6)])(
        pull("quotient of a per-token dividend", "FA", None)
    ),
    *about("select_n", jnp.where, [np.eye(2, 6) > 0, (2, 6), (2, 6)])(
        pull("choice per element", "FA", None),
        push("shift of single elements of a choice", "FF", "FF", 1),
        push("choice by a shifted value", "FA", None),
        push("choice per element", "FA", None, 1),
    ),
    *about("select_n", lambda x, y: jnp.where(x[:, :1] > 0, x, y), [(2, 6), (2, 6)])(
        pull("choice per token", "FA", ". FA FA"),
        pull("choice per token, mean over tokens", "AF", None),
    ),
    *about("convert_element_type", lambda x: x.astype(int), [(2, 6)])(
        pull("conversion to whole numbers", "FA", None),
        push("conversion to whole numbers", "FA", None),
    ),
    *about("complex", lax.complex, [(2, 6), (2, 6)])(
        pull("real and imaginary part", "FA", "FA FA")
    ),
    *about("abs", jnp.abs, [np.ones((2, 6)) * 1j])(pull("size of a complex number", "FA", None)),
    *about("mul", lambda z: z * z.conj(), [np.ones((2, 6)) * 1j])(
        pull("square of a complex number", "FA", None)
    ),
    *about("ragged_dot_general", ragged, [(5, 4), (3, 4, 6)])(
        pull("ragged product: columns of all kernels", "FA", ". FFA"),
        pull("ragged product: mean over the rows", "AF", None),
        pull("ragged product: mean over rows and columns", "AA", None),
        push("ragged product: shifted columns", "AAH", "FH", 1),
        push("ragged product: shifted rows", "AA", "FF"),
    ),
    *about("fft", spectrum, [(6, 5)])(
        pull("transform along other axes", "AF", "AF"),
        pull("transform along other axes, half of the channels", "HF", "HF"),
        pull("transform along the mean", "FA", None),
        pull("transform along some axes of the mean", "AA", "AF", exact=False),
        push("transform along other axes", "AA", "AF"),
        push("transform along the mean", "FA", "FF"),
    ),
    *about("convert_element_type", lambda x: x.astype(float), [np.ones((2, 6), int)])(
        pull("conversion from whole numbers", "FA", None)
    ),
    *about("dot_general", dense, [(2, 5, 4), (4, 6)])(
        pull("dense: columns of the weights", "FFA", ". FA"),
        pull("dense: heads of the weights", "FFH", ". FH"),
        pull("dense: mean over tokens", "FAF", "FAF"),
        push("dense: columns of the weights", "FA", "FFA", 1),
        push("dense: what is summed away", "FFA", "FFF"),
    ),
    *about("dot_general", dense, [(5, 4), (4, 6)])(
        pull("dense: mean over tokens and features", "AA", ". FA", exact=False)
    ),
    *about("dot_general", batched, [(2, 5, 4), (2, 4, 6)])(
        pull("batched product: mean over the batch", "AFF", None),
        pull("batched product: mean over batch and features", "AFA", ". FFA", exact=False),
        push("batched product: across the batch", "AFF", "FFF"),
    ),
    *about("dot_general", repeats, [(2, 5, 4), (4, 6)])(
        pull("batched product: weights that repeat over the batch", "AFF", "AFF"),
        pull(
            "batched product: weights that repeat, mean over batch and features",
            "AFA",
            ". FFA",
            exact=False,
        ),
        push("batched product: weights that repeat over the batch", "AFF", "AFF"),
    ),
    *about("dot_general", lambda x, w: repeats(x, w, True), [(2, 5, 4), (4, 6)])(
        pull("batched product: weights first, repeated over the batch", "AFF", ". AFF")
    ),
    *about("dot_general", repeats_over_one, [(2, 3, 5, 4), (3, 4, 6)])(
        pull("two batch axes: weights that repeat over the first", "AFFF", "AFFF"),
        pull("two batch axes: weights that differ over the second", "FAFF", None),
        push("two batch axes: weights that repeat over the first", "AAAF", "AFAF"),
    ),
    *about("conv_general_dilated", conv(), [(2, 5, 4), (3, 4, 6)])(
        pull("convolution: output features", "FFA", ". FFA"),
        pull("convolution: mean over positions", "FAF", None),
        pull("convolution: mean over positions and features", "FAA", ". FFA", exact=False),
        push("convolution: shifted image", "FFA", None),
        push("convolution: output features", "FFA", "FFA", 1),
    ),
    *about("conv_general_dilated", conv(2), [(2, 5, 4), (3, 2, 6)])(
        pull("grouped convolution: across groups", "FFA", ". FFH", exact=False),
        pull("grouped convolution: within groups", "FFH", ". FFH"),
        pull("grouped convolution: pairs across the border", "FFP", ". FF[001233]", exact=False),
        push("grouped convolution: across groups", "FFA", "FFH", 1),
    ),
    *about("conv_general_dilated", conv(6), [(2, 5, 6), (3, 1, 6)])(
        pull("depthwise convolution", "FFA", None), push("depthwise convolution", "FFA", "FFF", 1)
    ),
    *about("cumsum", lambda x: lax.cumsum(x, 1), [(5, 6)])(
        pull("cumulative sum along a zero", "FF", "FF"),
        pull("cumulative sum along the mean", "FA", None),
        push("cumulative sum along the mean", "FA", "FF"),
    ),
    *about("reduce_window_sum", window(1, 3), [(5, 6)])(
        pull("pooling a zero", "FF", "FF"),
        pull("pooling along the mean", "FA", None),
        push("pooling along the mean", "FA", "FF"),
    ),
    *about("gather", lambda t: t[:, INDEX], [(5, 6)])(
        pull("single elements that are zero", "FF", "FF"),
        pull("single elements of a table", "FA", None),
        push("single elements of a table", "FA", "FF"),
    ),
    *about(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        [(5, 6), (5, 2), 1],
    )(
        pull("feature update of zeros at run time", "FF", "FF FF"),
        pull("token and feature mean of a feature update", "AA", "AF AF", exact=False),
        pull("feature update at run time", "FA", None),
        push("feature update at run time", "AA", "AF"),
    ),
    *about("gather", lambda t: t[INDEX], [(5, 6)])(
        pull("rows of a table, mean over rows and features", "AA", "FA", exact=False),
        pull("rows of a table", "FA", "FA"),
        pull("rows of a table, mean over the rows", "AF", None),
        push("rows of a table", "FA", "FA"),
        push("rows of a table, one shift for all", "AA", "FA"),
    ),
    *about("reduce_sum", lambda x: x.sum(0), [(5, 6)])(
        pull("reduction of another axis", "A", "FA")
    ),
    *about("cumsum", lambda x: lax.cumsum(x, 0), [(5, 6)])(
        pull("cumulative sum of another axis", "FA", "FA")
    ),
    *about("reduce_window_sum", window(3, 1), [(5, 6)])(
        pull("pooling other axes", "FA", "FA"),
        pull("pooling along one of the means", "AA", "FA", exact=False),
    ),
    *about("reshape", lambda x: x.reshape(2, 2, 3), [(2, 6)])(
        pull("splitting an axis", "FFA", "FH"),
        pull("splitting an axis, mean over its slow part", "FAF", "F[012012]"),
        push("splitting an axis", "FH", "FFA"),
        push("splitting through groups", "FP", None),
        push("splitting through a region: given up", "A[0123--]", "AFF"),
    ),
    *about("reshape", lambda x: x.reshape(2, 6), [(2, 2, 3)])(
        pull("splitting through groups", "FP", None),
        pull("merging: a region of one half", "A[012---]", "A[0-]F"),
        pull("merging: a region across halves asks for all positions", "A[0123--]", "AFF"),
        pull("merging: groups across halves are given up", "AP", "AFF", exact=False),
    ),
    *about("reshape", lambda x: x.reshape(6, 4), [(4, 6)])(
        pull("merging and splitting elsewhere", "FA", None)
    ),
    *about("broadcast_in_dim", lambda x: jnp.broadcast_to(x[:, None], (2, 3, 6)), [(2, 6)])(
        pull("new axes: a mean along them is nothing new", "FAA", "FA")
    ),
    *about("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (2, 6), (0,)), [(2,)])(
        pull("new axes only: the operand must be zero", "FA", "F")
    ),
    *about("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (2, 6), (0, 1)), [(2, 1)])(
        pull("expanded axis: the operand must be zero", "FA", "FF")
    ),
    *about("tile", lambda x: jnp.tile(x, (2, 1)), [(5, 6)])(
        pull("tiles: mean along another axis", "FA", "FA")
    ),
    *about("tile", lambda x: jnp.tile(x, (1, 3)), [(5, 1)])(
        pull("tiles of one position", "AA", "AF"), push("tiles of one position", "AF", "AA")
    ),
    *about("tile", lambda x: jnp.tile(x, (1, 2)), [(5, 3)])(
        pull("tiles along the mean", "AA", "AF", exact=False),
        push("tiles along the mean", "AA", "AF"),
    ),
    *about("unstack", lambda x: tuple(lax.unstack(x, 0)), [(3, 2, 6)])(
        pull("unstack: a region", "FA", "[0--]FA"),
        push("unstack: a shifted region", "[-0-]FA", ". FA"),
    ),
    *about("stack", lambda *xs: lax.stack(list(xs), 0), [(2, 6), (2, 6)])(
        pull("stack: a region of one operand", "[-0]FA", ". FA", exact=False)
    ),
    *about("stack", lambda *xs: lax.stack(list(xs), 1), [(2, 6), (2, 6)])(
        pull("stack: mean along other axes", "FFA", "FA FA")
    ),
    *about("slice", lambda x: x[:, 2:5], [(2, 6)])(
        pull("slice: a region", "FA", "F[--000-]"),
        push("slice along the mean", "FA", "FA"),
        push("slice of groups", "FH", "F[011]"),
    ),
    *about("slice", lambda x: x[1:3], [(4, 6)])(pull("slice of tokens", "FA", "[-01-]A")),
    *about("slice", lambda x: x[:, ::2], [(2, 6)])(pull("slice with a step", "FA", "F[0-0-0-]")),
    *about("split", lambda x: lax.split(x, (2, 4), 1), [(2, 6)])(
        pull("split: its own region", "FA", "F[--0000]", 1),
        push("split along the mean", "FA", "FA FA"),
    ),
    *about("rev", lambda x: lax.rev(x, (1,)), [(2, 6)])(pull("reversed", "F[000-11]", "F[00-111]")),
    *about("transpose", jnp.transpose, [(6, 2)])(pull("transposed", "FH", "HF")),
    *about("concatenate", lambda x, y: jnp.concatenate([x, y], 0), [(2, 6), (3, 6)])(
        pull("concatenated along another axis", "FA", "FA FA")
    ),
    *about("concatenate", lambda x, y: jnp.concatenate([x, y], 1), [(2, 2), (2, 4)])(
        pull("concatenated along the mean", "FA", "FA FA", exact=False),
        pull("concatenated: a region inside one operand", "F[---000]", ". F[-000]", exact=False),
        push("concatenated along the mean", "FA", "F[--0000]", 1),
    ),
    *about("pad", lambda x: jnp.pad(x, ((0, 0), (1, 2))), [(2, 3)])(
        pull("padded with zeros", "FA", "FA", exact=False)
    ),
    *about("pad", lambda x: jnp.pad(x, ((0, 0), (0, 2))), [(2, 3)])(
        pull("padded at the end", "FA", "FA", exact=False)
    ),
    *about("pad", lambda x: lax.pad(x, 1.0, [(0, 0, 0), (1, 2, 0)]), [(2, 3)])(
        pull("padded with ones", "FA", None)
    ),
    *about("pad", lambda x: lax.pad(x, 1.0, [(1, 2, 0), (0, 0, 0)]), [(2, 3)])(
        pull("padded with ones along another axis", "FA", None)
    ),
    *about("pad", lambda x, v: lax.pad(x, v, [(0, 0, 0), (1, 2, 0)]), [(2, 3), ()])(
        pull("padded with an input", "FA", None), push("shifted padding", "()", None, 1)
    ),
    *about("pad", lambda x: lax.pad(x, 0.0, [(0, 0, 0), (-1, 0, 0)]), [(2, 6)])(
        pull("cropped by padding", "FA", None)
    ),
    *about("pad", lambda x: lax.pad(x, 0.0, [(0, -1, 0), (1, 2, 0)]), [(2, 6)])(
        pull("cropped by padding, padded along another axis", "FA", None),
        push("cropped by padding, padded along another axis", "FA", None),
    ),
    *about("gather", lambda t: t[INDEX, 2:4], [(5, 6)])(pull("windows of a table", "FA", None)),
    *about("gather", lambda t: jnp.take(t, INDEX, 0, mode="fill", fill_value=1.0), [(5, 6)])(
        pull("missing rows filled with ones", "FA", None)
    ),
    *about("gather", lambda t: jnp.take(t, INDEX, 0, mode="fill", fill_value=jnp.nan), [(5, 6)])(
        pull("missing rows filled with numbers that are none", "FA", "FA")
    ),
    *about("pad", lambda x: jnp.pad(x, ((0, 0), (1, 2))), [(2, 0)])(
        pull("nothing padded to something", "AF", "AF", exact=False)
    ),
    *about("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)), [(5, 6), 1])(
        pull("token slice at run time", "FA", "FA")
    ),
    *about("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (0, i), (5, 2)), [(5, 6), 1])(
        pull("feature slice at run time", "FA", None)
    ),
    *about(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
        [(5, 6), (2, 6), 1],
    )(pull("token update at run time", "FA", "FA FA")),
    *about("scatter", lambda x, u: x.at[INDEX].set(u), [(5, 6), (2, 6)])(
        pull("rows written", "FA", "FA . FA"),
        push("rows overwritten", "AA", "FA"),
        push("rows written", "AA", "FA", 2),
    ),
    *about("scatter", lambda x, u: x.at[INDEX, INDEX].set(u), [(5, 4, 6), (2, 6)])(
        pull("rows written at two indices", "FFA", "FFA . FA"),
        push("rows written at two indices", "FA", "FFA", 2),
    ),
    *about("scatter-add", lambda x, u: x.at[INDEX].add(u), [(5, 6), (2, 6)])(
        pull("rows increased", "FA", "FA . FA")
    ),
    *about("scatter-add", lambda x, u: x.at[:, INDEX].add(u), [(5, 6), (5, 2)])(
        pull("single elements increased", "FA", None)
    ),
    *about("scatter", lambda x: x.at[INDEX].apply(jnp.exp), [(5, 6)])(
        pull("rows replaced by a function of themselves", "FA", None),
        push("rows replaced by a function of themselves", "FA", None),
    ),
    *about("add", jnp.add, [(2, 1), (2, 6)])(push("per-token operand of a sum", "FF", "FA")),
    *about("add", jnp.add, [(2, 6), ()])(push("scalar operand of a sum", "()", "AA", 1)),
    *about("mul", times, [(2, 1), (2, 6)])(
        push("per-token shift of a per-token value", "FF", "FF")
    ),
    *about("mul", lambda x, g: x * jnp.broadcast_to(g, (2, 6)).reshape(3, 4), [(3, 4), ()])(
        push("product with one number, spread in another shape", "AA", "AA")
    ),
    *about("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y)), [(2, 6), (6,)])(
        push("barrier: its own output", "A", ". A", 1)
    ),
    *about("reduce_sum", lambda x: x.sum(1), [(5, 6)])(push("reduction along the mean", "FA", "F")),
    *about("pad", lambda x: lax.pad(x, 1.0, [(0, 0, 0), (1, 1, 1)]), [(2, 2)])(
        push("padded along the mean", "FA", "F[-0-0-]")
    ),
]


def labelled(shape: tuple[int, ...], entries: Sequence[Given]) -> AxisSet:
    return AxisSet(shape, tuple(Labels(e) if isinstance(e, tuple) else e for e in entries))


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: f"{k.asked.rule}: {k.asked.question}")
def test_known_answer(known: Known) -> None:
    rule, _, asked, answer, position, exact = known.asked
    rng = np.random.default_rng(0)
    operands = [rng.normal(0.5, 1, x) if isinstance(x, tuple) else x for x in known.operands]
    _, one = find(known.primitive, Program(known.fn, operands), 2)[0]
    pulls, ctx = rule == "pull", one.context
    along = labelled(ctx.out_shape(position) if pulls else ctx.in_shape(position), asked)
    got = (one.rule.pull if pulls else one.rule.push)(ctx, position, along)
    assert isinstance(got, Opaque) == (answer is None)
    if answer is not None:
        assert {i: s.entries for i, s in (got.needs if pulls else got)} == answer
        assert not pulls or got.exact == exact
        (one.pull if pulls else one.push)(position, along)


@pytest.mark.parametrize("name", UNARY.split())
def test_nonlinear_primitives_neither_carry_a_mean_nor_hide_a_shift(name: str) -> None:
    _, one = find(name, Program(getattr(lax, name), [np.full((2, 3), 0.5)]), 1)[0]
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


LOOPS: list[tuple[str, Asked]] = [
    ("loop_carry", pull("carry", "FA", "FA FA")),
    ("loop_result", pull("result", "FA", "FA FA")),
    ("branch_result", pull("branch", "FA", "FA FA")),
    ("loop_slice", pull("row", "FA", "FFA")),
    ("loop_slice", pull("groups of rows", "AH", "FAH")),
    ("loop_stack", pull("stack", "FFA", "FA")),
    ("loop_stack", pull("zeros in a stack", "FFF", "FF")),
    ("loop_stack", pull("iterations and features", "AFA", "FA", exact=False)),
    ("loop_stack", pull("iterations", "AFF", None)),
    ("loop_carry", push("carry", "FA", "FA")),
    ("loop_result", push("result", "FA", "FA", 1)),
    ("branch_result", push("branch", "FA", "FA", 1)),
    ("loop_slice", push("row", "FFA", "FA")),
    ("loop_slice", push("groups of rows", "FAH", "AH")),
    ("loop_slice", push("all rows", "AFF", "FF")),
    ("loop_stack", push("stack", "FA", "FFA")),
]


@pytest.mark.parametrize(("name", "asked"), LOOPS, ids=lambda v: getattr(v, "question", v))
def test_known_answer_in_loops(name: str, asked: Asked) -> None:
    ctx = equation(looped, (4, 2, 6), (2, 6), primitive=name)
    pulls, position = asked.rule == "pull", asked.position
    shape = ctx.out_shape() if pulls else ctx.in_shape(position)
    rule = RULES[name].pull if pulls else RULES[name].push
    got = rule(ctx, position, labelled(shape, asked.along))
    assert isinstance(got, Opaque) == (asked.answer is None)
    if not isinstance(got, Opaque):
        found = got.needs if pulls else got
        assert {i: s.entries for i, s in found} == asked.answer
        shape_of = ctx.in_shape if pulls else ctx.out_shape
        assert all(s.shape == shape_of(i) for i, s in found)
        assert not pulls or got.exact == asked.exact


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


READERS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "softmax": (lambda y: jax.nn.softmax(y.astype(float), 1), True),
    "softmax, written out": (lambda y: jnp.exp(y - y.max(1, keepdims=True)), True),
    "log_softmax and argmax": (lambda y: (jax.nn.log_softmax(y, 1), y.argmax(1)), True),
    "an output": (lambda y: y, False),
    "the mask undone": (lambda y: y + jnp.where(np.eye(2, 6) > 0, 0, 1e30), False),
    "the mask undone by a difference": (lambda y: y - jnp.where(np.eye(2, 6) > 0, 0, -1e30), False),
    "a maximum of something else": (lambda y: jnp.exp(y - (2 * y).max(1, keepdims=True)), False),
    "less than the maximum": (lambda y: y - jnp.minimum(y.max(1, keepdims=True), -1e30), False),
    "at most the maximum": (lambda y: y - jnp.maximum(y.max(1, keepdims=True), 3), False),
    "a product": (lambda y: (2 * y, y.max(1)), False),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("number", ["-inf", "lowest", "-1e30", "-1e9", "0", "inf", "nan"])
@pytest.mark.parametrize("reader", READERS)
def test_only_masks_that_take_up_every_shift_pass_one(reader: str, dtype: str, number: str) -> None:
    """In ``c + u`` nothing is left of u, in the arithmetic of the dtype; -inf is -inf for ever."""
    read, is_maximum = READERS[reader]
    c = jnp.asarray(float(jnp.finfo(dtype).min) if number == "lowest" else float(number), dtype)
    x, along = jnp.ones((2, 6), dtype), AxisSet.over((2, 6), (1,))
    graph = flatten(jax.make_jaxpr(lambda x: read(jnp.where(np.eye(2, 6) > 0, x, c)))(x))
    op = next(op for op in graph.ops if op.name == "select_n")
    ctx = Context(graph, op, Facts(graph).uniform)
    pushed = RULES["select_n"].push(ctx, 2, along)
    if float(c) <= -9e29 and (is_maximum or number == "-inf" or float(c) == -np.inf):
        assert pushed == ((0, along),)
        for shift in (1e3, -1e4, 1 / 3):
            assert c + jnp.asarray(shift, dtype) == c
    else:
        assert isinstance(pushed, Opaque)
    assert isinstance(RULES["select_n"].push(ctx, 0, along), Opaque)


def test_a_mask_among_other_cases_passes_no_shift() -> None:
    def choose(p: Any, x: Any, y: Any) -> Any:
        return lax.select_n(p, x, y, jnp.full_like(x, -jnp.inf))

    ctx = equation(choose, jnp.ones((2, 6), jnp.int32), (2, 6), (2, 6))
    for operand in (1, 2):
        pushed = RULES["select_n"].push(ctx, operand, AxisSet.over((2, 6), (1,)))
        assert isinstance(pushed, Opaque)
