"""What a folded model keeps of the programs it makes, and what copies and pickles of it hold."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jax_lnfold
from jax_lnfold import Folded, FoldError, center_updates
from jax_lnfold import program_cache as kept
from tests.helpers.contracts import assert_identical, check_contracts, relative_difference, snapshot

Array = jax.Array
Params = dict[str, Any]


def model(p: Params, x: Array) -> Array:
    c = x @ p["w"]
    c = c - c.mean(-1, keepdims=True)
    return (c / jnp.sqrt((c * c).mean(-1, keepdims=True) + 1e-5)) @ p["v"]


def make_params() -> Params:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(0.4, 1, s)) for k, s in {"w": (7, 12), "v": (12, 3)}.items()}


def tokens(count: int) -> Array:
    return jnp.asarray(np.random.default_rng(count).normal(size=(count, 7)))


def counted(traces: list[int]) -> Callable[..., Array]:
    """The model, which notes the size of its input whenever it is traced."""

    def apply(p: Params, x: Array) -> Array:
        traces.append(len(x))
        return model(p, x)

    return apply


# --- programs ------------------------------------------------------------------------------------


def test_programs_not_used_for_long_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LIMIT", 3)
    traces: list[int] = []
    folded = jax_lnfold.fold(counted(traces), make_params(), tokens(1))
    for count in (1, 2, 3, 2, 1, 4, 2, 1):  # 4 takes the place of 3
        folded(tokens(count))
    assert traces == [1, 2, 3, 4]
    folded(tokens(3))  # takes that of 4
    folded(tokens(1))
    folded(tokens(2))
    assert traces == [1, 2, 3, 4, 3]
    assert relative_difference(folded(tokens(4)), model(make_params(), tokens(4))) < 1e-12
    assert traces == [1, 2, 3, 4, 3, 4]


def test_programs_are_let_go_with_the_caches_of_jax() -> None:
    traces: list[int] = []
    alive: list[weakref.ref[Array]] = []

    def apply(p: Params, x: Array) -> Array:
        with jax.ensure_compile_time_eval():
            table = jnp.arange(12.0) * len(x)
        alive.append(weakref.ref(table))
        return counted(traces)(p, x) + table.sum() * 0 + (table * 0)[:3]

    folded = jax_lnfold.fold(apply, make_params(), tokens(1))
    for _ in range(2):
        for count in (2, 3, 2, 3):
            folded(tokens(count))
        assert [ref() is None for ref in alive[1:]] == [False] * 2
        gc.collect()
        jax.clear_caches()
        gc.collect()
        assert [ref() is None for ref in alive[1:]] == [True] * 2
        assert traces == [1, 2, 3]
        del traces[1:], alive[1:]


def test_threads_that_need_more_programs_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LIMIT", 2)
    params = make_params()
    folded = jax_lnfold.fold(model, params, tokens(1))
    counts = [1, 2, 3, 4] * 6
    with ThreadPoolExecutor(8) as pool:
        results = [*pool.map(lambda count: folded(tokens(count)), counts)]
    for count, got in zip(counts, results, strict=True):
        assert relative_difference(got, model(params, tokens(count))) < 1e-12


# --- copies and pickles --------------------------------------------------------------------------


def unpickled(folded: Folded) -> Folded:
    return pickle.loads(pickle.dumps(folded))


COPIES: dict[str, Callable[[Folded], Folded]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": unpickled,
    "pickled twice": lambda folded: unpickled(unpickled(folded)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_models_of_their_own(how: str) -> None:
    params, x = make_params(), tokens(5)
    folded = jax_lnfold.fold(model, params, x)
    before = snapshot(folded.params)
    other = COPIES[how](folded)
    assert other.plan == folded.plan
    assert other.report == folded.report
    assert_identical(other.params, before)
    check_contracts(model, params, other, x)
    check_contracts(model, params, other, tokens(6))
    if how != "copy":
        for name in "wv":
            other.params[name].delete()
        assert_identical(folded.params, before)
        assert relative_difference(folded(x), model(params, x)) < 1e-12


@pytest.mark.parametrize("how", COPIES)
def test_copies_before_the_first_call(how: str) -> None:
    params = make_params()
    lazy = jax_lnfold.fold(model, params)
    other = COPIES[how](lazy)
    assert relative_difference(other(tokens(5)), model(params, tokens(5))) < 1e-12
    with pytest.raises(jax_lnfold.NotAnalysedError):
        _ = lazy.plan
    with ThreadPoolExecutor(4) as pool:  # the lock of neither is held
        for got in pool.map(lambda folded: folded(tokens(4)), [lazy, other] * 2):
            assert relative_difference(got, model(params, tokens(4))) < 1e-12


def test_state_of_training_is_copied() -> None:
    """Target networks and checkpoints in memory: functions that cannot be pickled are no matter."""
    params, x = make_params(), tokens(5)
    folded = jax_lnfold.fold(lambda p, x: model(p, x), params, x)
    tx = optax.chain(optax.adam(1e-2), center_updates(folded.plan))
    state = TrainState.create(apply_fn=folded.apply, params=folded.params, tx=tx)
    target = copy.deepcopy(state)
    for _ in range(3):
        grads = jax.grad(lambda p, s=state: jnp.sum(s.apply_fn(p, x) ** 2))(state.params)
        state = state.apply_gradients(grads=grads)
    assert_identical(target.params, snapshot(folded.params))
    assert relative_difference(target.apply_fn(state.params, x), model(state.params, x)) < 1e-12
    target = target.replace(params=state.params)
    assert (
        relative_difference(copy.copy(target).apply_fn(target.params, x), model(target.params, x))
        < 1e-12
    )


def test_pickles_hold_what_can_be_pickled() -> None:
    x = tokens(5)
    folded = jax_lnfold.fold(partial(model), jax.tree.map(np.asarray, make_params()), x)
    assert isinstance(unpickled(folded).params["w"], np.ndarray)
    closure = jax_lnfold.fold(counted([]), make_params(), x)
    with pytest.raises(FoldError, match=r"^apply_fn: cannot be pickled \(.*local.*; fold a func"):
        pickle.dumps(closure)
    plan, params = pickle.loads(pickle.dumps((closure.plan, closure.params)))  # the cure
    assert plan == closure.plan
    assert relative_difference(jax_lnfold.fold(model, params, x)(x), closure(x)) < 1e-12
