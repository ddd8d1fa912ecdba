"""Rules that users bring along: by object, tried on numbers, and in folds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import batching

import jax_lnfold
from jax_lnfold import FoldError, rules
from jax_lnfold.program.flatten import flatten
from jax_lnfold.rules import Opaque, Pull, Rule, check_rule, linear, register
from tests.helpers.contracts import counts, fold_checked
from tests.kernels.kernels import (
    lookup_kernel,
    norm,
    pallas_lookup,
    pallas_patches,
    pallas_product,
    patch_kernel,
    primitive_of,
    product_kernel,
)

RNG = np.random.default_rng(0)


def draw(*shape: int) -> Any:
    return jnp.asarray(RNG.normal(size=shape))


def doubled(x: Any) -> Any:
    return x + x


# --- letters -------------------------------------------------------------------------------------

LINEAR: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Rule]] = {
    "product": (jnp.matmul, ((3, 4), (4, 5)), linear("nk,km->nm")),
    "lookup": (
        lambda ids, table: jnp.take(table, ids, axis=0, mode="clip"),
        (np.array([[1, 0, 3], [2, 2, 1]]), (4, 5)),
        linear("bt,vd->btd", [1]),
    ),
    "batch": (lambda x, w: jnp.einsum("bnk,bkm->bnm", x, w), ((2, 3, 4), (2, 4, 5)),
              linear("bnk,bkm->bnm")),
    "convolution": (
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        ((2, 4, 3, 2), (3, 3, 2, 5)),
        linear("bhwi,xyio->bjko"),
    ),
    "sum": (lambda x: x.sum(0), ((2, 3),), linear("nd->d")),
    "scaled columns": (lambda x, g: x * g, ((3, 4), (3, 4)), linear("nd,nd->nd")),
}  # fmt: skip


def kernel_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    return primitive_of("mine", fn).bind


@pytest.mark.parametrize("name", LINEAR)
def test_letters_of_linear_kernels_hold(name: str) -> None:
    fn, operands, rule = LINEAR[name]
    found = check_rule(kernel_of(fn), *operands, rule=rule, seeds=2)
    assert found.axes > 0
    assert bool(found.pulls) == bool(found.pushes) == (name != "scaled columns")


WRONG: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Rule, str]] = {
    "not linear": (jnp.tanh, ((3, 4),), linear("nd->nd"), "pull: result 0 has a mean of"),
    "other axes": (lambda x: x.T, ((3, 3),), linear("nd->nd"), "rule: "),
    "mixed positions": (lambda x: x[:, ::-1] * jnp.arange(4), ((3, 4),), linear("nd->nd"), "rule"),
    "columns scaled differently": (
        lambda x: x * jnp.arange(4.0), ((3, 4),), linear("nd->nd"), "has a mean of",
    ),
    "a softmax": (
        jax.nn.softmax, ((3, 4),), Rule(push=lambda ctx, i, along: ((0, along),)), "push: ",
    ),
    "a shift that is said to vanish": (
        doubled, ((3, 4),), Rule(push=lambda ctx, i, along: ()), "where it should not",
    ),
    "uniform results": (
        lambda x: x + jnp.arange(4.0), ((3, 4),),
        Rule(uniform=lambda ctx, out, along: Pull(((0, along),))), "uniform: ",
    ),
    "a set of another shape": (
        doubled, ((3, 4),),
        Rule(lambda ctx, out, along: Pull(((0, rules.AxisSet.over((4, 3), [0])),))),
        "has the shape \\(4, 3\\) where values have \\(3, 4\\)",
    ),
    "no reason": (
        doubled, ((3, 4),), Rule(lambda ctx, out, along: Opaque("")), "does not say why",
    ),
    "factors": (
        jnp.square, ((3, 4),), Rule(axes=lambda ctx, i: {0: 0}), "factors along 0 are off by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_rules_that_are_wrong_are_refused_with_the_numbers(name: str) -> None:
    fn, operands, rule, words = WRONG[name]
    with pytest.raises(FoldError, match=words):
        check_rule(kernel_of(fn), *operands, rule=rule)


def test_letters_say_nothing_of_other_ranks() -> None:
    rule = linear("nk,km->nm")
    product = kernel_of(lambda x, w: jnp.matmul(x, w))
    assert check_rule(product, (3, 4), (4, 5), rule=rule, seeds=1).pulls > 0
    none = check_rule(product, (2, 3, 4), (4, 5), rule=rule, seeds=1)
    assert (none.pulls, none.pushes, none.axes) == (0, 0, 0)


# --- registered ----------------------------------------------------------------------------------


def test_the_rule_of_a_primitive_is_used() -> None:
    one = primitive_of("their_product", jnp.matmul)
    other = primitive_of("their_product", lambda x, w: jnp.matmul(jnp.tanh(x), jnp.tanh(w)))

    def model(product: Primitive) -> Any:
        return lambda p, x: norm(product.bind(x, p["w"]), p["g"], p["b"])

    p, x = {"w": draw(4, 6), "g": draw(6), "b": draw(6)}, draw(3, 4)
    before = fold_checked(model(one), p, x)
    assert counts(before.report) == (1, 0, 0)
    assert before.report.opaque == {"their_product": 1}
    register(one, linear("nk,km->nm"))
    assert counts(fold_checked(model(one), p, x).report) == (1, 1, 0)
    unseen = fold_checked(model(other), p, x).report
    assert counts(unseen) == (1, 0, 0)
    assert unseen.opaque == {"their_product": 1}


def test_rules_in_parts() -> None:
    def pull(ctx: rules.Context, out: int, along: rules.AxisSet) -> Pull | Opaque:
        """``C_S (x + x) = 2 C_S x``."""
        return Pull(((0, along),))

    made = primitive_of("doubled", doubled)
    register(made, pull=pull, push=lambda ctx, i, along: ((0, along),))
    found = check_rule(made.bind, (2, 3, 4))
    assert min(found.pulls, found.pushes) > 0


def test_a_batched_primitive_is_asked_about_as_it_is() -> None:
    made = primitive_of("batched_product", jnp.matmul)
    batching.primitive_batchers[made] = lambda xs, axes: (
        made.bind(jnp.moveaxis(xs[0], axes[0], 0), xs[1]),
        0,
    )
    register(made, linear("nk,km->nm"))

    def model(p: Any, x: Any) -> Any:
        return norm(jax.vmap(made.bind, (1, None))(x, p["w"]), p["g"], p["b"])

    p = {"w": draw(4, 6), "g": draw(6), "b": draw(6)}
    assert counts(fold_checked(model, p, draw(3, 2, 4)).report) == (1, 0, 0)


def test_pallas_kernels_are_known_by_their_function() -> None:
    def product_kernel_2(x_ref: Any, w_ref: Any, y_ref: Any) -> None:
        y_ref[...] = jnp.tanh(x_ref[...] @ w_ref[...])

    def model(p: Any, x: Any) -> Any:
        return norm(pallas_product(x, p["w"]), p["g"], p["b"])

    p, x = {"w": draw(4, 6), "g": draw(6), "b": draw(6)}, draw(3, 4)
    register(rules.pallas_kernel(product_kernel_2), linear("nk,km->nm"))
    assert counts(fold_checked(model, p, x).report) == (1, 0, 0)
    register(rules.pallas_kernel(partial(product_kernel)), linear("nk,km->nm"))
    assert counts(fold_checked(model, p, x).report) == (1, 1, 0)
    found = check_rule(pallas_product, (3, 4), (4, 5), seeds=1)
    assert min(found.pulls, found.pushes, found.axes) > 0


EMBEDDINGS: dict[str, tuple[Any, Any, str, Any, Any]] = {
    "lookup": (
        pallas_lookup,
        lookup_kernel,
        "bt,vd->btd",
        np.array([[1, 0, 3], [2, 4, 1]]),
        (5, 6),
    ),
    "convolution": (
        pallas_patches,
        patch_kernel,
        "bhwi,xyio->bjko",
        draw(2, 4, 6, 3),
        (2, 2, 3, 6),
    ),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_kernels_that_embed_fold_in_a_model(name: str) -> None:
    """Lookups and convolutions: the stream that they begin, with a norm that reads it."""
    fn, kernel, letters, x, shape = EMBEDDINGS[name]

    def model(p: Any, x: Any) -> Any:
        h = fn(x, p["embed"])
        h = h + jnp.tanh(norm(h, p["g"], p["b"])) @ p["w"]
        return norm(h, p["b"], p["g"]) @ p["head"]

    p = {"embed": draw(*shape), "g": draw(6), "b": draw(6), "w": draw(6, 6), "head": draw(6, 3)}
    before = fold_checked(model, p, x).report
    assert (before.n_folded, len(before.opaque)) == (0, 1)
    register(rules.pallas_kernel(kernel), linear(letters, [1]))
    folded = fold_checked(model, p, x)
    assert counts(folded.report) == (2, 2, 0)
    assert {edit.key_path for edit in folded.plan.edits} == {"embed", "w"}
    assert not folded.report.opaque
    found = check_rule(fn, x, shape, seeds=1)
    assert min(found.pulls, found.pushes, found.axes) > 0


def test_names_that_the_library_uses_are_nobody_elses() -> None:
    """A primitive that is called like a part of a loop is none."""
    for name in ("loop_stack", "dropout", "branch_result", "observe"):
        made = primitive_of(name, jnp.square)
        graph = flatten(jax.make_jaxpr(made.bind)(jnp.ones(3)))
        assert graph.ops[-1].name == "opaque"
        with pytest.raises(FoldError, match="is a name that this library knows"):
            register(made, linear("d->d"))


given: Any = register
target: Any = rules.ffi_target
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "a name": (lambda: given("matmul", linear("a->a")), "'matmul' is no primitive, and a name"),
    "of jax": (
        lambda: register(jax.lax.sin_p, linear("a->a")),
        "'sin' is a name that this library knows, of jax's own",
    ),
    "of jax, without a public name": (
        lambda: register(
            jax.make_jaxpr(pallas_product)(draw(2, 2), draw(2, 2)).eqns[-1].primitive,
            linear("nk,km->nm"),
        ),
        "'pallas_call' is a name that this library knows",
    ),
    "no rule": (lambda: given(primitive_of("p", doubled), 3), "rule: a int is no Rule"),
    "kernel": (lambda: rules.pallas_kernel("copy"), "kernel: 'copy' is no function"),
    "target": (lambda: target(3), "name: 3 is no text"),
    "spec": (lambda: linear("ab"), "spec: 'ab' is not of the form"),
    "letter twice": (lambda: linear("aa->a"), "is not of the form"),
    "operands": (lambda: linear("ab->ab", [1]), "operands: \\[1\\] are no positions among 1"),
    "no equation": (lambda: check_rule(lambda x: x, (2,)), "fn: has no equation"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    run, words = ERRORS[name]
    with pytest.raises(FoldError, match=words):
        run()


def test_a_rule_is_registered_once() -> None:
    made = primitive_of("twice", doubled)
    register(made, linear("d->d"))
    with pytest.raises(FoldError, match="twice has a rule already; register it once"):
        register(made, linear("d->d"))
    register(rules.ffi_target("twice"), linear("d->d"))
    with pytest.raises(FoldError, match="the ffi kernel twice has a rule already"):
        register(rules.ffi_target("twice"), linear("d->d"))
    assert jax_lnfold.rules is rules


def test_letters_say_nothing_of_other_sizes_and_of_a_second_result() -> None:
    """A padded result has other positions; a second result is not the one that was meant."""

    def padded(x: Any) -> Any:
        return jnp.pad(x, ((0, 0), (0, 2)))

    def of_two(x: Any) -> Any:
        return list(jax.lax.top_k(x, 3))

    cut = check_rule(primitive_of("padded", padded).bind, (3, 4), rule=linear("nk->nk"))
    assert (cut.pulls, cut.pushes, cut.axes) == (0, 0, 0)
    two = check_rule(of_two, (2, 3), rule=linear("nk->nk"))
    assert (two.pulls, two.pushes, two.axes) == (0, 0, 0)
