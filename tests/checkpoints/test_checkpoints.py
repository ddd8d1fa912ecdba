"""Centering of checkpoints on disk: the same bits as in memory, leaf by leaf, all or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, TreeError
from jax_lnfold.api import plan_fold
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import ALL, FREE, Entry, Labels
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.plan.editing import edit_leaf
from jax_lnfold.plan.leaf import Factor, Recipe
from jax_lnfold.plan.plan import CenterEdit, LeafSpec
from jax_lnfold.trees import leaf_paths
from tests.models.norm_spellings import layer_norm

Array = jax.Array
Tree = dict[str, Any]
SHAPES = {"stem": (7, 6), "bias": (6,), "layer": (6, 6), "scale": (6,), "head": (6, 3)}
EDITED = {"stem", "bias", "layer", "scale"}


def model(variables: Tree, x: Array) -> Array:
    p = variables["params"]
    s = x @ p["stem"]["kernel"] + p["bias"]
    s = s + (layer_norm(s) @ p["blocks"][0]["layer"]) * p["scale"]
    return layer_norm(s) @ p["head"]


def variables(dtype: Any = np.float32, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    p = {name: rng.normal(0.4, 1, shape).astype(dtype) for name, shape in SHAPES.items()}
    p["bias"][:] = 2  # becomes zero, which a store of chunks might leave out
    stem, layer = {"kernel": p.pop("stem")}, [{"layer": p.pop("layer")}]
    return {"params": p | {"stem": stem, "blocks": layer}}


def state(dtype: Any = np.float32) -> Tree:
    """A checkpoint with more in it than the variables."""
    moments = {name: np.ones(shape, np.float16) for name, shape in SHAPES.items()}
    return {"model": variables(dtype), "opt": {"mu": moments}, "step": np.int32([3])}


@pytest.fixture(scope="module")
def plan() -> FoldPlan:
    found = plan_fold(model, variables(), jax.ShapeDtypeStruct((2, 7), jnp.float32))
    assert {path.split("/")[-1] for path in found.leaf_edits()} == {"kernel", *EDITED} - {"stem"}
    assert len(found.scales) == 1
    return found


def bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return bits_of(dict(leaf_paths(tree)))


def bits_of(arrays: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = ((path, np.asarray(x)) for path, x in arrays.items())
    return {path: (str(x.dtype), x.shape, x.tobytes()) for path, x in found}


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check(
    plan: FoldPlan,
    source: Path,
    load: Callable[[Path], Any],
    want: Any,
    prefix: str = "",
    edited: int = len(EDITED),
) -> None:
    """The centered copy, restored, is the tree `want`; nothing else has changed."""
    before, dest = contents(source.parent), source.parent / f"centered{source.suffix}"
    done = center_checkpoint(plan, source, dest, prefix)
    assert bits(load(dest)) == bits(want)
    after = contents(source.parent)
    assert {file: after[file] for file in before} == before
    assert {*source.parent.iterdir()} == {source, dest}
    assert done.leaves == edited


# --- safetensors ---------------------------------------------------------------------------------


def flat(tree: Any, separator: str = ".") -> dict[str, np.ndarray]:
    return {path.replace("/", separator): np.asarray(x) for path, x in leaf_paths(tree)}


def save(tree: Any, file: Path, separator: str = ".") -> Path:
    arrays = {name: jnp.asarray(x) for name, x in flat(tree, separator).items()}
    safetensors.flax.save_file(arrays, str(file), {"format": "pt"})
    return file


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_safetensors(plan: FoldPlan, tmp_path: Path, dtype: Any, separator: str) -> None:
    tree = state(dtype)
    want = tree | {"model": plan.center(tree["model"])}
    assert bits(want) != bits(tree)
    source = save(tree, tmp_path / "model.safetensors", separator)
    check(plan, source, safetensors.flax.load_file, flat(want, separator), prefix="model")
    with safetensors.safe_open(tmp_path / "centered.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


INDEX = "model.safetensors.index.json"
HEAD_LISTED = '"weight_map": {"params.head": "model-00000-of-00002.safetensors", '


def save_sharded(tree: Any, folder: Path) -> Path:
    """Two files with an index, one of them a link to a read-only file elsewhere."""
    (folder / "blobs").mkdir(parents=True)
    source = folder / "source" / "model"
    source.mkdir(parents=True)
    arrays, weight_map = flat(tree), {}
    for number in range(2):
        file = source / f"model-0000{number}-of-00002.safetensors"
        part = dict(sorted(arrays.items())[number::2])
        safetensors.numpy.save_file(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    blob = folder / "blobs" / "1"
    file.rename(blob).chmod(0o444)
    file.symlink_to(blob)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / INDEX).write_text(json.dumps(index))
    (source / "config.json").write_text("{}")
    return source


def load_sharded(folder: Path) -> dict[str, Any]:
    assert (folder / "config.json").read_text() == "{}"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    return {name: x for file in files for name, x in safetensors.numpy.load_file(file).items()}


def test_sharded_safetensors(plan: FoldPlan, tmp_path: Path) -> None:
    tree = variables()
    source = save_sharded(tree, tmp_path)
    blob = (tmp_path / "blobs" / "1").read_bytes()
    want = dict(sorted(flat(plan.center(tree)).items()))
    check(plan, source, lambda folder: dict(sorted(load_sharded(folder).items())), want)
    assert (tmp_path / "blobs" / "1").read_bytes() == blob
    index = source / INDEX
    with pytest.raises(FoldError, match=r"is an index; pass its directory, .*/source/model$"):
        center_checkpoint(plan, index, tmp_path / "dest")


def test_directory_of_one_file(plan: FoldPlan, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    save(variables(), source / "weights.safetensors")
    want = flat(plan.center(variables()))
    load = safetensors.flax.load_file
    check(plan, source, lambda folder: load(folder / "weights.safetensors"), want)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def replace_text(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def spoil_index(file: Path, name: str) -> None:
    index = file.with_name(INDEX)
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], name)
    index.write_text(json.dumps(data))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (cut, r"model-00000-of-00002.safetensors is not .*it is cut off: \d+ bytes instead"),
    "empty": (lambda file: file.write_bytes(b""), "it has no header"),
    "something else": (lambda file: file.write_bytes(b"\x04" + b"\0" * 7 + b"spam"), "JSONDecode"),
    "other header": (
        lambda file: file.write_bytes(b"\x04" + b"\0" * 7 + b"[[]]"),
        "not a readable",
    ),
    "no index": (lambda file: file.with_name(INDEX).unlink(), "pass one of"),
    "names outside": (lambda file: spoil_index(file, "../x.safetensors"), "in another directory"),
    "names elsewhere": (lambda file: spoil_index(file, file.name), "its files lack 'params"),
    "a name in two files": (
        lambda file: save(variables(), file),
        "holds 'params.*', which is not listed there",
    ),
    "a name in a file besides": (
        lambda file: save({"params": {"head": np.ones(3)}}, file.with_name("m.safetensors")),
        "'m.safetensors', which it does not name, holds 'params.head', too",
    ),
    "a name that is not listed": (
        lambda file: save({"else": np.ones(3)}, file),
        "holds 'else', which is not listed there",
    ),
    "a name listed twice": (
        lambda file: replace_text(file.with_name(INDEX), '"weight_map": {', HEAD_LISTED),
        "'params.head' is there twice",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_safetensors(
    plan: FoldPlan, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    source = save_sharded(variables(), tmp_path)
    damage(source / "model-00000-of-00002.safetensors")
    with pytest.raises(FoldError, match=message):
        center_checkpoint(plan, source, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


# --- Orbax ---------------------------------------------------------------------------------------


def manager(tree: Any, path: Path) -> None:
    with ocp.CheckpointManager(path.parent) as saver:
        saver.save(int(path.name), args=ocp.args.StandardSave(tree))


def standard(tree: Any, path: Path) -> None:
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)


def pytree(**kw: bool) -> Callable[[Any, Path], None]:
    return lambda tree, path: ocp.PyTreeCheckpointer(**kw).save(path, tree)


ORBAX: dict[str, Callable[[Any, Path], None]] = {
    "StandardCheckpointer": standard,
    "ocdbt": pytree(),
    "files": pytree(use_ocdbt=False),
    "files, uncompressed": pytree(use_ocdbt=False, use_compression=False),
    "ocdbt, zarr3": pytree(use_zarr3=True),
    "files, zarr3": pytree(use_ocdbt=False, use_zarr3=True),
}


def sharded(tree: Any) -> Any:
    """As arrays of jax, matrices in chunks of two columns."""
    mesh = jax.make_mesh((3,), ("d",), devices=jax.devices()[:3])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    return jax.tree.map(lambda x: jax.device_put(x, spread) if x.ndim == 2 else x, tree)


def restore(path: Path) -> Any:
    return ocp.PyTreeCheckpointer().restore(path)


@pytest.mark.parametrize("save_orbax", ORBAX.values(), ids=ORBAX)
def test_orbax(plan: FoldPlan, tmp_path: Path, save_orbax: Callable[[Any, Path], None]) -> None:
    tree = state()
    save_orbax(sharded(tree), tmp_path / "source")
    want = tree | {"model": plan.center(tree["model"])}
    check(plan, tmp_path / "source", restore, want, prefix="model")


@pytest.mark.parametrize("batch", [1, 16_000_000])
def test_replaced_chunks_are_not_kept(
    tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OCDBT database is written anew: it does not grow."""
    monkeypatch.setattr("jax_lnfold.checkpoints.orbax._BATCH", batch)
    shape, rng = (500, 64), np.random.default_rng(0)
    tree = {name: rng.normal(size=shape) for name in ("edited", "kept", "kept/too", "edited/no")}
    leaves = tuple(LeafSpec(name, shape) for name in sorted(tree))
    plan = FoldPlan(leaves, (CenterEdit("edited", AxisSet.over(shape, (1,))),))
    standard(tree, tmp_path / "source")
    check(plan, tmp_path / "source", restore, plan.center(tree), edited=1)
    sizes = (sum(map(len, contents(tmp_path / x).values())) for x in ("source", "centered"))
    before, after = sizes
    assert abs(after - before) < 0.02 * before


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_orbax_dtypes(plan: FoldPlan, tmp_path: Path, dtype: Any) -> None:
    tree = variables(dtype)
    standard(tree, tmp_path / "source")
    check(plan, tmp_path / "source", restore, plan.center(tree))


def test_step_of_a_checkpoint_manager(
    plan: FoldPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree, steps = variables(), tmp_path / "steps"
    manager(tree, steps / "7")
    (tmp_path / "folded").mkdir()
    caplog.clear()
    center_checkpoint(plan, steps / "7", tmp_path / "folded" / "7")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with ocp.CheckpointManager(tmp_path / "folded") as found:
        restored = found.restore(found.latest_step(), args=ocp.args.StandardRestore(tree))
    assert bits(restored) == bits(plan.center(tree))
    standard(tree, tmp_path / "items" / "a")
    standard(tree, tmp_path / "items" / "b")
    with pytest.raises(FoldError, match=r"is not one checkpoint.* pass one of .*/a, .*/b$"):
        center_checkpoint(plan, tmp_path / "items", tmp_path / "dest")
    (tmp_path / "elsewhere").mkdir()
    (steps / "7" / "default").rename(tmp_path / "elsewhere" / "tree")
    (steps / "7" / "default").symlink_to(tmp_path / "elsewhere" / "tree")
    center_checkpoint(plan, steps / "7", tmp_path / "linked")
    assert bits(restore(tmp_path / "linked" / "default")) == bits(plan.center(tree))
    with pytest.raises(FoldError, match=r"not one checkpoint.*pass one of .*/steps/7$"):
        center_checkpoint(plan, steps, tmp_path / "dest")


def test_orbax_is_not_installed(
    plan: FoldPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standard(variables(), tmp_path / "source")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(FoldError, match="pip install orbax-checkpoint"):
        center_checkpoint(plan, tmp_path / "source", tmp_path / "dest")


@pytest.mark.parametrize("part", ["_METADATA", "chunk"])
def test_damaged_orbax(plan: FoldPlan, tmp_path: Path, part: str) -> None:
    ORBAX["files"](variables(), tmp_path / "source")
    name = {"chunk": "params.blocks.0.layer/0.0"}.get(part, part)
    (tmp_path / "source" / name).write_bytes(b"{spam")
    with pytest.raises(FoldError, match=r"source: .* cannot be read|not a readable Orbax"):
        center_checkpoint(plan, tmp_path / "source", tmp_path / "dest")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


# --- what does not fit ---------------------------------------------------------------------------


def changed(**leaves: Any) -> dict[str, Any]:
    return flat(variables(), "/") | {f"params/{name}": x for name, x in leaves.items()}


def without(*names: str) -> dict[str, Any]:
    return {name: x for name, x in flat(variables(), "/").items() if name not in names}


def moved(to: str, own: str = "", arrays: dict[str, Any] | None = None) -> dict[str, Any]:
    arrays = arrays or flat(variables(), "/")
    return {f"{to}{name.removeprefix(own)}": x for name, x in arrays.items()}


MISFITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing": (
        without("params/scale"),
        "",
        "1 of 4 .*'params/scale' is missing; pass a checkpoint that holds them: this one has "
        "nothing else$",
    ),
    "of another shape": (
        changed(bias=np.ones(5)),
        "",
        r"1 of 4 .*'params/bias' has shape \(5,\) instead of \(6,\); make a plan of the model of "
        "these shapes$",
    ),
    "integers": (
        changed(bias=np.ones(6, int)),
        "",
        "'params/bias' has dtype .*64, which cannot be edited; convert such leaves to one of bf",
    ),
    "two things at once": (
        changed(bias=np.ones(5), scale=np.ones(6, int)),
        "",
        "'params/bias' has shape .*'params/scale' has dtype .*make a plan.*, and convert such",
    ),
    "another model": (
        {f"w{i}": np.ones(3) for i in range(5)},
        "",
        "4 of 4 .*missing; .*missing; .*missing; .*missing; name its leaves as the plan does, "
        "or pass --keys: it has 'w0', 'w1', 'w2', 'w3', ... instead$",
    ),
    "boxed and not": (
        changed(**{"scale/value": np.ones(6)}),
        "",
        "1 of 4 .*'params/scale' is ambiguous, as to 'params/scale' or 'params/scale/value'; give",
    ),
    "two names read alike": (
        without("params/stem/kernel")
        | {"params.stem/kernel": np.ones((7, 6)), "params/stem.kernel": np.ones((7, 6))},
        "",
        "1 of 4 .*'params/stem/kernel' is ambiguous, as to 'params.stem/kernel' or 'params/stem.k",
    ),
    "below a prefix": (moved("state/x/"), "", "4 of 4 .*with --prefix state/x they would all fit"),
    "a level less": (moved("", "params/"), "", "with --prefix params= they would all fit"),
    "another level": (moved("w.x.", "params/"), "", "with --prefix params=w/x they would all fit"),
    "two places": (
        moved("a/") | moved("b/"),
        "",
        "with --prefix a or --prefix b they would all fit",
    ),
    "two places, one of other shapes": (
        moved("a/") | moved("b/") | {"b/params/bias": np.ones(5)},
        "",
        "with --prefix a they would all fit",
    ),
    "a prefix too much": (moved(""), "state", "with no --prefix they would all fit"),
    "the plan has no such level": (
        moved(""),
        "model=state",
        "'params/bias' does not begin as the prefix 'model=state' says.*with no --prefix",
    ),
}


@pytest.mark.parametrize(("arrays", "prefix", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits(
    plan: FoldPlan, tmp_path: Path, arrays: dict[str, Any], prefix: str, message: str
) -> None:
    source = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, source)
    with pytest.raises(TreeError, match=f"^source: .*{message}"):
        center_checkpoint(plan, source, tmp_path / "dest", prefix)
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize(
    ("to", "own", "prefix"),
    [
        ("state/x/", "", "state/x"),
        ("state.x/", "", "/state.x/"),
        ("", "params/", "params="),
        ("ema/w/", "params/", "params=ema/w"),
    ],
)
def test_prefixes(plan: FoldPlan, tmp_path: Path, to: str, own: str, prefix: str) -> None:
    other = {f"x{name}": np.ones(3) for name in flat(variables(), "/")}
    arrays = moved(to, own) | other
    source = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, source)
    want = other | moved(to, own, flat(plan.center(variables()), "/"))
    order = safetensors.numpy.load_file
    check(plan, source, lambda file: {k: order(file)[k] for k in want}, want, prefix=prefix)


LEFT_ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "missing": ({}, {"params/head": None}),
    "of another shape": ({"params/head": np.ones((3, 9))}, {}),
    "integers": ({"params/head": np.ones((6, 3), int)}, {}),
}


@pytest.mark.parametrize(("changes", "missing"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_leaves_that_are_not_edited_need_not_fit(
    plan: FoldPlan, tmp_path: Path, changes: dict[str, Any], missing: dict[str, Any]
) -> None:
    arrays = without(*missing) | changes
    centered = flat(plan.center(variables()), "/") | changes
    want = {name: centered[name] for name in arrays}
    source = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, source)
    check(plan, source, lambda file: dict(sorted(safetensors.numpy.load_file(file).items())), want)


def boxed(tree: Any) -> Any:
    return jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), tree)


@pytest.mark.parametrize("store", ["safetensors", "orbax"])
@pytest.mark.parametrize("box_plan", [False, True])
@pytest.mark.parametrize("box_checkpoint", [False, True])
def test_boxes(tmp_path: Path, store: str, box_plan: bool, box_checkpoint: bool) -> None:
    """The plan of a boxed tree fits a checkpoint of the plain one, and the other way round."""

    def apply(tree: Any, x: Array) -> Array:
        return model(nn.meta.unbox(tree), x)

    tree = variables()
    plan = plan_fold(apply, boxed(tree) if box_plan else tree, jnp.ones((2, 7)))
    assert all(leaf.key_path.endswith("/value") == box_plan for leaf in plan.leaves)
    saved = boxed(tree) if box_checkpoint else tree
    centered = nn.meta.unbox(plan.center(boxed(tree) if box_plan else tree))
    want = boxed(centered) if box_checkpoint else centered
    assert bits(want) != bits(saved)
    if store == "orbax":
        standard(saved, tmp_path / "source")
        check(plan, tmp_path / "source", restore, want)
    else:
        source = save(saved, tmp_path / "model.safetensors")
        check(plan, source, safetensors.flax.load_file, flat(want))


def test_a_leaf_that_is_called_value(tmp_path: Path) -> None:
    """What has the very name of one leaf of a plan is no other leaf, boxed or not."""
    shapes = {"attn/value": (4, 3), "attn": (4, 3), "attn.value": (2,)}
    leaves = tuple(LeafSpec(name, shape) for name, shape in shapes.items())
    plan = FoldPlan(leaves, (CenterEdit("attn/value", AxisSet.over((4, 3), (1,))),))
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    source = tmp_path / "all.safetensors"
    safetensors.numpy.save_file(arrays, source)
    x = arrays["attn/value"]
    want = arrays | {"attn/value": plan.center(arrays)["attn/value"]}
    np.testing.assert_allclose(want["attn/value"], x - x.mean(1, keepdims=True), atol=1e-15)
    load = safetensors.numpy.load_file
    check(plan, source, lambda file: {k: load(file)[k] for k in shapes}, want, edited=1)
    del arrays["attn/value"]
    safetensors.numpy.save_file(arrays, tmp_path / "less.safetensors")
    with pytest.raises(TreeError, match="'attn/value' is missing"):
        center_checkpoint(plan, tmp_path / "less.safetensors", tmp_path / "dest")
    safetensors.numpy.save_file({"attn/value/value": x}, tmp_path / "one.safetensors")
    with pytest.raises(TreeError, match="'attn/value' is missing"):
        center_checkpoint(plan, tmp_path / "one.safetensors", tmp_path / "dest")


class Dropping(nnx.Module):
    """A model whose state is more than parameters: statistics, counters and typed PRNG keys."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.stem, self.norm = nnx.Linear(7, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.drop(self.norm(self.stem(x)), deterministic=True))


def without_key_types(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@pytest.mark.parametrize("kind", ["state", "parameters", "pure parameters"])
def test_plan_of_a_whole_nnx_state(tmp_path: Path, kind: str) -> None:
    graph, state = nnx.split(Dropping())
    plan = plan_fold(lambda s, x: nnx.merge(graph, s)(x), state, jnp.ones((2, 7)))
    _, params, rest = nnx.split(Dropping(), nnx.Param, ...)
    assert any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(rest))
    saved = {"state": state, "parameters": params}.get(kind, nnx.to_pure_dict(params))
    standard(saved, tmp_path / "source")
    center_checkpoint(plan, tmp_path / "source", tmp_path / "dest")
    found = (restore(tmp_path / name) for name in ("source", "dest"))
    before, after = (bits(jax.tree.map(without_key_types, tree)) for tree in found)
    values, suffix = dict(leaf_paths(params)), "/value" * (kind != "pure parameters")
    want = {
        path.removesuffix("/value") + suffix: edit_leaf(
            np.asarray(values[path]), [], e.recipe, False
        )[0]
        for path, e in plan.leaf_edits().items()
    }
    assert len(want) == 2
    assert after == before | bits_of(want) != before


def test_overflow(plan: FoldPlan, tmp_path: Path) -> None:
    stem = np.float16([[65504] * 5 + [-65504]] * 7)
    arrays = flat(variables(np.float16), "/") | {"params/stem/kernel": stem}
    safetensors.numpy.save_file(arrays, tmp_path / "a")
    with pytest.raises(TreeError, match="source: leaf 'params/stem/kernel' would overflow"):
        center_checkpoint(plan, tmp_path / "a", tmp_path / "b")
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_dest(plan: FoldPlan, tmp_path: Path) -> None:
    source = save(variables(), tmp_path / "a")
    folder = save_sharded(variables(), tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    for from_, dest, message in [
        (source, source, "exists"),
        (source, folder, "exists"),
        (source, tmp_path / "dangling", "exists"),
        (source, tmp_path / "none" / "b", "is not a directory; make it first"),
        (folder, folder / "b", "is inside of"),
    ]:
        with pytest.raises(FoldError, match=f"^dest: .*{message}"):
            center_checkpoint(plan, from_, dest)
    with pytest.raises(FoldError, match=r"source: .* does not exist"):
        center_checkpoint(plan, tmp_path / "none", tmp_path / "b")
    assert contents(tmp_path) == before


# --- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("step", ["copyfile", "edit_leaf", "_check_dest"])
def test_interrupted(
    plan: FoldPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    step: str,
) -> None:
    source = save_sharded(variables(), tmp_path)
    before = contents(tmp_path)
    module = jax_lnfold.checkpoints.center
    place = jax_lnfold.checkpoints.leaf_store.shutil if step == "copyfile" else module
    call, times = getattr(place, step), iter(range(99))

    def failing(*args: Any, **kw: Any) -> Any:
        if next(times) == 1:
            raise error("injected")
        return call(*args, **kw)

    monkeypatch.setattr(place, step, failing)
    with pytest.raises(error, match="injected"):
        center_checkpoint(plan, source, tmp_path / "dest")
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


# --- memory --------------------------------------------------------------------------------------

BLOCKED = {
    "one axis": ((7, 50, 1), (FREE, ALL, FREE), (0,)),
    "regions": ((7, 50, 3), (FREE, Labels([0] * 25 + [-1] * 5 + [1] * 20), FREE), (1, 2)),
    "turned scale": ((9, 5, 8), (FREE, FREE, ALL), (2, 0)),
    "to zero": ((5,), (FREE,), (0,)),
    "no axis left": ((4, 6), (ALL, ALL), (0,)),
}


@pytest.mark.parametrize("block", [1, 3, 10, 60])
@pytest.mark.parametrize(("shape", "entries", "axes"), BLOCKED.values(), ids=BLOCKED)
def test_blocks(
    shape: tuple[int, ...],
    entries: tuple[Entry, ...],
    axes: tuple[int, ...],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Editing in blocks gives the same bits."""
    rng, sets = np.random.default_rng(0), (AxisSet(shape, entries),)
    x = rng.normal(size=shape).astype(np.float32)
    scale = rng.normal(size=[shape[d] for d in axes]).astype(np.float32)
    recipes = {
        Recipe(sets=sets): (),
        Recipe(factors=(Factor(axes),), sets=sets): (scale,),
        Recipe(factors=(Factor(axes), Factor(axes, 1))): (scale, scale),
        Recipe(factors=(Factor(axes, 1),)): (scale,),
        Recipe(fill=0.0): (),
    }
    for recipe, sources in recipes.items():
        monkeypatch.setattr("jax_lnfold.plan.leaf._BLOCK", x.size)
        want = edit_leaf(x, sources, recipe, donate=False)[0]
        monkeypatch.setattr("jax_lnfold.plan.leaf._BLOCK", block)
        assert bits(edit_leaf(x, sources, recipe, donate=False)[0]) == bits(want)


COUNT, SHAPE = 48, (640, 1024)
PEAK = """
import re, resource, sys
from pathlib import Path
from jax_lnfold.cli.commands import main

def peak():
    status = Path("/proc/self/status")  # there, since getrusage counts the parent's memory, too
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

small, large = sys.argv[1:]
for plan, source in ((small, small), (large, large)):
    before = peak()
    assert main(["center", plan + ".json", source, source + ".centered"]) == 0
print(peak() - before)
"""


@pytest.mark.parametrize(("kind", "megabytes"), [("safetensors", 25), ("orbax", 70)])
def test_memory(tmp_path: Path, kind: str, megabytes: int) -> None:
    """The leaves together are 126 MB, one of them is 2.6 MB."""
    rng = np.random.default_rng(0)
    for name, count, shape in (("small", 1, (4, 8)), ("large", COUNT, SHAPE)):
        tree = {f"layer_{i}": rng.normal(size=shape).astype(np.float32) for i in range(count)}
        along = {"shape": shape, "entries": ["free", "all"]}
        leaves = [{"key_path": path, "shape": shape} for path in tree]
        edits = [{"key_path": path, "along": along} for path in tree]
        data = {"version": 2, "leaves": leaves, "edits": edits, "scales": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        if kind == "orbax":
            pytree(use_compression=False)(tree, tmp_path / name)
        else:
            safetensors.numpy.save_file(tree, tmp_path / name)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < megabytes
