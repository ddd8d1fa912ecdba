"""What folding costs: work by depth, memory and communication of edits, and their benchmarks."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_lnfold
from bench import compile_cost, peers, tool_cost
from bench.models import Config
from bench.programs import random_arrays
from bench.registry import MODELS
from bench.tpu import collectives
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import ALL, FREE, Labels
from jax_lnfold.placement.place import Placement, place
from jax_lnfold.plan import together
from jax_lnfold.plan.editing import edit_leaf
from jax_lnfold.plan.leaf import Factor, Recipe
from jax_lnfold.plan.together import Job
from jax_lnfold.program.flatten import flatten
from jax_lnfold.program.garbage import collector_paused
from jax_lnfold.program.tracing import trace
from tests.helpers.contracts import relative_difference

TINY = Config(2, 24, 3, causal=True)


# --- analysis ------------------------------------------------------------------------------------


def analysed(depth: int, scanned: bool) -> Placement:
    model = (tool_cost.ScannedGPT if scanned else tool_cost.GPT)(replace(TINY, depth=depth))
    ids = jax.ShapeDtypeStruct((1, 7), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    return place(trace(model.apply, params, (ids,)).graph())


def test_work_is_linear_in_depth() -> None:
    """Rules asked and claims made; a layer more is as much more everywhere."""
    work = []
    for depth in (2, 4, 16):
        placement = analysed(depth, scanned=False)
        nodes = len(placement.search.nodes)
        work.append((len(placement.graph.ops), placement.facts.visits, nodes))
    two, four, sixteen = np.array(work)
    np.testing.assert_array_equal(sixteen - four, 6 * (four - two))


def test_work_for_a_scan_does_not_depend_on_its_length() -> None:
    short, long = analysed(2, scanned=True), analysed(96, scanned=True)
    assert len(long.graph.ops) == len(short.graph.ops)
    assert long.facts.visits == short.facts.visits
    assert long.facts.visits > 20
    assert all(long.folded)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_garbage_collection_in_the_middle(enabled: bool, fails: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError) if fails else nullcontext(), collector_paused():
            assert not gc.isenabled()
            if fails:
                raise KeyError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_an_analysis_collects_nothing() -> None:
    model, ids = tool_cost.GPT(TINY), jax.ShapeDtypeStruct((1, 7), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    traced, before = trace(model.apply, params, (ids,)), gc.get_threshold()
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    found = []
    gc.callbacks.append(note)
    gc.set_threshold(50, 2, 2)
    try:
        for function in (flatten, flatten.__wrapped__):
            start = len(collections)
            function(traced.closed, traced.leaves)
            found.append(len(collections) - start)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(note)
    paused, as_it_comes = found
    assert paused <= 4, "one when it is enabled again, say"
    assert as_it_comes > 10


# --- memory of edits -----------------------------------------------------------------------------

ROWS, WIDTH = 64, 96  # one mean for 96 numbers
GROUPS: dict[str, Any] = {
    "all": ALL,
    "heads": Labels(np.repeat(np.arange(12), 8).tolist()),
    "heads larger than a device's part": Labels(np.repeat(np.arange(3), 32).tolist()),
    "queries and keys": Labels([*np.repeat(np.arange(8), 8).tolist(), *[-1] * 32]),
    "a gate": Labels([0] * 48 + [-1] * 48),
    "every other": Labels([0, -1] * 48),
    "every sixth": Labels([i % 6 for i in range(96)]),
    "two of three in a head": Labels(
        [(i // 24) * 2 + i // 8 % 3 if i // 8 % 3 < 2 else -1 for i in range(96)]
    ),
}


def centered(name: str) -> Recipe:
    return Recipe(sets=(AxisSet((ROWS, WIDTH), (FREE, GROUPS[name])),))


SCALED = Recipe(factors=(Factor((0,)),))
TAKES_SHIFT = Recipe(axes=(0,), summed=(0,))
LEAF = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def lowered(recipe: Recipe, donate: bool, sharding: Any, *arrays: Any) -> Any:
    """The program for one leaf, which is followed by those that it takes."""
    sources = (*range(1, len(arrays)),)
    part = together._Part(Job(0, sources, recipe, (None,) * len(sources)), sharding)
    step = together._edit if donate else together._edit_and_look
    program = together._compiled(step, (part,), (0,) if donate else (), 1.0)
    return program.lower([None], *arrays).compile()


def is_bounded(x: Any, recipe: Recipe) -> bool:
    """Whether a look at what is given says that the edit does not overflow."""
    (found,) = together.looks_of([x], [Job(0, (), recipe)])
    return not found.unbounded


def overflows(x: Any, recipe: Recipe) -> bool:
    """What the closer look says."""
    return together.overflows_of([x], [Job(0, (), recipe)]) == {0}


@pytest.fixture
def optimised() -> Iterator[None]:
    """As users compile; other tests save that time."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "every sixth"])
@pytest.mark.usefixtures("optimised")
def test_memory_of_one_edit(name: str) -> None:
    """Besides a leaf and its result: less than another one and means; in place: no result.

    What is not edited in place is looked at in the same program, which takes means again.
    """
    recipe, size = centered(name), ROWS * WIDTH * 4
    means = 2 * size // 8
    for donate in (False, True):
        memory = lowered(recipe, donate, None, LEAF).memory_analysis()
        assert memory.alias_size_in_bytes == donate * size
        assert memory.output_size_in_bytes < size + 100
        assert memory.temp_size_in_bytes <= size + (1 if donate else 2) * means
    part = together._Part(Job(0, (), recipe), None)
    look = together._compiled(together._look, (part,), (), 1.0).lower([None], LEAF).compile()
    memory = look.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 1000, "before a donation"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bound_on_what_an_edit_makes(dtype: Any) -> None:
    """It holds for weights, and does not where the closer look is needed."""
    recipe, largest = centered("all"), float(jnp.finfo(dtype).max)
    weights = np.random.default_rng(0).normal(0, 1, (ROWS, WIDTH))
    for scale, holds in ((1, True), (largest, False), (np.inf, False)):
        x = jnp.asarray(weights / np.abs(weights).max() * scale, dtype)
        assert is_bounded(x, recipe) is holds
    uneven = jnp.zeros((ROWS, WIDTH), dtype).at[0, :-1].set(largest).at[0, -1].set(-largest)
    assert overflows(uneven, recipe)
    assert edit_leaf(uneven, (), recipe, donate=False)[1]
    gone = uneven.at[0].set(largest)  # its sum overflows, and then infinity minus infinity
    wide = dtype != jnp.float16
    assert bool(edit_leaf(gone, (), recipe, donate=False)[1]) is wide
    assert overflows(gone, recipe) is wide
    for spoilt in (jnp.nan, jnp.inf):
        given = jnp.ones((ROWS, WIDTH), dtype).at[3, 4].set(spoilt)
        assert not overflows(given, recipe)
        assert not edit_leaf(given, (), recipe, donate=False)[1]
    assert not overflows(uneven.at[0].set(jnp.inf), recipe)
    assert not overflows(uneven / (4 * WIDTH * ROWS), recipe)


@pytest.mark.usefixtures("optimised")
def test_memory_of_an_affine_edit() -> None:
    vector = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    scaled = lowered(SCALED, True, None, LEAF, vector).memory_analysis()
    assert scaled.alias_size_in_bytes == ROWS * WIDTH * 4
    assert scaled.temp_size_in_bytes <= ROWS * WIDTH * 4
    bias = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    taken = lowered(TAKES_SHIFT, True, None, bias, vector, LEAF)
    assert taken.memory_analysis().temp_size_in_bytes <= ROWS * WIDTH * 4


def two_layers(p: Any, x: jax.Array) -> jax.Array:
    norm = jax.nn.standardize
    h = norm(x @ p["a"] + p["b"]) * p["g"] + p["c"]
    return norm(h @ p["d"] + p["e"]) @ p["f"]


SIZES = {"a": (700, 800), "b": (800,), "g": (800,), "c": (800,), "d": (800, 900), "e": (900,)}
SHAPES = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in (SIZES | {"f": (900, 2)}).items()}
INPUT = jax.ShapeDtypeStruct((3, 700), jnp.float32)
LARGEST = 800 * 900 * 4


def plan_of(affine: bool) -> jax_lnfold.FoldPlan:
    plan = jax_lnfold.plan_fold(two_layers, SHAPES, INPUT, fold_affine=affine)
    assert {*plan.leaf_edits()} == {*"abde", *("gc" if affine else "")}
    return plan


@pytest.mark.parametrize("affine", [False, True])
def test_memory_of_numpy_edits(affine: bool) -> None:
    """To the byte: the edited leaves, and less than one of them besides, in double precision."""
    plan = plan_of(affine)
    params = jax.tree.map(np.asarray, random_arrays(SHAPES))
    plan.center(params)
    edited = sum(params[path].nbytes for path in plan.leaf_edits())
    tracemalloc.start()
    try:
        new = plan.center(params)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert edited <= kept < edited + 20_000  # the tree itself
    assert peak <= edited + LARGEST
    assert new["f"] is params["f"]


@pytest.mark.parametrize("affine", [False, True])
def test_memory_of_donated_leaves(affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after every edit no more arrays are alive than before all."""
    plan = plan_of(affine)
    params = random_arrays(SHAPES)
    names, call = {*plan.leaf_edits()}, together._call
    gc.collect()

    def alive() -> int:  # who asks jax where an array is gets another one in the same memory
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())

    before, found = alive(), []

    def noted(*arguments: Any) -> Any:
        result = call(*arguments)
        found.append(alive())
        return result

    monkeypatch.setattr(together, "_call", noted)
    new = plan.center(params, donate=True)
    assert len(found) == 2, "a look at all, and the edit"
    assert max(found) <= before + 100  # flags
    assert {k for k, x in params.items() if x.is_deleted()} == names
    assert sum(x.nbytes for x in new.values()) == sum(s.size * 4 for s in SHAPES.values())


# --- communication of edits ----------------------------------------------------------------------

SPECS = {
    "other axis": PartitionSpec("x", None),
    "centered axis": PartitionSpec(None, "y"),
    "centered axis, eight parts": PartitionSpec(None, ("x", "y")),
    "both": PartitionSpec("x", "y"),
}
_RESULT = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* all-reduce")


def on(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y")), spec)


def exchanged(compiled: Any) -> int:
    """Numbers in the largest exchange between devices, of which all must be sums."""
    text = compiled.as_text()
    assert {name for name, _ in collectives(text)} <= {"all-reduce"}
    sizes = (np.prod([int(n) for n in found[1].split(",") if n]) for found in _RESULT.findall(text))
    return int(max(sizes, default=0))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", GROUPS)
def test_sharded_leaves_stay_where_they_are(name: str, spec: str) -> None:
    recipe, sharding = centered(name), on(SPECS[spec])
    x = np.random.default_rng(0).normal(2, 1, (ROWS, WIDTH)).astype(np.float32)
    placed = jax.device_put(x, sharding)
    for donate in (False, True):
        compiled = lowered(recipe, donate, sharding, placed)
        sums = exchanged(compiled)
        assert sums <= ROWS * 12, "no more than one number for each group"
        if spec == "other axis":
            assert sums <= 1, "only whether numbers are finite"
        elif name == "all":
            assert sums >= ROWS // 2, "a mean over devices"
    new, too_large = edit_leaf(placed, (), recipe, donate=True)
    assert new.sharding == sharding
    assert placed.is_deleted()
    assert not too_large
    np.testing.assert_allclose(new, edit_leaf(x, (), recipe, donate=False)[0], atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_affine_edits_of_sharded_leaves(spec: str) -> None:
    """A kernel is scaled without a word; the bias exchanges sums as large as itself."""
    rows, columns = SPECS[spec]
    kernel, bias = on(SPECS[spec]), on(PartitionSpec(columns))
    vector = on(PartitionSpec(rows))
    rng = np.random.default_rng(0)
    w, b, g, c = (rng.normal(size=s).astype(np.float32) for s in ((ROWS, WIDTH), WIDTH, ROWS, ROWS))
    placed = [jax.device_put(x, s) for x, s in ((w, kernel), (b, bias), (g, vector), (c, vector))]
    for donate in (True, False):
        scaled = lowered(SCALED, donate, kernel, placed[0], placed[2])
        assert exchanged(scaled) <= 1
        taken = lowered(TAKES_SHIFT, donate, bias, placed[1], placed[3], placed[0])
        assert exchanged(taken) <= WIDTH
    found = edit_leaf(placed[1], (placed[3], placed[0]), TAKES_SHIFT, donate=False)[0]
    np.testing.assert_allclose(found, b + c @ w, rtol=1e-4, atol=1e-5)
    assert found.sharding == bias
    found = edit_leaf(placed[0], (placed[2],), SCALED, donate=False)[0]
    np.testing.assert_allclose(found, w * g[:, None], rtol=1e-6)
    assert found.sharding == kernel


# --- benchmarks ----------------------------------------------------------------------------------


def test_stages_of_a_small_model() -> None:
    found = tool_cost.stages(TINY, scanned=True)()
    assert {*found} == {*tool_cost.STAGES, "equations"}
    assert min(found.values()) > 0


@pytest.mark.parametrize("kind", ["JAX", "NumPy"])
def test_editing_is_measured_next_to_copying(kind: str) -> None:
    found = tool_cost.editing(kind == "NumPy", kind, TINY)()
    assert {*found} == {"center", "copy"}
    assert min(found.values()) > 0


def test_tool_cost_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def stages(config: Config, scanned: bool) -> Any:
        per_layer = 0.0 if scanned else float(config.depth)

        def measure() -> dict[str, float]:
            calls.append(f"{config.depth}")
            times = dict.fromkeys(tool_cost.STAGES, 1 + per_layer)
            return times | {tool_cost.COLD: 10.0, "equations": 5}

        return measure

    monkeypatch.setattr(tool_cost, "stages", stages)
    monkeypatch.setattr(tool_cost, "editing", lambda *_: lambda: {"center": 5.0, "copy": 2.0})
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--output", str(tmp_path / "rows.json"), "--rounds"]
    tool_cost.main([*arguments, "2"])
    assert len(calls) == 3 * len(tool_cost.CASES), "once to warm up"
    first = capsys.readouterr().out
    tool_cost.main([*arguments, "2"])
    assert len(calls) == 3 * len(tool_cost.CASES)
    assert capsys.readouterr().out == first
    assert "GPT-2, 96 layers: analysis, plan takes 7.462" in first  # 97 / 13
    assert "GPT-2, 96 layers scanned: analysis, plan takes 1.000" in first
    assert first.count("2.500 (2.500-2.500) times as long as copying") == len(tool_cost.EDITS)


def test_cost_of_compiling() -> None:
    shapes = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    small = compile_cost.compiled("cpu", jnp.sin, shapes)
    large = compile_cost.compiled("cpu", lambda x: jnp.cos(jnp.sin(x) @ x.T) @ x, shapes)
    assert {*small} == {"seconds", *compile_cost.SIZES}
    assert large["instructions"] > small["instructions"] > 1
    assert large["StableHLO bytes"] > small["StableHLO bytes"] > 50
    assert small["seconds"] > 0


def test_table_of_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = MODELS["clip_l_text"]
    tiny = replace(tiny, config=replace(tiny.config, depth=1, width=24, heads=3))
    monkeypatch.setitem(MODELS, "clip_l_text", tiny)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "rows.json"
    main = ["--models", "clip_l_text", "--rounds", "1", "--output", str(path)]
    compile_cost.main(main)
    first = capsys.readouterr().out
    compile_cost.main(main)
    assert capsys.readouterr().out == first, "stored"
    store = compile_cost.Store(path, compile_cost.KEYS)
    assert len(store.rows) == 2 * 3
    for spelling in ("one_pass", "two_pass"):
        rows = [r for r in store.rows if r["spelling"] == spelling and r["round"] == 0]
        size = {row["variant"]: row["StableHLO bytes"] for row in rows}
        assert size["norms removed"] < size["folded"] < size["original"]
        assert f"{size['folded'] / size['original']:.3f}" in first


def test_peers_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[int] = []
    small = replace(peers.CASES["gpt2"], config=TINY, sample=(9,))
    monkeypatch.setitem(peers.CASES, "gpt2", small)
    monkeypatch.setattr(peers, "limit_threads", limits.append)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "rows.json"
    peers.main(["--models", "gpt2", "--rounds", "2", "--output", str(path)])
    out = capsys.readouterr().out
    assert limits == [2]
    assert "Rows of torch are missing" in out
    assert out.count(peers.JAX) == 1
    rows = peers.Store(path, peers.KEYS).rows
    want = [("gpt2", 1, peers.JAX, v) for v in peers.VARIANTS]
    assert [tuple(row[k] for k in peers.KEYS) for row in rows] == want
    assert {len(row["seconds"]) for row in rows} == {2}


def test_peers_must_agree() -> None:
    one = np.array([1.0, -4.0])
    found = {(peers.JAX, peers.ORIGINAL): lambda: one, (peers.EAGER, "x"): lambda: one + 3e-4}
    peers.check(found)
    with pytest.raises(AssertionError, match="torch, eager"):
        peers.check(found | {(peers.EAGER, "x"): lambda: one + 5e-4})


def test_weights_of_peers_say_something() -> None:
    """Scales near one, and norms that all matter: without them the outputs are others."""
    shapes = {"norm": {"scale": SHAPES["g"], "bias": SHAPES["c"]}}
    found = peers.weights(shapes)["norm"]
    assert abs(float(found["scale"].mean()) - 1) < 0.01
    assert abs(float(found["bias"].mean())) < 0.01
    assert relative_difference(found["scale"] - 1, found["bias"]) > 0.1
