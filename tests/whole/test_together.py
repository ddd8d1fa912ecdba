"""One plan for several functions of one tree; plans that are followed; parameters left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, PlanMismatchError, TreeError, fold
from jax_lnfold.program.joint import whole_weights

VOCAB, DIM, HEADS, LAYERS, LENGTH = 23, 12, 3, 2, 9
Tree = dict[str, Any]
Cache = tuple[jax.Array, jax.Array]


def layer_norm(x: jax.Array, p: Tree) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * p["scale"] + p["shift"]


def params(seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0.1, 0.4, shape)

    def norm() -> Tree:
        return {"scale": 1 + draw(DIM), "shift": draw(DIM)}

    def block() -> Tree:
        attention = {"qkv": draw(DIM, 3 * DIM), "qkv_bias": draw(3 * DIM), "out": draw(DIM, DIM)}
        mlp = {"up": draw(DIM, 2 * DIM), "up_bias": draw(2 * DIM), "down": draw(2 * DIM, DIM)}
        return {**attention, **mlp, "one": norm(), "two": norm()}

    blocks = {str(i): block() for i in range(LAYERS)}
    tables = {"tokens": draw(VOCAB, DIM), "positions": draw(LENGTH, DIM)}
    head = {"head": draw(DIM, VOCAB), "head_bias": draw(VOCAB)}
    return jax.tree.map(jnp.asarray, {**tables, "blocks": blocks, "last": norm(), **head})


def attend(p: Tree, x: jax.Array, cache: Cache, start: Any) -> tuple[jax.Array, Cache]:
    q, k, v = jnp.split(x @ p["qkv"] + p["qkv_bias"], 3, -1)
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), start, 1)
    values = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), start, 1)
    heads = (t.reshape(*t.shape[:2], HEADS, -1) for t in (q, keys, values))
    q, k, v = heads
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    seen = jnp.arange(LENGTH) <= start + jnp.arange(x.shape[1])[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    return mixed @ p["out"], (keys, values)


def steps(p: Tree, tokens: jax.Array, start: Any, cache: Tree) -> tuple[jax.Array, Tree]:
    """Logits of the next tokens, for tokens from position `start` on, and the cache with them."""
    positions = jax.lax.dynamic_slice_in_dim(p["positions"], start, tokens.shape[1])
    x, new = p["tokens"][tokens] + positions, dict[str, Cache]()
    for name, block in p["blocks"].items():
        mixed, new[name] = attend(block, layer_norm(x, block["one"]), cache[name], start)
        x = x + mixed
        x = (
            x
            + jax.nn.gelu(layer_norm(x, block["two"]) @ block["up"] + block["up_bias"])
            @ block["down"]
        )
    return layer_norm(x, p["last"]) @ p["head"] + p["head_bias"], new


def prefill(p: Tree, tokens: jax.Array, cache: Tree) -> tuple[jax.Array, Tree]:
    return steps(p, tokens, 0, cache)


def decode(p: Tree, token: jax.Array, position: jax.Array, cache: Tree) -> tuple[jax.Array, Tree]:
    return steps(p, token, position, cache)


def tied(p: Tree, tokens: jax.Array, cache: Tree) -> jax.Array:
    """Scores by the table of tokens itself."""
    logits, _ = prefill(p, tokens, cache)
    return logits @ p["tokens"]


def empty(batch: int = 2) -> Tree:
    cache = jnp.zeros((batch, LENGTH, DIM))
    return {str(i): (cache, cache) for i in range(LAYERS)}


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 4)))
FUNCTIONS: dict[str, Callable[..., Any]] = {"prefill": prefill, "decode": decode}
INPUTS: dict[str, tuple[Any, ...]] = {
    "prefill": (TOKENS, empty()),
    "decode": (TOKENS[:, :1], jnp.int32(4), empty()),
}
N_NORMS = 2 * LAYERS + 1


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), one, other)


def assert_serves(served: Mapping[str, jax_lnfold.Folded], tree: Tree, given: Tree) -> None:
    """All functions compute what they did, folded and as they were, with one edited tree."""
    for name, fn in FUNCTIONS.items():
        want = fn(given, *INPUTS[name])
        assert_same(served[name].apply(tree, *INPUTS[name]), want)
        assert_same(fn(tree, *INPUTS[name]), want)


def test_prefill_and_decode() -> None:
    given = params()
    served = fold(FUNCTIONS, given, INPUTS)
    assert [*served] == ["prefill", "decode"]
    assert_serves(served, served.params, given)
    for each in served.values():
        assert (each.report.n_folded, each.report.n_inserted) == (N_NORMS, 0)
        assert each.params is served.params
        assert each.plan == served.plan
    assert (served.report.n_folded, len(served.report.norms)) == (2 * N_NORMS, 2 * N_NORMS)
    assert {norm.path.split("/")[0].split(" ")[0] for norm in served.report.norms} == {*FUNCTIONS}


def test_generation_is_the_same_token_by_token() -> None:
    given = params()
    served = fold(FUNCTIONS, given, INPUTS)

    def generate(functions: Mapping[str, Callable[..., Any]], tree: Tree) -> list[np.ndarray]:
        run = {
            n: jax.jit(f, donate_argnums=3 if n == "decode" else ()) for n, f in functions.items()
        }
        logits, cache = run["prefill"](tree, TOKENS, empty())
        found = [logits[:, -1:].argmax(-1)]
        for position in range(TOKENS.shape[1], LENGTH):
            logits, cache = run["decode"](tree, found[-1], jnp.int32(position), cache)
            found.append(logits.argmax(-1))
        return [*map(np.asarray, found)]

    folded = {name: each.apply for name, each in served.items()}
    np.testing.assert_array_equal(generate(folded, served.params), generate(FUNCTIONS, given))


def test_the_report_says_which_function_is_in_the_way() -> None:
    functions, inputs = FUNCTIONS | {"tied": tied}, INPUTS | {"tied": INPUTS["prefill"]}
    given = params()
    served = fold(functions, given, inputs)
    joint = {name: (each.report.n_folded, each.report.n_inserted) for name, each in served.items()}
    assert joint == {"prefill": (N_NORMS, 1), "decode": (N_NORMS, 1), "tied": (N_NORMS, 1)}
    assert "tokens" not in {edit.key_path for edit in served.plan.edits}
    reasons = [str(insertion) for insertion in served.report.insertions]
    assert len(reasons) == 3
    assert all("`dot_general` (tied, " in reason for reason in reasons)
    assert_serves(served, served.params, given)
    assert_same(tied(served.params, *inputs["tied"]), tied(given, *inputs["tied"]))


@pytest.mark.parametrize("weights", [None, {"prefill": 1, "decode": 64.5}])
def test_weights(weights: Any) -> None:
    served = fold(FUNCTIONS, params(), INPUTS, weights=weights)
    assert served.report.n_folded == 2 * N_NORMS


def test_weights_are_proportions() -> None:
    for given, want in [
        ((1, 64.5), (2, 129)),
        ((2, 4), (2, 4)),
        ((1 / 3, 1), (1, 3)),
        ((1e-4, 64e-4), (1, 64)),  # each of them is next to nothing, but not one to the other
        ((1e-6, 1), (1, 1_000_000)),
        ((np.float32(0.5), np.int64(3)), (1, 6)),
    ]:
        found = whole_weights(dict(zip("ab", given, strict=True)), ["a", "b"])
        assert tuple(found.values()) == want


def test_a_function_alone_is_not_the_other_one() -> None:
    given = params()
    alone = fold(prefill, given, *INPUTS["prefill"])
    said = r"^plan: .*'tokens' would be noticed: `dot_general`.* or fold the functions together"
    with pytest.raises(PlanMismatchError, match=said):
        fold(tied, alone.params, *INPUTS["prefill"], plan=alone.plan)
    follows = fold(decode, alone.params, *INPUTS["decode"], plan=alone.plan)
    assert_serves({"prefill": alone, "decode": follows}, alone.params, given)
    assert follows.params is alone.params


def test_a_plan_is_followed_before_there_are_weights() -> None:
    given = params()
    plan = FoldPlan.from_json(fold(prefill, given, *INPUTS["prefill"]).plan.to_json())
    shapes = jax.eval_shape(lambda: given)
    inputs = {name: jax.eval_shape(lambda x=x: x) for name, x in INPUTS.items()}
    served = fold(FUNCTIONS, shapes, inputs, plan=plan)
    run = jax.jit(served["decode"].apply).lower(shapes, *inputs["decode"]).compile()
    tree = plan.center(given)
    assert_same(run(tree, *INPUTS["decode"]), decode(given, *INPUTS["decode"]))
    assert_serves(served, tree, given)


def test_following_edits_nothing_unless_it_is_asked_to() -> None:
    given = params()
    plan = fold(prefill, given, *INPUTS["prefill"]).plan
    assert not plan.is_centered(given)
    with pytest.raises(TreeError, match="params: leaf 'blocks/0/down' is not centered"):
        fold(decode, given, *INPUTS["decode"], plan=plan)
    edited = fold(decode, given, *INPUTS["decode"], plan=plan, center=True)
    assert plan.is_centered(edited.params)
    assert_same(edited.params, plan.center(given))
    again = fold(decode, edited.params, *INPUTS["decode"], plan=plan, center=True)
    pairs = zip(jax.tree.leaves(again.params), jax.tree.leaves(edited.params), strict=True)
    assert all(one is other for one, other in pairs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_half_centered_trees_are_not_centered(dtype: str) -> None:
    given = jax.tree.map(lambda x: x.astype(dtype), params())
    plan = fold(prefill, given, *INPUTS["prefill"], fold_affine=True).plan
    centered = plan.center(given)
    assert plan.is_centered(centered)
    assert plan.is_centered(jax.tree.map(np.asarray, centered))
    for path in ("positions", "tokens"):
        assert not plan.is_centered(centered | {path: given[path]})
    assert not plan.is_centered(centered | {"last": given["last"]})  # merged: ones and zeros


def test_what_fold_would_do_for_all_of_them() -> None:
    shapes = jax.eval_shape(lambda: params())
    inputs = {name: jax.eval_shape(lambda x=x: x) for name, x in INPUTS.items()}
    served = fold(FUNCTIONS, params(), INPUTS)
    assert jax_lnfold.plan_fold(FUNCTIONS, shapes, inputs) == served.plan
    report = jax_lnfold.analyze(FUNCTIONS, shapes, inputs, weights={"prefill": 1, "decode": 9})
    assert [norm.path for norm in report.norms] == [norm.path for norm in served.report.norms]
    before, after = report.cost.reductions
    assert after < before


# --- parameters that stay ------------------------------------------------------------------------


def test_excluded_parameters_stay() -> None:
    given = params()
    excluded = fold(prefill, given, *INPUTS["prefill"], exclude={"tokens"})
    assert excluded.params["tokens"] is given["tokens"]
    assert (excluded.report.n_folded, excluded.report.n_inserted) == (N_NORMS, 1)
    assert excluded.report.unrestricted == (N_NORMS, 0)
    text = " ".join(str(excluded.report).split())
    assert "cannot be centered, as it is excluded" in text
    assert f"Without `exclude`, {N_NORMS} LayerNorms would fold with 0 explicit centerings." in text
    assert_same(excluded(*INPUTS["prefill"]), prefill(given, *INPUTS["prefill"]))


def test_all_but_some_parameters_stay() -> None:
    given, own = params(), re.compile(r"blocks/1/|last/|head")
    kept = lambda path: not own.match(path)  # noqa: E731
    for affine in (False, True):
        folded = fold(prefill, given, *INPUTS["prefill"], exclude=kept, fold_affine=affine)
        same = jax.tree.map(lambda x, y: x is y, folded.params, given)
        same["blocks"].pop("1")
        same = {k: v for k, v in same.items() if k not in ("last", "head", "head_bias")}
        assert all(jax.tree.leaves(same))
        assert bool(folded.plan.affine) == affine
        assert_same(folded(*INPUTS["prefill"]), prefill(given, *INPUTS["prefill"]))
        assert_same(prefill(folded.params, *INPUTS["prefill"]), prefill(given, *INPUTS["prefill"]))


def test_several_functions_with_excluded_parameters() -> None:
    served = fold(FUNCTIONS, params(), INPUTS, exclude={"positions"})
    assert "positions" not in {edit.key_path for edit in served.plan.edits}
    assert_serves(served, served.params, params())


# --- bad input -----------------------------------------------------------------------------------

PLAN = fold(prefill, params(), *INPUTS["prefill"]).plan
SHAPES = jax.eval_shape(lambda: params())
ANOTHER = fold(lambda p, x: nn.standardize(x @ p["w"]), {"w": jnp.eye(3)}, jnp.ones((2, 3))).plan


def half_centered() -> Tree:
    given = params()
    return PLAN.center(given) | {"positions": given["positions"]}


def weighed(**weights: Any) -> Callable[[], Any]:
    return lambda: fold(FUNCTIONS, params(), INPUTS, weights=weights)


def excluding(exclude: Any) -> Callable[[], Any]:
    return lambda: fold(FUNCTIONS, params(), INPUTS, exclude=exclude)


def given_inputs(*inputs: Any) -> Callable[[], Any]:
    return lambda: fold(FUNCTIONS, params(), *inputs)


NOT_ONE_MAPPING = (
    "example_inputs: not one mapping with the inputs of prefill, decode; pass .* a tuple for each"
)
POSITIVE = "is not a positive number; pass how often it runs, or leave out a function that never"
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no functions": (lambda: fold({}, params(), {}), "apply_fn: a dict is not callable"),
    "no function": (
        lambda: fold({"prefill": 3}, params(), {"prefill": ()}),  # type: ignore[call-overload]
        "apply_fn: a dict is not callable",
    ),
    "a number for a name": (
        lambda: fold({3: prefill}, params(), {3: INPUTS["prefill"]}),  # type: ignore[call-overload]
        "apply_fn: 3 is no name of a function",
    ),
    "None for a name": (
        lambda: fold(FUNCTIONS | {None: prefill}, params(), INPUTS | {None: ()}),  # type: ignore
        "apply_fn: None is no name of a function; pass text",
    ),
    "bytes for a name": (
        lambda: jax_lnfold.plan_fold({b"prefill": prefill}, SHAPES, {b"prefill": ()}),  # type: ignore
        "apply_fn: b'prefill' is no name of a function; pass text",
    ),
    "inputs of one function": (given_inputs(*INPUTS["prefill"]), NOT_ONE_MAPPING),
    "inputs of some functions": (given_inputs({"prefill": INPUTS["prefill"]}), NOT_ONE_MAPPING),
    "inputs of one more": (given_inputs(INPUTS | {"encode": ()}), NOT_ONE_MAPPING),
    "inputs of a number": (given_inputs({"prefill": INPUTS["prefill"], 3: ()}), NOT_ONE_MAPPING),
    "no inputs": (given_inputs(), NOT_ONE_MAPPING),
    "two mappings of inputs": (given_inputs(INPUTS, INPUTS), NOT_ONE_MAPPING),
    "inputs to analyze": (
        lambda: jax_lnfold.analyze(FUNCTIONS, SHAPES, {}),
        NOT_ONE_MAPPING.removeprefix("example_"),
    ),
    "too few inputs of one": (
        given_inputs(INPUTS | {"decode": INPUTS["decode"][:2]}),
        r"apply_fn\['decode'\]: cannot be traced .* missing 1 .*'cache'.*; it must run",
    ),
    "another tree": (
        lambda: fold(
            {**FUNCTIONS, "encode": lambda p, x: x @ p["encoder"]},
            params(),
            {**INPUTS, "encode": jnp.ones((2, 3))},
        ),
        r"apply_fn\['encode'\]: cannot be traced \(KeyError: 'encoder'\).* wrap one that takes a",
    ),
    "a part of the tree": (
        lambda: jax_lnfold.plan_fold(
            {**FUNCTIONS, "norm": lambda p, x: layer_norm(x, p)},
            SHAPES,
            {**INPUTS, "norm": jnp.ones((2, DIM))},
        ),
        r"apply_fn\['norm'\]: cannot be traced \(KeyError: 'scale'\).* as in lambda p, \*x: f\(p",
    ),
    "inputs that are no arrays": (
        lambda: fold(FUNCTIONS, params(), INPUTS | {"decode": ("token",)}),
        r"example_inputs\['decode'\]: ",
    ),
    "weights of other functions": (
        lambda: fold(FUNCTIONS, params(), INPUTS, weights={"prefill": 1}),
        "weights: .* no mapping with a number for each of prefill, decode",
    ),
    "a weight of zero": (weighed(prefill=1, decode=0), f"weights: 0 of 'decode' {POSITIVE}"),
    "a negative weight": (weighed(prefill=-2, decode=1), f"weights: -2 of 'prefill' {POSITIVE}"),
    "NaN": (weighed(prefill=1, decode=float("nan")), f"weights: nan of 'decode' {POSITIVE}"),
    "infinity": (weighed(prefill=1, decode=float("inf")), f"weights: inf of 'decode' {POSITIVE}"),
    "out of range": (weighed(prefill=1, decode=10**400), f"weights: 10+ of 'decode' {POSITIVE}"),
    "weights of no number": (weighed(prefill="1", decode=1), f"weights: '1' of 'pref.* {POSITIVE}"),
    "weights of one more": (
        weighed(prefill=1, decode=1, encode=1),
        "weights: .* no mapping with a number for each of prefill, decode; pass how often each",
    ),
    "weights without names": (
        lambda: fold(FUNCTIONS, params(), INPUTS, weights=[1, 2]),  # type: ignore
        r"weights: \[1, 2\] is no mapping with a number for each of prefill, decode; pass how",
    ),
    "weights of one function to analyze": (
        lambda: jax_lnfold.analyze(prefill, SHAPES, *INPUTS["prefill"], weights={"prefill": 1}),
        "weights: there is one function only; leave it out",
    ),
    "keywords of several functions to analyze": (
        lambda: jax_lnfold.analyze(FUNCTIONS, SHAPES, INPUTS, train=False),
        "train: which function it is for is not known; bind keywords",
    ),
    "weights of one function": (
        lambda: fold(prefill, params(), *INPUTS["prefill"], weights={"prefill": 1}),
        "weights: there is one function only",
    ),
    "a plan as text": (
        lambda: fold(prefill, params(), *INPUTS["prefill"], plan=PLAN.to_json()),  # type: ignore
        "plan: a str is no FoldPlan",
    ),
    "a plan of another model": (
        lambda: fold(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 3))}, jnp.ones(3), plan=PLAN),
        "params: not the tree that was folded",
    ),
    "a plan of another model for all": (
        lambda: fold(FUNCTIONS, params(), INPUTS, plan=ANOTHER, center=True),
        "params: not the tree that was folded .*; pass a tree of the same structure",
    ),
    "a plan of another model, shapes": (
        lambda: fold(FUNCTIONS, SHAPES, INPUTS, plan=ANOTHER),
        "params: not the tree that was folded .*; pass a tree of the same structure",
    ),
    "a plan of another width": (
        lambda: fold(
            FUNCTIONS,
            SHAPES | {"tokens": jax.ShapeDtypeStruct((VOCAB, 6), float)},
            INPUTS,
            plan=PLAN,
        ),
        r"params: leaf 'tokens' has shape \(23, 6\), the plan was made for \(23, 12\).*; fold the",
    ),
    "a plan that one of them notices": (
        lambda: fold(
            {**FUNCTIONS, "tied": tied},
            SHAPES,
            {**INPUTS, "tied": INPUTS["prefill"]},
            plan=PLAN,
        ),
        r"plan: .*'tokens' would be noticed: .* \(tied, .*; fold again .* fold the functions to",
    ),
    "half-centered": (
        lambda: fold(prefill, half_centered(), *INPUTS["prefill"], plan=PLAN),
        "params: leaf 'positions' is not centered as the plan says; pass center=True",
    ),
    "half-centered for all": (
        lambda: fold(FUNCTIONS, half_centered(), INPUTS, plan=PLAN),
        "params: leaf 'positions' is not centered as the plan says; pass center=True",
    ),
    "not centered at all": (
        lambda: fold(FUNCTIONS, params(), INPUTS, plan=PLAN),
        "params: leaf '.*' is not centered as the plan says; pass center=True",
    ),
    "center without a plan": (
        lambda: fold(prefill, params(), *INPUTS["prefill"], center=True),
        "center: there is no plan",
    ),
    "center that is no bool": (
        lambda: fold(prefill, params(), *INPUTS["prefill"], plan=PLAN, center="yes"),  # type: ignore
        "center: 'yes' is not a bool",
    ),
    "unknown key paths": (
        lambda: fold(prefill, params(), *INPUTS["prefill"], exclude={"token"}),
        "exclude: no leaf of params has the key path 'token'",
    ),
    "one unknown key path of two": (
        excluding(["tokens", "position"]),
        "exclude: no leaf of params has the key path 'position'; pass key paths as a report",
    ),
    "key paths that are no text": (
        excluding({3}),
        r"exclude: \{3\} is no set of key paths.*; pass",
    ),
    "to exclude None": (excluding(None), "exclude: None is no set of key paths, .*; pass exclude="),
    "a function of no key path": (
        excluding(lambda: True),
        "exclude: failed for the key path '.*' .TypeError: .*; pass a function that says of a key",
    ),
    "unknown key paths to analyze": (
        lambda: jax_lnfold.analyze(FUNCTIONS, SHAPES, INPUTS, exclude={"token"}),
        "exclude: no leaf of params has the key path 'token'; pass key paths as a report",
    ),
    "a key path by itself": (
        lambda: fold(prefill, params(), *INPUTS["prefill"], exclude="tokens"),
        "exclude: 'tokens' is no set of key paths",
    ),
    "a plan and more to exclude": (
        lambda: fold(prefill, params(), *INPUTS["prefill"], plan=PLAN, exclude={"tokens"}),
        "exclude: a plan is followed as it is",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(FoldError, match=f"^{message}"):
        call()
