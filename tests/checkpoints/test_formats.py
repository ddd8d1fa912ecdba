"""Other formats of checkpoints are named, with a line that converts them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.numpy

from jax_lnfold import FoldError, FoldPlan
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.plan.edits.center import CenterEdit
from jax_lnfold.plan.file import LeafSpec

TREE = {"params": {"head": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}}
PATH = "params/head/kernel"
PLAN = FoldPlan((LeafSpec(PATH, (2, 3)),), (CenterEdit(PATH, AxisSet.over((2, 3), (1,))),))
PARTS = "center reads safetensors and Orbax, so convert it: "


def refusal(source: Path) -> str:
    with pytest.raises(FoldError, match=r"^source: ") as error:
        center_checkpoint(PLAN, source, source.parent / "dest")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def write_msgpack(file: Path) -> None:
    file.write_bytes(flax.serialization.msgpack_serialize(TREE))


def write_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(TREE))


def write_npz(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez(opened, **{PATH: TREE["params"]["head"]["kernel"]})


CONVERTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "flax_model.msgpack": (write_msgpack, "Flax's msgpack"),
    "checkpoint_7": (write_msgpack, "Flax's msgpack"),
    "params.pkl": (write_pickle, "a pickle"),
    "params.npz": (write_npz, "NumPy's npz"),
    "a model's {0} IN OUT": (write_npz, "NumPy's npz"),
}


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("inside", [False, True])
def test_conversion(
    tmp_path: Path, name: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that is told makes a checkpoint that is read, of a file and of its directory."""
    write, words = CONVERTED[name]
    (tmp_path / "model").mkdir()
    write(file := tmp_path / "model" / name)
    told = refusal(file.parent if inside else file)
    assert f"{file} is {words}; {PARTS}" in told
    monkeypatch.chdir(tmp_path)
    modules = {"flax": flax, "safetensors": safetensors, "numpy": np, "pickle": pickle}
    exec(told.split(PARTS)[1], modules)
    center_checkpoint(PLAN, Path("model.safetensors"), Path("centered"))
    (got,) = safetensors.numpy.load_file("centered").values()
    assert got.tolist() == [[-1, 0, 1], [-1, 0, 1]]


def zip_of(name: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, b"")

    return write


def bytes_of(start: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(start + bytes(99))


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pytorch_model.bin": (zip_of("archive/data.pkl"), r"is weights of PyTorch; .*torch\.load"),
    "old.pt": (bytes_of(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), "is weights of PyTorch; "),
    "model.keras": (zip_of("model.weights.h5"), r"is HDF5; .*h5py\.File"),
    "model.h5": (bytes_of(b"\x89HDF\r\n\x1a\n"), r"is HDF5; .*h5py\.File"),
    "kernel.npy": (lambda file: np.save(file, np.ones(3)), r"is one array of NumPy; .*numpy\.load"),
    "other.zip": (zip_of("a.txt"), "pass a complete checkpoint of safetensors or Orbax"),
    "torn.zip": (bytes_of(b"PK\x03\x04"), "pass a complete checkpoint of safetensors or Orbax"),
    "text.txt": (bytes_of(b"weights"), "pass a complete checkpoint of safetensors or Orbax"),
    "noise.bin": (bytes_of(b"\x83\x01\x02"), "pass a complete checkpoint of safetensors or Orbax"),
    "empty": (lambda file: file.write_bytes(b""), "pass a complete checkpoint of safetensors or"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_told(tmp_path: Path, name: str) -> None:
    write, words = OTHERS[name]
    write(tmp_path / name)
    with pytest.raises(FoldError, match=words):
        center_checkpoint(PLAN, tmp_path / name, tmp_path / "dest")


def test_damaged_safetensors_are_no_other_format(tmp_path: Path) -> None:
    """The length of a header may begin as other formats do."""
    for n in range(0x7E, 0x92):
        data = n.to_bytes(8, "little") + b'{"w": 1}'.ljust(n)
        (tmp_path / "model").write_bytes(data)
        assert "'w' is not described by dtype, shape and data_offsets" in refusal(
            tmp_path / "model"
        )


def steps(folder: Path, *numbers: int, items: tuple[str, ...] = ("default",)) -> None:
    for number in numbers:
        for item in items:
            ocp.PyTreeCheckpointer().save(folder / str(number) / item, TREE)


def test_steps(tmp_path: Path) -> None:
    """Each is told once, the last ones in the order of their numbers."""
    steps(tmp_path / "run", 9, 8, 10, 100, items=("params", "state"))
    told = refusal(tmp_path / "run")
    assert told.endswith(f"pass one of {', '.join(f'{tmp_path}/run/{n}' for n in (9, 10, 100))}")
    told = refusal(tmp_path / "run" / "9")
    assert told.endswith(f"pass one of {tmp_path}/run/9/params, {tmp_path}/run/9/state")


def test_two_checkpoints_in_one_directory(tmp_path: Path) -> None:
    ocp.PyTreeCheckpointer().save(tmp_path / "model", TREE)
    arrays = {PATH: TREE["params"]["head"]["kernel"]}
    safetensors.numpy.save_file(arrays, tmp_path / "model" / "a.safetensors")
    assert refusal(tmp_path / "model").endswith("model/a.safetensors in it")
    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        (tmp_path / "files" / f"{name}.safetensors.index.json").write_text("{}")
    assert "; leave one of " in refusal(tmp_path / "files")


def test_an_orbax_tree_without_its_description(tmp_path: Path) -> None:
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "model", TREE)
    (tmp_path / "model" / "_METADATA").unlink()
    assert "no _METADATA says what its arrays are: restore it with Orbax" in refusal(
        tmp_path / "model"
    )
