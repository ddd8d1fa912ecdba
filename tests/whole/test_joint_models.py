"""Several functions of one tree, wired like real systems: counts by hand, and every single plan.

The counts are (LayerNorms that fold, explicit centerings), n is the number of elements of a stream.
A LayerNorm's own mean costs its elements, an explicit centering twice as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold import PlanMismatchError, fold
from jax_lnfold.trees import leaf_paths
from tests.helpers.contracts import check_contracts, counts, relative_difference, snapshot

Array = jax.Array
Tree = dict[str, Any]
Functions = Mapping[str, Callable[..., Any]]
Inputs = Mapping[str, tuple[Any, ...]]

HEADS, LAYERS, VOCAB, CONTEXT = 3, 2, 23, 11
IMAGE, TEXT, PATCH, EMBED, CLASSES = 15, 12, 8, 7, 5
N_PRE_LN = 2 * LAYERS + 1  # two in each block, and a last one
EXACT = 1e-12


# --- layers --------------------------------------------------------------------------------------


def linear_of(into: int, out: int) -> Tree:
    return {"w": (into, out), "b": (out,)}


def norm_of(width: int) -> Tree:
    return {"scale": (width,), "shift": (width,)}


def attention_of(width: int) -> Tree:
    return {name: linear_of(width, width) for name in ("q", "k", "v", "out")}


def mlp_of(width: int) -> Tree:
    up, down = linear_of(width, 2 * width + 1), linear_of(2 * width + 1, width)
    return {"norm": norm_of(width), "up": up, "down": down}


def block_of(width: int) -> Tree:
    return {"one": norm_of(width), "attention": attention_of(width), "mlp": mlp_of(width)}


def blocks_of(kind: Callable[[int], Tree], width: int) -> Tree:
    return {str(i): kind(width) for i in range(LAYERS)}


def drawn(shapes: Tree, seed: int) -> Tree:
    """Numbers whose means are far from zero."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda s: np.asarray(rng.normal(0.15, 0.4, s))  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=is_shape)  # of NumPy: edits need no compilation


def linear(p: Tree, x: Array) -> Array:
    return x @ p["w"] + p["b"]


def norm(p: Tree, x: Array) -> Array:
    c = x - x.mean(-1, keepdims=True)
    variance = jnp.square(c).mean(-1, keepdims=True)
    return c * jax.lax.rsqrt(variance + 1e-5) * (1 + p["scale"]) + p["shift"]


def heads(x: Array) -> Array:
    return x.reshape(*x.shape[:2], HEADS, -1)


def mix(p: Tree, x: Array, k: Array, v: Array, seen: Any = True, bias: Any = 0.0) -> Array:
    """Attention of ``x [batch, tokens, width]`` to keys and values of the same width."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads(linear(p["q"], x)), heads(k)) + bias
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, heads(v))
    return linear(p["out"], mixed.reshape(x.shape))


def mlp(p: Tree, x: Array) -> Array:
    return linear(p["down"], jax.nn.gelu(linear(p["up"], norm(p["norm"], x))))


def block(p: Tree, x: Array, seen: Any = True) -> Array:
    h, a = norm(p["one"], x), p["attention"]
    x = x + mix(a, h, linear(a["k"], h), linear(a["v"], h), seen)
    return x + mlp(p["mlp"], x)


def causal(length: int) -> Array:
    return jnp.tril(jnp.ones((length, length), bool))


def written(cache: Array, new: Array, start: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new, start, 1)


def cached(p: Tree, x: Array, cache: Tree, start: Any, bias: Any = 0.0) -> tuple[Array, Tree]:
    """Self-attention of tokens from position `start` on, and the cache with them."""
    new = {name: written(cache[name], linear(p[name], x), start) for name in ("k", "v")}
    seen = jnp.arange(CONTEXT) <= start + jnp.arange(x.shape[1])[:, None]
    return mix(p, x, new["k"], new["v"], seen, bias), new


def floats(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(0.2, 1.0, shape))


def ids(batch: int, length: int) -> Array:
    return jnp.asarray(np.random.default_rng(batch * length).integers(VOCAB, size=(batch, length)))


def empty(batch: int, width: int = TEXT) -> Tree:
    return {str(i): {n: jnp.zeros((batch, CONTEXT, width)) for n in "kv"} for i in range(LAYERS)}


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Functions of one tree, and what comes of them.

    `alone` and `joint` are the counts of each function by itself and together with the others;
    `refused` the pairs of which the second one would notice the plan of the first one alone.
    """

    functions: Functions
    shapes: Tree
    inputs: Inputs
    other_inputs: Inputs
    alone: Mapping[str, tuple[int, int]]
    joint: Mapping[str, tuple[int, int]]
    refused: frozenset[tuple[str, str]] = frozenset()
    kept: frozenset[str] = field(default_factory=frozenset)
    """Leaves that some function alone would have centered, and all together do not."""

    @property
    def params(self) -> Tree:
        return drawn(self.shapes, len(self.functions))


def clip_image(p: Tree, patches: Array) -> Array:
    """CLIP's image tower: a class token, a LayerNorm before the blocks, one behind them."""
    p = p["image"]
    first = jnp.broadcast_to(p["class"], (len(patches), 1, IMAGE))
    x = jnp.concatenate([first, linear(p["stem"], patches)], 1)
    x = norm(p["first"], x + p["positions"][: x.shape[1]])
    for each in p["blocks"].values():
        x = block(each, x)
    return norm(p["last"], x[:, 0]) @ p["projection"]


def clip_text(p: Tree, tokens: Array) -> Array:
    p = p["text"]
    x = p["tokens"][tokens] + p["positions"][: tokens.shape[1]]
    for each in p["blocks"].values():
        x = block(each, x, causal(tokens.shape[1]))
    return norm(p["last"], x[:, -1]) @ p["projection"]


def alike(image: Array, text: Array, temperature: Array) -> Array:
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text)]
    return jnp.exp(temperature) * unit[0] @ unit[1].T


def clip_score(p: Tree, patches: Array, tokens: Array) -> Array:
    return alike(clip_image(p, patches), clip_text(p, tokens), p["temperature"])


def tower_of(width: int, **more: Any) -> Tree:
    projected = {"projection": (width, EMBED), "positions": (CONTEXT, width)}
    blocks = {"blocks": blocks_of(block_of, width), "last": norm_of(width)}
    return {**projected, **blocks, **more}


CLIP = Case(
    {"image": clip_image, "text": clip_text, "score": clip_score},
    {
        "image": tower_of(
            IMAGE, stem=linear_of(PATCH, IMAGE), first=norm_of(IMAGE), **{"class": (IMAGE,)}
        ),
        "text": tower_of(TEXT, tokens=(VOCAB, TEXT)),
        "temperature": (),
    },
    {
        "image": (floats(2, 4, PATCH),),
        "text": (ids(3, 6),),
        "score": (floats(2, 4, PATCH), ids(3, 6)),
    },
    {
        "image": (floats(1, 9, PATCH),),
        "text": (ids(2, 10),),
        "score": (floats(3, 2, PATCH), ids(2, 5)),
    },
    # The image's stream starts at the scale and shift of a LayerNorm, which carry a mean: one
    # explicit centering (2n) serves the 2L norms in the blocks (n each) and the last one. The norm
    # before it reads stem, class token and positions, all linear. The text's tables are its own.
    # The towers share no parameter, so together nothing changes.
    alone={"image": (N_PRE_LN + 1, 1), "text": (N_PRE_LN, 0), "score": (2 * N_PRE_LN + 1, 1)},
    joint={"image": (N_PRE_LN + 1, 1), "text": (N_PRE_LN, 0), "score": (2 * N_PRE_LN + 1, 1)},
)


def shared_image(p: Tree, patches: Array) -> Array:
    x = linear(p["stem"], patches) + p["places"][: patches.shape[1]]
    for each in p["blocks"].values():
        x = block(each, x)
    return norm(p["last"], x).mean(1) @ p["projection"]


def shared_text(p: Tree, tokens: Array) -> Array:
    x = p["tokens"][tokens] + p["positions"][: tokens.shape[1]]
    for each in p["blocks"].values():
        x = block(each, x)
    return norm(p["last"], x).mean(1) @ p["projection"]


def shared_score(p: Tree, patches: Array, tokens: Array) -> Array:
    return alike(shared_image(p, patches), shared_text(p, tokens), p["temperature"])


def caption(p: Tree, patches: Array) -> Array:
    """The words of an image: its embedding against the table of tokens itself."""
    return shared_image(p, patches) @ p["back"] @ p["tokens"].T


SHARED = Case(
    {"image": shared_image, "text": shared_text, "score": shared_score, "caption": caption},
    tower_of(
        TEXT,
        stem=linear_of(PATCH, TEXT),
        places=(CONTEXT, TEXT),
        tokens=(VOCAB, TEXT),
        back=(EMBED, TEXT),
        temperature=(),
    ),
    {
        "image": (floats(2, 4, PATCH),),
        "text": (ids(3, 6),),
        "score": (floats(2, 4, PATCH), ids(3, 6)),
        "caption": (floats(2, 4, PATCH),),
    },
    {
        "image": (floats(3, 7, PATCH),),
        "text": (ids(2, 10),),
        "score": (floats(3, 5, PATCH), ids(4, 5)),
        "caption": (floats(1, 9, PATCH),),
    },
    # Both modalities start linearly and run through the same blocks, which both tolerate. Only
    # `caption` reads the table of tokens raw: the rows that `text` looks up are then centered
    # explicitly (2n, for 2L + 1 norms of n), with their positions, which then need no edit.
    alone={
        "image": (N_PRE_LN, 0),
        "text": (N_PRE_LN, 0),
        "score": (2 * N_PRE_LN, 0),
        "caption": (N_PRE_LN, 0),
    },
    joint={
        "image": (N_PRE_LN, 0),
        "text": (N_PRE_LN, 1),
        "score": (2 * N_PRE_LN, 1),
        "caption": (N_PRE_LN, 0),
    },
    refused=frozenset({("text", "caption"), ("score", "caption")}),
    kept=frozenset({"tokens", "positions"}),
)


def encode(p: Tree, tokens: Array) -> Array:
    x = p["tokens"][tokens] + p["encoder"]["positions"][: tokens.shape[1]]
    for each in p["encoder"]["blocks"].values():
        x = block(each, x)
    return norm(p["encoder"]["last"], x)


def decode_step(p: Tree, token: Array, position: Any, states: Array, cache: Tree) -> Any:
    """The logits of the next token, by the table itself, and the cache with this one."""
    own, new = p["decoder"], {}
    x = p["tokens"][token] + jax.lax.dynamic_slice_in_dim(own["positions"], position, 1)
    for name, each in own["blocks"].items():
        mixed, new[name] = cached(each["attention"], norm(each["one"], x), cache[name], position)
        x, a = x + mixed, each["cross"]
        x = x + mix(a, norm(each["two"], x), linear(a["k"], states), linear(a["v"], states))
        x = x + mlp(each["mlp"], x)
    return norm(own["last"], x) @ p["tokens"].T, new


def cross_block_of(width: int) -> Tree:
    return {**block_of(width), "two": norm_of(width), "cross": attention_of(width)}


ENCODER_DECODER = Case(
    {"encode": encode, "decode": decode_step},
    {
        "tokens": (VOCAB, TEXT),
        "encoder": {
            "positions": (CONTEXT, TEXT),
            "blocks": blocks_of(block_of, TEXT),
            "last": norm_of(TEXT),
        },
        "decoder": {
            "positions": (CONTEXT, TEXT),
            "blocks": blocks_of(cross_block_of, TEXT),
            "last": norm_of(TEXT),
        },
    },
    {"encode": (ids(2, 6),), "decode": (ids(2, 1), jnp.int32(3), floats(2, 6, TEXT), empty(2))},
    {"encode": (ids(3, 9),), "decode": (ids(3, 1), jnp.int32(8), floats(3, 4, TEXT), empty(3))},
    # The decoder has three norms in a block, one at the end, and logits by the table: its rows are
    # centered explicitly. The encoder alone would have the table centered; together it pays for
    # its rows, with their positions (2n, for 2L + 1 norms). The states that it returns are normed.
    alone={"encode": (N_PRE_LN, 0), "decode": (3 * LAYERS + 1, 1)},
    joint={"encode": (N_PRE_LN, 1), "decode": (3 * LAYERS + 1, 1)},
    refused=frozenset({("encode", "decode")}),
    kept=frozenset({"tokens", "encoder/positions"}),
)


def forward(p: Tree, x: Array, drop: Callable[[str, Array, int], Array]) -> Array:
    """A residual network of MLPs; `drop` is told what it may drop from: a branch, or its inside."""
    x = linear(p["stem"], x)
    for i, each in enumerate(p["blocks"].values()):
        h = jax.nn.gelu(linear(each["up"], norm(each["norm"], x)))
        x = x + drop("branch", linear(each["down"], drop("inside", h, i)), i)
    return linear(p["head"], norm(p["last"], x))


def loss_with(place: str) -> Callable[..., Array]:
    """The cross entropy in training, with dropout in one place."""

    def loss(p: Tree, x: Array, labels: Array, key: Array) -> Array:
        def drop(here: str, x: Array, i: int) -> Array:
            mask = jax.random.bernoulli(jax.random.fold_in(key, i), 0.7, x.shape)
            return jnp.where(mask, x / 0.7, 0.0) if here == place else x

        picked = jax.nn.log_softmax(forward(p, x, drop))[jnp.arange(len(x)), labels]
        return -picked.mean()

    return loss


def evaluate(p: Tree, x: Array) -> Array:
    return forward(p, x, lambda place, x, i: x)


def training(place: str, **expected: Any) -> Case:
    labels = jnp.asarray([1, 4, 0, 2])
    return Case(
        {"loss": loss_with(place), "evaluate": evaluate},
        {
            "stem": linear_of(PATCH, TEXT),
            "blocks": blocks_of(mlp_of, TEXT),
            "last": norm_of(TEXT),
            "head": linear_of(TEXT, CLASSES),
        },
        {
            "loss": (floats(4, PATCH), labels, jax.random.key(1)),
            "evaluate": (floats(3, PATCH),),
        },
        {
            "loss": (floats(2, PATCH), labels[:2], jax.random.key(2)),
            "evaluate": (floats(6, PATCH),),
        },
        **expected,
    )


# Dropping elements of what a branch writes leaves a mean, and would notice that its last layer is
# centered: each sum behind it would need a centering of its own (2n, for one norm of n). So only
# the norm that reads the stem folds, and the evaluation has to leave those layers, too.
DROPPED = training(
    "branch",
    alone={"loss": (1, 0), "evaluate": (LAYERS + 1, 0)},
    joint={"loss": (1, 0), "evaluate": (1, 0)},
    refused=frozenset({("evaluate", "loss")}),
    kept=frozenset(f"blocks/{i}/down/{leaf}" for i in range(LAYERS) for leaf in "wb"),
)
# What is dropped inside of a branch goes through its last layer, which is linear.
DROPPED_INSIDE = training(
    "inside",
    alone={"loss": (LAYERS + 1, 0), "evaluate": (LAYERS + 1, 0)},
    joint={"loss": (LAYERS + 1, 0), "evaluate": (LAYERS + 1, 0)},
)


def trunk(p: Tree, x: Array) -> Array:
    x = linear(p["stem"], x)
    for each in p["blocks"].values():
        x = x + mlp(each, x)
    return x


def actor(p: Tree, x: Array) -> Array:
    return jax.nn.log_softmax(linear(p["policy"], norm(p["actor"], trunk(p, x))))


def critic(p: Tree, x: Array) -> Array:
    return linear(p["value"], norm(p["critic"], trunk(p, x)))[..., 0]


def raw_critic(p: Tree, x: Array) -> Array:
    return linear(p["value"], trunk(p, x))[..., 0]


def actor_and(critic: Callable[..., Array], **expected: Any) -> Case:
    return Case(
        {"actor": actor, "critic": critic},
        {
            "stem": linear_of(PATCH, TEXT),
            "blocks": blocks_of(mlp_of, TEXT),
            "actor": norm_of(TEXT),
            "critic": norm_of(TEXT),
            "policy": linear_of(TEXT, CLASSES),
            "value": linear_of(TEXT, 1),
        },
        {"actor": (floats(4, PATCH),), "critic": (floats(6, PATCH),)},
        {"actor": (floats(2, 3, PATCH),), "critic": (floats(1, PATCH),)},
        **expected,
    )


# Both heads norm the trunk's stream, each with a norm of its own.
ACTOR_CRITIC = actor_and(
    critic,
    alone={"actor": (LAYERS + 1, 0), "critic": (LAYERS + 1, 0)},
    joint={"actor": (LAYERS + 1, 0), "critic": (LAYERS + 1, 0)},
)
# The value is read from the stream itself, whose mean it sees: nothing that writes into the trunk
# may be centered, and in the actor a centering of each writer (2n) serves one norm (n) more.
RAW_CRITIC = actor_and(
    raw_critic,
    alone={"actor": (LAYERS + 1, 0), "critic": (0, 0)},
    joint={"actor": (0, 0), "critic": (0, 0)},
    refused=frozenset({("actor", "critic")}),
    kept=frozenset(
        [f"stem/{leaf}" for leaf in "wb"]
        + [f"blocks/{i}/down/{leaf}" for i in range(LAYERS) for leaf in "wb"]
    ),
)


def steps(p: Tree, tokens: Array, start: Any, cache: Tree, relative: bool) -> tuple[Array, Tree]:
    """Logits after tokens from position `start` on; `relative` ones see positions in scores."""
    places = jax.lax.dynamic_slice_in_dim(p["positions"], start, tokens.shape[1])
    x, new = p["tokens"][tokens] + places, {}
    for name, each in p["blocks"].items():
        h, bias = norm(each["one"], x), 0.0
        if relative:
            bias = jnp.einsum("bqd,kd->bqk", h @ p["relative"], p["positions"])[:, None]
        mixed, new[name] = cached(each["attention"], h, cache[name], start, bias)
        x = x + mixed
        x = x + mlp(each["mlp"], x)
    return linear(p["head"], norm(p["last"], x)), new


def prefill(p: Tree, tokens: Array, cache: Tree) -> tuple[Array, Tree]:
    return steps(p, tokens, 0, cache, relative=False)


def decode(p: Tree, token: Array, position: Any, cache: Tree) -> tuple[Array, Tree]:
    return steps(p, token, position, cache, relative=True)


POSITIONS = Case(
    {"prefill": prefill, "decode": decode},
    {
        "tokens": (VOCAB, TEXT),
        "positions": (CONTEXT, TEXT),
        "relative": (TEXT, TEXT),
        "blocks": blocks_of(block_of, TEXT),
        "last": norm_of(TEXT),
        "head": linear_of(TEXT, VOCAB),
    },
    {"prefill": (ids(2, 4), empty(2)), "decode": (ids(2, 1), jnp.int32(4), empty(2))},
    {"prefill": (ids(3, 7), empty(3)), "decode": (ids(1, 1), jnp.int32(9), empty(1))},
    # Decoding compares queries with the table of positions itself. What is looked up there is
    # centered explicitly, before it is added to all sequences of the batch (2n / batch, for 2L + 1
    # norms of n); the table of tokens is centered, as both tolerate that.
    alone={"prefill": (N_PRE_LN, 0), "decode": (N_PRE_LN, 1)},
    joint={"prefill": (N_PRE_LN, 1), "decode": (N_PRE_LN, 1)},
    refused=frozenset({("prefill", "decode")}),
    kept=frozenset({"positions"}),
)

CASES = {
    "clip": CLIP,
    "clip, shared": SHARED,
    "encoder-decoder": ENCODER_DECODER,
    "dropout": DROPPED,
    "dropout inside": DROPPED_INSIDE,
    "actor-critic": ACTOR_CRITIC,
    "raw critic": RAW_CRITIC,
    "positions": POSITIONS,
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# --- tests ---------------------------------------------------------------------------------------


def edited(plan: jax_lnfold.FoldPlan) -> set[str]:
    return {edit.key_path for edit in plan.edits}


@every_case
def test_one_plan_for_all(case: Case) -> None:
    given = case.params
    before = snapshot(given)
    served = fold(case.functions, given, case.inputs)
    for name, fn in case.functions.items():
        n_norms = max(case.alone[name][0], len(served[name].report.norms))
        assert counts(served[name].report) == (n_norms, *case.joint[name]), name
        for inputs in (case.inputs[name], case.other_inputs[name]):
            check_contracts(fn, given, served[name], *inputs, rtol=EXACT, before=before)
    # A function may run several times, or not at all, in what all of them run together.
    for i, count in enumerate(counts(served.report)):
        assert count == sum(counts(each.report)[i] for each in served.values())
    assert case.kept.isdisjoint(edited(served.plan))


@every_case
def test_plans_of_one_function_alone(case: Case) -> None:
    """Followed by another one they are refused, or right: never silently another model."""
    given, wanted = case.params, set[str]()
    run = {name: jax.jit(fn) for name, fn in case.functions.items()}
    want = {name: run[name](given, *inputs) for name, inputs in case.inputs.items()}
    for name, fn in case.functions.items():
        alone = fold(fn, given, *case.inputs[name])
        assert counts(alone.report)[1:] == case.alone[name], name
        wanted |= edited(alone.plan)
        for other in case.functions.keys() - {name}:
            apply, inputs = case.functions[other], case.inputs[other]
            difference = relative_difference(run[other](alone.params, *inputs), want[other])
            if (name, other) in case.refused:
                assert difference > 1e-4, "refused for nothing"
                with pytest.raises(PlanMismatchError, match="or fold the functions together"):
                    fold(apply, alone.params, *inputs, plan=alone.plan)
                continue
            assert difference <= EXACT
            follows = fold(apply, alone.params, *inputs, plan=alone.plan)
            got = jax.jit(follows.apply)(alone.params, *inputs)
            assert relative_difference(got, want[other]) <= EXACT
    plan = jax_lnfold.plan_fold(case.functions, given, case.inputs)
    assert case.kept == wanted - edited(plan)


@every_case
def test_weights_do_not_change_the_plan(case: Case) -> None:
    """An edit is free, and noticed by none, so what one function gains costs no other one anything.

    What is paid for, the means of norms and explicit centerings, is each function's own: with all
    edits made that all of them tolerate, each is at its best, however often it runs.
    """
    shapes = jax.eval_shape(lambda x: x, case.params)
    plan = jax_lnfold.plan_fold(case.functions, shapes, case.inputs)
    for often in case.functions:
        weights = {name: 1000 if name == often else 1 for name in case.functions}
        weighed = jax_lnfold.plan_fold(case.functions, shapes, case.inputs, weights=weights)
        assert weighed == plan


@pytest.mark.parametrize("case", [DROPPED, DROPPED_INSIDE], ids=["branch", "inside"])
def test_gradients_of_a_loss(case: Case) -> None:
    given = case.params
    served = fold(case.functions, given, case.inputs)
    loss, plan = case.functions["loss"], served.plan
    for inputs in (case.inputs["loss"], case.other_inputs["loss"]):
        want = jax.jit(jax.grad(loss))(given, *inputs)

        def centered(p: Tree, inputs: Any = inputs) -> Array:
            return served["loss"].apply(plan.center(p), *inputs)

        assert relative_difference(jax.jit(jax.grad(centered))(given), want) < 1e-11
        direct = jax.jit(jax.grad(served["loss"].apply))(served.params, *inputs)
        assert relative_difference(plan.center(direct), want) < 1e-11


def test_dropout_taken_for_the_identity() -> None:
    """In training an approximation, which is measured; the evaluation stays exact."""
    case, given = DROPPED, DROPPED.params
    served = fold(case.functions, given, case.inputs, approximate={"dropout"})
    assert case.kept <= edited(served.plan)
    for name, approximate in {"loss": LAYERS, "evaluate": 0}.items():
        report = served[name].report
        assert counts(report)[1:] == (LAYERS + 1, 0)
        assert sum(each.approximate for each in report.norms) == approximate
    for inputs in (case.inputs["evaluate"], case.other_inputs["evaluate"]):
        check_contracts(evaluate, given, served["evaluate"], *inputs, rtol=EXACT)
    inputs = case.inputs["loss"]
    want, got = case.functions["loss"](given, *inputs), served["loss"](*inputs)
    deviation = float(abs(got - want) / abs(want))
    assert deviation > 1e-6
    assert served["loss"].report.deviation == pytest.approx(deviation, rel=1e-9)
    assert served.report.deviation == served["loss"].report.deviation
    assert served["evaluate"].report.deviation is None
    assert f"deviation {deviation:.2g} of the largest output" in " ".join(
        str(served.report).split()
    )
    # Nor does it matter that the edited arrays are those that were passed.
    donated = jax.tree.map(jnp.array, given)
    again = fold(case.functions, donated, case.inputs, approximate={"dropout"}, donate=True)
    assert again["loss"].report.deviation == pytest.approx(deviation, rel=1e-9)
    assert all(x.is_deleted() for path, x in leaf_paths(donated) if path in case.kept)
    # The plan that is exact for the evaluation alone is the same one, and is not for the loss.
    alone = fold(evaluate, given, *case.inputs["evaluate"])
    assert alone.plan == served.plan
    with pytest.raises(PlanMismatchError, match="dropout"):
        fold(case.functions["loss"], alone.params, *inputs, plan=alone.plan)


@every_case
def test_scales_and_shifts_together(case: Case) -> None:
    """What one function has taken up by its readers, another one reads, too, or it stays."""
    given, options = case.params, {"fold_affine": True, "defer_scale": True, "deferred_cost": 0}
    served = fold(case.functions, given, case.inputs, **options)
    assert served.plan.affine, "nothing to see here"
    assert all(each.plan == served.plan for each in served.values())
    for name, fn in case.functions.items():
        assert counts(served[name].report)[1:] == case.joint[name]
        check_contracts(fn, given, served[name], *case.other_inputs[name], rtol=EXACT)
