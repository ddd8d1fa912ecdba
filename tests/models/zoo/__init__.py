"""A zoo of small Flax linen models wired like the published architectures."""

from . import encoders, language, pyramid, vision
from .base import NORMS, Built, Case, perturb

ZOO: tuple[Case, ...] = (*vision.CASES, *pyramid.CASES, *language.CASES, *encoders.CASES)
BY_NAME = {str(case): case for case in ZOO}

__all__ = ["BY_NAME", "NORMS", "ZOO", "Built", "Case", "perturb"]
