"""Makes LayerNorms as cheap as RMSNorms, exactly, without touching the model's code.

Guides, the theory whose sections docstrings name, and this reference: https://jax-lnfold.readthedocs.io
"""

from . import rules
from .api import analyze, fold, plan_fold
from .axes.axis_set import AxisSet
from .errors import (
    FoldError,
    NotAnalysedError,
    PlanFormatError,
    PlanMismatchError,
    TraceError,
    TreeError,
)
from .fitting import RegressedNorm, Regression
from .folded import Folded
from .folded_functions import FoldedFunctions
from .kernels.check import LayerNormCheck, check_layer_norm
from .kernels.declaration import layer_norm
from .measuring import measure
from .models.folded_model import FoldedModel
from .models.rms_model import RMSModel, with_rms_norms
from .plan.edits.affine import AffineEdit, AffineReader
from .plan.edits.assumed import AssumedEdit
from .plan.edits.center import CenterEdit
from .plan.edits.drop import DropEdit
from .plan.edits.hide import HideEdit, HidingReader
from .plan.edits.means import MeanEdit
from .plan.edits.queries import QueryEdit
from .plan.edits.scale import ScaleEdit
from .plan.edits.untie import UntieEdit
from .plan.file import LeafSpec
from .plan.plan import FoldPlan
from .program.graph import Location
from .regression import regress
from .report.approximation import Approximation
from .report.cost import Cost
from .report.norms import Insertion, Norm
from .report.outcome import ScaleLeft, TiedLeaf, UntiedLeaf
from .report.report import Report
from .report.statistics import MeanShare, NormStatistics, Statistics
from .rewrite.defer import Deferral
from .rewrite.matrix_unit import MatrixSum
from .rewrite.respell import Respelled
from .training import CenterState, center_gradients, center_updates
from .untied import Untied
from .verification import Verification, verify
from .version import VERSION

__version__ = VERSION

__all__ = [
    "AffineEdit",
    "AffineReader",
    "Approximation",
    "AssumedEdit",
    "AxisSet",
    "CenterEdit",
    "CenterState",
    "Cost",
    "Deferral",
    "DropEdit",
    "FoldError",
    "FoldPlan",
    "Folded",
    "FoldedFunctions",
    "FoldedModel",
    "HideEdit",
    "HidingReader",
    "Insertion",
    "LayerNormCheck",
    "LeafSpec",
    "Location",
    "MatrixSum",
    "MeanEdit",
    "MeanShare",
    "Norm",
    "NormStatistics",
    "NotAnalysedError",
    "PlanFormatError",
    "PlanMismatchError",
    "QueryEdit",
    "RMSModel",
    "RegressedNorm",
    "Regression",
    "Report",
    "Respelled",
    "ScaleEdit",
    "ScaleLeft",
    "Statistics",
    "TiedLeaf",
    "TraceError",
    "TreeError",
    "UntieEdit",
    "Untied",
    "UntiedLeaf",
    "Verification",
    "analyze",
    "center_gradients",
    "center_updates",
    "check_layer_norm",
    "fold",
    "layer_norm",
    "measure",
    "plan_fold",
    "regress",
    "rules",
    "verify",
    "with_rms_norms",
]


def __dir__() -> list[str]:
    """The public names: modules are rooms of the house, whose names may change."""
    return [*__all__, "__version__"]
