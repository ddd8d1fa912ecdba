"""Damaged checkpoints and plans: one clean line of error and no file, or the right bytes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy

from jax_lnfold import FoldError, FoldPlan
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import Labels
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.checkpoints.safetensors_header import read_header
from jax_lnfold.cli.commands import main
from jax_lnfold.plan.edits.center import CenterEdit
from jax_lnfold.plan.edits.scale import ScaleEdit
from jax_lnfold.plan.file import LeafSpec

Arrays = dict[str, np.ndarray]


def framed(header: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def library(file: Path) -> list[str] | None:
    """What the format's own library finds in a file, None if it refuses it."""
    try:
        with safetensors.safe_open(file, "np") as opened:
            return sorted(opened.keys())
    except safetensors.SafetensorError:
        return None


def ours(file: Path) -> list[str] | None:
    try:
        return sorted(read_header(file))
    except (ValueError, RecursionError):
        return None


# --- headers of safetensors ----------------------------------------------------------------------

W = json.dumps(entry())
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "overlap": (json.dumps({"v": entry(shape=(1,), offsets=(4, 8)), "w": entry()}), "overlap"),
    "same bytes": (json.dumps({"v": entry(), "w": entry()}), "overlap"),
    "hole": (json.dumps({"w": entry(shape=(1,), offsets=(4, 8))}), "after a hole"),
    "empty in a hole": (json.dumps({"w": entry(), "e": entry(shape=(0,), offsets=(9, 9))}), "hole"),
    "more data": (json.dumps({"w": entry(shape=(1,), offsets=(0, 4))}), "goes on after its last"),
    "less data": (json.dumps({"w": entry(shape=(3,), offsets=(0, 12))}), "is cut off"),
    "backwards": (json.dumps({"w": entry(offsets=(8, 0))}), "end before they begin"),
    "a name twice": (f'{{"w": {W}, "w": {W}}}', "'w' is there twice"),
    "a field twice": (f'{{"w": {W[:-1]}, "shape": [2]}}}}', "'shape' is there twice"),
    "float": (json.dumps({"w": entry(offsets=(0.0, 8))}), "0.0 is no size"),
    "exponent": (json.dumps({"w": entry()}).replace("8]", "8e0]"), "8e0 is no size"),
    "negative": (json.dumps({"w": entry(offsets=(-1, 7))}), "-1 is no size"),
    "minus zero": (json.dumps({"w": entry()}).replace("[0", "[-0"), "-0 is no size"),
    "not a number": (json.dumps({"w": entry(offsets=(float("nan"), 8))}), "NaN is no size"),
    "bool": (json.dumps({"w": entry(offsets=(False, 8))}), "are no integers"),
    "bool in a shape": (json.dumps({"w": entry(shape=(2, True))}), "are no integers"),
    "float in a shape": (json.dumps({"w": entry(shape=(2.0,))}), "2.0 is no size"),
    "three offsets": (json.dumps({"w": entry(offsets=(0, 8, 8))}), "are no integers"),
    "no shape": (json.dumps({"w": {"dtype": "F32", "data_offsets": [0, 8]}}), "not described by"),
    "a list": (json.dumps({"w": ["F32", [2], [0, 8]]}), "not described by"),
    "more fields": (json.dumps({"w": entry() | {"x": 1}}), "not described by"),
    "other size": (json.dumps({"w": entry("F16")}), r"'w' of dtype F16 and shape \(2,\) has 8"),
    "unknown dtype": (json.dumps({"w": entry("f32")}), "unknown dtype 'f32'"),
    "dtype is no text": (json.dumps({"w": entry(["F32"])}), "unknown dtype"),
    "half a byte": (json.dumps({"w": entry("F4", (15,))}), r"\(15,\) has 8 bytes"),
    "too large": (json.dumps({"w": entry(), "e": entry(shape=(2**63, 8, 0), offsets=(8, 8))}), "l"),
    "notes that are no text": (json.dumps({"w": entry(), "__metadata__": {"a": 1}}), "not strings"),
    "half a surrogate pair": (f'{{"\\ud800": {W}}}', "surrogates not allowed"),
    "latin-1": (f'{{"\xff": {W}}}'.encode("latin-1"), "can't decode"),
    "UTF-16": (f'{{"w": {W}}}'.encode("utf-16"), "can't decode"),
    "byte order mark": (f'\ufeff{{"w": {W}}}', "BOM"),
    "a list of all": ("[[]]", "is no object"),
    "nothing": ("", "has no header"),
}


@pytest.mark.parametrize(("header", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_headers(tmp_path: Path, header: str | bytes, message: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(framed(header, bytes(8)))
    with pytest.raises(ValueError, match=message):
        read_header(file)


ACCEPTED = {
    "one array": {"w": entry()},
    "another order": {"v": entry("U8", (4,), (4, 8)), "w": entry("U8", (4,), (0, 4))},
    "no elements": {"w": entry(), "e": entry(shape=(0, 3), offsets=(8, 8))},
    "no elements amid others": {"w": entry(), "e": entry(shape=(0, 2**63), offsets=(0, 0))},
    "one number": {"w": entry("F64", ())},
    "half bytes": {"w": entry("F4", (16,))},
    "notes": {"__metadata__": {"format": "pt"}, "w": entry()},
    "no notes": {"__metadata__": None, "w": entry()},
    "odd names": {"": entry("BF16"), "\x1b[2J\n": entry("BF16", (2,), (4, 8))},
}
ACCEPTED["odd names"][""]["data_offsets"] = (0, 4)


@pytest.mark.parametrize("header", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_headers(tmp_path: Path, header: dict[str, Any]) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(framed(json.dumps(header) + "  ", bytes(8)))
    found = read_header(file)
    assert sorted(found) == library(file) == sorted({*header} - {"__metadata__"})
    start = file.stat().st_size - 8
    assert {name: x.start - start for name, x in found.items()} == {
        name: header[name]["data_offsets"][0] for name in found
    }


PARTS = re.compile(r'-?\d+|"[^"]*"(: \{[^{}]*\})?|\[[^\[\]]*\]|\{[^{}]*\}')
WORDS = (
    *("0", "1", "8", "-1", "-0", "1.0", "1e0", "true", "null", "NaN", "18446744073709551616", "01"),
    *('"F4"', '"BF16"', '"F32"', '"dtype"', '"\\ud800"', '"\\u001b[2J"', '"__metadata__"', '""'),
    *(
        '"all"',
        '"free"',
        "[0, 1]",
        "[0]",
        "[]",
        "{}",
        "[[0]]",
        '"a.safetensors"',
        '"../src"',
        '".."',
    ),
)


def damaged_text(rng: random.Random, text: str) -> str:
    """JSON in which some parts are others, missing, repeated, or hit by noise."""
    for _ in range(rng.randint(1, 2)):
        spans = [found.span() for found in PARTS.finditer(text)] or [(0, len(text))]
        (a, b), (c, d) = rng.choice(spans), rng.choice(spans)
        noise = rng.choice('{}[]:,"\\0 \n\x00\x1bé\ud800')
        new = (rng.choice(WORDS), text[c:d], f"{text[a:b]}, {text[a:b]}", "", noise)
        text = text[:a] + rng.choice(new) + text[b:]
    return text


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    a = rng.randrange(len(data))
    b = rng.choice((a, a + 1, a + 1, a + 8, len(data)))
    return data[:a] + rng.randbytes(rng.choice((0, 1, 1, 4))) + data[b:]


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return damaged_bytes(rng, data)
    end = 8 + int.from_bytes(data[:8], "little")
    rest = rng.choice((data[end:], data[end:], data[end:-1], data[end:] + b"\0"))
    return framed(damaged_text(rng, data[8:end].decode()), rest)


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    """Both read the same names from whatever we accept, also from damaged files."""
    rng, outcomes = random.Random(0), Counter[tuple[bool, bool]]()
    file = tmp_path / "a.safetensors"
    small: Arrays = {"a": np.zeros((2, 3), np.float32), "b.c": np.zeros(0), "d": np.bool_([1])}
    whole = safetensors.numpy.save(small, {"format": "pt"})
    for _ in range(1500):
        file.write_bytes(damaged_safetensors(rng, whole))
        found, mine = library(file), ours(file)
        assert mine is None or mine == found, file.read_bytes()
        outcomes[found is None, mine is None] += 1
    assert outcomes[True, True] > 500
    assert outcomes[False, False] > 50


# --- whole checkpoints ---------------------------------------------------------------------------

SHAPES = {"bias": (6,), "head": (6, 3), "layer": (6, 6), "scale": (6,), "stem": (7, 6)}
PLAN = FoldPlan(
    tuple(LeafSpec(name, shape) for name, shape in SHAPES.items()),
    (
        CenterEdit("bias", AxisSet.over((6,), (0,))),
        CenterEdit("layer", AxisSet.over((6, 6), (1,))),
        CenterEdit("stem", AxisSet.of((7, 6), ["free", Labels([0, 0, 0, 1, 1, -1])])),
    ),
    (ScaleEdit("scale", (("layer", (1,)),)),),
)


def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def save_one(path: Path) -> None:
    safetensors.numpy.save_file(arrays(), path)


def save_two(path: Path) -> None:
    path.mkdir()
    weight_map = {}
    for number, file in enumerate(("a.safetensors", "b.safetensors")):
        part = dict(list(arrays().items())[number::2])
        safetensors.numpy.save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 480.0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def save_files(path: Path) -> None:
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(path, arrays())


def save_database(path: Path) -> None:
    ocp.PyTreeCheckpointer().save(path, arrays())


def load(path: Path) -> Arrays:
    """All arrays, as the libraries of the formats read them."""
    if (path / "_METADATA").exists():
        found = ocp.PyTreeCheckpointer().restore(path)
    else:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        found = {name: x for file in files for name, x in safetensors.numpy.load_file(file).items()}
    return {name: np.asarray(x) for name, x in found.items()}


def bits(tree: Arrays) -> dict[str, bytes]:
    return {name: x.tobytes() for name, x in tree.items()}


def centered(tree: Arrays) -> Arrays:
    """A tree with the leaves that the plan edits, and perhaps others instead of the rest."""
    whole = {name: tree.get(name, np.zeros(SHAPES[name])) for name in SHAPES}
    whole["head"] = np.zeros(SHAPES["head"])
    return tree | {name: x for name, x in PLAN.center(whole).items() if name != "head"}


def damage_one_file(rng: random.Random, path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file()) or [path]
    file = rng.choice(files)
    data = file.read_bytes()
    if file.suffix in (".json", ".zarray") or file.name == "_METADATA":
        data = damaged_text(rng, data.decode()).encode("utf-8", "surrogatepass")
    elif path.is_file() or file.suffix == ".safetensors":
        data = damaged_safetensors(rng, data)
    else:
        data = damaged_bytes(rng, data)
    file.write_bytes(data) if rng.random() < 0.9 else file.unlink()


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


KINDS = {
    "safetensors": (save_one, 60),
    "safetensors with an index": (save_two, 60),
    "Orbax, files": (save_files, 40),
    "Orbax, database": (save_database, 40),
}


@pytest.mark.parametrize(("save", "count"), KINDS.values(), ids=KINDS)
def test_damaged_checkpoints(
    tmp_path: Path, save: Callable[[Path], None], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not found out, as bytes of arrays are not protected, is centered as it stands."""
    rng, outcomes, compared = random.Random(0), Counter[int](), 0
    plan = tmp_path / "plan.json"
    plan.write_text(PLAN.to_json())
    save(tmp_path / "whole")
    for i in range(count):
        folder = tmp_path / str(i)
        folder.mkdir()
        source, dest = folder / "source", folder / "dest"
        (shutil.copytree if (tmp_path / "whole").is_dir() else shutil.copy)(
            tmp_path / "whole", source
        )
        damage_one_file(rng, source)
        before = contents(folder)
        outcomes[code := main(["center", str(plan), str(source), str(dest)])] += 1
        out, err = capsys.readouterr()
        if code == 0:
            assert not err
            with suppress(ValueError):  # what is not edited may be damaged
                assert bits(load(dest)) == bits(centered(load(source)))
                compared += 1
            capsys.readouterr()
            continue
        assert code == 1
        assert not out
        assert err.startswith("jax_lnfold: ")
        assert err.endswith("\n")
        assert err[:-1].isprintable(), "one line, and nothing that a terminal would obey"
        assert contents(folder) == before
        assert {*folder.iterdir()} <= {source}
    assert min(compared, outcomes[1]) > 0, outcomes


def test_damaged_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that can still be read is applied as it stands."""
    rng, outcomes = random.Random(0), Counter[int]()
    plan, source, dest = (tmp_path / name for name in ("plan.json", "source", "dest"))
    save_one(source)
    text = PLAN.to_json()
    for i in range(300):
        data = damaged_text(rng, text).encode("utf-8", "surrogatepass")
        plan.write_bytes(damaged_bytes(rng, text.encode()) if i % 3 == 0 else data)
        outcomes[code := main(["center", str(plan), str(source), str(dest)])] += 1
        err = capsys.readouterr().err
        if code == 0:
            dest.unlink()
            continue
        assert code == 1
        assert err[:-1].isprintable(), err
        assert {*tmp_path.iterdir()} == {plan, source}
    assert outcomes[1] > 100


def test_a_missing_chunk_is_no_zeros(tmp_path: Path) -> None:
    """Orbax writes all chunks, those of zeros, too: one that is not there was lost."""
    save_files(tmp_path / "source")
    assert len(load(tmp_path / "source")) == len(SHAPES)
    (tmp_path / "source" / "layer" / "0.0").unlink()
    with pytest.raises(FoldError, match=r"leaf 'layer' cannot be read .*missing"):
        center_checkpoint(PLAN, tmp_path / "source", tmp_path / "dest")
    assert [*tmp_path.iterdir()] == [tmp_path / "source"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"key": "bias"', '"key": "../victim/bias"', "is in another directory"),
        ('"key": "bias"', '"key": "./layer"', "is in another directory"),
        ('"key": "bias"', '"key": "layer"', "two of its leaves have one name"),
    ],
)
def test_arrays_that_are_not_of_the_tree(tmp_path: Path, old: str, new: str, message: str) -> None:
    save_files(tmp_path / "source")
    save_files(tmp_path / "victim")
    before = contents(tmp_path / "victim")
    about = tmp_path / "source" / "_METADATA"
    assert old in about.read_text()
    about.write_text(about.read_text().replace(old, new))
    with pytest.raises(FoldError, match=message):
        center_checkpoint(PLAN, tmp_path / "source", tmp_path / "dest")
    assert contents(tmp_path / "victim") == before


# --- links ---------------------------------------------------------------------------------------


def link_to_itself(source: Path) -> None:
    (source / "sub").mkdir()
    (source / "sub" / "loop").symlink_to(source)


def link_to_what_is_around(source: Path) -> None:
    (source / "loop").symlink_to("../..")


def two_that_link_to_each_other(source: Path) -> None:
    other = source.parent / "other"
    other.mkdir()
    (source / "there").symlink_to(other)
    (other / "back").symlink_to(source)


def link_to_where_the_copy_is_made(source: Path) -> None:
    (source / "out").symlink_to(source.parent / "out")


LOOPS = (
    link_to_itself,
    link_to_what_is_around,
    two_that_link_to_each_other,
    link_to_where_the_copy_is_made,
)


@pytest.mark.parametrize("link", LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("save", [save_two, save_database])
def test_loops_of_links(
    tmp_path: Path, save: Callable[[Path], None], link: Callable[[Path], None]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save(source)
    out.mkdir()
    link(source)
    with pytest.raises(FoldError, match=r"source: .* leads back to .*; remove this link"):
        center_checkpoint(PLAN, source, out / "dest")
    assert not [*out.iterdir()]


def test_links_that_lead_elsewhere(tmp_path: Path) -> None:
    """They become what they link to, however often that is."""
    save_two(tmp_path / "source")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_text("x")
    for name in ("a", "b"):
        (tmp_path / "source" / name).symlink_to(tmp_path / "more")
    center_checkpoint(PLAN, tmp_path / "source", tmp_path / "dest")
    assert (tmp_path / "dest" / "a" / "x").read_text() == "x"
    assert not (tmp_path / "dest" / "b").is_symlink()
    assert bits(load(tmp_path / "dest")) == bits(centered(arrays()))


@pytest.mark.parametrize("place", ["source", "dest", "plan"])
def test_paths_that_are_loops(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_one(tmp_path / "source")
    (tmp_path / "plan").write_text(PLAN.to_json())
    (tmp_path / place).unlink(missing_ok=True)
    (tmp_path / place).symlink_to(tmp_path / "loop")
    (tmp_path / "loop").symlink_to(tmp_path / place)
    before = {*os.listdir(tmp_path)}
    assert main(["center", *(str(tmp_path / name) for name in ("plan", "source", "dest"))]) == 1
    err = capsys.readouterr().err
    assert err[:-1].isprintable()
    assert {*os.listdir(tmp_path)} == before
