"""The benchmark harness: taking turns, resuming, ratios, and what it reads from the compiler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from contracts import count_equations, relative_difference

from bench.models import MODELS, NORMS
from bench.programs import BOUND, FOLDED, ORIGINAL, random_arrays, variants
from bench.store import Store
from bench.tables import cases, ratios, share_removed, table
from bench.timing import interleaved, spread
from bench.tpu import read


def test_programs_take_turns() -> None:
    calls: list[str] = []
    ticks: list[int] = []
    programs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(programs, 4, lambda: ticks.append(len(calls)))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert ticks == [6, 9, 12, 15]
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys("abc", 4)
    assert all((found > 0).all() for found in seconds.values())


def test_a_run_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    store = Store(path, ("model", "variant"))
    assert not store.has("vit", "folded")
    store.add(("vit", "folded"), cycles=7)
    again = Store(path, ("model", "variant"))
    assert again.has("vit", "folded")
    assert not again.has("vit", "original")
    assert again.rows == [{"model": "vit", "variant": "folded", "cycles": 7}]
    data = json.loads(path.read_text())
    assert data["machine"]["cores"] >= 1
    data["versions"]["jax"] = "0.0"
    path.write_text(json.dumps(data))
    assert Store(path, ("model", "variant")).rows == [], "another version's figures"


def row(variant: str, **figures: Any) -> dict[str, Any]:
    case = {"model": "vit", "batch": 4, "spelling": "one_pass", "dtype": "float32"}
    return {**case, "variant": variant, **figures}


def test_ratios_are_taken_within_a_round() -> None:
    rows = [
        row(ORIGINAL, seconds=[1.0, 2.0, 4.0]),
        row(FOLDED, seconds=[0.9, 1.8, 3.6]),
        row(BOUND, seconds=[0.8, 1.6, 3.2]),
    ]
    (found,) = cases(rows).values()
    np.testing.assert_allclose(ratios(found[FOLDED], found[ORIGINAL]), 0.9)
    assert spread(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == (3.0, 2.0, 4.0)
    assert share_removed(0.9, 0.8) == "50%"
    assert share_removed(1.1, 0.8) == "-50%", "a loss is a loss"
    assert share_removed(0.9, 1.0) == "-"
    cells = [list(column.cells) for column in table(rows).columns]
    assert cells == [
        ["vit, batch 4"],
        ["one_pass float32"],
        ["0.900 (0.900-0.900)"],
        ["0.800 (0.800-0.800)"],
        ["50%"],
    ]
    assert table(rows[:2]).row_count == 0, "without the bound there is nothing to say"


def test_estimates_of_the_tpu_compiler() -> None:
    text = (
        '%a = f32[8] fusion(%p), backend_config={"estimated_cycles":"120","x":1}\n'
        '%b = f32[8] fusion(%a), backend_config={"estimated_cycles":30}\n'
        "%c = f32[8] all-reduce(%b), replica_groups={}\n"
    )
    compiled = SimpleNamespace(
        as_text=lambda: text, cost_analysis=lambda: {"bytes accessed": 64.0, "flops": 8.0}
    )
    found = read(compiled)
    assert (found.cycles, found.fusions, found.collectives) == (150, 2, 1)
    assert (found.bytes, found.flops) == (64.0, 8.0)


INSERTED = {"gpt2": 1, "whisper_base_encoder": 1}
LARGE = {"gpt2_xl", "vit_b", "vit_l"}  # the same as others, but larger


@pytest.mark.parametrize("name", sorted({*MODELS} - LARGE))
def test_models_fold_whole(name: str) -> None:
    """From shapes alone, at the published sizes; the bound has no reductions of a norm."""
    original, folded, bound = variants(name, 2, "one_pass", "float32")
    depth, qk = MODELS[name].config.depth, MODELS[name].config.qk_norm
    norms = (4 if qk else 2) * depth + 1
    reductions = [
        count_equations("reduce_sum", p.apply, p.params, p.x) for p in (original, folded, bound)
    ]
    assert reductions[0] - reductions[1] == norms - INSERTED.get(name, 0)
    assert reductions[0] - reductions[2] == 2 * norms
    assert folded.plan is not None
    assert bound.plan is None


def test_variants_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(MODELS["clip_l_text"], sample=(9,))
    small = replace(small, config=replace(small.config, depth=2, width=24, heads=3))
    monkeypatch.setitem(MODELS, "clip_l_text", small)
    original, folded, bound = variants("clip_l_text", 2, "two_pass", "float64")
    params, x = random_arrays(original.params), random_arrays(original.x)
    assert folded.plan is not None
    want = original.apply(params, x)
    assert relative_difference(folded.apply(folded.plan.center(params), x), want) < 1e-5
    assert relative_difference(bound.apply(random_arrays(bound.params), x), want) > 0.1
    assert {*NORMS} == {"one_pass", "two_pass", "none"}
