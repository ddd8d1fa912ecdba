"""Runs the code of the pages: ``python -m pytest --dist loadfile docs``.

A ``python`` block runs after those above it on its page; one that begins with ``# name.py`` is
written to that file instead. An ``output`` block is what the block before it prints, and a
``console`` block is a shell session. Each page has a folder of its own, and jax as users have it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import pad
from sybil.parsers.myst import CodeBlockParser

FRAMEWORKS = {"equinox", "flax", "haiku", "keras", "optax", "safetensors", "transformers"}
COST = re.compile(r"\d+ of \d+ reductions and [^()]*? analysis\s+for\s+\w+\.")
ROUNDING = re.compile(r"\d(\.\d+)?e-\d+")


def same(wanted: str, got: str) -> None:
    """Fail unless the text is that of the page, in which ``...`` stands for anything.

    Costs differ between versions of XLA, errors of rounding between machines.
    """
    wanted, got = (ROUNDING.sub("1e-7", COST.sub("", text)).strip() for text in (wanted, got))
    wanted, got = f"{wanted}\n", f"{got}\n"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    checker = doctest.OutputChecker()
    if not checker.check_output(wanted, got, flags):
        example = doctest.Example("", wanted)
        pytest.fail(checker.output_difference(example, got, flags), pytrace=False)


def run_python(example: Example) -> None:
    """Run a block, and keep what it prints."""
    source, namespace = str(example.parsed), example.namespace
    if file := re.match(r"# (\w+\.py)\n", source):
        Path(file[1]).write_text(source)
        return
    if "import " not in source:
        skip_if_missing(namespace)
    code = compile(pad(source, example.line), example.path, "exec", dont_inherit=True)
    namespace["_printed"], namespace["_missing"] = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(namespace["_printed"]):
            exec(code, namespace)
    except ImportError as error:
        namespace["_missing"] = (error.name or "").partition(".")[0]
        if namespace["_missing"] not in FRAMEWORKS:
            raise
        skip_if_missing(namespace)


def skip_if_missing(namespace: dict[str, Any]) -> None:
    """Skip what belongs to a block that imports a framework which is not there."""
    if missing := namespace.get("_missing"):
        words = f"{missing} is not installed, or its version has no such name"
        if os.environ.get("EVERY_FRAMEWORK"):
            pytest.fail(words, pytrace=False)
        pytest.skip(words)


def run_console(example: Example) -> None:
    """Run the lines that begin with ``$``, and compare what is written with the lines below."""
    wanted = [line for line in example.parsed.splitlines() if not line.startswith("$ ")]
    commands = [line[2:] for line in example.parsed.splitlines() if line.startswith("$ ")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        "\n".join(["set -e", *commands]),
        shell=True,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    same("\n".join(wanted), done.stdout)
    assert done.returncode == 0, f"exit code {done.returncode}"


def compare_output(example: Example) -> None:
    """Compare with what the last block has printed."""
    skip_if_missing(example.namespace)
    same(str(example.parsed), example.namespace["_printed"].getvalue())


def setup(namespace: dict[str, Any]) -> None:
    """A folder, and jax as users have it."""
    namespace["_before"] = os.getcwd(), jax.config.jax_enable_x64
    namespace["_folder"] = folder = tempfile.TemporaryDirectory()
    os.chdir(folder.name)
    os.environ["COLUMNS"] = "80"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    jax.config.update("jax_enable_x64", False)


def teardown(namespace: dict[str, Any]) -> None:
    """As it was before."""
    folder, x64 = namespace["_before"]
    os.chdir(folder)
    namespace["_folder"].cleanup()
    jax.config.update("jax_enable_x64", x64)


pytest_collect_file = Sybil(
    parsers=[
        CodeBlockParser("python", run_python),
        CodeBlockParser("output", compare_output),
        CodeBlockParser("console", run_console),
    ],
    patterns=["*.md"],
    setup=setup,
    teardown=teardown,
).pytest()
