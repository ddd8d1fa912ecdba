"""The program as one flat graph: values by number, the operation that makes each, its readers."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import (
    ClosedJaxpr,
    JaxprEqn,
    Var,
    has_effects,
    is_tracer,
)
from ..axes.axis_set import AxisSet
from ..printable import printable
from .declared import DeclaredCall, declared_call
from .devices import MeshAxes
from .frames import UNKNOWN, Line, source_line
from .primitives import COMMUTATIVE, MOVES, MUL, PURE

CallPath = tuple[int, ...]
"""Equation indices of the calls around a jaxpr, outermost first."""
OutputPath = tuple[str, ...]
"""What picks an output from what a function returns, such as ``("[1]", "['stem']")``."""


@dataclass(frozen=True, slots=True)
class Location:
    """An operation by its primitive, module path, source file and line (empty, 0 if unknown).

    Example:
        >>> from jax_lnfold import Location
        >>> print(Location("reduce_sum", "ViT/norm", "/my/model.py", 12))
        `reduce_sum` (ViT/norm, model.py:12)
    """

    primitive: str
    module: str
    file: str
    line: int

    def __str__(self) -> str:
        """``primitive (module path, file.py:line)``."""
        where = printable(", ".join(part for part in (self.module, self.where) if part))
        return f"`{self.primitive}` ({where})" if where else f"`{self.primitive}`"

    @property
    def where(self) -> str:
        """``file.py:line``, or the line of a notebook's cell."""
        *_, folder, name = ("", *self.file.split("/"))
        name = "cell" if folder.startswith("ipykernel_") else name
        return f"{name}:{self.line}" if self.file else ""


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One equation at one call site; `inputs` and `outputs` are value numbers.

    `calls` are the call equations around it, innermost first; if it `stands_in`, it is a part of
    what the innermost one means. `role` names what a loop or a conditional does with one value
    (see `JOINS` and `rules.control`), empty for other equations; `carry` is the number of the
    carry that a loop joins. `caller` is the line that calls a model which a package defines.
    `marks` are those that it was traced under.
    """

    index: int
    eqn: JaxprEqn
    path: CallPath
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    calls: tuple[JaxprEqn, ...]
    role: str = ""
    carry: int | None = None
    stands_in: bool = False
    caller: Callable[[], Line] = lambda: UNKNOWN
    marks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the primitive, or the role."""
        return self.role or self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the equation."""
        return self.eqn.params

    @property
    def is_square(self) -> bool:
        """Whether it squares its operand."""
        power = self.name == "integer_pow" and self.params["y"] == 2
        return self.name == "square" or power or (self.name == MUL and len({*self.inputs}) == 1)

    def location(self) -> Location:
        """What a person may look for."""
        eqn = self.calls[0] if self.stands_in else self.eqn
        call = declared_call(eqn)
        name = call.name if call else eqn.primitive.name
        return Location(name, self.module, *source_line((self.eqn, *self.calls), self.caller()))


OTHER_MEANING = "opaque"
"""The role of an operation that means something else than its primitive does elsewhere."""
DROPOUT = "dropout"
"""The role of an operation that is taken for the identity on what it drops at random."""
QUANTIZE = "quantize"
"""The role of a conversion to fewer digits than those of any dtype whose numbers can be edited."""
ROWS = frozenset({"loop_slice", "device_row"})
"""Roles of what takes one row: a loop each in its turn, the end of a `shard_map` any of them."""
JOINS = frozenset({"loop_carry", "loop_result", "branch_result"})
"""Roles whose output is one of the inputs: the first and the next value of a carry, branches."""
ROLES = ROWS | JOINS | {OTHER_MEANING, DROPOUT, QUANTIZE, "loop_stack", "observe"}
"""All roles, by which no primitive goes."""


class Graph:
    """Values, the operation that makes each, and the operations that read it.

    Loops are walked into once: a carry is made from its first and its next value. `uses` lists
    live operations only: what cannot reach an output or an effect is dead code and notices nothing.
    """

    def __init__(self) -> None:
        """Start without values; `flatten` fills the graph."""
        self.avals: list[Any] = []
        self.producer: list[tuple[Op, int] | None] = []
        self.data_free: list[bool] = []  # computed from parameters and constants only
        self.fixed: list[bool] = []  # computed from constants only
        self.home: list[CallPath] = []  # the jaxpr that binds the value to a variable
        self.leaves: dict[int, str] = {}  # parameter leaves in tree order, with their key paths
        self.excluded: frozenset[int] = frozenset()  # leaves that must not be edited
        self.only_leaves = False  # nothing but leaves may be edited, or centered where it appears
        self.same: list[int] = []  # the first value that an equal equation of the module makes
        self.outputs: frozenset[int] = frozenset()
        self.output_paths: list[tuple[int, OutputPath]] = []  # where each output is, if known
        self.uses: list[list[tuple[Op, int]]] = []
        self.constants: dict[int, Any] = {}
        self.bound: set[int] = set()  # constants that the jaxpr binds to a variable
        self.literals: set[int] = set()  # numbers that one equation reads
        self.captured: set[int] = set()  # closed over by a function with a derivative rule
        self.is_joint = False  # the program calls several functions, in scopes of their names
        self.ops: list[Op] = []
        self.op_at: dict[CallPath, Op] = {}
        self.env: dict[CallPath, dict[Var, int]] = {}
        self.trips: dict[CallPath, int] = {(): 1}  # how often a jaxpr runs in one call
        self.mesh_axes: dict[CallPath, MeshAxes] = {}  # mesh axes of the `shard_map` around a jaxpr
        self.stand_ins: dict[CallPath, ClosedJaxpr] = {}  # programs analysed for an equation
        self.declared: dict[CallPath, DeclaredCall] = {}  # equations that are said to be norms
        self.sealed: set[CallPath] = set()  # jaxprs that no centering can be put into
        self.noise: set[int] = set()  # computed from random bits and numbers only
        self.masks: set[int] = set()  # noise that keeps or drops
        self.dropouts: dict[int, int] = {}  # operations that drop an operand at random -> which
        self._firsts: dict[Hashable, tuple[int, ...]] = {}

    def shape(self, value: int) -> tuple[Any, ...]:
        """The shape of a value."""
        return tuple(self.avals[value].shape)

    def is_sealed(self, value: int) -> bool:
        """Whether the value is made where no centering can be put.

        So it is in a call that has a derivative rule of its own, and in a stand-in.
        """
        path = self.home[value]
        return any(path[: n + 1] in self.sealed for n in range(len(path)))

    def centered_at(self, value: int) -> CallPath | None:
        """The jaxpr in which a centering of a value can be put, for all equations that read it.

        The value itself leaves every call on its way to an output of the function, so all its
        readers must be in reach of a copy that one of these jaxprs makes; None if they are not.
        """
        home = self.home[value]
        if value not in self.outputs:
            return home
        levels = {_shared(op.path, home) for op, _ in self.uses[value]}
        return levels.pop() if len(levels) == 1 else None

    def returned_at(self, values: Container[int]) -> tuple[OutputPath, ...]:
        """Where in the output tree these values are."""
        return tuple(path for value, path in self.output_paths if value in values)

    def mesh_axes_of(self, value: int) -> MeshAxes:
        """The mesh axes that the shape of a value ends in: those of the `shard_map` around it."""
        return self.mesh_axes[self.home[value]]

    def declared_at(self, op: Op) -> CallPath | None:
        """The call, declared to be a norm, that an operation is a part of the meaning of."""
        paths = (op.path[:n] for n in range(len(op.path), 0, -1)) if self.declared else ()
        return next((path for path in paths if path in self.declared), None)

    def on_one_device(self, value: int, along: AxisSet) -> AxisSet | None:
        """The set on the shard that one device holds, None if the mean spans devices."""
        mesh_axes = self.mesh_axes_of(value)
        rank = len(along.shape) - len(mesh_axes)
        if any(d >= rank for d in along.axes) or (mesh_axes and not rank):
            return None
        return AxisSet(along.shape[:rank], along.entries[:rank])

    def is_editable_constant(self, value: int) -> bool:
        """Whether a constant of the program can be replaced, and nobody else reads it.

        A derivative rule reads the constants that its function closes over by itself.
        """
        hidden = value in self.captured or self.is_sealed(value)
        return (value in self.bound or value in self.literals) and not hidden

    def function_of(self, op: Op) -> str:
        """The name of the function that an operation is of; empty if the program is one."""
        return str(op.calls[-1].source_info.name_stack) if self.is_joint and op.calls else ""

    def scalar(self, value: int) -> np.ndarray | None:
        """The number that every element of a value has, if the program fixes it."""
        while (made := self.producer[value]) is not None:
            if made[0].name not in MOVES | {"convert_element_type", "pvary"}:
                return None
            value = made[0].inputs[0]
        constant = self.constants.get(value)
        return None if constant is None or np.ndim(constant) else np.asarray(constant)

    def new_value(self, aval: Any, path: CallPath, data_free: bool, fixed: bool) -> int:
        """Add a value that nothing makes yet."""
        self.avals.append(aval)
        self.producer.append(None)
        self.data_free.append(data_free)
        self.fixed.append(fixed)
        self.home.append(path)
        self.same.append(len(self.same))
        return len(self.avals) - 1

    def new_constant(self, value: Any, aval: Any, path: CallPath) -> int:
        """Add a constant; what it is remains unknown for tracers and extended dtypes."""
        number = self.new_value(aval, path, True, True)
        if not is_tracer(value) and not jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            self.constants[number] = value
            if np.ndim(value) == 0:
                key = np.dtype(aval.dtype), np.asarray(value).tobytes()
                self.same[number] = self._firsts.setdefault(key, (number,))[0]
        return number

    def add(self, op: Op) -> None:
        """Add an operation, the maker of its outputs."""
        self.ops.append(op)
        for position, value in enumerate(op.outputs):
            self.producer[value] = (op, position)
        if op.name in PURE:
            self._note_same(op)

    def _note_same(self, op: Op) -> None:
        """Find the first equation that computes the same in the same module."""
        operands = [self.same[v] for v in op.inputs]
        operands = sorted(operands) if op.name in COMMUTATIVE else operands
        key = op.eqn.primitive, op.module, *operands, *sorted(op.params.items(), key=itemgetter(0))
        try:
            firsts = self._firsts.setdefault(key, op.outputs)
        except TypeError:  # a parameter that cannot be compared
            return
        for value, first in zip(op.outputs, firsts, strict=True):
            self.same[value] = first

    def link_uses(self) -> None:
        """Find the readers of every value, once all operations are there."""
        self.uses = [[] for _ in self.avals]
        live: set[int] = set()
        todo = list(self.outputs)
        for op in self.ops:
            if op.name == "observe" or (has_effects(op.eqn) and op.role in ("", OTHER_MEANING)):
                live.add(op.index)
                todo.extend(op.inputs)
        while todo:
            made = self.producer[todo.pop()]
            if made is not None and made[0].index not in live:
                live.add(made[0].index)
                todo.extend(made[0].inputs)
        for op in self.ops:
            if op.index in live:
                for position, value in enumerate(op.inputs):
                    self.uses[value].append((op, position))


def _shared(path: CallPath, other: CallPath) -> CallPath:
    """The innermost of the jaxprs around both."""
    return next(path[:n] for n in range(len(other), -1, -1) if path[:n] == other[:n])
