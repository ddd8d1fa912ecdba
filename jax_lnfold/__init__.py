"""Makes LayerNorms as cheap as RMSNorms, exactly, without touching the model's code."""

from .api import Folded, analyze, fold
from .errors import (
    FoldError,
    NotAnalysedError,
    PlanFormatError,
    PlanMismatchError,
    TraceError,
    TreeError,
)
from .plan import FoldPlan
from .report import Report
from .verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "FoldError",
    "FoldPlan",
    "Folded",
    "NotAnalysedError",
    "PlanFormatError",
    "PlanMismatchError",
    "Report",
    "TraceError",
    "TreeError",
    "Verification",
    "analyze",
    "fold",
    "verify",
]
