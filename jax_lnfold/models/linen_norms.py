"""LayerNorms of Flax linen: marked, and replaced by RMSNorms, where they are called."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import fields
from typing import Any

import jax
from flax import linen as nn

from .norm_calls import NormCalls

Interceptor = Callable[..., Any]


def marked(module: nn.Module, calls: NormCalls) -> Callable[..., Any]:
    """``module.apply`` with every call of a LayerNorm with a mark of its own."""

    def intercept(call: Any, args: Any, keywords: Any, context: Any) -> Any:
        if not _is_norm_call(context):
            return call(*args, **keywords)
        with calls.mark(_path(context.module)):
            return call(*args, **keywords)

    def apply(variables: Any, *inputs: Any, **keywords: Any) -> Any:
        with nn.intercept_methods(intercept):
            return module.apply(variables, *inputs, **keywords)

    return apply


class WithRMSNorms(nn.Module):
    """A module in which `nn.RMSNorm` runs in place of some LayerNorms.

    Its variables are those of the other module. `norms` are the paths of these LayerNorms, those in
    `unshifted` have lost their shift.
    """

    module_with_layer_norms: nn.Module
    norms: frozenset[str]
    unshifted: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module, norms: frozenset[str], unshifted: frozenset[str]) -> nn.Module:
        """The module with these norms replaced; one that has some already is not wrapped again."""
        if isinstance(module, cls):
            norms, unshifted = norms | module.norms, unshifted | module.unshifted
            module = module.module_with_layer_norms
        return cls(module, norms, unshifted)

    def setup(self) -> None:
        """Share the scope, so that all variables have the same paths."""
        nn.share_scope(self, self.module_with_layer_norms)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Call the module."""
        if self.is_initializing():
            return self.module_with_layer_norms(*inputs, **keywords)
        with nn.intercept_methods(_replacing(self.norms, self.unshifted)):
            return self.module_with_layer_norms(*inputs, **keywords)


def _replacing(norms: Container[str], unshifted: Container[str]) -> Callable[..., Any]:
    def intercept(call: Any, args: Any, keywords: Any, context: Any) -> Any:
        path = _path(context.module)
        if not (_is_norm_call(context) and path in norms):
            return call(*args, **keywords)
        return _rms_norm(context.module, path not in unshifted, *args, **keywords)

    return intercept


def _path(module: nn.Module) -> str:
    """Where its variables are: a module given as an attribute of another one has a longer path."""
    path = module.path
    return "/".join(path[1:] if path[:1] == ("module_with_layer_norms",) else path)


def _is_norm_call(context: Any) -> bool:
    """Subclasses may compute something else."""
    return type(context.module) is nn.LayerNorm and context.method_name == "__call__"


def _rms_norm(norm: nn.LayerNorm, shifted: bool, x: Any, **keywords: Any) -> jax.Array:
    """What `nn.RMSNorm` makes of `x` with the parameters of a LayerNorm."""
    alike = {field.name for field in fields(nn.RMSNorm)} - {"parent", "name"}
    rms = nn.RMSNorm(**{name: getattr(norm, name) for name in alike}, parent=None)
    own = norm.variables.get("params", {})
    scale = {"scale": own["scale"]} if norm.use_scale else {}
    y: Any = rms.apply({"params": scale}, x, **keywords)
    if not (shifted and norm.use_bias):
        return y
    return y + nn.unbox(own["bias"]).astype(y.dtype)
