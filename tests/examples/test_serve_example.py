"""The serving example at small sizes: what it prints, and what it exits at."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "examples" / "serve_gpt2.py"
SIZES = {"layers": 2, "width": 24, "heads": 3, "vocabulary": 211, "context": 32}
SMALL = {**SIZES, "batch": 2, "prompt": 5, "tokens": 12, "rounds": 2}
ARGUMENTS = [f"--{name}={value}" for name, value in SMALL.items()]
N_NORMS = 2 * SIZES["layers"] + 1


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    for requirement in ("flax", "safetensors"):
        pytest.importorskip(requirement)
    spec = importlib.util.spec_from_file_location("serve_gpt2", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with jax.enable_x64(False):  # as the example runs for its reader
        yield module
    del sys.modules[spec.name]


def test_serves(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(ARGUMENTS)
    printed = capsys.readouterr().out
    for name in ("prefill", "decode"):
        # 2L+1; the table is tied to the logits, so what is looked up is centered once, explicitly
        assert f"{name}: {N_NORMS} of {N_NORMS} LayerNorms fold, 1 explicit centering\n" in printed
    edited = 4 * SIZES["layers"]  # kernel and bias of what writes into the stream, twice a block
    assert f"{edited} parameters centered" in printed
    assert "plan.is_centered: True; leaves that plan.center edits a second time: 0\n" in printed
    for what in ("folded", "original on the centered weights"):
        assert f"{what}: 24 of 24 tokens are those of the original on the original" in printed
    (varied,) = re.findall(r"; (\d+) different tokens\)$", printed, re.M)
    assert int(varied) > 1, "generates one token only"
    assert "the tree that was served has the bits of the file: True\n" in printed
    assert len(re.findall(r"^(?:original|folded): .* tokens/s$", printed, re.M)) == 2
    assert [row for row, *_ in memory(printed)] == [*example.WAYS.values()]


def memory(printed: str) -> list[tuple[str, str, str, str]]:
    rows = printed.split("memory, MB:")[1].splitlines()[1:]
    return [re.match(r"  (\S.*?)  +(\S+) +(\S+) +(\S+)$", row).groups() for row in rows]  # type: ignore


def test_memory(example: ModuleType, tmp_path: Path) -> None:
    """A fold in memory holds what it edits twice; donated, or edited on disk, it does not."""
    model = example.GPT2(**SIZES)
    shapes, inputs = example.shapes_of(model, 5, 1)
    plan = example.jax_lnfold.plan_fold(example.functions_of(model), shapes, inputs)
    original, centered = (tmp_path / f"{name}.safetensors" for name in ("original", "centered"))
    example.write_weights(original, shapes, seed=0)
    (tmp_path / "plan.json").write_text(plan.to_json())
    example.run("-m", "jax_lnfold", "center", tmp_path / "plan.json", original, centered)
    arrays = dict(zip(example.leaf_names(shapes), jax.tree.leaves(shapes), strict=True))
    whole = sum(4 * x.size for x in arrays.values())
    edited = sum(4 * arrays[edit.key_path.replace("/", ".")].size for edit in plan.edits)
    before = example.live_bytes()
    for way, twice in {"original": edited, "donated": 0, "centered": 0}.items():
        found = example.memory_of(way, tmp_path, model, 5, 1)
        assert found["together"] - before == whole + twice
        assert found["alone"] - before == whole
        assert found["peak"] > whole


@pytest.mark.parametrize("part", ["all", "one leaf"])
def test_exits_unless_the_checkpoint_is_centered(
    example: ModuleType, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    center = example.run

    def spoilt(*command: Any) -> str:
        source, dest = map(Path, command[-2:])
        if part == "all":
            shutil.copy(source, dest)
            return "copied"
        said = center(*command)
        stored = example.safetensors.numpy.load_file(dest)
        given = example.safetensors.numpy.load_file(source)
        name = "params.block_1.down.bias"
        example.safetensors.numpy.save_file(stored | {name: given[name]}, dest)
        return said

    monkeypatch.setattr(example, "run", spoilt)
    with pytest.raises(SystemExit, match="the checkpoint is not what the plan says"):
        example.main(ARGUMENTS)


def test_exits_when_equal_tokens_are_luck(example: ModuleType) -> None:
    logits = np.array([[0.0, 3.0, 2.5], [7.0, 1.0, 6.0]], np.float32)
    differ = logits + np.float32([[0.1, 0.0, 0.0], [0.0, 0.0, -0.125]])
    assert example.smallest_lead(logits, differ) == (0.5, 0.125)
    differ[0, 2] += 0.25  # the best is the same still, but might not be
    assert (differ.argmax(-1) == logits.argmax(-1)).all()
    with pytest.raises(SystemExit, match="the best logit leads by 5"):
        example.smallest_lead(logits, differ)
    differ[0, 2] = np.nan
    with pytest.raises(SystemExit, match="the best logit leads by 5"):
        example.smallest_lead(logits, differ)


def test_exits_when_a_bit_differs(example: ModuleType, tmp_path: Path) -> None:
    shapes, _ = example.shapes_of(example.GPT2(**SIZES), 5, 1)
    example.write_weights(path := tmp_path / "original.safetensors", shapes, seed=0)
    params = example.load(path, shapes)
    example.check_file(path, params)
    params["params"]["last"]["bias"] = np.nextafter(params["params"]["last"]["bias"], np.float32(9))
    with pytest.raises(SystemExit, match="not those of the file"):
        example.check_file(path, params)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [((1.1, 1.2), "faster in every"), ((0.9, 0.8), "slower in every"), ((0.9, 1.2), "nothing")],
)
def test_says_what_was_gained(
    example: ModuleType, ratios: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example.print_verdict(ratios)
    assert said in capsys.readouterr().out
