"""Optimizers for the model you return."""

from lagless.optim._averaged import AveragedOptimizer as AveragedOptimizer
from lagless.optim._pace import PACE as PACE
from lagless.optim._pullback import Pullback as Pullback
from lagless.optim._statistics import Statistics as Statistics
from lagless.optim.bias_corrected import BiasCorrectedAdamW as BiasCorrectedAdamW
from lagless.optim.bias_corrected import BiasCorrectedShampoo as BiasCorrectedShampoo
from lagless.optim.bias_corrected import BiasCorrectedSophia as BiasCorrectedSophia
from lagless.optim.bias_corrected import Correction as Correction
from lagless.optim.bias_corrected import sampled_label_loss as sampled_label_loss
