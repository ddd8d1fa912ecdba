"""A zoo of small Flax linen models wired like the published architectures."""

from . import encoders, language, pyramid, vision
from .base import NORMS, Built, Case, perturb

ZOO: tuple[Case, ...] = (*vision.CASES, *pyramid.CASES, *language.CASES, *encoders.CASES)

__all__ = ["NORMS", "ZOO", "Built", "Case", "perturb"]
