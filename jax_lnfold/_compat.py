"""The only importer of `jax.extend`: everything that moved between jax versions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from weakref import ref

import jax
from jax.api_util import debug_info
from jax.core import ShapedArray, Tracer
from jax.extend import linear_util
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxpr_as_fun,
    primitives,
)
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

__all__ = [
    "CUSTOM_RULES",
    "WALKED",
    "Body",
    "ClosedJaxpr",
    "Control",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Manual",
    "Primitive",
    "Var",
    "array_dtype",
    "at_clear_caches",
    "call_jaxpr",
    "call_primitive",
    "close",
    "consts_of",
    "control_flow",
    "evaluate",
    "has_effects",
    "is_explicit",
    "is_known",
    "is_of_jax",
    "is_plain_aval",
    "is_plain_call",
    "is_stranger",
    "is_tracer",
    "jaxpr_as_fun",
    "manual",
    "opaque_primitive",
    "open_jaxpr",
    "outside_of_meshes",
    "over_shards",
    "over_shards_and_more",
    "params_of_more",
    "shape_like",
    "switch",
    "trace_like",
    "trace_settings",
    "varying_axes",
    "what_is_called",
    "with_bodies",
    "with_call_jaxpr",
]

# Calls that run one jaxpr on their operands: primitive name -> parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}

WALKED = frozenset({*_CALLS, "cond", "scan", "while"})
"""Primitives that hold jaxprs which are walked into."""

CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Calls whose derivative is not that of their body: values inside must keep their meaning."""

PACKAGE = Path(__file__).parent.as_posix()
"""The folder of this package."""


def open_jaxpr(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The jaxpr without its constants (since jax 0.11 both are one class)."""
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    return inner


def consts_of(jaxpr: ClosedJaxpr | Jaxpr) -> Sequence[Any]:
    """The values of the jaxpr's `constvars`, as far as it carries them."""
    return getattr(jaxpr, "consts", ())


def close(jaxpr: Jaxpr, consts: Sequence[Any]) -> ClosedJaxpr:
    """Bind `consts` to the jaxpr's `constvars`."""
    return ClosedJaxpr(jaxpr, list(consts))


def call_jaxpr(eqn: JaxprEqn) -> ClosedJaxpr | Jaxpr | None:
    """The jaxpr that a call-like equation runs on its operands, None for other equations."""
    name = _CALLS.get(eqn.primitive.name)
    inner = eqn.params.get(name) if name else None
    if inner is None or len(open_jaxpr(inner).invars) != len(eqn.invars):
        return None
    return inner


@dataclass(frozen=True)
class Body:
    """A jaxpr inside a control-flow equation.

    `key` finds it again (parameter name, and position for the branches of a `cond`); `operands`
    are the positions of the equation's operands that it takes unchanged, before its carries.
    """

    key: tuple[str, int | None]
    jaxpr: ClosedJaxpr
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Control:
    """A loop or a conditional, in one form for all jax versions.

    `bodies` run in the equation, the last one makes its results. The carries start at the
    operands `carries`; `slices` are operands read row by row; `length` is the trip count, 1 if
    unknown. `observed` operands decide what runs, and so do the results of the bodies before the
    last one of a loop.
    """

    bodies: tuple[Body, ...]
    is_loop: bool
    carries: tuple[int, ...] = ()
    slices: tuple[int, ...] = ()
    length: int = 1
    observed: tuple[int, ...] = ()


def control_flow(eqn: JaxprEqn) -> Control | None:
    """The parts of a `scan`, `while` or `cond` equation, None for other equations."""
    p, count = eqn.params, len(eqn.invars)
    if eqn.primitive.name == "scan":
        consts, carries = (
            [len(list(part.vals)) for part in p["ft_in"].unpack()][:2]
            if "ft_in" in p
            else (p["num_consts"], p["num_carry"])
        )
        end = consts + carries
        body = Body(("jaxpr", None), p["jaxpr"], tuple(range(consts)))
        if len(open_jaxpr(body.jaxpr).outvars) != len(eqn.outvars):
            return None
        starts, rows = tuple(range(consts, end)), tuple(range(end, count))
        return Control((body,), True, starts, rows, p["length"])
    if eqn.primitive.name == "while":
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        test = Body(("cond_jaxpr", None), p["cond_jaxpr"], tuple(range(first)))
        body = Body(("body_jaxpr", None), p["body_jaxpr"], tuple(range(first, second)))
        return Control((test, body), True, tuple(range(second, count)))
    if eqn.primitive.name == "cond":
        operands = tuple(range(1, count))
        bodies = (Body(("branches", i), b, operands) for i, b in enumerate(p["branches"]))
        return Control(tuple(bodies), False, observed=(0,))
    return None


@dataclass(frozen=True)
class Manual:
    """A `shard_map`: its mesh axes with their sizes, and how operands and results are laid out."""

    axes: tuple[tuple[str, int], ...]
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]


def manual(eqn: JaxprEqn) -> Manual | None:
    """The parts of a `shard_map` equation, None for other equations."""
    if eqn.primitive.name != "shard_map":
        return None
    p = eqn.params
    names = p["newly_manual_axes"]
    axes = tuple((name, p["mesh"].shape[name]) for name in p["mesh"].axis_names if name in names)
    return Manual(axes, tuple(p["in_specs"]), tuple(p["out_specs"]))


def with_bodies(eqn: JaxprEqn, bodies: Mapping[tuple[str, int | None], Any]) -> dict[str, Any]:
    """The parameters of the equation with other jaxprs in place of those named."""
    params = dict(eqn.params)
    for (name, position), body in bodies.items():
        if position is None:
            params[name] = body
        else:
            branches = list(params[name])
            branches[position] = body
            params[name] = tuple(branches)
    return params


def with_call_jaxpr(eqn: JaxprEqn, body: ClosedJaxpr) -> dict[str, Any]:
    """The parameters of the call-like equation with another body."""
    name = _CALLS[eqn.primitive.name]
    closed = isinstance(eqn.params[name], ClosedJaxpr)
    return {**eqn.params, name: body if closed else open_jaxpr(body)}


def params_of_more(eqn: JaxprEqn, positions: Sequence[int]) -> dict[str, Any] | None:
    """The parameters of a call, loop or conditional with more operands, but for its bodies.

    The new ones are like those at `positions` and the last of a call or conditional, the last
    that the body of a loop takes unchanged. None if not known how.
    """
    p, name, more = dict(eqn.params), eqn.primitive.name, len(positions)
    if name in ("jit", "pjit"):
        for each in ("in_shardings", "in_layouts"):
            p[each] = (*p[each], *(p[each][i] for i in positions))
        p["donated_invars"] = (*p["donated_invars"], *[False] * more)
    elif name == "shard_map":
        p["in_specs"] = (*p["in_specs"], *(p["in_specs"][i] for i in positions))
    elif name == "while":
        p["body_nconsts"] += more
    elif name == "scan" and "ft_in" in p:
        consts, *rest = p["ft_in"].unpack()
        if len(consts.elts) != len(list(consts.vals)):
            return None
        consts = type(consts)(*consts.elts, *(consts.elts[i] for i in positions))
        p["ft_in"] = type(p["ft_in"])(consts, *rest)
    elif name == "scan":
        p["num_consts"] += more
    elif name in ("remat2", "checkpoint") and not isinstance(p["prevent_cse"], bool):
        return None
    return p


_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
)

_PRIMITIVES = {
    primitive.name: primitive
    for module in (primitives, jax.lax)
    for primitive in vars(module).values()
    if isinstance(primitive, Primitive)
}


def is_stranger(eqn: JaxprEqn) -> bool:
    """Whether somebody else's primitive goes by the name of one of jax's own."""
    return _PRIMITIVES.get(eqn.primitive.name, eqn.primitive) is not eqn.primitive


# Numerical operations of jax that it has no public name for.
_UNLISTED = frozenset(
    "composite mesh_cast pcast platform_index psum_invariant pvary ragged_dot_general "
    "reduce_scatter reshard".split()
)


def is_known(eqn: JaxprEqn) -> bool:
    """Whether the primitive is an operation of jax's own: no kernel, no call out of it."""
    name = eqn.primitive.name
    return not is_stranger(eqn) and (name in _PRIMITIVES or name in WALKED or name in _UNLISTED)


def is_of_jax(primitive: Primitive) -> bool:
    """Whether a primitive goes by the name of one of jax's own."""
    return primitive.name in _PRIMITIVES or primitive.name in WALKED | _UNLISTED


def what_is_called(eqn: JaxprEqn) -> Hashable:
    """The primitive, or ``("ffi", target)`` and ``("pallas", source)`` of calls of kernels.

    The source is the file and the line of the function that is the kernel.
    """
    name, p = eqn.primitive.name, eqn.params
    if name == "ffi_call" and "target_name" in p:
        return "ffi", p["target_name"]
    if name == "pallas_call" and isinstance(p.get("jaxpr"), Jaxpr):
        return "pallas", (p["jaxpr"].debug_info.func_src_info or "").rpartition(" at ")[2]
    return eqn.primitive


def array_dtype(aval: Any) -> Any:
    """The dtype of an array's type, None for other types: tokens, references."""
    return aval.dtype if isinstance(aval, ShapedArray) else None


def evaluate(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation, in the context (mesh, settings) that it was traced in."""
    given, results = [Var(a.aval) for a in eqn.invars], [Var(v.aval) for v in eqn.outvars]
    alone = eqn.replace(invars=[*given], outvars=results)
    jaxpr = _no_jaxpr().replace(invars=given, outvars=results, eqns=[alone])
    return list(jaxpr_as_fun(close(jaxpr, ()))(*operands))


@cache
def _no_jaxpr() -> Jaxpr:
    return open_jaxpr(jax.make_jaxpr(lambda: ())())


def switch(
    eqn: JaxprEqn, index: Any, branches: Sequence[Callable[..., Any]], operands: Sequence[Any]
) -> list[Any]:
    """The `cond` equation with other branches."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return list(jax.lax.switch(index, branches, *operands))
    default, named = None, {}
    for names, branch in zip(platforms, branches, strict=True):
        if names is None:
            default = branch
        else:
            named |= dict.fromkeys(names, branch)
    return list(jax.lax.platform_dependent(*operands, default=default, **named))


def over_shards(
    eqn: JaxprEqn, body: Callable[..., Sequence[Any]], operands: Sequence[Any]
) -> list[Any]:
    """The `shard_map` equation with another body."""
    results, _ = over_shards_and_more(eqn, lambda *shards: (body(*shards), ()), operands)
    return results


def over_shards_and_more(
    eqn: JaxprEqn, body: Callable[..., tuple[Sequence[Any], Any]], operands: Sequence[Any]
) -> tuple[list[Any], Any]:
    """The `shard_map` equation with a body that returns its results, and a tree of more arrays.

    Of these the arrays of all devices come back one behind the other along their first axis.
    """
    p, devices = eqn.params, manual(eqn)
    assert devices is not None

    def both(*shards: Any) -> tuple[tuple[Any, ...], Any]:
        results, more = body(*shards)
        return tuple(results), more

    mapped = jax.shard_map(
        both,
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=(tuple(p["out_specs"]), PartitionSpec(tuple(name for name, _ in devices.axes))),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    results, more = mapped(*operands)
    return list(results), more


def is_plain_call(eqn: JaxprEqn) -> bool:
    """Whether the equation calls a function jitted without options, outside of any mesh."""
    p, plain = eqn.params, _plain_call()
    return (
        eqn.primitive.name in ("jit", "pjit")
        and p.keys() == plain.keys()
        and p["ctx_mesh"].empty
        and all(x == plain[name][0] for name in _OF_EACH_ARGUMENT for x in p[name])
        and all(p[name] == plain[name] for name in ("keep_unused", "compiler_options_kvs"))
    )


_OF_EACH_ARGUMENT = ("in_shardings", "out_shardings", "in_layouts", "out_layouts", "donated_invars")


@cache
def _plain_call() -> dict[str, Any]:
    return open_jaxpr(jax.make_jaxpr(jax.jit(lambda x: x))(0.0)).eqns[0].params


def has_effects(eqn: JaxprEqn) -> bool:
    """Whether the equation does more than compute its results; naming a mesh axis is no effect."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def is_tracer(x: Any) -> bool:
    """Whether `x` stands for a value that is not known yet."""
    return isinstance(x, Tracer)


def trace_settings() -> tuple[Hashable, ...]:
    """The settings of jax that change what a function is traced to."""
    return (
        *(getattr(jax.config, name, None) for name in _SETTINGS),
        jax.sharding.get_abstract_mesh(),
    )


class _Sign:
    """Lives in a cache of jax until that is cleared."""


@linear_util.cache
def _sign(_: linear_util.WrappedFun) -> _Sign:
    return _Sign()


def at_clear_caches(call: Callable[[], object]) -> Any:
    """Make the next `jax.clear_caches()` call something, if what is returned lives until then."""

    def key() -> None:
        """What the cache remembers it by, and no longer than this lives."""

    about = debug_info("jax_lnfold", key, (), {})
    key_of_cache = linear_util.wrap_init(key, debug_info=about)
    return key, ref(_sign(key_of_cache), lambda _: call())


def varying_axes(aval: Any) -> tuple[str, ...]:
    """Mesh axes along which a value inside of a `shard_map` is known to vary."""
    return tuple(sorted(aval.manual_axis_type.varying))


def is_explicit(aval: Any) -> bool:
    """Whether the type of a value says how it is spread over devices."""
    return AxisType.Explicit in aval.sharding.mesh.axis_types


def shape_like(aval: Any) -> jax.ShapeDtypeStruct:
    """What an array of this type is called outside of a trace."""
    sharding = None if aval.sharding.mesh.empty else aval.sharding
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


def trace_like(fn: Callable[..., jax.Array], *avals: Any) -> Jaxpr:
    """The jaxpr of a function of arrays, traced where these stand.

    Inside of a `shard_map` types say along which mesh axes a value varies, and so must those of
    new equations; there is one array then.
    """
    likes = [shape_like(a) for a in avals]
    if not any(map(varying_axes, avals)):
        return open_jaxpr(jax.make_jaxpr(fn)(*likes))
    (aval,) = avals
    varying, mesh = varying_axes(aval), aval.sharding.mesh
    outside = mesh.update_axis_types(dict.fromkeys(mesh.manual_axes, AxisType.Auto))
    devices = prod(mesh.shape[name] for name in varying)
    spread = jax.ShapeDtypeStruct((devices * aval.shape[0], *aval.shape[1:]), aval.dtype)
    spec, names = PartitionSpec(varying), set(mesh.manual_axes)
    mapped = jax.shard_map(fn, mesh=outside, in_specs=spec, out_specs=spec, axis_names=names)
    with use_abstract_mesh(outside):
        (eqn,) = open_jaxpr(jax.make_jaxpr(mapped)(spread)).eqns
    return open_jaxpr(eqn.params["jaxpr"])


def is_plain_aval(aval: Any) -> bool:
    """Whether the type of an array says no more than shape and dtype."""
    return not varying_axes(aval) and not is_explicit(aval) and aval.sharding.mesh.empty


def outside_of_meshes() -> Any:
    """A context without the mesh of the `shard_map`, or the explicit one, that is traced around."""
    return use_abstract_mesh(AbstractMesh((), ()))


Batch = Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], tuple[list[Any], list[int]]]


def call_primitive(name: str, program: str, batch: Batch) -> Primitive:
    """A primitive that computes what a jaxpr does, its parameter `program`, in one equation.

    It compiles to what that compiles to, and its derivatives are those of the equations in there.
    `batch(operands, axes, params)` computes it for the samples along axes (None for operands that
    are shared), and says which axes of the results they are.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def run(*operands: Any, **params: Any) -> list[Any]:
        return list(jaxpr_as_fun(params[program])(*operands))

    def types(*avals: Any, **params: Any) -> list[Any]:
        closed = params[program]
        same = list(avals) == list(closed.in_avals)
        return list((closed if same else jax.make_jaxpr(jaxpr_as_fun(closed))(*avals)).out_avals)

    def derivative(primals: Any, tangents: Any, **params: Any) -> tuple[list[Any], list[Any]]:
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

        def of_moving(*given: Any) -> list[Any]:
            operands = [*primals]
            for i, x in zip(moving, given, strict=True):
                operands[i] = x
            return run(*operands, **params)

        given, slopes = ([xs[i] for i in moving] for xs in (primals, tangents))
        results, changes = jax.jvp(of_moving, given, slopes)
        return results, [_tangent(y, change) for y, change in zip(results, changes, strict=True)]

    primitive.def_impl(run)
    primitive.def_abstract_eval(types)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    ad.primitive_jvps[primitive] = derivative
    batching.primitive_batchers[primitive] = lambda xs, axes, **params: batch(xs, axes, params)
    return primitive


def _tangent(y: Any, change: Any) -> Any:
    """Numbers without a derivative have no tangent."""
    return ad.Zero(jax.typeof(change)) if change.dtype == jax.dtypes.float0 else change


def opaque_primitive(name: str) -> Primitive:
    """A primitive of which nothing is known but the shapes and dtypes of its `results`.

    It stands in programs that are analysed, and is never computed.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def batched(xs: Any, axes: Any, results: Any) -> tuple[Any, list[int]]:
        (size, *_) = (x.shape[d] for x, d in zip(xs, axes, strict=True) if d is not None)
        more = tuple(((size, *shape), dtype) for shape, dtype in results)
        return primitive.bind(*xs, results=more), [0] * len(more)

    primitive.def_abstract_eval(lambda *_, results: [ShapedArray(*y) for y in results])
    batching.primitive_batchers[primitive] = batched
    return primitive
