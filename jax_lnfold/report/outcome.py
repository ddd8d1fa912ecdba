"""What a fold found in a program and did to it: plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .._compat import ClosedJaxpr
from ..plan.edits.affine import AffineEdit
from ..plan.edits.center import CenterEdit
from ..plan.edits.queries import QueryEdit
from ..plan.edits.scale import ScaleEdit
from ..plan.plan import FoldPlan
from ..program.graph import Location
from ..rewrite.defer import Deferral
from ..rewrite.matrix_unit import MatrixSum
from ..rewrite.respell import Respelled
from .approximation import Approximation
from .events import Event
from .norms import Insertion, Norm
from .statistics import Statistics

Programs = Callable[[], tuple[ClosedJaxpr, ClosedJaxpr]]
"""The original and the folded program."""


@dataclass(frozen=True, slots=True)
class ScaleLeft:
    """A scale (its key path) that no linear layer takes up, and why; `fold_affine` asked for it.

    Example:
        >>> from jax_lnfold import ScaleLeft
        >>> ScaleLeft("norm/scale", "it is returned").key_path
        'norm/scale'
    """

    key_path: str
    reason: str


@dataclass(frozen=True, slots=True)
class UntiedLeaf:
    """A leaf (its key path in the tree that was folded) of which lookups read a copy of its own.

    Example:
        >>> from jax_lnfold import UntiedLeaf
        >>> UntiedLeaf("embedding", bytes=4096).bytes
        4096
    """

    key_path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class TiedLeaf:
    """A leaf (its key path) that stays as it is though `untie` asked for copies, and why.

    Example:
        >>> from jax_lnfold import TiedLeaf
        >>> TiedLeaf("embedding", "nothing looks it up").reason
        'nothing looks it up'
    """

    key_path: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What a fold found and did, as plain data.

    `plan` says how parameters are edited, `edited_bytes` is the size of those, `events` is what the
    pictures show.
    `constants` counts what is centered though it is no parameter, for nothing: it depends on no
    input and no parameter, so that the compiler does it.
    `opaque` counts, by primitive, the operations met of which nothing is known; LayerNorms before
    or behind them stay as they are. `visits` is how often the analysis looked at an equation.
    `rounded` are key paths of edited leaves whose dtype has fewer digits than the arithmetic they
    are used in: they are rounded once more, as they would not be if they were edited before a cast.
    `unseen` counts, by place, operations that run what cannot be looked into: LayerNorms in there
    are not found. `dropouts` counts the dropouts taken for the identity, `deviation` is the largest
    difference of an output that they caused on the example inputs, relative to the largest output
    (None if the inputs were shapes only). With `fold_affine`, `affine_left` are the scales that
    stay. If parameters were excluded, `unrestricted` is how many LayerNorms would fold, and how
    many explicit centerings would be inserted, if none were. `untied` are the leaves of which
    lookups read a copy, and the bytes of each copy; with `untie`, `tied` are those in the way that
    stay. `statistics` are those of `with_statistics`. `approximation` is what was measured if
    LayerNorms do without a mean that is not zero. `on_matrix_unit` are sums that are products,
    `respelled` the LayerNorms that take another number of passes. With `assume_values`, `unknown`
    are the leaves of which nothing is assumed: their values are not at hand.
    """

    norms: tuple[Norm, ...]
    insertions: tuple[Insertion, ...]
    plan: FoldPlan
    deferred: tuple[Deferral, ...]
    opaque: dict[str, int]
    visits: int
    affine_left: tuple[ScaleLeft, ...] = ()
    rounded: tuple[str, ...] = ()
    dropouts: int = 0
    deviation: float | None = None
    constants: int = 0
    edited_bytes: int = 0
    events: tuple[Event, ...] = ()
    n_operations: int = 0
    programs: Programs | None = field(default=None, compare=False)
    unseen: dict[Location, int] = field(default_factory=dict)
    unrestricted: tuple[int, int] | None = None
    statistics: Statistics | None = field(default=None, compare=False)
    approximation: Approximation | None = None
    untied: tuple[UntiedLeaf, ...] = ()
    tied: tuple[TiedLeaf, ...] = ()
    on_matrix_unit: tuple[MatrixSum, ...] = ()
    respelled: tuple[Respelled, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def edits(self) -> tuple[CenterEdit, ...]:
        """Parameters that are centered."""
        return self.plan.edits

    @property
    def scales(self) -> tuple[ScaleEdit, ...]:
        """Scales that the linear layers before them take up."""
        return self.plan.scales

    @property
    def affine(self) -> tuple[AffineEdit, ...]:
        """Scales and shifts that the linear layers behind them take up."""
        return self.plan.affine

    @property
    def queries(self) -> tuple[QueryEdit, ...]:
        """The scales of keys that those of queries take up."""
        return self.plan.queries

    @property
    def n_folded(self) -> int:
        """LayerNorms that run as RMSNorms in the folded program."""
        return sum(norm.folded for norm in self.norms)

    @property
    def n_dropped(self) -> int:
        """LayerNorms among them that do without a mean which is not zero."""
        return sum(norm.dropped for norm in self.norms)

    @property
    def n_inserted(self) -> int:
        """Explicit centerings in the folded program."""
        return len(self.insertions)
