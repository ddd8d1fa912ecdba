"""Two processes, four devices each, hold one model: no process ever sees the whole of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_lnfold.cli.commands import main

HELPER = Path(__file__).with_name("two_processes.py")


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def restore(path: Path) -> Any:
    """A checkpoint as NumPy arrays: the devices that wrote it are not there."""
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(path, restore_args=as_numpy)


def test_two_processes(tmp_path: Path) -> None:
    """What they print says which promise is broken; their checkpoint is centered by one process."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, str(HELPER), address, str(number), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()  # one waits for the other, if that has failed
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        assert output.endswith("all checked\n")

    paths = [str(tmp_path / name) for name in ("plan.json", "source", "dest")]
    assert main(["center", *paths]) == 0
    got = jax.tree.leaves(restore(tmp_path / "dest"))
    for number in range(2):
        with np.load(tmp_path / f"centered{number}.npz") as want:
            assert len(got) == len(want.files)
            for x, name in zip(got, want.files, strict=True):
                np.testing.assert_allclose(x, want[name], rtol=0, atol=1e-14)
