"""Optimizers for the model you return."""

from lagless._deprecated import former_names as _former_names
from lagless.optim._averaged import AveragedOptimizer as AveragedOptimizer
from lagless.optim._pace import PACE as PACE
from lagless.optim._primal import PrimalAveraging as PrimalAveraging
from lagless.optim._primal_family import gpa as gpa, lookahead as lookahead, schedule_free as schedule_free
from lagless.optim._pull_statistics import PullStatistics as PullStatistics
from lagless.optim._pullback import Pullback as Pullback
from lagless.optim.bias_corrected import (
    BiasCorrectedAdamW as BiasCorrectedAdamW,
    BiasCorrectedShampoo as BiasCorrectedShampoo,
    BiasCorrectedSophia as BiasCorrectedSophia,
    Correction as Correction,
    GradientNoise as GradientNoise,
    NoiseEstimate as NoiseEstimate,
    NoiseScale as NoiseScale,
    sampled_label_loss as sampled_label_loss,
)

__getattr__ = _former_names(__name__, {"Statistics": "lagless.optim:PullStatistics"})
