"""Many leaves at once: how many programs are compiled, and what is edited in place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jax_lnfold
from jax_lnfold import AxisSet, CenterEdit, FoldPlan, LeafSpec, ScaleEdit
from jax_lnfold.plan import editing, numpy_leaf, together

Tree = dict[str, Any]
D, WIDE = 6, 10
COMPILED = "/jax/core/compile/backend_compile_duration"


def block(p: Tree, s: jax.Array) -> jax.Array:
    h = jax.nn.standardize(s) * p["g"] + p["c"]
    return s + jnp.tanh(h @ p["w"] + p["b"]) @ p["v"]


def model(p: Tree, x: jax.Array) -> jax.Array:
    s, layers = x @ p["stem"], {k: v for k, v in p.items() if k.isdigit()}
    for layer in layers.values():
        s = block(layer, s)
    return jax.nn.standardize(s) @ p["head"]


def scanned(p: Tree, x: jax.Array) -> jax.Array:
    s, _ = jax.lax.scan(lambda s, layer: (block(layer, s), None), x @ p["stem"], p["layers"])
    return jax.nn.standardize(s) @ p["head"]


SIZES = {"g": (D,), "c": (D,), "w": (D, WIDE), "b": (WIDE,), "v": (WIDE, D)}
EDITED = len(SIZES) + 1  # and the stem


def tree(depth: int, stacked: bool = False, dtype: Any = np.float64) -> Tree:
    rng = np.random.default_rng(0)

    def made(*shape: int) -> np.ndarray:
        return rng.normal(0.3, 1, shape).astype(dtype)

    if stacked:
        layers: Tree = {"layers": {k: made(depth, *n) for k, n in SIZES.items()}}
    else:
        layers = {str(i): {k: made(*n) for k, n in SIZES.items()} for i in range(depth)}
    return {"stem": made(4, D), "head": made(D, 3), **layers}


X = np.random.default_rng(1).normal(size=(2, 4))


def plan_of(params: Tree, affine: bool = True) -> FoldPlan:
    function = scanned if "layers" in params else model
    return jax_lnfold.plan_fold(function, params, X, fold_affine=affine)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled meanwhile."""
    found: list[str] = []
    active = [True]

    def note(event: str, _: float, **__: Any) -> None:
        if event == COMPILED and active:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        active.clear()


# --- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("depth", "stacked", "programs"), [(3, True, 1), (1, False, 1), (4, False, 1), (7, False, 2)]
)
def test_programs_for_all_leaves(depth: int, stacked: bool, programs: int, donate: bool) -> None:
    """One; one more for what is there once, if layers are many; and a look before a donation."""
    params = jax.tree.map(jnp.asarray, tree(depth, stacked))
    plan, want = plan_of(params), plan_of(params).center(jax.tree.map(np.asarray, params))
    together._compiled.cache_clear()
    with compilations() as found:
        centered = plan.center(params, donate=donate)
        first = len(found)
        assert first == programs * (1 + donate)
        plan.center(jax.tree.map(jnp.asarray, tree(depth, stacked)), donate=donate)
        assert len(found) == first
    for one, other in zip(*map(jax.tree.leaves, (centered, want)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
        assert not one.committed


def test_numpy_leaves_need_no_program() -> None:
    params = tree(2)
    plan = plan_of(params)
    with compilations() as found:
        plan.center(params)
        plan.is_centered(params)
        plan.center(params, donate=True)
    assert not found


def test_leaves_in_different_places() -> None:
    """Each place has its programs; what is not committed goes where its sources are."""
    params, devices = tree(4), jax.devices()
    plan, want = plan_of(params), plan_of(params).center(params)
    mesh = NamedSharding(Mesh(np.array(devices[:2]), ("x",)), PartitionSpec("x"))
    placed = {
        **{k: jnp.asarray(v) for k, v in params.items() if not k.isdigit()},
        "0": jax.device_put(params["0"], devices[1]),
        "1": {**params["1"], "w": jnp.asarray(params["1"]["w"])},  # NumPy sources
        "2": jax.device_put(params["2"], mesh),
        "3": {k: jnp.asarray(v) if k == "b" else v for k, v in params["3"].items()},
    }
    for donate in (False, True):
        given = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, placed)
        found = plan.center(given, donate=donate)
        for path, x in jax.tree_util.tree_leaves_with_path(found):
            y, old = want, placed
            for key in path:
                y, old = y[key.key], old[key.key]
            np.testing.assert_allclose(x, y, atol=1e-12)
            assert isinstance(x, np.ndarray) == isinstance(old, np.ndarray)
            if isinstance(old, jax.Array):
                assert x.sharding == old.sharding


def test_what_is_done_is_left_and_the_rest_edited() -> None:
    params = jax.tree.map(jnp.asarray, tree(5))
    plan = plan_of(params)
    done = plan.center(params)
    mixed = {**done, "3": params["3"]}
    again = plan.center(mixed)
    for path in ("0", "1", "2", "4"):
        assert all(again[path][k] is done[path][k] for k in SIZES)
    for k in SIZES:
        np.testing.assert_allclose(again["3"][k], done["3"][k], atol=1e-14)


HOST = SingleDeviceSharding(jax.devices()[1], memory_kind="pinned_host")
PLACES = {
    "in another order": lambda d: [Mesh(d, ("x",)), Mesh(d[::-1], ("x",))],
    "explicit in part": lambda d: [
        Mesh(d, ("x",)),
        Mesh(d, ("x",), axis_types=(AxisType.Explicit,)),
        Mesh(d[None], ("y", "x"), axis_types=(AxisType.Explicit,) * 2),
    ],
    "on a host": lambda _: [HOST, SingleDeviceSharding(jax.devices()[1])],
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("donate", [False, True])
def test_places_that_no_program_has_together(name: str, donate: bool) -> None:
    params, places = tree(4), PLACES[name](np.array(jax.devices()[:2]))
    plan = plan_of(params)
    for i, k in enumerate(params):
        place = places[i % len(places)]
        place = NamedSharding(place, PartitionSpec()) if isinstance(place, Mesh) else place
        params[k] = jax.device_put(params[k], place)
    want = plan.center(jax.tree.map(np.asarray, params))
    shardings = jax.tree.map(lambda x: x.sharding, params)
    found = plan.center(params, donate=donate)
    assert plan.is_centered(found)
    assert jax.tree.map(lambda x: x.sharding, found) == shardings
    for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("number", [2.5, np.float32(2.5), np.array(2.5), jnp.asarray(2.5)])
def test_numbers_are_taken_by_any_leaf(number: Any, donate: bool) -> None:
    plan = FoldPlan(
        (LeafSpec("g", ()), LeafSpec("v", (3,)), LeafSpec("w", (2, 3))),
        (),
        (ScaleEdit("g", (("v", ()), ("w", ()))),),
    )
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    params = {"g": copy(number), "v": jnp.asarray(w[0]), "w": w.copy()}
    found = plan.center(params, donate=donate)
    assert found["g"] == 1
    np.testing.assert_array_equal(found["v"], 2.5 * w[0])
    np.testing.assert_array_equal(found["w"], 2.5 * w)


# --- in place ------------------------------------------------------------------------------------


def test_what_is_taken_and_done_already_is_kept() -> None:
    """Its memory would have done for the leaf that takes it."""
    plan = FoldPlan(
        (LeafSpec("g", (4,)), LeafSpec("v", (4,)), LeafSpec("w", (3, 4))),
        (CenterEdit("v", AxisSet.over((4,), [0])),),
        (ScaleEdit("g", (("v", (0,)), ("w", (1,)))),),
    )
    v = jnp.arange(4.0)
    params = {"g": jnp.ones(4), "v": v + 0, "w": jnp.ones((3, 4))}
    found = plan.center(params, donate=True)
    np.testing.assert_array_equal(found["g"], np.ones(4))
    np.testing.assert_allclose(found["v"], v - 1.5)


def test_jax_arrays_that_share_memory_keep_it() -> None:
    """Two of them may be in the same, and only one of them is to be edited, or both."""
    params, want = jax.tree.map(jnp.asarray, tree(1)), plan_of(tree(1)).center(tree(1))
    params["more"] = jax.device_put(params["stem"], jax.devices()[0])
    assert params["more"] is not params["stem"]
    params["keys"] = jax.random.split(jax.random.key(0), 3)
    found = plan_of(params).center(params, donate=True)
    np.testing.assert_array_equal(found["more"], tree(1)["stem"])
    np.testing.assert_array_equal(params["stem"], tree(1)["stem"])
    np.testing.assert_allclose(found["stem"], want["stem"], atol=1e-12)
    assert params["0"]["w"].is_deleted(), "others are given up"
    assert not any(x.committed for x in jax.tree.leaves(found) if x is not params["more"])


def test_donated_numpy_leaves_are_edited_in_place() -> None:
    params = tree(2)
    plan = plan_of(params)
    want, before = plan.center(params), jax.tree.leaves(params)
    copies = [x.copy() for x in before]
    found = plan.center(params, donate=True)
    edited = 0
    for x, y, old, w in zip(
        jax.tree.leaves(found), before, copies, jax.tree.leaves(want), strict=True
    ):
        assert x is y
        np.testing.assert_array_equal(x, w)
        edited += not np.array_equal(x, old)
    assert edited == 2 * len(SIZES) + 1
    assert np.shares_memory(plan.center(found, donate=True)["stem"], found["stem"])


def read_only(p: Tree) -> list[Any]:
    p["stem"].flags.writeable = False
    return [p["stem"]]


def view(p: Tree) -> list[Any]:
    base = np.stack([p["stem"], p["stem"]])
    p["stem"] = base[0]
    return [base]


def viewed_by_another_leaf(p: Tree) -> list[Any]:
    p["more"] = p["stem"][::-1, 1:]
    return [p["stem"], p["more"]]


def twice(p: Tree) -> list[Any]:
    p["more"] = p["stem"]
    return [p["stem"]]


def held_by_jax(p: Tree) -> list[Any]:
    """On CPUs jax may read the memory of a NumPy array for as long as it lives."""
    p["more"] = jnp.asarray(p["stem"])
    return [p["stem"], p["more"]] if np.shares_memory(p["stem"], np.asarray(p["more"])) else []


@pytest.mark.parametrize("spoil", [read_only, view, viewed_by_another_leaf, twice, held_by_jax])
def test_memory_of_others_is_not_written_to(spoil: Callable[[Tree], list[Any]]) -> None:
    params = tree(1)
    kept = spoil(params)
    plan, before = plan_of(params), [np.array(x) for x in kept]
    want = plan.center(tree(1))
    found = plan.center(params, donate=True)
    for x, old in zip(kept, before, strict=True):
        np.testing.assert_array_equal(x, old)
    np.testing.assert_array_equal(found["stem"], want["stem"])
    assert found["0"]["w"] is params["0"]["w"], "others are"


def test_what_would_overflow_is_found_before_the_first_edit() -> None:
    params = tree(3, dtype=np.float32)
    params["2"]["w"][1, 2], params["2"]["g"][1] = 3e38, 100
    plan, before = plan_of(params), [x.copy() for x in jax.tree.leaves(params)]
    for donate in (True, False):
        with pytest.raises(jax_lnfold.TreeError, match=r"leaf '2/[bw]' would overflow"):
            plan.center(params, donate=donate)
        for x, old in zip(jax.tree.leaves(params), before, strict=True):
            np.testing.assert_array_equal(x, old)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_half_of_an_edit_does_not_look_like_a_tree(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tree(1)
    plan, calls, edit = plan_of(params), iter(range(99)), numpy_leaf.edit_array
    before = [x.copy() for x in jax.tree.leaves(params)]

    def failing(*arguments: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return edit(*arguments)

    monkeypatch.setattr(editing, "edit_array", failing)
    with pytest.raises(KeyboardInterrupt):
        plan.center(params, donate=True)
    lost = 0
    for x, old in zip(jax.tree.leaves(params), before, strict=True):
        gone = np.isnan(x).all()
        assert gone or np.array_equal(x, old)
        lost += bool(gone)
    assert lost == number + 1, "those before it, and that which failed"


PEAK = """
from pathlib import Path
import numpy as np, jax_lnfold
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.plan.edits.center import CenterEdit
from jax_lnfold.plan.file import LeafSpec
N = 32
names, shape = [f"w{i:02}" for i in range(N)], (1024, 1024)
plan = jax_lnfold.FoldPlan(
    tuple(LeafSpec(n, shape) for n in names),
    tuple(CenterEdit(n, AxisSet.over(shape, [1])) for n in names),
)
row = np.arange(1024, dtype=np.float32)
params = {n: np.full(shape, i, np.float32) for i, n in enumerate(names)}
for x in params.values():
    x += row
# `resource` would tell that of the process which started this one, if it is larger.
lines = lambda: Path("/proc/self/status").read_text().splitlines()
peak = lambda: next(int(line.split()[1]) for line in lines() if line.startswith("VmHWM"))
before = peak()
out = plan.center(params, donate=DONATE)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is told there")
def test_peak_of_memory() -> None:
    """A tree of 128 MiB: a copy of it, and next to nothing."""
    grown = {}
    for donate in (False, True):
        code = PEAK.replace("DONATE", str(donate))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        grown[donate] = float(done.stdout)
    assert grown[False] > 120
    assert grown[True] < 16
