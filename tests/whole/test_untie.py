"""Lookups that read a centered copy of a table which something else reads, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, PlanMismatchError, TreeError, Untied, fold
from jax_lnfold.placement.place import Placement
from jax_lnfold.placement.planning import placement_of
from jax_lnfold.plan.edits.scale import ScaleEdit
from jax_lnfold.program.tracing import Traced
from jax_lnfold.trees import leaf_paths
from tests.helpers.contracts import (
    assert_drop_in,
    assert_identical,
    count_equations,
    counts,
    relative_difference,
    snapshot,
)
from tests.models.zoo import BY_NAME

VOCAB, D, HIDDEN = 11, 6, 9
Tree = dict[str, Any]
Apply = Callable[..., Any]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(rng.normal(0.3, 1.0, shape))


def params(seed: int = 0) -> Tree:
    blocks = [{"up": draw(D, HIDDEN, seed=seed + i), "down": draw(HIDDEN, D)} for i in range(2)]
    return {"blocks": blocks, "table": draw(VOCAB, D, seed=seed)}


def tokens(batch: int = 3, length: int = 5) -> jax.Array:
    rng = np.random.default_rng(batch * length)
    return jnp.asarray(rng.integers(0, VOCAB, (batch, length)))


def norm(x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)


def body(p: Tree, x: jax.Array) -> jax.Array:
    """Two pre-LN blocks and a last LayerNorm: three LayerNorms of one stream."""
    for block in p["blocks"]:
        x = x + jnp.tanh(norm(x) @ block["up"]) @ block["down"]
    return norm(x)


def logits(p: Tree, x: jax.Array) -> jax.Array:
    return body(p, x) @ p["table"].T


def tied(p: Tree, ids: jax.Array) -> jax.Array:
    return logits(p, p["table"][ids])


def without_copies(tree: Any) -> Any:
    return tree.params if isinstance(tree, Untied) else tree


def check(apply_fn: Apply, folded: Any, given: Any, *inputs: Any, rtol: float = 1e-12) -> None:
    """Contract 1, and contract 2 for the original's part of the tree."""
    own = without_copies(folded.params)
    assert_drop_in(own, given)
    want = jax.jit(apply_fn)(given, *inputs)
    for got in (jax.jit(folded.apply)(folded.params, *inputs), jax.jit(apply_fn)(own, *inputs)):
        assert relative_difference(got, want) < rtol


# --- models --------------------------------------------------------------------------------------

# LayerNorms, folded and explicit centerings: tied, and untied by one copy of the token table. BLOOM
# keeps the centering behind its first LayerNorm's scale, and folds that LayerNorm.
ZOO = {
    "gpt2": ((5, 5, 1), (5, 5, 0)),
    "opt": ((5, 5, 1), (5, 5, 0)),
    "whisper_decoder": ((7, 7, 1), (7, 7, 0)),
    "bloom": ((6, 5, 1), (6, 6, 1)),
}
TABLE = "params/embed/token_table/embedding"


@pytest.mark.parametrize("name", ZOO)
def test_models_with_a_tied_head(name: str) -> None:
    model = BY_NAME[name].build()
    before, (with_tied, with_copy) = snapshot(model.params), ZOO[name]
    assert counts(fold(model.apply_fn, model.params, *model.inputs).report) == with_tied
    folded = fold(model.apply_fn, model.params, *model.inputs, untie=True)
    assert counts(folded.report) == with_copy
    assert [leaf.key_path for leaf in folded.report.untied] == [TABLE]
    table = model.params["params"]["embed"]["token_table"]["embedding"]
    assert folded.report.untied[0].bytes == table.size * 8
    assert not folded.report.tied
    for inputs in (model.inputs, model.other_inputs):
        check(model.apply_fn, folded, model.params, *inputs)
        if not folded.report.n_inserted:
            assert not count_equations("explicit_centering", folded.apply, folded.params, *inputs)
    assert_identical(model.params, before)
    own = folded.params.params["params"]["embed"]["token_table"]["embedding"]
    assert own is table  # the head reads the very table


@pytest.mark.parametrize("name", ["gpt_untied", "bart", "whisper_encoder", "vit"])
def test_where_nothing_is_tied_nothing_is_copied(name: str) -> None:
    model = BY_NAME[name].build()
    plain = fold(model.apply_fn, model.params, *model.inputs)
    folded = fold(model.apply_fn, model.params, *model.inputs, untie=True)
    assert folded.plan == plain.plan
    assert not folded.report.untied
    assert jax.tree.structure(folded.params) == jax.tree.structure(model.params)
    assert folded.plan.extend(model.params) is model.params


# --- where the reads are -------------------------------------------------------------------------


@jax.custom_jvp
def rows_by_rule(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


rows_by_rule.defjvp(lambda x, dx: (rows_by_rule(*x), dx[0][x[1]]))


def sharded(p: Tree, ids: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    return logits(p, spread(lambda table, i: table[i])(p["table"], ids))


def cast_once(p: Tree, ids: jax.Array) -> jax.Array:
    table = (p["table"].T.astype(jnp.float64)).T
    return logits({**p, "table": table}, table[ids])


def loop(p: Tree, ids: jax.Array) -> jax.Array:
    start = jnp.zeros((ids.shape[1], VOCAB))
    return jax.lax.fori_loop(0, len(ids), lambda i, x: x + tied(p, ids[i]), start)


def greedy(p: Tree, ids: jax.Array) -> jax.Array:
    """A loop that makes the answer, token by token."""

    def step(token: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        scores = tied(p, token)
        return scores.argmax(-1), scores

    return jax.lax.scan(step, ids[:, 0], None, length=4)[1]


def either(p: Tree, ids: jax.Array) -> jax.Array:
    table = p["table"]
    rows = jax.lax.cond(ids[0, 0] > 2, lambda: table[ids], lambda: 2 * table[(ids + 1) % VOCAB])
    return logits(p, rows)


READS: dict[str, Apply] = {
    "index": tied,
    "take": lambda p, ids: logits(p, jnp.take(p["table"], ids, axis=0)),
    "clipped": lambda p, ids: logits(p, jnp.take(p["table"], ids, axis=0, mode="clip")),
    "scaled": lambda p, ids: logits(p, p["table"][ids] * np.sqrt(D)),
    "turned": lambda p, ids: logits(p, jnp.moveaxis(p["table"].T[:, ids], 0, -1)),
    "one token": lambda p, ids: logits(p, p["table"][ids[0, 0]]),
    "jit": lambda p, ids: logits(p, jax.jit(lambda table, i: table[i])(p["table"], ids)),
    "all in jit": lambda p, ids: jax.jit(tied)(p, ids),
    "remat": lambda p, ids: logits(p, jax.remat(lambda table, i: table[i])(p["table"], ids)),
    "all in remat": lambda p, ids: jax.remat(tied)(p, ids),
    "scan": lambda p, ids: jax.lax.scan(lambda c, i: (c, tied(p, i)), 0, ids)[1],
    "map": lambda p, ids: jax.lax.map(partial(tied, p), ids),
    "while": loop,
    "greedy": greedy,
    "cond": either,
    "shard_map": sharded,
    "moved once": cast_once,
    "vmap": lambda p, ids: jax.vmap(partial(tied, p))(ids),
}


@pytest.mark.parametrize("name", READS)
def test_lookups_are_found_inside_of_calls_and_loops(name: str) -> None:
    apply_fn, given = READS[name], params()
    assert counts(fold(apply_fn, given, tokens(2)).report) == (3, 3, 1)
    folded = fold(apply_fn, given, tokens(2), untie=True)
    assert counts(folded.report) == (3, 3, 0)
    assert folded.plan.copies == ("table",)
    for ids in (tokens(2), tokens(4, 7)):
        check(apply_fn, folded, given, ids)


STAY: dict[str, tuple[Apply, int]] = {
    # A derivative rule is about the operands that there are.
    "custom_jvp": (lambda p, ids: logits(p, rows_by_rule(p["table"], ids)), 0),
    # No lookup, but a product like the head's.
    "one-hot": (lambda p, ids: logits(p, jax.nn.one_hot(ids, VOCAB) @ p["table"]), 0),
    # The rows themselves are returned, or read by something else: the copy could not be centered.
    "returned": (lambda p, ids: (tied(p, ids), p["table"][ids]), 1),
    "squared": (lambda p, ids: tied(p, ids) + jnp.square(p["table"][ids]).sum(), 1),
    # A part of the table, chosen at run time, is no row.
    "part": (lambda p, ids: logits(p, jax.lax.dynamic_slice(p["table"], ids[0, :2], (3, D))), 0),
}


@pytest.mark.parametrize("name", STAY)
def test_other_reads_stay_as_they_are(name: str) -> None:
    apply_fn, n_tied = STAY[name]
    folded = fold(apply_fn, params(), tokens(), untie=True)
    assert counts(folded.report) == (3, 3, 1)
    assert not folded.plan.copies
    assert [leaf.key_path for leaf in folded.report.tied] == ["table"] * n_tied
    assert (
        "`table` stays tied: a copy for its lookups would save no mean." in str(folded.report)
    ) == (n_tied > 0)
    check(apply_fn, folded, params(), tokens())


def test_all_lookups_read_the_copy_and_nothing_else_does() -> None:
    """Two lookups, a head and statistics of the raw table."""

    def apply_fn(p: Tree, ids: jax.Array) -> Any:
        scores = logits(p, p["table"][ids]) + logits(p, p["table"][ids[:, ::-1]])
        return scores, p["table"].std(), jnp.abs(p["table"]).sum(-1)

    given, ids = params(), tokens()
    assert counts(fold(apply_fn, given, ids).report) == (6, 6, 2)
    folded = fold(apply_fn, given, ids, untie=True)
    assert counts(folded.report) == (6, 6, 0)
    check(apply_fn, folded, given, ids)
    check(apply_fn, folded, given, tokens(2, 7))


def test_tables_that_pay_only_together() -> None:
    """Rows of two tied tables are added: one centering serves both, so one copy saves nothing."""

    def apply_fn(p: Tree, ids: jax.Array) -> Any:
        x = p["table"][ids] + p["places"][ids[:, ::-1]]
        return logits(p, x), body(p, x) @ p["places"].T

    given = {**params(), "places": draw(VOCAB, D, seed=7)}
    assert counts(fold(apply_fn, given, tokens()).report)[1:] == (6, 1)
    folded = fold(apply_fn, given, tokens(), untie=True)
    assert counts(folded.report)[1:] == (6, 0)
    assert folded.plan.copies == ("places", "table")
    check(apply_fn, folded, given, tokens(2, 7))


def test_a_table_with_a_copy_is_not_edited_otherwise() -> None:
    """The original function reads leaf and copy as one: an edit of the leaf reaches its rows."""

    def apply_fn(p: Tree, ids: jax.Array) -> jax.Array:
        return norm(tied(p, ids))  # tied or not, the table could be centered along the vocabulary

    def only_head(p: Tree, x: jax.Array) -> jax.Array:
        return norm(logits(p, x))

    x = draw(2, 5, D)
    assert "table" in fold(only_head, params(), x).plan.leaf_edits()
    folded = fold(apply_fn, params(), tokens(), untie=True)
    assert folded.plan.copies == ("table",)
    assert "params/table" not in folded.plan.leaf_edits()
    check(apply_fn, folded, params(), tokens())

    def scaled(p: Tree, ids: jax.Array) -> jax.Array:  # and the head could take up the scale
        return (body(p, p["table"][ids]) * p["scale"]) @ p["table"].T

    given = {**params(), "scale": draw(D)}
    folded = fold(scaled, given, tokens(), untie=True, fold_affine=True)
    assert folded.plan.copies == ("table",)
    assert not folded.plan.affine
    check(scaled, folded, given, tokens())


def test_a_scale_that_would_be_merged_into_the_copy_alone_keeps_it_tied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No scale passes a lookup so far; of one that did, the original function would read a one."""

    def merging(traced: Traced, options: Any, kept: Any) -> Placement:
        merge = ScaleEdit("params/gate", (("copies/table", (1,)),))
        merges = (merge,) if "copies/table" in traced.leaves else ()
        return replace(placement_of(traced, options, kept), merges=merges)

    monkeypatch.setattr("jax_lnfold.placement.untying.placement_of", merging)
    folded = fold(tied, {**params(), "gate": draw(D)}, tokens(), untie=True)
    assert not folded.plan.copies
    assert "a scale would be merged" in folded.report.tied[0].reason


def test_a_table_that_is_only_looked_up_needs_no_copy() -> None:
    def apply_fn(p: Tree, ids: jax.Array) -> jax.Array:
        return body(p, p["table"][ids]) @ p["blocks"][0]["up"]

    folded = fold(apply_fn, params(), tokens(), untie=True)
    assert counts(folded.report) == (3, 3, 0)
    assert not folded.plan.copies


# --- the tree ------------------------------------------------------------------------------------


def test_the_tree_is_a_pytree_with_stable_key_paths() -> None:
    given = params()
    folded = fold(tied, given, tokens(), untie=True)
    tree = folded.params
    paths = [path for path, _ in leaf_paths(tree)]
    assert paths[-2:] == ["params/table", "copies/table"]
    assert [leaf.key_path for leaf in folded.plan.leaves] == paths
    assert tree.copies["table"] is not tree.params["table"]
    np.testing.assert_allclose(tree.copies["table"].mean(-1), 0, atol=1e-15)
    centered = given["table"] - given["table"].mean(-1, keepdims=True)
    np.testing.assert_allclose(tree.copies["table"], centered, atol=1e-14)
    same = jax.tree.map(lambda x: x, tree)
    assert isinstance(same, Untied)
    assert jax.tree.structure(same) == jax.tree.structure(tree)


def test_other_checkpoints_are_extended_and_centered() -> None:
    folded = fold(tied, params(), tokens(), untie=True)
    newer = params(seed=5)
    tree = folded.plan.center(folded.plan.extend(newer))
    want = tied(newer, tokens())
    assert relative_difference(folded.apply(tree, tokens()), want) < 1e-12
    assert relative_difference(tied(tree.params, tokens()), want) < 1e-12
    assert folded.plan.extend(tree) is tree
    with pytest.raises(TreeError, match=r"pass plan\.extend\(params\)"):
        folded.apply(newer, tokens())
    with pytest.raises(TreeError, match="no tree with copies"):
        folded.apply({"params": tree.params, "copies": tree.copies}, tokens())
    with pytest.raises(TreeError, match="'table', which is to be copied, is missing"):
        folded.plan.extend({"blocks": newer["blocks"]})
    wrong = {"table": tree.copies["table"].astype(jnp.float32)}
    with pytest.raises(TreeError, match="another shape or dtype"):
        folded.apply(Untied(tree.params, wrong), tokens())
    with pytest.raises(TreeError, match="not the tree"):
        folded.apply(Untied(tree.params, {"tables": tree.copies["table"]}), tokens())


@pytest.mark.parametrize("table", ["", "numbered"])
def test_odd_key_paths(table: str) -> None:
    """A tree that is one leaf, and key paths that are alike."""
    given: Any = draw(VOCAB, D)
    make = (lambda p: p) if not table else (lambda p: p["a"]["b"])
    if table:
        given = {"a": {"b": given}, "a/b": draw(2)}

    def apply_fn(p: Any, ids: jax.Array) -> jax.Array:
        x = make(p)[ids]
        x = norm(x) + 2 * norm(jnp.square(norm(x)) @ jnp.ones((D, D)) + x)
        return norm(make(p)[ids]) @ make(p).T + (norm(make(p)[ids]) * x) @ make(p).T

    folded = fold(apply_fn, given, tokens(), untie=True)
    assert len(folded.plan.copies) == 1
    check(apply_fn, folded, given, tokens())
    check(apply_fn, folded, given, tokens(2, 4))
    tree = folded.plan.center(folded.plan.extend(given))
    assert relative_difference(folded.apply(tree, tokens()), apply_fn(given, tokens())) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_copies_keep_the_dtype_of_their_leaf(dtype: Any) -> None:
    given = jax.tree.map(lambda x: x.astype(dtype), params())
    folded = fold(tied, given, tokens(), untie=True)
    assert folded.params.copies["table"].dtype == dtype
    assert folded.report.untied[0].bytes == VOCAB * D * jnp.dtype(dtype).itemsize
    rtol = 3e-5 if dtype == jnp.float32 else 0.2
    check(tied, folded, given, tokens(), rtol=rtol)


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_donated_parameters() -> None:
    """The table stays, since the head reads it; what is edited gives up its memory."""
    given = params()
    table, down, want = given["table"], given["blocks"][0]["down"], tied(given, tokens())
    folded = fold(tied, given, tokens(), untie=True, donate=True)
    assert down.is_deleted()
    assert not table.is_deleted()
    assert folded.params.params["table"] is table
    got = jax.jit(folded.apply, donate_argnums=0)(folded.params, tokens())
    assert relative_difference(got, want) < 1e-12


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_a_table_that_is_centered_already_is_still_copied() -> None:
    """So that the tree can be donated, and trained."""
    given = params()
    given["table"] = given["table"] - given["table"].mean(-1, keepdims=True)
    want = tied(given, tokens())
    folded = fold(tied, given, tokens(), untie=True)
    tree = folded.params
    assert tree.copies["table"] is not tree.params["table"]
    got = jax.jit(folded.apply, donate_argnums=0)(tree, tokens())
    assert relative_difference(got, want) < 1e-12


# --- transformations, plans, several functions ---------------------------------------------------


def test_transformations() -> None:
    given, ids = params(), tokens()
    folded = fold(tied, given, ids, untie=True)
    plan = folded.plan

    def loss(apply_fn: Apply, p: Any) -> jax.Array:
        return jnp.square(apply_fn(p, ids) - 1.0).sum()

    def through(p: Tree) -> jax.Array:  # tied, in terms of the original's parameters
        return loss(folded.apply, plan.center(plan.extend(p)))

    want = jax.grad(partial(loss, tied))(given)
    assert relative_difference(jax.grad(through)(given), want) < 1e-10
    parts = jax.grad(partial(loss, folded.apply))(folded.params)
    looked_up = parts.copies["table"]  # along the mean, the folded function is another one
    both = parts.params["table"] + looked_up - looked_up.mean(-1, keepdims=True)
    assert relative_difference(both, want["table"]) < 1e-10
    many = jnp.stack([ids, (ids + 3) % VOCAB])
    got = jax.vmap(folded.apply, (None, 0))(folded.params, many)
    assert relative_difference(got, jax.vmap(tied, (None, 0))(given, many)) < 1e-12
    trees = [params(1), params(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trees)
    got = jax.vmap(lambda p: folded.apply(plan.center(plan.extend(p)), ids))(stacked)
    assert relative_difference(got, jnp.stack([tied(p, ids) for p in trees])) < 1e-12


@pytest.mark.parametrize("name", ["scan", "cond", "all in remat", "jit", "shard_map"])
def test_derivatives_pass_calls_and_loops(name: str) -> None:
    given, ids, apply_fn = params(), tokens(2), READS[name]
    folded = fold(apply_fn, given, ids, untie=True)

    def through(p: Tree) -> jax.Array:
        return folded.apply(folded.plan.center(folded.plan.extend(p)), ids)

    def loss(p: Tree, f: Apply) -> jax.Array:
        return jnp.square(f(p) - 1.0).sum()

    want = jax.jit(jax.grad(partial(loss, f=lambda p: apply_fn(p, ids))))(given)
    got = jax.jit(jax.grad(partial(loss, f=through)))(given)
    assert relative_difference(got, want) < 1e-10


def test_training_keeps_copies_centered() -> None:
    folded = fold(tied, params(), tokens(), untie=True)
    tx = optax.chain(optax.adam(1e-2), jax_lnfold.center_updates(folded.plan))
    tree, state = folded.params, tx.init(folded.params)
    for _ in range(3):
        grads = jax.grad(lambda p: jnp.square(folded.apply(p, tokens()) - 1).sum())(tree)
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    assert folded.plan.is_centered(tree)


def test_plans_are_read_back_and_followed() -> None:
    given, ids = params(), tokens()
    folded = fold(tied, given, ids, untie=True)
    plan = FoldPlan.from_json(folded.plan.to_json())
    assert plan == folded.plan
    assert plan.version == 5
    assert jax_lnfold.plan_fold(tied, given, ids, untie=True) == plan
    shapes = jax.eval_shape(lambda x: x, (given, ids))
    assert jax_lnfold.plan_fold(tied, *shapes, untie=True) == plan
    assert jax_lnfold.analyze(tied, *shapes, untie=True).untied == folded.report.untied
    centered = fold(tied, given, ids, plan=plan, center=True)
    assert counts(centered.report) == (3, 3, 0)
    assert centered.report.untied == folded.report.untied
    check(tied, centered, given, ids)
    followed = fold(tied, plan.center(plan.extend(given)), tokens(2, 4), plan=plan)
    check(tied, followed, given, tokens(2, 4))
    without_weights = jax.eval_shape(lambda: folded.params)
    compiled = fold(tied, without_weights, shapes[1], plan=plan)
    assert relative_difference(compiled.apply(folded.params, ids), tied(given, ids)) < 1e-12
    with pytest.raises(FoldError, match="leave one of both out"):
        fold(tied, given, ids, plan=plan, untie=True)


def test_a_folded_function_is_folded_again() -> None:
    """The function of the tree with copies is one like all others."""
    folded = fold(tied, params(), tokens(), untie=True)
    again = fold(folded.apply, folded.params, tokens(), untie=True)
    assert not again.plan.copies
    assert counts(again.report) == (0, 0, 0)
    assert jax.tree.structure(again.params) == jax.tree.structure(folded.params)
    check(tied, folded, params(), tokens())


def test_traces_that_notice_the_copy_are_refused() -> None:
    def apply_fn(p: Tree, ids: jax.Array, raw: bool = False) -> Any:
        rows = p["table"][ids]
        return (logits(p, rows), rows) if raw else logits(p, rows)

    folded = fold(apply_fn, params(), tokens(), untie=True)
    folded.apply(folded.params, tokens(), raw=False)
    with pytest.raises(PlanMismatchError, match="copies/table"):
        folded.apply(folded.params, tokens(), raw=True)


def test_several_functions_share_the_copy() -> None:
    def encode(p: Tree, ids: jax.Array) -> jax.Array:
        return body(p, p["table"][ids]).mean(1)

    def decode(p: Tree, token: jax.Array) -> jax.Array:
        return logits(p, jax.jit(lambda table, i: table[i])(p["table"], token))

    given, functions = params(), {"encode": encode, "decode": decode}
    inputs = {"encode": tokens(), "decode": tokens(1, 4)[0, 0]}
    assert counts(fold(functions, given, inputs).report) == (6, 6, 2)
    folded = fold(functions, given, inputs, untie=True)
    assert counts(folded.report) == (6, 6, 0)
    assert folded.plan.copies == ("table",)
    for name, x in {**inputs, "decode": tokens(1, 7)[0, 3]}.items():
        check(functions[name], folded[name], given, x)
    assert folded["encode"].params is folded.params
    again = fold(functions, given, inputs, plan=folded.plan, center=True)
    assert counts(again.report) == (6, 6, 0)
    check(encode, again["encode"], given, tokens(2, 4))


def test_the_first_call_may_decide() -> None:
    folded = fold(tied, params(), untie=True)
    want = tied(params(), tokens())
    assert relative_difference(jax.jit(folded)(tokens()), want) < 1e-12
    assert folded.plan.copies == ("table",)


def test_verify_knows_both_trees() -> None:
    given = params()
    folded = fold(tied, given, tokens(), untie=True)
    found = jax_lnfold.verify(tied, given, folded, tokens(2, 7))
    assert found.difference < 1e-12
    assert found.drift <= 1


def test_means_are_measured_with_copies() -> None:
    given = params()
    folded = fold(tied, given, tokens(), untie=True)
    for tree in (given, folded.params):
        for norm in jax_lnfold.measure(folded, tree, tokens(2, 7)).norms:
            assert norm.after is not None
            assert norm.after.share < 1e-25


# --- options -------------------------------------------------------------------------------------


def test_excluded_leaves_stay_tied() -> None:
    excluded: list[Any] = [{"table"}, lambda path: path == "table"]
    for exclude in excluded:
        folded = fold(tied, params(), tokens(), untie=True, exclude=exclude)
        assert counts(folded.report) == (3, 3, 1)
        assert not folded.plan.copies
        assert "`table` stays tied: it is excluded." in str(folded.report)
    folded = fold(tied, params(), tokens(), untie=True, exclude={"blocks/0/down"})
    assert folded.plan.copies in ((), ("table",))
    assert "params/blocks/0/down" not in folded.plan.leaf_edits()
    check(tied, folded, params(), tokens())
    with pytest.raises(FoldError, match="no leaf of params has the key path 'tables'"):
        jax_lnfold.analyze(tied, params(), tokens(), untie=True, exclude={"tables"})


def test_the_report_says_which_leaf_and_how_many_bytes() -> None:
    text = str(fold(tied, params(), tokens(), untie=True).report)
    assert f"`table` untied by a copy ({VOCAB * D * 8} B), which lookups read." in text
    assert "untied" not in str(fold(tied, params(), tokens()).report)


@pytest.mark.parametrize("untie", [1, None, "table"])
def test_bad_values(untie: Any) -> None:
    with pytest.raises(FoldError, match=r"untie: .* is not a bool"):
        fold(tied, params(), tokens(), untie=untie)


def test_models_that_hold_their_parameters_are_refused() -> None:
    model = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    for function in (fold, jax_lnfold.analyze, jax_lnfold.plan_fold):
        with pytest.raises(FoldError, match="untie: a model that holds its parameters"):
            function(model, jnp.ones((2, 4)), untie=True)
    plan = fold(tied, params(), tokens(), untie=True).plan
    with pytest.raises(FoldError, match="untie: a model that holds its parameters"):
        fold(model, jnp.ones((2, 4)), plan=plan, center=True)


# --- random programs -----------------------------------------------------------------------------


def random_program(seed: int) -> Apply:
    """Reads of every kind, in random places, of one table and of another one."""
    rng = np.random.default_rng(seed)

    def rows(table: jax.Array, ids: jax.Array, kind: int) -> jax.Array:
        made: list[Callable[[], jax.Array]] = [
            lambda: table[ids],
            lambda: jnp.take(table, ids, axis=0),
            lambda: jax.jit(lambda t, i: t[i])(table, ids),
            lambda: jax.remat(lambda t, i: 2 * t[i])(table, ids),
            lambda: jax.lax.map(lambda i: table[i], ids),
            lambda: jax.nn.one_hot(ids, VOCAB) @ table,
            lambda: table.astype(jnp.float64)[ids] * jnp.arange(1.0, 1.0 + len(ids))[:, None, None],
            lambda: jnp.square(table[ids]),
        ]
        return made[kind]()

    kinds, tables = rng.integers(8, size=3), rng.integers(2, size=5)
    ends = rng.integers(5, size=2)

    def apply_fn(p: Tree, ids: jax.Array) -> Any:
        both = p["table"], p["other"]
        x = rows(both[tables[0]], ids, kinds[0]) + rows(both[tables[1]], ids, kinds[1])
        y = body(p, x)
        if kinds[2] > 3:
            y = y + body(p, rows(both[tables[2]], ids, kinds[2]))
        out = []
        for end, which in zip(ends, tables[3:], strict=True):
            table = both[which]
            out += [
                [y @ table.T],
                [norm(y @ table.T)],
                [jax.nn.softmax(y @ table.T), table.std()],
                [y],
                [y @ table.T, x if seed % 3 == 0 else y],
            ][end]
        return out

    return apply_fn


def test_random_programs() -> None:
    untied = 0
    for seed in range(30):
        apply_fn, given = (
            random_program(seed),
            {**params(seed), "other": draw(VOCAB, D, seed=seed + 1)},
        )
        plain = fold(apply_fn, given, tokens(2, 3))
        folded = fold(apply_fn, given, tokens(2, 3), untie=True)
        assert FoldPlan.from_json(folded.plan.to_json()) == folded.plan
        check(apply_fn, folded, given, tokens(2, 3))
        untied += bool(folded.plan.copies)
        if folded.plan.copies:
            check(apply_fn, folded, given, tokens(3, 4))
            better = folded.report.n_inserted < plain.report.n_inserted
            assert better or folded.report.n_folded > plain.report.n_folded
    assert untied > 5
