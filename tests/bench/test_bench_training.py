"""The training experiments: every variant traces, runs are kept, tables say what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.training import cli, measures, report  # noqa: E402
from bench.training.costs import median  # noqa: E402
from bench.training.partial_tasks import PARTIAL  # noqa: E402
from bench.training.results import versions  # noqa: E402
from bench.training.run import FOLDED, VARIANTS, program  # noqa: E402
from bench.training.tasks import TASKS  # noqa: E402

FOLDED_NORMS = {"images": 3, "language": 3, "translation": 7, "text": 3}  # of one block
FIELDS = """task variant dtype seed final diverged drift seconds_per_step seconds train_loss
    eval""".split()
ALL = list(VARIANTS)


def run(out: Path, *options: str) -> int:
    return cli.main(["--tiny", "--out", str(out), *options])


@pytest.mark.parametrize("name", TASKS)
def test_every_variant_can_be_trained(name: str) -> None:
    """Traced, not compiled: that would take minutes."""
    task, sizes = TASKS[name], {}
    data = task.load()
    settings = task.settings.tiny()
    with jax.enable_x64(False):
        arrays = jax.eval_shape(lambda: data.train)
        for variant in VARIANTS:
            p = program(task, settings, data, variant)
            params = p.shapes
            sizes[variant] = jax.tree.leaves(params)
            key = jax.eval_shape(jax.random.key, 0)
            drawn = [
                jax.ShapeDtypeStruct(shape, np.int32)
                for shape in [(settings.log_every, settings.batch), (settings.log_every,)]
            ]
            state = jax.eval_shape(p.optimizer.init, params)
            carry, losses = jax.eval_shape(p.scan, arrays, key, (params, state), tuple(drawn))
            assert jax.tree.leaves(carry[0]) == sizes[variant]
            assert losses.shape == ()
            assert losses.dtype == np.float32
            expected = FOLDED_NORMS[name] if VARIANTS[variant] == "layernorm" else 0
            assert p.norms.layernorms == expected
            assert p.norms.folded == (expected if variant == FOLDED else 0)
            assert p.norms.inserted == 0
    n = {variant: len(leaves) for variant, leaves in sizes.items()}
    assert n["layernorm"] == n[FOLDED] == n["none"] + 2 * FOLDED_NORMS[name]
    assert n["rmsnorm"] == n["none"] + FOLDED_NORMS[name]


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_tasks(name: str) -> None:
    """All means are left out, most of them not exactly; held-out examples are not drawn for."""
    task = PARTIAL[name]
    data, settings = task.load(), task.settings.tiny()
    with jax.enable_x64(False):
        p = program(task, settings, data, FOLDED)
        assert p.norms.layernorms == p.norms.folded > 0
        drawn = [
            jax.ShapeDtypeStruct(shape, np.int32)
            for shape in [(settings.log_every, settings.batch), (settings.log_every,)]
        ]
        key = jax.eval_shape(jax.random.key, 0)
        carry = p.shapes, jax.eval_shape(p.optimizer.init, p.shapes)
        arrays = jax.eval_shape(lambda: data.train)
        carry, losses = jax.eval_shape(p.scan, arrays, key, carry, tuple(drawn))
        assert losses.shape == ()
        loss, metric = jax.eval_shape(p.evaluate, carry[0], data.test)
        assert loss.shape == metric.shape == ()


def test_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "results.json"
    options = "--tasks", "text", "--no-plots", "--rounds", "0", "--variants"
    assert run(out, *options, FOLDED, "--seeds", "1") == 0
    content = json.loads(out.read_text())
    assert content["versions"] == versions()
    assert content["hardware"].keys() == {"processor", "cores"}
    assert content["tasks"]["text"]["settings"]["steps"] == 2
    assert str(Path.home()) not in out.read_text()
    (found,) = content["runs"]
    assert list(found) == FIELDS
    assert (found["variant"], found["dtype"], found["seed"]) == (FOLDED, "float32", 0)
    assert len(found["train_loss"]) == 2
    assert found["eval"]["steps"] == [2]
    assert found["eval"]["metric"] == [found["final"]]
    assert 0 <= found["drift"] <= 1

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(cli, "program", refuse)
    before = out.read_bytes()
    capsys.readouterr()
    assert run(out, *options, FOLDED, "--seeds", "1") == 0
    assert out.read_bytes() == before
    assert capsys.readouterr().out == f"wrote {out.with_name('README.md')}\n"
    with pytest.raises(SystemExit, match="runs of text with other settings"):
        cli.main(["--out", str(out), *options, "layernorm"])


class FakeTrainer:
    """Trains nothing, and is interrupted at the fifth run."""

    def __init__(self, made: Any, dtype: str) -> None:
        self.program, self.dtype = made, dtype

    def __call__(self, seed: int, tick: Any) -> dict[str, Any]:
        calls.append((self.program.variant, self.dtype, seed))
        if len(calls) == 5:
            raise KeyboardInterrupt
        tick(2)
        return synthetic_run([1.0], 1.0)


class FakeProgram:
    def __init__(self, task: Any, settings: Any, data: Any, variant: str) -> None:
        self.variant = variant


calls: list[tuple[str, str, int]] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cli, "program", FakeProgram)
    monkeypatch.setattr(cli, "Trainer", FakeTrainer)
    calls.clear()
    yield
    calls.clear()


@pytest.mark.usefixtures("fake")
def test_an_interrupt_keeps_finished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    options = "--tasks", "images", "--seeds", "3", "--no-plots", "--rounds", "0"
    assert run(out, *options) == 130
    assert "4 finished runs are kept" in capsys.readouterr().out
    assert [r["seed"] for r in json.loads(out.read_text())["runs"]] == [0, 1, 2, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"], "no parts are left"
    assert run(out, *options) == 0
    wanted = [(v, "float32", s) for v in ALL for s in range(3)]
    wanted += [("layernorm", "float64", 0), (FOLDED, "float64", 0)]
    assert calls[:4] + calls[5:] == wanted
    assert calls[4] == wanted[4], "only the interrupted one ran twice"


# --- report --------------------------------------------------------------------------------------


def synthetic_run(losses: list[float], final: float) -> dict[str, Any]:
    return {
        "final": final,
        "diverged": False,
        "drift": None,
        "seconds_per_step": 0.1,
        "seconds": 1.0,
        "train_loss": losses,
        "eval": {"steps": [10 * len(losses)], "loss": [losses[-1]], "metric": [final]},
    }


FINALS = {
    "layernorm": [90.0, 91.5, 94.0],
    FOLDED: [90.25, 91.0, 94.5],
    "rmsnorm": [80.0, 82.0, 81.0],
}


@pytest.fixture
def content() -> dict[str, Any]:
    runs = []
    for variant, finals in FINALS.items():
        for seed, final in enumerate(finals):
            off = 1.01 if variant == FOLDED and seed == 2 else 1.0
            named = {"task": "images", "variant": variant, "dtype": "float32", "seed": seed}
            runs.append(named | synthetic_run([2.0, 1.0 + seed, 0.5 * off], final))
    norms = {"layernorms": 3, "folded": 0, "inserted": 0}
    cost = {"flops": 100.0, "bytes": 200.0, "reductions": 7}
    cost |= {"seconds": 0.02, "time_ratio": [1.0, 1.0, 1.0]}
    less = cost | {"flops": 90.0, "bytes": 150.0, "time_ratio": [0.8, 0.9, 0.95]}
    more = cost | {"reductions": 9, "time_ratio": [0.9, 1.001, 1.1]}
    programs = {
        "layernorm": norms | {"step": cost, "gradient": cost},
        FOLDED: norms | {"folded": 3, "step": more, "gradient": less},
    }
    return {
        "versions": {"python": "3.x", "jax": "0.y"},
        "hardware": {"processor": "Abacus", "cores": 4},
        "tasks": {
            "images": {
                "title": "Images",
                "metric": "accuracy",
                "unit": "%",
                "higher_is_better": True,
                "settings": {"log_every": 10, "steps": 30},
            }
        },
        "programs": {"images": programs},
        "runs": runs,
    }


def test_numbers_of_the_tables(content: dict[str, Any]) -> None:
    text = report.markdown(content)
    base, folded, plain = (np.array(v) for v in FINALS.values())
    cells = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" for x in (base, folded)]
    cells.append(f"{plain.mean():.1f} ± {plain.std(ddof=1):.1f}")
    assert f"| images (accuracy, %, higher is better) | {' | '.join(cells)} |" in text
    deltas = [
        f"{x.mean():+.{n}f} ± {x.std(ddof=1):.{n}f}"
        for x, n in ((folded - base, 2), (plain - base, 1))
    ]
    assert f"| images | {' | '.join(deltas)} |" in text
    assert "| images | never, never, 30 (of 30) | 1.0e-02 | 0.5 | — | — |" in text
    assert "| 3 of 3 | 20.0 | 0.900 (0.800 to 0.950) | 0.9000 | 0.7500 | 7 |" in text
    assert "| 3 of 3 | 20.0 | 1.001 (0.900 to 1.100) | 1.0000 | 1.0000 | 9 |" in text
    assert f"`{FOLDED}` against `layernorm`: images: no clear difference." in text
    assert "`rmsnorm` against `layernorm`: images: worse." in text
    assert f"Training step of `{FOLDED}`: images: no clear difference (+0.1 %)." in text
    assert f"Loss and gradients of `{FOLDED}`: images: faster (-10.0 %)." in text
    found = measures.differences(content, "images", "rmsnorm")
    assert found.interval == pytest.approx(4.302653 * found.std / 3**0.5)


def test_the_interval_of_a_median_holds_it_19_times_of_20() -> None:
    drawn = np.random.default_rng(0).normal(size=(2000, 100))
    low, middle, high = np.array([median(x) for x in drawn]).T
    np.testing.assert_array_equal(middle, np.median(drawn, axis=1))
    assert 0.94 < np.mean((low <= 0) & (high >= 0)) < 0.98


def test_a_run_that_diverged_is_named(content: dict[str, Any]) -> None:
    content["runs"][-1] |= {"final": None, "diverged": True, "train_loss": [2.0, None, None]}
    assert "| 81.0 ± 1.4 (1 of 3 diverged) |" in report.markdown(content)
    assert measures.differences(content, "images", "rmsnorm").n == 2


def test_the_report_goes_between_the_markers(tmp_path: Path, content: dict[str, Any]) -> None:
    out, readme = tmp_path / "results.json", tmp_path / "README.md"
    readme.write_text(f"# Mine\n\n{report.BEGIN}\nstale words\n{report.END}\n\nrest\n")
    assert report.write(out, content, plots=False) == [readme]
    text = readme.read_text()
    assert text.startswith("# Mine\n\n")
    assert text.endswith("\n\nrest\n")
    assert "stale words" not in text
    report.write(out, content, plots=False)
    assert readme.read_text() == text
    readme.write_text(report.END)
    with pytest.raises(SystemExit, match="needs both markers"):
        report.write(out, content, plots=False)


def test_figures_are_small_and_the_same_again(tmp_path: Path, content: dict[str, Any]) -> None:
    from bench.training.plots import draw

    content["runs"][-1] |= {"final": None, "diverged": True, "train_loss": [2.0, None, None]}
    first = draw(content, "images", tmp_path / "a.svg").read_bytes()
    assert first == draw(content, "images", tmp_path / "b.svg").read_bytes()
    assert len(first) < 150_000


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[]", "no results file of format 1")],
)
def test_files_that_are_no_results(tmp_path: Path, text: str | None, words: str) -> None:
    out = tmp_path / "results.json"
    if text is not None:
        out.write_text(text)
    with pytest.raises(SystemExit, match=words):
        run(out, "--report-only")


@pytest.mark.parametrize("option", ["--tasks=digits", "--variants=batchnorm", "--seeds=0"])
def test_options_that_say_nothing(option: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "results.json", option)


@pytest.mark.parametrize(("where", "least"), [("", 4 * 4 * 5), ("partial", 6 * 4 * 3)])
def test_the_readme_says_what_was_measured(where: str, least: int) -> None:
    folder = ROOT / "bench" / "training" / where
    content = json.loads((folder / "results.json").read_text())
    text = (folder / "README.md").read_text()
    assert report.markdown(content) in text
    assert len(content["runs"]) >= least


@pytest.mark.slow
def test_everything_with_two_steps(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert run(out, "--seeds", "1", "--rounds", "2", "--no-plots") == 0
    content = json.loads(out.read_text())
    assert len(content["runs"]) == 4 * 4 + 4 * 2
    assert {len(found) for found in content["programs"].values()} == {4}
    for name in TASKS:
        (double,) = measures.agreement(content, name, "float64")
        assert double.largest < 1e-12
        (single,) = measures.agreement(content, name)
        assert single.largest < 1e-5
