"""Linear layers behind a LayerNorm that no longer see what is left of its mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from safetensors.numpy import load_file, save_file

import jax_lnfold
from jax_lnfold import FoldPlan, HideEdit, HidingReader, PlanFormatError, PlanMismatchError
from jax_lnfold.cli.commands import main
from jax_lnfold.options import check_options
from jax_lnfold.placement.hiding import hidden_means
from jax_lnfold.placement.planning import follow, make_plan, placement_of
from jax_lnfold.plan.edits.hide import Unseen
from jax_lnfold.plan.file import LeafSpec
from jax_lnfold.program.tracing import trace
from tests.helpers.contracts import relative_difference

D, H = 6, 7
Params = dict[str, Any]


def draw(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) / 2 + 0.1)


PARAMS = {
    "first": draw(3, D),
    "g": 1 + draw(D, seed=1) / 4,
    "s": draw(D, seed=2),
    "w": draw(D, H, seed=3),
    "b": draw(H, seed=4),
    "v": draw(H, D, seed=5),
    "joined": draw(2 * D, H, seed=6),
    "heads": draw(D, 2, 4, seed=7),
    "of_heads": draw(2, 4, seed=8),
    "gate": draw(D, seed=9),
    "mix": draw(5, 5, seed=11),
    "by_token": draw(5, D, seed=10),
}
X = draw(2, 5, 3, seed=20)


def normed(x: Array, keep: bool = True) -> Array:
    c = x - x.mean(-1, keepdims=True) if keep else x
    return c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3)


def late(p: Params, x: Array) -> Array:
    """Everything that is read is nonlinear in what was read before."""
    return normed(x) * p["g"] + p["s"]


def early(p: Params, x: Array) -> Array:
    """Haiku's spelling: the scale meets the deviation first."""
    c = x - x.mean(-1, keepdims=True)
    return c * (p["g"] * jax.lax.rsqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3)) + p["s"]


def block(read: Callable[[Params, Array], Array], norm: Any = late) -> Callable[..., Array]:
    """The norm of a stream that something else reads, too, and a residual connection around."""

    def model(p: Params, x: Array) -> Array:
        h = jnp.sin(x @ p["first"])
        y = norm(p, h)
        return normed(jnp.sin(y) + jnp.sum(jnp.tanh(read(p, y)), -1, keepdims=True) * h)

    return model


def dense(p: Params, y: Array) -> Array:
    return y @ p["w"] + p["b"]


def joined(p: Params, y: Array) -> Array:
    return jnp.concatenate([jnp.cos(y), y], -1) @ p["joined"] + p["b"]


def heads(p: Params, y: Array) -> Array:
    return (jnp.einsum("btd,dhf->bthf", y, p["heads"]) + p["of_heads"]).reshape(2, 5, 8)


def masked(p: Params, y: Array) -> Array:
    return (y * (y[..., :1] > 0)) @ p["w"] + p["b"]


def plain(p: Params, x: Array) -> Array:
    return normed(x) * p["g"]


FOUND: dict[str, tuple[Callable[..., Array], HidingReader]] = {
    "dense": (block(dense), HidingReader("w", 0, 0, "b")),
    "scale first": (block(dense, early), HidingReader("w", 0, 0, "b")),
    "joined": (block(joined), HidingReader("joined", 0, D, "b")),
    "heads": (block(heads), HidingReader("heads", 0, 0, "of_heads")),
    "transposed": (
        block(lambda p, y: jnp.moveaxis(jnp.moveaxis(y, 2, 0), 0, 2) @ p["v"].T + p["b"]),
        HidingReader("v", 1, 0, "b"),
    ),
    "no shift, masked": (block(masked, plain), HidingReader("w", 0, 0, None)),
}
LEFT: dict[str, Callable[..., Array]] = {
    "masked": block(masked),
    "no bias": block(lambda p, y: y @ p["w"]),
    "bias behind a function": block(lambda p, y: jnp.sin(y @ p["w"]) + p["b"]),
    "gated": block(lambda p, y: y * p["gate"] @ p["w"], plain),
    "times itself": block(lambda p, y: (y * y) @ p["w"] + p["b"]),
    "kernel read twice": block(lambda p, y: dense(p, y) + dense(p, jnp.cos(y))),
    "bias read elsewhere": block(lambda p, y: dense(p, y) * p["b"]),
    "kernel made of a leaf": block(lambda p, y: y @ (2 * p["w"]) + p["b"]),
    "part of the features": block(lambda p, y: y[..., 1:] @ p["w"][1:] + p["b"]),
    "another shift": block(lambda p, y: dense(p, y + p["gate"])),
    "no LayerNorm": block(dense, lambda p, x: normed(x, keep=False) * p["g"] + p["s"]),
    "half a mean": block(dense, lambda p, x: normed(x - x[..., :3].mean(-1, keepdims=True), False)),
    "scale by token": block(dense, lambda p, x: normed(x) * p["by_token"] + p["s"]),
    "products over tokens": block(lambda p, y: jnp.einsum("btd,tu->bud", y, p["mix"]), plain),
    "kernel is the scale": block(lambda p, y: (y @ p["g"])[..., None] + p["b"], plain),
}


def found(fn: Any, params: Params = PARAMS, x: Array = X) -> FoldPlan:
    placement = placement_of(trace(fn, params, (x,)), check_options(2.0, (), False))
    plan = make_plan(placement)
    return replace(plan, hidden=(*hidden_means(placement, plan).values(),))


# --- what is found, and what it does -------------------------------------------------------------


@pytest.mark.parametrize("name", FOUND)
def test_readers_that_are_found(name: str) -> None:
    """The original function is what it was; a reader sees nothing of a number added to all of n."""
    fn, reader = FOUND[name]
    plan = found(fn)
    (edit,) = plan.hidden
    assert (edit.key_path, edit.readers) == ("g", (reader,))
    assert edit.shift == (None if reader.bias is None else "s")
    edited = plan.center(PARAMS)
    assert {k for k in PARAMS if edited[k] is not PARAMS[k]} == {reader.kernel, reader.bias} - {
        None
    }
    for x in (X, draw(2, 5, 3, seed=30)):
        assert relative_difference(fn(edited, x), fn(PARAMS, x)) < 1e-12
    kernel, old = (np.moveaxis(p[reader.kernel], reader.axis, 0) for p in (edited, PARAMS))
    rows, g = slice(reader.start, reader.start + D), np.asarray(PARAMS["g"])
    assert abs(np.tensordot(g, kernel[rows], 1)).max() < 1e-14
    assert abs(np.tensordot(g, old[rows], 1)).max() > 0.1
    changed = (kernel - old)[rows] * g.reshape(-1, *(1,) * (kernel.ndim - 1))
    np.testing.assert_allclose(changed, np.broadcast_to(changed[:1], changed.shape), atol=1e-13)
    assert (kernel[: reader.start] == old[: reader.start]).all()


@pytest.mark.parametrize("name", LEFT)
def test_readers_that_are_left(name: str) -> None:
    assert found(LEFT[name]).hidden == ()


def test_several_readers_and_other_trees() -> None:
    """NumPy and JAX arrays, tracers, float32 and bfloat16; edited again it is the same function."""

    def fn(p: Params, x: Array) -> Array:
        return block(lambda p, y: dense(p, y) + jnp.sum(heads(p, y), -1, keepdims=True))(p, x)

    plan = found(fn)
    assert {r.kernel for r in plan.hidden[0].readers} == {"w", "heads"}
    want = fn(PARAMS, X)
    for edited in (
        plan.center(PARAMS),
        jax.jit(plan.center)(PARAMS),
        plan.center(plan.center(PARAMS)),
    ):
        assert relative_difference(fn(edited, X), want) < 1e-12
    host = plan.center(jax.tree.map(np.asarray, PARAMS))
    assert isinstance(host["w"], np.ndarray)
    assert relative_difference(fn(host, X), want) < 1e-12
    for dtype, digits in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        params = jax.tree.map(lambda x, to=dtype: x.astype(to), PARAMS)
        given = plan.center(jax.tree.map(jnp.copy, params), donate=True)
        wide = [jax.tree.map(lambda x: x.astype(float), tree) for tree in (params, given)]
        assert given["w"].dtype == dtype
        assert relative_difference(*(fn(p, X) for p in wide)) < digits
    kept = jax_lnfold.fold(fn, PARAMS, X, exclude={"w"}, plan=None)
    assert kept.plan.hidden == ()


def test_scales_of_zero_are_refused() -> None:
    plan = found(block(dense))
    for tree in (PARAMS, jax.tree.map(np.asarray, PARAMS)):
        with pytest.raises(jax_lnfold.TreeError, match="would overflow"):
            plan.center({**tree, "g": tree["g"] * (np.arange(D) > 0)})


# --- plans ---------------------------------------------------------------------------------------


def test_plans_are_followed_where_they_hold() -> None:
    fn, plan = block(dense), found(block(dense))
    assert FoldPlan.from_json(plan.to_json()) == plan
    assert plan.version == 10
    assert plan.told()[-1] == "1 linear layer made blind to means that are left out"
    follow(plan, trace(fn, PARAMS, (draw(1, 4, 3),)).graph(), 2.0)
    for other in (LEFT["masked"], LEFT["kernel read twice"], block(dense, plain)):
        with pytest.raises(PlanMismatchError, match="the scale 'g', or what reads it"):
            follow(plan, trace(other, PARAMS, (X,)).graph(), 2.0)
    follow(plan, trace(lambda p, x: late(p, x @ p["first"]), PARAMS, (X,)).graph(), 2.0)


SHAPES = {"g": (6,), "s": (6,), "w": (6, 7), "b": (7,), "v": (7, 6)}
LEAVES = tuple(LeafSpec(path, shape) for path, shape in SHAPES.items())
GOOD = HidingReader("w", 0, 0, "b")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (HideEdit("g", "s", ()), "nothing can be hidden"),
        (HideEdit("w", None, (GOOD,)), "not different leaves"),
        (HideEdit("g", "b", (GOOD,)), "not different leaves"),
        (HideEdit("g", None, (GOOD,)), "do not fit"),
        (HideEdit("g", "s", (replace(GOOD, axis=1, start=2),)), "no place for a scale"),
        (HideEdit("g", "s", (replace(GOOD, start=1),)), "no place for a scale"),
        (HideEdit("g", "s", (replace(GOOD, axis=2),)), "no place for a scale"),
        (HideEdit("g", "s", (HidingReader("v", 1, 0, "x"),)), "not different leaves"),
        (HideEdit("b", None, (HidingReader("w", 1, 0, "s"),)), "do not fit"),
    ],
)
def test_broken_edits(edit: HideEdit, why: str) -> None:
    with pytest.raises(PlanFormatError, match=why):
        FoldPlan(LEAVES, (), hidden=(edit,))


def test_nothing_else_is_done_to_the_leaves() -> None:
    along = jax_lnfold.AxisSet.over((6, 7), [1])
    for path in ("w", "v"):
        edits = (jax_lnfold.CenterEdit(path, along if path == "w" else along.over((7, 6), [1])),)
        if path == "v":
            assert FoldPlan(LEAVES, edits, hidden=(HideEdit("g", "s", (GOOD,)),)).version == 10
            continue
        with pytest.raises(PlanFormatError, match="a part in what is hidden"):
            FoldPlan(LEAVES, edits, hidden=(HideEdit("g", "s", (GOOD,)),))
    text = json.loads(FoldPlan(LEAVES, (), hidden=(HideEdit("g", "s", (GOOD,)),)).to_json())
    text["hidden"][0]["readers"][0]["axis"] = "0"
    with pytest.raises(PlanFormatError, match="broken plan"):
        FoldPlan.from_json(json.dumps(text))


def test_other_trees_of_a_plan() -> None:
    """Boxes around leaves; a scale of another size is refused."""
    plan = found(block(dense))
    boxed = {k: {"value": x} for k, x in PARAMS.items()}
    want = plan.center(PARAMS)["w"]
    np.testing.assert_array_equal(plan.center(boxed)["w"]["value"], want)
    with pytest.raises(jax_lnfold.TreeError, match="has shape"):
        plan.center({**PARAMS, "g": jnp.ones(D + 1)})


def test_checkpoints(tmp_path: Path) -> None:
    plan = found(block(dense))
    params = {k: np.asarray(x) for k, x in PARAMS.items()}
    save_file(params, tmp_path / "before.safetensors")
    plan.to_json(tmp_path / "plan.json")
    source, dest = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    main(["center", str(tmp_path / "plan.json"), str(source), str(dest)])
    want, got = plan.center(params), load_file(dest)
    assert all((got[k] == want[k]).all() for k in params)


# --- folds ---------------------------------------------------------------------------------------

VALUE_OF_UNSEEN = Unseen.value
MEAN: dict[str, Any] = {"approximate": {"mean"}}


def post_ln(p: Any, x: Array) -> Array:
    for q in p["blocks"]:
        y = late(q, x + jnp.sin(x @ q["in"]) @ q["out"])
        x = y + jnp.sin(y @ q["w"] + q["b"]) @ q["v"]
    return x


def block_of(seed: int) -> Params:
    shapes = {"in": (D, H), "out": (H, D), "w": (D, H), "b": (H,), "v": (H, D), "s": (D,)}
    found = {k: draw(*shape, seed=seed + i) for i, (k, shape) in enumerate(shapes.items())}
    return {**found, "g": 1 + draw(D, seed=seed + 9) / 3}


DEEP = {"blocks": [block_of(0), block_of(30)]}
BATCHES = [draw(40, D, seed=50 + i) for i in range(5)]


def test_folds_hide_what_they_leave_out() -> None:
    """Less is off with it; the original function is the same, and the plan says where."""
    folded = jax_lnfold.fold(post_ln, DEEP, calibrate=BATCHES, budget=math.inf, **MEAN)
    assert folded.report.n_dropped == 2
    assert {e.key_path for e in folded.plan.hidden} == {"blocks/0/g", "blocks/1/g"}
    without = replace(folded.plan, hidden=())
    plain = jax_lnfold.fold(post_ln, DEEP, BATCHES[0], plan=without, center=True, **MEAN)
    for x in BATCHES[4], draw(40, D, seed=70):
        want = post_ln(DEEP, x)
        assert relative_difference(post_ln(folded.params, x), want) < 1e-12
        assert np.linalg.norm(folded(x) - want) < np.linalg.norm(plain(x) - want)
    again = jax_lnfold.fold(post_ln, DEEP, BATCHES[0], plan=folded.plan, center=True, **MEAN)
    np.testing.assert_allclose(again(BATCHES[0]), folded(BATCHES[0]), rtol=1e-12)
    assert "2 linear layers made blind" in str(folded.report)


@pytest.mark.parametrize("why", ["no budget", "uneven scale", "worse"])
def test_folds_that_hide_nothing(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a budget, where a scale is next to zero, and where it is worse on held-out data."""
    params, budget = DEEP, math.inf
    if why == "no budget":
        budget = 0.0
    elif why == "uneven scale":
        g = jnp.ones(D).at[2].set(1e-3)
        params = {"blocks": [{**p, "g": g} for p in DEEP["blocks"]]}
    else:
        params = jax.tree.map(np.asarray, DEEP)  # edited by NumPy: nothing is compiled
        monkeypatch.setattr(Unseen, "value", lambda *args: -20 * VALUE_OF_UNSEEN(*args))
    folded = jax_lnfold.fold(post_ln, params, calibrate=BATCHES, budget=budget, **MEAN)
    assert folded.plan.hidden == ()
    assert folded.report.n_dropped == (0 if why == "no budget" else 2)


def test_training_goes_on() -> None:
    """What is hidden need not stay so: updates of these leaves are as they are."""
    folded = jax_lnfold.fold(post_ln, DEEP, calibrate=BATCHES, budget=math.inf, **MEAN)
    tx = optax.chain(optax.sgd(0.1), jax_lnfold.center_updates(folded.plan))
    state = tx.init(folded.params)
    grads = jax.tree.map(jnp.ones_like, folded.params)
    updates, _ = tx.update(grads, state, folded.params)
    np.testing.assert_allclose(updates["blocks"][0]["w"], -0.1)
    assert abs(updates["blocks"][0]["out"].mean(-1)).max() < 1e-12
