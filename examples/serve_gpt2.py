"""Serve a language model of GPT-2's size (124 M) from a checkpoint that was centered on disk.

Run with ``python examples/serve_gpt2.py``; it takes under two minutes on two CPU cores and
downloads nothing. Prefill and decode read one tree, so they are folded together, before there are
weights:

1. one plan for both, from shapes alone, is written to a file;
2. the command line centers a checkpoint of the original weights with that file;
3. both programs are compiled, still from shapes alone;
4. the centered weights are loaded and served as they are.

The weights are random and untrained, with scales and shifts moved away from one and zero.
The example exits with a message unless 64 tokens are those of the original model on the original
weights, and unless that is no luck: the best logit must lead by more than the programs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from safetensors import safe_open

import jax_lnfold

PyTree: TypeAlias = Any
Functions: TypeAlias = Mapping[str, Callable[..., Any]]

WAYS = {
    "original": "loads the original weights and folds them",
    "donated": "the same with donate=True",
    "centered": "loads the centered checkpoint",
}
"""How a process may come by the edited tree."""


class Block(nn.Module):
    """A pre-LN transformer block whose keys and values are kept in a cache."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, cache: jax.Array, start: Any) -> tuple[jax.Array, jax.Array]:
        """Maps ``x [batch, tokens, width]``, at positions from `start` on, to the same shape.

        The cache is ``[2, batch, context, heads, features]``: keys, and values.
        """
        width, split = x.shape[-1], (*x.shape[:2], 3, self.heads, -1)
        qkv = nn.Dense(3 * width, name="qkv")(nn.LayerNorm(name="norm_1")(x)).reshape(split)
        new = jnp.moveaxis(qkv[:, :, 1:], 2, 0)
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=2)
        seen = jnp.arange(cache.shape[2]) <= start + jnp.arange(x.shape[1])[:, None]
        mixed = nn.dot_product_attention(qkv[:, :, 0], *cache, mask=seen)
        x = x + nn.Dense(width, name="out")(mixed.reshape(x.shape))
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(width, name="down")(hidden), cache


class GPT2(nn.Module):
    """GPT-2: learned positions, pre-LN blocks, logits by the table of tokens itself."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int

    @nn.compact
    def __call__(
        self, tokens: jax.Array, start: Any, cache: list[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The logits ``[batch, vocabulary]`` after the last token, and the cache with all."""
        table = nn.Embed(self.vocabulary, self.width, name="tokens")
        init = nn.initializers.normal(0.02)
        positions = self.param("positions", init, (self.context, self.width))
        x = table(tokens) + jax.lax.dynamic_slice_in_dim(positions, start, tokens.shape[1])
        new = []
        for i, old in enumerate(cache):
            x, kept = Block(self.heads, name=f"block_{i}")(x, old, start)
            new.append(kept)
        return table.attend(nn.LayerNorm(name="last")(x[:, -1])), new

    def empty(self, batch: int) -> list[jax.Array]:
        """The cache before any token."""
        shape = (2, batch, self.context, self.heads, self.width // self.heads)
        return [jnp.zeros(shape) for _ in range(self.layers)]


def functions_of(model: GPT2) -> dict[str, Callable[..., Any]]:
    """The two functions that a server runs; both take the cache last."""

    def prefill(params: PyTree, tokens: jax.Array, cache: PyTree) -> Any:
        return model.apply(params, tokens, 0, cache)

    def decode(params: PyTree, token: jax.Array, position: jax.Array, cache: PyTree) -> Any:
        return model.apply(params, token, position, cache)

    return {"prefill": prefill, "decode": decode}


def shapes_of(model: GPT2, prompt: int, batch: int) -> tuple[PyTree, dict[str, tuple[Any, ...]]]:
    """Shapes of the parameters, and of the inputs of both functions."""
    tokens, token = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (prompt, 1))
    cache = jax.eval_shape(lambda: model.empty(batch))
    params = jax.eval_shape(lambda t, c: model.init(jax.random.key(0), t, 0, c), token, cache)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    return params, {"prefill": (tokens, cache), "decode": (token, position, cache)}


# --- checkpoints ---------------------------------------------------------------------------------


def leaf_names(tree: PyTree) -> list[str]:
    """What the leaves of a tree are called in a checkpoint, in tree order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def write_weights(path: Path, shapes: PyTree, seed: int) -> None:
    """Draws kernels that keep the size of what they read, so that what is generated varies."""
    rng, weights = np.random.default_rng(seed), {}
    for name, leaf in zip(leaf_names(shapes), jax.tree.leaves(shapes), strict=True):
        noise = rng.standard_normal(leaf.shape, np.float32)
        kind = name.rpartition(".")[2]
        sizes = {"kernel": len(noise) ** -0.5, "scale": 0.2, "bias": 0.05}
        weights[name] = noise * np.float32(sizes.get(kind, 0.02)) + np.float32(kind == "scale")
    safetensors.numpy.save_file(weights, path)


def load(path: Path, shapes: PyTree) -> PyTree:
    """The tree in a checkpoint, read leaf by leaf.

    The largest first, while there is room for its copies; then the file is closed again, so that
    its pages in memory do not add up.
    """
    sizes = dict(zip(leaf_names(shapes), (x.size for x in jax.tree.leaves(shapes)), strict=True))
    leaves = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        with safe_open(path, "numpy") as file:
            leaves[name] = jnp.asarray(file.get_tensor(name))
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in sizes])


def run(*command: str | Path) -> str:
    """What a Python process prints that finds the modules found here."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *command], env=env, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


# --- memory --------------------------------------------------------------------------------------


def live_bytes() -> int:
    """The bytes of all JAX arrays there are."""
    return sum(x.nbytes for x in jax.live_arrays())


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: on Linux, ru_maxrss remembers the parent's
        (line,) = (s for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_of(way: str, folder: Path, model: GPT2, prompt: int, batch: int) -> dict[str, int]:
    """What it takes to come by the edited tree, in one of `WAYS`, in this process."""
    shapes, inputs = shapes_of(model, prompt, batch)
    if way == "centered":
        params = load(folder / "centered.safetensors", shapes)
        jax.block_until_ready(params)
        together = live_bytes()
    else:
        given = load(folder / "original.safetensors", shapes)
        donate = way == "donated"
        params = jax_lnfold.fold(functions_of(model), given, inputs, donate=donate).params
        jax.block_until_ready(params)
        together = live_bytes()
        del given
    return {"together": together, "alone": live_bytes(), "peak": peak_bytes()}


def print_memory(folder: Path, argv: Sequence[str]) -> None:
    """Measures all `WAYS`, each in a process of its own."""
    print("memory, MB:                                  arrays at once  arrays kept  peak RSS")
    for way, words in WAYS.items():
        found = json.loads(run(__file__, *argv, "--memory-of", way, "--folder", folder))
        sizes = (found[name] / 1e6 for name in ("together", "alone", "peak"))
        print("  {:42} {:14,.1f} {:12,.1f} {:9,.0f}".format(words, *sizes))


# --- programs ------------------------------------------------------------------------------------


class Generated(NamedTuple):
    """Tokens ``[n]`` and the logits ``[n, vocabulary]`` they are the best of, row after row."""

    tokens: np.ndarray
    logits: np.ndarray
    seconds: float


def compiled(functions: Functions, shapes: PyTree, inputs: Mapping[str, Any]) -> Functions:
    """The programs for these shapes, which write the new cache over the old one."""
    return {
        name: jax.jit(fn, donate_argnums=len(inputs[name])).lower(shapes, *inputs[name]).compile()
        for name, fn in functions.items()
    }


def generate(
    programs: Functions, params: PyTree, prompt: np.ndarray, cache: PyTree, count: int
) -> Generated:
    """The best token again and again, after a prompt ``[batch, tokens]``."""
    jax.block_until_ready(cache)
    first, tokens, start = cache, [], time.perf_counter()
    logits, cache = programs["prefill"](params, prompt, cache)
    found = [np.asarray(logits)]
    for position in range(prompt.shape[1], prompt.shape[1] + count - 1):
        tokens.append(found[-1].argmax(-1).astype(np.int32)[:, None])
        logits, cache = programs["decode"](params, tokens[-1], np.int32(position), cache)
        found.append(np.asarray(logits))
    seconds = time.perf_counter() - start
    if not all(x.is_deleted() for x in jax.tree.leaves(first)):
        sys.exit("error: the cache was copied, not donated")
    every = np.concatenate(found)
    return Generated(every.argmax(-1), every, seconds)


def smallest_lead(original: np.ndarray, folded: np.ndarray) -> tuple[float, float]:
    """By how much the best of the original logits leads, and by how much both differ, at most.

    Exits unless the first is more than twice the second: only then is the best token of both the
    same by necessity. Both are ``[tokens, vocabulary]``.
    """
    second, best = np.partition(original, -2, axis=-1)[:, -2:].T
    lead, difference = float((best - second).min()), float(np.abs(original - folded).max())
    if not lead > 2 * difference:
        sys.exit(f"error: the best logit leads by {lead:.1e}, it differs by {difference:.1e}")
    return lead, difference


# --- the example ---------------------------------------------------------------------------------


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long something took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The sizes: by default those of GPT-2."""
    parser = argparse.ArgumentParser(description="Serve a folded model of GPT-2's size.")
    sizes = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "context": 128}
    numbers = sizes | {"batch": 1, "prompt": 32, "tokens": 64, "rounds": 4, "seed": 0}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--memory-of", choices=WAYS, help="measure this way in --folder only")
    parser.add_argument("--folder", type=Path, help="where --memory-of finds the checkpoints")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example; exits with a message if a result is not as promised."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    model = GPT2(args.layers, args.width, args.heads, args.vocabulary, args.context)
    if args.memory_of:
        found = memory_of(args.memory_of, args.folder, model, args.prompt, args.batch)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        serve(model, args, Path(folder))
        print_memory(Path(folder), argv)


def serve(model: GPT2, args: argparse.Namespace, folder: Path) -> None:
    """Plans, centers, compiles, loads, and compares with the original model."""
    functions = functions_of(model)
    shapes, inputs = shapes_of(model, args.prompt, args.batch)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    print(f"{count / 1e6:.1f} M parameters, {args.layers} layers: random weights, seed {args.seed}")

    with timed("plan for prefill and decode, from shapes alone"):
        plan = jax_lnfold.plan_fold(functions, shapes, inputs)
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    with timed("random weights written"):
        write_weights(folder / "original.safetensors", shapes, args.seed)
    names = [folder / f"{name}.safetensors" for name in ("original", "centered")]
    with timed("checkpoint centered"):
        print(run("-m", "jax_lnfold", "center", folder / "plan.json", *names))

    plan = jax_lnfold.FoldPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    with timed("folded as the plan says, from shapes alone"):
        served = jax_lnfold.fold(functions, shapes, inputs, plan=plan)
    for name, each in served.items():
        done, norms, explicit = each.report.n_folded, each.report.norms, each.report.n_inserted
        print(f"{name}: {done} of {len(norms)} LayerNorms fold, {explicit} explicit centering")
    with timed("prefill and decode compiled, from shapes alone"):
        programs = compiled({name: f.apply for name, f in served.items()}, shapes, inputs)
    with timed("the original ones compiled"):
        originals = compiled(functions, shapes, inputs)
    with timed("weights loaded"):
        given, params = (load(name, shapes) for name in names)
    check_centered(plan, given, params)
    prompt = np.random.default_rng(args.seed).integers(
        args.vocabulary, size=(args.batch, args.prompt), dtype=np.int32
    )
    generated = (
        generate(functions, tree, prompt, model.empty(args.batch), args.tokens)
        for functions, tree in ((originals, given), (programs, params), (originals, params))
    )
    check_tokens(*generated)
    del given
    time_both(
        {"original": originals, "folded": programs},
        lambda programs: generate(programs, params, prompt, model.empty(args.batch), args.tokens),
        args.rounds,
    )
    check_file(names[1], params)


def check_centered(plan: jax_lnfold.FoldPlan, given: PyTree, params: PyTree) -> None:
    """Exits unless the loaded tree is centered, so that nothing of it is edited again."""
    if plan.is_centered(given) or not plan.is_centered(params):
        sys.exit("error: the checkpoint is not what the plan says; center it again")
    again = zip(jax.tree.leaves(plan.center(params)), jax.tree.leaves(params), strict=True)
    edited = sum(new is not old for new, old in again)
    print(f"plan.is_centered: True; leaves that plan.center edits a second time: {edited}")
    if edited:
        sys.exit("error: centered parameters were edited again")


def check_file(path: Path, params: PyTree) -> None:
    """Exits unless the tree that was served is that of the file, bit by bit."""
    stored = safetensors.numpy.load_file(path)
    named = dict(zip(leaf_names(params), map(np.asarray, jax.tree.leaves(params)), strict=True))
    same = stored.keys() == named.keys() and all(
        stored[name].dtype == x.dtype and np.array_equal(stored[name].view("u4"), x.view("u4"))
        for name, x in named.items()
    )
    print(f"the tree that was served has the bits of the file: {same}")
    if not same:
        sys.exit("error: the parameters that were served are not those of the file")


def check_tokens(original: Generated, folded: Generated, on_centered: Generated) -> None:
    """Exits unless the tokens of all are those of the original model on the original weights.

    `on_centered` is the original model on the centered weights.
    """
    for what, other in {"folded": folded, "original on the centered weights": on_centered}.items():
        n, n_equal = original.tokens.size, int((original.tokens == other.tokens).sum())
        print(f"{what}: {n_equal} of {n} tokens are those of the original on the original weights")
        if n_equal != n:
            sys.exit(f"error: {n - n_equal} of {n} tokens changed")
        lead, difference = smallest_lead(original.logits, other.logits)
        print(
            f"  the best logit leads by {lead:.1e} or more, and differs by {difference:.1e} at most"
        )
    largest, n_different = np.abs(original.logits).max(), len({*original.tokens.tolist()})
    print(f"  (logits up to {largest:.2g}; {n_different} different tokens)")


def time_both(
    programs: Mapping[str, Functions], run: Callable[[Functions], Generated], rounds: int
) -> None:
    """Runs both in turn, on the same weights: where these lie in memory makes a difference."""
    found: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds):
        for name in [*programs] if i % 2 else [*programs][::-1]:
            done = run(programs[name])
            found[name].append(done.tokens.size / done.seconds)
    for name, speeds in found.items():
        print(f"{name}: {spread(speeds)} tokens/s")
    print_verdict([f / o for o, f in zip(*found.values(), strict=True)])


def spread(numbers: Iterable[float]) -> str:
    """The median, and the extremes."""
    low, middle, high = np.quantile([*numbers], (0, 0.5, 1))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def print_verdict(ratios: Sequence[float]) -> None:
    """Says what was gained, if all rounds agree that there was anything."""
    verdict = f"on this {jax.default_backend()} nothing is gained beyond the spread"
    if min(ratios) > 1 or max(ratios) < 1:
        verdict = f"{'faster' if min(ratios) > 1 else 'slower'} in every round"
    print(f"folded against original, by rounds: {spread(ratios)} times the speed: {verdict}")


if __name__ == "__main__":
    main()
