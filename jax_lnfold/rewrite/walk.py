"""A walk over a jaxpr and those inside of it, for rewrites that change equations of one jaxpr."""

from __future__ import annotations

from typing import Any

from .._compat import (
    Jaxpr,
    JaxprEqn,
    call_jaxpr,
    close,
    consts_of,
    control_flow,
    open_jaxpr,
    with_bodies,
    with_call_jaxpr,
)
from ..program.graph import CallPath, Graph


class Walk:
    """Rewrites every jaxpr by `body`; what is sealed or runs inside of a `shard_map` is left."""

    def __init__(self, graph: Graph) -> None:
        """Walk over the program that the graph is of."""
        self.graph = graph

    def body(self, jaxpr: Jaxpr, path: CallPath) -> Jaxpr:
        """The new jaxpr, the very same one where nothing changes."""
        raise NotImplementedError

    def closed(self, closed: Any, path: CallPath) -> Any:
        """The rewritten jaxpr with its constants, the very same one where nothing changes."""
        jaxpr = open_jaxpr(closed)
        if path in self.graph.sealed or self.graph.mesh_axes.get(path, True):
            return closed
        body = self.body(jaxpr, path)
        return closed if body is jaxpr else close(body, consts_of(closed))

    def inside(self, eqn: JaxprEqn, site: CallPath) -> JaxprEqn:
        """The equation with its own jaxprs rewritten."""
        if site in self.graph.op_at or site in self.graph.stand_ins:
            return eqn
        if (control := control_flow(eqn)) is not None:
            new = {b.key: self.closed(b.jaxpr, (*site, i)) for i, b in enumerate(control.bodies)}
            changed = any(new[b.key] is not b.jaxpr for b in control.bodies)
            return eqn.replace(params=with_bodies(eqn, new)) if changed else eqn
        inner = call_jaxpr(eqn)
        body = None if inner is None else self.closed(inner, site)
        if body is inner or body is None:
            return eqn
        return eqn.replace(params=with_call_jaxpr(eqn, body))
