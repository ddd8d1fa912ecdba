"""Key maps: leaves under other names and in other layouts are edited in place, and only they."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections import Counter
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.numpy

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, TreeError
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.checkpoints.key_map import KeyMap
from jax_lnfold.checkpoints.leaf_store import StoredLeaf
from jax_lnfold.checkpoints.safetensors import SafetensorsStore
from jax_lnfold.cli.commands import main
from jax_lnfold.plan.edits.center import CenterEdit
from jax_lnfold.plan.edits.scale import ScaleEdit
from jax_lnfold.plan.file import LeafSpec

Arrays = dict[str, np.ndarray]
Map = dict[str, Any]


def plan_of(leaves: dict[str, tuple[int, ...]], *edited: str, **scales: str) -> FoldPlan:
    """Centers the last axis of leaves, and merges vectors into that axis of others."""
    specs = tuple(LeafSpec(path, shape) for path, shape in leaves.items())
    edits = (CenterEdit(p, AxisSet.over(leaves[p], (len(leaves[p]) - 1,))) for p in edited)
    merged = (ScaleEdit(s, ((p, (len(leaves[p]) - 1,)),)) for p, s in scales.items())
    return FoldPlan(specs, tuple(edits), tuple(merged))


def key_map(entries: Any) -> KeyMap:
    return KeyMap.from_json(json.dumps(entries).encode())


def bits(arrays: Arrays) -> dict[str, Any]:
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in arrays.items()}


def centered(plan: FoldPlan, arrays: Arrays, entries: Map, folder: Path) -> Arrays:
    """What `center` makes of these arrays; the file itself is left as it is."""
    source, dest = folder / "source.safetensors", folder / "dest.safetensors"
    safetensors.numpy.save_file(arrays, source)
    before = source.read_bytes()
    center_checkpoint(plan, source, dest, keys=key_map(entries))
    assert source.read_bytes() == before
    assert {*folder.iterdir()} == {source, dest}
    found = safetensors.numpy.load_file(dest)
    dest.unlink()
    return {name: found[name] for name in arrays}


def scattered(plan: FoldPlan, arrays: Arrays, positions: dict[str, np.ndarray]) -> Arrays:
    """The same by other means: `positions` are those of a leaf's elements among all elements."""
    flat = np.concatenate([x.reshape(-1) for x in arrays.values()])
    tree = {path: np.array(flat[where], order="C") for path, where in positions.items()}
    paths = [leaf.key_path for leaf in plan.leaves]
    assert [*tree] == paths == sorted(paths)
    new = plan.center(tree)
    for path, where in positions.items():
        flat[where] = new[path]
    ends = np.cumsum([x.size for x in arrays.values()])
    parts = np.split(flat, ends[:-1])
    return {name: x.reshape(arrays[name].shape) for name, x in zip(arrays, parts, strict=True)}


def indices(arrays: Arrays) -> Arrays:
    """The position of each element among those of all arrays."""
    ends = np.cumsum([x.size for x in arrays.values()])
    return {
        name: np.arange(end - x.size, end).reshape(x.shape)
        for (name, x), end in zip(arrays.items(), ends, strict=True)
    }


# --- layouts -------------------------------------------------------------------------------------

D, H, K, F = 10, 3, 4, 7
RNG = np.random.default_rng(0)
FUSED: Arrays = {
    "h.c_attn": RNG.normal(size=(3 * H * K, D)),
    "h.c_attn_bias": RNG.normal(size=3 * H * K),
    "h.neox": RNG.normal(size=(H * 3 * K, D)),
    "h.out": RNG.normal(size=(D, H * K)),
    "h.conv": RNG.normal(size=(8, 3, 5, 2)),
    "q": RNG.normal(size=(F, D)),
    "k": RNG.normal(size=(5, D)),
    "ids": np.arange(4),
}


def split(number: int, *more: Any) -> Map:
    steps = [{"slice": [0, H * K * number, H * K * (number + 1)]}, *more]
    return {"name": "h.c_attn", "steps": steps}


TURN = {"transpose": [1, 0]}
HEADS = ({"reshape": [H, K, D]}, {"transpose": [2, 0, 1]})
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "another name": ("h.out", lambda a: a["h.out"]),
    "transposed": (
        {"name": "h.out", "steps": [TURN]},
        lambda a: a["h.out"].T,
    ),
    "heads": (
        {"name": "h.out", "steps": [TURN, {"reshape": [H, K, D]}]},
        lambda a: np.stack([a["h.out"][:, K * i : K * i + K].T for i in range(H)]),
    ),
    "query of qkv": (
        split(0, *HEADS),
        lambda a: np.stack([a["h.c_attn"][K * i : K * i + K].T for i in range(H)], 1),
    ),
    "value of qkv": (
        split(2, *HEADS),
        lambda a: np.stack([a["h.c_attn"][24 + K * i : 24 + K * i + K].T for i in range(H)], 1),
    ),
    "bias of keys": (
        {"name": "h.c_attn_bias", "steps": [{"slice": [0, 12, 24]}, {"reshape": [H, -1]}]},
        lambda a: np.stack([a["h.c_attn_bias"][i : i + K] for i in (12, 16, 20)]),
    ),
    "keys of heads one by one": (
        {
            "name": "h.neox",
            "steps": [{"reshape": [H, 3, K, -1]}, {"slice": [1, 1, 2]}, {"reshape": [H * K, D]}],
        },
        lambda a: np.concatenate([a["h.neox"][12 * i + 4 : 12 * i + 8] for i in range(H)]),
    ),
    "kernel of a convolution": (
        {"name": "h.conv", "steps": [{"transpose": [2, 3, 1, 0]}]},
        lambda a: np.moveaxis(a["h.conv"], (0, 1), (3, 2)),
    ),
    "one of two kernels": (
        {"concat": [{"name": "q", "steps": [TURN]},
                    {"name": "k", "steps": [TURN]}], "axis": 1},
        lambda a: np.vstack([a["q"], a["k"]]).T,
    ),
    "rows in another order, then heads": (
        {
            "concat": ["k", "q"],
            "axis": 0,
            "steps": [TURN, {"reshape": [5, 2, 12]}],
        },
        lambda a: np.vstack([a["k"], a["q"]]).T.reshape(5, 2, 12),
    ),
    "layers stacked for a loop": (
        {
            "concat": [
                {"name": name, "steps": [{"slice": [0, 0, 5]}, TURN, {"reshape": [1, D, 5]}]}
                for name in ("q", "k")
            ],
            "axis": 0,
        },
        lambda a: np.stack([a["q"][:5].T, a["k"].T]),
    ),
    "two parts of one array": (
        {"concat": [split(2), split(0)], "axis": 0},
        lambda a: np.vstack([a["h.c_attn"][24:], a["h.c_attn"][:12]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "formula"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_layouts(tmp_path: Path, entry: Any, formula: Any, dtype: Any) -> None:
    arrays = {n: x if n == "ids" else x.astype(dtype) for n, x in FUSED.items()}
    floats = {name: x for name, x in arrays.items() if name != "ids"}
    where = formula(indices(floats))
    plan = plan_of({"a/kernel": where.shape}, "a/kernel")
    want = scattered(plan, floats, {"a/kernel": where}) | {"ids": arrays["ids"]}
    assert bits(want) != bits(arrays)
    assert bits(centered(plan, arrays, {"a/kernel": entry}, tmp_path)) == bits(want)


def test_bfloat16(tmp_path: Path) -> None:
    x = jnp.asarray(FUSED["h.c_attn"], jnp.bfloat16)
    safetensors.flax.save_file({"w": x}, tmp_path / "a")
    plan = plan_of({"q": (D, H, K)}, "q")
    center_checkpoint(
        plan, tmp_path / "a", tmp_path / "b",
        keys=key_map({"q": split(0, *HEADS) | {"name": "w"}}),
    )  # fmt: skip
    q = np.asarray(x)[: H * K].reshape(H, K, D).transpose(2, 0, 1).copy()
    new = np.asarray(x).copy()
    new[: H * K] = plan.center({"q": q})["q"].transpose(1, 2, 0).reshape(H * K, D)
    assert bits({"w": np.asarray(safetensors.flax.load_file(tmp_path / "b")["w"])}) == bits(
        {"w": new}
    )


# --- random layouts ------------------------------------------------------------------------------


def divided(rng: np.random.Generator, n: int) -> list[int]:
    """Sizes with the product n."""
    sizes = [1] * int(rng.integers(1, 4))
    for p in range(2, n + 1):
        while n % p == 0:
            sizes[rng.integers(len(sizes))] *= p
            n //= p
    return sizes


def turned(
    rng: np.random.Generator, x: np.ndarray, more: int, cut: bool = True
) -> tuple[np.ndarray, list[Any]]:
    """Some elements of an array in another layout, and the steps that lead there."""
    steps: list[Any] = []
    for kind in rng.choice(["reshape", "transpose", *["slice"] * cut], more):
        if kind == "slice":
            axis = int(rng.integers(x.ndim))
            start = int(rng.integers(x.shape[axis]))
            stop = int(rng.integers(start + 1, x.shape[axis] + 1))
            x = x.take(range(start, stop), axis)
            steps.append({"slice": [axis, start, stop]})
        elif kind == "reshape":
            sizes = divided(rng, x.size)
            x = np.array([*x.flat]).reshape(sizes)
            if rng.integers(2):
                sizes[rng.integers(len(sizes))] = -1
            steps.append({"reshape": sizes})
        else:
            axes = [int(d) for d in rng.permutation(x.ndim)]
            x = np.moveaxis(x, axes, range(x.ndim))
            steps.append({"transpose": axes})
    return x, steps


def cut_up(rng: np.random.Generator, name: str, x: np.ndarray) -> list[tuple[np.ndarray, Any]]:
    """Disjoint parts of an array, each in a layout of its own."""
    common, steps = turned(rng, x, int(rng.integers(3)), cut=False)
    axis = int(rng.integers(common.ndim))
    ends = sorted(
        {0, common.shape[axis], *(int(n) for n in rng.integers(common.shape[axis], size=2))}
    )
    found = []
    for start, stop in pairwise(ends):
        part = common.take(range(start, stop), axis)
        own, more = turned(rng, part, int(rng.integers(4)))
        found.append(
            (own, {"name": name, "steps": [*steps, {"slice": [axis, start, stop]}, *more]})
        )
    return found  # fmt: skip


def joined(rng: np.random.Generator, first: str, x: Arrays) -> tuple[np.ndarray, Any]:
    """One leaf that is stored in several arrays."""
    parts, entries = [], []
    for name, where in x.items():
        axes = [int(d) for d in rng.permutation(where.ndim)]
        parts.append(where.transpose(axes))
        entries.append({"name": name, "steps": [{"transpose": axes}]})
    axis = int(rng.integers(parts[0].ndim))
    fits = [
        (part, entry)
        for part, entry in zip(parts, entries, strict=True)
        if np.delete(part.shape, axis).tolist() == np.delete(parts[0].shape, axis).tolist()
    ]
    whole = np.concatenate([part for part, _ in fits], axis)
    whole, steps = turned(rng, whole, int(rng.integers(3)), cut=False)
    return whole, {"concat": [entry for _, entry in fits], "axis": axis, "steps": steps}


@pytest.mark.parametrize("seed", range(60))
def test_random_layouts(tmp_path: Path, seed: int) -> None:
    """The edited elements are those that plain NumPy finds; all others keep their bytes."""
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.choice([2, 3, 4, 6], 3)]
    arrays = {f"x.{i}": rng.normal(0.3, 1, rng.permutation([*sizes, 5])) for i in range(3)}
    arrays |= {f"y.{i}": rng.normal(0.3, 1, sizes) for i in range(3)}
    where = indices(arrays)
    found = [leaf for name in ("x.0", "x.1") for leaf in cut_up(rng, name, where[name])]
    found.append(joined(rng, "y", {name: x for name, x in where.items() if name[0] == "y"}))
    rng.shuffle(found)
    positions = {f"p{i:02}": x for i, (x, _) in enumerate(found)}
    entries = {f"p{i:02}": entry for i, (_, entry) in enumerate(found)}
    assert Counter(Counter(n for x in positions.values() for n in x.flat).values()).keys() == {1}
    leaves = {path: x.shape for path, x in positions.items()}
    scales: dict[str, str] = {}
    for path, shape in leaves.items():  # vectors of the right length, from anywhere
        fits = [p for p, s in leaves.items() if p != path and prod(s) == shape[-1] == max(s) > 1]
        if fits and fits[0] not in {*scales, *scales.values()} and path not in scales.values():
            scales[path] = fits[0]
    edited = [p for p in leaves if p not in scales.values() and rng.integers(4)]
    plan = plan_of(leaves, *edited, **scales)
    want = scattered(plan, arrays, positions)
    assert bits(centered(plan, arrays, entries, tmp_path)) == bits(want)


def test_scale_and_kernels_in_one_array(tmp_path: Path) -> None:
    """Whatever the order: each edit takes its sources as they were before all edits."""
    stacked = RNG.normal(size=(2 * 5 + 1, 4))
    positions = indices({"all": stacked})["all"]
    rows = {"k": (0, 5), "a": (5, 6), "m": (6, 11)}
    for names in ("kam", "amk", "mka"):
        where = {
            f"{i}{name}": positions[slice(*rows[name])].reshape((-1, 4) if name != "a" else 4)
            for i, name in enumerate(names)
        }
        k, a, m = (next(path for path in where if path[1] == name) for name in "kam")
        plan = plan_of({path: x.shape for path, x in where.items()}, k, m, **{k: a})
        entries = {
            path: {
                "name": "all",
                "steps": [{"slice": [0, *rows[path[1]]]}, {"reshape": [*where[path].shape]}],
            }
            for path in where
        }
        want = scattered(plan, {"all": stacked}, where)
        assert (want["all"][5] == 1).all()
        assert bits(centered(plan, {"all": stacked}, entries, tmp_path)) == bits(want)


def test_each_array_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what holds several leaves is read once for all of them, while they come together."""
    written, read = [], []
    write, load = SafetensorsStore.write, SafetensorsStore.read

    def count(self: SafetensorsStore, name: str, value: np.ndarray) -> None:
        written.append(name)
        write(self, name, value)

    def count_read(self: SafetensorsStore, name: str) -> np.ndarray:
        read.append(name)
        return load(self, name)

    monkeypatch.setattr(SafetensorsStore, "write", count)
    monkeypatch.setattr(SafetensorsStore, "read", count_read)
    arrays = {f"h.{i}.qkv": RNG.normal(size=(6, 5)) for i in range(12)}
    names = [f"h_{i}/{kind}" for kind in "kqv" for i in range(12)]  # not array by array
    plan = plan_of(dict.fromkeys(names, (2, 5)), *names)
    parts = {"q": 0, "k": 2, "v": 4}
    entries = {
        f"h_{{}}/{kind}": {"name": "h.{}.qkv", "steps": [{"slice": [0, n, n + 2]}]}
        for kind, n in parts.items()
    }
    found = centered(plan, arrays, entries, tmp_path)
    assert sorted(written) == sorted(arrays) == sorted({*read})
    assert len(read) == 12
    for name, x in arrays.items():
        np.testing.assert_allclose(found[name], x - x.mean(1, keepdims=True), atol=1e-15)


def test_memory(tmp_path: Path) -> None:
    """Of 24 MB in fused arrays of 1.2 MB, whose leaves are far from each other in the tree."""
    arrays = {f"h.{i}.qkv": np.ones((600, 500), np.float32) for i in range(20)}
    safetensors.numpy.save_file(arrays, tmp_path / "a")
    names = [f"{kind}/h_{i}" for kind in "kqv" for i in range(20)]
    plan = plan_of(dict.fromkeys(names, (500, 200)), *names)
    entries = {
        f"{kind}/h_{{}}": {
            "name": "h.{}.qkv",
            "steps": [{"slice": [0, n, n + 200]}, {"transpose": [1, 0]}],
        }
        for kind, n in {"q": 0, "k": 200, "v": 400}.items()
    }
    del arrays
    tracemalloc.start()
    center_checkpoint(plan, tmp_path / "a", tmp_path / "b", keys=key_map(entries))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert not any(x.any() for x in safetensors.numpy.load_file(tmp_path / "b").values())


@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax(tmp_path: Path, ocdbt: bool) -> None:
    rng = np.random.default_rng(1)
    tree = {"h": [{"qkv": rng.normal(size=(300, 70)), "k": rng.normal(size=(40, 50))}], "step": 3}
    saver = ocp.PyTreeCheckpointer(use_ocdbt=ocdbt)
    saver.save(tmp_path / "a", tree)
    plan = plan_of({"k": (50, 40), "q": (70, 100), "v": (100, 70)}, "k", "q", "v")
    steps = [{"slice": [0, 100, 200]}, {"transpose": [1, 0]}]
    entries = {
        "k": {"name": "h/0/k", "steps": [TURN]},
        "q": {"name": "h/0/qkv", "steps": steps},
        "v": {"name": "h/0/qkv", "steps": [{"slice": [0, 200, 300]}]},
    }
    center_checkpoint(plan, tmp_path / "a", tmp_path / "b", keys=key_map(entries))
    found = saver.restore(tmp_path / "b")
    qkv, k = tree["h"][0]["qkv"], tree["h"][0]["k"]
    new = np.concatenate(
        [qkv[:100], qkv[100:200] - qkv[100:200].mean(0), qkv[200:] - qkv[200:].mean(1)[:, None]]
    )
    np.testing.assert_allclose(found["h"][0]["qkv"], new, atol=1e-14)
    assert bits({"": found["h"][0]["qkv"][:100]}) == bits({"": qkv[:100]})
    np.testing.assert_allclose(found["h"][0]["k"], k - k.mean(0), atol=1e-14)
    sizes = [sum(f.stat().st_size for f in (tmp_path / x).rglob("*") if f.is_file()) for x in "ab"]
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]
    assert found["step"] == 3


# --- names ---------------------------------------------------------------------------------------


def test_numbers(tmp_path: Path) -> None:
    """A number stands for all of its digits, and numbers keep their order."""
    arrays = {f"s.{i}.b.{j}.w": RNG.normal(size=(2, 3)) for i in (0, 1, 11) for j in (0, 10)}
    paths = sorted(f"s_{i}/b{j}/w" for i in (0, 1, 11) for j in (0, 10))
    plan = plan_of(dict.fromkeys(paths, (2, 3)), *paths)
    found = centered(plan, arrays, {"s_{}/b{}/w": "s.{}.b.{}.w"}, tmp_path)
    for name, x in arrays.items():
        np.testing.assert_allclose(found[name], x - x.mean(1, keepdims=True), atol=1e-15)
    for key in ("s_1{}/b{}/w", "s_{}{}/b/w", "s_{}/b{}", "_{}/b{}/w"):
        with pytest.raises(TreeError, match="keys: no leaf of the plan is called"):
            centered(plan, arrays, {key: "s.{}.b.{}.w"}, tmp_path)


ONE = plan_of({"a/k": (4, 3), "b": (3,), "c": (5,)}, "a/k")
HELD: Arrays = {
    "k": np.ones((4, 3)), "kt": np.ones((3, 4)), "two": np.ones((8, 3)), "b": np.ones(3),
    "c": np.ones(5), "ints": np.ones((4, 3), int), "half": np.ones((2, 3), np.float16),
    "full": np.ones((2, 3)), "ids": np.ones(5, int),
}  # fmt: skip
REST = {"*": None}


def stepped(name: str, *steps: Any) -> Map:
    return {"a/k": {"name": name, "steps": [*steps]}, "*": None}


FIT: dict[str, Any] = {
    "with all leaves": {"a/k": "k", "b": "b", "c": "c"},
    "null": {"a/k": "k", "b": None, "c": None},
    "the rest": {"a/k": "k", "*": None},
    "parts of one array, side by side": {
        "a/k": {"name": "two", "steps": [{"slice": [0, 0, 4]}]},
        "b": {"name": "two", "steps": [{"slice": [0, 4, 5]}, {"reshape": [3]}]},
        "c": None,
    },
    "no steps": stepped("k"),
    "integers that are not edited": {"a/k": "k", "b": "b", "c": "ids"},
    "what is not edited may be shared": {
        "a/k": "k",
        "b": "b",
        "c": {"concat": ["b", {"name": "b", "steps": [{"slice": [0, 0, 2]}]}], "axis": 0},
    },
}


@pytest.mark.parametrize("entries", FIT.values(), ids=FIT)
def test_fit(tmp_path: Path, entries: Any) -> None:
    arrays = HELD | {"k": RNG.normal(size=(4, 3)), "two": RNG.normal(size=(8, 3))}
    found = centered(ONE, arrays, entries, tmp_path)
    changed = [name for name in arrays if bits(found)[name] != bits(arrays)[name]]
    assert changed == (["two"] if "two" in str(entries) else ["k"])


UNFIT: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "not JSON .*; pass an object in UTF-8"),
    "no text": (b"\xff{}", "not JSON .*; pass an object"),
    "endless": (b"[" * 100_000, "not JSON .*; pass an object"),
    "a key twice": (b'{"a": "k", "a": "b"}', "'a' is there twice"),
    "a list": (b"[]", "not an object; pass one"),
    "a number": ({"a/k": 3}, "entry 'a/k': 3 is no place; give a name, null, "),
    "no name": ({"a/k": {"steps": []}}, "entry 'a/k': 'name' is missing"),
    "a name that is none": ({"a/k": {"name": 3}}, "'name' is no text"),
    "a field too much": ({"a/k": {"name": "k", "axes": [0]}}, "'axes' does not belong there"),
    "name and concat": ({"a/k": {"name": "k", "concat": ["k"], "axis": 0}}, "'name' does not bel"),
    "concat without axis": ({"a/k": {"concat": ["k"]}}, "'axis' is missing"),
    "axis is none": ({"a/k": {"concat": ["k"], "axis": True}}, "'axis' is not 0, 1, "),
    "nothing in a row": ({"a/k": {"concat": [], "axis": 0}}, "'concat' is not a list of parts"),
    "concat in concat": (
        {"a/k": {"concat": [{"concat": ["k"], "axis": 0}], "axis": 0}},
        "'name' is missing",
    ),
    "slice of a row": (
        {"a/k": {"concat": ["k", "k"], "axis": 0, "steps": [{"slice": [0, 0, 4]}]}},
        "a slice after 'concat' leaves numbers out: slice its parts",
    ),
    "steps are none": ({"a/k": {"name": "k", "steps": {"slice": [0, 0, 4]}}}, "'steps' is not a"),
    "two steps at once": (stepped("k", {"reshape": [4, 3], "transpose": [0, 1]}), "'steps' is not"),
    "another step": (stepped("k", {"flip": [0]}), "'flip' is no step; there are slice, resh"),
    "text for numbers": (stepped("k", {"reshape": "43"}), "'reshape' takes a list of integers"),
    "fractions": (stepped("k", {"reshape": [4.0, 3]}), "'reshape' takes a list of integers"),
    "no permutation": (
        stepped("k", {"transpose": [0, 0]}),
        r"transpose \[0, 0\] is no permutation",
    ),
    "counted from the end": (stepped("k", {"transpose": [-1, -2]}), "is no permutation"),
    "empty slice": (stepped("k", {"slice": [0, 2, 2]}), "is not .axis, start, stop. with start <"),
    "negative slice": (stepped("k", {"slice": [0, -4, 4]}), "is not .axis, start, stop."),
    "two numbers": (stepped("k", {"slice": [0, 4]}), "is not .axis, start, stop."),
    "two unknown sizes": (stepped("k", {"reshape": [-1, -1]}), "with at most one -1"),
    "too many axes": (stepped("k", {"reshape": [4, 3, *[1] * 31]}), "'reshape' has more than 32"),
    "more numbers in the name": ({"a/k": "h.{}.k"}, "'h.{}.k' has not as many {} as the key path"),
    "fewer numbers in the name": ({"{}/k": "k"}, "'k' has not as many {} as the key path"),
    "a rest that is something": (REST | {"*": "k"}, "entry '\\*' is not null"),
    # against the plan
    "unknown": (
        {"a/kernel": "k", "a/k": "k", "*": None},
        "no leaf of the plan is called 'a/kernel'; write its key paths: it has 'a/k', 'b', 'c'$",
    ),
    "needed": ({"*": None}, "1 of the plan's leaves have no place in the map: 'a/k'; add"),
    "needed, but null": ({"a/k": None, "*": None}, "have no place in the map: 'a/k'"),
    "not needed": ({"a/k": "k"}, "2 of the plan's leaves have no place in the map: 'b'; 'c'; add"),
    # against the checkpoint
    "no such name": ({"a/k": "kk", "*": None}, "'a/k': 'kk' is not in the checkpoint; correct"),
    "not edited, no such name": ({"a/k": "k", "b": "bb", "c": "c"}, "'b': 'bb' is not in the ch"),
    "another shape": (
        {"a/k": "kt", "*": None},
        r"1 of the plan's leaves do not fit .*'a/k': 'kt' gives shape \(3, 4\) instead of \(4, 3\)",
    ),
    "not edited, another shape": ({"a/k": "k", "b": "c", "c": "c"}, r"'b': 'c' gives shape \(5,\)"),
    "too few axes": (
        stepped("kt", {"transpose": [0]}),
        r"transpose \[0\] does not fit shape \(3, 4",
    ),
    "too many numbers": (stepped("k", {"reshape": [4, 4]}), "reshape .4, 4. does not fit shape"),
    "does not divide": (stepped("k", {"reshape": [5, -1]}), "reshape .5, -1. does not fit shape"),
    "nothing to divide by": (stepped("k", {"reshape": [0, -1]}), "does not fit shape"),
    "huge": (stepped("k", {"reshape": [10**30, 3]}), "does not fit shape"),
    "outside": (stepped("two", {"slice": [0, 5, 9]}), r"slice \[0, 5, 9\] is not inside of shape"),
    "no such axis": (stepped("two", {"slice": [2, 0, 1]}), r"slice \[2, 0, 1\] is not inside of"),
    "after another step": (
        stepped("two", {"transpose": [1, 0]}, {"slice": [0, 0, 4]}),
        r"slice \[0, 0, 4\] is not inside of shape \(3, 8\)",
    ),
    "sizes side by side": (
        {"a/k": {"concat": ["k", "kt"], "axis": 0}, "*": None},
        r"shapes \(4, 3\) and \(3, 4\) do not fit along axis 0",
    ),
    "sizes one behind the other": (
        {"a/k": {"concat": ["k", "full"], "axis": 1}, "*": None},
        r"shapes \(4, 3\) and \(2, 3\) do not fit along axis 1",
    ),
    "axes side by side": ({"a/k": {"concat": ["k", "b"], "axis": 0}, "*": None}, r"shape \(3,\)"),
    "no axis to join": (
        {"a/k": {"concat": ["b", "b"], "axis": 1}, "*": None},
        "axis 1 of its parts",
    ),
    "two dtypes": (
        {"a/k": {"concat": ["half", "full"], "axis": 0}, "*": None},
        "its parts have several dtypes: float16, float64",
    ),
    "integers": ({"a/k": "ints", "*": None}, "dtype I64 cannot be edited, only bfloat16, "),
    "tied to what is not edited": (
        {
            "a/k": "two",
            "b": {"name": "two", "steps": [{"slice": [0, 7, 8]}, {"reshape": [3]}]},
            "c": None,
        }
        | stepped("two", {"slice": [0, 4, 8]}),
        "1 of the plan's leaves share stored numbers with others: 'b' and 'a/k' in 'two'; as an",
    ),
    "twice in one leaf": (
        {
            "a/k": {"concat": ["full", "full"], "axis": 0},
            "*": None,
        },
        "'a/k' and 'a/k' in 'full'",
    ),
}


@pytest.mark.parametrize(("entries", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit(
    tmp_path: Path, entries: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and no file; the same from the library as an error."""
    source, keys, plan = (tmp_path / name for name in ("a.safetensors", "keys.json", "plan.json"))
    safetensors.numpy.save_file(HELD, source)
    keys.write_bytes(entries if isinstance(entries, bytes) else json.dumps(entries).encode())
    plan.write_text(ONE.to_json())
    before = {*tmp_path.iterdir()}
    with pytest.raises(FoldError, match=f"^keys: .*{message}"):
        center_checkpoint(ONE, source, tmp_path / "dest", keys=KeyMap.from_json(keys.read_bytes()))
    argv = ["center", plan, source, tmp_path / "dest", "--keys", keys]
    assert main([str(x) for x in argv]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("jax_lnfold: keys: ")
    assert err.count("\n") == 1
    assert {*tmp_path.iterdir()} == before


def test_matched_twice(tmp_path: Path) -> None:
    plan = plan_of({"h_0/k": (2, 3), "h_1/k": (2, 3)}, "h_0/k", "h_1/k")
    arrays = {f"h.{i}.k": np.ones((2, 3)) for i in range(2)}
    twice = "1 of the plan's leaves have two entries: 'h_0/k' has 'h_0/k' and 'h_{}/k'; leave one"
    with pytest.raises(TreeError, match=f"^keys: {twice}"):
        centered(plan, arrays, {"h_{}/k": "h.{}.k", "h_0/k": "h.1.k"}, tmp_path)
    blocks = [f"{i}/{j}/k" for i in (0, 1) for j in (0, 1)]
    plan = plan_of(dict.fromkeys(blocks, (2, 3)), *blocks)
    entries = {"0/{}/k": "h.{}.k", "{}/1/k": "h.{}.k", "1/0/k": "h.1.k"}
    with pytest.raises(TreeError, match=r"1 of .* '0/1/k' has '0/{}/k' and '{}/1/k'; leave one"):
        centered(plan, arrays, entries, tmp_path)


def test_overlaps() -> None:
    """Against sets of elements, spelled out one by one."""
    rng, seen = np.random.default_rng(0), Counter[bool]()
    stored = {"x": StoredLeaf((6, 4), "float32")}
    where = np.arange(24).reshape(6, 4)
    for _ in range(300):
        found = []
        for start in rng.integers(5, size=3).tolist():
            x, steps = turned(rng, where[start : start + 2], 2)
            found.append((x, [{"slice": [0, start, start + 2]}, *steps]))
        leaves = {name: x.shape for name, (x, _) in zip("abc", found, strict=True)}
        entries = {
            name: {"name": "x", "steps": steps}
            for name, (_, steps) in zip("abc", found, strict=True)
        }
        a, b, c = ({*x.flat} for x, _ in found)
        overlap = bool(a & b or a & c or b & c)
        seen[overlap] += 1
        for edited in ("a", "b", "c", "ab", "abc"):
            sets = {"a": a, "b": b, "c": c}
            meet = any(sets[p] & sets[q] for p in edited for q in "abc" if q != p)
            plan = plan_of(leaves, *edited)
            if meet:
                with pytest.raises(TreeError, match="share stored numbers"):
                    key_map(entries).located(plan, stored)
            else:
                assert key_map(entries).located(plan, stored).keys() == {*"abc"}
    assert min(seen.values()) > 20


def test_the_other_leaf_is_named() -> None:
    plan = plan_of(dict.fromkeys("abc", (2, 4)), *"abc")
    cuts = {"a": [0, 0, 2], "b": [0, 2, 4], "c": [0, 3, 5]}
    entries = {name: {"name": "x", "steps": [{"slice": cut}]} for name, cut in cuts.items()}
    stored = {"x": StoredLeaf((6, 4), "float32")}
    with pytest.raises(TreeError, match=r"1 of .* share stored numbers .*: 'c' and 'b' in 'x'; as"):
        key_map(entries).located(plan, stored)
    entries["c"] = {"name": "x", "steps": [{"slice": [0, 4, 6]}]}
    assert key_map(entries).located(plan, stored).keys() == {*"abc"}


def test_overflow(tmp_path: Path) -> None:
    x = np.float16([[65504] * 5 + [-65504]] * 3).T
    safetensors.numpy.save_file({"w": x.copy()}, tmp_path / "a")
    keys = key_map({"k": {"name": "w", "steps": [TURN]}})
    plan = plan_of({"k": (3, 6)}, "k")
    with pytest.raises(TreeError, match="source: leaf 'w' would overflow"):
        center_checkpoint(plan, tmp_path / "a", tmp_path / "b", keys=keys)
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


GUIDE = Path(jax_lnfold.__file__).parents[1] / "docs" / "guide" / "checkpoints.md"


@pytest.mark.parametrize("where", ["guide", "help"])
def test_examples(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both fit a model of the sizes that they speak of."""
    with pytest.raises(SystemExit):
        main(["center", "--help"])
    text = GUIDE.read_text("utf-8") if where == "guide" else capsys.readouterr().out
    found = re.search(r'\{"params/h_\{\}.*?: null\}', text, re.DOTALL)
    assert found is not None
    keys = KeyMap.from_json(found[0].encode())
    block, prefix = ("h_2/", "h.2.") if where == "guide" else ("", "")
    stored = {
        "h.2.ln.weight": (768,),
        "h.2.qkv.weight": (3 * 768, 768),
        f"{prefix}gate.weight": (50, 768),
        f"{prefix}up.weight": (50, 768),
    }
    leaves = {
        "params/h_2/ln/scale": (768,),
        "params/h_2/query/kernel": (768, 12, 64),
        f"params/{block}gate_up/kernel": (768, 100),
        "params/step": (),
    }
    views = keys.located(
        plan_of(leaves, *[*leaves][1:3]), {n: StoredLeaf(s, "float32") for n, s in stored.items()}
    )
    assert [*views] == [*leaves][:3]


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["center", "p", "a", "b", "--keys", "k", "--prefix", "x"])
    assert stop.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
    (tmp_path / "p").write_text(ONE.to_json())
    assert main(["center", str(tmp_path / "p"), "a", "b", "--keys", str(tmp_path / "none")]) == 1
    assert "none'; check the path" in capsys.readouterr().err
