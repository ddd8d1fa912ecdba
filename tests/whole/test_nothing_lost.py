"""A fold that fails, is interrupted, or runs beside another one loses and spoils nothing."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold import Folded, FoldError, TraceError, TreeError, fold
from tests.helpers.contracts import assert_identical, check_contracts, relative_difference, snapshot
from tests.models.norm_spellings import layer_norm

Array = jax.Array
Params = dict[str, Any]

PACKAGE = str(Path(jax_lnfold.__file__).parent)
POINTS = 40

B, T, DIN, D, OUT = 2, 5, 7, 6, 3
EDITED = ["bias", "layer", "stem", "scale"]
"""The scale is read by the edit of the layer."""


def model(p: Params, x: Array) -> Array:
    s = x @ p["stem"] + p["bias"]
    s = s + (layer_norm(s) @ p["layer"]) * p["scale"]
    return layer_norm(s) @ p["head"]


def make_params(seed: int = 0) -> Params:
    shapes = {"stem": (DIN, D), "bias": (D,), "layer": (D, D), "scale": (D,), "head": (D, OUT)}
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(0.4, 1.0, shape)) for name, shape in shapes.items()}


def make_input(batch: int = B) -> Array:
    return jnp.asarray(np.random.default_rng(batch).normal(size=(batch, T, DIN)))


def deleted(p: Params) -> set[str]:
    return {name for name, leaf in p.items() if isinstance(leaf, jax.Array) and leaf.is_deleted()}


def assert_right(done: Folded, p: Params, x: Array) -> None:
    assert relative_difference(done(x), model(p, x)) < 1e-12
    assert (done.report.n_folded, done.report.n_inserted) == (2, 0)


# --- interrupted anywhere ------------------------------------------------------------------------


@contextmanager
def calls_of_the_package(stop_at: int = 0, error: BaseException | None = None) -> Iterator[list]:
    """Count the calls of the package's functions; the call number `stop_at` fails.

    Without generators: what fails while one is disposed of is ignored by Python.
    """
    calls: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        own = code.co_filename.startswith(PACKAGE) and not code.co_flags & inspect.CO_GENERATOR
        if event == "call" and own:
            calls.append(code.co_name)
            if len(calls) == stop_at and error is not None:
                raise error

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


Operation = Callable[[Params, Array], tuple[Callable[[], Any], Callable[[], Any]]]
"""Gives the call to interrupt, and a call that shows whether all is well afterwards."""


def folding(p: Params, x: Array) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return lambda: fold(model, p, x), lambda: assert_right(fold(model, p, x), p, x)


def first_call(p: Params, x: Array) -> tuple[Callable[[], Any], Callable[[], Any]]:
    done = fold(model, p)
    return lambda: done(x), lambda: assert_right(done, p, x)  # at the second call


def new_shape(p: Params, x: Array) -> tuple[Callable[[], Any], Callable[[], Any]]:
    done = fold(model, p, x)
    return lambda: done(x[:1]), lambda: assert_right(done, p, x[:1])


def centering(p: Params, x: Array) -> tuple[Callable[[], Any], Callable[[], Any]]:
    done = fold(model, p, x)
    want = snapshot(done.params)
    return lambda: done.plan.center(p), lambda: assert_identical(done.plan.center(p), want)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("operation", [folding, first_call, new_shape, centering])
def test_interrupted_at_any_call(operation: Operation, error: type[BaseException]) -> None:
    p, x = make_params(), make_input()
    p["bias"] = np.array(p["bias"])  # could be changed in place
    before = snapshot(p)
    leaves = dict(p)
    for _ in range(2):  # the second one finds the caches filled
        run, _ = operation(p, x)
        with calls_of_the_package() as calls:
            run()
    points = sorted({*np.linspace(1, len(calls), POINTS, dtype=int).tolist()})
    for point in points:
        run, check = operation(p, x)
        with (
            pytest.raises((error, TraceError)) as caught,
            calls_of_the_package(point, error("injected")) as calls,
        ):
            run()
        assert len(calls) == point, "it was not interrupted there"
        assert error in (caught.type, type(caught.value.__cause__)), calls[-1]
        assert not deleted(p)
        assert all(p[name] is leaf for name, leaf in leaves.items())
        assert_identical(p, before)
        check()
    check_contracts(model, p, fold(model, p, x), x, before=before)


# --- failing edits -------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]) -> None:
    """Let the program with this number fail, once."""
    call, times = jax_lnfold.plan.together._call, iter(range(99))

    def failing(*args: Any) -> Any:
        if next(times) == number:
            raise error("injected")
        return call(*args)

    monkeypatch.setattr("jax_lnfold.plan.together._call", failing)


def in_two_programs() -> Params:
    """Programs are for what is committed, or is not."""
    p = make_params()
    return p | {"bias": jax.device_put(p["bias"], jax.devices()[0])}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("number", range(2))
def test_failing_edit(
    monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    p, x = in_two_programs(), make_input()
    before, done = snapshot(p), fold(model, make_params(), x)
    for run in (lambda: fold(model, p, x), lambda: done.plan.center(p)):
        fail_at(monkeypatch, number, error)
        with pytest.raises(error, match="injected"):
            run()
        assert not deleted(p)
        assert_identical(p, before)
        assert_right(fold(model, p, x), p, x)  # the failure is spent
    assert_right(done, p, x)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("entry", ["fold", "center"])
def test_failing_edit_of_donated_leaves(
    monkeypatch: pytest.MonkeyPatch, number: int, entry: str
) -> None:
    """Those edited before are lost, as documented, and no others; then nothing looks usable."""
    p, x = in_two_programs(), make_input()
    before, done = snapshot(p), fold(model, make_params(), x)
    calls = {
        "fold": lambda: fold(model, p, x, donate=True),
        "center": lambda: done.plan.center(p, donate=True),
    }
    fail_at(monkeypatch, number, MemoryError)  # two look at all, two edit
    with pytest.raises(MemoryError, match="injected"):
        calls[entry]()
    assert deleted(p) == ({"bias"} if number == 3 else set())
    kept = [name for name in p if name not in deleted(p)]
    assert_identical({k: p[k] for k in kept}, {k: before[k] for k in kept})
    if number == 3:
        with pytest.raises(TreeError, match="params: leaf 'bias' has been deleted"):
            calls[entry]()
    else:
        calls[entry]()
    for call in (fold, jax_lnfold.FoldPlan.center):
        assert "interrupted" in (call.__doc__ or "")


def on(number: int, leaf: Array) -> Array:
    return jax.device_put(leaf, jax.devices()[number])


def gone(leaf: Array) -> Array:
    leaf.delete()
    return leaf


SPOILT: dict[str, Callable[[Params], Params]] = {
    "a leaf missing": lambda p: {name: p[name] for name in EDITED[1:]},
    "a leaf deleted": lambda p: {**p, "stem": gone(jnp.copy(p["stem"]))},
    "a leaf that is not edited deleted": lambda p: {**p, "head": gone(jnp.copy(p["head"]))},
    "a leaf of integers": lambda p: {**p, "stem": jnp.ones((DIN, D), int)},
    "a leaf of another shape": lambda p: {**p, "stem": jnp.ones((DIN, D + 1))},
    "a leaf that is none": lambda p: {**p, "stem": "stem"},
    "a leaf that overflows": lambda p: {**p, "stem": np.full((DIN, D), 1e308)},
    "a scale elsewhere": lambda p: {**p, "layer": on(1, p["layer"]), "scale": on(2, p["scale"])},
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_all_checks_come_before_the_first_donation(spoil: Callable[[Params], Params]) -> None:
    p, x = make_params(), make_input()
    done = fold(model, make_params(), x)
    bad = spoil(p)
    before = deleted(bad)
    for _ in range(2):
        with pytest.raises(FoldError, match="params: "):
            done.plan.center(bad, donate=True)
        assert deleted(bad) == before
    assert not deleted(p)


@pytest.mark.parametrize("inputs", [(make_input()[..., 1:],), (None,), ("x",)], ids=repr)
def test_nothing_is_donated_to_a_fold_that_is_refused(inputs: tuple[Any, ...]) -> None:
    p, x = make_params(), make_input()
    want, before = model(p, x), snapshot(p)
    later = fold(model, p, donate=True)
    for run in (lambda: fold(model, p, *inputs, donate=True), lambda: later(*inputs)):
        with pytest.raises(FoldError):
            run()
        assert not deleted(p)
        assert_identical(p, before)
    assert relative_difference(later(x), want) < 1e-12
    assert deleted(p) == {*EDITED}


# --- threads -------------------------------------------------------------------------------------

ROUNDS = 10


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that start at the same time, one thread each."""
    barrier = Barrier(len(calls))

    def start(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(start, call) for call in calls]]


def other_model(p: Params, x: Array) -> Array:
    """Of the same shapes, and with other edits: its stream leaks."""
    s = x @ p["stem"] + p["bias"]
    return layer_norm(layer_norm(s @ p["layer"]) * p["scale"]) @ p["head"] + s.sum()


def test_two_models_at_the_same_time() -> None:
    x = make_input()

    def run(apply_fn: Callable[..., Any], seed: int) -> Any:
        done = fold(lambda p, x: apply_fn(p, x), make_params(seed), x)
        plan = done.plan.to_json()
        return snapshot((done.params, done(x))), plan, str(done.report)

    alone = [run(model, 1), run(other_model, 2)]
    assert [text.count("key_path") for _, text, _ in alone] == [9, 6]
    for _ in range(ROUNDS):
        both = together(lambda: run(model, 1), lambda: run(other_model, 2))
        for (arrays, *texts), (known, *known_texts) in zip(both, alone, strict=True):
            assert_identical(arrays, known)
            assert texts == known_texts


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("batches", [(2, 3), (2, 2, 2, 3)], ids=str)
def test_threads_that_share_a_folded_model(batches: tuple[int, ...], donate: bool) -> None:
    """One of them analyses on the first call, the others wait for it."""
    inputs = [make_input(batch) for batch in batches]
    alone = [snapshot(fold(model, make_params())(x)) for x in inputs]
    for _ in range(ROUNDS):
        traced: list[int] = []

        def counted(p: Params, x: Array, traced: list[int] = traced) -> Array:
            traced.append(len(x))
            return model(p, x)

        done = fold(counted, make_params(), donate=donate)
        for _ in range(2):
            results = together(*(lambda done=done, x=x: done(x) for x in inputs))
            for got, want in zip(results, alone, strict=True):
                assert_identical(got, want)
        assert {*traced} == {*batches}
        assert len(traced) <= len(batches), "analysed more than once"
        assert done.report.n_folded == 2


def test_threads_that_edit_with_one_plan() -> None:
    done = fold(model, make_params(), make_input())
    trees = [make_params(seed) for seed in range(4)]
    alone = [snapshot(done.plan.center(p)) for p in trees]
    for _ in range(ROUNDS):
        edited = together(*(lambda p=p: done.plan.center(p) for p in trees))
        for got, want in zip(edited, alone, strict=True):
            assert_identical(got, want)
