"""Makes LayerNorms as cheap as RMSNorms, exactly, without touching the model's code."""

from . import rules
from .api import analyze, fold, plan_fold
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
from .kernels.layer_norm import layer_norm
from .measuring import measure
from .models.folded_model import FoldedModel
from .models.rms_model import RMSModel, with_rms_norms
from .plan.plan import FoldPlan
from .regression import regress
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
    "LayerNormCheck",
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
