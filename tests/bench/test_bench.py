"""The benchmark harness: what is run, taking turns, resuming, ratios, and what compilers say."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_lnfold
from bench import card, gpu, pallas_norm, sharded
from bench.__main__ import RESULTS, main, missing
from bench.cases import AHEAD_OF_TIME_GPU, CPU, GPU, POST_LN, TPU, Case, pick, sweep
from bench.models import GPT, NORMS, Config, Decoder, Swin, WindowBlock
from bench.plots import draw
from bench.programs import (
    BOUND,
    FOLDED,
    FOLDS,
    FORWARD,
    LEFT_OUT,
    OPTIMIZED,
    ORIGINAL,
    SharedArrays,
    random_arrays,
    variants,
)
from bench.registry import MODELS
from bench.store import Store
from bench.tables import cases, complete, overall, ratios, share_removed, table
from bench.timing import interleaved, repeated, spread
from bench.tpu import collectives, read
from tests.helpers.contracts import count_equations, relative_difference

AFFINE = "folded, affine"


def test_programs_take_turns() -> None:
    calls: list[str] = []
    ticks: list[int] = []
    programs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(programs, 4, lambda: ticks.append(len(calls)))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert ticks == [6, 9, 12, 15]
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys("abc", 4)
    assert all((found > 0).all() for found in seconds.values())


def test_short_programs_are_repeated() -> None:
    calls: list[int] = []
    run, number = repeated(lambda: calls.append(0), at_least=1e-3)
    before = len(calls)
    run()
    assert len(calls) - before == number > 1
    assert repeated(lambda: None, at_least=0.0)[1] == 1


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
    store.add(("clip", "folded"), cycles=9)
    store.drop("vit")
    assert store.rows == [{"model": "clip", "variant": "folded", "cycles": 9}]
    data["versions"]["jax"] = "0.0"
    path.write_text(json.dumps(data))
    assert Store(path, ("model", "variant")).rows == [], "another version's figures"


def row(variant: str, model: str = "vit", batch: int = 4, **figures: Any) -> dict[str, Any]:
    case = {"model": model, "batch": batch, "length": 8, "spelling": "one_pass"}
    return {**case, "dtype": "float32", "variant": variant, **figures}


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
    assert share_removed(0.7, 0.8) == "150%", "better than without norms"
    assert share_removed(0.9, 1.0) == "-"
    shown = [list(column.cells) for column in table(rows).columns]
    others = [["", ""] for variant in FOLDS if variant != FOLDED]
    assert shown == [
        ["vit", "all 1 models"],
        ["4", ""],
        ["8", ""],
        ["one_pass float32", "one_pass float32"],
        ["0.900 (0.900-0.900) 50%", "0.900 50% (50% to 50%)"],
        *others,
        ["0.800 (0.800-0.800)", "0.800"],
    ]
    assert table(rows[:2]).row_count == 0, "without the bound there is nothing to say"
    unfinished = [row(ORIGINAL, "gpt", seconds=[2.0]), row(BOUND, "gpt", seconds=[1.0])]
    names = [*table(rows + unfinished).columns[0].cells]
    assert names == ["vit", "gpt", "all 1 models"], "other models than the fold's say nothing"


def test_models_count_once_and_by_what_their_norms_cost() -> None:
    rows = [
        *(row(v, cycles=c) for v, c in {ORIGINAL: 100, FOLDED: 81, BOUND: 64}.items()),
        *(row(v, batch=9, cycles=c) for v, c in {ORIGINAL: 200, FOLDED: 200, BOUND: 200}.items()),
        *(row(v, "gpt", cycles=c) for v, c in {ORIGINAL: 10, FOLDED: 10, BOUND: 10.001}.items()),
        *(row(v, "none", cycles=c) for v, c in {ORIGINAL: 10, BOUND: 5}.items()),
    ]
    folded, bound = overall(cases(rows), FOLDED)
    assert folded == pytest.approx(0.81**0.25)  # the two sizes of vit are one model of two
    assert bound == pytest.approx(0.64**0.25 * 1.0001**0.5)
    assert np.isnan(overall(cases(rows), AFFINE)[0]), "nothing is stored"
    assert ratios(rows[1], rows[0] | {"bytes": 3}, "cycles") == 0.81


def test_what_is_given_replaces_what_the_table_has() -> None:
    small = sweep("vit_s", (1, 4), spellings=("one_pass",)) + sweep("gpt2", (2,), (64, 128))
    assert pick(small) == [*small]
    assert pick(small, model=["vit_s"], batch=[7]) == [
        Case("vit_s", 7, 224, "one_pass", "float32")
    ], "both sizes become one"
    assert [case.key[2:4] for case in pick(small, model=["gpt2"], length=[32])] == [
        (32, "one_pass"),
        (32, "two_pass"),
    ]
    (other,) = pick(small, model=["vit_l"], spelling=["two_pass"], dtype=["bfloat16"], rounds=[3])
    assert (other.key, other.rounds) == (("vit_l", 1, 224, "two_pass", "bfloat16"), 3)
    for cases_ in (CPU, GPU, AHEAD_OF_TIME_GPU, *TPU.values()):
        assert len({*cases_}) == len(cases_)
        assert {case.model for case in cases_} <= {*MODELS}


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
    assert (found.bytes, found.flops, found.collective_bytes) == (64.0, 8.0, 32)


def costs(**models: float) -> str:
    found = (f'{{"exec_time_us":{time},"name":"{name}"}}' for name, time in models.items())
    return f'backend_config={{"reification_cost":[{",".join(found)}]}}'


GPU_PROGRAM = f"""
%fused (p: f32[8]) -> f32[8] {{
  ROOT %inner = f32[8]{{0}} fusion(%p), calls=%other
}}

ENTRY %main (x: f32[8,4]) -> f32[8] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  %a = (f32[8]{{0}}, bf16[8]{{0}}) fusion(%x), {costs(**{"": 9, "indexing-cost-model": 1.5})}
  %first = f32[8]{{0}} get-tuple-element(%a), index=0
  %y = (f32[8]{{0}}, s8[1024]{{0}}) custom-call(%first), {costs(sol=7)}
  %y.0 = f32[8]{{0}} get-tuple-element(%y), index=0
  ROOT %r = f32[8]{{0}} fusion(%y.0, %first), calls=%fused, {costs(**{"": 2e-1, "sol": 1})}
}}
"""


def test_estimates_of_the_gpu_compiler() -> None:
    """Kernels of the program itself, products without their workspace, and the better model."""
    found = gpu.read(SimpleNamespace(as_text=lambda: GPU_PROGRAM))
    assert (found.kernels, found.fusions, found.products) == (3, 2, 1)
    assert found.microseconds == pytest.approx(1.5 + 0.2)
    assert found.bytes == (128 + 32 + 16) + (32 + 32) + (32 + 32 + 32)
    loop = GPU_PROGRAM.replace("get-tuple-element(%y)", "while(%y)")
    with pytest.raises(ValueError, match="loop"):
        gpu.read(SimpleNamespace(as_text=lambda: loop))
    for kind, capability in ("h100", "major: 9"), ("a100", "major: 8"):
        assert capability in gpu.description(kind)


def test_a_card_is_measured_until_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 0.0, 3.0, 3.0, 7.0, 7.0])  # the second took 4; another would end at 11
    assert [*card.fitting("abcd", 10, lambda: next(times))] == ["a", "b"]
    shallow(monkeypatch, "clip_l_text", depth=1, width=24, heads=3)
    monkeypatch.setattr(card, "CASES", (Case("clip_l_text", 1, 9, "one_pass", "float32", 2),))
    path = tmp_path / "rows.json"
    card.main(["--output", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert {(row["graphs"], row["variant"]) for row in rows} == {*product(card.GRAPHS, FORWARD)}
    assert all(len(row["seconds"]) == 2 for row in rows)
    assert capsys.readouterr().out.count("clip_l_text") == len(card.GRAPHS)
    card.main(["--output", str(path)])
    assert json.loads(path.read_text())["rows"] == rows, "nothing is timed again"


@pytest.mark.parametrize(
    ("line", "found"),
    {
        "%r = f32[64,2]{1,0:T(8,128)S(1)} all-reduce(%a), to_apply=%add": ("all-reduce", 512),
        "%r = (f32[64]{0}, bf16[3,5]{1,0}) all-reduce(%a, %b)": ("all-reduce", 286),
        "%r = (f32[64]{0}, f32[64]{0}) all-reduce-start(%a, %b)": ("all-reduce", 512),
        "%r = (bf16[8,4]{1,0}, bf16[8,16]{1,0}) all-gather-start(%a)": ("all-gather", 256),
        "%r = ((s8[4], f32[4]), (s8[8], f32[8])) all-gather-start(%a, %b)": ("all-gather", 40),
        "ROOT %r = pred[16] reduce-scatter(%a), dimensions={0}": ("reduce-scatter", 16),
        "%r = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%a)": (
            "collective-permute",
            16,
        ),
        "%r = f32[] all-reduce(%a)": ("all-reduce", 4),
        "%r = f32[8] all-reduce-done(%a)": None,
        "%all-reduce.1 = f32[8] fusion(%all-reduce.2), calls=%f": None,
    }.items(),
)
def test_collectives_and_their_bytes(line: str, found: tuple[str, int] | None) -> None:
    assert collectives(f"  {line}\n") == ([found] if found else [])


@pytest.mark.parametrize("style", ["jit", "shard_map"])
def test_sharded_layouts_compute_the_same(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"WIDTH": 32, "HEADS": 4, "VOCABULARY": 11}.items():
        monkeypatch.setattr(sharded, name, size)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    alone = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("x", "y"))
    shapes = sharded.parameters(2, mesh, with_norms=True)
    params = jax.tree.map(lambda leaf: 30 * leaf.astype(float), random_arrays(shapes))
    ids = jnp.array([[3, 1, 4], [1, 5, 9]])

    def run(where: Mesh, style: str) -> Any:
        function = partial(sharded.forward, NORMS["two_pass"], sharded.layout(style, where))
        if style == "shard_map":
            specs = jax.tree.map(lambda leaf: leaf.sharding.spec, shapes)
            function = jax.shard_map(
                function, mesh=where, in_specs=(specs, P()), out_specs=sharded.STREAM
            )
        placed = jax.tree.map(
            lambda a, s: jax.device_put(a, NamedSharding(where, s.sharding.spec)), params, shapes
        )
        return jax.device_get(jax.jit(function)(placed, ids))

    assert relative_difference(run(mesh, style), run(alone, "jit")) < 1e-4


def sums_of(*programs: Any) -> list[int]:
    return [count_equations("reduce_sum", p.apply, p.params, p.x) for p in programs]


def shallow(monkeypatch: pytest.MonkeyPatch, name: str, depth: int = 2, **sizes: Any) -> Config:
    """Give the models of the benchmark fewer layers, and other sizes."""
    entry = MODELS[name]
    make = partial(Swin, depths=(depth, 1)) if name == "swin_t" else entry.make
    config = replace(entry.config, depth=depth, **sizes)
    monkeypatch.setitem(MODELS, name, replace(entry, make=make, config=config))
    return config


INSERTED = dict.fromkeys("gpt2 gpt2_xl whisper_base_encoder gpt2_decode gpt2_xl_decode".split(), 1)


TRANSFORMERS = [
    n for n, e in MODELS.items() if isinstance(e.config, Config) and n not in ("swin_t", *POST_LN)
]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_fold_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes alone, at the published widths; the bound has no reductions of a norm."""
    depth, qk = 2, shallow(monkeypatch, name).qk_norm
    original, folded, affine, *_, bound = variants(
        name, 2, "one_pass", "bfloat16", stored="bfloat16", chosen=FORWARD
    )
    norms = (4 if qk else 2) * depth + 1
    programs = original, folded, affine, bound
    sums = sums_of(*programs)
    assert sums[0] - sums[1] == sums[0] - sums[2] == norms - INSERTED.get(name, 0)
    assert sums[0] - sums[3] == 2 * norms
    added = [count_equations("add", p.apply, p.params, p.x) for p in programs]
    assert added[2] <= added[1] - 2 * depth, "shifts are gone"
    assert original.plan is bound.plan is None
    assert {leaf.dtype for leaf in jax.tree.leaves(folded.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize("name", POST_LN)
def test_post_ln_is_respelled(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All norms but that of BERT's embeddings, which folds, and only where the spelling differs.

    What `optimize` is depends on the target.
    """
    shallow(monkeypatch, name)
    for spelling in ("one_pass", "two_pass"):
        programs = variants(
            name, 2, spelling, "bfloat16", stored="bfloat16", target=target,
            length=16, chosen=(AFFINE, "folded, affine, respelled", OPTIMIZED),
        )  # fmt: skip
        texts = [str(jax.make_jaxpr(p.apply)(p.params, p.x)) for p in programs]
        other = (target, spelling) in (("tpu", "two_pass"), ("gpu", "one_pass"))
        calls = [text.count("name=sum_of_squares_about_mean") for text in texts]
        assert calls == [0, *[4 if other else 0] * 2]


def test_bert_without_its_means(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow(monkeypatch, "bert_base", width=24, heads=3)
    original, left_out, bound = variants(
        "bert_base", 2, "two_pass", "bfloat16", length=16, chosen=(ORIGINAL, LEFT_OUT, BOUND)
    )
    sums = sums_of(original, left_out, bound)
    assert (sums[0] - sums[1], sums[0] - sums[2]) == (5, 10)


SMALL = {"policy": 5, "policy_narrow": 5, "policy_wide": 5, "mixer": 1, "graph_net": 5}
SMALL |= {"recommender": 4}
"""LayerNorms that fold: what mixes positions of a mixer has a mean that no parameter takes away."""


@pytest.mark.parametrize("name", SMALL)
def test_small_models_are_what_a_cpu_gains_by(name: str) -> None:
    """What folds there is taken up, and deferred where nothing turns it round first."""
    original, bound = variants(name, 1, "two_pass", "float32", chosen=("original", "norms removed"))
    report = jax_lnfold.analyze(original.apply, original.params, original.x, optimize="cpu")
    assert report.n_folded == SMALL[name]
    assert len(report.affine) == 5 - (name == "recommender")
    assert len(report.deferred) == (0 if name == "mixer" else SMALL[name])
    assert count_equations("rsqrt", bound.apply, bound.params, bound.x) == 0


@pytest.mark.parametrize("name", ["vit_s", "gpt2", "vit_b_qk_norm"])
def test_large_models_are_left_alone_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow(monkeypatch, name, depth=1)
    (original,) = variants(name, 1, "one_pass", "float32", chosen=("original",))
    report = jax_lnfold.analyze(original.apply, original.params, original.x, optimize="cpu")
    assert report.n_folded == len(report.norms)
    assert (report.affine, report.queries, report.deferred) == ((), (), ())


def test_the_kernel_of_pallas_is_a_layer_norm_and_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values in interpret mode; in a model, from shapes alone, the twin takes its place."""
    x, g = jax.ShapeDtypeStruct((3, 5, 24), jnp.float32), jax.ShapeDtypeStruct((24,), jnp.float32)
    with pltpu.force_tpu_interpret_mode():
        assert jax_lnfold.check_layer_norm(pallas_norm.layer_norm, x, g, g).twin < 1e-5
        x, g, b = random_arrays((x, g, g))
        want = nn.LayerNorm().apply({"params": {"scale": g, "bias": b}}, x)
        found = pallas_norm.PallasNorm().apply({"params": {"scale": g, "bias": b}}, x)
        assert relative_difference(found, want) < 1e-5
    shallow(monkeypatch, "vit_b")
    programs = variants("vit_b", 2, "pallas", "bfloat16", stored="bfloat16")
    kernels = [str(jax.make_jaxpr(p.apply)(p.params, p.x)) for p in programs]
    assert [text.count("twin=None") for text in kernels] == [0, 5, 0]
    assert ["pallas_call" in text for text in kernels] == [True, True, False]


def test_swin_folds_its_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow(monkeypatch, "swin_t")
    original, folded, bound = variants("swin_t", 1, "one_pass", "float32", length=112)
    sums = sums_of(original, folded, bound)
    # Patch norm, two of the last block, and the final norm, of 9.
    assert (sums[0] - sums[1], sums[0] - sums[2]) == (4, 18)


SIZES = {
    "clip_l_text": ({"width": 24, "heads": 3}, 9),
    "gpt2_decode": ({"width": 24, "heads": 3}, 9),
    "swin_t": ({"width": 8, "heads": 2}, 56),
}


@pytest.mark.parametrize("name", SIZES)
def test_variants_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, length = SIZES[name]
    shallow(monkeypatch, name, depth=1, **sizes)
    options = {"length": length, "stored": "float64"}
    original, *folds, bound = variants(name, 2, "one_pass", "float64", chosen=FORWARD, **options)
    params, x = random_arrays(original.params), random_arrays(original.x)
    want = jax.jit(original.apply)(params, x)
    for fold in folds:
        assert fold.plan is not None
        edited = fold.plan.center(params)
        assert jax.tree.structure(fold.apply(edited, x)) == jax.tree.structure(want)
        assert relative_difference(jax.jit(fold.apply)(edited, x), want) < 1e-5, fold.variant
    assert relative_difference(jax.jit(bound.apply)(random_arrays(bound.params), x), want) > 0.1
    assert {*NORMS} == {"one_pass", "two_pass", "pallas", "none"}


@pytest.mark.parametrize("name", ["video_encoder_normed", "video_first_token_phi"])
def test_variants_of_a_video_model_compute_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = MODELS[name]
    config = replace(entry.config, name="tiny-phi")
    monkeypatch.setitem(MODELS, name, replace(entry, config=config))
    options = {"length": 30, "stored": "float64", "chosen": (ORIGINAL, FOLDED, AFFINE, BOUND)}
    original, folded, affine, bound = variants(name, 5, "two_pass", "float64", **options)
    params, x = random_arrays(original.params), random_arrays(original.x)
    x = {k: v % 256 if k != "pixels" else v for k, v in x.items()}
    want = jax.jit(original.apply)(params, x)
    for fold in (folded, affine):
        assert fold.plan is not None
        assert relative_difference(jax.jit(fold.apply)(fold.plan.center(params), x), want) < 1e-5
    # Two of each block, the tower's own; media, latents and feed-forward for two lengths of groups.
    norms, folds, inserted = {
        "video_encoder_normed": (5 + 14, 5 + 14, 0),
        "video_first_token_phi": (4 + 14 + 3, 14 + 3, 1),
    }[name]
    sums = sums_of(original, folded, bound)
    assert sums[0] - sums[1] == folds - inserted
    assert sums[0] - sums[2] == 2 * norms
    one_pass = next(variants(name, 5, "one_pass", "float64", **options))
    assert relative_difference(jax.jit(one_pass.apply)(params, x), want) < 1e-5
    squares = [count_equations("square", p.apply, p.params, p.x) for p in (original, one_pass)]
    assert squares[0] != squares[1]


def test_decoding_continues_a_text() -> None:
    """Token by token, with the keys and values of those before, as all at once."""
    config = Config(2, 24, 3, causal=True, dtype=jnp.float64)
    ids = jnp.array([[3, 1, 4, 1], [9, 2, 6, 5]])
    whole = GPT(config, vocab=11, context=7)
    params = jax.jit(whole.init)(jax.random.key(0), ids)
    want = jax.jit(whole.apply)(params, ids)
    step = jax.jit(Decoder(config, vocab=11, context=7).apply)
    cache = [(jnp.full((2, 7, 3, 8), 9.0),) * 2] * 2  # what is behind the position is not read
    for i in range(ids.shape[1]):
        given = {"ids": ids[:, i : i + 1], "position": jnp.int32(i), "cache": cache}
        logits, new = step(params, given)
        np.testing.assert_allclose(logits[:, 0], want[:, i], rtol=1e-5, atol=1e-5)
        cache = [
            tuple(old.at[:, i].set(own[:, 0]) for old, own in zip(layer, added, strict=True))
            for layer, added in zip(cache, new, strict=True)
        ]


@pytest.mark.parametrize(("shift", "rows"), [(0, slice(0, 7)), (3, slice(0, 3))])
def test_windows_end_at_the_seam(shift: int, rows: slice) -> None:
    """A token in the corner reaches its window, and not what a shift has put next to it."""
    block = WindowBlock(Config(1, 8, 2, dtype=jnp.float64, size=14), shift=shift)
    x = random_arrays(jax.ShapeDtypeStruct((1, 14, 14, 8), jnp.float64))
    params = jax.jit(block.init)(jax.random.key(0), x)
    run = jax.jit(block.apply)
    moved = run(params, x.at[0, 0, 0].add(jnp.arange(8.0))) - run(params, x)
    reached = np.abs(moved[0]).max(axis=-1) > 1e-12
    expected = np.zeros((14, 14), bool)
    expected[rows, rows] = True
    np.testing.assert_array_equal(reached, expected)


def test_variants_share_their_arrays() -> None:
    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    arrays = SharedArrays()
    first = arrays.fill({"a": leaf(2, 3), "b": leaf(4)})
    second = arrays.fill({"a": leaf(2, 3), "b": leaf(5), "c": leaf(2, 3)})
    assert second["a"] is first["a"]
    assert second["b"].shape == (5,)
    assert not np.array_equal(second["c"], second["a"])


def test_a_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow(monkeypatch, "clip_l_text", depth=1, width=24, heads=3)
    path = tmp_path / "rows.json"
    command = "--models clip_l_text --batch 1 --length 9 --spellings one_pass --rounds 2".split()
    main([*command, "--output", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["variant"] for row in rows] == [*FORWARD]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert 3000 < path.with_suffix(".svg").stat().st_size < 100_000
    assert "clip_l_text" in capsys.readouterr().out
    main([*command, "--output", str(path)])
    assert json.loads(path.read_text())["rows"] == rows, "nothing is timed again"
    for added, known in (ORIGINAL, [ORIGINAL]), (BOUND, [ORIGINAL, BOUND]):
        main([*command, "--variants", added, "--output", str(tmp_path / "few.json")])
        few = json.loads((tmp_path / "few.json").read_text())["rows"]
        assert [row["variant"] for row in few] == known, "no row is lost"
    path.with_suffix(".svg").unlink()
    main(["--plot", "--output", str(path)])
    assert path.with_suffix(".svg").exists()
    main([*command, "--list"])
    assert capsys.readouterr().out.endswith("clip_l_text 1 9 one_pass float32\n")
    with pytest.raises(SystemExit):
        main(["--models", "vit_xs"])
    assert "unknown: vit_xs; models are vit_s" in capsys.readouterr().err


def test_missing_rows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("bench.__main__.no_libtpu", lambda kind: f"no libtpu for {kind}")
    wanted = len(CPU) * len(FORWARD)
    lines = missing()
    assert f"cpu.json: {wanted} of {wanted} rows are missing" in lines
    assert any(line.endswith("rows are missing, no libtpu for v6e") for line in lines)
    assert any("GPU" in line for line in lines)
    keys = dict(zip(("model", "batch", "length", "spelling", "dtype"), CPU[0].key, strict=True))
    stored = {"rows": [keys | {"variant": ORIGINAL}], "machine": {"platform": "gpu"}}
    (tmp_path / "cpu.json").write_text(json.dumps(stored))
    assert f"cpu.json: {wanted - 1} of {wanted} rows are missing" in missing()
    assert not any("GPU" in line for line in missing())


def test_figures_of_stored_results(tmp_path: Path) -> None:
    """All cases are in the figure, and a file without a complete one has none."""
    for path in sorted(RESULTS.glob("tpu_*.json")):
        rows = json.loads(path.read_text())["rows"]
        drawn = draw(rows, tmp_path / f"{path.stem}.svg")
        assert drawn is not None
        text = drawn.read_text()
        assert len(text) < 100_000
        assert all(case[0] in text for case in complete(rows))
    assert draw([row(ORIGINAL, cycles=1)], tmp_path / "none.svg") is None
