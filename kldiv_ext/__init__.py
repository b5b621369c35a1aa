"""Fused forward and backward KL divergence for PyTorch, for distilling models with large vocabularies."""

from . import reference
from ._library import DIVERGENCES as _DIVERGENCES
from .functional import TokenStats, distillation_loss, kl_div, linear_distillation_loss, token_stats
from .modules import DistillationLoss, KLDivLoss, LinearDistillationLoss

__version__ = "0.2.0"

DIVERGENCES: tuple[str, ...] = tuple(_DIVERGENCES)
"""The names that `distillation_loss` takes as `divergence`."""

__all__ = [
    "DIVERGENCES",
    "DistillationLoss",
    "KLDivLoss",
    "LinearDistillationLoss",
    "TokenStats",
    "distillation_loss",
    "kl_div",
    "linear_distillation_loss",
    "reference",
    "token_stats",
]
