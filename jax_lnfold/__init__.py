"""Makes LayerNorms as cheap as RMSNorms, exactly, without touching the model's code.

Guides, the theory whose sections docstrings name, and this reference: https://jax-lnfold.readthedocs.io
"""

from .api import analyze, fold, plan_fold
from .errors import (
    FoldError,
    NotAnalysedError,
    PlanFormatError,
    PlanMismatchError,
    TraceError,
    TreeError,
)
from .folded import Folded
from .folded_functions import FoldedFunctions
from .measuring import measure
from .models.folded_model import FoldedModel
from .models.rms_model import RMSModel, with_rms_norms
from .plan.plan import FoldPlan
from .regression import RegressedNorm, Regression, regress
from .report.report import Report
from .report.statistics import MeanShare, NormStatistics, Statistics
from .training import CenterState, center_gradients, center_updates
from .untied import Untied
from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "CenterState",
    "FoldError",
    "FoldPlan",
    "Folded",
    "FoldedFunctions",
    "FoldedModel",
    "MeanShare",
    "NormStatistics",
    "NotAnalysedError",
    "PlanFormatError",
    "PlanMismatchError",
    "RMSModel",
    "RegressedNorm",
    "Regression",
    "Report",
    "Statistics",
    "TraceError",
    "TreeError",
    "Untied",
    "Verification",
    "analyze",
    "center_gradients",
    "center_updates",
    "fold",
    "measure",
    "plan_fold",
    "regress",
    "verify",
    "with_rms_norms",
]
