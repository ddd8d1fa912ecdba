"""Weights of PyTorch models, centered on disk with the plan of their JAX twins.

The same file then serves the PyTorch model and its twin with RMSNorms. Needs `.[transformers]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers as hf

from jax_lnfold import FoldPlan, analyze, plan_fold
from jax_lnfold.cli.commands import main

LAYERS, VOCAB, POSITIONS, D, H, K, HIDDEN = 3, 19, 11, 10, 3, 4, 14
EPS, QK_EPS = 1e-5, 1e-6
Norm = Callable[..., torch.nn.Module]


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class ShiftedRMSNorm(torch.nn.RMSNorm):
    """PyTorch's own has no bias."""

    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        super().__init__(size, eps)
        self.bias = torch.nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x if self.bias is None else x + self.bias


class Attention(torch.nn.Module):
    """With norms of queries and keys; its projections are one or three."""

    def __init__(self, norm: Norm, fused: bool) -> None:
        super().__init__()
        if fused:
            self.qkv = torch.nn.Linear(D, 3 * H * K)
        else:
            self.q, self.k, self.v = (torch.nn.Linear(D, H * K) for _ in range(3))
        self.q_norm, self.k_norm = (norm(K, eps=QK_EPS, bias=False) for _ in range(2))
        self.out = torch.nn.Linear(H * K, D)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joint = (
            self.qkv(x) if self.fused else torch.cat([f(x) for f in (self.q, self.k, self.v)], -1)
        )
        q, k, v = joint.unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(torch.nn.Module):
    def __init__(self, norm: Norm, fused: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = norm(D, eps=EPS), norm(D, eps=EPS)
        self.attn = Attention(norm, fused)
        self.up, self.down = torch.nn.Linear(D, HIDDEN), torch.nn.Linear(HIDDEN, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Transformer(torch.nn.Module):
    def __init__(self, norm: Norm, fused: bool) -> None:
        super().__init__()
        self.embed, self.positions = torch.nn.Embedding(VOCAB, D), torch.nn.Embedding(POSITIONS, D)
        self.h = torch.nn.ModuleList(Block(norm, fused) for _ in range(LAYERS))
        self.ln, self.head = norm(D, eps=EPS), torch.nn.Linear(D, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.head(self.ln(x))


# --- their twins in Flax -------------------------------------------------------------------------


class FusedAttention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(nn.DenseGeneral((3, H, K), name="qkv")(x), -3, 0)
        q, k = (
            nn.LayerNorm(epsilon=QK_EPS, use_bias=False, name=name)(y)
            for name, y in (("query_ln", q), ("key_ln", k))
        )
        return nn.DenseGeneral(D, axis=(-2, -1), name="out")(nn.dot_product_attention(q, k, v))


class FlaxBlock(nn.Module):
    fused: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        split = {"num_heads": H, "qkv_features": H * K, "normalize_qk": True}
        y = nn.LayerNorm(epsilon=EPS, name="ln_1")(x)
        x = x + (
            FusedAttention(name="attn")(y)
            if self.fused
            else nn.MultiHeadDotProductAttention(**split, name="attn")(y)
        )
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(epsilon=EPS, name="ln_2")(x)), False)
        return x + nn.Dense(D, name="down")(y)


class FlaxTransformer(nn.Module):
    fused: bool

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, D, name="embed")(ids)
        x = x + nn.Embed(POSITIONS, D, name="positions")(jnp.arange(ids.shape[1]))
        for i in range(LAYERS):
            x = FlaxBlock(self.fused, name=f"h_{i}")(x)
        x = nn.LayerNorm(epsilon=EPS, name="ln")(x)
        return nn.Dense(VOCAB, use_bias=False, name="head")(x)


# --- where the leaves of the twins are -----------------------------------------------------------

TURN = {"transpose": [1, 0]}


def at(name: str, *steps: Any) -> Any:
    return {"name": name, "steps": [*steps]}


REST: dict[str, Any] = {
    "params/embed/embedding": "embed.weight",
    "params/positions/embedding": "positions.weight",
    "params/h_{}/ln_1/scale": "h.{}.ln_1.weight",
    "params/h_{}/ln_1/bias": "h.{}.ln_1.bias",
    "params/h_{}/ln_2/scale": "h.{}.ln_2.weight",
    "params/h_{}/ln_2/bias": "h.{}.ln_2.bias",
    "params/h_{}/attn/query_ln/scale": "h.{}.attn.q_norm.weight",
    "params/h_{}/attn/key_ln/scale": "h.{}.attn.k_norm.weight",
    "params/h_{}/attn/out/kernel": at("h.{}.attn.out.weight", TURN, {"reshape": [H, K, D]}),
    "params/h_{}/attn/out/bias": "h.{}.attn.out.bias",
    "params/h_{}/up/kernel": at("h.{}.up.weight", TURN),
    "params/h_{}/up/bias": "h.{}.up.bias",
    "params/h_{}/down/kernel": at("h.{}.down.weight", TURN),
    "params/h_{}/down/bias": "h.{}.down.bias",
    "params/ln/scale": "ln.weight",
    "params/ln/bias": "ln.bias",
    "params/head/kernel": at("head.weight", TURN),
}
PARTS = {"query": [0, 0, H * K], "key": [0, H * K, 2 * H * K], "value": [0, 2 * H * K, 3 * H * K]}
ATTENTION: dict[str, tuple[bool, dict[str, Any]]] = {
    "one kernel in PyTorch, three in Flax": (
        True,
        {
            f"params/h_{{}}/attn/{name}/kernel": at(
                "h.{}.attn.qkv.weight", {"slice": part}, TURN, {"reshape": [D, H, K]}
            )
            for name, part in PARTS.items()
        }
        | {
            f"params/h_{{}}/attn/{name}/bias": at(
                "h.{}.attn.qkv.bias", {"slice": part}, {"reshape": [H, K]}
            )
            for name, part in PARTS.items()
        },
    ),
    "three kernels in PyTorch, one in Flax": (
        False,
        {
            "params/h_{}/attn/qkv/kernel": {
                "concat": [
                    at(f"h.{{}}.attn.{x}.weight", TURN, {"reshape": [D, 1, H, K]}) for x in "qkv"
                ],
                "axis": 1,
            },
            "params/h_{}/attn/qkv/bias": {
                "concat": [at(f"h.{{}}.attn.{x}.bias", {"reshape": [1, H, K]}) for x in "qkv"],
                "axis": 0,
            },
        },
    ),
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters that hide nothing: no zeros, no ones, and means everywhere."""
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn(x.shape) + 0.2 * torch.rand(x.shape[-1:]) + 0.1)
    return model.eval()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def center(plan: FoldPlan, keys: Any, state: dict[str, torch.Tensor], folder: Path) -> Any:
    """What the command line makes of a state dict."""
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "keys.json").write_text(json.dumps(keys))
    names = ("plan.json", "model.safetensors", "centered.safetensors")
    paths = [str(folder / name) for name in names]
    assert main(["center", *paths, "--keys", str(folder / "keys.json")]) == 0
    return safetensors.torch.load_file(folder / "centered.safetensors")


@pytest.mark.parametrize(("fused", "attention"), ATTENTION.values(), ids=ATTENTION)
def test_transformer(tmp_path: Path, fused: bool, attention: dict[str, Any]) -> None:
    flax, x = FlaxTransformer(not fused), jax.ShapeDtypeStruct((2, POSITIONS), jnp.int32)
    variables = jax.eval_shape(flax.init, jax.random.key(0), x)
    plan = plan_fold(flax.apply, variables, x)
    model = randomized(Transformer(torch.nn.LayerNorm, fused))
    twin = Transformer(ShiftedRMSNorm, fused).eval()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    new = center(plan, REST | attention, state, tmp_path)
    changed = {name for name in state if not torch.equal(new[name], state[name])}
    assert {name.removeprefix("h.0.") for name in changed if name[:2] in ("h.", "em")} >= {
        "embed.weight", "attn.out.weight", "attn.out.bias", "down.weight", "down.bias",
        *(f"attn.{n}.{p}" for n in (("qkv",) if fused else "qk") for p in ("weight", "bias")),
    }  # fmt: skip
    if fused:  # values are left as they are
        for name in ("h.0.attn.qkv.weight", "h.2.attn.qkv.bias"):
            assert torch.equal(new[name][2 * H * K :], state[name][2 * H * K :])
            assert not torch.isclose(new[name][: 2 * H * K], state[name][: 2 * H * K]).any()
    ids = torch.randint(VOCAB, (5, POSITIONS - 2))
    with torch.no_grad():
        want = model(ids)
        model.load_state_dict(new)
        assert difference(want, model(ids)) < 1e-12
        twin.load_state_dict(new)
        assert difference(want, twin(ids)) < 1e-12
        twin.load_state_dict(state)  # the near miss
        assert difference(want, twin(ids)) > 1e-2


@pytest.mark.parametrize("fused", [False, True])
def test_all_layer_norms_of_the_twin_fold(fused: bool) -> None:
    """So every LayerNorm of the PyTorch model may be replaced, and there is nothing else to do."""
    flax, x = FlaxTransformer(fused), jax.ShapeDtypeStruct((2, POSITIONS), jnp.int32)
    report = analyze(flax.apply, jax.eval_shape(flax.init, jax.random.key(0), x), x)
    assert report.n_folded == len(report.norms) == 4 * LAYERS + 1
    assert report.n_inserted == 0


# --- a model of transformers ---------------------------------------------------------------------

GPT2: dict[str, Any] = {
    "wte/embedding": "wte.weight",
    "wpe/embedding": "wpe.weight",
    "ln_f/scale": "ln_f.weight",
    "ln_f/bias": "ln_f.bias",
    **{f"h/{{}}/{n}/scale": f"h.{{}}.{n}.weight" for n in ("ln_1", "ln_2")},
    **{f"h/{{}}/{n}/bias": f"h.{{}}.{n}.bias" for n in ("ln_1", "ln_2")},
    **{
        f"h/{{}}/{n.replace('.', '/')}/{part}": at(f"h.{{}}.{n}.{name}", *steps)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for part, name, steps in (("kernel", "weight", [TURN]), ("bias", "bias", []))
    },
}


def shifted(norm: torch.nn.LayerNorm) -> ShiftedRMSNorm:
    return ShiftedRMSNorm(*norm.normalized_shape, norm.eps)


def test_gpt2(tmp_path: Path) -> None:
    """Of Hugging Face: the plan is that of their Flax model, the weights are of their PyTorch's."""
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=12, n_layer=2, n_head=3, n_inner=HIDDEN,
        attn_implementation="eager",
    )  # fmt: skip
    flax = hf.FlaxGPT2Model(config, _do_init=False)
    ids = jax.ShapeDtypeStruct((2, POSITIONS), jnp.int32)
    plan = plan_fold(lambda p, x: flax(x, params=p).last_hidden_state, flax.params_shape_tree, ids)
    model, twin = (randomized(hf.GPT2Model(config).double()) for _ in range(2))
    for block in twin.h:
        block.ln_1, block.ln_2 = shifted(block.ln_1), shifted(block.ln_2)
    twin.ln_f = shifted(twin.ln_f)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    new = center(plan, GPT2, state, tmp_path)
    x = torch.randint(VOCAB, (3, POSITIONS))
    with torch.no_grad():
        want = model(x).last_hidden_state
        model.load_state_dict(new)
        assert difference(want, model(x).last_hidden_state) < 1e-12
        twin.load_state_dict(new)
        assert difference(want, twin(x).last_hidden_state) < 1e-12
        twin.load_state_dict(state)
        assert difference(want, twin(x).last_hidden_state) > 1e-2


def test_a_tied_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the model of the plan has two leaves and the file of PyTorch has one."""
    flax, x = FlaxTransformer(False), jax.ShapeDtypeStruct((2, POSITIONS), jnp.int32)
    plan = plan_fold(flax.apply, jax.eval_shape(flax.init, jax.random.key(0), x), x)
    model = randomized(Transformer(torch.nn.LayerNorm, True))
    model.head.weight = model.embed.weight
    source, dest, plan_file, keys = (tmp_path / name for name in ("a", "b", "plan", "keys"))
    safetensors.torch.save_model(model, str(source))  # keeps one of the two names
    plan_file.write_text(plan.to_json())
    tables = {"embed.weight", "head.weight"}
    (kept,) = tables & safetensors.torch.load_file(source).keys()
    (dropped,) = tables - {kept}
    for name, message in (
        (dropped, f"{dropped!r} is not in the checkpoint"),
        (kept, "share stored numbers with others: 'params/head/kernel' and 'params/embed/embedd"),
    ):
        tied = {"params/embed/embedding": kept, "params/head/kernel": at(name, TURN)}
        _, attention = ATTENTION["one kernel in PyTorch, three in Flax"]
        keys.write_text(json.dumps(REST | attention | tied))
        argv = [str(file) for file in (plan_file, source, dest)]
        assert main(["center", *argv, "--keys", str(keys)]) == 1
        assert message in capsys.readouterr().err
    assert not dest.exists()
