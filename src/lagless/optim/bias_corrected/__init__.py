"""Optimizers whose preconditioner is not made from the noise it divides, seen through gradient accumulation."""

from lagless.optim.bias_corrected._adamw import BiasCorrectedAdamW as BiasCorrectedAdamW
from lagless.optim.bias_corrected._gradient_noise import GradientNoise as GradientNoise
from lagless.optim.bias_corrected._noise_record import NoiseEstimate as NoiseEstimate, NoiseScale as NoiseScale
from lagless.optim.bias_corrected._report import Correction as Correction
from lagless.optim.bias_corrected._sampled_labels import sampled_label_loss as sampled_label_loss
from lagless.optim.bias_corrected._shampoo import BiasCorrectedShampoo as BiasCorrectedShampoo
from lagless.optim.bias_corrected._sophia import BiasCorrectedSophia as BiasCorrectedSophia
