"""Whatever is wrong with a call: an error names the argument and the cure, and spoils nothing."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from inspect import signature
from itertools import count, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_lnfold
from jax_lnfold import Folded, FoldError, FoldPlan, analyze, fold, plan_fold, verify
from tests.helpers.contracts import (
    assert_identical,
    check_contracts,
    fold_checked,
    relative_difference,
    snapshot,
)
from tests.models.norm_spellings import layer_norm

Array = jax.Array
Params = dict[str, Any]
Change = Callable[[Any], Any]
Call = Callable[[Params, Array], Any]

pytestmark = pytest.mark.usefixtures("explicit_ranks")

B, T, DIN, D, OUT = 2, 5, 9, 12, 7


def model(p: Params, x: Array) -> Array:
    return layer_norm(x @ p["w"] + p["b"]) @ p["v"]


def make_params() -> Params:
    rng = np.random.default_rng(0)
    shapes = {"w": (DIN, D), "b": (1, 1, D), "v": (D, OUT)}
    return {name: jnp.asarray(rng.normal(0.4, 1.0, shape)) for name, shape in shapes.items()}


def make_input(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape or (B, T, DIN)))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@cache
def folded() -> tuple[Folded, np.ndarray]:
    """What the bad calls are made on, and its right answer, which none of them spoils."""
    done = fold_checked(model, make_params(), make_input())
    return done, np.asarray(done(make_input()))


# --- ways to be wrong ----------------------------------------------------------------------------


def deleted(x: Array) -> Array:
    x = jnp.copy(x)
    x.delete()
    return x


def donated(x: Array) -> Array:
    x = jnp.copy(x)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    return x


def leaf(name: str, change: Change) -> Change:
    """Change one leaf of a tree."""
    return lambda p: {**p, name: change(p[name])}


def extra(**leaves: Any) -> Change:
    return lambda p: {**p, **leaves}


def on_device(number: int, tree: Any) -> Any:
    return jax.device_put(tree, jax.devices()[number])


def on_mesh(devices: int, x: Array, *spec: str | None) -> Array:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


class Node:
    def __init__(self, leaves: Params) -> None:
        self.leaves = leaves

    def __getitem__(self, name: str) -> Any:
        return self.leaves[name]


def node(
    metadata: Callable[[], Any] = lambda: "comparable",
    children: Change = lambda leaves: tuple(leaves.values()),
    rebuild: Callable[..., Any] | None = None,
) -> Change:
    """Put the leaves into a container that is registered in its own, wrong, way."""

    def change(p: Params) -> Node:
        kind = type("Kind", (Node,), {})
        jax.tree_util.register_pytree_node(
            kind,
            lambda tree: (children(tree.leaves), metadata()),
            rebuild or (lambda _, values: kind(dict(zip(p, values, strict=True)))),
        )
        return kind(p)

    return change


def now_two_now_three() -> Change:
    times = count()
    return lambda leaves: tuple(leaves.values())[next(times) % 2 :]


def fails(*_: Any) -> Any:
    raise ValueError("in its own words")


def reads_a_value(p: Params, x: Array) -> Array:
    return model(p, x) if x[0, 0, 0] > 0 else model(p, -x)


def converts_to_numpy(p: Params, x: Array) -> Array:
    return model(p, jnp.asarray(np.tanh(np.asarray(x))))


def generates(p: Params, x: Array) -> Iterator[Array]:
    yield model(p, x)


async def waits(p: Params, x: Array) -> Array:
    return model(p, x)


async def generates_and_waits(p: Params, x: Array) -> AsyncIterator[Array]:
    yield model(p, x)


class Layer:
    def apply(self, p: Params, x: Array) -> Array:
        return model(p, x)


def returns(value: Any) -> Call:
    return lambda p, x: (model(p, x), value)


def scaled(p: Params, x: Array) -> Array:
    """The scale is merged into `w`, which is then centered."""
    return layer_norm((x @ p["w"]) * p["b"]) @ p["v"]


def replaced(value: Any, *keys: Any) -> Change:
    """Replace something inside of a plan's JSON."""

    def change(data: Any) -> Any:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def entries(*of_b: Any) -> Change:
    return replaced(of_b, "edits", 0, "along", "entries")


def merging(scale: str, target: str, *axes: int) -> Change:
    return replaced([{"key_path": scale, "targets": [[target, axes]]}], "scales")


# --- what is said about it -----------------------------------------------------------------------

OTHER = ("not the tree that was folded", "pass a tree of the same structure")
ARRAYS = "pass a tree of arrays and bind everything else to the function"
TRACE = "must run under jax.jit as .* and return arrays"
REGISTER = "register other nodes correctly with jax.tree_util"
CALLABLE = "pass a function of .params"
TYPE = "is a ShapeDtypeStruct"
DELETED = "has been deleted"

# Parameters for a plan or for a folded function.
OTHER_TREES: dict[str, tuple[Change, str, str]] = {
    "a leaf missing": (lambda p: {"w": p["w"], "v": p["v"]}, *OTHER),
    "a leaf more": (extra(u=1.0), *OTHER),
    "a leaf renamed": (lambda p: {"w": p["w"], "b": p["b"], "u": p["v"]}, *OTHER),
    "nested deeper": (lambda p: {"params": p}, *OTHER),
    "a list": (lambda p: [*p.values()], *OTHER),
    "a list for an array": (leaf("w", lambda w: w.tolist()), *OTHER),
    "a leaf that is None": (leaf("b", lambda _: None), *OTHER),
    "an empty tree": (lambda _: {}, *OTHER),
    "None": (lambda _: None, *OTHER),
    "a wide leaf": (leaf("w", lambda w: w.repeat(2, 1)), "leaf 'w' has shape", "fold .* again"),
    "a leaf of other rank": (leaf("w", lambda w: w[None]), "leaf 'w' has shape", "fold .* again"),
    "an axis where none was": (
        leaf("b", lambda b: b.repeat(T, 1)),
        "leaf 'b' has shape",
        "fold .* again",
    ),
    "integers": (leaf("w", lambda w: w.astype(int)), "leaf 'w' has dtype int", "floating-point"),
    "float8": (leaf("w", lambda w: w.astype("float8_e5m2")), "dtype float8_e5m2", "of bfloat16"),
    "complex": (leaf("b", lambda b: b + 1j), "leaf 'b' has dtype complex", "pass floating-point"),
    "types": (abstract, f"leaf 'b' {TYPE}", "pass arrays"),
    "a type": (leaf("v", abstract), f"leaf 'v' {TYPE}", "pass arrays"),
    "a deleted array": (leaf("w", deleted), f"leaf 'w' {DELETED}", "pass a copy"),
    "a deleted array, not edited": (leaf("v", deleted), f"leaf 'v' {DELETED}", "pass a copy"),
    "a donated array": (leaf("b", donated), f"leaf 'b' {DELETED}", "pass a copy"),
    "a string": (leaf("w", lambda _: "relu"), "leaf 'w' is a str", ARRAYS),
    "objects": (leaf("v", lambda v: np.full(v.shape, None)), "leaf 'v' .* dtype object", ARRAYS),
    "records": (leaf("w", lambda w: np.zeros(w.shape, "f4,i4")), "leaf 'w' .* dtype", ARRAYS),
    "masked numbers": (leaf("w", np.ma.masked_array), "leaf 'w' is a MaskedArray", ARRAYS),
    "flatten fails": (node(children=fails), "ValueError: in its own words", REGISTER),
}

# Parameters or example inputs of any function.
BAD_TREES: dict[str, tuple[Change, str, str]] = {
    "a function": (extra(act=jnp.tanh), "leaf '.*act'", ARRAYS),
    "an object": (extra(act=object()), "leaf '.*act' is a object", ARRAYS),
    "a string": (extra(name="encoder"), "leaf '.*name' is a str", ARRAYS),
    "a date": (extra(day=np.datetime64("2020-02-02")), "leaf '.*day' is a datetime64", ARRAYS),
    "strings": (extra(names=np.array(["a", "b"])), "leaf '.*names' .* dtype <U1", ARRAYS),
    "a number out of range": (extra(n=10**30), "leaf '.*n' is a int", ARRAYS),
    "keys that do not compare": (lambda p: {"a": p, 0: p}, "sort", "use keys that can be sorted"),
    "flatten fails": (node(children=fails), "ValueError: in its own words", REGISTER),
    "flatten without children": (node(children=lambda _: 3), "cannot be flattened", REGISTER),
    "flatten changes": (node(children=now_two_now_three()), "whenever it is flattened", REGISTER),
    "unflatten fails": (node(rebuild=fails), "ValueError: in its own words", "registered"),
    "metadata are arrays": (node(lambda: np.ones(3)), "cannot be .* compared", REGISTER),
    "metadata never equal": (node(lambda: float("nan")), "another structure", REGISTER),
}

# The text of a plan, as changed behind the library's back.
BAD_PLANS: dict[str, tuple[Change, str]] = {
    "another version": (replaced(99, "version"), "version 99"),
    "no edits": (lambda d: d.pop("edits"), "KeyError: 'edits'"),
    "leaves are a number": (replaced(3, "leaves"), "not iterable"),
    "a leaf is a string": (replaced("w", "leaves", 0), "indices"),
    "a key path is a number": (replaced(3, "leaves", 0, "key_path"), "different strings"),
    "a shape is a string": (replaced("9", "leaves", 0, "shape"), "integers"),
    "a leaf twice": (lambda d: d["leaves"].append(d["leaves"][0]), "different strings"),
    "a leaf that is not there": (replaced("u", "edits", 0, "key_path"), "no leaf 'u'"),
    "another shape": (replaced([1, 1, 8], "edits", 0, "along", "shape"), "no leaf 'b'"),
    "an axis more": (entries("free", "free", "all", "all"), "longer"),
    "an unknown entry": (entries("free", "free", "most"), "most is not a list of integers"),
    "too few labels": (entries("free", "free", [0, 0, 1, 1]), "labels for 12 positions"),
    "labels out of range": (entries("free", "free", [10**9] * D), "labels for 12 positions"),
    "labels below -1": (entries("free", "free", [-2] * D), "labels for 12 positions"),
    "labels are fractions": (entries("free", "free", [0.5] * D), "integers"),
    "a scale that is not there": (merging("u", "w", 1), "scales and their targets"),
    "a target that is not there": (merging("b", "u", 1), "scales and their targets"),
    "a scale of itself": (merging("b", "b", 2), "scales and their targets"),
    "an axis out of range": (merging("b", "w", 7), r"axes \(7,\) of leaf 'w'"),
    "an axis of another size": (merging("b", "w", 0), r"axes \(0,\) of leaf 'w'"),
}
BAD_TEXTS: dict[str, tuple[Any, str]] = {
    "none": (None, "not JSON"),
    "no JSON": ("w, b", "not JSON"),
    "bytes": (b"\xff\xfe\x00", "not JSON"),
    "too deep": ("[" * 100_000, "not JSON .*recursion"),
    "cut off": ("{", "not JSON"),
    "no object": ("[2]", "version None"),
    "an empty list": ("[]", "version None"),
    "an empty object": ("{}", "version None"),
    "a version before the first": ('{"version": 1}', "version 1"),
}

# A function that is none, or not one of arrays.
BAD_FUNCTIONS: dict[str, tuple[Any, str, str]] = {
    "None": (None, "NoneType is not callable", CALLABLE),
    "a string": ("model", "str is not callable", CALLABLE),
    "a dict": ({"apply": 3}, "dict is not callable", CALLABLE),
    "not callable": (Layer(), "Layer is not callable", "pass its .apply"),
    "a class": (Layer, "takes no arguments", TRACE),
    "an unbound method": (Layer.apply, "missing 1 required", TRACE),
    "fails": (fails, "ValueError: in its own words", TRACE),
    "reads a value": (reads_a_value, "TracerBoolConversionError", TRACE),
    "converts to numpy": (converts_to_numpy, "TracerArrayConversionError", TRACE),
    "a generator": (generates, "'generator'", TRACE),
    "a coroutine": (waits, "'coroutine'", TRACE),
    "an asynchronous generator": (generates_and_waits, "'async_generator'", TRACE),
    "returns a string": (returns("text"), "'str'", TRACE),
    "returns a function": (returns(jnp.tanh), "PjitFunction", TRACE),
    "returns a dtype": (returns(jnp.float32), "not a valid JAX type", TRACE),
    "returns a type": (returns(jax.ShapeDtypeStruct((3,), float)), "ShapeDtypeStruct", TRACE),
    "returns objects": (returns(np.array([None])), "ndarray", TRACE),
}

# What is passed instead of the one input x.
BAD_INPUTS: dict[str, tuple[Callable[[Array], tuple[Any, ...]], str, str]] = {
    "none": (lambda x: (), "apply_fn: .* missing 1 required .* 'x'", TRACE),
    "one more": (lambda x: (x, x), "apply_fn: .* 3 were given", TRACE),
    "too narrow": (lambda x: (x[..., 1:],), "apply_fn: .* shape", TRACE),
    "None": (lambda x: (None,), "apply_fn: .*NoneType", TRACE),
    "a list": (lambda x: ([x],), "apply_fn: .*list", TRACE),
    "a string": (lambda x: ("x",), "inputs: leaf '0' is a str", ARRAYS),
    "a type": (lambda x: (abstract(x),), f"inputs: leaf '0' {TYPE}", "pass arrays"),
    "a type of new shape": (lambda x: (abstract(x[1:]),), f"inputs: leaf '0' {TYPE}", "pass arr"),
    "a deleted array": (lambda x: (deleted(x),), f"inputs: leaf '0' {DELETED}", "pass a copy"),
    "a donated array": (lambda x: (donated(x),), f"inputs: leaf '0' {DELETED}", "pass a copy"),
}


BOOL = ".* is not a bool", "pass True or False"
BAD_OPTIONS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "explicit_cost": (
        (0, -1, float("nan"), float("inf"), "2", None, 2j, 10**400),
        ".* is not a positive number",
        "try 2.0",
    ),
    "donate": (("no", None, 1, []), *BOOL),
    "fold_affine": ((None, "yes", 2, {"g"}), *BOOL),
    "reduce_means": ((None, "yes", 2, {"g"}), *BOOL),
    "assume_values": ((None, "yes", 2, {"g"}), *BOOL),
    "approximate": (
        ("dropout", {"noise"}, 1, [1], None, ["dropout", "x"]),
        ".* is no set of names",
        "",
    ),
    "defer_scale": ((1, "yes"), ".*", "; pass"),
    "deferred_cost": ((-0.1, float("nan"), 10**400, "cheap"), ".*", "; pass"),
    "optimize": ((True, "fast"), ".*", "; pass"),
}


def edit_plan(change: Change) -> FoldPlan:
    data = json.loads(folded()[0].plan.to_json())
    change(data)
    return FoldPlan.from_json(json.dumps(data))


def put(w: int, v: int) -> Change:
    """Commit two leaves to devices of these numbers."""
    return lambda p: {**p, "w": on_device(w, p["w"]), "v": on_device(v, p["v"])}


def two_meshes(p: Params) -> Params:
    return {**p, "w": on_mesh(4, p["w"], None, "devices"), "b": on_mesh(8, p["b"])}


def other_model(p: Params, x: Array) -> Array:
    return model({**p, "b": 0.0}, x)[:1]


BAD_CALLS: dict[str, tuple[Call, str, str]] = {
    "fold: types": (
        lambda p, x: fold(model, abstract(p), x),
        f"params: leaf 'b' {TYPE}",
        "analyze",
    ),
    "fold: one type": (
        lambda p, x: fold(model, leaf("w", abstract)(p), x),
        f"params: leaf 'w' {TYPE}",
        "analyze",
    ),
    "fold: swapped": (
        lambda p, x: fold(p, model, x),
        "apply_fn: a dict is not call",
        "function comes first",
    ),
    "fold: input first": (lambda p, x: fold(model, x, p), "apply_fn: .*TypeError", TRACE),
    "fold: too narrow": (lambda p, x: fold(model, p, x[..., 1:]), "apply_fn: .* shape", TRACE),
    "fold: None": (lambda p, x: fold(model, p, None), "apply_fn: .*NoneType", TRACE),
    "fold: one more": (lambda p, x: fold(model, p, x, x), "apply_fn: .* 3 were given", TRACE),
    "analyze: no input": (lambda p, x: analyze(model, p), "apply_fn: .* missing .* 'x'", TRACE),
    "before the first call": (
        lambda p, x: fold(model, p).plan,
        "plan: not known",
        r"call folded\(",
    ),
    "two devices": (
        lambda p, x: fold(model, put(1, 1)(p))(on_device(2, x)),
        "inputs: leaf '0' is on other devices",
        "device_put",
    ),
    "leaves on two devices": (
        lambda p, x: fold(model, put(1, 2)(p), x)(x),
        "params: leaf 'w' is on other devices",
        "device_put",
    ),
    "leaves on two meshes": (
        lambda p, x: fold(model, two_meshes(p), x)(x),
        "params: leaf 'w' is on other devices",
        "device_put",
    ),
    "scale on another device": (
        lambda p, x: fold(scaled, {**put(1, 1)(p), "b": on_device(2, p["b"])}, x),
        "params: leaf 'w' is on other devices than what is to be merged",
        "device_put",
    ),
    "center: donate": (
        lambda p, x: folded()[0].plan.center(p, donate="no"),
        "donate: 'no' is not a bool",
        "pass True or False",
    ),
    "plan of another model": (
        lambda p, x: fold(lambda w, x: x @ w, p["w"], x).plan.center(p),
        f"params: {OTHER[0]}",
        OTHER[1],
    ),
    "verify: no fold": (
        lambda p, x: verify(model, p, p, x),
        "folded: a dict is no fold of one function",
        "pass fold",
    ),
    "verify: other devices": (
        lambda p, x: verify(model, put(1, 1)(p), folded()[0], on_device(2, x)),
        "inputs: leaf '0' is on other devices",
        "device_put",
    ),
    "verify: another model": (
        lambda p, x: verify(other_model, p, folded()[0], x),
        "folded: returns other shapes",
        "pass fold",
    ),
    "verify: integers": (
        lambda p, x: verify(lambda p, x: model(p, x).argmax(), p, folded()[0], x),
        "apply_fn: returns no floating-point array",
        "return the values",
    ),
}


def refused() -> Iterator[tuple[str, Call, str, str]]:
    """Every bad call with the argument that is named and the cure."""
    for kind, (call, said, cure) in BAD_CALLS.items():
        yield kind, call, said, cure
    for kind, (change, said, cure) in OTHER_TREES.items():
        said = f"params: .*{said}"
        yield f"apply: {kind}", lambda p, x, c=change: folded()[0].apply(c(p), x), said, cure
        yield f"center: {kind}", lambda p, x, c=change: folded()[0].plan.center(c(p)), said, cure
    for kind, (change, said, cure) in BAD_TREES.items():
        yield (
            f"fold: {kind}",
            lambda p, x, c=change: fold(model, c(p), x),
            f"params: .*{said}",
            cure,
        )
        inputs = f"(example_)?inputs: .*{said}"
        yield f"fold: {kind} as input", lambda p, x, c=change: fold(model, p, c(p)), inputs, cure
        yield f"analyze: {kind}", lambda p, x, c=change: analyze(model, p, c(p)), inputs, cure
    for kind, (text, said) in BAD_TEXTS.items():
        cure = "pass what `to_json` wrote|make the plan again"
        yield f"text: {kind}", lambda p, x, t=text: FoldPlan.from_json(t), f"text: .*{said}", cure
    for kind, (change, said) in BAD_PLANS.items():
        cure = "write it with `to_json`|make the plan again"
        yield f"plan: {kind}", lambda p, x, c=change: edit_plan(c), f"text: .*{said}", cure
    for kind, (function, said, cure) in BAD_FUNCTIONS.items():
        for entry in (fold, analyze):
            call = lambda p, x, e=entry, f=function: e(f, p, x)  # noqa: E731
            yield f"{entry.__name__}: function: {kind}", call, f"apply_fn: .*{said}", cure
    for kind, (instead, said, cure) in BAD_INPUTS.items():
        yield f"call: {kind}", lambda p, x, i=instead: folded()[0](*i(x)), said, cure
        yield f"first call: {kind}", lambda p, x, i=instead: fold(model, p)(*i(x)), said, cure
        yield (
            f"verify: {kind}",
            lambda p, x, i=instead: verify(model, p, folded()[0], *i(x)),
            said,
            cure,
        )
    for option, (values, said, cure) in BAD_OPTIONS.items():
        for entry, value in product((fold, analyze, plan_fold), values):
            if option in signature(entry).parameters:
                call = lambda p, x, e=entry, o={option: value}: e(model, p, x, **o)  # noqa: E731
                yield f"{entry.__name__}: {option}={value!r}", call, f"{option}: {said}", cure


REFUSED = {name: row for name, *row in refused()}


@pytest.mark.filterwarnings("ignore:coroutine 'waits' was never awaited")
@pytest.mark.parametrize(("call", "said", "cure"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call: Call, said: str, cure: str) -> None:
    p, x = make_params(), make_input()
    before = snapshot((p, x))
    with pytest.raises(FoldError) as caught:
        call(p, x)
    assert re.match(said, str(caught.value))
    assert re.search(cure, str(caught.value))
    if cure == TRACE:
        assert isinstance(caught.value, jax_lnfold.TraceError)
        cause = caught.value.__cause__
        assert cause is not None, "what jax had to say is lost"
        assert "own words" not in said or repr(cause) == "ValueError('in its own words')"
    assert_identical((p, x), before)
    done, want = folded()
    assert np.array_equal(done(x), want), "the call has spoiled another fold"


@pytest.mark.parametrize("name", ["params", "report", "plan"])
def test_nothing_to_see_before_the_first_call(name: str) -> None:
    params, x = make_params(), make_input()
    before = snapshot(params)
    folded = fold(model, params)
    with pytest.raises(FoldError):
        folded(make_input(B, T, DIN + 1))
    with pytest.raises(jax_lnfold.NotAnalysedError, match=rf"{name}: .*folded\(\*inputs\)"):
        getattr(folded, name)
    assert relative_difference(folded(x), model(params, x)) < 1e-12
    assert getattr(folded, name) is not None
    assert folded.report.n_folded == 1
    check_contracts(model, params, folded, x, before=before)
