"""ViT and GPT-2 in PyTorch, as in `models`, with LayerNorms or with RMSNorms.

Parameters are those of the JAX model: the RMSNorms take the ones that a plan has edited.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .models import Config

EPSILON = 1e-6


class Transformer(nn.Module):
    """What both models share: the blocks and the norms, from a tree of arrays.

    With `rms` the norms are RMSNorms; those whose key path is in `folded` have lost scale and
    shift to the layers behind them.
    """

    def __init__(
        self, config: Config, params: Mapping[str, Any], rms: bool, folded: Collection[str] = ()
    ) -> None:
        """Build it from `params`."""
        super().__init__()
        self.config, self.rms, self.folded = config, rms, folded
        names = [f"block_{i}" for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn_norm": self.norm(params[name]["attn_norm"], f"{name}/attn_norm"),
                    "mlp_norm": self.norm(params[name]["mlp_norm"], f"{name}/mlp_norm"),
                    **{part: linear(params[name][part]) for part in ("qkv", "out", "fc1", "fc2")},
                }
            )
            for name in names
        )
        self.final_norm = self.norm(params["final_norm"], "final_norm")

    def norm(self, params: Mapping[str, Any], path: str) -> nn.Module:
        """A LayerNorm, or an RMSNorm and the shift that is left."""
        width = self.config.width
        if not self.rms:
            made = nn.LayerNorm(width, EPSILON)
            made.weight, made.bias = parameter(params["scale"]), parameter(params["bias"])
            return made
        if path in self.folded:
            return nn.RMSNorm(width, EPSILON, elementwise_affine=False)
        made = nn.RMSNorm(width, EPSILON)
        made.weight = parameter(params["scale"])
        return nn.Sequential(made, Shift(params["bias"]))

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """All blocks and the final norm."""
        heads, causal = self.config.heads, self.config.causal
        for block in self.blocks:
            h = block["attn_norm"](x)
            qkv = block["qkv"](h).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(*qkv, is_causal=causal)
            x = x + block["out"](y.transpose(1, 2).flatten(2))
            h = functional.gelu(block["fc1"](block["mlp_norm"](x)), approximate="tanh")
            x = x + block["fc2"](h)
        return self.final_norm(x)


class ViT(Transformer):
    """As `models.ViT`."""

    def __init__(
        self, config: Config, params: Mapping[str, Any], rms: bool, folded: Collection[str] = ()
    ) -> None:
        """Build it from `params`."""
        super().__init__(config, params, rms, folded)
        kernel = np.asarray(params["patches"]["kernel"])
        self.patches = nn.Conv2d(3, config.width, kernel.shape[0], kernel.shape[0])
        self.patches.weight = parameter(kernel.transpose(3, 2, 0, 1))
        self.patches.bias = parameter(params["patches"]["bias"])
        self.cls, self.positions = parameter(params["cls"]), parameter(params["positions"])
        self.head = linear(params["head"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps ``[batch, height, width, 3]`` to logits."""
        x = self.patches(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.run_blocks(x)[:, 0])


class GPT(Transformer):
    """As `models.GPT`."""

    def __init__(
        self, config: Config, params: Mapping[str, Any], rms: bool, folded: Collection[str] = ()
    ) -> None:
        """Build it from `params`."""
        super().__init__(config, params, rms, folded)
        self.tokens = parameter(params["tokens"]["embedding"])
        self.positions = parameter(params["positions"]["embedding"])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ``[batch, tokens]`` to logits."""
        x = functional.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        if self.rms:  # the table is tied to the logits: nobody may center it
            x = x - x.mean(-1, keepdim=True)
        return functional.linear(self.run_blocks(x), self.tokens)


class Shift(nn.Module):
    """Adds a parameter: RMSNorm has none to add."""

    def __init__(self, shift: Any) -> None:
        """Add `shift`."""
        super().__init__()
        self.shift = parameter(shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return x + self.shift


def linear(params: Mapping[str, Any]) -> nn.Linear:
    """A Dense layer."""
    made = nn.Linear(*params["kernel"].shape)
    made.weight = parameter(np.asarray(params["kernel"]).T)
    made.bias = parameter(params["bias"])
    return made


def parameter(x: Any) -> nn.Parameter:
    """A copy of an array."""
    return nn.Parameter(torch.tensor(np.ascontiguousarray(x)), requires_grad=False)
