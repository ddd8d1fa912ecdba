"""Models in, models out: NNX, Equinox and linen models fold whole, and get RMSNorm modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jax_lnfold
from jax_lnfold import FoldError, PlanMismatchError
from jax_lnfold.models.nnx_models import ShiftedRMSNorm
from tests.frameworks import test_equinox as in_eqx
from tests.frameworks import test_nnx as in_nnx
from tests.helpers.contracts import assert_identical, counts, relative_difference, snapshot
from tests.models.zoo import BY_NAME, perturb

Array = jax.Array

X, OTHER_X = in_nnx.X, in_nnx.OTHER_X


def alternating(names: Iterable[str]) -> list[tuple[str, bool]]:
    """Half of them with `fold_affine`."""
    return [(name, i % 2 == 1) for i, name in enumerate(names)]


# --- NNX ------------------------------------------------------------------------------------------

LIFTED = "jit|scan along axis 1|scan over remat, reversed|vmap over members|cond|while_loop"
NNX: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    name: partial(in_nnx.Stream, in_nnx.FOLDS[name].body) for name in LIFTED.split("|")
} | {
    "layers": partial(in_nnx.Stream, in_nnx.Layers),
    "batch norm": partial(in_nnx.Stream, partial(in_nnx.Normed, False)),
    "dropout": partial(in_nnx.Stream, partial(in_nnx.Dropped, False)),
}


def nnx_model(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """A model in float64, all its numbers moved."""
    model = make(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, perturb(params), rest)


def compare_calls(got: Any, want: Any, x: Any, calls: int = 2) -> None:
    """The same results, call after call: statistics and random numbers go on alike."""
    for _ in range(calls):
        assert relative_difference(got(x), want(x)) < 1e-12


def train_nnx(model: Any, plan: jax_lnfold.FoldPlan) -> None:
    """A step under the constraint, compiled."""
    tx = optax.chain(optax.adam(1e-2), jax_lnfold.center_updates(plan))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Array) -> Array:
        loss, gradient = nnx.value_and_grad(lambda model: jnp.square(model(x)).mean())(model)
        optimizer.update(model, gradient)
        return loss

    before = snapshot(nnx.state(model, nnx.Param))
    assert jnp.isfinite(step(model, optimizer, X))
    assert relative_difference(nnx.state(model, nnx.Param), before) > 1e-3
    assert plan.is_centered(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("name", NNX)
def test_nnx_model_folds_whole(name: str) -> None:
    model = nnx_model(NNX[name])
    before = snapshot(nnx.state(model))
    folded = jax_lnfold.fold(model, X)
    report = folded.report
    assert report.n_folded == len(report.norms)
    assert isinstance(folded.model, in_nnx.Stream)
    assert_identical(nnx.state(model), before)
    split = nnx.merge(*nnx.split(nnx.clone(folded.model)))
    for same in (split, copy.deepcopy(folded.model), nnx.clone(folded.model)):
        compare_calls(same, nnx.clone(model), OTHER_X)
    jitted, own = nnx.jit(lambda model, x: model(x)), nnx.clone(folded.model)
    compare_calls(partial(jitted, own), nnx.clone(model), X)
    if name != "while_loop":  # jax has no gradient of it
        train_nnx(folded.model, folded.plan)


@pytest.mark.parametrize(("name", "fold_affine"), alternating(NNX))
def test_nnx_norms_become_rms_norms(name: str, fold_affine: bool) -> None:
    model = nnx_model(NNX[name])
    before = snapshot(nnx.state(model))
    made = jax_lnfold.with_rms_norms(model, X, fold_affine=fold_affine)
    assert type(made.model) is in_nnx.Stream
    assert_identical(nnx.state(model), before)
    kinds = [type(part) for _, part in nnx.iter_modules(made.model)]
    assert nnx.LayerNorm not in kinds
    unshifted = {e.shift for e in made.report.plan.affine} - {None}
    assert kinds.count(nnx.RMSNorm) == len(unshifted)
    assert kinds.count(ShiftedRMSNorm) == len(made.norms) - len(unshifted)
    assert jax_lnfold.analyze(made.model, X).norms == ()
    compare_calls(nnx.clone(made.model), nnx.clone(model), OTHER_X)
    if name != "while_loop":
        train_nnx(made.model, made.plan)


# --- Equinox --------------------------------------------------------------------------------------

ON_SAMPLES = "two vmaps|bias only|neither|several axes|heads|mlp|transposed convolution"
ON_TOKENS = "tied|copied, query and key norms|filter_checkpoint, rotary|scanned"
EQX: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    name: (in_eqx.FOLDING[name][0], in_eqx.X[0], in_eqx.OTHER_X[0])
    for name in ON_SAMPLES.split("|")
} | {
    name: (in_eqx.GPTS[name][0], in_eqx.IDS[0], in_eqx.IDS[1, :-1]) for name in ON_TOKENS.split("|")
}


def eqx_model(make: Callable[[], Any]) -> Any:
    params, rest = eqx.partition(make(), eqx.is_inexact_array)
    return eqx.combine(perturb(params), rest)


def train_eqx(model: Any, plan: jax_lnfold.FoldPlan, x: Any) -> None:
    tx = optax.chain(optax.adam(1e-2), jax_lnfold.center_updates(plan))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        @eqx.filter_value_and_grad
        def loss(model: Any) -> Array:
            return jnp.square(model(x)).mean()

        value, gradient = loss(model)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    before = snapshot(eqx.filter(model, eqx.is_inexact_array))
    model, state, value = step(model, state)
    assert jnp.isfinite(value)
    assert relative_difference(eqx.filter(model, eqx.is_inexact_array), before) > 1e-3
    assert plan.is_centered(eqx.filter(model, eqx.is_inexact_array))


def layer_norms(model: Any, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(model, is_leaf=lambda x: type(x) is kind)
    return [x for x in leaves if type(x) is kind]


@pytest.mark.parametrize("name", EQX)
def test_eqx_model_folds_whole(name: str) -> None:
    make, x, other = EQX[name]
    model = eqx_model(make)
    before = snapshot(eqx.filter(model, eqx.is_array))
    folded = jax_lnfold.fold(model, x)
    assert folded.report.n_folded == len(folded.report.norms) > 0
    assert isinstance(folded.model, type(model))
    assert_identical(eqx.filter(model, eqx.is_array), before)
    stored = io.BytesIO()
    eqx.tree_serialise_leaves(stored, folded.model)
    stored.seek(0)
    want = eqx.filter_jit(model)(other)
    for same in (
        eqx.filter_jit(folded.model),
        eqx.tree_deserialise_leaves(stored, folded.model),
        lambda x: jax.vmap(folded.model)(x[None])[0],
    ):
        assert relative_difference(same(other), want) < 1e-12
    train_eqx(folded.model, folded.plan, x)


@pytest.mark.parametrize(("name", "fold_affine"), alternating(EQX))
def test_eqx_norms_become_rms_norms(name: str, fold_affine: bool) -> None:
    make, x, other = EQX[name]
    model = eqx_model(make)
    made = jax_lnfold.with_rms_norms(model, x, fold_affine=fold_affine)
    assert type(made.model) is type(model)
    norms = layer_norms(model, eqx.nn.LayerNorm)
    assert len(layer_norms(made.model, eqx.nn.RMSNorm)) == len(made.norms)
    assert len(layer_norms(made.model, eqx.nn.LayerNorm)) == len(norms) - len(made.norms)
    left = jax_lnfold.analyze(made.model, x, explicit_cost=1e30)
    assert counts(left) == (len(left.norms), len(left.norms) and 0, 0) or not made.norms
    want = eqx.filter_jit(model)(other)
    assert relative_difference(eqx.filter_jit(made.model)(other), want) < 1e-12
    train_eqx(made.model, made.plan, x)


# --- Flax linen -----------------------------------------------------------------------------------

LINEN = {
    "vit": 7,
    "gpt_untied": 5,
    "gpt2": 0,  # without an explicit centering behind its tied table none of them folds
    "bert": 1,
    "bart": 2,
    "mixer_wide": 1,
    "dit": 0,  # its constant position table would have to be centered
    "mae": 0,  # the same
    "qk_norm_stacked": 9,
    "clip_text": 7,
    "beit": 5,
}
"""Models of the zoo, and how many modules are replaced."""


@pytest.mark.parametrize(("name", "fold_affine"), alternating(LINEN))
def test_linen_norms_become_rms_norms(name: str, fold_affine: bool) -> None:
    built = BY_NAME[name].build()
    module: Any = built.apply_fn.__self__  # type: ignore[attr-defined]
    before = snapshot(built.params)
    made = jax_lnfold.with_rms_norms(module, built.params, *built.inputs, fold_affine=fold_affine)
    assert len(made.norms) == LINEN[name]
    assert_identical(built.params, before)
    assert jax.tree.structure(made.params) == jax.tree.structure(built.params)
    want = jax.jit(module.apply)(built.params, *built.other_inputs)
    run = jax.jit(made.model.apply)
    assert relative_difference(run(made.params, *built.other_inputs), want) < 1e-12
    kept = jax_lnfold.analyze(made.model.apply, made.params, *built.inputs).norms
    assert len(kept) == BY_NAME[name].norms - LINEN[name]
    rms = jax.eval_shape(made.model.init, jax.random.key(0), *built.inputs)
    assert jax.tree.structure(rms) == jax.tree.structure(built.params)
    if made.norms:
        gradient = jax.jit(jax.grad(lambda p: jnp.square(run(p, *built.inputs)).mean()))
        tx = optax.chain(optax.sgd(1e-2), jax_lnfold.center_updates(made.plan))
        updates, _ = tx.update(gradient(made.params), tx.init(made.params), made.params)
        assert made.plan.is_centered(optax.apply_updates(made.params, updates))


class Around(nn.Module):
    """Holds a module that it did not make, besides a LayerNorm of the same name as within it."""

    body: nn.Module

    def setup(self) -> None:
        self.enter, self.layers_1 = nn.Dense(7), nn.LayerNorm()

    def __call__(self, x: Array) -> Array:
        return self.body(self.layers_1(self.enter(x)))


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("fold_affine", [False, True])
def test_linen_modules_given_as_attributes(around: bool, fold_affine: bool) -> None:
    """Also a second time, when the rest is replaced."""
    body = nn.Sequential([nn.Dense(8), nn.LayerNorm(), jnp.tanh, nn.Dense(6), nn.LayerNorm()])
    module = Around(body) if around else body
    variables = perturb(module.init(jax.random.key(1), X))
    want = module.apply(variables, X)
    first = jax_lnfold.with_rms_norms(
        module, variables, X, fold_affine=fold_affine, exclude={path(around, "layers_0/kernel")}
    )
    again = jax_lnfold.with_rms_norms(first.model, first.params, X, fold_affine=fold_affine)
    assert (len(first.norms), len(again.norms)) == (1 + around, 1)
    for made in first, again:
        assert jax.tree.structure(made.params) == jax.tree.structure(variables)
        assert relative_difference(made.model.apply(made.params, X), want) < 1e-12


def path(around: bool, name: str) -> str:
    return f"params/body/{name}" if around else f"params/{name}"


def test_norms_that_are_no_modules_of_flax_stay() -> None:
    built = BY_NAME["gpt_untied"].build("mean_var")
    module: Any = built.apply_fn.__self__  # type: ignore[attr-defined]
    made = jax_lnfold.with_rms_norms(module, built.params, *built.inputs)
    assert (made.norms, made.report.n_folded) == ((), 5)
    want = module.apply(built.params, *built.inputs)
    assert relative_difference(made.model.apply(made.params, *built.inputs), want) < 1e-12


# --- biases ---------------------------------------------------------------------------------------


class Headless(nnx.Module):
    """No linear layer has a bias; those behind the second norm cannot use one."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        plain = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.enter, self.up, self.down = plain(5, 8), plain(8, 11), plain(11, 8)
        self.heads = nnx.LinearGeneral(8, (2, 3), use_bias=False, rngs=rngs)
        self.first, self.second = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        s = self.enter(x)
        h = self.first(s)
        s = (
            s
            + self.down(nnx.gelu(self.up(h)))
            + self.heads(h).sum((-2, -1), keepdims=False)[:, None]
        )
        return self.second(s)


class HeadlessModule(eqx.Module):
    """One linear layer reads the norm."""

    enter: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    leave: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        self.enter, self.norm = eqx.nn.Linear(5, 7, use_bias=False, key=key), eqx.nn.LayerNorm(7)
        self.leave = eqx.nn.Linear(7, 3, use_bias=False, key=key)

    def __call__(self, x: Array) -> Array:
        return self.leave(self.norm(self.enter(x)))


def test_biases_are_added_where_they_take_up_a_shift() -> None:
    model, x = nnx_model(Headless), in_nnx.draw(4, 5)
    made = jax_lnfold.with_rms_norms(model, x, fold_affine=True, add_biases=True).model
    assert model.up.bias is None  # the caller's is as before
    assert [made.enter.bias, made.down.bias] == [None, None]
    assert (made.up.bias[...].shape, made.heads.bias[...].shape) == ((11,), (2, 3))
    assert type(made.first) is nnx.RMSNorm
    compare_calls(made, model, x)
    module = eqx_model(partial(HeadlessModule, jax.random.key(0)))
    made = jax_lnfold.with_rms_norms(module, x[0], fold_affine=True, add_biases=True).model
    assert made.enter.bias is None
    assert made.norm.bias is None
    compare_calls(made, module, x[0])


# --- near misses ----------------------------------------------------------------------------------


class Twice(nnx.Module):
    """One LayerNorm module on a centered stream and, if `raw`, on what has a mean."""

    def __init__(self, raw: bool, norm: type[nnx.LayerNorm], rngs: nnx.Rngs) -> None:
        self.enter, self.norm = nnx.Linear(5, 7, rngs=rngs), norm(7, rngs=rngs)
        self.leave, self.raw = nnx.Linear(7, 3, rngs=rngs), raw

    def __call__(self, x: Array) -> Array:
        s = self.norm(self.enter(x))
        return self.leave(self.norm(jnp.abs(s)) if self.raw else self.norm(self.enter(x + 1)) + s)


class Subclass(nnx.LayerNorm):
    """What it computes is its own affair."""


@pytest.mark.parametrize(
    ("raw", "norm", "folded", "replaced"),
    [
        (False, nnx.LayerNorm, 2, 1),
        (True, nnx.LayerNorm, 1, 0),
        (False, Subclass, 2, 0),
        (False, partial(nnx.LayerNorm, promote_dtype=lambda xs, dtype: xs), 2, 0),
    ],
)
def test_module_is_replaced_only_if_all_its_calls_fold(
    raw: bool, norm: Any, folded: int, replaced: int
) -> None:
    model = nnx_model(partial(Twice, raw, norm))
    x = in_nnx.draw(4, 5)
    made = jax_lnfold.with_rms_norms(model, x)
    assert (made.report.n_folded, len(made.norms)) == (folded, replaced)
    compare_calls(made.model, model, x)


def test_masked_call_stays() -> None:
    """A LayerNorm over a part of the positions is none that folds; the module is the same."""

    class Masked(Twice):
        def __call__(self, x: Array) -> Array:
            mask = jnp.arange(7) < 4
            return self.leave(self.norm(self.enter(x)) + self.norm(self.enter(x), mask=mask))

    model = nnx_model(partial(Masked, False, nnx.LayerNorm))
    made = jax_lnfold.with_rms_norms(model, x := in_nnx.draw(4, 5))
    assert made.norms == ()
    compare_calls(made.model, model, x)


# --- methods --------------------------------------------------------------------------------------


class Coder(nnx.Module):
    """Three functions of one model."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.enter, self.norm = nnx.Linear(5, 7, rngs=rngs), nnx.LayerNorm(7, rngs=rngs)
        self.leave = nnx.Linear(7, 3, rngs=rngs)

    def stream(self, x: Array) -> Array:
        return self.enter(x)

    def encode(self, x: Array, scale: float = 1.0) -> Array:
        return self.norm(self.stream(x)) * scale

    def decode(self, z: Array) -> Array:
        return self.leave(z)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x))


def test_other_methods_are_proved_when_they_are_called() -> None:
    model = nnx_model(Coder)
    x = in_nnx.draw(4, 5)
    folded = jax_lnfold.fold(model, x).model
    assert relative_difference(folded.encode(x, scale=2.0), model.encode(x, scale=2.0)) < 1e-12
    with pytest.raises(PlanMismatchError):
        folded.stream(x)


def test_methods_are_folded_together() -> None:
    model = nnx_model(Coder)
    x, z = in_nnx.draw(4, 5), in_nnx.draw(4, 7)
    methods = {"encode": Coder.encode, "stream": Coder.stream}
    folded = jax_lnfold.fold(methods, model, {"encode": x, "stream": x})
    assert folded.report.n_folded == 0  # the stream is returned raw
    for name, inputs in (("encode", x), ("stream", x), ("decode", z)):
        got, want = getattr(folded.model, name)(inputs), getattr(model, name)(inputs)
        assert relative_difference(got, want) < 1e-12


def test_functions_of_a_model_as_a_tree() -> None:
    model, x = nnx_model(Coder), in_nnx.draw(4, 5)
    functions = {"loss": lambda model, x: jnp.square(model(x)).mean(), "call": Coder.__call__}
    folded = jax_lnfold.fold(functions, model, {"loss": x, "call": x})
    assert isinstance(folded.params, Coder)
    assert relative_difference(folded["loss"](x), jnp.square(model(x)).mean()) < 1e-12


class Module(eqx.Module):
    """At the top of a file, so that it can be pickled."""

    enter: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, key: Array) -> None:
        self.enter, self.norm = eqx.nn.Linear(5, 7, key=key), eqx.nn.LayerNorm(7)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.enter(x))


def test_models_are_pickled() -> None:
    x = in_nnx.draw(5)
    for model in (nnx_model(Coder), eqx_model(partial(Module, jax.random.key(0)))):
        folded = jax_lnfold.fold(model, x)
        again = pickle.loads(pickle.dumps(folded))
        assert type(again.model).__name__ == "Folded" + type(model).__name__
        assert relative_difference(again.model(x), model(x)) < 1e-12
        assert again.plan == folded.plan


def test_abstract_models_are_analysed() -> None:
    model = nnx.eval_shape(lambda: Coder(nnx.Rngs(0)))
    assert counts(jax_lnfold.analyze(model, in_nnx.draw(4, 5))) == (1, 1, 0)
    module = eqx.filter_eval_shape(Module, jax.random.key(0))
    assert counts(jax_lnfold.analyze(module, in_nnx.draw(5))) == (1, 1, 0)


def test_programs_are_there_before_the_weights() -> None:
    """From shapes and a plan; then the weights come from elsewhere, centered on the way."""
    model, x = nnx_model(Coder), in_nnx.draw(4, 5)
    abstract = nnx.eval_shape(lambda: Coder(nnx.Rngs(0)))
    plan = jax_lnfold.plan_fold(abstract, x)
    made = jax_lnfold.fold(abstract, x, plan=plan).model
    nnx.update(made, plan.center(nnx.state(model, nnx.Param)))
    compare_calls(made, model, x)
    module, x = eqx_model(partial(Module, jax.random.key(0))), in_nnx.draw(5)
    abstract = eqx.filter_eval_shape(Module, jax.random.key(0))
    plan = jax_lnfold.plan_fold(abstract, x)
    stored = io.BytesIO()
    eqx.tree_serialise_leaves(stored, plan.center(eqx.filter(module, eqx.is_inexact_array)))
    stored.seek(0)
    made = eqx.tree_deserialise_leaves(stored, jax_lnfold.fold(abstract, x, plan=plan).model)
    compare_calls(made, module, x)


def test_plan_is_followed() -> None:
    model, x = nnx_model(Coder), in_nnx.draw(4, 5)
    plan = jax_lnfold.plan_fold(model, x)
    folded = jax_lnfold.fold(model, x, plan=plan, center=True)
    nnx.update(model, folded.params)  # what the original computes stays the same
    again = jax_lnfold.fold(model, x, plan=plan)
    assert_identical(again.params, snapshot(folded.params))
    compare_calls(again.model, model, x)


# --- bad input ------------------------------------------------------------------------------------


class Changing(Coder):
    """A call that changes what it should not."""

    def __call__(self, x: Array) -> Array:
        self.enter.bias[...] = self.enter.bias[...] + 1
        return super().__call__(x)


class Growing(Coder):
    """A call that makes a variable."""

    def __call__(self, x: Array) -> Array:
        self.seen = nnx.Intermediate(x)
        return super().__call__(x)


FOLD: Any = jax_lnfold.fold  # type checkers refuse what is tried here
LINEN_MODEL = nn.Dense(3)
VARIABLES = {"params": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}
ROW = jnp.ones((2, 5))
CODER = Coder(nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FOLD(Changing(nnx.Rngs(0)), ROW), "changes the parameter 'enter/bias"),
        (lambda: FOLD(Growing(nnx.Rngs(0)), ROW), "makes or removes variables"),
        (lambda: FOLD(ROW, CODER), "the function comes first"),
        (lambda: FOLD(VARIABLES, LINEN_MODEL, ROW), "the function comes first"),
        (lambda: FOLD(LINEN_MODEL.bind(VARIABLES), VARIABLES, ROW), "unbind"),
        (lambda: FOLD(LINEN_MODEL.apply), "params: missing"),
        (lambda: FOLD(lambda x: x, LINEN_MODEL.apply, ROW), "params: a method is no"),
        (lambda: FOLD({"encode": Coder.encode}, CODER, ROW), "example_inputs"),
        (lambda: FOLD(nnx.Dict(a=nnx.Param(ROW)), ROW), "has no __call__"),
        (lambda: jax_lnfold.with_rms_norms(jnp.sin, ROW), "model: a .* is no model"),
        (lambda: jax_lnfold.with_rms_norms(LINEN_MODEL), "its variables and then its inputs"),
        (lambda: jax_lnfold.with_rms_norms(CODER, ROW, add_biases=True), "with fold_affine=True"),
    ],
)
def test_bad_input(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(FoldError, match=words):
        call()


def test_linen_module_stands_for_its_apply() -> None:
    module = nn.Sequential([nn.Dense(7), nn.LayerNorm()])
    params = perturb(module.init(jax.random.key(0), ROW))
    folded = jax_lnfold.fold(module, params, ROW)
    assert counts(folded.report) == (1, 1, 0)
    assert relative_difference(folded(ROW), module.apply(params, ROW)) < 1e-12
